# SPDX-License-Identifier: Apache-2.0
"""Keeping fewer visual tokens: what a reducer is, what it sees of an image, and what is told of its choice.

How the choice is carried out is in ``dropping``, what is read of the vision tower in ``tower``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from vlm_attn.kernels import Edit
from vlm_attn.method import Method, ModelFacts, check_choice, check_flag

if TYPE_CHECKING:
    from vlm_attn.call import Call

Keep = float | int | str
MERGED = -2  # in the place of a layer: what was merged inside the vision tower
FEATURES = -3  # in the place of a layer: what the projector was given, and the CLS token's state there
ADAPTIVE = "adaptive"


@dataclass
class Picture:
    """What a reducer sees of one image, at the layer where it chooses. ``n`` tokens are still there, in order.

    Attributes:
        tokens: ``[n, D]`` the layer's input; before layer 0 the projected image features.
        places: ``[n]`` which of the image's tokens these are.
        total: number of tokens the image had.
        count: number to keep.
        grid: ``(h, w)`` of the tokens that form a picture.
        first: index of the first of those.
        number: the image's number in the call.
        stage: which of the method's stages this is.
        memory: where the method keeps what it wants to know of this image at a later stage.
        text: ``[T, D]`` the layer's input at the text that follows the row's first image.
        rows: ``[H, R, n]`` attention of the rows the method reads, None if it reads none here.
        cls: ``[n]`` attention the vision tower's CLS token pays, mean of the heads; None if the method asks for none.
        keys: ``[n, d]`` the vision tower's keys, mean of the heads; None like ``cls``.
        local: ``[n]`` like ``cls``, of an early layer of the tower.
        patch: ``[n]`` number of each token's patch, 0 for one that is none (a newline); None if nothing merges in the tower.
        into: ``[n]`` number of the patch it was merged into.
        features: ``[n, d]`` what the projector made the tokens of; None if the method does not ask, or the family's tokens are
            not made of one feature each.
        cls_feature: ``[d]`` the same of the tower's CLS token; None where it cannot be projected.
        project: from features ``[m, d]`` to tokens ``[m, D]``; None like ``features``.
        turns: ``[R, n]`` the product, over the root of the head's width, of two vectors of ones that are turned as the row's
            query and the token's key are; None if the method does not ask for it.
    """

    tokens: Tensor
    places: Tensor
    total: int
    count: int
    grid: tuple[int, int]
    first: int = 0
    number: int = 0
    stage: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict)
    text: Tensor | None = None
    rows: Tensor | None = None
    cls: Tensor | None = None
    keys: Tensor | None = None
    local: Tensor | None = None
    patch: Tensor | None = None
    into: Tensor | None = None
    features: Tensor | None = None
    cls_feature: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None
    turns: Tensor | None = None

    @property
    def source(self) -> Tensor:
        """``[n, d]`` float32: what is merged. Features before the projector where they are known, else the tokens."""
        return (self.tokens if self.features is None else self.features).float()

    def with_new(self, index: Tensor, features: Tensor) -> Tensor:
        """``[n, D]`` float32: the tokens, in the places ``index [k]`` what the projector makes of ``features [k, d]``."""
        made = features if self.project is None else self.project(features)
        return self.tokens.float().index_copy(0, index, made.float())


@dataclass(frozen=True, kw_only=True)
class Reducer(Method):
    """Base of the methods that keep fewer visual tokens. A subclass fills in :meth:`score`, or :meth:`choose`.

    Class attributes:
        reads_ahead: whether ``read_layers`` are read before they run.
        timed: whether what it keeps hangs on the denoising step (:meth:`left_at`).
        merges: whether it merges tokens inside the vision tower (:meth:`pairs`).
        reads_features: whether it wants what the projector makes the tokens of.
        adaptive: whether ``keep="adaptive"`` lets it find the number of tokens by itself.
        published: rows of published tables by name: the parameters they stand for.

    Attributes:
        keep: share of every image's tokens in (0, 1], or their number. ``1.0`` is neutral. The name of one of the rows in
            ``published`` sets that row's parameters.
        mode: ``"drop"`` takes the others out: faster, less memory; where a cache cannot hold fewer columns (static,
            quantised) they are masked instead. ``"mask"`` always hides them.
        compensate: whether each stage hands what it takes back as one token more: the mean of the n tokens that go, where the
            middle one of them stood, attended to like n tokens (``log n`` on its logits, as RazorAttention's compensation
            token, arXiv 2407.15891). Not for methods that sum up what goes in their own way.
        positions: ``"original"`` leaves every token its position; ``"packed"`` numbers what is left of a row anew, 0 to n -
            1, in every layer, as most released code does, and brings the tokens into that code's order.
    """

    edited_rows: ClassVar[Literal["last", "text"]] = "text"  # no row is edited, so the prompt need not be split
    needs_image: ClassVar[bool] = False
    reads_ahead: ClassVar[bool] = False
    timed: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    reads_features: ClassVar[bool] = False
    adaptive: ClassVar[bool] = False
    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    keep: Keep = 0.5
    mode: Literal["drop", "mask"] = "drop"
    compensate: bool = False
    positions: Literal["original", "packed"] = "original"

    def __post_init__(self) -> None:
        self._set_row()
        self.check()
        check_flag(self, "compensate")
        own = type(self).merge is not Reducer.merge or type(self).skipped is not Reducer.skipped
        if self.compensate and (own or self.merges or self.timed):
            raise ValueError(
                f"{self.name}: compensate=True would hand back as one token what {self.name} itself merges, puts back or takes "
                "away later: leave it out, or choose a method that only selects, such as fastv or divprune"
            )
        check_choice(self, "mode", ("drop", "mask"))
        check_choice(self, "positions", ("original", "packed"))
        if self.positions == "packed" and (self.timed or type(self).skipped is not Reducer.skipped):
            raise ValueError(
                f'{self.name}: positions="packed" would number tokens anew that are still to come back or to go: leave '
                'positions="original"'
            )

    def _set_row(self) -> None:
        """Put the parameters of a named row in the place of its name."""
        if not isinstance(self.keep, str) or (self.adaptive and self.keep == ADAPTIVE):
            return
        row = self.published.get(self.keep)
        if row is None:
            known = [f'"{name}"' for name in self.published] + ['"adaptive"'] * self.adaptive
            raise ValueError(
                f"{self.name}: keep={self.keep!r} is the name of no published row: give a ratio in (0, 1], a count"
                + (f", or one of {', '.join(known)}" if known else "")
            )
        default = {f.name: f.default for f in fields(self)}
        for name, value in row.items():
            given = getattr(self, name)
            if name != "keep" and given not in (default[name], value):
                raise ValueError(
                    f"{self.name}: keep={self.keep!r} means {name}={value!r}, and {name}={given!r} was given beside it: leave "
                    "one of them out"
                )
        for name, value in {"keep": default["keep"], **row}.items():
            object.__setattr__(self, name, value)

    def check(self) -> None:
        """Check ``keep``."""
        check_keep(self, "keep", self.keep)

    @property
    def neutral(self) -> bool:
        """Everything is kept."""
        return isinstance(self.keep, float) and self.keep == 1

    @property
    def stages(self) -> tuple[int, ...]:
        """The layers before which it takes tokens away, ascending; 0 is before the language model."""
        return (0,)

    @staticmethod
    def whole(tokens: float) -> int:
        """What a share of an image's tokens is as a number: rounded, a half up."""
        return int(tokens + 0.5)

    def left(self, stage: int, total: int) -> int:
        """How many of an image's ``total`` tokens a stage leaves; all of them where it finds the number by itself."""
        return total if self.keep == ADAPTIVE else kept_count(self.keep, total, self.whole)

    @property
    def turn_layers(self) -> tuple[int, ...]:
        """Layers of whose rotation it wants to know what that alone makes of a logit (:attr:`Picture.turns`)."""
        return ()

    def left_at(self, stage: int, total: int, progress: float) -> int:
        """The same when the share ``progress`` of the denoising steps is done."""
        return self.left(stage, total)

    @property
    def skipped(self) -> tuple[int, ...]:
        """Layers that visual tokens bypass: not there in them, and back behind them as they were before."""
        return ()

    def bind(self, facts: ModelFacts) -> Method:
        """Check the layers against the model."""
        for layer in self.stages:
            if not 0 <= layer < facts.layers:
                raise ValueError(
                    f"{self.name}: reduces before layer {layer}, but {facts.model_type} has {facts.layers} decoder "
                    f"layers: allowed are 0..{facts.layers - 1}"
                )
        return self

    def start(self, call: Call, processor: Any) -> None:
        """Check the prompt's images.

        Raises:
            ValueError: a count beyond an image's tokens; a prompt that ends in an image token.
        """
        for number, image in enumerate(call.prompt.images):
            total = image.total
            if isinstance(self.keep, int) and self.keep > total:
                raise ValueError(
                    f"{self.name}: keep={self.keep} is more than the {total} tokens of image {number} (row {image.row}): "
                    f"give a count of 1..{total} or a ratio in (0, 1]"
                )
        if self.positions == "packed" and call.canvas:
            raise NotImplementedError(
                f'{self.name}: positions="packed" is for answers written token after token, this one is denoised: leave '
                'positions="original"'
            )
        if (
            self.reads_ahead
            and call.first
            and not call.readable
            and any(image.start >= call.first for image in call.prompt.images)
        ):
            raise NotImplementedError(
                f"{self.name} cannot rank a new image on a cache of this kind that holds {call.first} columns: pass no cache, "
                "or choose a method that reads a layer behind, such as fastv"
            )
        if call.prompt.visual[:, -1].any():
            raise ValueError(
                f"{self.name}: the prompt ends in an image token, which cannot be taken away: put text after the image"
            )

    def read_rows(self, call: Call) -> Tensor:
        """The last prompt token, for the reducers that read attention."""
        group = call.layout.group
        return torch.full((len(group), 1), group.shape[1] - 1, device=group.device)

    def edit(self, call: Call, layer: int) -> Edit | None:
        """No attention is edited."""
        return None

    def score(self, picture: Picture) -> Tensor:
        """``[n]``: how much each token is worth."""
        raise NotImplementedError

    def choose(self, picture: Picture) -> Tensor:
        """``[m]`` indices into the picture's tokens, ascending: those with the highest score."""
        return highest(self.score(picture), picture.count)

    def merge(self, picture: Picture, chosen: Tensor) -> Tensor | None:
        """``[m, D]`` what the chosen tokens become, None = they stay as they are."""
        return None

    def order(self, picture: Picture, chosen: Tensor) -> Tensor | None:
        """``[m]`` in which order of ``chosen`` the released code hands them on (``positions="packed"``); None = as they are."""
        return None

    def owners(self, picture: Picture, chosen: Tensor) -> Tensor:
        """``[n]`` which of the picture's tokens stands for each of them from now on; -1 = none does."""
        return torch.full_like(picture.places, -1).index_copy(0, chosen, chosen)

    def pairs(self, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Inside the vision tower: which tokens go into which behind a layer.

        Args:
            keys: ``[N, n, d]`` the layer's keys of every picture's tokens, mean of the heads.
            count: how many tokens go, at most ``n // 2``.

        Returns:
            ``[N, count]`` those that go, and ``[N, count]`` where they go; no token is in both.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Staged(Reducer):
    """Base of the methods that take tokens away in several stages.

    Attributes:
        counts: tokens left after each stage, in place of ``keep``: all shares or all numbers, none above the one before it.
            Empty = by ``keep``.
    """

    counts: tuple[float | int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = self.counts
        object.__setattr__(self, "counts", (given,) if isinstance(given, int | float) else tuple(given))
        for count in self.counts:
            check_keep(self, "counts", count)
        if len(set(map(type, self.counts))) > 1 or list(self.counts) != sorted(self.counts, reverse=True):
            raise ValueError(
                f"{self.name}: counts={self.counts} must be all shares (floats) or all numbers (ints), none above the "
                "one before"
            )

    @property
    def neutral(self) -> bool:
        """Everything is kept."""
        return self.counts[-1] == 1.0 and isinstance(self.counts[-1], float) if self.counts else super().neutral

    @property
    def taking(self) -> tuple[int, ...]:
        """The stages that take tokens away."""
        return self.stages

    def left(self, stage: int, total: int) -> int:
        """By ``counts``, or by ``keep``."""
        at = stage - len(self.stages) + len(self.taking)
        if at < 0:
            return total
        if self.counts:
            return kept_count(self.counts[at], total, self.whole)
        return self.left_of_keep(at, total)

    def left_of_keep(self, at: int, total: int) -> int:
        """How many the ``at``-th of the stages that take tokens leaves where ``keep`` says so."""
        raise NotImplementedError

    def bind(self, facts: ModelFacts) -> Method:
        """Check that there is a count for every stage."""
        if self.counts and len(self.counts) != len(self.taking):
            raise ValueError(
                f"{self.name}: counts={self.counts} for {len(self.taking)} stages, before layers {self.taking}: give "
                "one for each"
            )
        return super().bind(facts)

    def start(self, call: Call, processor: Any) -> None:
        """Check the largest count as well."""
        super().start(call, processor)
        least = min((image.total for image in call.prompt.images), default=0)
        most = max(self.counts, default=0)
        if least and isinstance(most, int) and most > least:
            raise ValueError(
                f"{self.name}: counts={self.counts} begins with more than the {least} tokens of an image: give numbers of "
                f"1..{least}, or shares in (0, 1]"
            )


def highest(score: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest values, ascending; of equal ones the earlier."""
    return score.float().sort(descending=True, stable=True).indices[:count].sort().values


def others(count: int, chosen: Tensor) -> Tensor:
    """Indices below ``count`` that are not among the chosen ones, ascending."""
    return torch.ones(count, dtype=torch.bool, device=chosen.device).index_fill(0, chosen, False).nonzero().flatten()


def with_seat(count: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """A seat for one token more, that stands for all of ``count`` that are not chosen: the middle one's of these.

    Returns:
        ``[m + 1]`` the chosen ones and the seat, ascending, and ``[1]`` the seat; nothing more where nothing goes.
    """
    gone = others(count, chosen)
    seat = gone[len(gone) // 2 :][:1]
    return torch.cat([chosen, seat]).sort().values, seat


def outliers(values: Tensor) -> int:
    """How many values lie more than 1.5 interquartile ranges above the upper quartile (linear between ranks)."""
    low, high = values.float().quantile(values.new_tensor([0.25, 0.75], dtype=torch.float32))
    return int((values.float() > high + 1.5 * (high - low)).sum())


def truncated(tokens: float) -> int:
    """``int``, but for what float arithmetic loses of a whole number."""
    return int(tokens + 1e-6)


def kept_count(keep: Keep, total: int, whole: Callable[[float], int] = Reducer.whole) -> int:
    """How many of ``total`` tokens a ``keep`` means: a ratio by ``whole``, at least one token if it is above 0."""
    assert not isinstance(keep, str)
    if isinstance(keep, int):
        return min(keep, total)
    return max(int(keep > 0), whole(keep * total))


def scaled(of_32: Sequence[int], layers: int) -> tuple[int, ...]:
    """Layers of a 32-layer model at the same depth of another, none of them the first: ``round(layer * layers / 32)``."""
    return tuple(dict.fromkeys(max(1, round(layer * layers / 32)) for layer in of_32))


def check_keep(method: Method, name: str, keep: Any) -> None:
    """Refuse what is neither a ratio in (0, 1] nor a count.

    Raises:
        TypeError: not a number.
        ValueError: outside the range.
    """
    if keep == ADAPTIVE and name == "keep":  # refused before where a method has no rule for it
        return
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise TypeError(f"{method.name}: {name} must be a ratio in (0, 1] or a count, got {keep!r}")
    if not (keep >= 1 if isinstance(keep, int) else 0 < keep <= 1):
        raise ValueError(
            f"{method.name}: {name}={keep!r} is outside (0, 1] for a ratio (a float), or below 1 for a count (an int)"
        )


# What was kept, for whoever wants to draw it


@dataclass(frozen=True)
class KeptImage:
    """Which tokens of one image a call kept.

    Attributes:
        image: number of the image in the call.
        row: row of the batch.
        grid: ``(h, w)`` of the tokens that form a picture.
        first: index of the first of those among the image's tokens.
        total: number of tokens the image had.
        stages: ``(layer, index)``: before which layer, and which tokens were left then (ascending, on the CPU).
        owner: ``[total]`` for each of the image's tokens the one that is left and stands for it: itself, the one it was merged
            into, or -1 where it went without a trace (on the CPU).
        all_cells: ``[total, 2]`` row and column on the grid of each of the image's tokens; tokens of LLaVA-NeXT's tiles have
            those of the cell they lie in. -1 for one without a place there (a newline, a tile of InternVL).
    """

    image: int
    row: int
    grid: tuple[int, int]
    first: int
    total: int
    stages: tuple[tuple[int, Tensor], ...]
    owner: Tensor
    all_cells: Tensor

    @property
    def index(self) -> Tensor:
        """``[n]`` the tokens left after the last stage."""
        return self.stages[-1][1] if self.stages else torch.arange(self.total)

    @property
    def cells(self) -> Tensor:
        """``[n, 2]`` row and column of every token that is left; -1 for one without a place on the grid."""
        return self.all_cells[self.index]

    @property
    def mask(self) -> Tensor:
        """``[h, w]`` bool: which of the grid's own tokens are left."""
        h, w = self.grid
        left = torch.zeros(self.total, dtype=torch.bool).index_fill(0, self.index, True)
        return left[self.first : self.first + h * w].view(h, w)

    def covered(self, token: int) -> Tensor:
        """``[h, w]`` bool: the cells that one of the tokens that are left stands for.

        Args:
            token: its index among the image's tokens, one of :attr:`index`.
        """
        h, w = self.grid
        return (self.owner[self.first : self.first + h * w] == token).view(h, w)
