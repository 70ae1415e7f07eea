"""Estimate every family at its sizes, and write the tables of docs/memory.md and docs/families.

`python scripts/write_memory_table.py` takes the names of rows to renew.

Nothing is measured on a card: the figures are those of `vader estimate`. `docs/estimates/memory.json` keeps them;
beside it are the comparisons with real steps (scripts/check_estimate.py --json docs/estimates/check.json) and with
what authors report (scripts/check_reported_speed.py --json docs/estimates/reported.json).
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "Open-Sora")]

from Core.config import load_config  # noqa: E402
from Core.estimate.cards import CARDS, device_bytes  # noqa: E402
from Core.estimate.command import GIB  # noqa: E402
from Core.estimate.fake_run import FakeRun, fake_run  # noqa: E402
from Core.utils.files import write_whole  # noqa: E402

PAGE = ROOT / "docs" / "memory.md"
FIGURES = ROOT / "docs" / "estimates" / "memory.json"
CHECK = ROOT / "docs" / "estimates" / "check.json"
REPORTED = ROOT / "docs" / "estimates" / "reported.json"
TABLE = "(<!-- {}: [^\n]*-->\n)(.*?)(<!-- end -->)"
OPENSORA = "Open-Sora/configs/opensora-v1-2/vader/vader_train.py"
PICTURE = ROOT / "assets" / "before_after.png"
FROM_A_PICTURE = f'a fox wakes up {{"reference_path": "{PICTURE}"}}'
# Row → processes, of those that need several.
SHARDED = "Wan 2.1 14B, 480p, 81 frames, each of 4 sharded"
SHARDED_BY_PARTS = f"{SHARDED}, parts, VAE in bf16"
PROCESSES = {SHARDED: 4, SHARDED_BY_PARTS: 4}
# Row → config and flags.
RUNS: dict[str, tuple[str, ...]] = {
    **{
        f"Open-Sora 1.2, {size}, 2 s": (OPENSORA, "--resolution", size)
        for size in ("240p", "360p", "480p", "720p")
    },
    "Wan 2.1 1.3B, 480p, 81 frames": ("configs/wan/t2v_1_3b.py",),
    "Wan 2.2 TI2V-5B, 704p, 121 frames": ("configs/wan/ti2v_5b.py",),
    "Wan 2.1 14B, 480p, 81 frames": ("configs/wan/t2v_14b.py",),
    SHARDED: ("configs/wan/t2v_14b.py", "--shard-frozen", "True"),
    SHARDED_BY_PARTS: (
        *("configs/wan/t2v_14b.py", "--shard-frozen", "True", "--grad-checkpoint", "parts"),
        *("--vae-dtype", "bf16"),
    ),
    "Wan 2.1 14B distilled, 480p, 81 frames": ("configs/wan/t2v_14b_4_steps.py", "--base-adapters", "[]"),
    "Wan 2.1 14B, 720p, 81 frames": ("configs/wan/t2v_14b_720p.py",),
    "Wan 2.2 A14B, 480p, 81 frames": ("configs/wan/t2v_a14b.py",),
    "Wan 2.2 I2V A14B, 480p, 81 frames": ("configs/wan/i2v_a14b.py", "--prompt", FROM_A_PICTURE),
    "HunyuanVideo 1.5, 480p, 121 frames": ("configs/hunyuan_video15/t2v_480p.py",),
    "HunyuanVideo 1.5, 720p, 121 frames": ("configs/hunyuan_video15/t2v_720p.py",),
    "LTX-Video 2B, 512p, 4 s": ("configs/ltx/ltx_video.py",),
    "CogVideoX 2B, 480p, 6 s": ("configs/cogvideox/2b.py",),
    "CogVideoX 5B, 480p, 6 s": ("configs/cogvideox/5b.py",),
    "ModelScope 1.7B, 256p, 16 frames": ("configs/modelscope/t2v_256p.py",),
}


def figures(run: FakeRun, videos: int) -> dict[str, Any]:
    return {
        "videos": videos,
        "networks": run.networks,
        "peaks": {name: phase.peak for name, phase in run.phases.items()},
        "operations": sum(phase.operations for phase in run.step.values()),
        "seconds": {
            name: sum(card.seconds(phase.work) for phase in run.step.values()) for name, card in CARDS.items()
        },
    }


def row(name: str, found: Mapping[str, Any]) -> str:
    """Text, networks and fullest phase of training in GiB, then a step's videos and seconds where it fits."""
    peaks = dict(found["peaks"])
    text = peaks.pop("text")
    fullest = max(peaks, key=lambda phase: peaks[phase])
    needed = device_bytes(max(text, peaks[fullest]))
    cells = [name, f"{text / GIB:.1f}", f"{found['networks'] / GIB:.1f}", f"{peaks[fullest] / GIB:.1f}"]
    cells += [f"`{fullest}`", f"{needed / GIB:.1f}", str(found["videos"])]
    for card in CARDS.values():
        cells.append(f"{found['seconds'][card.name]:.0f}" if needed <= card.memory else "–")
    return f"| {' | '.join(cells)} |"


