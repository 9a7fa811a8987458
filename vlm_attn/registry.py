# SPDX-License-Identifier: Apache-2.0
"""Methods by name. Nothing is imported until a name is asked for."""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_attn.method import Method

METHODS = {
    "agla": "vlm_attn.hallucination.agla:Agla",
    "bidirectional": "vlm_attn.hallucination.masks:Bidirectional",
    "cdpruner": "vlm_attn.visual_token_ops.cdpruner:CDPruner",
    "croc": "vlm_attn.hallucination.masks:Croc",
    "divprune": "vlm_attn.visual_token_ops.divprune:DivPrune",
    "dola": "vlm_attn.hallucination.dola:Dola",
    "downsample": "vlm_attn.visual_token_ops.downsample:Downsample",
    "duo": "vlm_attn.visual_token_ops.duo:Duo",
    "fastv": "vlm_attn.visual_token_ops.fastv:FastV",
    "gift": "vlm_attn.hallucination.gift:Gift",
    "guidance": "vlm_attn.hallucination.guidance:Guidance",
    "head_guided": "vlm_attn.hallucination.head_guided:HeadGuided",
    "holov": "vlm_attn.visual_token_ops.holov:HoloV",
    "icd": "vlm_attn.hallucination.icd:Icd",
    "ilvad": "vlm_attn.hallucination.ilvad:Ilvad",
    "landmark": "vlm_attn.visual_token_ops.landmark:Landmark",
    "late_step": "vlm_attn.visual_token_ops.steps:LateStep",
    "layer_skip": "vlm_attn.visual_token_ops.layer_skip:LayerSkip",
    "longheads": "vlm_attn.visual_token_ops.longheads:LongHeads",
    "mma": "vlm_attn.hallucination.masks:Mma",
    "mvp": "vlm_attn.hallucination.mvp:Mvp",
    "opera": "vlm_attn.hallucination.opera:Opera",
    "pai": "vlm_attn.hallucination.pai:Pai",
    "paint": "vlm_attn.hallucination.paint:Paint",
    "prefix_lm": "vlm_attn.hallucination.masks:PrefixLm",
    "progressive": "vlm_attn.visual_token_ops.steps:Progressive",
    "prumerge": "vlm_attn.visual_token_ops.prumerge:PruMerge",
    "pyramid_drop": "vlm_attn.visual_token_ops.pyramid_drop:PyramidDrop",
    "random": "vlm_attn.visual_token_ops.random:Random",
    "razor": "vlm_attn.visual_token_ops.razor:Razor",
    "recycled": "vlm_attn.visual_token_ops.recycled:Recycled",
    "routed": "vlm_attn.visual_token_ops.routed:Routed",
    "sparsevlm": "vlm_attn.visual_token_ops.sparsevlm:SparseVLM",
    "tome": "vlm_attn.visual_token_ops.tome:ToMe",
    "trim": "vlm_attn.visual_token_ops.trim:Trim",
    "vaf": "vlm_attn.hallucination.vaf:Vaf",
    "var": "vlm_attn.hallucination.var:Var",
    "vcd": "vlm_attn.hallucination.vcd:Vcd",
    "vhr": "vlm_attn.hallucination.vhr:Vhr",
    "vision_block": "vlm_attn.hallucination.masks:VisionBlock",
    "visionzip": "vlm_attn.visual_token_ops.visionzip:VisionZip",
    "vscan": "vlm_attn.visual_token_ops.vscan:VScan",
    "vtw": "vlm_attn.visual_token_ops.vtw:VTW",
}


@dataclass(frozen=True)
class MethodInfo:
    """What :func:`methods` says about a method.

    Attributes:
        name: the name that :func:`vlm_attn.patch` takes.
        summary: the first line of its docstring.
        paper: where it was published.
        cls: its class; ``help(cls)`` shows equation, parameters and deviations.
    """

    name: str
    summary: str
    paper: str

    @property
    def cls(self) -> type[Method]:
        """The method's class, imported when it is asked for."""
        return method_class(self.name)


@cache
def _targets() -> dict[str, str]:
    """Name -> ``module:Class``, ours and those of installed packages (entry points ``vlm_attn.methods``)."""
    found = {point.name: point.value for point in entry_points(group="vlm_attn.methods")}
    return {**found, **METHODS}


