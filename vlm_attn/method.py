# SPDX-License-Identifier: Apache-2.0
"""What a method is: a frozen dataclass that says what it reads and how it edits. One file each, see ``hallucination``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from torch import Tensor

from vlm_attn.kernels import Edit, ScoreEdit
from vlm_attn.kernels.masks import Mask

if TYPE_CHECKING:
    from vlm_attn.branch import Run
    from vlm_attn.call import Call


@dataclass(frozen=True)
class ModelFacts:
    """What a method may ask of a model when it is bound to it.

    Attributes:
        model_type: the config's model type.
        layers: number of decoder layers.
        heads: number of query heads.
        hidden: hidden size.
        causal: every row of every layer sees all earlier columns and no later one.
        uncovered: layers without attention (linear attention, convolution), which no edit reaches.
        sliding: layers whose rows see a window of latest columns only.
        kv_heads: number of key and value heads; 0 = as many as query heads.
    """

    model_type: str
    layers: int
    heads: int
    hidden: int
    causal: bool = True
    uncovered: tuple[int, ...] = ()
    sliding: tuple[int, ...] = ()
    kv_heads: int = 0


@dataclass(frozen=True)
class Wide:
    """A layer of the vision tower, its attention by one softmax over the full width of queries and keys, as one head."""

    layer: int


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all methods. Parameters are the dataclass fields; a field that is None is filled from a preset.

    Class attributes:
        name: the name in the registry and on the command line.
        paper: citation with its identifier.
        edited_rows: ``"last"`` edits every row from the last prompt token on (the prompt then runs as body + last
            token); ``"text"`` edits every text row after the first image as well; ``"none"`` edits none.
        read_hidden: whether :meth:`read_tokens` is called with every layer's input.
        cls_layers: layers of the vision tower whose CLS attention it wants: ``PROJECTED``, the one whose output goes on to the
            language model, or one of a 24-layer tower (taken at the same depth of another); ``Wide`` of one reads all heads
            as one.
        needs_image: whether it leaves a prompt without an image alone; else it acts there, too.
        token_by_token: whether it needs a model that writes one token after the other, and not all of a canvas.
        loads: parameters that name a file or a model to load. Where strangers choose parameters, as in the demo, these are
            not among them.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    edited_rows: ClassVar[Literal["last", "text", "none"]] = "last"
    read_hidden: ClassVar[bool] = False
    cls_layers: ClassVar[tuple[int | Wide, ...]] = ()
    needs_image: ClassVar[bool] = True
    token_by_token: ClassVar[bool] = False
    loads: ClassVar[tuple[str, ...]] = ()

    @property
    def neutral(self) -> bool:
        """Whether the parameters make the method a no-op. A neutral method is bypassed altogether."""
        return False

    @property
    def mask(self) -> Mask | None:
        """Who sees whom while the prompt runs; None = as the model has it. Only one method may set it."""
        return None

    @property
    def read_layers(self) -> tuple[int, ...]:
        """Layers whose attention rows (:meth:`read_rows`) the method reads while the prompt runs."""
        return ()

    def bind(self, facts: ModelFacts) -> Method:
        """Check the parameters against a model and return the method as it will run there.

        Raises:
            ValueError: a layer or dimension the model does not have.
        """
        return self

    def start(self, call: Call, processor: Any) -> None:
        """Check a prompt before anything runs.

        Args:
            call: the call, with its layout.
            processor: what was given to ``patch``, or None.

        Raises:
            ValueError: the prompt lacks what the method needs.
        """

    def rehearse(self, run: Run) -> None:
        """Look at what the plain model does with the prompt before it runs edited, with ``run.engine.aside(tap=...)``.

        Args:
            run: the call about to begin; the method's own results go to ``run.call.memory(self)``.

        Raises:
            ValueError: the prompt lacks what the method needs.
        """

    def head_scale(self, call: Call, layer: int) -> Tensor | None:
        """``[B, H]`` factors on the output of every head, in every row of a layer, before its output projection; None = 1."""
        return None

    def read_rows(self, call: Call) -> Tensor:
        """``[B, R]`` prompt columns whose attention the method reads; -1 = none."""
        raise NotImplementedError

    def read_tokens(self, hidden: Tensor) -> Tensor:
        """Reduce a layer's input ``[B, Q, D]`` to one number or flag per token ``[B, Q]``."""
        raise NotImplementedError

    def tower_read(self, call: Call, number: int, attention: list[Tensor]) -> None:
        """Called once for every new image of the prompt, before :meth:`prompt_read`, where :attr:`cls_layers` asks for it.

        Args:
            call: the running call.
            number: the image's number in ``call.prompt.images``.
            attention: for each of these layers ``[n]``, what the tower's CLS token gives the image's tokens, mean of the
                heads.
        """

    def prompt_read(self, call: Call, rows: dict[int, Tensor]) -> None:
        """Called once the prompt's body has run, before the first edited row (the whole prompt, where no last row is edited).

        Args:
            call: the running call; the method's own results go to ``call.memory(self)``.
            rows: for every layer of :attr:`read_layers`, attention ``[B, H, R, P]`` float32 of the rows of
                :meth:`read_rows` to the prompt's columns.
        """

    def edit(self, call: Call, layer: int) -> Edit | ScoreEdit | None:
        """The edit of a layer, or None where the method leaves it alone."""
        raise NotImplementedError


