# SPDX-License-Identifier: Apache-2.0
"""VAR: visual attention redistribution ("See what you are told: visual attention sink", arXiv 2503.03321, ICLR 2025).

A few tokens, the sinks, draw attention without meaning. In heads that look at the image, part of what the sinks draw
is given to the other image tokens, in proportion to what these already get.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vlm_attn.branch import Run, look
from vlm_attn.call import Call
from vlm_attn.detectors import ByDirection, layer_states, massive
from vlm_attn.kernels import Edit, one_hot_segments
from vlm_attn.method import (
    Method,
    ModelFacts,
    check_choice,
    check_flag,
    check_layers,
    check_range,
    layer_tuple,
    unknown_turn,
)

OTHER, VISUAL, TEXT_SINK, VISUAL_SINK = range(4)  # segments; VISUAL without its sinks
TINY = 1e-20  # a head must look at more than sinks for their share to have somewhere to go


@dataclass(frozen=True, kw_only=True)
class Var(Method):
    """Take attention from the sinks and give it to the rest of the image.

    Overview:
        in short: takes attention from sink tokens (found by massive dimensions or by direction), gives it to the image
        what it does: takes attention from sink tokens and gives it to the rest of the image, in heads that look at the
            image
        edits: text rows behind the image, all layers but the last
        needs: the sink dimensions of the language model

    Equation:
        sink(j) = max_d |x_j[d]| / RMS(x_j) >= tau                x_j what goes into the layer, d in sink_dims
        V, N    = A on the image, A on the image without its sinks
        open    = V >= visual_floor  and  N >= rho V              per row and head
        A'[j]   = (1 - p) A[j]                                    j a sink, in the text or the image, where open
        A'[j]   = (1 + p A(sinks) / N) A[j]                       j in the image and no sink, where open

    Attributes:
        detector: ``"dimension"``, the paper's sinks; or ``"direction"``: ``|cos(x_j, x_first)| > cosine`` between the layers
            where the first token's norm rises and falls most (arXiv 2512.22213), which needs no ``sink_dims``. It costs one
            plain forward of the prompt beside it, whose sinks they are.
        sink_dims: hidden dimensions in which sinks are massive; None = from the preset.
        tau: a token is a sink where one of them exceeds ``tau`` times the token's RMS. Range (0, 1000].
        rho: a head is image-centric where at least this share of its visual attention is on non-sinks. Range 0..1.
        p: share of the sinks' attention that is moved. Range 0..1.
        visual_floor: ... and where it gives the image at least this much in all. Range 0..1.
        code_parity: do what the released code does instead of the paper: ``p`` is the share that *stays*, ``rho``
            bounds the sinks' share from above, ``> tau``, layers 0 and 1 untouched, the last layer edited (its exclusion
            never takes effect), a layer without a visual sink left alone. Not imitated, but published numbers hang on it: its
            sinks are those of the first question of a run, since the table that holds them is never reset.
        layers: layers to edit; empty = all but the last (with ``code_parity``: all but the first two).
        cosine: of the direction detector. Range 0..1.

    Paper form: all text rows from the image on, all layers but the last. Sinks are looked for among the prompt's
    tokens, as the released code does (the paper: the whole sequence), so beams need no state of their own.
    """

    name: ClassVar[str] = "var"
    paper: ClassVar[str] = "VAR, arXiv 2503.03321"
    edited_rows: ClassVar[Literal["last", "text"]] = "text"
    read_hidden: ClassVar[bool] = True

    sink_dims: tuple[int, ...] | None = None
    tau: float = 20.0
    rho: float = 0.5
    p: float = 0.6
    visual_floor: float = 0.2
    code_parity: bool = False
    layers: tuple[int, ...] = ()
    detector: Literal["dimension", "direction"] = "dimension"
    cosine: float = 0.9

    def __post_init__(self) -> None:
        check_choice(self, "detector", ("dimension", "direction"))
        if self.detector == "direction":  # no dimensions, and nothing to read while the prompt runs
            object.__setattr__(self, "sink_dims", ())
            object.__setattr__(self, "read_hidden", False)
        layer_tuple(self, "sink_dims", empty=self.detector == "direction")
        check_range(self, "cosine", 0, 1)
        check_range(self, "tau", 0, 1000, open_low=True)
        for field in ("rho", "p", "visual_floor"):
            check_range(self, field, 0, 1)
        check_flag(self, "code_parity")
        if self.layers:
            layer_tuple(self, "layers")

    @property
    def moved(self) -> float:
        """Share of the sinks' attention that is moved, in the paper's orientation."""
        return 1 - self.p if self.code_parity else self.p

    @property
    def neutral(self) -> bool:
        """Nothing is moved."""
        return self.moved == 0

    def bind(self, facts: ModelFacts) -> Var:
        """Check dimensions and layers; without ``layers``, the paper's (or the code's) are used."""
        bad = [d for d in self.sink_dims or () if not 0 <= d < facts.hidden]
        if bad:
            raise ValueError(
                f"var: sink_dims={self.sink_dims} names dimension {bad[0]}, the hidden size is {facts.hidden}"
            )
        check_layers(self, "layers", self.layers, facts)
        default = range(2, facts.layers) if self.code_parity else range(facts.layers - 1)
        return replace(self, layers=self.layers or tuple(default))

    def start(self, call: Call, processor: Any) -> None:
        """Sinks among columns that are already cached must be known from the call that cached them; those of text alone can be
        looked up."""
        if call.image_in_cache and (call.earlier is None or self not in call.earlier.patched):
            raise unknown_turn(self, "its sink tokens are")

    def read_tokens(self, hidden: Tensor) -> Tensor:
        """Step 1: ``max_d |x_d| / RMS(x) >= tau`` on a block's input ``[B, Q, D]``."""
        value = massive(hidden, self.sink_dims or ())
        return value > self.tau if self.code_parity else value >= self.tau

    def rehearse(self, run: Run) -> None:
        """The direction detector needs every layer to know where the first token is a sink: a plain forward of the prompt."""
        call, memory = run.call, run.call.memory(self)
        patched = call.earlier is not None and self in call.earlier.patched
        if self.detector == "dimension":
            if call.first and not patched:
                self.look_up(run)
            return
        if call.first and patched and "sinks" in call.earlier.memory(self):  # type: ignore[union-attr]
            # a later turn keeps the sinks of the first
            known = call.earlier.memory(self)["sinks"][..., : call.first]  # type: ignore[union-attr]
            memory["sinks"] = torch.nn.functional.pad(known, (0, call.prompt.length - known.shape[2]))
            return
        first = call.prompt.first
        find = ByDirection(cosine=self.cosine)
        layers: Any = run.engine.text_model.layers
        memory["sinks"] = find.find(layer_states(layers, find, first, lambda: look(run, run.inputs)), first)

    def look_up(self, run: Run) -> None:
        """Read the text that the plain model has put into the cache, where no image stands, once more."""
        call, layers = run.call, run.engine.text_model.layers
        handles = [
            layer.register_forward_pre_hook(partial(self._read, call, number), with_kwargs=True)  # type: ignore[union-attr]
            for number, layer in enumerate(layers)  # type: ignore[arg-type]
        ]
        run.engine.handles += handles
        try:
            look(run, run.inputs)
        finally:
            for handle in handles:
                run.engine.handles.remove(handle)
                handle.remove()

    def _read(self, call: Call, layer: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        call.store_tokens(self, layer, self.read_tokens(hidden), at=0)

    def sinks(self, call: Call, layer: int) -> Tensor | None:
        """``[B, P]`` which of the prompt's columns are sinks of a layer; None where it has not run."""
        if self.detector == "dimension":
            return call.tokens(self, layer)
        found = call.memory(self)["sinks"][layer]
        return found.repeat_interleave(call.batch // len(found), 0)

    def edit(self, call: Call, layer: int) -> Edit | None:
        """Step 2: which keys of this layer are sinks."""
        sink = self.sinks(call, layer)
        if layer not in self.layers or sink is None:
            return None
        visual = call.layout.visual
        ids = VISUAL * (visual & ~sink) + TEXT_SINK * (~visual & sink) + VISUAL_SINK * (visual & sink)
        return Edit(one_hot_segments(ids, 4), self.reweigh, conserves=True, partition=4)

    def reweigh(self, mass: Tensor) -> Tensor:
        """Steps 3-4: ``[B, H, Q, 4]`` masses to weights; the row keeps its total."""
        _, visual, text_sink, visual_sink = mass.unbind(-1)
        seen = visual + visual_sink
        image_centric = seen >= max(self.visual_floor, TINY)
        if self.code_parity:
            image_centric &= (visual_sink <= self.rho * seen) & (visual_sink.sum(1, keepdim=True) > 0) & (visual > 0)
        else:
            image_centric &= visual >= max(self.rho, TINY) * seen
        share = self.moved * image_centric
        keep, gain = 1 - share, 1 + share * (text_sink + visual_sink) / visual.clamp_min(TINY)
        return torch.stack([torch.ones_like(seen), gain, keep, keep], -1)
