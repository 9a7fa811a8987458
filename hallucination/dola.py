# SPDX-License-Identifier: Apache-2.0
"""DoLa: decoding by contrasting layers (arXiv 2309.03883, ICLR 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vlm_attn.branch import Contrast, Decoding, Run, plausible, with_processor
from vlm_attn.method import ModelFacts, check_flag, check_layers, check_range, layer_tuple


@dataclass(frozen=True, kw_only=True)
class Dola(Decoding):
    """Contrast with what an early layer would say.

    Of some early layers, each step and each row takes the one whose distribution is farthest from the model's.

    Overview:
        in short: contrasts with what an early layer would say
        contrasts the next token with: what an early layer would say, the one that differs most
        formula: `log p - log p_early`

    Equation:
        p_e = the p_j, j in layers, with the largest JSD(p, p_j)  JSD: Jensen-Shannon divergence
        log p - log p_e                                           only tokens with p >= beta max p

    Attributes:
        layers: early layers to choose from, by what goes into them (0 = the embeddings); ``"low"`` = every second one of the
            first half, ``"high"`` = of the second half. With tied embeddings ``"low"`` begins at 2, because layer 0 would only
            repeat the last token.
        beta: a token must be at least this share of the likeliest one's probability. Range 0..1; 0 = no cut.
        code_parity: choose as the released code does, whose divergence has its arguments the other way round: with
            ``m = (p + p_j) / 2``, ``(KL(m, p) + KL(m, p_j)) / 2`` in place of the paper's JSD, ``(KL(p, m) + KL(p_j, m)) / 2``.

    The model's head reads early states as they are, without the final norm, as the released code does. That code also uses
    ``repetition_penalty=1.2``, an option of ``generate``, which is applied before the contrast here. Deviation: the layer is
    chosen per row. Cost: the head once for every candidate layer. There are no neutral values.
    """

    name: ClassVar[str] = "dola"
    paper: ClassVar[str] = "DoLa, arXiv 2309.03883"
    needs_image: ClassVar[bool] = False

    layers: Literal["low", "high"] | tuple[int, ...] = "low"
    beta: float = 0.1
    code_parity: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.layers, str) and self.layers not in ("low", "high"):
            raise ValueError(f'dola: layers={self.layers!r} is neither "low" nor "high" nor a tuple of layers')
        if not isinstance(self.layers, str):
            layer_tuple(self, "layers")
        check_range(self, "beta", 0, 1)
        check_flag(self, "code_parity")

    def bind(self, facts: ModelFacts) -> Dola:
        """Check the layers against the model."""
        if not isinstance(self.layers, str):
            check_layers(self, "layers", self.layers, facts)
        return self

    def refuse(self, run: Run) -> None:
        """Guesses are checked several at a time: which row of the layers is meant is not known."""
        super().refuse(run)
        if run.option("prompt_lookup_num_tokens"):
            raise NotImplementedError("dola does not work with prompt lookup: leave out prompt_lookup_num_tokens=")

    def candidates(self, run: Run) -> list[int]:
        """The early layers of a model."""
        if not isinstance(self.layers, str):
            return list(self.layers)
        count = len(run.engine.text_model.layers)  # type: ignore[arg-type]
        if self.layers == "high":
            return list(range(count // 2, count, 2))
        tied = run.model.get_output_embeddings().weight is run.model.get_input_embeddings().weight
        return list(range(2 if tied else 0, count // 2, 2)) or [0]

    @contextmanager
    def decoding(self, run: Run) -> Iterator[dict[str, Any]]:
        """Keep the last row of what goes into the early layers, and contrast with it."""
        self.refuse(run)
        head, states = run.model.get_output_embeddings(), dict.fromkeys(self.candidates(run), torch.empty(0))

        def keep(layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if run.call.mode != "other":
                states[layer] = (args[0] if args else kwargs["hidden_states"])[:, -1]

        def contrast(ids: Tensor, main: Tensor) -> Tensor:
            early = torch.stack([head(state.to(head.weight.device)) for state in states.values()])
            return self.combine(main, early.to(main))

        layers: Any = run.engine.text_model.layers
        hooks = [layers[n].register_forward_pre_hook(partial(keep, n), with_kwargs=True) for n in states]
        try:
            yield with_processor(run, Contrast(contrast))
        finally:
            for hook in hooks:
                hook.remove()

    def combine(self, main: Tensor, early: Tensor) -> Tensor:
        """Logits ``[R, V]`` and those of the candidates ``[J, R, V]`` to the contrast (equations 1 to 3)."""
        main, early = main.log_softmax(-1), early.log_softmax(-1)
        farthest = divergence(main, early, reverse=self.code_parity).argmax(0)
        return plausible(main - early[farthest, torch.arange(len(main), device=main.device)], main, self.beta)


def divergence(p: Tensor, q: Tensor, *, reverse: bool = False) -> Tensor:
    """Jensen-Shannon divergence of log probabilities ``[R, V]`` and ``[J, R, V]``: ``[J, R]``.

    Args:
        p: ``[R, V]``.
        q: ``[J, R, V]``.
        reverse: the mean of both divergences *from* the middle instead of *to* it.
    """
    p, q = p.exp().expand_as(q), q.exp()
    middle, tiny = (p + q) / 2, torch.finfo(p.dtype).tiny
    if reverse:
        return (torch.xlogy(middle, middle / p.clamp_min(tiny)) + torch.xlogy(middle, middle / q.clamp_min(tiny))).sum(
            -1
        ) / 2
    middle = middle.clamp_min(tiny)
    return (torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)).sum(-1) / 2
