# SPDX-License-Identifier: Apache-2.0
"""The denoising loop against a plain second one, its caches against no cache, methods on its steps, wrong input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vlm_attn
from tests import tiny
from tests.helpers import ACTIVE, Weigh
from vlm_attn import diffusion
from vlm_attn.branch import Run
from vlm_attn.diffusion import decoder, sampling
from vlm_attn.diffusion.decoder import Settings, resolve
from vlm_attn.patching import engine_of
from vlm_attn.registry import build
from vlm_attn.visual_token_ops import DivPrune, Progressive

MASK = 127
PROMPTS = [["image", 4], [3, "image", 7]]


@pytest.fixture(scope="module")
def host():
    model, inputs = tiny.llava()
    model.config.mask_token_id = MASK
    return model, inputs


@pytest.fixture
def model(host):
    yield host[0]
    if vlm_attn.is_patched(host[0]):
        vlm_attn.unpatch(host[0])


@pytest.fixture
def inputs(host):
    return host[1](PROMPTS)


def logits_of(model, inputs, canvas, attention="full"):
    """A whole forward, with a mask made on its own."""
    ids = torch.cat([inputs["input_ids"], canvas], 1)
    shown = torch.nn.functional.pad(inputs["attention_mask"], (0, canvas.shape[1]), value=1).bool()
    length, prompt = ids.shape[1], inputs["input_ids"].shape[1]
    seen = torch.ones(length, length, dtype=torch.bool)
    if attention == "causal":
        seen[:prompt] = torch.ones(length, length, dtype=torch.bool).tril()[:prompt]
    elif attention == "prefix-diffusion":
        seen[:prompt, prompt:] = False
    mask = (seen[None, None] & shown[:, None, None]) | torch.eye(length, dtype=torch.bool)
    with torch.no_grad():
        return model(
            input_ids=ids,
            pixel_values=inputs["pixel_values"],
            attention_mask=mask,
            position_ids=(shown.long().cumsum(1) - 1).clamp_min(0),
            use_cache=False,
        ).logits


def plain_loop(model, inputs, steps, length, size, attention="full", shift=False, w=0.0):
    """LLaDA's loop, as methods state it, without a shortcut."""
    prompt = inputs["input_ids"].shape[1]
    x = torch.full((len(inputs["input_ids"]), length), MASK)
    for block in range(length // size):
        end = (block + 1) * size
        per_block = steps // (length // size)
        total = (x[:, block * size : end] == MASK).sum(1)
        for i in range(per_block):
            out = logits_of(model, inputs, x, attention)
            if w:
                no_prompt = {**inputs, "input_ids": torch.full_like(inputs["input_ids"], MASK)}
                no_image = text_logits(model, no_prompt, x, attention)
                out = no_image + (w + 1) * (out - no_image)
            out = out.roll(1, 1) if shift else out
            out = out[:, prompt:].double()
            out[..., MASK] = -torch.inf
            new, p = out.argmax(-1), out.softmax(-1).max(-1).values
            p[x != MASK] = -1
            p[:, end:] = -1
            for row in range(len(x)):
                n = int(total[row]) // per_block + (i < int(total[row]) % per_block)
                best = p[row].topk(n).indices
                x[row, best] = new[row, best]
    return x


def text_logits(model, inputs, canvas, attention):
    embeds = model.get_input_embeddings()(torch.cat([inputs["input_ids"], canvas], 1))
    shown = torch.nn.functional.pad(inputs["attention_mask"], (0, canvas.shape[1]), value=1).bool()
    mask = shown[:, None, None].expand(-1, 1, embeds.shape[1], -1) | torch.eye(embeds.shape[1], dtype=torch.bool)
    assert attention == "full"
    positions = (shown.long().cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        return model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False).logits


def run(model, inputs, **options):
    """Tokens, and per step what was written and how sure the model was."""
    steps = list(diffusion.stream(model, inputs, **{"steps": 8, "gen_length": 8, **options}))
    return steps[-1].tokens, torch.stack([s.confidence for s in steps]), steps


def same(got, wanted):
    assert got[0].tolist() == wanted[0].tolist()
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-4, atol=1e-6, equal_nan=True)


