# SPDX-License-Identifier: Apache-2.0
"""Block sizes of the Triton kernels, as data: the first row that fits is used. No search at run time.

Rows for compute capability 9 and 256 bytes (half precision, D 128) are the fastest of ten or six on an H200. The others have
not been timed: they are the largest blocks that stay in registers and in shared memory when the kernels are compiled ahead
of time for sm_80, sm_90, sm_100, sm_120 and gfx942.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

#: Segmented decode: (least compute capability, most bytes of one row of D values, most rows): block of keys, warps, stages,
#: and how many programs a multiprocessor holds at once. A row of a program is a segment of a head's query row; more rows than
#: the last number take several programs.
DECODE = [
    ((9, 256, 16), {"BLOCK_S": 64, "num_warps": 4, "num_stages": 3}, 3),
    ((9, 256, 32), {"BLOCK_S": 64, "num_warps": 4, "num_stages": 3}, 2),
    ((9, 256, 64), {"BLOCK_S": 32, "num_warps": 4, "num_stages": 3}, 2),
    ((0, 128, 64), {"BLOCK_S": 64, "num_warps": 4, "num_stages": 3}, 2),
    ((0, 256, 32), {"BLOCK_S": 32, "num_warps": 4, "num_stages": 3}, 2),
    ((0, 512, 16), {"BLOCK_S": 32, "num_warps": 4, "num_stages": 2}, 2),
    ((0, 1024, 16), {"BLOCK_S": 16, "num_warps": 4, "num_stages": 2}, 2),
]
#: Masked prefill and column sums: as above, with a block of rows. Rows and keys of a block are powers of two.
PREFILL = [
    # Less shared memory than 9 and 10 have.
    ((12, 256), {"BLOCK_R": 64, "BLOCK_S": 64, "num_warps": 4, "num_stages": 2}),
    ((9, 256), {"BLOCK_R": 64, "BLOCK_S": 64, "num_warps": 4, "num_stages": 3}),
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


def fitting(table: Sequence[Any], major: int, width: int) -> list[Any]:
    """The rows of a table for a compute capability and the narrowest rows that hold ``width`` bytes, in its order."""
    fits = [row for row in table if major >= row[0][0] and width <= row[0][1]]
    if not fits:
        raise ValueError(f"no block sizes for rows of {width} bytes: head dimensions up to 256 are supported")
    return [row for row in fits if row[0][:2] == fits[0][0][:2]]


def width(query: Tensor, dim: int) -> int:
    """Bytes of one row of D values, filled up to a power of two."""
    return max(16, 1 << (dim - 1).bit_length()) * query.element_size()


@cache
def _decode(major: int, width: int, rows: int) -> tuple[dict[str, int], int]:
    fits = fitting(DECODE, major, width)
    # Those that take all rows at once, else as many as any takes.
    (*_, most), block, resident = next((row for row in fits if rows <= row[0][2]), fits[-1])
    return {**block, "BLOCK_R": min(most, max(16, 1 << (rows - 1).bit_length()))}, resident


def decode(query: Tensor, rows: int, dim: int) -> tuple[dict[str, int], int]:
    """Blocks of the segmented kernel for ``rows`` rows per KV head, those of every segment, and how many programs a
    multiprocessor holds."""
    return _decode(device(query)[0], width(query, dim), int(rows))


def prefill(query: Tensor, dim: int, numbers: bool = False) -> dict[str, Any]:
    """Blocks of the prefill kernel; ``numbers``: it also loads log weights or memberships of the keys."""
    block = dict(fitting(PREFILL, device(query)[0], width(query, dim))[0][1])
    if numbers:  # a third stage would leave room for one program per multiprocessor instead of two
        block["num_stages"] = 2
    return block


def chunk(query: Tensor, key: Tensor, count: int, most: int = 0) -> int:
    """How many keys a program of the segmented kernel takes, a multiple of its block.

    Args:
        query: ``[B, H, Q, D]``.
        key: ``[B, G, S, D]``.
        count: number of segments that are stored.
        most: number of chunks, at most; 0 = see :func:`parts`.
    """
    batch, heads, rows, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    lines = count * heads // kv_heads * rows
    block, resident = decode(query, lines, dim)
    size = block["BLOCK_S"]
    if not most:
        programs = batch * kv_heads * -(-lines // block["BLOCK_R"])
        most = parts(query, programs, length, size, resident)
    return -(-length // (most * size)) * size


def probe(query: Tensor, rows: int, dim: int) -> dict[str, Any]:
    """Blocks of the probe kernels."""
    block = prefill(query, dim)
    block["BLOCK_R"] = min(64, max(16, 1 << (rows - 1).bit_length()))
    return block


def parts(query: Tensor, programs: int, length: int, size: int, resident: int = 2) -> int:
    """Number of chunks with which ``programs`` times as many programs fill the device once, or nearly so a few times."""
    slots = resident * device(query)[1]
    most = max(1, min(length // max(size, LEAST_KEYS), MOST_PARTS))
    for turns in range(1, 5):
        count = turns * slots // programs
        if count and count * programs >= 0.9 * turns * slots:
            return min(count, most)
    return min(max(1, slots // programs), most)