def memory_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    heads = ["run", "text", "networks", "peak", "in", "card needs", "videos", *CARDS]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    return "\n".join([*lines, *(row(name, found[name]) for name in RUNS if name in found)])


def family_table(family: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """What a card needs for each run of a family."""
    lines = ["| run | a card needs, predicted |", "| --- | --- |"]
    for name, (config, *_) in RUNS.items():
        if Path(config).parent.name == family and name in found:
            needed = device_bytes(max(found[name]["peaks"].values()))
            lines.append(f"| {name} | {needed / GIB:.1f} GiB |")
    return "\n".join(lines)


def check_table(found: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| run | peak, estimated | measured | | operations |", "| --- | --- | --- | --- | --- |"]
    for one in found:
        ratio = one["estimated_peak"] / one["measured_peak"] - 1
        same = one["estimated_operations"] == one["counted_operations"]
        lines.append(
            f"| {one['name']} | {one['estimated_peak'] / 1e6:.1f} MB | {one['measured_peak'] / 1e6:.1f} MB | "
            f"{ratio:+.1%} | {'equal' if same else 'differ'} |"
        )
    return "\n".join(lines)


def reported_table(found: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| one video of | card | estimated | its authors report | |", "| --- | --- | --- | --- | --- |"]
    for one in found:
        ratio = "–" if one["bound"] else f"{one['estimated'] / one['seconds'] - 1:+.0%}"
        lines.append(
            f"| {one['model']}, {one['steps']} steps | {one['card']} | {one['estimated']:.0f} s | "
            f"[{one['words']}]({one['source']}) | {ratio} |"
        )
    return "\n".join(lines)


def write_pages() -> None:
    found, check, reported = (
        json.loads(file.read_text(encoding="utf-8")) for file in (FIGURES, CHECK, REPORTED)
    )
    tables = {
        "memory": memory_table(found),
        "check": check_table(check),
        "reported": reported_table(reported),
    }
    write_tables(PAGE, tables)
    for page in (ROOT / "docs" / "families").glob("*.md"):
        write_tables(page, {page.stem: family_table(page.stem, found)})


def write_tables(path: Path, tables: Mapping[str, str]) -> None:
    """Replace the tables of a page, each between its own comment and the end."""
    page = path.read_text(encoding="utf-8")
    for name, table in tables.items():
        pattern = re.compile(TABLE.format(name), re.DOTALL)
        page = pattern.sub(lambda m, table=table: f"{m[1]}\n{table}\n\n{m[3]}", page)  # type: ignore[misc]
    write_whole(path, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "names", nargs="*", metavar="RUN", help="rows to renew (default: all; `none` for no row)"
    )
    names = parser.parse_args().names
    for name in [name for name in RUNS if not names or name in names]:
        config, *flags = RUNS[name]
        began = time.process_time()
        loaded, processes = load_config([str(ROOT / config), *flags]), PROCESSES.get(name, 1)
        new = figures(fake_run(loaded, processes), loaded.optimizer.global_batch(processes))
        print(row(name, new), f"estimated in {time.process_time() - began:.0f} s", flush=True)
        # Read again for every row, since another process may have added to it.
        found = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}
        found[name] = new
        ordered = {name: found[name] for name in RUNS if name in found}
        write_whole(FIGURES, json.dumps(ordered, indent=1) + "\n")
    write_pages()


if __name__ == "__main__":
    main()
