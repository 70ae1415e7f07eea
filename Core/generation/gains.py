"""What an adapter gained, as an evaluation or the quickstart has measured and written it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from Core.utils.files import read_object

# Where a run's results lie, relative to its folder: those of ``vader evaluate``, and of the quickstart.
PLACES = (Path("evaluation") / "evaluation.json", Path("before_after.json"))
NUMBERS = ("before", "after", "gain", "low", "high")


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Means of one measure without and with the adapter, and the paired difference with its 95% interval.

    prompts: which ones, such as ``held-out``; '' where the results do not say.
    """

    measure: str
    prompts: str
    videos: int
    before: float
    after: float
    gain: float
    low: float
    high: float


def find_results(run: Path) -> Path | None:
    """The file of results in a run's folder."""
    return next((run / place for place in PLACES if (run / place).is_file()), None)


def read_gains(file: Path, digest: str) -> list[Gain]:
    """The gains of one adapter.

    Args:
        digest: the adapter's, as ``jobs.fingerprint`` gives it and evaluations record it.

    Raises:
        ValueError, OSError: no results in ``file``, or those of other adapters.
    """
    result = read_object(file)
    try:
        found = _of_evaluation(result, digest) if "summary" in result else _of_quickstart(result)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} holds no results; give the evaluation.json that `vader evaluate` writes"
        ) from error
    if not found:
        raise ValueError(
            f"{file} has results of other adapters; evaluate this one, or give its results by --results"
        )
    return found


def _of_evaluation(result: Mapping[str, Any], digest: str) -> list[Gain]:
    names = {entry["name"] for entry in result["adapters"] if entry["adapter_sha256"] == digest}
    rows = [row for row in result["summary"] if row["adapter"] in names]
    return [_gain(row["measure"], row["prompts_are"], row) for row in rows]


def _of_quickstart(result: Mapping[str, Any]) -> list[Gain]:
    return [
        _gain(name.replace("_", " "), "held-out", row)
        for name, row in result.items()
        if isinstance(row, dict) and "gain" in row
    ]


def _gain(measure: str, prompts: str, row: Mapping[str, Any]) -> Gain:
    return Gain(measure=measure, prompts=prompts, videos=row["videos"], **{key: row[key] for key in NUMBERS})
