# SPDX-License-Identifier: Apache-2.0
"""Two streams in one forward: while ``generate`` decodes, a second stream's rows ride in the same batch.

Decoding is bound by reading the weights, so a second stream costs little when it shares the forward of the first. Both
prompts run apart, each on a cache of its own. Before the first decode step the caches are joined: rows ``0 .. R-1`` are
``generate``'s, rows ``R .. 2R-1`` the second stream's. ``generate`` sees its own rows only: the rows are doubled before
the model's forward and taken apart after it, and the joined cache keeps the pairs together when beams are reordered. So
greedy decoding, sampling, beams, several returned sequences, streamers and stopping criteria are transformers' own.

Edits apply to the first half only, as they do when the second stream runs by itself. The streams run apart, in a forward
each, where a joined cache cannot work: compiled (static) and quantised caches, layers with a recurrent state, methods that
let columns of the cache go, prompt lookup. The logger ``vlm_attn`` says so at level INFO.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlm_attn import host

if TYPE_CHECKING:
    from vlm_attn.branch import Stream
    from vlm_attn.call import Call

LOGGER = logging.getLogger("vlm_attn")


@dataclass
class Pairing:
    """The second stream of a call, and whether it shares the forwards of the first.

    Attributes:
        stream: the second stream; its prompt has run once ``stream.first`` is there.
        cache: ``generate``'s cache, once it holds both.
        rows: R, rows of the first stream.
        pad: columns without meaning before those of the first stream, where the second prompt is the longer one.
        second: ``[R, n, V]`` the second stream's logits of the latest forward.
        running: whether a forward with both is running.
        refusal: why the streams run apart, in words; None = they do not, or it is not known yet.
    """

    stream: Stream
    cache: Any = None
    rows: int = 0
    pad: int = 0
    second: Tensor = field(default_factory=lambda: torch.empty(0))
    running: bool = False
    refusal: str | None = None
    _unpadded: bool = False  # whether the second prompt has no padding
    _read: int = 0  # decoded tokens that the latest forward's last row has read

    def before(self, call: Call, kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Arguments of the model's forward with the second stream's rows added; None where the streams run apart."""
        cache = host.cache_of(kwargs)
        if self.refusal is not None or self.stream.first is None or not call.done or torch.compiler.is_compiling():
            return None
        if self.cache is None and not self._join(call, cache, kwargs):
            return None
        if cache is not self.cache:
            return None
        new = kwargs["input_ids"].shape[1]
        decoded = cache.get_seq_length() - self.pad - self.stream.prompt
        self._read = decoded + new
        steps = torch.arange(decoded + 1, decoded + new + 1, device=self.stream.last.device)
        own = {
            "attention_mask": self._mask(kwargs.get("attention_mask"), decoded + new),
            "position_ids": torch.cat([kwargs["position_ids"], self.stream.last + steps], -2),
        }
        self.running = True
        return {**{name: self._twice(value) for name, value in kwargs.items() if name not in own}, **own}

    def after(self, output: Any) -> Any:
        """The first stream's part of a forward's output; the second stream's logits are kept."""
        self.running = False
        if output is None:  # the forward failed
            return None
        self.second = output.logits[self.rows :].float()
        for name, value in output.items():
            if isinstance(value, Tensor) and len(value) == 2 * self.rows:
                output[name] = value[: self.rows]
            elif isinstance(value, tuple) and all(isinstance(part, Tensor) for part in value):
                output[name] = tuple(part[: self.rows] if len(part) == 2 * self.rows else part for part in value)
        return output

    def logits(self, decoded: Tensor) -> Tensor:
        """``[R, V]`` of the second stream after ``decoded [R, n]`` tokens, the last of which was in the latest forward."""
        if not decoded.shape[1]:
            assert self.stream.first is not None
            return self.stream.first
        there = self.second.shape[1]
        place = decoded.shape[1] - self._read - 1
        if not -there <= place < 0:
            raise RuntimeError(
                f"the second stream shares the forwards of the first, and the latest ended with decoded token {self._read}, "
                f"not with {decoded.shape[1]}"
            )
        return self.second[:, place]

    def end(self) -> None:
        """Leave ``generate`` the cache it would have had."""
        if self.cache is not None:
            host.part_rows(self.cache, self.rows, self.pad)
            self.cache = None

    def _mask(self, given: Tensor | None, decoded: int) -> Tensor | None:
        """``[2R, columns]`` which columns of the joined cache are no padding, with ``decoded`` tokens; None = all of them."""
        second = nn.functional.pad(self.stream.mask, (0, decoded), value=1)
        total = self.stream.prompt + decoded
        if given is None and second.shape[1] == total and self._unpadded:
            return None
        mask = second.new_ones(self.rows, total) if given is None else given.to(second)
        width = max(total + self.pad, second.shape[1])
        return torch.cat([nn.functional.pad(part, (width - part.shape[1], 0)) for part in (mask, second)])

    def _twice(self, value: Any) -> Any:
        return torch.cat([value, value]) if isinstance(value, Tensor) and len(value) == self.rows else value

    def _join(self, call: Call, cache: Any, kwargs: Mapping[str, Any]) -> bool:
        """Put the second stream's cache below the first's, if that can work."""
        stream, ids = self.stream, kwargs.get("input_ids")
        decoded = host.cached_length(cache) - stream.prompt if cache is not None else 0
        known = stream.read.shape[1]
        why = None
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if ids is None or len(ids) != len(stream.read):
            why = "its rows are not those of the first stream"
        elif not (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)) or not isinstance(positions, Tensor):
            why = "the model's forward gets a mask for a compiled cache, or no positions"
        elif call.reduction is not None or stream.engine.chooser(call) is not None:
            why = "the first stream's cache lets columns go"
        elif decoded != known:
            why = "the second stream has read other tokens than the first"
        if why is None:
            joined = host.join_rows(cache, stream.cache)
            if isinstance(joined, str):
                why = joined
            else:
                self.pad, self.cache, self.rows = joined, cache, len(ids)  # type: ignore[arg-type]
                self._unpadded = bool((stream.mask != 0).all())
                return True
        self.refusal = why
        LOGGER.info("the second stream runs in a forward of its own: %s", why)
        return False
