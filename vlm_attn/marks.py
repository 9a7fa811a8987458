# SPDX-License-Identifier: Apache-2.0
"""What ``patch`` put into a model, and whether it is still there.

A patch is a few settings of a model that others may overwrite: the name of an attention implementation, tags, hooks, layers.
Each forward looks at them first, with one identity comparison for each. What was set to something that can be edited as well
is put back; anything else is an error that says what happened, never a plain answer under the name of an edited one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_GONE = object()


class Marks:
    """Everything that has to be in place.

    Attributes:
        modules: the modules that carry something of ours, and those on the way to them, by path.
        checks: ``(dictionary, key, value, path, what)``: what has to be where.
    """

    def __init__(
        self, model: nn.Module, carriers: Iterable[nn.Module], attributes: Sequence[str], hooks: set[int]
    ) -> None:
        self.model = model
        self.attributes = tuple(attributes)
        self.hooks = frozenset(hooks)
        wanted = {id(module) for module in carriers}
        named = dict(model.named_modules())
        paths = [
            path
            for path, module in named.items()
            if id(module) in wanted or any(number in self.hooks for kind in HOOKS for number in vars(module)[kind])
        ]
        self.modules = {path: named[path] for path in paths}
        self._links: list[tuple[nn.Module, str, nn.Module, str]] = []
        self._checks: list[tuple[dict[Any, Any], Any, Any, str, str]] | None = None
        self.find_links(named)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_checks": None}  # a copy has dictionaries of its own

    def find_links(self, named: dict[str, nn.Module]) -> None:
        """Note how the modules hang together now."""
        carriers = {id(module) for module in self.modules.values()}
        steps: dict[str, None] = {}
        for path, module in named.items():
            if id(module) in carriers:
                parts = path.split(".")
                steps |= dict.fromkeys(".".join(parts[:n]) for n in range(1, len(parts) + 1) if path)
        self._links = []
        for path in steps:
            parent, _, name = path.rpartition(".")
            self._links.append((named[parent], name, named[path], path))
        self._checks = None

    @property
    def checks(self) -> list[tuple[dict[Any, Any], Any, Any, str, str]]:
        """See the class; made when first asked for."""
        if self._checks is None:
            self._checks = [
                *self._own(),
                *((vars(m)["_modules"], n, child, p, "module") for m, n, child, p in self._links),
            ]
        return self._checks

    def _own(self) -> list[tuple[dict[Any, Any], Any, Any, str, str]]:
        found: list[tuple[dict[Any, Any], Any, Any, str, str]] = []
        numbers = set(self.hooks)
        for path, module in self.modules.items():
            here = vars(module)
            found += [(here, name, here[name], path, name) for name in self.attributes if name in here]
            for kind in HOOKS:
                mine = numbers & here[kind].keys()
                numbers -= mine
                if mine:
                    found.append((here, kind, here[kind], path, "hook"))
                    found += [(here[kind], number, here[kind][number], path, "hook") for number in mine]
        found += [({}, number, True, "", "hook") for number in numbers]  # gone before anybody looked
        return found

    def lost(self) -> str:
        """What is no longer in place, in words; empty where all is. Modules that others have wrapped are where they were."""
        for where, key, value, path, what in self.checks:
            if where.get(key, _GONE) is not value and not (what == "module" and self._wrapped()):
                place = f" of {path}" if path and what != "module" else f" {path}" if path else ""
                return {"hook": f"a hook{place} was removed", "module": f"the module{place} was replaced"}.get(
                    what, f"the attribute {what!r}{place} was replaced or removed"
                )
        return ""

    def _wrapped(self) -> bool:
        """Whether every module that carries something of ours is still somewhere in the model; notes where."""
        named = dict(self.model.named_modules())
        there = {id(module) for module in named.values()}
        if not all(id(module) in there for module in self.modules.values()):
            return False
        self.find_links(named)
        return True
