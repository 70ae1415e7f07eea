"""What a command ends with, and what it says then. Imports nothing that takes time."""

import os
import sys
from collections.abc import Callable, Sequence

from Core.utils.errors import ConfigError, IncompleteError, memory_errors
from Core.utils.process import INTERRUPTED

LOST_PROCESS = (
    "another process of the run is gone, and this one cannot go on alone; what that process or its node wrote last "
    "says why, and the same command continues from what is saved"
)


def exit_code(action: Callable[[], object]) -> int:
    """Exit code of ``action``: 2 when the user has something to change, 1 when videos are missing, 3 when the
    memory is too small, 4 when another process of the run is gone, 130 after Ctrl-C.

    Each is explained on the standard error stream, one sentence per problem; what is wrong with a configuration
    by one process of a machine.
    """
    try:
        action()
    except ConfigError as error:
        return answer(2, error.errors if _speaks() else [])
    except BrokenPipeError:
        raise
    except OSError as error:
        return answer(2, [_in_words(error)])
    except ValueError as error:
        return answer(2, [str(error)])
    except IncompleteError as error:
        return answer(1, [str(error)])
    except memory_errors() as error:
        return answer(3, [str(error)])
    except RuntimeError as error:
        if not _lost_a_process(error):
            raise
        return answer(4, [LOST_PROCESS])
    except KeyboardInterrupt:
        return answer(130, [INTERRUPTED] if _speaks() else [])
    return 0


def answer(code: int, sentences: Sequence[str]) -> int:
    """Print the sentences as errors; returns ``code``."""
    for sentence in sentences:
        print(f"error: {sentence}", file=sys.stderr)
    return code


def _in_words(error: OSError) -> str:
    """The sentence of an error; for one of the operating system's own, the path and what it says of that."""
    if error.filename is None or not error.strerror:
        return str(error)
    return f"{os.fspath(error.filename)!r}: {error.strerror.lower()}"


def _lost_a_process(error: RuntimeError) -> bool:
    """Whether ``error`` says that another process of the run does not answer any more."""
    # torch's kind has this name; gloo's are plain RuntimeErrors, which name its own source.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in kinds or "gloo/transport" in str(error)


def _speaks() -> bool:
    """Whether this is the process of its machine that speaks for all."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