PROJECTED = -1
M = TypeVar("M", bound=Method)


def check_layers(method: Method, field: str, layers: Sequence[int], facts: ModelFacts) -> None:
    """Refuse layers the model does not have.

    Raises:
        ValueError: names the field, the layer and the allowed range.
    """
    bad = [layer for layer in layers if not 0 <= layer < facts.layers]
    if bad:
        raise ValueError(
            f"{method.name}: {field}={tuple(layers)} names layer {bad[0]}, but {facts.model_type} has {facts.layers} "
            f"decoder layers: allowed are 0..{facts.layers - 1}"
        )


def at_depth(method: M, facts: ModelFacts, start: int, stop: int, of: int = 32) -> M:
    """Check a method's ``layers``; empty ones become layers ``start .. stop - 1`` of a model with ``of`` layers, at the same
    depth of this one, at least one.

    Raises:
        ValueError: see :func:`check_layers`.
    """
    layers: tuple[int, ...] = getattr(method, "layers")  # noqa: B009
    check_layers(method, "layers", layers, facts)
    if layers:
        return method
    first = min(round(start * facts.layers / of), facts.layers - 1)
    return replace(method, layers=tuple(range(first, max(first + 1, round(stop * facts.layers / of)))))  # type: ignore[call-arg]


def check_range(method: Method, field: str, low: float, high: float, *, open_low: bool = False) -> None:
    """Refuse a number outside ``[low, high]`` (``(low, high]`` with ``open_low``).

    Raises:
        TypeError: not a number.
        ValueError: names the field, the value and what is allowed.
    """
    value = getattr(method, field)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{method.name}: {field} must be a number, got {value!r}")
    if not (low < value if open_low else low <= value) or not value <= high:
        raise ValueError(f"{method.name}: {field}={value!r} is outside {'(' if open_low else '['}{low:g}, {high:g}]")


def check_flag(method: Method, field: str) -> None:
    """Refuse what is no switch.

    Raises:
        TypeError: neither True nor False.
    """
    value = getattr(method, field)
    if not isinstance(value, bool):
        raise TypeError(f"{method.name}: {field} must be True or False, got {value!r}")


def check_choice(method: Method, field: str, known: tuple[str, str]) -> None:
    """Refuse a word that is neither of two.

    Raises:
        ValueError: names the field, the value and what is allowed.
    """
    value = getattr(method, field)
    if value not in known:
        raise ValueError(f'{method.name}: {field}={value!r} is neither "{known[0]}" nor "{known[1]}"')


def unknown_turn(method: Method, what: str) -> ValueError:
    """The error for a cache that was filled without a method that needs to have seen it filled.

    Args:
        method: the method.
        what: what is unknown, such as ``"its heads are"``.
    """
    return ValueError(
        f"{method.name}: the cache passed in was filled without {method.name}, so {what} unknown. "
        "Run the first turn with the same patched model, or pass no cache"
    )


def layer_tuple(method: Method, field: str, *, empty: bool = False) -> None:
    """Turn a field given as an int or a sequence of ints into a tuple, in place of what was passed.

    Args:
        method: the method.
        field: its field; None stays.
        empty: whether no integer at all is allowed.

    Raises:
        TypeError: anything else.
    """
    value = getattr(method, field)
    if value is None:
        return
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value,)
    try:
        numbers = tuple(value)
    except TypeError:
        numbers = ("?",)
    if not (numbers or empty) or not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        raise TypeError(f"{method.name}: {field} must be one or more integers such as (12, 13), got {value!r}")
    object.__setattr__(method, field, numbers)


__all__ = [
    "PROJECTED",
    "Edit",
    "Method",
    "ModelFacts",
    "ScoreEdit",
    "Wide",
    "at_depth",
    "check_choice",
    "check_flag",
    "check_layers",
    "check_range",
    "layer_tuple",
    "unknown_turn",
]
