"""Classes by name, imported when they are asked for."""

import difflib
import importlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any


def did_you_mean(name: object, known: Collection[str], cutoff: float = 0.5) -> str:
    """``did you mean 'x'?`` for the known name nearest to ``name``; empty where none is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)
    return f"did you mean {near[0]!r}?" if near else ""


class Registry(Mapping[str, Any]):
    """Name → class, or ``"module:Class"`` imported by ``resolve``.

    Args:
        kind: what the classes are, for messages.
    """

    def __init__(self, kind: str, table: Mapping[str, Any]):
        self.kind = kind
        self.table = dict(table)

    def __getitem__(self, name: str) -> Any:
        return self.table[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)

    def register(self, name: str, target: Any) -> None:
        """Add a class or ``"module:Class"`` at run time.

        Raises:
            ValueError: the name is in use.
        """
        if name in self.table:
            raise ValueError(f"a {self.kind} named {name!r} exists already; choose another name")
        self.table[name] = target

    def resolve(self, name: str) -> Any:
        """The class behind a name.

        Raises:
            ValueError: there is none; the message names those there are.
        """
        if not isinstance(name, str) or name not in self.table:
            hint = did_you_mean(name, self.table)
            raise ValueError(
                f"unknown {self.kind} {name!r}: {hint}{' ' if hint else ''}choose one of {', '.join(self.table)}"
            )
        target = self.table[name]
        if isinstance(target, str):
            module, _, attribute = target.partition(":")
            return getattr(importlib.import_module(module), attribute)
        return target
