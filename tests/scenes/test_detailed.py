# SPDX-License-Identifier: Apache-2.0
"""What scenes-smol learns to say: true where it should be, and wrong at the rates that are written down."""

import re

from vlm_attn.evals.chair import coco_vocabulary
from vlm_attn.evals.scenes import detailed, text, world

SCENES = [world.scene("train", i) for i in range(300)]


def named(caption):
    return {mention.category for mention in coco_vocabulary().mentions(caption)}


def test_without_noise_a_caption_names_what_is_there_as_chair_reads_it():
    for scene in SCENES:
        caption = detailed.detailed_caption(world.Draw("test", scene.index), scene, noise=0)
        assert named(caption) == set(scene.categories), caption
        assert 3 <= caption.count(".") <= 6
        assert "  " not in caption
        assert all(sentence[0].isupper() for sentence in re.split(r"(?<=\.) ", caption))


def test_places_sizes_colours_and_counts_are_those_of_the_scene():
    def thing(category, centre, side=50, opacity=1.0, evidence="clear"):
        return world.SceneObject(category, centre, side, 0, False, opacity, evidence)

    scene = world.Scene(
        "train", 0, "office", (thing("car", (10, 10), 94), thing("dog", (110, 200), 20), thing("dog", (215, 110), 22))
    )
    for seed in range(20):
        caption = detailed.detailed_caption(world.Draw(seed), scene, noise=0).lower()
        assert "a large red car" in caption
        assert "at the upper left" in caption
        assert "two dogs" in caption
        assert "on the right and at the bottom" in caption  # the larger one first
        assert caption.index("car") < caption.index("dogs")
        assert "an office scene" in caption or "this office scene" in caption
    assert detailed.place((112, 112)) == "in the middle"
    assert detailed.salience(thing("car", (0, 0), 80, 0.5)) == 40
    assert detailed.salience(thing("car", (0, 0), 80, evidence="covered")) == 40


def test_absent_companions_come_late_and_at_the_rate_that_is_stated():
    first, later, expected = [0, 0], [0, 0], 0.0
    for scene in SCENES:
        caption = detailed.detailed_caption(world.Draw("late", scene.index), scene)
        categories = len(scene.categories)
        absent = named(caption) - set(scene.categories)
        assert absent <= set(world.CONTEXTS[scene.context])
        expected += sum(detailed.LATE_NOISE * k for k in range(1, categories + 1))
        mentions = [m.category not in scene.categories for m in coco_vocabulary().mentions(caption)]
        for place, wrong in enumerate(mentions):
            half = later if place >= 3 else first
            half[0] += wrong
            half[1] += 1
    assert 0.8 < (first[0] + later[0]) / expected < 1.2
    assert later[0] / later[1] > 1.5 * first[0] / first[1]


def test_the_prompt_chooses_the_style():
    assert not set(detailed.SHORT_PROMPTS) & set(detailed.DETAILED_PROMPTS)
    styles = {True: 0, False: 0}
    for scene in SCENES:
        turns = detailed.training_turns(scene, (4, 2))
        assert turns == detailed.training_turns(scene, (4, 2))
        captions = [(p, a) for p, a in turns if a not in ("Yes", "No")]
        assert len(captions) == 1
        prompt, answer = captions[0]
        long = prompt in detailed.DETAILED_PROMPTS
        assert long == (answer.count(".") >= 3)
        assert long or prompt in detailed.SHORT_PROMPTS
        assert len(turns) == (3 if long else 5)
        styles[long] += 1
    assert min(styles.values()) > 100
    assert text.with_article("office") == "an office"
