# SPDX-License-Identifier: Apache-2.0
"""Methods as the command line names them: ``baseline``, ``gift``, ``var+gift``, and ``gift.alpha=4``."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

BASELINE = "baseline"


@dataclass(frozen=True)
class MethodSpec:
    """One run of an evaluation.

    Args:
        label: what it is called, for example ``"var+gift"``.
        names: the methods to patch with, in order; empty for the plain model.
        params: method name -> parameters that differ from its defaults.
        preset: name or file of a preset with constants for the model; None: the bundled one that fits it.
    """

    label: str
    names: tuple[str, ...] = ()
    params: dict[str, dict[str, Any]] = field(default_factory=dict)
    preset: str | None = None

    def build(self, model: Any = None) -> list[Any]:
        """Method instances, in order.

        Args:
            model: its preset's constants are used where ``params`` say nothing; None: defaults only.

        Raises:
            ValueError, TypeError: unknown method or parameter, or a value outside its range.
        """
        from vlm_attn import presets, registry

        known = {
            name: presets.constants(name, model.config, self._preset(name, model)) if model else {}
            for name in self.names
        }
        return [registry.build(name, **(known[name] | self.params.get(name, {}))) for name in self.names]

    def _preset(self, name: str, model: Any) -> str | None:
        """The preset for one of the methods: what it has nothing for runs with the one that fits the model.

        Raises:
            ValueError: it is not readable, or for another model.
        """
        from vlm_attn import presets

        known = self.preset is not None and name in presets.fitting(self.preset, model.config)["methods"]
        return self.preset if known else None

    def applied(self, model: Any, processor: Any) -> contextlib.AbstractContextManager[Any]:
        """Context in which the model is patched with this spec; does nothing for the baseline.

        Raises:
            ValueError, TypeError, NotImplementedError: what ``vlm_attn.patch`` refuses.
        """
        if not self.names:
            return contextlib.nullcontext(model)
        import vlm_attn

        return vlm_attn.patched(model, self.build(model), processor=processor)

    def describe(self, model: Any, processor: Any) -> list[dict[str, Any]]:
        """Names and all parameters as they run on this model, as plain data for a results file.

        With ``searched``, the number of settings that were compared before the preset's constants were chosen, where it says.

        Raises:
            ValueError, TypeError, NotImplementedError: the model cannot be patched with this spec.
        """
        if not self.names:
            return []
        from vlm_attn import presets
        from vlm_attn.patching import engine_of

        with self.applied(model, processor):
            methods = engine_of(model).methods
        described = []
        for method in methods:
            entry: dict[str, Any] = {"name": method.name, "params": _plain(method)}
            # Of the preset's constants as they are; with parameters given by hand nothing is known.
            if not self.params.get(method.name):
                tried = presets.searched(method.name, model.config, self._preset(method.name, model))
                entry |= {} if tried is None else {"searched": tried}
            described.append(entry)
        return described


def _plain(method: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(method), default=str))


def unknown(kind: str, value: str, known: Sequence[str]) -> ValueError:
    """An error for a name that is not known, with the nearest known one."""
    near = difflib.get_close_matches(value, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {kind} {value!r}{hint} (known: {', '.join(known)})")


def parse_value(text: str) -> Any:
    """A parameter's value: JSON if it is, else the text itself; ``[2,3]`` and ``2,3`` become tuples."""
    for candidate in (text, f"[{text}]"):
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(candidate)
            return tuple(value) if isinstance(value, list) else value
    return text


def with_pruning(methods: Sequence[str], prune: str | None) -> list[str]:
    """The runs with a method beside each that keeps fewer visual tokens."""
    if prune is None:
        return list(methods)
    return [prune if label == BASELINE else f"{label}+{prune}" for label in methods]


def parse_specs(methods: Sequence[str], params: Sequence[str] = (), preset: str | None = None) -> list[MethodSpec]:
    """Runs from ``--method`` and ``--param`` values.

    Args:
        methods: ``"baseline"``, a method's name, or several joined by ``+``; the same label twice is one run.
        params: ``"method.parameter=value"``; set in every run that has the method.
        preset: see `MethodSpec`.

    Raises:
        ValueError: an unknown method, a parameter that is malformed or belongs to no run, or a value out of
            range.
        TypeError: an unknown parameter.
    """
    from vlm_attn import registry

    known = [BASELINE, *registry.names()]
    runs = {label: tuple(label.split("+")) for label in methods}
    for names in runs.values():
        for name in names:
            if name not in known:
                raise unknown("method", name, known)
        if BASELINE in names and len(names) > 1:
            raise ValueError(f"method {'+'.join(names)!r}: {BASELINE} is the plain model, nothing adds to it")
    used = {name for names in runs.values() for name in names} - {BASELINE}
    values: dict[str, dict[str, Any]] = {}
    for text in params:
        key, equals, value = text.partition("=")
        method, dot, parameter = key.strip().partition(".")
        if not (equals and dot and method and parameter):
            raise ValueError(f"--param {text!r}: expected METHOD.PARAMETER=VALUE, for example gift.alpha=4")
        if method not in known or method == BASELINE:
            raise unknown("method", method, [name for name in known if name != BASELINE])
        if method not in used:
            raise ValueError(f"--param {text!r}: no run uses {method}; add --method {method}")
        registry.check_parameters(method, [parameter])
        values.setdefault(method, {})[parameter] = parse_value(value)
    specs = [
        MethodSpec(label, () if names == (BASELINE,) else names, {n: values[n] for n in names if n in values}, preset)
        for label, names in runs.items()
    ]
    for spec in specs:
        spec.build()  # wrong parameters show now, not after the model is loaded
    return specs
