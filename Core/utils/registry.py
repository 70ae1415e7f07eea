"""Classes by name, imported when asked for; and the nearest of known names."""

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any, Generic, TypeVar

Base = TypeVar("Base")


def did_you_mean(name: Any, known: Iterable[str], cutoff: float = 0.5) -> str:
    """ "did you mean 'x'?" for the known name nearest to ``name``; empty where none is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)
    return f"did you mean {near[0]!r}?" if near else ""


class Registry(dict[str, "str | type[Base]"], Generic[Base]):
    """Name to class, or to the "module:Class" it is imported from when asked for.

    Args:
        kind: what messages call an entry.
        otherwise: what a name can be beside those of the table, for the message on an unknown one.
    """

    def __init__(self, kind: str, table: Mapping[str, str | type[Base]], otherwise: str = ""):
        super().__init__(table)
        self.kind, self.otherwise = kind, otherwise

    def register(self, name: str, target: str | type[Base]) -> None:
        """Add an entry at run time.

        Raises:
            ValueError: the name is in use.
        """
        if name in self:
            raise ValueError(f"a {self.kind} named {name!r} exists already; choose another name")
        self[name] = target

    def resolve(self, name: str) -> type[Base]:
        """The class behind a name.

        Raises:
            ValueError: no such name; the message has the nearest one and all of them.
        """
        if not isinstance(name, str):
            raise ValueError(f"a {self.kind} is named by a string, got {name!r}")
        if name not in self:
            hint = did_you_mean(name, self, cutoff=0.4)
            listed = f"choose one of {', '.join(sorted(self))}{self.otherwise}"
            raise ValueError(f"unknown {self.kind} {name!r}: {hint and hint + ' '}{listed}")
        target = self[name]
        if not isinstance(target, str):
            return target
        module, _, attribute = target.partition(":")
        return getattr(importlib.import_module(module), attribute)
