"""Block sizes of the Triton kernels, as data: the first row that fits is used. No search at run time.

No row has been timed: they are the largest blocks with which five accumulators stay in registers and a program in shared
memory when the kernels are compiled ahead of time for sm_80, sm_90, sm_100 and gfx942.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

#: Segmented decode: (least compute capability, most bytes of one row of D values), block of keys, warps, stages.
DECODE = [
    ((0, 128), {"BLOCK_S": 64, "num_warps": 4, "num_stages": 3}),
    ((0, 256), {"BLOCK_S": 64, "num_warps": 8, "num_stages": 3}),
    ((0, 512), {"BLOCK_S": 32, "num_warps": 8, "num_stages": 3}),
    ((0, 1024), {"BLOCK_S": 16, "num_warps": 8, "num_stages": 2}),
]
#: Masked prefill and column sums: as above, with a block of rows. Rows and keys of a block are powers of two.
PREFILL = [
    ((9, 256), {"BLOCK_R": 128, "BLOCK_S": 64, "num_warps": 8, "num_stages": 3}),
    ((0, 128), {"BLOCK_R": 64, "BLOCK_S": 64, "num_warps": 4, "num_stages": 3}),
    ((0, 256), {"BLOCK_R": 64, "BLOCK_S": 64, "num_warps": 4, "num_stages": 2}),
    ((0, 512), {"BLOCK_R": 64, "BLOCK_S": 32, "num_warps": 8, "num_stages": 2}),
    ((0, 1024), {"BLOCK_R": 32, "BLOCK_S": 16, "num_warps": 4, "num_stages": 2}),
]
LEAST_KEYS = 128  # keys a chunk should hold, so that recombining it costs less than it saves
MOST_PARTS = 64


@cache
def _device(index: int) -> tuple[int, int]:
    """Compute capability and number of multiprocessors; of a CPU (Triton's interpreter) a small stand-in."""
    if index < 0:
        return 0, 2
    facts = torch.cuda.get_device_properties(index)
    # AMD's have another numbering and 64 KiB of shared memory: the most careful rows.
    return (0 if torch.version.hip else facts.major), facts.multi_processor_count


def device(tensor: Tensor) -> tuple[int, int]:
    """See :func:`_device`."""
    return _device(tensor.device.index or 0 if tensor.is_cuda else -1)


def row(table: list[tuple[tuple[int, int], dict[str, int]]], major: int, width: int) -> dict[str, int]:
    """A copy of the first row of a table for a compute capability and for rows of ``width`` bytes."""
    for (least, most), block in table:
        if major >= least and width <= most:
            return dict(block)
    raise ValueError(f"no block sizes for rows of {width} bytes: head dimensions up to 256 are supported")


def decode(query: Tensor, rows: int, dim: int) -> dict[str, Any]:
    """Blocks of the segmented kernel for ``rows`` rows per KV head."""
    width = max(16, 1 << (dim - 1).bit_length()) * query.element_size()
    block = row(DECODE, device(query)[0], width)
    # Every segment keeps an accumulator of BLOCK_R x D in registers: 32 rows only where D is small.
    block["BLOCK_R"] = 32 if rows > 16 and dim <= 64 else 16
    return block


def prefill(query: Tensor, dim: int) -> dict[str, Any]:
    """Blocks of the prefill kernel."""
    return row(PREFILL, device(query)[0], max(16, 1 << (dim - 1).bit_length()) * query.element_size())


def chunk(query: Tensor, key: Tensor, most: int = 0) -> int:
    """How many keys a program of the segmented kernel takes, a multiple of its block.

    Args:
        query: ``[B, H, Q, D]``.
        key: ``[B, G, S, D]``.
        most: number of chunks, at most; 0 = enough for two programs per multiprocessor.
    """
    batch, heads, rows, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    block = decode(query, heads // kv_heads * rows, dim)
    size = block["BLOCK_S"]
    if not most:
        programs = batch * kv_heads * -(-(heads // kv_heads * rows) // block["BLOCK_R"])
        most = parts(query, programs, length, size)
    return -(-length // (most * size)) * size


def probe(query: Tensor, rows: int, dim: int) -> dict[str, Any]:
    """Blocks of the probe kernels."""
    block = prefill(query, dim)
    block["BLOCK_R"] = min(64, max(16, 1 << (rows - 1).bit_length()))
    return block


def parts(query: Tensor, programs: int, length: int, size: int) -> int:
    """Number of chunks that gives every multiprocessor about two programs."""
    wanted = -(-2 * device(query)[1] // programs)
    return max(1, min(wanted, length // max(size, LEAST_KEYS), MOST_PARTS))
