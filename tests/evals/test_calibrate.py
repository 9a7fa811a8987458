# SPDX-License-Identifier: Apache-2.0
"""The measurements behind a preset, against full attention maps of the same model."""

import json
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import vlm_attn
from tests import tiny
from vlm_attn.evals import runner, stats
from vlm_attn.evals.calibrate import RULES, _bands, _Profile, calibrate, choose, compare, divergences, measure, score
from vlm_attn.evals.specs import MethodSpec
from vlm_attn.patching import engine_of


def test_shift_and_masses_equal_those_of_full_maps():
    model, make = tiny.llava()
    inputs = make([[3, "image", 7], [1, "image", 4]])
    profile = _Profile(saliency_layers=(0, 1, 2, 3), enhance_layers=(0,), query_words="all")
    with vlm_attn.patched(model, profile, query_span=lambda ids, mask: [(13, 18), (11, 14)]), torch.no_grad():
        with engine_of(model).running(inputs) as call:
            model(**inputs)
        found = call.memory(profile)
    model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    pad = int((inputs["attention_mask"][1] == 0).sum())
    for row, (start, stop) in enumerate([(13, 18), (11 + pad, 14 + pad)]):
        visual = inputs["input_ids"][row] == tiny.IMAGE
        first = int(inputs["attention_mask"][row].argmax())
        for layer, full in enumerate(maps):
            shift = sum(
                float((full[row, :, i] - full[row, :, i - 1]).clamp_min(0)[:, visual].sum()) for i in range(start, stop)
            )
            last = full[row, :, stop - 1]
            assert float(found[layer]["shift"][row]) == pytest.approx(shift, rel=1e-4)
            assert float(found[layer]["VISUAL"][row]) == pytest.approx(float(last[:, visual].sum(1).mean()), rel=1e-4)
            assert float(found[layer]["QUERY"][row]) == pytest.approx(
                float(last[:, start:stop].sum(1).mean()), rel=1e-4
            )
            assert float(found[layer]["FIRST"][row]) == pytest.approx(float(last[:, first].mean()), rel=1e-4)
            assert found["heads", layer][row].tolist() == pytest.approx(last[:, visual].sum(1).tolist(), rel=1e-4)


def test_measure_finds_a_planted_massive_dimension():
    scenes = pytest.importorskip("vlm_attn.evals.scenes")
    from vlm_attn.evals.models import load_model

    if not (scenes.model_path() / "model.safetensors").is_file():
        pytest.skip("the bundled model is not in this checkout")
    model, processor = load_model("scenes")
    with torch.no_grad():
        model.get_input_embeddings().weight[processor.tokenizer.bos_token_id, 5] = 1000.0
    dataset = scenes.dataset("validation", limit=4)
    found = measure(model, processor, dataset, prompt="Is there a dog in the image?", limit=4, tau=10.0)
    assert found["images"] == 4
    assert "5" in found["sinks"][0]["dims"]
    assert found["sinks"][0]["dims"]["5"] == 1.0
    assert next(iter(found["peaks"])) == "5"
    assert RULES["var"](found)[0] == {"sink_dims": [5]}
    assert len(found["layers"]) == model.config.text_config.num_hidden_layers
    assert not vlm_attn.is_patched(model)


def test_gift_takes_the_layer_of_the_largest_shift() -> None:
    shifts = [1.0] * 32
    shifts[11] = 5.0
    params, why = RULES["gift"]({"layers": [{"shift": shift} for shift in shifts]})
    assert params == {"saliency_layers": [11], "enhance_layers": list(range(12, 23))}  # LLaVA-1.5-7B's own
    assert "5" in why


@pytest.mark.parametrize(("saliency", "layers"), [(0, 6), (3, 6), (5, 6), (11, 32), (27, 28), (0, 1)])
def test_bands_lie_inside_the_model(saliency: int, layers: int) -> None:
    bands = _bands(saliency, layers)
    assert all(band == list(range(band[0], band[-1] + 1)) for band in bands)
    assert all(0 <= band[0] <= band[-1] < layers for band in bands)
    assert len({tuple(band) for band in bands}) == len(bands)


