"""Methods by name. Nothing is imported until a name is asked for."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

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
    cls: type[Method]


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
    known = [f.name for f in fields(cls)]
    for parameter in parameters:
        if parameter not in known:
            raise TypeError(f"{name} has no parameter {parameter!r}: {suggest(parameter, known)}")
    return cls(**parameters)


def methods() -> dict[str, MethodInfo]:
    """All registered methods by name, each with a one-line summary, its paper and its class.

    Examples:
        >>> vlm_attn.methods()["gift"].paper
        'GIFT, arXiv 2510.22067'
        >>> vlm_attn.methods()["fastv"].cls(keep=0.5).keep
        0.5
    """
    found = {}
    for name in sorted(_targets()):
        cls = method_class(name)
        summary = (cls.__doc__ or "").strip().splitlines()[0]
        found[name] = MethodInfo(name=name, summary=summary, paper=cls.paper, cls=cls)
    return found