class TestLoop:
    @pytest.mark.parametrize("attention", ["full", "prefix-diffusion", "causal"])
    @pytest.mark.parametrize(("steps", "size"), [(8, 8), (4, 4), (6, 4), (2, 2 * 4)])
    def test_equals_a_plain_loop(self, model, inputs, attention, steps, size):
        got = diffusion.generate(model, inputs, steps=steps, gen_length=8, block_length=size, attention=attention)
        assert got.tokens.tolist() == plain_loop(model, inputs, steps, 8, size, attention).tolist()
        assert got.forwards == got.steps == steps

    @pytest.mark.parametrize(
        ("trained", "attention"),
        [("prefix-lm", "prefix-diffusion"), ("causal", "causal"), ("full", "full"), ("mma", "modality-mutual")],
    )
    def test_attention_is_what_it_was_trained_with(self, model, inputs, monkeypatch, trained, attention):
        monkeypatch.setattr(model.config, "trained_mask", trained, raising=False)
        got = run(model, inputs, steps=2)
        same(got, run(model, inputs, steps=2, attention=attention))
        others = {"full", "prefix-diffusion", "causal", "modality-mutual"} - {attention}
        for other in others:
            assert not torch.allclose(
                got[1], run(model, inputs, steps=2, attention=other)[1], rtol=1e-3, equal_nan=True
            )

    def test_shifted_logits(self, model, inputs):
        got = diffusion.generate(model, inputs, steps=4, gen_length=8, block_length=4, logit_shift=True)
        assert got.tokens.tolist() == plain_loop(model, inputs, 4, 8, 4, shift=True).tolist()

    def test_guidance(self, model, inputs):
        options = {"steps": 4, "gen_length": 8, "unconditional": "mask"}
        got = diffusion.generate(model, inputs, cfg_scale=1.5, **options)
        assert got.tokens.tolist() == plain_loop(model, inputs, 4, 8, 8, w=1.5).tolist()
        assert got.forwards == 8
        assert got.tokens.tolist() != diffusion.generate(model, inputs, **options).tokens.tolist()

    @pytest.mark.parametrize("attention", ["full", "causal"])
    def test_padded_rows_equal_rows_alone(self, host, model, attention):
        both = run(model, host[1](PROMPTS), attention=attention)
        long = host[1](PROMPTS)
        pads = int((long["attention_mask"][0] == 0).sum())
        alone = {
            "input_ids": long["input_ids"][:1, pads:],
            "attention_mask": long["attention_mask"][:1, pads:],
            "pixel_values": long["pixel_values"][:1],
        }
        assert pads
        single = run(model, alone, attention=attention)
        same((both[0][:1], both[1][:, :1]), single)

    def test_seed_decides(self, model, inputs):
        options = {"temperature": 1.0, "gen_length": 8, "steps": 4, "remasking": "random"}
        first, second, other = (
            diffusion.generate(model, inputs, seed=seed, **options).tokens.tolist() for seed in (1, 1, 2)
        )
        assert first == second != other

    @pytest.mark.parametrize("remasking", sampling.REMASKING)
    @pytest.mark.parametrize("schedule", ["linear", "dream", 0.33, 3.0])
    def test_every_rule_fills_the_canvas(self, model, inputs, remasking, schedule):
        options = {"remasking": remasking, "schedule": schedule, "steps": 4, "gen_length": 8, "block_length": 8}
        steps = list(diffusion.stream(model, inputs, **options))
        assert not (steps[-1].tokens == MASK).any()
        for before, after in zip(steps, steps[1:], strict=False):
            kept = before.tokens != MASK
            assert (after.tokens == before.tokens)[kept].all()
            assert ((after.tokens != MASK) & ~kept).equal(after.written)

    @pytest.mark.parametrize("options", [{"steps": 4}, {"threshold": 0.3}, {"steps": 4, "cache": "dual"}])
    def test_stream_tells_which_step_fixed_what(self, model, inputs, options):
        order = torch.zeros(2, 8, dtype=torch.long)
        steps = list(diffusion.stream(model, inputs, gen_length=8, block_length=4, **options))
        for canvas in steps:
            assert not order[canvas.written].any()  # once
            assert canvas.confidence.isnan().equal(~canvas.written)
            order[canvas.written] = canvas.step
        assert [canvas.step for canvas in steps] == list(range(1, len(steps) + 1))
        assert order[:, :4].max() < order[:, 4:].min()  # block after block
        assert (order > 0).all()

    def test_suppressed_ids_are_never_written(self, model, inputs):
        plain = diffusion.generate(model, inputs, steps=8, gen_length=8)
        banned = plain.tokens.unique().tolist()
        other = diffusion.generate(model, inputs, steps=8, gen_length=8, suppress=tuple(banned))
        assert not torch.isin(other.tokens, plain.tokens).any()

    def test_stop_closes_what_follows(self, model, inputs):
        plain = diffusion.generate(model, inputs, steps=8, gen_length=8, block_length=2, eos_id=tiny.EOS)
        stop = tuple(plain.tokens[1, 2:4].tolist())
        got = diffusion.generate(
            model, {k: v[1:] for k, v in inputs.items()}, steps=8, gen_length=8, block_length=2, stop=(stop,)
        )
        assert got.tokens[0].tolist() == [*plain.tokens[1, :4].tolist(), *[tiny.EOS] * 4]
        assert got.answers == [plain.tokens[1, :2].tolist()]
        assert got.forwards < 8

    def test_the_earliest_of_several_stops_closes_the_rest(self):
        """Whatever the order in which the sequences are given; what is written already stays."""
        mask, end = 0, 1
        row = [9, 5, 6, mask, 7, 8, mask, 5, 6, mask]
        for stop, closed in (
            (((7, 8), (5, 6)), (3, 6, 9)),
            (((5, 6), (7, 8)), (3, 6, 9)),
            (((7, 8),), (6, 9)),
            (((8, 7),), ()),
            (((6,), (5, 6, 0)), (3, 6, 9)),
        ):
            tokens = torch.tensor([row, [mask] * 10])
            decoder._stop(tokens, decoder.Settings(stop=stop, mask_id=mask, eos_id=end))
            assert tokens[0].tolist() == [end if place in closed else token for place, token in enumerate(row)], stop
            assert tokens[1].tolist() == [mask] * 10

    def test_threshold_writes_all_that_are_sure(self, model, inputs):
        at_once = diffusion.generate(model, inputs, gen_length=8, block_length=4, threshold=1e-9)
        assert at_once.forwards == 2
        one_by_one = run(model, inputs, threshold=1.0)
        same(one_by_one, run(model, inputs, steps=8))
        between = list(diffusion.stream(model, inputs, gen_length=8, threshold=0.3))
        for step in between:
            for row in range(2):
                sure = step.confidence[row][step.written[row]]
                assert len(sure) <= 1 or (sure >= 0.3).all()

    def test_model_is_left_as_it_was(self, model, inputs):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with torch.no_grad():
            logits = model(**inputs).logits
            diffusion.generate(model, inputs, steps=2, gen_length=4, cache="dual")
            assert model(**inputs).logits.equal(logits)
        assert all(v.equal(before[k]) for k, v in model.state_dict().items())
        assert not model.model.language_model._forward_pre_hooks


