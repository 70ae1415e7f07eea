"""Prove on a GPU what this project says of itself: prove.py [--json FILE].

Runs parts one after the other, each in a process of its own with its own time limit, at most nine minutes in all. A
part that fails or is stopped does not keep the next from running. The results are one JSON file, whole after every
part. Networks have random weights and their full size; nothing is downloaded. Without a GPU, everything runs at small
sizes.

    prove.py                                   build/gpu/gpu.json
    prove.py --json docs/benchmarks/gpu.json   for docs/performance.md, written by scripts/benchmark.py --write-docs
    prove.py --only phases plain               these parts alone
    prove.py --add --only predictor            this part anew, keeping what else the file holds
    prove.py --list                            the parts
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora")]

from Core.utils.files import read_object, write_whole  # noqa: E402
from scripts.gpu.parts import BY_NAME, LEAST_SECONDS, PARTS, TOTAL_SECONDS, Part  # noqa: E402

LAST_LINES = 30  # of what a part printed, where it did not end well
GRACE = 5  # seconds from SIGTERM to SIGKILL
OF_MACHINE = ("commit", "hardware", "versions")  # the machine part's, wanted at the top


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "gpu" / "gpu.json", metavar="FILE")
    parser.add_argument("--only", nargs="+", choices=list(BY_NAME), metavar="PART", help="parts to run")
    parser.add_argument("--add", action="store_true", help="keep the other parts that FILE holds")
    parser.add_argument("--small", action="store_true", help="small sizes; without a GPU always so")
    parser.add_argument(
        "--total", type=float, default=TOTAL_SECONDS, help=f"seconds in all (default {TOTAL_SECONDS})"
    )
    parser.add_argument("--list", action="store_true", help="print the parts and stop")
    args = parser.parse_args(argv)
    if args.add and not args.json.is_file():
        parser.error(f"--add keeps what {args.json} holds, and there is no such file; leave --add out")
    if args.total <= 0:
        parser.error(f"--total must be above 0 seconds, got {args.total:g}")
    return args


class Proof:
    """Parts run one by one, and the file that holds their results.

    Args:
        command: to run one part, to which its name, the file for its results and flags are added.
    """

    def __init__(
        self, file: Path, small: bool, total: float, command: Sequence[str], argv: Sequence[str] = ()
    ):
        self.file, self.small, self.total, self.command = file, small, total, list(command)
        self.started = time.monotonic()
        self.result: dict[str, Any] = {
            "kind": "proof",
            "preset": "small sizes" if small else "full size",
            "small": small,
            "command": " ".join(["python scripts/gpu/prove.py", *argv]),
            "parts": {},
        }

    def add_to(self, kept: dict[str, Any]) -> None:
        """Keep what an earlier run measured, its size and its command."""
        self.result, self.small = kept, kept["small"]

    @property
    def left(self) -> float:
        return self.total - (time.monotonic() - self.started)

    def run(self, parts: Sequence[Part]) -> dict[str, Any]:
        """Run ``parts`` in order; returns what the file holds."""
        for part in parts:
            if self.left < min(LEAST_SECONDS, part.limit):
                outcome: dict[str, Any] = {"status": "no time left"}
            else:
                outcome = self.run_part(part, min(part.limit, self.left))
            self.keep(part, outcome)
        return self.result

    def keep(self, part: Part, outcome: dict[str, Any]) -> None:
        self.result["parts"][part.name] = {"shows": part.shows, "limit": part.limit, **outcome}
        if part.name == "machine":
            self.result |= {
                key: outcome["result"][key] for key in OF_MACHINE if key in outcome.get("result", {})
            }
        self.result["seconds"] = round(
            sum(kept.get("seconds", 0) for kept in self.result["parts"].values()), 1
        )
        save(self.file, self.result)
        print(f"{part.name:12} {outcome['status']:14} {outcome.get('seconds', 0):6.1f} s", flush=True)

    def run_part(self, part: Part, limit: float) -> dict[str, Any]:
        """Status (``done``, ``failed``, ``stopped``), seconds, what it measured, and its last lines if not done."""
        with tempfile.TemporaryDirectory() as folder:
            measured, log = Path(folder) / "result.json", Path(folder) / "log.txt"
            flags = ["--small"] if self.small else []
            started = time.monotonic()
            with log.open("wb") as stream:
                code = run_limited([*self.command, part.name, str(measured), *flags], limit, stream)
            outcome: dict[str, Any] = {
                "status": {None: "stopped", 0: "done"}.get(code, "failed"),
                "seconds": round(time.monotonic() - started, 1),
                "result": json.loads(measured.read_text(encoding="utf-8")) if measured.exists() else {},
            }
            if code != 0:
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
                outcome["log"] = lines[-LAST_LINES:]
        return outcome


def run_limited(command: Sequence[str], limit: float, stream: Any) -> int | None:
    """Exit status of ``command``; None where it and all it started were stopped after ``limit`` seconds."""
    paths = os.pathsep.join(
        [str(ROOT), str(ROOT / "Open-Sora"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"},
        stdout=stream,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end_group(process)


def end_group(process: subprocess.Popen) -> None:
    """End what is left of a process and of those it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def save(file: Path, result: dict[str, Any]) -> None:
    """Write the file in one go."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(result, indent=1) + "\n")


def has_gpu() -> bool:
    """Asked in another process, so that this one holds no memory of the card."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code]).returncode == 0


def end_on_sigterm() -> None:
    """Have SIGTERM, as at a queue's time limit, unwind this process, so that no part stays behind on the card."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def recorded(argv: Sequence[str]) -> list[str]:
    """The arguments without the name of the file, which is of no interest to others."""
    if "--json" not in argv:
        return list(argv)
    place = list(argv).index("--json")
    return [*argv[:place], *argv[place + 2 :]]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.list:
        print("\n".join(f"{part.name:12} {part.limit:4.0f} s  {part.shows}" for part in PARTS))
        return 0
    end_on_sigterm()
    on_gpu = has_gpu()
    parts = [part for part in PARTS if args.only is None or part.name in args.only]
    command = [sys.executable, "-m", "scripts.gpu.part"]
    proof = Proof(args.json, args.small or not on_gpu, args.total, command, recorded(argv))
    if args.add:
        try:
            proof.add_to(read_object(args.json))
        except (ValueError, KeyError) as error:
            print(f"error: {args.json} holds no proof to add to: {error}; leave --add out", file=sys.stderr)
            return 2
    lacking = [part.name for part in parts if part.needs_gpu and not (on_gpu or proof.small)]
    if lacking:
        print(
            f"error: {', '.join(lacking)} cannot be added without a GPU; choose others by --only",
            file=sys.stderr,
        )
        return 2
    if proof.small:
        print("small sizes: the figures say nothing of a GPU")
    result = proof.run(parts)
    print(f"{args.json}: {result['seconds']:.0f} s in all")
    return int(any(result["parts"][part.name]["status"] == "failed" for part in parts))


if __name__ == "__main__":
    sys.exit(main())