def suggest(wrong: str, known: Any) -> str:
    """A "did you mean" for a message, or the list of what there is."""
    close = difflib.get_close_matches(wrong, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def method_class(name: str) -> type[Method]:
    """The class of a registered method.

    Raises:
        ValueError: unknown name.
    """
    targets = _targets()
    if name not in targets:
        raise ValueError(f"unknown method {name!r}: {suggest(name, targets)}")
    module, _, attribute = targets[name].partition(":")
    return getattr(import_module(module), attribute)


def build(name: str, **parameters: Any) -> Method:
    """An instance of a registered method.

    Raises:
        ValueError: unknown name, or a value out of range.
        TypeError: unknown parameter, or a value of the wrong type.
    """
    cls = method_class(name)
    check_parameters(name, parameters, [f.name for f in fields(cls)])
    return cls(**parameters)


def check_parameters(name: str, given: Iterable[str], known: Sequence[str] | None = None) -> None:
    """Refuse parameters that a method does not have; without importing it where its source says which it has.

    Args:
        name: of a registered method.
        given: names of parameters.
        known: those it has; None: by its source.

    Raises:
        TypeError: an unknown parameter.
    """
    if known is None:
        module, _, attribute = _targets()[name].partition(":")
        known = _fields(module, attribute)
    for parameter in given:
        if known is not None and parameter not in known:
            raise TypeError(f"{name} has no parameter {parameter!r}: {suggest(parameter, known)}")


def names() -> list[str]:
    """The names of all registered methods, in order; nothing is imported."""
    return sorted(_targets())


def methods() -> dict[str, MethodInfo]:
    """All registered methods by name, each with a one-line summary, its paper and its class.

    The methods themselves, and torch with them, are not imported before a class is asked for.

    Examples:
        >>> vlm_attn.methods()["gift"].paper
        'GIFT, arXiv 2510.22067'
        >>> vlm_attn.methods()["fastv"].cls(keep=0.5).keep
        0.5
    """
    return {name: MethodInfo(name, *_described(name)) for name in names()}


@cache
def _described(name: str) -> tuple[str, str]:
    """The first line of a method's docstring and its paper, read from the source where that says them."""
    module, _, attribute = _targets()[name].partition(":")
    file = _source(module)
    for node in ast.parse(file.read_text(encoding="utf-8")).body if file is not None else ():
        if isinstance(node, ast.ClassDef) and node.name == attribute:
            texts = {
                target.id: entry.value.value
                for entry in node.body
                if isinstance(entry, (ast.Assign, ast.AnnAssign)) and isinstance(entry.value, ast.Constant)
                for target in (entry.targets if isinstance(entry, ast.Assign) else [entry.target])
                if isinstance(target, ast.Name)
            }
            summary, paper = ast.get_docstring(node), texts.get("paper")
            if summary and isinstance(paper, str):
                return summary.splitlines()[0], paper
    cls = method_class(name)  # made at run time, inherited, or without a source
    return ((cls.__doc__ or "").strip().splitlines() or [""])[0], cls.paper


@cache
def _fields(module: str, attribute: str) -> list[str] | None:
    """The fields of a dataclass and its bases by their sources; None where these do not say."""
    if module == "vlm_attn.method" and attribute == "Method":
        return []
    file = _source(module)
    body = ast.parse(file.read_text(encoding="utf-8")).body if file is not None else []
    node = next((n for n in body if isinstance(n, ast.ClassDef) and n.name == attribute), None)
    if node is None:
        return None
    origin = {
        alias.asname or alias.name: (entry.module, alias.name)
        for entry in body
        if isinstance(entry, ast.ImportFrom) and entry.module and not entry.level
        for alias in entry.names
    }
    found: dict[str, None] = {}
    for base in node.bases:
        place = origin.get(base.id, (module, base.id)) if isinstance(base, ast.Name) else ("", "")
        inherited = _fields(*place) if place[0] else None
        if inherited is None:
            return None
        found |= dict.fromkeys(inherited)
    for entry in node.body:
        if not (isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name)):
            continue
        if "ClassVar" not in ast.unparse(entry.annotation):
            found[entry.target.id] = None
    return list(found)


def _source(module: str) -> Path | None:
    """The source file of a module, found without importing its packages."""
    spec, path, name = None, None, ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        spec = next((found for finder in sys.meta_path if (found := finder.find_spec(name, path)) is not None), None)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    origin = spec.origin if spec is not None else None
    return Path(origin) if origin is not None and origin.endswith(".py") else None