class TestSampling:
    @given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(1, 12), st.floats(0.1, 5))
    def test_counts_add_up(self, many, steps, shift):
        for schedule in ("linear", "dream", shift):
            out = sampling.counts(torch.tensor(many), steps, schedule)
            assert out.sum(1).tolist() == many
            assert (out >= 0).all()

    def test_counts_by_hand(self):
        assert sampling.counts(torch.tensor([7]), 3, "linear").tolist() == [[3, 2, 2]]
        # sigma = 3t / (1 + 2t) at 1/4, 1/2, 3/4, 1: 0.5, 0.75, 0.9, 1 of 8 are 4, 6, 7, 8; reversed differences
        assert sampling.counts(torch.tensor([8]), 4, 3.0).tolist() == [[1, 1, 2, 4]]
        # t: 1, 0.5005, 0.001: floor(8 * 0.4995) = 3, then the rest
        assert sampling.counts(torch.tensor([8]), 2, "dream").tolist() == [[3, 5]]

    def test_scores_by_hand(self):
        p = torch.tensor([[[0.7, 0.2, 0.1], [0.5, 0.5, 0.0]]], dtype=torch.float64)
        tokens, none = torch.tensor([[1, 0]]), torch.Generator()
        by = {
            rule: sampling.confidence(p.log(), tokens, rule, none) for rule in ("low_confidence", "margin", "entropy")
        }
        torch.testing.assert_close(by["low_confidence"], p.new_tensor([[0.2, 0.5]]))
        torch.testing.assert_close(by["margin"], p.new_tensor([[0.5, 0.0]]))
        torch.testing.assert_close(by["entropy"], p.new_tensor([[-0.80181855, -0.69314718]]))

    def test_gumbel_follows_the_distribution(self):
        logits = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64).expand(1, 20_000, 3)
        drawn = sampling.propose(logits, 1.0, torch.Generator().manual_seed(0))
        share = torch.bincount(drawn[0], minlength=3) / 20_000
        torch.testing.assert_close(share.double(), logits[0, 0].softmax(-1), atol=0.015, rtol=0)


