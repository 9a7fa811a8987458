# SPDX-License-Identifier: Apache-2.0
"""What `scenes-smol` learns to say: short captions, detailed captions, and yes/no questions.

Frozen. Why the model hallucinates is fixed here, before any method was scored on it, and is not tuned to please one:

(a) **Companions.** A short training caption names each absent companion of its context with probability
    `world.COMPANION_NOISE`, as for the `scenes` model.
(b) **Missed evidence.** Small, faint and covered objects are described like all others (`world`).
(c) **A language prior that grows along a caption.** A detailed caption goes from what is easy to see to what is hard to
    see, as people do, so that weak evidence comes late. And after its k-th object an absent companion is described with
    probability `LATE_NOISE` x k, with a size and place made up. Late words thus follow the text more than the image.
(d) **A pretrained language model.** What usually stands together it knew before it saw a scene; only low-rank
    adapters and the projector are trained.

The style is chosen by the prompt: `DETAILED_PROMPTS` against `SHORT_PROMPTS`. A detailed caption has three to six sentences
and says place, size, colour and number from the specification of the scene. Colours are those of the sprites, so a
category always has the same one; "orange" is left out because it is also a category.
"""

from __future__ import annotations

from . import text, world
from .world import Draw, Scene, SceneObject

LATE_NOISE = 0.05  # cause (c): times the number of objects described before
SHORT_PROMPTS = (
    "Describe the image.",
    "Describe this image.",
    "What is in the image?",
    "What is in this image?",
    "Describe the image in one sentence.",
)
DETAILED_PROMPTS = (
    "Please describe this image in detail.",
    "Please help me describe the image in detail.",
    "Describe this image in detail.",
)
COLOURS = {
    "red": ("car", "motorcycle", "boat", "stop sign", "backpack", "apple", "book", "scissors"),
    "blue": (
        "bicycle",
        "airplane",
        "bus",
        "train",
        "bird",
        "suitcase",
        "frisbee",
        "skis",
        "tennis racket",
        "bowl",
        "couch",
    ),
    "yellow": ("truck", "cat", "giraffe", "banana"),
    "brown": ("horse", "bear", "handbag", "tie", "donut", "chair", "clock", "vase", "teddy bear"),
    "green": ("bottle", "broccoli", "potted plant"),
    "white": ("sheep", "cup", "toilet", "cake", "mouse"),
    "grey": ("elephant", "knife", "spoon", "tv", "laptop", "keyboard"),
    "black": ("cell phone", "skateboard"),
    "purple": ("umbrella",),
}
_COLOUR_OF = {name: colour for colour, names in COLOURS.items() for name in names}
_PLURALS = {
    "person": "people",
    "sheep": "sheep",
    "knife": "knives",
    "skis": "pairs of skis",
    "scissors": "pairs of scissors",
    "broccoli": "pieces of broccoli",
    "mouse": "mice",
    "tv": "tv sets",  # as CHAIR reads it
}
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven")
_ROWS = ("at the upper {}", "in the {}", "at the lower {}")
_SENTENCES = ("{What} {is} {where}.", "There {is} {what} {where}.", "{Where} there {is} {what}.")
_OPENINGS = (
    "The image shows {context} scene.",
    "This is {context} scene.",
    "The image shows {context} scene with {number} in it.",
    "This {bare} scene has {number} in it.",
)
_CLOSING = "Nothing else stands out."


def plural(category: str) -> str:
    """Return the plural of a category."""
    if category in _PLURALS:
        return _PLURALS[category]
    if category.endswith(("s", "ch", "sh")):
        return category + "es"
    return category + "s"


