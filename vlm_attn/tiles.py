# SPDX-License-Identifier: Apache-2.0
"""Images whose tokens form several runs: rows of patches, or tiles.

Special tokens separate the runs. What they are called is not known here; which of them ends an image follows from the token
after the last run of the prompt, or before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt

from torch import Tensor, nn

from vlm_attn.layout import Span

Order = tuple[int, ...] | None
Overview = tuple[int, tuple[int, int]] | None
# (runs of a row, its token ids) -> the runs of every image
Join = Callable[[Sequence[Span], Sequence[int]], list[list[Span]]]
# (runs of an image, token ids of the row, pixels of its tiles if known) -> grid, order of the tokens on it, overview
Tiled = Callable[[Sequence[Span], Sequence[int], Tensor | None], tuple[tuple[int, int], Order, Overview]]


def rows_of_one(runs: Sequence[Span], ids: Sequence[int]) -> list[list[Span]]:
    """Pixtral, Mistral 3: one run per row of patches, a break token after each but the last, an end token after that."""
    images: list[list[Span]] = []
    for run in runs:
        last = images[-1][-1][1] if images else None
        if last is not None and run[0] == last + 1 and ids[last] != ids[runs[-1][1] % len(ids)]:
            images[-1].append(run)
        else:
            images.append([run])
    return images


def rows_together(
    runs: Sequence[Span], ids: Sequence[int], pixels: Tensor | None = None
) -> tuple[tuple[int, int], Order, Overview]:
    """As many rows as there are runs."""
    widths = {stop - start for start, stop in runs}
    if len(widths) > 1:
        return (1, sum(stop - start for start, stop in runs)), None, None
    return (len(runs), widths.pop()), None, None


def tiles_of_one(runs: Sequence[Span], ids: Sequence[int]) -> list[list[Span]]:
    """Idefics 3, SmolVLM, Llama 4, Aya Vision: tiles, and the overview last, after a token that announces it."""
    images: list[list[Span]] = [[]]
    for run in runs:
        images[-1].append(run)
        if ids[run[0] - 1] == ids[runs[-1][0] - 1]:
            images.append([])
    return [image for image in images if image]


def tiles_together(
    runs: Sequence[Span], ids: Sequence[int], pixels: Tensor | None = None
) -> tuple[tuple[int, int], Order, Overview]:
    """The tiles side by side as they lie on the image, and the overview apart.

    A row of tiles ends where the two tokens between tiles have a line end with them (Idefics 3), or with the token before the
    overview's own (Llama 4).
    """
    *tiles, overview = runs
    size = tiles[0][1] - tiles[0][0]
    side = isqrt(size)
    end = ids[overview[0] - 2]
    gaps = [ids[a:b] for (_, a), (b, _) in zip(tiles, tiles[1:], strict=False)]
    ends = [place + 1 for place, gap in enumerate(gaps) if len(gap) > 2 or list(gap) == [end]]
    across = ends[0] if ends else len(tiles)
    total = sum(stop - start for start, stop in runs)
    if side * side != size or len(tiles) % across or any(stop - start != size for start, stop in runs):
        return (1, total), None, None
    return _shape(len(tiles), across, side), _order(len(tiles), across, side), (len(tiles) * size, (side, side))


def _shape(tiles: int, across: int, side: int) -> tuple[int, int]:
    return tiles // across * side, across * side


def _order(tiles: int, across: int, side: int) -> tuple[int, ...]:
    """Tokens of tiles, tile by tile, in the order of the whole image's cells."""
    height, width = _shape(tiles, across, side)
    return tuple(
        (row // side * across + column // side) * side * side + row % side * side + column % side
        for row in range(height)
        for column in range(width)
    )


def tiles_by_pixels(
    runs: Sequence[Span], ids: Sequence[int], pixels: Tensor | None = None
) -> tuple[tuple[int, int], Order, Overview]:
    """Aya Vision: tiles are numbered, and how many are side by side is not said: the arrangement that looks most like the
    overview is taken. The overview is the image where none does."""
    *tiles, overview = runs
    size, total = overview[1] - overview[0], sum(stop - start for start, stop in runs)
    side = isqrt(size)
    if side * side != size or any(stop - start != size for start, stop in tiles):
        return (1, total), None, None
    across = 0 if pixels is None or len(pixels) != len(runs) else tiles_across(pixels[:-1], pixels[-1])
    if across:
        return _shape(len(tiles), across, side), _order(len(tiles), across, side), (total - size, (side, side))
    return (side, side), tuple(range(total - size, total)), (total - size, (side, side))


def tiles_across(tiles: Tensor, overview: Tensor) -> int:
    """How many tiles are side by side, from what they show.

    Args:
        tiles: ``[n, 3, s, s]`` pixel values of the tiles, row by row.
        overview: ``[3, s, s]`` of the whole image.

    Returns:
        0 where two arrangements look alike, as in an image of one colour.
    """
    count, colours, s, _ = tiles.shape
    errors = {}
    for across in (n for n in range(1, count + 1) if count % n == 0):
        whole = tiles.view(count // across, across, colours, s, s).permute(2, 0, 3, 1, 4)
        small = nn.functional.adaptive_avg_pool2d(whole.reshape(colours, count // across * s, across * s).float(), s)
        errors[float((small - overview).square().mean())] = across
    best, *rest = sorted(errors)
    return errors[best] if len(errors) == 1 == count or (rest and best < 0.5 * rest[0]) else 0