class TestCaches:
    @pytest.mark.parametrize("attention", ["prefix-diffusion", "causal"])
    @pytest.mark.parametrize("size", [8, 4])
    @pytest.mark.parametrize("shift", [False, True])
    def test_prefix_is_exact_where_the_prompt_does_not_see_the_answer(self, model, inputs, attention, size, shift):
        options = {"attention": attention, "block_length": size, "logit_shift": shift}
        cached = run(model, inputs, cache="prefix", **options)
        same(cached, run(model, inputs, **options))
        prompt = inputs["input_ids"].shape[1]
        assert [w[:2] for w in cached[2][-1].work] == [(prompt, prompt), *[(8, prompt + 8)] * 8]

    @pytest.mark.parametrize("cache", ["block", "dual"])
    @pytest.mark.parametrize("attention", ["prefix-diffusion", "causal"])
    def test_a_single_block_is_exact(self, model, inputs, cache, attention):
        same(run(model, inputs, cache=cache, attention=attention), run(model, inputs, attention=attention))

    @pytest.mark.parametrize(("every", "attention"), [(1, "full"), (100, "prefix-diffusion"), (100, "causal")])
    @pytest.mark.parametrize("shift", [False, True])
    def test_delayed_is_exact_when_nothing_is_late(self, model, inputs, every, attention, shift):
        options = {"attention": attention, "logit_shift": shift}
        late = run(model, inputs, cache="delayed", prompt_every=every, answer_every=1, **options)
        same(late, run(model, inputs, **options))

    @pytest.mark.parametrize(
        ("cache", "rows"),
        [
            ("block", [28, 8, 28, 4]),
            ("dual", [28, 4, 28, 4]),
            ("delayed", [28, 2, 2, 2]),
            ("prefix", [20, 8, 8, 8, 8]),
        ],
    )
    def test_what_runs_and_that_it_is_an_approximation(self, model, inputs, cache, rows):
        options = {"steps": 4, "block_length": 4, "attention": "full"}
        assert inputs["input_ids"].shape[1] == 20
        plain, cached = run(model, inputs, **options), run(model, inputs, cache=cache, **options)
        assert [w.rows for w in cached[2][-1].work] == rows
        if cache != "prefix":  # the first step is a whole forward
            torch.testing.assert_close(cached[1][0], plain[1][0], rtol=1e-4, atol=1e-6, equal_nan=True)
        assert not torch.allclose(cached[1], plain[1], rtol=1e-3, equal_nan=True)

    @pytest.mark.parametrize("cache", ["block", "dual"])
    def test_one_step_a_block_is_exact(self, model, inputs, cache):
        options = {"steps": 2, "block_length": 4, "attention": "full"}
        same(run(model, inputs, cache=cache, **options), run(model, inputs, **options))

    @pytest.mark.parametrize("cache", ["block", "dual", "prefix"])
    def test_eager_models(self, inputs, cache):
        model, _ = tiny.llava()
        model.set_attn_implementation("eager")
        options = {"mask_id": MASK, "attention": "causal"}
        same(run(model, inputs, cache=cache, **options), run(model, inputs, **options))


METHODS = {
    "gift": ACTIVE["gift"],
    "var": ACTIVE["var"],
    "divprune": {"keep": 3},
    "fastv": {"keep": 3},
    "pyramid_drop": {},
    "pai": {"alpha": 2.0},
    "vaf": ACTIVE["vaf"],
    "vhr": ACTIVE["vhr"],
}


