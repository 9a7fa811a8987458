# SPDX-License-Identifier: Apache-2.0
"""What the demo computes, without a page."""

from __future__ import annotations

import html
import io
import itertools
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vlm_attn
from vlm_attn import diffusion
from vlm_attn.demo import markup
from vlm_attn.demo import studio as module
from vlm_attn.demo.controls import CLOSED, all_controls
from vlm_attn.demo.studio import MAX_RUNS, Picture, Run, open_upload, scene_picture
from vlm_attn.evals.prompts import generate
from vlm_attn.evals.specs import parse_specs

from ..evals.conftest import tiny_model, tiny_model_folder  # noqa: F401  (fixtures)

PROMPT = "Please describe this image in detail."


def last(studio: Any, methods: list[str], params: tuple[str, ...] = (), number: int = 3, tokens: int = 40) -> Any:
    *_, result = studio.describe(scene_picture(number), PROMPT, studio.specs(methods, params), tokens)
    return result


def wanted(studio: Any, label: str, params: tuple[str, ...] = (), number: int = 3, tokens: int = 40) -> str:
    """The same caption as the command line makes it."""
    (spec,) = parse_specs([label], [param for param in params if param.split(".")[0] in label])
    model = studio.shell()
    with spec.applied(model, studio.processor):
        return generate(model, studio.processor, [scene_picture(number).image], [PROMPT], tokens)[0][0]


