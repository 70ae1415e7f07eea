"""Classes by name, imported when asked for; and the nearest of known names."""

import difflib
import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from Core.utils.synonyms import SYNONYMS

Base = TypeVar("Base")
NEAR = 0.66  # share of letters that a slip has in common with what was meant
WORD = re.compile(r"[a-z0-9]+")


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """ "did you mean 'x'?" for the known name that is meant most likely; empty where none is."""
    meant = nearest(str(name), list(known))
    return f"did you mean {meant!r}?" if meant else ""


def nearest(name: str, known: Sequence[str]) -> str:
    """The known name that ``name`` is another word for, a slip of, or a part of, in this order; else empty."""
    plain = {_plain(one): one for one in known}
    synonyms = {
        other: plain[first]
        for other, keys in SYNONYMS.items()
        if (first := next(filter(plain.get, keys), ""))
    }
    candidates = {**synonyms, **plain}
    if synonym := synonyms.get(_plain(name)):
        return synonym
    if near := difflib.get_close_matches(_plain(name), candidates, n=1, cutoff=NEAR):
        return candidates[near[0]]
    words = set(WORD.findall(_plain(name)))
    return min(
        (one for key, one in plain.items() if words and words <= set(WORD.findall(key))), key=len, default=""
    )


def _plain(name: str) -> str:
    """A flag as the key it sets."""
    return name.lstrip("-").replace("-", "_")


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
            hint = did_you_mean(name, self)
            listed = f"choose one of {', '.join(sorted(self))}{self.otherwise}"
            raise ValueError(f"unknown {self.kind} {name!r}: {hint and hint + ' '}{listed}")
        target = self[name]
        if not isinstance(target, str):
            return target
        module, _, attribute = target.partition(":")
        return getattr(importlib.import_module(module), attribute)
