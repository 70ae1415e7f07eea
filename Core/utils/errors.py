"""Errors whose message is for the user."""

from collections.abc import Sequence


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, one sentence each."""

    def __init__(self, errors: Sequence[str]):
        super().__init__("\n".join(errors))
        self.errors = list(errors)


class IncompleteError(RuntimeError):
    """Some videos could not be made; those that could are there."""