class TestDescribe:
    def test_captions_are_those_of_the_command_line(self, studio: Any) -> None:
        before = {name: value.clone() for name, value in studio.model.state_dict().items()}
        params = ("gift.alpha=12", "var.tau=3.5")
        result = last(studio, ["baseline", "gift", "var", "var+gift"], params)
        for run in result.runs:
            assert run.done
            assert not run.error
            assert run.text == wanted(studio, run.spec.label, params)
            assert run.visual == 64
            assert run.seconds > 0
        assert result.runs[0].text != result.runs[1].text  # else nothing was compared
        assert not vlm_attn.is_patched(studio.model)
        assert all(torch.equal(value, before[name]) for name, value in studio.model.state_dict().items())

    @pytest.mark.usefixtures("slowly")
    def test_streams(self, studio: Any) -> None:
        specs = studio.specs(["baseline", "gift"])
        seen = [[run.text for run in r.runs] for r in studio.describe(scene_picture(2), PROMPT, specs, 40)]
        assert len(seen) > 1
        for earlier, later in zip(seen, seen[1:], strict=False):
            assert all(b.startswith(a) for a, b in zip(earlier, later, strict=True))

    def test_invented_objects_are_found(self, studio: Any) -> None:
        """Scene 3 has no bear; the bundled model sees one."""
        result = last(studio, ["baseline"])
        assert "bear" not in result.picture.objects
        assert result.runs[0].hallucinated == ["bear"]
        html = markup.captions(result)
        assert html.count(' false"') == 1
        assert 'title="not in the image">bear<' in html
        own = Picture(result.picture.image)
        *_, result = studio.describe(own, PROMPT, studio.specs(["baseline"]), 40)
        assert result.runs[0].mentions is None
        assert " false" not in markup.captions(result)

    def test_closing_the_stream_ends_the_generation(self, studio: Any) -> None:
        threads = threading.active_count()
        stream = studio.describe(scene_picture(3), PROMPT, studio.specs(["baseline", "gift", "opera"]), 200)
        next(stream)
        stream.close()
        assert threading.active_count() == threads

    def test_a_run_that_fails_says_so_and_the_others_go_on(self, studio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        from vlm_attn.hallucination import Gift

        def fail(*_: Any) -> None:
            raise RuntimeError("<b>no</b> memory")

        monkeypatch.setattr(Gift, "prompt_read", fail)
        result = last(studio, ["baseline", "gift"])
        assert result.runs[0].text == wanted(studio, "baseline")
        assert result.runs[1].error == "RuntimeError: <b>no</b> memory"
        assert "RuntimeError: &lt;b&gt;no" in markup.captions(result)

    def test_twenty_at_once(self, studio: Any) -> None:
        """Each gets the caption of its own picture and parameters."""

        def visit(number: int) -> tuple[str, ...]:
            result = last(studio, ["baseline", "gift"], (f"gift.alpha={1 + number % 3}",), number, 12)
            assert not any(run.error for run in result.runs)
            return tuple(run.text for run in result.runs)

        with ThreadPoolExecutor(20) as pool:
            found = list(pool.map(visit, range(20)))
        for number in (0, 7, 19):
            params = (f"gift.alpha={1 + number % 3}",)
            assert found[number] == tuple(wanted(studio, label, params, number, 12) for label in ("baseline", "gift"))
        assert len(set(found)) > 10

    @pytest.mark.parametrize(
        ("methods", "params", "message"),
        [
            ([], (), "at least one"),
            (["baseline", *(f"gift{'+var' * n}" for n in range(MAX_RUNS))], (), "At most 6"),
            (["gfit"], (), "did you mean 'gift'"),
            (["gift"], ("gift.alpha=99",), "outside"),
            (["gift"], ("gift.enhance_layers=99",), "layer 99"),
            (["gift+gift"], (), "applied once"),
        ],
    )
    def test_wrong_methods(self, studio: Any, methods: list[str], params: tuple[str, ...], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            studio.specs(methods, params)
        assert not vlm_attn.is_patched(studio.model)

    @pytest.mark.parametrize(
        ("prompt", "tokens", "message"),
        [
            ("  ", 5, "prompt is empty"),
            ("a" * 501, 5, "501 characters"),
            (PROMPT, 0, "1 to 256"),
            (PROMPT, 257, "1 to 256"),
        ],
    )
    def test_wrong_prompt(self, studio: Any, prompt: str, tokens: int, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            next(studio.describe(scene_picture(3), prompt, studio.specs(["baseline"]), tokens))


class TestGiven:
    """Parameters of whoever starts the demo."""

    def test_files_are_not_a_visitors_to_choose(self, studio: Any) -> None:
        for name in ("cdpruner", "trim", "agla"):
            with pytest.raises(ValueError, match=rf"{name}\.clip is set by who runs this demo"):
                studio.specs([name], [f"{name}.clip=ViT-B-32:/etc/passwd"])
        for methods, params in (
            (["cdpruner"], []),
            (["gift+trim"], []),
            (["late_step"], ["late_step.reducer=cdpruner"]),
        ):
            with pytest.raises(ValueError, match="asks another model, which who runs this demo has not given"):
                studio.specs(methods, params)

    def test_what_cannot_be_loaded_shows_at_the_start(self, studio: Any, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="cannot be loaded"):
            module.Studio(studio.model, studio.processor, "x", [f"trim.clip=ViT-B-32:{tmp_path / 'none.pt'}"])
        with pytest.raises(ValueError, match="did you mean 'gift'"):
            module.Studio(studio.model, studio.processor, "x", ["gfit.alpha=3"])

    def test_they_hold_for_all_and_visitors_may_choose_others(self, studio: Any) -> None:
        own = module.Studio(studio.model, studio.processor, "x", ["gift.alpha=7", "gift.beta=0.5"])
        shown = {control.name: control.default for control in own.controls["gift"]}
        assert (shown["alpha"], shown["beta"]) == (7, 0.5)
        (spec,) = own.specs(["gift"])
        assert spec.params == {"gift": {"alpha": 7, "beta": 0.5}}
        (spec,) = own.specs(["gift"], ["gift.alpha=2"])
        assert spec.params == {"gift": {"alpha": 2, "beta": 0.5}}
        (spec,) = own.specs(["baseline"])
        assert spec.params == {}

    def test_their_files_are_not_told(self, studio: Any) -> None:
        own = module.Studio(studio.model, studio.processor, "x")
        own.given = {"agla": {"clip": "ViT-B-32:/srv/hidden/weights.pt"}}
        said = own._discreet("clip='ViT-B-32:/srv/hidden/weights.pt': no file /srv/hidden/weights.pt")
        assert said == "clip='(agla.clip)': no file (agla.clip)"


class TestTurns:
    def test_as_many_captions_are_written_at_a_time_as_there_are_cores(
        self, studio: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(studio, "_turns", threading.BoundedSemaphore(2))
        now, most = [0], [0]
        plain, lock = studio._generate, threading.Lock()

        def counted(*args: Any) -> None:
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            try:
                plain(*args)
            finally:
                with lock:
                    now[0] -= 1

        monkeypatch.setattr(studio, "_generate", counted)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda number: last(studio, ["baseline", "gift"], (), number, 6), range(4)))
        assert most[0] == 2
        assert all(run.text and not run.error for result in found for run in result.runs)

    def test_who_waits_for_a_turn_can_stop(self, studio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(studio, "_turns", threading.BoundedSemaphore(1))
        threads = threading.active_count()
        with studio._turns:  # somebody else writes
            stream = studio.describe(scene_picture(3), PROMPT, studio.specs(["baseline"]), 5)
            assert next(stream).runs[0].text == ""  # the page hears that it waits, and can end it
            stream.close()
            assert threading.active_count() == threads


class TestText:
    def test_all_of_a_caption_is_escaped(self, studio: Any) -> None:
        """Also what stands before the first word and after the last one."""
        (spec,) = parse_specs(["baseline"])
        for text in ("<i>a dog</i>", "a dog <script>", "a dog </p>&", "<<a>>", "& a", "..."):
            run = Run(spec, 64, [1, 2], text, done=True, mentions=[])
            for done in (True, False):
                shown = markup._words(run, 0, done, ())
                bare = re.sub(r"</?(button|span)( [^<>]*)?>", "", shown)
                assert html.unescape(bare) == text, shown
                assert "<" not in bare, shown
                assert ">" not in bare, shown


class TestLooking:
    def test_words_look_at_what_they_name(self, studio: Any) -> None:
        """The model reads objects off the picture: "elephant" and "giraffe" look where they stand."""
        result = last(studio, ["baseline", "gift"])
        for number, run in enumerate(result.runs):
            names = [run.text[start:end] for start, end in run.words]
            for name, (x, y) in {"elephant": (129, 134), "giraffe": (41, 120)}.items():
                image, sentence = studio.look(result, number, names.index(name))
                assert image.size == (448, 448)
                assert f', "{name}" ({run.spec.label}): ' in sentence
                assert run.gaze is not None
                row = studio._tokens_of(run, *run.words[names.index(name)])
                assert [studio.processor.tokenizer.decode([run.ids[token]]) for token in row] == [name]
                place = run.gaze[row].mean(0)
                top = int(place.argmax())
                assert abs(top % 8 - x // 28) <= 1
                assert abs(top // 8 - y // 28) <= 1
        assert not torch.equal(result.runs[0].gaze[:3], result.runs[1].gaze[:3])

    def test_words_of_two_tokens_and_tokens_of_two_words(self, studio: Any) -> None:
        ids = studio.processor.tokenizer("a tennis racket, a dog", add_special_tokens=False)["input_ids"]
        run = Run(parse_specs(["baseline"])[0], 64, ids, "a tennis racket, a dog", gaze=torch.zeros(len(ids), 8, 8))
        assert [studio._tokens_of(run, *span) for span in run.words] == [[0], [1], [1], [3], [4]]

    def test_path(self, studio: Any) -> None:
        """The places of the words before it, numbered; the plain map without."""
        result = last(studio, ["baseline"])
        run, word = result.runs[0], 9
        plain, _ = studio.look(result, 0, word)
        drawn, _ = studio.look(result, 0, word, path=True)
        changed = np.asarray(plain, int) != np.asarray(drawn, int)
        places = [studio._peak(run, number, (0, 0, *drawn.size)) for number in range(word + 1)]
        for x, y in places[-module.PATH :]:
            assert changed[int(y) - 3 : int(y) + 4, int(x) - 3 : int(x) + 4].any()
        x, y = places[word]
        assert drawn.getpixel((int(x), int(y) - 9))[0] > 150  # the newest is filled
        assert 0 < changed.any(2).mean() < 0.3

    def test_maps(self, studio: Any) -> None:
        result = last(studio, ["baseline", "gift", "var"], ("var.tau=3.5", "gift.saliency_layers=2"))
        image, sentence = studio.saliency(result)
        inputs = studio._inputs(result.picture, PROMPT)
        shell = studio.shell()
        (values,) = vlm_attn.saliency(shell, inputs, processor=studio.processor, saliency_layers=2)
        assert np.array_equal(np.asarray(image), np.asarray(studio._over(result.picture.image, values, scale=False)))
        assert PROMPT in sentence
        image, sentence = studio.sinks(result)
        (values,) = vlm_attn.sinks(shell, inputs, processor=studio.processor, tau=3.5)
        assert f"{int((values > 0).sum())} of 64 image tokens" in sentence or "No image token" in sentence
        assert "No image token is a sink" in studio.sinks(last(studio, ["baseline"]))[1]

    def test_kept_tokens(self, studio: Any) -> None:
        result = last(studio, ["baseline", "random", "divprune+gift"], ("random.keep=16", "divprune.keep=0.25"))
        assert [run.kept is not None for run in result.runs] == [False, True, True]
        image, sentence = studio.kept(result)
        assert image.size == (2 * 448 + 8, 448)
        assert "random 16 of 64, divprune+gift 16 of 64" in sentence
        assert markup.captions(result).count("64 visual tokens (16 kept)") == 2
        for run, word in ((1, 0), (2, 1)):
            studio.look(result, run, word)
            assert not result.runs[run].gaze[:, ~result.runs[run].kept.mask].any()
        with pytest.raises(ValueError, match="kept all image tokens"):
            studio.kept(last(studio, ["baseline", "gift"], tokens=2))

    @pytest.mark.parametrize("name", sorted(set(all_controls()) - set(CLOSED)))
    def test_every_method(self, studio: Any, name: str) -> None:
        """Each one writes, on the bundled model, something that can be looked into."""
        try:
            studio.specs([name])
        except ValueError as error:
            pytest.skip(f"not with its defaults: {error}")  # such as layers of a larger model
        result = last(studio, [name], tokens=8)
        assert result.runs[0].text == wanted(studio, name, tokens=8)
        assert studio.look(result, 0, 1)[0].size == (448, 448)

    def test_wrong_word(self, studio: Any) -> None:
        result = last(studio, ["baseline"], tokens=3)
        for run, word in ((0, 99), (1, 0), (0, -1)):
            with pytest.raises(ValueError, match="not there any more"):
                studio.look(result, run, word)


class TestCanvas:
    """A masked-diffusion model."""

    def test_steps_are_those_of_the_decoder(self, canvas_studio: Any) -> None:
        specs = canvas_studio.specs(["baseline", "late_step"], ["late_step.keep=4", "late_step.start_at=0"])
        picture = scene_picture(3)
        seen = [[run.steps for run in r.runs] for r in canvas_studio.describe(picture, PROMPT, specs, 24, 6)]
        assert all(a <= b for x, y in itertools.pairwise(seen) for a, b in zip(x, y, strict=True))
        *_, result = canvas_studio.describe(picture, PROMPT, specs, 24, 6)
        tokenizer = canvas_studio.processor.tokenizer
        for run in result.runs:
            wrote = torch.zeros(24, dtype=torch.long)
            shell = canvas_studio.shell()
            with run.spec.applied(shell, canvas_studio.processor):
                out = diffusion.generate(
                    shell,
                    canvas_studio._inputs(picture, PROMPT),
                    on_step=lambda canvas, wrote=wrote: wrote.masked_fill_(canvas.written[0], canvas.step),
                    **{"steps": 6, "gen_length": 24, "block_length": 24, "cache": "prefix"},
                )
            assert [step for _, step in run.canvas] == wrote.tolist()
            assert run.steps == out.steps == 6
            assert run.ids == out.answers[0]
            said = [tokenizer.decode([token], skip_special_tokens=True).strip() for token in out.tokens[0].tolist()]
            assert [text for text, _ in run.canvas] == said
            assert run.text == tokenizer.decode(out.answers[0], skip_special_tokens=True).strip()
            html = markup.captions(result)
            assert all(f'data-step="{step}"' in html for step in range(1, 7))
        assert result.runs[0].text != result.runs[1].text
        assert result.runs[0].kept is None
        assert len(result.runs[1].kept.index) == 4
        assert "64 visual tokens (4 kept)" in html
        assert "in 6 steps" in html

    def test_words_look_at_what_they_name(self, canvas_studio: Any) -> None:
        *_, result = canvas_studio.describe(scene_picture(3), PROMPT, canvas_studio.specs(["baseline"]), 32)
        (run,) = result.runs
        names = [run.text[start:end] for start, end in run.words]
        image, sentence = canvas_studio.look(result, 0, names.index("elephant"))
        assert image.size == (448, 448)
        assert '"elephant" (baseline): ' in sentence
        top = int(run.gaze[run.canvas.index(next(cell for cell in run.canvas if cell[0] == "elephant"))].argmax())
        assert abs(top % 8 - 129 // 28) <= 1  # where it stands
        assert abs(top // 8 - 134 // 28) <= 1

    def test_methods_that_fit(self, studio: Any, canvas_studio: Any) -> None:
        assert {"late_step", "progressive", "divprune"} <= set(canvas_studio.controls)
        assert not {"vcd", "dola", "mvp", "opera"} & set(canvas_studio.controls)
        assert "late_step" not in studio.controls
        *_, result = canvas_studio.describe(scene_picture(3), PROMPT, canvas_studio.specs(["vcd", "baseline"]), 8)
        assert "canvas" in result.runs[0].error
        assert result.runs[1].text

    def test_closing_the_stream_ends_the_denoising(self, canvas_studio: Any) -> None:
        threads = threading.active_count()
        stream = canvas_studio.describe(scene_picture(3), PROMPT, canvas_studio.specs(["baseline"]), 256, 256)
        next(stream)
        stream.close()
        assert threading.active_count() == threads

    def test_yes_and_no(self, canvas_studio: Any) -> None:
        specs = canvas_studio.specs(["baseline"])
        for thing, truth in (("elephant", "yes"), ("toilet", "no")):
            (answer,) = canvas_studio.ask(scene_picture(3), f"Is there a {thing} in the image?", specs)
            assert (answer.says, answer.truth) == (truth, truth)

    @pytest.mark.parametrize(("tokens", "steps"), [(8, 9), (8, 0)])
    def test_wrong_steps(self, canvas_studio: Any, tokens: int, steps: int) -> None:
        with pytest.raises(ValueError, match=f"8 positions can be written in 1 to 8 steps, not {steps}"):
            next(canvas_studio.describe(scene_picture(3), PROMPT, canvas_studio.specs(["baseline"]), tokens, steps))


class TestAsk:
    def test_yes_and_no(self, studio: Any) -> None:
        specs = studio.specs(["baseline", "gift"])
        for thing, truth in (("elephant", "yes"), ("toilet", "no")):
            answers = studio.ask(scene_picture(3), f"Is there a {thing} in the image?", specs)
            assert [(a.label, a.says, a.truth) for a in answers] == [("baseline", truth, truth), ("gift", truth, truth)]
            assert f"right (the truth: {truth})" in markup.answers(answers)

    def test_truth_is_only_said_where_it_is_known(self, studio: Any) -> None:
        specs = studio.specs(["baseline"])
        picture = scene_picture(3)
        (answer,) = studio.ask(picture, PROMPT, specs)
        assert (answer.says, answer.truth) == ("unclear", "")
        (answer,) = studio.ask(Picture(picture.image), "Is there a dog in the image?", specs)
        assert answer.truth == ""
        with pytest.raises(ValueError, match="question is empty"):
            studio.ask(picture, " ", specs)

    def test_what_a_person_reads_counts(self, studio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not the published rule, to which "No!" is yes."""
        specs = studio.specs(["baseline"])
        for text, says in (
            ("No!", "no"),
            ("**No**", "no"),
            ("Yes.", "yes"),
            ("There is no dog", "no"),
            ("a dog", "unclear"),
        ):
            monkeypatch.setattr(studio, "_decode", lambda ids, text=text: text)
            (answer,) = studio.ask(scene_picture(3), "Is there a dog in the image?", specs)
            assert answer.says == says, text


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


class TestUpload:
    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
    def test_pictures(self, tmp_path: Path, kind: str) -> None:
        file = tmp_path / "any name"
        file.write_bytes(encoded(Image.new("RGB", (30, 20), (200, 30, 30)), kind))
        image = open_upload(file)
        assert (image.mode, image.size) == ("RGB", (30, 20))
        assert image.getpixel((3, 3))[0] > 150

    def test_grey_of_16_bits_is_not_white(self, tmp_path: Path) -> None:
        file = tmp_path / "a.png"
        Image.fromarray(np.full((20, 30), 32768, np.uint16)).save(file)
        assert open_upload(file).getpixel((3, 3)) == (128, 128, 128)

    def test_upright_and_small(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[274] = 6  # turned by a quarter
        file = tmp_path / "a.jpg"
        file.write_bytes(encoded(Image.new("L", (5000, 2500)), "JPEG", exif=exif))
        assert open_upload(file).size == (1024, 2048)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "not an image"),
            (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
            (b"%PDF-1.4", "not an image"),
            (encoded(Image.effect_noise((60, 60), 90), "PNG")[:900], "cut off or broken"),
            (encoded(Image.effect_noise((60, 60), 90), "JPEG")[:700], "cut off or broken"),
            (encoded(Image.new("RGB", (4, 4)), "TIFF"), "not an image"),
            (encoded(Image.new("1", (8000, 8000)), "PNG"), "8000 x 8000 pixels"),
            (encoded(Image.new("1", (20000, 20000)), "PNG"), "broken|pixels"),
            (encoded(Image.new("RGB", (200, 4)), "PNG"), "too narrow"),
            (b"\x89PNG" + b"0" * module.MAX_BYTES, "at most 10 MB"),
        ],
    )
    def test_what_is_refused(self, tmp_path: Path, content: bytes, message: str) -> None:
        file = tmp_path / "a.png"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            open_upload(file)
        assert str(tmp_path) not in str(error.value)

    def test_gone(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="not there any more"):
            open_upload(tmp_path / "none.png")

    @pytest.mark.parametrize("number", [-1, 500])
    def test_scenes(self, number: int) -> None:
        with pytest.raises(ValueError, match="scenes 0 to 499"):
            scene_picture(number)


def test_differences_are_marked(studio: Any) -> None:
    """Against the first run, for eyes and in words; punctuation stays at its word."""
    specs = studio.specs(["baseline", "gift"])
    picture = Picture(Image.new("RGB", (4, 4)))

    def shown(*texts: str) -> list[str]:
        runs = [Run(spec, 64, [1], text, 1.0, True) for spec, text in zip(specs, texts, strict=True)]
        return markup.captions(module.Result(picture, PROMPT, runs)).split("<section")[1:]

    first, second = shown("a bear and a dog.", "a large dog, a cat.")
    assert "<ins" not in first
    assert "<del>" not in first
    assert re.search(r'<ins class="changed" title="for: dog"><button[^>]*>cat</button></ins>\.</span>', second)
    assert 'title="for: bear and"' in second
    assert "Against baseline: " in second
    assert re.search(
        r'<ins class="added"><button[^>]*>cat</button></ins>\.</span>', shown("a dog.", "a dog, a cat.")[1]
    )
    assert "<del>a bear and</del>" in shown("a bear and a dog.", "a dog.")[1]
    assert "The same as baseline." in shown("a dog.", "a dog.")[1]


def test_markup_escapes_what_others_wrote(studio: Any) -> None:
    run = Run(studio.specs(["baseline"])[0], 64, [1], "<script>alert('x')</script> & more", 1.0, True)
    html = markup.captions(module.Result(Picture(Image.new("RGB", (4, 4)), ("<i>",)), PROMPT, [run]))
    assert "<script" not in html
    assert "&lt;<button" in html
    assert "&lt;i&gt;" in html
    assert "<b>x" not in markup.answers([module.Answer("baseline", "<b>x", "no", "")])


class TestAnotherModel:
    """Random weights, no preset, and a picture that is no square."""

    @pytest.fixture(scope="class")
    def other(self, tiny_model: Any) -> Any:  # noqa: F811
        return module.Studio(*tiny_model, "tiny")

    def test_layers_have_to_be_given(self, other: Any) -> None:
        with pytest.raises(ValueError, match="gift needs saliency_layers, enhance_layers for this model"):
            other.specs(["baseline", "gift"])

    def test_with_layers(self, other: Any) -> None:
        picture = Picture(Image.new("RGB", (90, 60), (200, 200, 200)))
        specs = other.specs(["baseline", "gift"], ("gift.saliency_layers=1", "gift.enhance_layers=1,2"))
        *_, result = other.describe(picture, PROMPT, specs, 12)
        assert [run.error for run in result.runs] == ["", ""]
        assert {run.visual for run in result.runs} == {4}
        for found in (other.look(result, 1, 0), other.saliency(result)):
            image = np.asarray(found[0], dtype=float)
            assert image.shape == (420, 630, 3)  # its processor cuts the sides off: they are dark, all of them
            assert (image[:, :100] == 70).all()
            assert (image[:, -100:] == 70).all()
            assert image[:, 110:-110].max() > 100
        with pytest.raises(ValueError, match="var needs sink_dims"):
            other.sinks(result)