def test_var_without_sinks_says_so() -> None:
    found = {"layers": [], "sinks": [{"dims": {"7": 0.4}}, {"dims": {}}], "tau": 20.0, "peaks": {"3": 4.5, "7": 2.0}}
    params, why = RULES["var"](found)
    assert params == {"sink_dims": [3]}
    assert "nothing is a sink" in why
    found["sinks"][1]["dims"] = {"7": 0.5, "9": 1.0, "2": 0.1}
    assert RULES["var"](found)[0] == {"sink_dims": [7, 9]}


def test_vhr_takes_the_layers_that_hang_on_the_picture() -> None:
    """The paper's share, 15 of 32, by the mean over heads."""
    heads = [[1.0, 1.0]] * 32
    for layer in (1, *range(18, 32)):
        heads[layer] = [0.5, 2.0]
    params, why = RULES["vhr"]({"divergence": heads})
    assert params == {"layers": [1, *range(18, 32)]}
    assert "1.25" in why


def test_pai_begins_where_the_first_token_is_the_sink() -> None:
    shares = [0.1, 0.2, 0.6, 0.7, 0.5]
    params, why = RULES["pai"]({"layers": [{"FIRST": share} for share in shares]})
    assert params == {"layers": [2, 3, 4]}
    assert "0.6" in why
    assert RULES["paint"] is RULES["pai"]
    assert RULES["pai"]({"layers": [{"FIRST": 0.5}]})[0] == {"layers": [0]}


def test_divergences_are_those_of_vhr(bundled: tuple) -> None:
    """Against the rows of T-VHD, which go by the same pass, one image at a time; other batches give the same."""
    from vlm_attn.evals.prompts import build_inputs
    from vlm_attn.hallucination import token_divergence

    model, processor, dataset = bundled
    options = {"prompt": OPTIONS["prompt"], "limit": 3}
    found = divergences(model, processor, dataset, batch_size=3, **options)
    assert np.array(found).shape == (6, model.config.text_config.num_attention_heads)
    assert np.allclose(found, divergences(model, processor, dataset, batch_size=1, **options), rtol=1e-4)
    assert not vlm_attn.is_patched(model)
    inputs = build_inputs(model, processor, [dataset.load_image(dataset.image_ids[0])], [OPTIONS["prompt"]])
    one = divergences(model, processor, dataset, prompt=OPTIONS["prompt"], limit=1)
    apart = token_divergence(model, inputs, [5])[0]  # the row that the first token is read from
    assert ((torch.tensor(one) > 0) == (apart > 0)).all()


def test_choice_does_not_buy_its_score_with_silence() -> None:
    def row(chair_i: float, recall: float) -> dict:
        return {"chair_i": {"value": chair_i}, "recall": {"value": recall}}

    metrics = {"baseline": row(14, 88), "a": row(13, 87.5), "b": row(9, 80), "c": row(13, 88.5)}
    assert choose(metrics, ["a", "b", "c"]) == "c"
    assert choose(metrics, ["b"]) == "b"  # none keeps it: the one that loses least
    metrics["a"] = row(12, 87.0)
    assert choose(metrics, ["a", "b", "c"]) == "a"


class TestDifference:
    def test_value_and_pairing(self) -> None:
        rng = np.random.default_rng(0)
        base = rng.integers(0, 2, 200).astype(float)
        better = base.copy()
        better[:10] = 1 - better[:10]
        ones = [1.0] * 200
        found = stats.difference([(better, ones)], [(base, ones)], scale=100.0)
        assert found["value"] == pytest.approx(100 * (better.mean() - base.mean()))
        apart = [stats.ratio(column, ones, scale=100.0) for column in (better, base)]
        widths = [metric["high"] - metric["low"] for metric in apart]
        assert found["high"] - found["low"] < 0.5 * max(widths)  # what they share has cancelled
        assert found["low"] <= found["value"] <= found["high"]

    def test_equal_is_zero(self) -> None:
        pair = ([1.0, 0.0, 1.0], [1.0, 1.0, 2.0])
        assert stats.difference([pair], [pair]) == {"value": 0.0, "low": 0.0, "high": 0.0}

    def test_other_images(self) -> None:
        with pytest.raises(ValueError, match="same images"):
            stats.difference([([1.0], [1.0])], [([1.0, 2.0], [1.0, 1.0])])

    @pytest.mark.parametrize("lowest", [True, False])
    def test_what_a_choice_loses(self, lowest: bool) -> None:
        ones = [1.0] * 4
        columns = {"baseline": ([0.0] * 4, ones), "a": ([1.0, 0, 0, 0], ones), "b": ([1.0, 1, 1, 0], ones)}
        found = compare(columns, "b" if lowest else "a", lowest=lowest, labels=["a", "b"])
        assert found["best"] == ("a" if lowest else "b")
        assert found["lost"]["value"] == pytest.approx(50.0)
        assert found["values"]["baseline"]["value"] == 0.0


