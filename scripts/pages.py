"""Sections of the documentation that scripts write, each between two marks."""

from collections.abc import Sequence


def with_section(page: str, begin: str, end: str, parts: Sequence[str]) -> str:
    """``page`` with ``parts`` between the marks; the section stands at its end if it is not there yet."""
    head, _, rest = page.partition(begin)
    tail = rest.partition(end)[2] or "\n"
    return "\n\n".join([head.rstrip(), begin, *parts, end]) + tail
