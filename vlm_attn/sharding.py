# SPDX-License-Identifier: Apache-2.0
"""Heads of a layer that are spread over processes (tensor parallelism): what a method sees and says is about all of them.

Each process runs some heads of every layer. A method that chooses between heads or averages over them must see the
others', or its choice is another one than that of the whole model. What is exchanged is small: masses, the few rows that
are read, a mean over heads; never keys or values.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from vlm_attn.kernels import Edit, ScoreEdit


@dataclass(frozen=True)
class Heads:
    """The heads of an attention module that run in this process.

    Attributes:
        group: the processes that share the module, in the order of their heads; None = all heads run here.
    """

    group: Any = None

    def all(self, part: Tensor, dim: int = 1) -> Tensor:
        """The same numbers of all heads, along ``dim``."""
        if self.group is None:
            return part
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(distributed.get_world_size(self.group))]
        distributed.all_gather(parts, part, group=self.group)
        return torch.cat(parts, dim)

    def own(self, whole: Tensor, dim: int = 1) -> Tensor:
        """Of numbers of all heads, those of the heads that run here."""
        if self.group is None:
            return whole
        return whole.chunk(distributed.get_world_size(self.group), dim)[distributed.get_rank(self.group)]

    def edit(self, edit: Edit | ScoreEdit) -> Edit | ScoreEdit:
        """An edit whose policy (or mean over heads) sees all heads."""
        if self.group is None:
            return edit
        new = copy.copy(edit)
        if isinstance(new, Edit):
            policy = new.policy
            new.policy = lambda mass: self.own(policy(self.all(mass)))
        else:
            mean = new.head_mean
            new.head_mean = lambda size: mean(self.all(mean(size)))
        return new


def heads_of(module: nn.Module) -> Heads:
    """Which heads of an attention module run here, read off its output projection, whose inputs are what is split.

    Weights that are split by rows only (FSDP) are whole again when a layer runs.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return Heads()
    from torch.distributed.tensor import DTensor, Shard

    for weight in module.parameters():
        if isinstance(weight, DTensor) and weight.ndim == 2:
            for axis, placement in enumerate(weight.placements):
                if isinstance(placement, Shard) and placement.dim in (1, -1):
                    return Heads(weight.device_mesh.get_group(axis))
    return Heads()


def check_sharding(heads: int, shards: Mapping[int, Heads], tower: Sequence[Heads], processes: int) -> None:
    """Refuse tensor parallelism that cannot be seen through.

    Args:
        heads: number of query heads of a layer.
        shards: the heads of every layer that run here.
        tower: the same of the vision tower's modules that a method reads.
        processes: over how many of them the host says it has spread the model.

    Raises:
        NotImplementedError: heads that cannot be shared out evenly, a spread vision tower, weights that do not tell.
    """
    sizes = {distributed.get_world_size(shard.group) for shard in shards.values() if shard.group is not None}
    if any(heads % size for size in sizes):
        raise NotImplementedError(f"{heads} heads cannot be shared out evenly over {max(sizes)} processes")
    if any(shard.group is not None for shard in tower):
        raise NotImplementedError(
            "the method reads the vision tower's attention, whose heads are spread over processes: load the model with a "
            "tensor-parallel plan that leaves the tower whole"
        )
    if processes > 1 and not sizes:
        raise NotImplementedError(
            f"the model is spread over {processes} processes, but its attention weights do not say which heads are where "
            "(quantised shards do not): load it without tensor parallelism, or without quantisation"
        )
