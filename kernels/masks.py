# SPDX-License-Identifier: Apache-2.0
"""Who may attend to whom: masks over token groups and columns, defined once for every backend.

A mask is an OR of clauses, a clause an AND of tests of the group, column and image of row and key. Because a mask is such a
value and no closure, the same one fills a matrix here, is compiled into a kernel, and draws itself.

With ``i`` the row's column and ``j`` the key's (whatever the mask, a padded key is hidden from every row, and so is a key of
another document, where several prompts are packed into one row):

==================================  ==============================================================================
``causal``                          ``j <= i``
``modality_mutual`` (MMA)           ``j <= i`` or (``i`` VISUAL and ``j`` QUERY); AKI, arXiv 2503.02597
``generalised_modality_mutual``     ``j <= i`` or, within the prompt, one of both VISUAL and the other text; ibid.
``croc``                            ``j <= i`` or both VISUAL; Croc as described, arXiv 2410.14332
``vision_block``                    ``j <= i`` or both of one image; as Gemma 3 does
``prefix_lm``                       ``j <= i`` or ``j`` in the prompt; as PaliGemma does
``prefix_diffusion``                ``j`` in the prompt or ``i`` not in it; LaViDa's prefix cache
``full``                            everything; MoCa, arXiv 2506.23115
``sliding(window)``                 ``i - j < window``: to be combined with ``and_``
==================================  ==============================================================================

Models that were trained with a causal mask have not seen the others: using one on them is an experiment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from vlm_attn.kernels.groups import Group

GROUPS = len(Group)
PROMPT = tuple(group for group in Group if group not in (Group.GENERATED, Group.PAD))
TEXT = (Group.SYSTEM, Group.QUERY, Group.ROLE)


class Tokens(NamedTuple):
    """What a test may look at, on either side of the attention matrix: integer tensors that broadcast."""

    column: Tensor
    group: Tensor
    image: Tensor  # index of the image, -1 for text
    document: Tensor | None = None  # number of the prompt, where several are packed into one row


EVERY_PAIR = (1 << GROUPS * GROUPS) - 1


class Clause(NamedTuple):
    """Tests of a row and a key that must all hold; the defaults let everything through."""

    causal: bool = False  # the key's column is not later than the row's
    window: int = 0  # ... and lies less than so many columns before it; 0 = anywhere
    pairs: int = EVERY_PAIR  # bit GROUPS * i + j: a row of group i sees a key of group j
    same_image: bool = False  # both belong to one image

    def __call__(self, q: Tokens, k: Tokens) -> Tensor:
        """Whether the tests hold, bool of the shape the two broadcast to."""
        seen = ((self.pairs >> (GROUPS * q.group.long() + k.group.long())) & 1) == 1
        if self.causal:
            seen = seen & (k.column <= q.column)
        if self.window:
            seen = seen & (q.column - k.column < self.window)
        if self.same_image:
            seen = seen & (q.image == k.image) & (q.image >= 0)
        return seen

    def __and__(self, other: Clause) -> Clause:
        windows = [window for window in (self.window, other.window) if window]
        return Clause(
            self.causal or other.causal,
            min(windows, default=0),
            self.pairs & other.pairs,
            self.same_image or other.same_image,
        )


@dataclass(frozen=True)
class Mask:
    """A mask. Combine two with ``|`` and ``&`` (or :func:`or_`, :func:`and_`).

    Attributes:
        clauses: a key is visible where any of them holds.
        name: for messages and pictures; two masks that differ in the name only are equal.
    """

    clauses: tuple[Clause, ...]
    name: str = field(default="mask", compare=False)

    def __call__(self, q: Tokens, k: Tokens) -> Tensor:
        """Visible or not, bool of the shape the two broadcast to."""
        return reduce(torch.Tensor.__or__, [clause(q, k) for clause in self.clauses])

    def __or__(self, other: Mask) -> Mask:
        # A clause that only differs in its pairs from another one joins it.
        joined: dict[Clause, int] = {}
        for clause in self.clauses + other.clauses:
            rest = clause._replace(pairs=0)
            joined[rest] = joined.get(rest, 0) | clause.pairs
        clauses = tuple(rest._replace(pairs=pairs) for rest, pairs in joined.items())
        return Mask(clauses, f"({self.name} or {other.name})")

    def __and__(self, other: Mask) -> Mask:
        clauses = tuple(dict.fromkeys(a & b for a in self.clauses for b in other.clauses))
        return Mask(clauses, f"({self.name} and {other.name})")


def or_(*masks: Mask) -> Mask:
    """Visible in any of them."""
    return reduce(Mask.__or__, masks)


def and_(*masks: Mask) -> Mask:
    """Visible in all of them."""
    return reduce(Mask.__and__, masks)


def pairs(rows: Iterable[Group], keys: Iterable[Group], name: str = "pairs") -> Mask:
    """Every row of the groups ``rows`` sees every key of the groups ``keys``."""
    keys = tuple(keys)
    table = sum(1 << (GROUPS * int(row) + int(key)) for row in set(rows) for key in set(keys))
    return Mask((Clause(pairs=table),), name)


def sliding(window: int) -> Mask:
    """The last ``window`` columns up to the row's own, and every later one: meant for ``and_(causal, sliding(n))``.

    Raises:
        ValueError: ``window`` is below 1.
    """
    if not isinstance(window, int) or window < 1:
        raise ValueError(f"window={window!r}: a sliding mask takes a whole number of columns from 1 on")
    return Mask((Clause(window=window),), f"sliding:{window}")


def _named(name: str, mask: Mask) -> Mask:
    return Mask(mask.clauses, name)


full = Mask((Clause(),), "full")
causal = Mask((Clause(causal=True),), "causal")
modality_mutual = _named("modality-mutual", causal | pairs([Group.VISUAL], [Group.QUERY]))
generalised_modality_mutual = _named(
    "generalised-modality-mutual", causal | pairs([Group.VISUAL], TEXT) | pairs(TEXT, [Group.VISUAL])
)
croc = _named("croc", causal | pairs([Group.VISUAL], [Group.VISUAL]))
vision_block = _named("vision-block", causal | Mask((Clause(same_image=True),)))
prefix_lm = _named("prefix-lm", causal | pairs(Group, PROMPT))
prefix_diffusion = _named("prefix-diffusion", pairs(Group, PROMPT) | pairs([Group.GENERATED], Group))

#: Masks by name. ``sliding:N`` stands for causal within the last N columns.
MASKS = {
    mask.name: mask
    for mask in (
        causal,
        modality_mutual,
        generalised_modality_mutual,
        croc,
        vision_block,
        prefix_lm,
        prefix_diffusion,
        full,
    )
}


#: Names of methods that use a mask of another name.
ALIASES = {"mma": "modality-mutual", "bidirectional": "generalised-modality-mutual"}


def named(name: str) -> Mask:
    """A mask by name: a key of :data:`MASKS` or :data:`ALIASES`, or ``sliding:N``.

    Raises:
        ValueError: there is none of that name.
    """
    if found := re.fullmatch(r"sliding:(\d+)", name):
        return _named(name, causal & sliding(int(found[1])))
    name = ALIASES.get(name, name)
    if name not in MASKS:
        raise ValueError(f"no mask {name!r}: there are {', '.join([*MASKS, *ALIASES, 'sliding:N'])}")
    return MASKS[name]


def image_index(group: Tensor) -> Tensor:
    """``[B, S]`` int32: number of the image every column belongs to, -1 for text, taking each run of VISUAL columns for one.

    Two images without any token between them count as one here: pass ``image=`` where that happens.
    """
    visual = group == int(Group.VISUAL)
    starts = visual & ~torch.nn.functional.pad(visual[:, :-1], (1, 0))
    return torch.where(visual, starts.cumsum(1) - 1, -1).to(torch.int32)


def extended(group: Tensor, length: int, fill: int) -> Tensor:
    """``[B, length]``: a prompt's ``[B, P]`` cut, or filled up with ``fill``."""
    return torch.nn.functional.pad(group[:, :length], (0, max(0, length - group.shape[1])), value=fill)


