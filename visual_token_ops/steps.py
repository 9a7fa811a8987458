# SPDX-License-Identifier: Apache-2.0
"""Visual tokens that go while a masked-diffusion model denoises (study: arXiv 2511.15098, CVPR 2026 Findings).

Later steps have more written words to lean on, so they can do with less of the image. Both methods act on the steps of
``vlm_attn.diffusion.generate`` only. What they mean hangs on its cache: without one every step runs the whole prompt
again, and the text of the prompt does without the tokens as well; where the prompt has run once and for all, its keys and
values stay, and the columns that go are taken out of the cache, which costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vlm_attn import registry
from vlm_attn.call import Call
from vlm_attn.method import Wide, check_range
from vlm_attn.reduction import Picture, Reducer, kept_count


@dataclass(frozen=True, kw_only=True)
class _Timed(Reducer):
    """Attributes as in :class:`LateStep`."""

    timed: ClassVar[bool] = True

    reducer: str = "divprune"

    @property
    def inner(self) -> Any:
        """The reducer that chooses."""
        return registry.build(self.reducer, keep=self.keep) if isinstance(self.reducer, str) else None

    def check(self) -> None:
        """Check ``keep``, and that the reducer needs neither attention nor the states of others.

        Raises:
            ValueError: another kind of reducer.
        """
        super().check()
        inner = self.inner
        fits = isinstance(inner, Reducer) and not inner.timed and inner.stages == (0,)
        if not fits or type(inner).merge is not Reducer.merge:
            raise ValueError(
                f"{self.name}: reducer={self.reducer!r}: it takes one that chooses before the language model and merges "
                "nothing, such as divprune, holov or random"
            )

    @property
    def cls_layers(self) -> tuple[int | Wide, ...]:  # type: ignore[override]
        """Those of the reducer."""
        return self.inner.cls_layers

    def start(self, call: Call, processor: Any) -> None:
        """Refuse what has no steps."""
        if not call.canvas:
            raise ValueError(
                f"{self.name} acts on denoising steps: use it with vlm_attn.diffusion.generate, or patch with "
                f"{self.reducer!r} itself"
            )
        if sum(isinstance(m, _Timed) for m in call.methods) > 1:
            raise ValueError("late_step and progressive both say what is left at a step: choose one")
        super().start(call, processor)

    def choose(self, picture: Picture) -> Tensor:
        """What the reducer chooses."""
        return self.inner.choose(picture)


@dataclass(frozen=True, kw_only=True)
class LateStep(_Timed):
    """Prune from a later denoising step on.

    Overview:
        in short: what another of these chooses, from a step on (masked-diffusion models)
        keeps: what `reducer` chooses (`divprune`)
        where: from the share `start_at` of the denoising steps on
        needs: `vlm_attn.diffusion`

    Equation:
        left(s) = n while s < start_at S, then keep n             s of S denoising steps

    Attributes:
        start_at: share of the steps that run with the whole image; 0 = prune from the first step on.
        keep: what stays afterwards.
        reducer: name of the reducer that chooses.

    Short answers gain nothing, says the study: they are written in the first steps.
    """

    name: ClassVar[str] = "late_step"
    paper: ClassVar[str] = "visual redundancy in diffusion MLLMs, arXiv 2511.15098, table 3"

    keep: float | int = 0.25
    start_at: float = 0.5

    def check(self) -> None:
        """Check the share as well."""
        super().check()
        check_range(self, "start_at", 0, 1)

    def left_at(self, stage: int, total: int, progress: float) -> int:
        """All, then ``keep``."""
        return total if progress < self.start_at else kept_count(self.keep, total)


@dataclass(frozen=True, kw_only=True)
class Progressive(_Timed):
    """Prune more with every denoising step: the share that stays falls linearly from 1 to ``keep``.

    Recommended by the study. A ``keep`` that is a number means the same share.

    Overview:
        in short: what another of these chooses, fewer at every step (masked-diffusion models)
        keeps: what `reducer` chooses, fewer with every denoising step
        where: while denoising
        needs: `vlm_attn.diffusion`

    Equation:
        left(s) = (1 - (1 - keep) s / S) n                        s of S denoising steps

    Attributes:
        keep: what would be left after the last step.
        reducer: name of the reducer that chooses.

    No figures were published.
    """

    name: ClassVar[str] = "progressive"
    paper: ClassVar[str] = "recommended in arXiv 2511.15098"

    keep: float | int = 0.25

    def left_at(self, stage: int, total: int, progress: float) -> int:
        """A line from ``total`` to ``keep``."""
        return round(total - (total - kept_count(self.keep, total)) * progress)