class TestMethods:
    @pytest.mark.parametrize("method", METHODS)
    def test_cached_equals_recomputed_and_differs_from_plain(self, model, inputs, method):
        options = {"attention": "causal"}
        plain = run(model, inputs, **options)
        vlm_attn.patch(model, method, **METHODS[method])
        cached = run(model, inputs, cache="prefix", **options)
        same(cached, run(model, inputs, **options))
        assert not torch.allclose(cached[1], plain[1], rtol=1e-3, equal_nan=True)

    @pytest.mark.parametrize("method", ["gift", "divprune", "vhr"])
    def test_where_the_prompt_sees_itself(self, model, inputs, method):
        options = {"attention": "prefix-diffusion"}
        vlm_attn.patch(model, method, **METHODS[method])
        same(run(model, inputs, cache="prefix", **options), run(model, inputs, **options))

    @pytest.mark.parametrize("attention", ["full", "causal", "prefix-diffusion"])
    def test_dropping_equals_masking(self, model, inputs, attention):
        answers = []
        for mode in ("drop", "mask"):
            vlm_attn.patch(model, "divprune", keep=3, mode=mode, replace=vlm_attn.is_patched(model))
            answers.append(run(model, inputs, attention=attention))
        same(*answers)

    @pytest.mark.parametrize(("method", "attention"), [("mma", "modality-mutual"), ("prefix_lm", "prefix-lm")])
    def test_a_mask_method_is_the_prompts_mask(self, model, inputs, method, attention):
        wanted, plain = run(model, inputs, attention=attention), run(model, inputs, attention="causal")
        vlm_attn.patch(model, method)
        same(run(model, inputs, attention="causal"), wanted)
        same(run(model, inputs, attention="causal", cache="prefix"), wanted)
        assert not torch.allclose(wanted[1], plain[1], rtol=1e-3, equal_nan=True)

    @pytest.mark.parametrize("cache", ["none", "prefix", "block", "dual"])
    def test_the_rows_that_are_edited(self, model, inputs, cache):
        """The prompt's last row and what is still masked; a written position is read like the plain model's."""
        options = {"attention": "causal", "steps": 4}
        plain = run(model, inputs, **options)
        vlm_attn.patch(model, Weigh(image=0.0))
        edited = run(model, inputs, cache=cache, **options)
        vlm_attn.unpatch(model)
        prompt = inputs["input_ids"].shape[1]
        visual = [(row == tiny.IMAGE).nonzero().flatten() for row in inputs["input_ids"]]
        for step in range(4):
            before = edited[2][step - 1].tokens if step else torch.full((2, 8), MASK)
            rows = torch.cat([torch.arange(prompt).expand(2, -1) == prompt - 1, before == MASK], 1)
            out = hidden_keys(model, inputs, before, visual, rows)[:, prompt:].double()
            out[..., MASK] = -torch.inf
            written = edited[2][step].written
            wanted = out.softmax(-1).max(-1).values[written]
            torch.testing.assert_close(edited[1][step][written], wanted, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(edited[1], plain[1], rtol=1e-3, equal_nan=True)

    def test_louder_heads_are_chosen_as_the_steps_see_the_prompt(self, model, inputs):
        """vhr looks at the prompt through the mask it is denoised with; under the causal one it is the causal model's."""
        chosen = {}
        for attention in ("causal", "prefix-diffusion"):
            with vlm_attn.patched(model, "vhr", **ACTIVE["vhr"]):
                engine = engine_of(model)
                for _ in diffusion.stream(model, inputs, steps=1, gen_length=2, attention=attention, cache="prefix"):
                    chosen[attention] = engine.call.memory(engine.methods[0])["heads"]
        with vlm_attn.patched(model, "vhr", **ACTIVE["vhr"]):
            engine = engine_of(model)
            with engine.running(inputs) as call:
                engine.rehearse(Run(engine, model, call, inputs))
                alone = call.memory(engine.methods[0])["heads"]
        assert all(chosen["causal"][layer].equal(alone[layer]) for layer in alone)
        assert any(not chosen["prefix-diffusion"][layer].equal(alone[layer]) for layer in alone)


def hidden_keys(model, inputs, canvas, columns, rows, layers=None):
    """A whole forward, causal prompt, some of whose rows do not see ``columns`` (in some layers).

    ``rows``: ``[B, L]`` bool, or the first of them.
    """
    prompt = inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], canvas], 1)
    shown = torch.nn.functional.pad(inputs["attention_mask"], (0, canvas.shape[1]), value=1).bool()
    length = ids.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool)
    seen[:prompt] = seen.tril()[:prompt]
    plain = (seen[None, None] & shown[:, None, None]).clone()
    less = plain.clone()
    blind = rows if isinstance(rows, torch.Tensor) else (torch.arange(length) >= rows).expand(len(ids), -1)
    for row, gone in enumerate(columns):
        less[row, 0] &= ~(blind[row][:, None] & torch.isin(torch.arange(length), gone))
    eye = torch.eye(length, dtype=torch.bool)
    handles = []
    for index, layer in enumerate(model.model.language_model.layers):
        mask = (less if layers is None or index in layers else plain) | eye
        handles.append(
            layer.register_forward_pre_hook(
                lambda m, a, k, mask=mask: (a, {**k, "attention_mask": mask}), with_kwargs=True
            )
        )
        if layers is not None and index in layers:
            visual = ids == tiny.IMAGE
            handles.append(
                layer.register_forward_hook(lambda m, a, out, v=visual: torch.where(v[..., None], a[0], out))
            )
    try:
        return logits_of(model, inputs, canvas, "causal")
    finally:
        for handle in handles:
            handle.remove()