def packed(document: Tensor, length: int) -> Tensor:
    """``[B, length]``: the documents ``[B, P]`` of a row cut, or filled up with the last column's."""
    document = document[:, :length]
    return torch.cat([document, document[:, -1:].expand(-1, length - document.shape[1])], 1)


def documents(cu_seqlens: Tensor) -> Tensor:
    """``[1, S]`` int32: number of the prompt every column belongs to, where N prompts are packed into a row of S columns.

    Args:
        cu_seqlens: ``[N + 1]`` integers, column of every prompt's start and then S, as variable-length attention takes them.

    Raises:
        ValueError: they are no integers that begin with 0 and never fall.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must be [N + 1] integers, got {list(cu_seqlens.shape)} of {cu_seqlens.dtype}")
    if int(cu_seqlens[0]) or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(f"cu_seqlens must begin with 0 and never fall, got {cu_seqlens.tolist()}")
    numbers = torch.arange(len(cu_seqlens) - 1, dtype=torch.int32, device=cu_seqlens.device)
    return numbers.repeat_interleave(cu_seqlens.diff())[None]


def check_tokens(group: Tensor, image: Tensor | None, document: Tensor | None = None) -> None:
    """Raise for groups, image indices or documents that are none.

    Raises:
        ValueError: a wrong shape or dtype.
    """
    if group.dim() != 2 or group.is_floating_point() or group.dtype == torch.bool:
        raise ValueError(f"group must be [B, S] of integers, got {list(group.shape)} of {group.dtype}")
    for name, given in (("image", image), ("document", document)):
        if given is not None and (given.shape != group.shape or given.is_floating_point()):
            raise ValueError(
                f"{name} must be integers of group's shape {list(group.shape)}, got {list(given.shape)} {given.dtype}"
            )


def visible(mask: Mask, q: Tokens, k: Tokens) -> Tensor:
    """What rows see of keys, bool of the shape the two broadcast to: what the mask shows, but no padding, no other document."""
    seen = mask(q, k) & (k.group != int(Group.PAD))
    return seen if k.document is None or q.document is None else seen & (q.document == k.document)


def materialise(
    mask: Mask,
    group: Tensor,
    *,
    image: Tensor | None = None,
    document: Tensor | None = None,
    rows: range | Tensor | None = None,
    length: int | None = None,
) -> Tensor:
    """The mask as a matrix.

    Args:
        mask: the mask.
        group: ``[B, P]`` integers of :class:`Group`; PAD columns are hidden from every row. Later columns are GENERATED.
        image: ``[B, P]`` integers, the image of every column, -1 for text; default: :func:`image_index`.
        document: ``[B, P]`` integers, the packed prompt of every column, see :func:`documents`; later columns are the last's.
        rows: columns whose rows are wanted, a range or ``[Q]`` or ``[B, Q]`` integers; default: all of ``length``.
        length: number of key columns S; default P.

    Returns:
        ``[B, 1, Q, S]`` bool, True = visible. A row may be hidden altogether (left padding under a causal mask).

    Raises:
        ValueError: a wrong shape or dtype, or rows outside ``0 .. length - 1``.
    """
    check_tokens(group, image, document)
    length = group.shape[1] if length is None else length
    image = extended(image_index(group) if image is None else image, length, -1)
    document = None if document is None else packed(document, length)
    group = extended(group, length, int(Group.GENERATED))
    device = group.device
    columns = torch.arange(length, device=device)
    rows = columns if rows is None else torch.as_tensor(rows, device=device)
    rows = rows.expand(group.shape[0], -1)
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < length:
        raise ValueError(f"rows {int(rows.min())} to {int(rows.max())} lie outside the {length} columns")
    tokens = [t for t in (group, image, document) if t is not None]
    q = Tokens(rows[:, :, None], *(t.gather(1, rows)[:, :, None] for t in tokens))
    k = Tokens(columns[None, None, :], *(t[:, None, :] for t in tokens))
    return visible(mask, q, k)[:, None]


LETTERS = {
    "s": Group.SYSTEM,
    "v": Group.VISUAL,
    "q": Group.QUERY,
    "r": Group.ROLE,
    "a": Group.GENERATED,
    "p": Group.PAD,
}


def parse_layout(text: str) -> tuple[Tensor, Tensor]:
    """Groups and images ``[1, S]`` of a layout such as ``s4 v9 q5 a3``.

    Letters: s system, v visual (every one is an image of its own), q question, r template tail, a answer, p padding.

    Raises:
        ValueError: a part is no letter with a number from 1 on, or there is none.
    """
    group: list[int] = []
    image: list[int] = []
    for index, part in enumerate(text.split()):
        found = re.fullmatch(r"([a-z])([1-9]\d*)", part)
        if found is None or found[1] not in LETTERS:
            raise ValueError(
                f"layout part {part!r}: expected a letter and a number, such as s4 (s system, v visual, q question, "
                "r template tail, a answer, p padding)"
            )
        count = int(found[2])
        group += [int(LETTERS[found[1]])] * count
        image += [index if found[1] == "v" else -1] * count
    if not group:
        raise ValueError("the layout is empty: give parts such as 's4 v9 q5 a3'")
    return torch.tensor([group], dtype=torch.uint8), torch.tensor([image], dtype=torch.int32)


#: What the letters of a layout stand for.
WORDS = {"p": "padding", "s": "system", "v": "visual", "q": "question", "r": "role (template tail)", "a": "answer"}


def key(mask: Mask, group: Tensor) -> str:
    """What a :func:`drawing` shows: its name, its signs, and the letters of the groups in it.

    Args:
        mask: the mask.
        group: ``[1, S]``.
    """
    letter = {int(value): name for name, value in LETTERS.items()}
    there = list(dict.fromkeys(letter[int(value)] for value in group[0]))
    letters = ", ".join(f"{name} {WORDS[name]}" for name in there)
    return f"{mask.name}: a row is a token that looks, a column one it may see. # sees, . does not; {letters}"


def drawing(mask: Mask, group: Tensor, image: Tensor | None = None) -> str:
    """A picture of the mask in text, one line a row: ``#`` sees, ``.`` does not; letters name the groups.

    Args:
        mask: the mask.
        group: ``[1, S]``.
        image: see :func:`materialise`.

    Examples:
        >>> from vlm_attn.kernels import masks
        >>> group, image = masks.parse_layout("v2 q1")
        >>> print(masks.drawing(masks.modality_mutual, group, image))
          vvq
        v #.#
        v ###
        q ###
    """
    visible = materialise(mask, group, image=image)[0, 0]
    letter = {int(value): name for name, value in LETTERS.items()}
    names = [letter[int(value)] for value in group[0]]
    lines = [
        f"{name} " + "".join("#" if seen else "." for seen in row) for name, row in zip(names, visible, strict=True)
    ]
    return "\n".join(["  " + "".join(names), *lines])
