# SPDX-License-Identifier: Apache-2.0
"""ILVAD (arXiv 2605.20965): places of the image that come into view from one layer to the next are evidence.

The model first writes a few tokens of an answer. What they begin to look at, layer by layer, is boosted when the answer is
written again, and so is text that has itself looked at the evidence: the engine of GIFT with another map.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlm_attn.branch import Run, answered, encoded_once, look
from vlm_attn.call import Call
from vlm_attn.hallucination.gift import normalised, top_heads
from vlm_attn.kernels import Edit
from vlm_attn.method import Method, ModelFacts, at_depth, check_flag, check_range, layer_tuple, unknown_turn

# Segments; the last three weigh VISUAL and TEXT key by key.
LATER, OTHER, VISUAL, TEXT, BOOSTED, WEIGHED, EVIDENCE = range(7)
TINY = 1e-20  # for heads that give the image nothing
HEADS = 0.5  # share of heads that is used, for the map and for each of the two boosts


@dataclass(frozen=True, kw_only=True)
class Ilvad(Method):
    """Boost the places that the model's own first words begin to look at, and text that looked there.

    Overview:
        in short: boosts what the model's own first words begin to look at, and text that looked there
        what it does: writes a few words first; boosts the places that come into view from one layer to the next there,
            and text by how much it looks at them
        edits: last prompt row and generated rows, the middle two thirds of the layers

    Equation:
        a[l,j] = mean over the tokens and the half of the heads with the most image mass of A, j in the image
        b[l,j] = 1 where a[l,j] > tau mean_j a[l]
        S[j]   = sum_l max(b[l+1,j] - b[l,j], 0)                  0 where mean_l a[l,j] is not above its mean; scaled to [0, 1]
        A'[j]  = exp(alpha S[j]) A[j]                             j in the image, half of the heads: the highest S A / A
        A'[i]  = (w[i] + beta) A[i]                               i text behind the image, half of the heads: the most text mass
        w[i]   = sum over layers of S A_i, mean of the half of the heads with the highest S A_i / A_i, scaled to [0, 1]

    Attributes:
        alpha: strength on the image; the published runs use 5 (LLaVA-NeXT: 3). Range 0..20.
        beta: what text that looked at no evidence is weighted with; 1 for questions, 0.2 to 0.5 for captions. Range (0, 100].
        tau: how far above its layer's mean a place must be. Range 0..1000.
        tokens: how many tokens are written first; all but the last are read. Range 2..1000.
        layers: layers to edit; empty = 5..25 of 32, at the same depth of other models. Published for yes-no questions: 0..30.
        clip_sigma: maps are clipped to their mean +- this many standard deviations before they are scaled to [0, 1].
        code_parity: give the prompt's text the weights that the released code gives it at the first step: in each layer the sum
            over the layers so far, the last prompt token counted as one that looked at nothing, scaled by the range that the
            sums had before the clip.

    Rows: the last prompt token and all later ones. The first words are greedy, whatever ``generate`` then does, and end at an
    end token. Deviations from the released code: batched; the text's weights come from the rehearsal, whole, and all generated
    tokens share one, the mean of the words of the rehearsal. The code's weights grow with every token and layer, and are
    shifted: its prefill never scores the last prompt token, whose score then goes to the first generated token, that of the
    first to the second, and so on. ``code_parity`` gives its logits at the first step; later tokens still share one weight,
    with the shift. A later turn keeps the map and the weights of the first. Cost: ``tokens`` tokens, and two more prompts
    (their picture is encoded once).
    """

    name: ClassVar[str] = "ilvad"
    paper: ClassVar[str] = "ILVAD, arXiv 2605.20965"
    token_by_token: ClassVar[bool] = True

    alpha: float = 5.0
    beta: float = 1.0
    tau: float = 5.0
    tokens: int = 10
    layers: tuple[int, ...] = ()
    clip_sigma: float = 3.0
    code_parity: bool = False

    def __post_init__(self) -> None:
        check_range(self, "alpha", 0, 20)
        check_range(self, "beta", 0, 100, open_low=True)
        check_range(self, "tau", 0, 1000)
        check_range(self, "tokens", 2, 1000)
        check_range(self, "clip_sigma", 0, 100, open_low=True)
        layer_tuple(self, "layers", empty=True)
        check_flag(self, "code_parity")

    @property
    def neutral(self) -> bool:
        """``alpha=0`` finds no evidence, and then ``beta=1`` leaves the text alone."""
        return self.alpha == 0 and self.beta == 1

    def bind(self, facts: ModelFacts) -> Ilvad:
        """Check the layers; without any, those of the released code for captions."""
        return at_depth(self, facts, 5, 26)

    def start(self, call: Call, processor: Any) -> None:
        """A later turn needs the map of the call that filled its cache; text alone can be read again."""
        if call.image_in_cache and (call.earlier is None or "saliency" not in call.earlier.memory(self)):
            raise unknown_turn(self, "its evidence is")

    def rehearse(self, run: Run) -> None:
        """Write the first words, then see which text looked at the evidence.

        Kept are ``saliency`` ``[B0, P]`` and ``weight`` ``[W, B0, P]`` of the prompt's columns, and ``later`` ``[W, B0]`` of
        generated text; W = 1, with ``code_parity`` the number of layers.
        """
        call, memory = run.call, run.call.memory(self)
        if call.image_in_cache:  # what the first turn wrote, and this turn's question, count like generated text
            known = call.earlier.memory(self)  # type: ignore[union-attr]
            memory["later"] = known["later"]
            for name, rest in (("saliency", torch.zeros_like(known["later"][0])), ("weight", known["later"])):
                wide, before = rest[..., None].repeat_interleave(call.prompt.length, -1), known[name][..., : call.first]
                wide[..., : before.shape[-1]] = before
                memory[name] = wide
            return
        length, text = call.prompt.length, call.prompt.text_after_image
        with encoded_once(run.model):
            words, seen, there = self.first_words(run)
            saliency = evidence_map(seen, there, call.prompt.visual, tau=self.tau, clip_sigma=self.clip_sigma)
            all_text = torch.cat([text, pad(there, (0, 1))], 1)
            looked = self.looked(run, words, all_text, saliency)
        if self.code_parity:
            weights = self.as_released(looked, all_text, length)
        else:
            weights = normalised(looked.sum(0), all_text, self.clip_sigma)[None]
        memory["saliency"] = saliency
        memory["weight"] = torch.where(text, weights[..., :length] + self.beta, 1.0)
        memory["later"] = weights[..., length:].sum(-1) / there.sum(1).clamp_min(1) + self.beta

    def first_words(self, run: Run) -> tuple[Tensor, Tensor, Tensor]:
        """Greedy words ``[B0, n]``, and what the rows of all but the last give the image.

        Returns:
            The words; ``[L, B0, n - 1, P]``, mean of the chosen heads; ``[B0, n - 1]`` which of these rows stand before an end
            token.
        """
        visual = run.call.prompt.visual
        seen: defaultdict[int, list[Tensor]] = defaultdict(list)

        def tap(layer: int, out: Tensor, attend: Callable[..., Tensor]) -> Tensor:
            if out.shape[1] == 1:
                attention = attend()[:, :, 0]  # [B, H, S]; a sliding layer's cache has dropped its oldest keys
                gone = visual.shape[1] + len(seen[layer]) + 1 - attention.shape[2]
                attention = pad(attention, (gone, 0))[..., : visual.shape[1]] * visual[:, None]
                kept = top_heads(attention.sum(-1), HEADS)
                seen[layer].append((attention * kept[..., None]).sum(1) / kept.sum(1, keepdim=True))
            return out

        ends = {name: run.option(name) for name in ("eos_token_id", "pad_token_id")}
        with run.engine.aside(tap=tap), torch.no_grad():
            out = run.model.generate(**run.inputs, do_sample=False, num_beams=1, max_new_tokens=self.tokens, **ends)
        rows = [torch.stack(steps, 1) for _, steps in sorted(seen.items())]
        rows = rows or [torch.zeros(len(out), 0, visual.shape[1], device=visual.device)]  # an end token at once
        words = out[:, -rows[0].shape[1] - 1 :]
        stop = torch.as_tensor(
            [] if ends["eos_token_id"] is None else ends["eos_token_id"], device=words.device
        ).flatten()
        there = torch.isin(words[:, :-1], stop).cumsum(1) == 0
        return words, torch.stack(rows), there.to(visual.device)

    def looked(self, run: Run, words: Tensor, text: Tensor, saliency: Tensor) -> Tensor:
        """How much each token looks at the evidence in each layer, from a plain forward of the prompt with the words after it.

        Args:
            run: the run.
            words: ``[B0, n]``.
            text: ``[B0, P + n]`` bool: which tokens are compared; the others get 0.
            saliency: ``[B0, P]``.

        Returns:
            ``[L, B0, P + n]`` float32.
        """
        visual, first = run.call.prompt.visual, int(text.any(0).int().argmax())
        found: list[Tensor] = []

        def tap(layer: int, out: Tensor, attend: Callable[..., Tensor]) -> Tensor:
            attention = attend(slice(first, None))[..., : visual.shape[1]]  # [B, H, R, P]
            evidence = torch.einsum("bhrp,bp->bhr", attention, self.alpha * saliency) * text[:, None, first:]
            mass = torch.einsum("bhrp,bp->bhr", attention, visual.float())
            kept = top_heads(evidence / mass.clamp_min(TINY), HEADS)
            found.append(pad((evidence * kept).sum(1) / kept.sum(1), (first, 0)))
            return out

        inputs = answered(run.inputs, words)
        if "inputs_embeds" in inputs:
            more = run.model.get_input_embeddings()(words)
            inputs["inputs_embeds"] = torch.cat([inputs["inputs_embeds"], more.to(inputs["inputs_embeds"])], 1)
        look(run, inputs, tap)
        return torch.stack(found)

    def as_released(self, looked: Tensor, text: Tensor, prompt: int) -> Tensor:
        """What the released code makes of :meth:`looked`, layer by layer.

        Args:
            looked: ``[L, B0, P + n]``.
            text: ``[B0, P + n]`` bool.
            prompt: P.

        Returns:
            ``[L, B0, P + n]`` in [0, 1] but for what the clip cuts off.
        """
        last = looked[..., prompt - 1 :]
        looked = torch.cat([looked[..., : prompt - 1], torch.zeros_like(last[..., :1]), last[..., :-1]], -1)
        text_of_prompt = text & (torch.arange(text.shape[1], device=text.device) < prompt)
        count, total, made = text_of_prompt.sum(1, keepdim=True), torch.zeros_like(looked[0]), []
        for layer, more in enumerate(looked):
            total = total + more
            low = total.masked_fill(~text_of_prompt, torch.inf).amin(1, keepdim=True)
            span = total.masked_fill(~text_of_prompt, -torch.inf).amax(1, keepdim=True) - low
            if layer in self.layers:  # the clip stays for the layers above
                mean = (total * text_of_prompt).sum(1, keepdim=True) / count
                off = (total - mean) * text_of_prompt
                reach = self.clip_sigma * (off.square().sum(1, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
                total = total.clamp(mean - reach, mean + reach)
            made.append(torch.where(text & (span > 0), (total - low) / span.clamp_min(TINY), 0.0))
        return torch.stack(made)

    def edit(self, call: Call, layer: int) -> Edit | None:
        """The same edit at every edited layer, but for the text's weights with ``code_parity``."""
        if layer not in self.layers:
            return None
        return self.boost(call, layer) if self.code_parity else call.once(self, lambda: self.boost(call, 0))

    def boost(self, call: Call, weights: int) -> Edit:
        """The partition of the keys, and what its policy needs to know; ``weights``: which of the text's."""
        memory, times = call.memory(self), call.batch // call.prompt.batch
        visual, text = call.layout.visual, call.layout.text_after_image
        known = memory["saliency"], memory["weight"][weights], memory["later"][weights]
        saliency, weight, later = (value.repeat_interleave(times, 0) for value in known)
        columns = [torch.zeros_like(visual), ~visual & ~text, visual, text]
        columns += [visual * (self.alpha * saliency).exp(), text * weight, visual * saliency]
        segments = torch.stack([column.float() for column in columns], -1)
        return Edit(segments, partial(self.reweigh, later[:, None, None]), partition=4)

    def reweigh(self, later: Tensor, mass: Tensor) -> Tensor:
        """``[B, H, Q, 7]`` masses to weights; ``later [B, 1, 1]`` is the weight of generated text."""
        looks = top_heads(mass[..., EVIDENCE] / mass[..., VISUAL].clamp_min(TINY), HEADS)
        asks = top_heads(mass[..., TEXT] + mass[..., LATER], HEADS)
        one = torch.ones_like(mass[..., 0])
        return torch.stack([torch.where(asks, later, 1.0), one, ~looks, ~asks, looks, asks, 0 * one], -1)


