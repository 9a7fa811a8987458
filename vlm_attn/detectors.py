# SPDX-License-Identifier: Apache-2.0
"""Which tokens are sinks: two detectors behind one interface.

A sink draws attention without meaning. It shows in the residual stream: by a few massive dimensions (VAR, arXiv 2503.03321), or
by pointing where the first token points (secondary sinks, arXiv 2512.22213), which needs no list of dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

CANDIDATES = 3  # positions that may hold the first token: 2 in plain text, 3 with a chat template
EPS = 1e-6  # beside the mean square, as the released code of VAR has it


class SinkDetector(Protocol):
    """Finds sinks from a few numbers per token and layer."""

    def read(self, hidden: Tensor, first: Tensor) -> Tensor:
        """What it wants to know of states ``[B, P, D]``, with ``[B]`` the first token's column: ``[B, P, n]`` float32."""

    def find(self, states: Tensor, first: Tensor) -> Tensor:
        """From ``[L + 1, B, P, n]``, what :meth:`read` gave of every layer's input and of the last one's output, to flags
        ``[L + 1, B, P]``."""


@dataclass(frozen=True)
class ByDimension:
    """A token is a sink of a layer where one of some dimensions of the layer's input exceeds ``tau`` times the token's RMS.

    Attributes:
        dims: the dimensions, which belong to a checkpoint.
        tau: how many times.
    """

    dims: tuple[int, ...]
    tau: float = 20.0

    def read(self, hidden: Tensor, first: Tensor) -> Tensor:
        """``max_d |x_d| / RMS(x)``."""
        return massive(hidden, self.dims)[..., None]

    def find(self, states: Tensor, first: Tensor) -> Tensor:
        """Every layer by itself."""
        return (states[..., 0] >= self.tau) & real(states, first)


@dataclass(frozen=True)
class ByDirection:
    """A token is a sink of a layer where the cosine of its state with the first token's is above ``cosine``, either way.

    The first token is the one of the ``candidates`` first with the largest mean norm. It counts from behind the layer in which
    its norm rises most to the layer in which it then falls most; the embedding, layer 0's input, is only where it may rise from
    (the paper leaves it out altogether).

    Attributes:
        cosine: the threshold.
        candidates: positions that may hold the first token.
    """

    cosine: float = 0.9
    candidates: int = CANDIDATES

    def read(self, hidden: Tensor, first: Tensor) -> Tensor:
        """Cosine with each candidate, then the norm."""
        hidden = hidden.float()
        places = (first[:, None] + torch.arange(self.candidates, device=first.device)).clamp_max(hidden.shape[1] - 1)
        norm = hidden.norm(dim=-1, keepdim=True)
        unit = hidden / norm.clamp_min(1e-12)
        heads = unit.gather(1, places[..., None].expand(-1, -1, hidden.shape[2]))
        return torch.cat([unit @ heads.transpose(1, 2), norm], -1)

    def find(self, states: Tensor, first: Tensor) -> Tensor:
        """In the band, tokens from the first one on."""
        found = torch.zeros(states.shape[:3], dtype=torch.bool, device=states.device)
        columns = torch.arange(states.shape[2], device=states.device)
        for row, start in enumerate(first.tolist()):
            norms = states[:, row, start : start + self.candidates, -1]  # [L + 1, candidates]
            head = int(norms[1:].mean(0).argmax())
            begin, end = band(norms[:, head])
            found[begin:end, row] = (states[begin:end, row, :, head].abs() > self.cosine) & (columns >= start + head)
        return found


def massive(hidden: Tensor, dims: Sequence[int]) -> Tensor:
    """``max_d |x_d| / RMS(x)`` of states ``[..., D]`` over some dimensions (VAR, step 1): ``[...]`` float32."""
    hidden = hidden.float()
    return hidden[..., list(dims)].abs().amax(-1) / (hidden.square().mean(-1) + EPS).sqrt()


def band(norms: Tensor) -> tuple[int, int]:
    """Where the first token is a sink, half open, by its norms ``[L + 1]``: from behind the largest rise to behind the largest
    fall after it."""
    change = norms.diff()
    if not len(change):
        return 0, len(norms)
    begin = 1 + int(change.argmax())
    return begin, begin + 1 + int(change[begin:].argmin()) if begin < len(change) else len(norms)


def real(states: Tensor, first: Tensor) -> Tensor:
    """``[B, P]`` tokens that are no padding."""
    return torch.arange(states.shape[2], device=states.device) >= first.to(states.device)[:, None]


def layer_states(layers: Sequence[Any], detector: SinkDetector, first: Tensor, run: Callable[[], Any]) -> Tensor:
    """What a detector reads of every layer's input and of the last one's output while ``run()`` runs the model.

    Returns:
        ``[L + 1, B, P, n]``.
    """
    read: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read.append(detector.read(args[0] if args else kwargs["hidden_states"], first))

    def behind(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        read.append(detector.read(output[0] if isinstance(output, tuple) else output, first))

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(behind))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([values.to(first.device) for values in read])