class TestPruning:
    def columns(self, model, inputs):
        """Visual columns that were not kept, row by row."""
        first = [(row == tiny.IMAGE).nonzero()[0, 0] for row in inputs["input_ids"]]
        return [
            first[k.row] + torch.tensor([i for i in range(k.total) if i not in k.index.tolist()])
            for k in vlm_attn.kept(model)
        ]

    @pytest.mark.parametrize("cache", ["none", "prefix"])
    @pytest.mark.parametrize("start", [0.0, 0.5])
    @pytest.mark.parametrize("mode", ["drop", "mask"])
    def test_late_step(self, model, inputs, cache, start, mode):
        options = {"attention": "causal", "steps": 4}
        plain = run(model, inputs, **options)
        vlm_attn.patch(model, "late_step", keep=3, start_at=start, mode=mode)
        late = run(model, inputs, cache=cache, **options)
        assert [len(k.index) for k in vlm_attn.kept(model)] == [3, 3]
        gone = self.columns(model, inputs)
        vlm_attn.unpatch(model)
        torch.testing.assert_close(
            late[1][: int(start * 4)], plain[1][: int(start * 4)], equal_nan=True, rtol=1e-4, atol=1e-6
        )
        prompt = inputs["input_ids"].shape[1]
        for step in range(int(start * 4), 4):
            before = late[2][step - 1].tokens if step else torch.full((2, 8), MASK)
            # Without a cache no row sees what is gone; with one the prompt has seen it, unless it was gone at once.
            rows = 0 if cache == "none" or start == 0 else prompt
            out = hidden_keys(model, inputs, before, gone, rows)[:, prompt:].double()
            out[..., MASK] = -torch.inf
            wanted = out.softmax(-1).max(-1).values
            written = late[2][step].written
            torch.testing.assert_close(late[1][step][written], wanted[written], rtol=1e-4, atol=1e-6)
        assert not torch.allclose(late[1], plain[1], rtol=1e-3, equal_nan=True)

    @pytest.mark.parametrize("beside", ["pai", "gift"])
    def test_edits_follow_what_is_taken_out(self, model, inputs, beside):
        """Columns leave the prompt's cache between two steps: an edit then means what it means where they are hidden."""
        answers = []
        for mode in ("drop", "mask"):
            edit = build(beside, **{**ACTIVE[beside], **({"heads": 1.0} if beside == "gift" else {})})
            vlm_attn.patch(model, [Progressive(keep=1, mode=mode), edit], replace=vlm_attn.is_patched(model))
            answers.append(run(model, inputs, cache="prefix", attention="causal", steps=8))
        same(*answers)

    @pytest.mark.parametrize("cache", ["none", "prefix"])
    def test_progressive_keeps_fewer_every_step(self, model, inputs, cache):
        vlm_attn.patch(model, "progressive", keep=1)
        left = []
        for _ in diffusion.stream(model, inputs, steps=8, gen_length=8, attention="causal", cache=cache):
            if cache == "prefix" or left:
                left.append(len(vlm_attn.kept(model)[0].index))
            else:
                left.append(9)
        assert left == [9, 8, 7, 6, 5, 4, 3, 2]

    @pytest.mark.parametrize("cache", ["none", "prefix"])
    @pytest.mark.parametrize("layers", [(2, 3), (0, 2), (1,)])
    @pytest.mark.parametrize("mode", ["drop", "mask"])
    def test_layer_skip(self, model, inputs, cache, layers, mode):
        options = {"attention": "causal", "steps": 4}
        vlm_attn.patch(model, "layer_skip", layers=layers, mode=mode)
        skipped = run(model, inputs, cache=cache, **options)
        vlm_attn.unpatch(model)
        prompt = inputs["input_ids"].shape[1]
        visual = [(row == tiny.IMAGE).nonzero().flatten() for row in inputs["input_ids"]]
        for step in range(4):
            before = skipped[2][step - 1].tokens if step else torch.full((2, 8), MASK)
            out = hidden_keys(model, inputs, before, visual, 0, layers)[:, prompt:].double()
            out[..., MASK] = -torch.inf
            written = skipped[2][step].written
            wanted = out.softmax(-1).max(-1).values[written]
            torch.testing.assert_close(skipped[1][step][written], wanted, rtol=1e-4, atol=1e-6)

    def test_layer_skip_writes_token_after_token_too(self):
        model, make = tiny.llava()
        inputs = make(PROMPTS)
        answers = []
        for mode in ("drop", "mask"):
            vlm_attn.patch(model, "layer_skip", layers=(1, 3), mode=mode, replace=vlm_attn.is_patched(model))
            out = model.generate(
                **inputs, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            answers.append(torch.stack(out.logits))
            again = model.generate(
                **inputs,
                max_new_tokens=5,
                do_sample=False,
                use_cache=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            torch.testing.assert_close(torch.stack(again.logits), answers[-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("cache", ["block", "dual", "prefix"])
    @pytest.mark.parametrize("method", ["divprune", "late_step", "progressive", "layer_skip"])
    def test_caches_beside_pruning(self, model, inputs, cache, method):
        """Masked and dropped columns are each other's oracle; with one block the caches change nothing."""
        answers = []
        for mode in ("drop", "mask"):
            given = {} if method == "layer_skip" else {"keep": 3}
            vlm_attn.patch(model, method, mode=mode, replace=vlm_attn.is_patched(model), **given)
            answers.append(run(model, inputs, cache=cache, attention="causal", block_length=4))
        same(*answers)
        one = {"attention": "causal", "block_length": 8}
        same(run(model, inputs, cache=cache, **one), run(model, inputs, cache="prefix", **one))

    @pytest.mark.parametrize("cache", ["none", "prefix"])
    @pytest.mark.parametrize(
        ("method", "given"),
        [("divprune", {"keep": 3}), ("late_step", {"keep": 3}), ("progressive", {"keep": 3}), ("layer_skip", {})],
    )
    def test_no_attention_map_is_read(self, model, inputs, monkeypatch, method, given, cache):
        """The fused attention runs, once per layer and forward (and in the tower's two layers); nothing else does."""
        calls = []
        fused = torch.nn.functional.scaled_dot_product_attention
        monkeypatch.setattr("vlm_attn.attention.attention_rows", lambda *a, **k: pytest.fail("a row was read"))
        monkeypatch.setattr("vlm_attn.attention.edited_attention", lambda *a, **k: pytest.fail("a row was edited"))
        monkeypatch.setattr(
            torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: (calls.append(1), fused(*a, **k))[1]
        )
        vlm_attn.patch(model, method, **given)
        out = diffusion.generate(model, inputs, steps=4, gen_length=8, cache=cache, attention="causal")
        assert len(calls) == 4 * out.forwards + 2
        assert max(max(w.gone) for w in out.work) > 0

    @pytest.mark.parametrize("cache", ["none", "prefix"])
    @pytest.mark.parametrize(("method", "times"), [("divprune", 1), ("late_step", 1), ("progressive", 3)])
    def test_chooses_once_per_count(self, model, inputs, monkeypatch, method, times, cache):
        """Not anew at every step: what is kept of an image before the language model does not hang on the answer."""
        calls = []
        choose = DivPrune.choose
        monkeypatch.setattr(DivPrune, "choose", lambda self, picture: (calls.append(1), choose(self, picture))[1])
        vlm_attn.patch(model, method, keep=3)
        diffusion.generate(model, inputs, steps=4, gen_length=8, cache=cache, attention="causal")
        assert len(calls) == 2 * times

    def test_only_while_denoising(self):
        model, make = tiny.llava()
        vlm_attn.patch(model, "late_step")
        with pytest.raises(ValueError, match="late_step acts on denoising steps"):
            model.generate(**make(PROMPTS), max_new_tokens=1)

    @pytest.mark.parametrize(
        ("method", "given", "message"),
        [
            ("late_step", {"reducer": "fastv"}, "before the language model and merges"),
            ("progressive", {"reducer": "visionzip"}, "before the language model and merges"),
            ("late_step", {"reducer": "late_step"}, "before the language model and merges"),
            ("late_step", {"start_at": 1.5}, "start_at=1.5"),
            ("late_step", {"keep": 0.0}, "keep=0.0"),
            ("layer_skip", {"keep": 0.5}, "keep=0.5"),
            ("layer_skip", {"layers": (9,)}, "layer 9"),
        ],
    )
    def test_wrong_parameters(self, model, method, given, message):
        with pytest.raises(ValueError, match=message):
            vlm_attn.patch(model, method, **given)
        assert not vlm_attn.is_patched(model)


class TestWrongInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"steps": 3, "gen_length": 8, "block_length": 4}, "steps=3 is no multiple of the 2 blocks"),
            ({"steps": 8, "gen_length": 8, "block_length": 3}, "block_length=3 does not divide gen_length=8"),
            ({"steps": 0}, "steps=0: give a whole number"),
            ({"mask_id": tiny.EOS}, f"mask_id={tiny.EOS} is the end token"),
            ({"mask_id": tiny.PAD}, "is the padding token"),
            ({"mask_id": tiny.IMAGE}, "is the image token"),
            ({"mask_id": 1000}, "outside the vocabulary of 128"),
            ({"cfg_scale": 1.0}, "needs an unconditional prompt"),
            ({"cache": "dul"}, "cache='dul': there are none, prefix"),
            ({"remasking": "high"}, "remasking='high': there are"),
            ({"schedule": "cosine"}, "schedule='cosine': there are linear, dream"),
            ({"temperature": -1.0}, "temperature=-1.0"),
            ({"threshold": 1.5}, "threshold=1.5 is outside"),
            ({"threshold": 0.9, "remasking": "entropy"}, "gives none"),
            ({"attention": "sideways"}, "no mask 'sideways'"),
            ({"suppress": (500,)}, "token 500"),
        ],
    )
    def test_is_refused_before_anything_runs(self, model, inputs, options, message, monkeypatch):
        monkeypatch.setattr(type(model), "forward", lambda *a, **k: pytest.fail("the model ran"))
        with pytest.raises(ValueError, match=message):
            diffusion.stream(model, inputs, **options)

    def test_a_model_that_writes_token_after_token(self, inputs):
        model, _ = tiny.llava()
        with pytest.raises(ValueError, match="no mask_token_id"):
            diffusion.generate(model, inputs)

    def test_a_diffusion_model_in_generate(self, model, inputs):
        vlm_attn.patch(model, "divprune")
        with pytest.raises(ValueError, match=r"vlm_attn\.diffusion\.generate"):
            model.generate(**inputs, max_new_tokens=2)

    def test_a_prompt_with_a_mask(self, model, inputs):
        inputs["input_ids"][0, -1] = MASK
        with pytest.raises(ValueError, match="the prompt holds the mask token"):
            diffusion.generate(model, inputs)

    @pytest.mark.parametrize("family", ["gemma3", "qwen2_vl", "paligemma"])
    def test_families_no_mask_makes_bidirectional(self, family):
        model, make = tiny.FAMILIES[family]()
        with pytest.raises(NotImplementedError, match="no plain decoder"):
            diffusion.generate(model, make([["image", 4]]), mask_id=119)

    def test_options_alone(self, model):
        """What the command line asks before it opens a picture."""
        assert resolve(model, None, Settings(steps=4, gen_length=8)).mask_id == MASK
        with pytest.raises(ValueError, match="does not divide"):
            resolve(model, None, Settings(gen_length=8, block_length=3))

    def test_a_cache_the_model_cannot_use(self, model, inputs, monkeypatch):
        monkeypatch.setattr(type(model), "forward", lambda *a, **k: pytest.fail("the model ran"))
        layer = model.model.language_model.layers[0]
        with monkeypatch.context() as patch:
            patch.setitem(layer._modules, "pre_feedforward_layernorm", torch.nn.Identity())
            with pytest.raises(ValueError, match="cache='delayed' needs layers with no pre_feedforward_layernorm"):
                diffusion.generate(model, inputs, cache="delayed")

    def test_as_many_unconditional_prompts_as_prompts(self, model, inputs):
        one = {name: value[:1] for name, value in inputs.items()}
        with pytest.raises(ValueError, match="unconditional has 1 rows, inputs 2"):
            diffusion.generate(model, inputs, cfg_scale=1.0, unconditional=one)

    @pytest.mark.parametrize("method", ["vcd", "opera", "ilvad", "landmark"])
    def test_methods_that_go_token_by_token(self, model, inputs, method):
        vlm_attn.patch(model, method)
        with pytest.raises(ValueError, match=f"{method} acts on one token after the other"):
            diffusion.generate(model, inputs)

    def test_methods_that_cannot_follow(self, model, inputs):
        vlm_attn.patch(model, "gift", **ACTIVE["gift"])
        for cache, attention in (("delayed", "causal"), ("dual", "full"), ("none", "full")):
            with pytest.raises(ValueError, match="gift"):
                diffusion.generate(model, inputs, cache=cache, attention=attention)
        diffusion.generate(model, inputs, cache="prefix", attention="full", steps=2, gen_length=2)
