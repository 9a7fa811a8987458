# SPDX-License-Identifier: Apache-2.0
"""The forwards of one prompt and its canvas: which rows run at a step, against which keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vlm_attn import dropping, host
from vlm_attn.families import image_token_ids
from vlm_attn.kernels.masks import Mask, materialise
from vlm_attn.layout import build_layout, visual_columns
from vlm_attn.patching import find_decoder
from vlm_attn.question import find_questions

if TYPE_CHECKING:
    from vlm_attn.call import Call
    from vlm_attn.diffusion.decoder import Settings
    from vlm_attn.engine import Engine


class Work(NamedTuple):
    """What one forward ran, of one sample.

    Attributes:
        rows: rows that ran.
        keys: keys they attended to.
        logits: rows whose logits were computed: those that the block's tokens are read from.
        gone: per layer, visual tokens that were not there; none where nothing is pruned.
        compared: rows whose values alone were recomputed, to see how far they moved.
    """

    rows: int
    keys: int
    logits: int
    gone: tuple[int, ...] = ()
    compared: int = 0


class Stream:
    """One prompt with its canvas. The caches are rules for which columns run; they then overwrite their keys and values.

    Attributes:
        work: of every forward.
        frozen: whether no prompt token sees the answer: its keys and values then never change.
    """

    def __init__(
        self,
        model: Any,
        inputs: dict[str, Any],
        mask: Mask,
        settings: Settings,
        engine: Engine | None,
        call: Call | None,
    ) -> None:
        self.model, self.inputs, self.settings = model, inputs, settings
        self.call: Any = call
        self.engine: Any = engine
        config = model.config.get_text_config(decoder=True)
        self.text_model: Any
        self.layers: Any
        self.text_model, self.layers, _ = find_decoder(model, config)
        self.base = engine.base if engine is not None else host.implementation(config)
        ids = inputs["input_ids"]
        self.start, self.total = ids.shape[1], ids.shape[1] + settings.gen_length
        shown = inputs.get("attention_mask")
        shown = torch.ones_like(ids) if shown is None else shown
        group = call.prompt.group if call is not None else _layout(model, ids, shown)
        visible = materialise(mask, group, length=self.total)
        # Padding would see nothing at all, and give NaN: it sees itself.
        self.visible = visible | torch.eye(self.total, dtype=torch.bool, device=ids.device)
        self.frozen = not bool(visible[..., : self.start, self.start :].any())
        longer = torch.nn.functional.pad(shown, (0, settings.gen_length), value=1)
        self.positions = (longer.cumsum(1) - 1).clamp_min(0)
        self.embeds: Tensor | None = None  # of the prompt, once it has run
        self.known: Tensor | None = None  # [B, 1 + L, V] logits of the last prompt row and the canvas
        self.cache: Any = None if settings.cache == "none" else host.slot_cache(config)
        self.work: list[Work] = []
        if call is not None:
            call.whole = bool(visible[..., : self.start - 1, self.start - 1].any())

    def logits(self, tokens: Tensor, block: int, step: int, progress: float) -> Tensor:
        """``[B, L, V]`` what the model makes of the canvas; columns that did not run keep what they had.

        Args:
            tokens: ``[B, L]`` the canvas.
            block: number of the block.
            step: step within the block.
            progress: share of all steps that is done.
        """
        if self.call is not None:
            self.call.progress = progress
        size = self.settings.block_length or self.settings.gen_length
        begin, kind = self.start + block * size, self.settings.cache
        once = kind == "prefix" or (self.frozen and kind in ("block", "dual"))
        if once and self.embeds is None:
            self.forward(tokens, 0, self.start, block)
        first = self.start if once else 0
        if self.call is not None and self.cache is not None and dropping.thin(self.call, self.cache):
            images = self.call.prompt.images
            self.engine.kept = self.call.reduction.report(self.engine.model_config, images)
        if kind in ("block", "dual") and step:
            self.forward(tokens, begin, begin + size if kind == "dual" else self.total, block)
        else:
            self.forward(tokens, first, self.total, block)
        assert self.known is not None
        return self.known[:, :-1] if self.settings.logit_shift else self.known[:, 1:]

    def read_from(self, block: int, first: int, stop: int) -> tuple[int, int]:
        """Of the columns ``first .. stop - 1``, those that a block's tokens are read from, half open; at least the last."""
        size = self.settings.block_length or self.settings.gen_length
        begin = self.start + block * size
        return max(first, min(begin - bool(self.settings.logit_shift), stop - 1)), min(begin + size, stop)

    def forward(self, tokens: Tensor, first: int, stop: int, block: int) -> None:
        """Run the columns ``first .. stop - 1``; ``first`` is 0 or behind the prompt. Logits are those a block needs."""
        low, high = self.read_from(block, first, stop)
        if self.cache is not None:
            host.write_to(self.cache, first or None if first or self.embeds is None else 0)
        keys = stop if self.cache is None else max(stop, sum(host.key_window(self.cache, stop - first, 0)))
        visible = self.visible[..., first:stop, :keys]
        like = self.model.get_input_embeddings().weight
        arguments: dict[str, Any] = {
            "attention_mask": host.mask_like(visible, self.base, like),
            "position_ids": self.positions[:, first:stop],
            "use_cache": self.cache is not None,
            "logits_to_keep": torch.arange(low - first, high - first, device=tokens.device),
        }
        if self.cache is not None:
            arguments[host.CACHE] = self.cache
        canvas = tokens[:, max(first - self.start, 0) : max(stop - self.start, 0)]
        if self.call is not None:
            self.call.open = canvas.eq(self.settings.mask_id or 0)
        if first >= self.start:
            arguments["input_ids"] = canvas
        elif self.embeds is None:
            arguments |= {k: v for k, v in self.inputs.items() if k not in ("attention_mask", "position_ids")}
            arguments["input_ids"] = torch.cat([self.inputs["input_ids"], canvas], 1)
        else:
            embeds = self.model.get_input_embeddings()(canvas)
            arguments["inputs_embeds"] = torch.cat([self.embeds, embeds.to(self.embeds.dtype)], 1)
        handle = self.text_model.register_forward_pre_hook(self._remember, with_kwargs=True, prepend=True)
        try:
            logits = self.model(**arguments).logits
        finally:
            handle.remove()
        if self.known is None:
            self.known = logits.new_zeros(len(logits), 1 + self.settings.gen_length, logits.shape[-1])
        self.known[:, low - self.start + 1 : high - self.start + 1] = logits
        state = self.call.reduction if self.call is not None else None
        gone = tuple(state.layers[i].dropped for i in range(len(self.layers))) if state is not None else ()
        self.work.append(Work(stop - first, keys, logits.shape[1], gone))

    def _remember(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep the prompt's embeddings, images merged in, the first time it runs."""
        if self.embeds is None:
            embeds = kwargs.get("inputs_embeds")  # a model without images leaves the embedding to its text model
            embeds = module.get_input_embeddings()(kwargs["input_ids"]) if embeds is None else embeds
            self.embeds = embeds[:, : self.start]


def image_ids(config: Any) -> tuple[int, ...]:
    """Ids of image tokens; none for a model whose pictures are ordinary tokens (MMaDA)."""
    try:
        return image_token_ids(config)
    except NotImplementedError:
        return ()


def _layout(model: Any, ids: Tensor, shown: Tensor) -> Tensor:
    """Groups ``[B, P]`` of a prompt, as far as it can be told without its template."""
    visual = visual_columns(ids, image_ids(model.config))
    query, role = find_questions(ids, visual, (shown == 0).sum(1).tolist(), None)
    return build_layout(visual, shown, query, role, ()).group


class DelayedStream(Stream):
    """dLLM-Cache (arXiv 2506.06295): per layer, keys, values and the outputs of attention and MLP are kept.

    The prompt is refreshed every ``prompt_every`` steps, the answer every ``answer_every``. Between these, every layer
    recomputes the values of all answer tokens, takes the share ``refresh`` with the lowest cosine to the kept ones, and runs
    only these through attention and MLP; the others add their kept outputs to the residual.

    Deviation: a kept value is replaced only with the rest of its token, not on its own.
    """

    NEEDED = ("input_layernorm", "post_attention_layernorm", "self_attn", "mlp")

    @classmethod
    def lacking(cls, text_model: Any, layer: Any) -> list[str]:
        """What a decoder layer would need to run in parts, and does not have."""
        out = [name for name in cls.NEEDED if not hasattr(layer, name)]
        out += [f"self_attn.{n}" for n in ("v_proj",) if not hasattr(getattr(layer, "self_attn", None), n)]
        out += [n for n in ("rotary_emb", "norm") if not hasattr(text_model, n)]
        # A layer with more norms than these two (Gemma 2) adds other things to its residual.
        more = [n for n, _ in layer.named_children() if n not in cls.NEEDED]
        return out + [f"no {n}" for n in more]

    def logits(self, tokens: Tensor, block: int, step: int, progress: float) -> Tensor:
        """See :meth:`Stream.logits`."""
        s = self.settings
        done = len(self.work)
        prompt, answer = done % s.prompt_every == 0, done % s.answer_every == 0
        if self.embeds is None:
            self.kept = [_Outputs() for _ in self.layers]
            self._first(tokens, block)
        elif prompt or answer or s.refresh:
            self._partly(tokens, prompt, answer, block)
        assert self.known is not None
        return self.known[:, :-1] if s.logit_shift else self.known[:, 1:]

    def _first(self, tokens: Tensor, block: int) -> None:
        """A whole forward, which fills everything."""
        handles = []
        for layer, kept in zip(self.layers, self.kept, strict=True):
            handles += [
                layer.self_attn.register_forward_hook(
                    lambda m, a, out, k=kept: setattr(k, "attention", out[0].clone())
                ),
                layer.mlp.register_forward_hook(lambda m, a, out, k=kept: setattr(k, "mlp", out.clone())),
            ]
        try:
            self.forward(tokens, 0, self.total, block)
        finally:
            for handle in handles:
                handle.remove()

    def _partly(self, tokens: Tensor, prompt: bool, answer: bool, block: int) -> None:
        """Run the prompt's columns, all of the answer's or the share that moved, or both."""
        assert self.embeds is not None
        embeds = self.model.get_input_embeddings()(tokens)
        first = 0 if prompt else self.start
        hidden = torch.cat([self.embeds, embeds.to(self.embeds.dtype)], 1)[:, first:]
        columns = torch.arange(first, self.total, device=hidden.device).expand(len(hidden), -1)
        count = self.total - self.start if answer else round(self.settings.refresh * (self.total - self.start))
        ran = 0
        for index, (layer, kept) in enumerate(zip(self.layers, self.kept, strict=True)):
            normed = layer.input_layernorm(hidden)
            rows = columns - first
            if not answer:
                moved = self._moved(layer, index, normed[:, self.start - first :], count) + self.start - first
                rows = torch.cat([rows[:, : self.start - first], moved], 1)
            ran = rows.shape[1]
            if ran:
                at = rows + first
                mask = _take(self.visible[:, 0].expand(len(rows), -1, -1), at)[:, None]
                picked = _take(normed, rows)
                where = self.text_model.rotary_emb(picked, position_ids=self.positions.gather(1, at))
                slot = self.cache.layers[index]
                slot.at = at
                out = layer.self_attn(
                    hidden_states=picked,
                    position_embeddings=where,
                    attention_mask=host.mask_like(mask, self.base, picked),
                    **{host.CACHE: self.cache},
                )[0]
                slot.at = None
                _put(kept.attention, at, out)
            hidden = hidden + kept.attention[:, first:]
            if ran:
                _put(kept.mlp, at, layer.mlp(layer.post_attention_layernorm(_take(hidden, rows))))
            hidden = hidden + kept.mlp[:, first:]
        low, high = self.read_from(block, first, self.total)
        assert self.known is not None
        logits = self.model.get_output_embeddings()(self.text_model.norm(hidden[:, low - first : high - first]))
        self.known[:, low - self.start + 1 : high - self.start + 1] = logits
        compared = 0 if answer else self.total - self.start
        self.work.append(Work(ran, self.total, logits.shape[1], compared=compared))

    def _moved(self, layer: Any, index: int, normed: Tensor, count: int) -> Tensor:
        """``[B, count]`` the answer tokens whose value moved most, ascending."""
        value = layer.self_attn.v_proj(normed)
        held = self.cache.layers[index].values[:, :, self.start : self.total]
        held = held.transpose(1, 2).flatten(2)
        cosine = torch.nn.functional.cosine_similarity(value.float(), held.float(), dim=-1)
        return cosine.argsort(dim=1, stable=True)[:, :count].sort(1).values


class _Outputs:
    attention: Tensor
    mlp: Tensor


def _take(x: Tensor, rows: Tensor) -> Tensor:
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))


def _put(x: Tensor, rows: Tensor, new: Tensor) -> None:
    x.scatter_(1, rows[..., None].expand(-1, -1, x.shape[2]), new.to(x.dtype))