def evidence_map(seen: Tensor, there: Tensor, visual: Tensor, *, tau: float, clip_sigma: float) -> Tensor:
    """The places that come into view from one layer to the next.

    Args:
        seen: ``[L, B, n, P]`` what each of n rows gives the image, mean of the chosen heads.
        there: ``[B, n]`` bool: which rows count.
        visual: ``[B, P]`` bool.
        tau: how far above the mean of its layer a place is in view.
        clip_sigma: see :func:`~vlm_attn.hallucination.gift.normalised`.

    Returns:
        ``[B, P]`` float32 in [0, 1]; all zeros where no row counts.
    """
    looks = (seen * there[..., None]).sum(2) / there.sum(1).clamp_min(1)[:, None]  # [L, B, P]
    view = in_view(looks, visual, tau).float()
    often = in_view(looks.mean(0), visual, 1.0)
    return normalised((view[1:] - view[:-1]).clamp_min(0).sum(0) * often, visual, clip_sigma)


def in_view(looks: Tensor, visual: Tensor, times: float) -> Tensor:
    """``[..., B, P]`` where attention is above so many times its mean over the image ``visual [B, P]``."""
    mean = (looks * visual).sum(-1, keepdim=True) / visual.sum(-1, keepdim=True).clamp_min(1)
    return (looks > times * mean) & visual