@pytest.fixture(scope="module")
def bundled() -> tuple:
    scenes = pytest.importorskip("vlm_attn.evals.scenes")
    from vlm_attn.evals.models import load_model

    return *load_model("scenes"), scenes.dataset("validation", limit=12)


def test_answers_may_hold_line_separators(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"method": "a", "sample": 0, "answer": "a dog\u2028and a cat"}

    def run(*args: Any, out: str, **options: Any) -> dict[str, str]:
        (Path(out) / "samples.jsonl").write_text(json.dumps(answer, ensure_ascii=False) + "\n", encoding="utf-8")
        return {"status": "complete"}

    monkeypatch.setattr(runner, "run", run)
    task: Any = SimpleNamespace(name="t", samples=[0])
    assert score(None, None, task, [MethodSpec("a")], model_name="m", batch_size=1) == {"a": [answer]}


OPTIONS = {"model_name": "scenes", "prompt": "Please describe this image in detail."}


def test_preset_is_used(bundled: tuple, tmp_path: Path) -> None:
    """Measured, searched and checked; the file patches this model and is refused by another."""
    from vlm_attn.evals.calibrate import write

    model, processor, dataset = bundled
    console = Console(record=True, width=120, file=StringIO())
    counts = {"limit": 4, "searched": 2, "checked": 2, "captioned": 2}
    preset, found = calibrate(
        model, processor, dataset, ["gift", "var", "vhr", "pai"], console=console, **counts, **OPTIONS
    )
    profile = preset["measurements"]["visual_heads"]
    best = max(max(row) for row in profile["score"])
    assert best > profile["chance"] > 0
    printed = console.export_text()
    assert f"{profile['mentions']} mentions" in printed
    assert f"{best:.0%}" in printed
    file = tmp_path / "mine.json"
    picture = write(preset, found, file)
    assert picture.stat().st_size > 5000
    written = json.loads(file.read_text())
    assert written["methods"]["gift"]["saliency_layers"] == [3]
    grid = written["measurements"]["grid"]
    assert len(grid) == 10
    assert written["measurements"]["visual_heads"] == profile
    assert set(written["measurements"]["check"]["chair_i"]["values"]) == set(grid)
    assert "2 other images" in written["provenance"]["gift"]
    with vlm_attn.patched(model, "gift", preset=str(file), processor=processor):
        method = vlm_attn.patching.engine_of(model).methods[0]
        assert list(method.enhance_layers) == written["methods"]["gift"]["enhance_layers"]
        assert method.alpha == written["methods"]["gift"]["alpha"]
    with vlm_attn.patched(model, ["vhr", "pai"], preset=str(file)):
        for method in vlm_attn.patching.engine_of(model).methods:
            assert list(method.layers) == written["methods"][method.name]["layers"]
    with pytest.raises(ValueError, match="does not fit this model"):
        vlm_attn.patch(tiny.llava()[0], "gift", preset=str(file))


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        (["gfit"], {}, "did you mean 'gift'"),
        (["gift"], {"limit": 13}, "13 images are asked for"),
        (["gift"], {"limit": 2, "searched": 10, "checked": 3}, "13 images are asked for"),
        (["gift"], {"limit": 2, "checked": 3}, "--search"),
        (["var"], {"limit": 2, "searched": 3}, "--method gift"),
        (["gift"], {"limit": 2, "captioned": 13}, "13 images are asked for"),
    ],
)
def test_wrong_input(bundled: tuple, methods: list[str], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(*bundled, methods, **OPTIONS, **options)
