# SPDX-License-Identifier: Apache-2.0
"""Where the model looks while it answers, and which tokens are sinks, against an eager attention of the tests' own."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_attn
from tests import tiny
from tests.engine.test_saliency import GRIDS
from tests.hallucination.test_gift import columns, gift_hand, map_by_hand
from tests.helpers import ACTIVE, close, differ, generate, logits, on, same
from tests.oracle import Hand, attentions, oracle
from vlm_attn import diffusion, registry
from vlm_attn.patching import engine_of

GIFT = ACTIVE["gift"]


def by_hand(model: Any, x: dict[str, Any], hand: Hand, new: int) -> tuple[list[int], Tensor]:
    """Answer and attention ``[T, P]`` of the rows it was read from, averaged over heads and layers."""
    length, rows = x["input_ids"].shape[1], []

    def look(layer: int, probability: Tensor) -> Tensor:
        probability = hand(layer, probability)
        rows.append(probability[0, :, -1, :length].mean(0))
        return probability

    answer = generate(oracle(model, look), x, new=new, suppress_tokens=[tiny.IMAGE])[0][0].tolist()
    return answer, torch.stack(rows).view(new, -1, length).mean(1)


class TestGaze:
    @pytest.mark.parametrize(
        "name", ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "internvl", "gemma3", "paligemma"]
    )
    def test_plain_model(self, name: str) -> None:
        model, inputs = tiny.FAMILIES[name]()
        x = inputs([[3, "image", 9]])
        before = logits(model, x)
        answer, rows = by_hand(model, x, lambda layer, probability: probability, 5)
        (found,) = vlm_attn.gaze(model, x, answer)
        h, w = GRIDS[name]
        assert found.shape == (5, h, w)
        visual = (x["input_ids"][0] == tiny.IMAGE).nonzero().flatten()
        first = len(visual) - h * w if name == "internvl" else 0  # its overview stands behind the tiles
        close(found.flatten(1), rows[:, visual[first : first + h * w]], 1e-4)
        assert not vlm_attn.is_patched(model)
        assert torch.equal(logits(model, x), before)

    @pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
    def test_edits_are_seen(self, name: str) -> None:
        model, inputs = tiny.FAMILIES[name]()
        x = inputs([[3, "image", 11]], seed=5)
        visual, query = columns(x)
        saliency = map_by_hand([attentions(model, x)[1][0].double().numpy()], visual, query, query)
        answer, rows = by_hand(model, x, gift_hand(visual, query, saliency, GIFT), 6)
        with vlm_attn.patched(model, "gift", query_span=(query[0], query[-1] + 1), **GIFT):
            (found,) = vlm_attn.gaze(model, x, answer)
            assert [method.name for method in engine_of(model).methods] == ["gift"]
            assert engine_of(model).watch is None
        close(found.flatten(1), rows[:, visual], 1e-4)
        differ(found, vlm_attn.gaze(model, x, answer)[0])

    def test_two_images(self) -> None:
        model, inputs = tiny.llava()
        x = inputs([[3, "image", 2, "image", 9]])
        answer, rows = by_hand(model, x, lambda layer, probability: probability, 3)
        visual = (x["input_ids"][0] == tiny.IMAGE).nonzero().flatten()
        found = vlm_attn.gaze(model, x, answer)
        assert [maps.shape for maps in found] == [(3, 3, 3), (3, 3, 3)]
        close(torch.cat([maps.flatten(1) for maps in found], 1), rows[:, visual], 1e-4)

    @pytest.mark.parametrize("method", ["random", "divprune", "downsample", "fastv"])
    def test_fewer_tokens(self, method: str) -> None:
        """What is gone is not looked at, and it does not matter whether it was dropped or hidden."""
        model, inputs = tiny.llava()
        x = inputs([[3, "image", 9]])
        answer, _ = by_hand(model, x, lambda layer, probability: probability, 4)
        found = {}
        for mode in ("drop", "mask"):
            with vlm_attn.patched(model, method, keep=4, mode=mode):
                (found[mode],) = vlm_attn.gaze(model, x, answer)
                (left,) = vlm_attn.kept(model)
        close(found["drop"], found["mask"], 1e-4)
        if method == "fastv":  # its first layers still see all
            differ(found["drop"], vlm_attn.gaze(model, x, answer)[0])
        else:
            assert not found["drop"][:, ~left.mask].any()
            assert found["drop"][:, left.mask].all()

    def test_calls_of_other_threads_wait(self) -> None:
        """They run with what the model is patched with, not with what it is looked at with."""
        model, inputs = tiny.llava()
        x = inputs([[3, "image", 9]])
        found = []
        with on(model, "gift"):
            wanted = generate(model, x)
            thread = threading.Thread(target=lambda: found.append(generate(model, x)))
            with engine_of(model).observed(lambda methods: [registry.build("pai", alpha=0.9)]):
                thread.start()
                thread.join(0.2)
                assert thread.is_alive()
            thread.join()
        same(found[0], wanted)
        differ(wanted[1], generate(model, x)[1])

    def test_wrong_input(self) -> None:
        model, inputs = tiny.llava()
        x = inputs([[3, "image", 9]])
        with pytest.raises(ValueError, match="one answer to one prompt, got 0 tokens"):
            vlm_attn.gaze(model, x, [])
        with pytest.raises(ValueError, match="2 prompts"):
            vlm_attn.gaze(model, inputs([[3, "image", 9], [3, "image", 9]]), [5])
        with on(model, "gift"):
            with pytest.raises(ValueError, match="patched already"):
                vlm_attn.gaze(model, x, [5], processor=None)
            with pytest.raises(IndexError):
                vlm_attn.gaze(model, x, [10**6])  # not a token: the model is left as it was
            assert [method.name for method in engine_of(model).methods] == ["gift"]
            assert engine_of(model).watch is None
        assert not vlm_attn.is_patched(model)


class TestSinks:
    def test_by_hand(self) -> None:
        """Massive in the input of a layer: the share of the edited layers in which a token is."""
        model, inputs = tiny.llava()
        x = inputs([[3, "image", 9]])
        with torch.no_grad():
            hidden = model(**x, output_hidden_states=True).hidden_states
        massive = [h[0, :, [3, 7]].abs().amax(-1) / (h[0].square().mean(-1) + 1e-6).sqrt() >= 1.5 for h in hidden[:1]]
        (found,) = vlm_attn.sinks(model, x, sink_dims=(3, 7), tau=1.5, layers=(0,))
        visual = x["input_ids"][0] == tiny.IMAGE
        assert torch.equal(found.flatten(), massive[0][visual].float())
        assert 0 < found.sum() < 9
        with on(model, "var"):
            (over_layers,) = vlm_attn.sinks(model, x)
            assert over_layers.shape == (3, 3)
            assert set((over_layers * 3).round().int().flatten().tolist()) <= {0, 1, 2, 3}
            with pytest.raises(ValueError, match="patched already"):
                vlm_attn.sinks(model, x, tau=2.0)
        with on(model, "gift"), pytest.raises(ValueError, match="'gift', which knows no sinks"):
            vlm_attn.sinks(model, x)
        assert not vlm_attn.is_patched(model)


class TestCanvasGaze:
    @pytest.fixture(scope="class")
    def bundled(self) -> Any:
        from vlm_attn.evals import prompts, scenes
        from vlm_attn.evals.models import load_model

        model, processor = load_model("scenes-diffusion", "cpu")
        picture = scenes.render(scenes.scene("validation", 3))
        return model, processor, prompts.build_inputs(model, processor, [picture], ["Please describe this image."])

    def test_is_the_attention_of_the_step_that_writes(self, bundled: Any) -> None:
        """Against the maps that eager attention returns."""
        model, processor, x = bundled
        options: dict[str, Any] = {"steps": 5, "gen_length": 12, "cache": "prefix"}
        (found,) = vlm_attn.canvas_gaze(model, x, lambda: diffusion.stream(model, x, **options), processor=processor)
        model.set_attn_implementation("eager")
        maps: list[Tensor] = []
        handles = [
            module.register_forward_hook(lambda module, args, out: maps.append(out[1]))
            for name, module in model.named_modules()
            if name.endswith("self_attn") and "language_model" in name
        ]
        try:
            wanted = torch.full((12, x["input_ids"].shape[1]), torch.nan)
            for canvas in diffusion.stream(model, x, **options):
                rows = torch.stack(maps[-len(handles) :]).mean((0, 1, 2))  # [12, P + 12]
                wanted = torch.where(canvas.written[0, :, None], rows[:, : wanted.shape[1]], wanted)
        finally:
            for handle in handles:
                handle.remove()
            model.set_attn_implementation("sdpa")
        close(found.flatten(1), wanted[:, x["input_ids"][0] == model.config.image_token_id], 1e-5)
        assert not vlm_attn.is_patched(model)

    def test_pruned_tokens_get_nothing(self, bundled: Any) -> None:
        model, processor, x = bundled
        options: dict[str, Any] = {"steps": 4, "gen_length": 8, "cache": "prefix"}
        with vlm_attn.patched(model, "late_step", start_at=0.5, keep=5, processor=processor):
            wrote = torch.stack([canvas.written[0] for canvas in diffusion.stream(model, x, **options)])
            (found,) = vlm_attn.canvas_gaze(model, x, lambda: diffusion.stream(model, x, **options))
            gone = ~vlm_attn.kept(model)[0].mask
        late = wrote[2:].any(0)
        assert late.any()
        assert not found[late][:, gone].any()
        assert (found[~late][:, gone] > 0).all()

    def test_wrong_input(self, bundled: Any) -> None:
        model, processor, x = bundled
        two = {key: torch.cat([value, value]) for key, value in x.items()}
        with pytest.raises(ValueError, match="one answer to one prompt, got 2 prompts"):
            vlm_attn.canvas_gaze(model, two, lambda: diffusion.stream(model, two), processor=processor)