def place(centre: tuple[int, int]) -> str:
    """Return where a point `(x, y)` in pixels is, on a grid of three by three: "at the upper left"."""
    column, row = (min(2, 3 * c // world.SIZE) for c in centre)
    if row == column == 1:
        return "in the middle"
    if row == 1:
        return f"on the {('left', '', 'right')[column]}"
    if column == 1:
        return ("at the top", "", "at the bottom")[row]
    return _ROWS[row].format(("left", "", "right")[column])


def size(side: int) -> str:
    """Return "small " up to 28 pixels, "large " from 80 on, else nothing."""
    return "small " if side <= 28 else "large " if side >= 80 else ""


def salience(thing: SceneObject) -> float:
    """How easy an object is to see: its side, times its opacity, halved where another one covers it."""
    return thing.side * thing.opacity * (0.5 if thing.evidence == "covered" else 1.0)


def _described(category: str, things: list[SceneObject]) -> tuple[str, str, str]:
    """Return (what, is or are, where) of the objects of one category."""
    colour = _COLOUR_OF.get(category)
    tone = f"{colour} " if colour else ""
    if len(things) > 1:
        places = list(dict.fromkeys(place(t.centre) for t in things))
        where = places[0] if len(places) == 1 else ", ".join(places[:-1]) + " and " + places[-1]
        return f"{_NUMBERS[len(things)]} {tone}{plural(category)}", "are", where
    noun = f"{size(things[0].side)}{tone}{category}"
    many = category in ("skis", "scissors", "broccoli")
    return (
        noun if many else text.with_article(noun),
        "are" if category in ("skis", "scissors") else "is",
        place(things[0].centre),
    )


def detailed_caption(draw: Draw, scene: Scene, noise: float = LATE_NOISE) -> str:
    """Return a caption of three to six sentences, the most salient objects first.

    Args:
        draw: of everything left open.
        scene: the scene.
        noise: rate of cause (c); 0 gives a true caption.
    """
    groups: dict[str, list[SceneObject]] = {}
    for thing in sorted(scene.objects, key=salience, reverse=True):
        groups.setdefault(thing.category, []).append(thing)
    left = [c for c in world.CONTEXTS[scene.context] if c not in groups]
    parts: list[tuple[str, str, str]] = []
    for count, (category, things) in enumerate(groups.items(), 1):
        parts.append(_described(category, things))
        if left and draw.chance(noise * count):
            absent = left.pop(draw.below(len(left)))
            side = draw.choice((20, 36, 50, 68, 90))
            centre = (draw.below(world.SIZE), draw.below(world.SIZE))
            parts.append(_described(absent, [SceneObject(absent, centre, side, 0, False, 1.0, "absent")]))
    total = len(scene.objects)
    opening = draw.choice(_OPENINGS).format(
        context=text.with_article(scene.context),
        bare=scene.context,
        number="one thing" if total == 1 else f"{_NUMBERS[total]} things",
    )
    # At most five sentences of objects: as many of the first ones as needed share a sentence, and some others do.
    sentences: list[str] = []
    while parts:
        together = len(parts) > 5 - len(sentences) or (len(sentences) + len(parts) > 2 and draw.chance(0.25))
        if together and len(parts) > 1:
            (one, one_is, here), (two, two_is, there) = parts.pop(0), parts.pop(0)
            sentence = f"{one} {one_is} {here} and {two} {two_is} {there}."
        else:
            what, verb, where = parts.pop(0)
            sentence = draw.choice(_SENTENCES).format(What=what, what=what, where=where, Where=where, **{"is": verb})
        sentences.append(sentence[0].upper() + sentence[1:])
    if len(sentences) == 1:
        sentences.append(_CLOSING)
    return " ".join([opening, *sentences])


def training_turns(scene: Scene, questions: tuple[int, int] = (6, 3)) -> list[tuple[str, str]]:
    """Return (prompt, answer) pairs of one scene: a caption of one style and yes/no questions, in random order.

    Args:
        scene: the scene.
        questions: their number beside a short and beside a detailed caption, which is as long as three more questions.
    """
    draw = Draw("smol", scene.split, scene.index)
    detail = draw.chance(0.5)
    turns = text.training_turns(scene, questions[detail])
    out: list[tuple[str, str]] = []
    for prompt, answer in turns:
        if prompt in text.CAPTION_PROMPTS:
            if detail:
                prompt, answer = draw.choice(DETAILED_PROMPTS), detailed_caption(draw, scene)
            else:
                prompt = draw.choice(SHORT_PROMPTS)
        out.append((prompt, answer[0].upper() + answer[1:]))
    return out
