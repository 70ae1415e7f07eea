"""Errors whose message is for the user."""

import sys
from collections.abc import Sequence


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, one sentence each."""

    def __init__(self, errors: Sequence[str]):
        super().__init__("\n".join(errors))
        self.errors = list(errors)


def memory_errors() -> tuple[type[BaseException], ...]:
    """What running out of memory raises: Python's own error, and PyTorch's once it has been imported."""
    torch = sys.modules.get("torch")
    return (MemoryError, torch.OutOfMemoryError) if torch else (MemoryError,)


def without_frames(error: Exception) -> Exception:
    """The same error without the frames it went through, which keep their tensors alive."""
    cause: BaseException | None = error
    while cause is not None:
        cause.__traceback__ = None
        cause = cause.__context__
    return error


class IncompleteError(RuntimeError):
    """Some videos could not be made; those that could are there."""
