"""Patch this project into an upstream Open-Sora v1.2 checkout, or revert it: patch_opensora.py CHECKOUT [flags].

``Core`` and ``assets/prompts`` go beside the checkout; the training script, configs and shell scripts go inside; the
checkout's sampler module is replaced by one that exports ``Core``'s sampler, and the original is kept beside it. A
manifest in the checkout records every file, so that applying again updates the patch and reverting restores the tree
byte for byte. Files edited since are never overwritten or removed.

Uses only the standard library, so it runs in the checkout's own environment.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MANIFEST = ".vader_patch.json"
SAMPLER = "opensora/schedulers/rf/__init__.py"
ORIGINAL = f"{SAMPLER}.upstream"
NEW_SAMPLER = '''"""VADER's sampler under upstream's names; upstream's own is kept in __init__.py.upstream."""

import sys
from pathlib import Path

from .rectified_flow import RFlowScheduler, timestep_transform

# Core lies beside the checkout, where upstream's own scripts would not look for it.
sys.path.append(str(Path(__file__).resolve().parents[4]))

from Core.schedulers.rf import RFLOW  # noqa: E402

__all__ = ["RFLOW", "RFlowScheduler", "timestep_transform"]
'''
LAYOUT = (
    SAMPLER,
    "opensora/schedulers/rf/rectified_flow.py",
    "opensora/models/stdit/stdit3.py",
    "opensora/models/vae/vae_temporal.py",
    "opensora/utils/inference_utils.py",
    "configs/opensora-v1-2",
)
INSIDE = (
    "scripts/train_t2v_lora.py",
    "scripts/launch.sh",
    "scripts/run_text2video_train.sh",
    "scripts/run_text2video_inference.sh",
    "script/run_text2video_train.sh",
    "script/run_text2video_inference.sh",
    "configs/opensora-v1-2/vader/vader_train.py",
    "configs/opensora-v1-2/vader/vader_inference.py",
)
BESIDE = ("Core", "assets/prompts")


class PatchError(Exception):
    """Nothing was changed; the message says why and what to do."""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wanted_files() -> dict[str, Path]:
    """Path relative to the checkout → the file of this project that belongs there."""
    wanted = {path: ROOT / "Open-Sora" / path for path in INSIDE}
    for folder in BESIDE:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                wanted[f"../{file.relative_to(ROOT)}"] = file
    return wanted


def check_checkout(checkout: Path) -> None:
    """Refuse anything but an upstream Open-Sora v1.2 checkout.

    Raises:
        PatchError: with the reason.
    """
    if not checkout.is_dir():
        raise PatchError(f"there is no folder {str(checkout)!r}; give the path of an Open-Sora v1.2 checkout")
    if checkout == ROOT / "Open-Sora":
        raise PatchError(
            f"{str(checkout)!r} is this project's own Open-Sora, which needs no patch; give an upstream checkout"
        )
    setup = checkout / "setup.py"
    version = (
        re.search(r"version\s*=\s*[\"']([^\"']+)", setup.read_text(encoding="utf-8"))
        if setup.is_file()
        else None
    )
    if version and not re.fullmatch(r"v?1\.2(\.\d+)?", version[1]):
        raise PatchError(
            f"{str(checkout)!r} is Open-Sora {version[1]}, but the patch fits 1.2; run `git checkout v1.2.0` there"
        )
    missing = [path for path in LAYOUT if not (checkout / path).exists()]
    if missing:
        raise PatchError(
            f"{str(checkout)!r} is not an Open-Sora v1.2 checkout: it lacks {', '.join(missing)}; give the folder that "
            "holds opensora/ and configs/opensora-v1-2/"
        )
    sampler = (checkout / SAMPLER).read_text(encoding="utf-8")
    if "class RFLOW" not in sampler and not (checkout / MANIFEST).exists():
        raise PatchError(
            f"{str(checkout / SAMPLER)!r} defines no class RFLOW, so it is not upstream's; run "
            f"`git checkout v1.2.0 -- {SAMPLER}` there"
        )


@dataclass
class Patch:
    """What the manifest records of this project in a checkout.

    files: path relative to the checkout → hash of what was written. folders: folders created. original: hash of
    upstream's sampler.
    """

    checkout: Path
    original: str
    files: dict[str, str] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, checkout: Path) -> "Patch":
        try:
            stored = json.loads((checkout / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls(checkout, sha256((checkout / SAMPLER).read_bytes()))
        return cls(checkout, **stored)

    @property
    def is_applied(self) -> bool:
        return (self.checkout / MANIFEST).exists()

    def write(self) -> None:
        stored = {"original": self.original, "files": self.files, "folders": self.folders}
        text = json.dumps(stored, indent=1) + "\n"
        replace_file(self.checkout / MANIFEST, text.encode())

    def hash_of(self, path: str) -> str | None:
        """Current hash of a file; None if it does not exist."""
        file = self.checkout / path
        return sha256(file.read_bytes()) if file.is_file() else None

    def is_ours(self, path: str) -> bool:
        """Whether a file is unchanged since this project wrote it."""
        return path in self.files and self.hash_of(path) == self.files[path]


@dataclass(frozen=True)
class Action:
    """One change to one file; ``verb`` is shown to the user."""

    verb: str
    path: str
    data: bytes | None = None
    mode: int | None = None

    def show(self, patch: Patch) -> str:
        return f"{self.verb:<8} {os.path.normpath(os.path.join(patch.checkout.name, self.path))}"


def plan_apply(patch: Patch) -> list[Action]:
    """Actions that bring the checkout up to date; empty if it already is.

    Raises:
        PatchError: a file that is not from this project is in the way.
    """
    wanted = wanted_files()
    actions = [
        action for path, source in wanted.items() if (action := plan_file(patch, path, source)) is not None
    ]
    foreign = [action.path for action in actions if action.verb == "blocked"]
    if foreign:
        raise PatchError(
            f"{len(foreign)} files that are not from here stand in the way in {str(patch.checkout)!r}: "
            f"{', '.join(foreign[:5])}; move them away and run this again"
        )
    gone = [path for path in patch.files if path not in wanted and path != SAMPLER and patch.is_ours(path)]
    actions += [Action("remove", path) for path in gone]
    return actions + plan_sampler(patch)


def plan_file(patch: Patch, path: str, source: Path) -> Action | None:
    data, now = source.read_bytes(), patch.hash_of(path)
    if now == sha256(data):
        return None
    if now is None:
        return Action("add", path, data, source.stat().st_mode)
    if patch.is_ours(path):
        return Action("update", path, data, source.stat().st_mode)
    return Action("keep" if path in patch.files else "blocked", path)


def plan_sampler(patch: Patch) -> list[Action]:
    now, data = patch.hash_of(SAMPLER), NEW_SAMPLER.encode()
    if now == sha256(data):
        return []
    if now == patch.original or patch.is_ours(SAMPLER):
        return [Action("replace", SAMPLER, data, (patch.checkout / SAMPLER).stat().st_mode)]
    return [Action("keep", SAMPLER)]


def apply(patch: Patch, actions: list[Action]) -> None:
    """Carry out a plan. The manifest is written first, so that an interrupted run can be finished or reverted."""
    for action in actions:
        if action.data is not None:
            patch.files[action.path] = sha256(action.data)
            patch.folders += [
                f for f in missing_folders(patch.checkout, action.path) if f not in patch.folders
            ]
        if action.verb == "remove":
            del patch.files[action.path]
    patch.write()
    for action in actions:
        file = patch.checkout / action.path
        if action.verb == "remove":
            file.unlink()
        if action.verb == "replace" and not (patch.checkout / ORIGINAL).exists():
            shutil.copy2(file, patch.checkout / ORIGINAL)
        if action.data is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, action.data, action.mode)


def missing_folders(checkout: Path, path: str) -> Iterator[str]:
    """Missing parent folders of a file, relative to the checkout."""
    for parent in Path(path).parents:
        if not (checkout / parent).exists():
            yield str(parent)


def replace_file(file: Path, data: bytes, mode: int | None = None) -> None:
    """Write a file atomically."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(data)
    if mode is not None:
        partial.chmod(mode & 0o777)
    os.replace(partial, file)


def plan_revert(patch: Patch) -> list[Action]:
    """Actions that remove this project from the checkout; edited files stay.

    Raises:
        PatchError: the replaced sampler was edited, so restoring the original would lose work.
    """
    if not patch.is_ours(SAMPLER) and patch.hash_of(SAMPLER) != patch.original:
        raise PatchError(
            f"{str(patch.checkout / SAMPLER)!r} was edited since it was patched; save your edits elsewhere, run "
            f"`cp {ORIGINAL} {SAMPLER}` there, and run this again"
        )
    actions = [Action("restore", SAMPLER)] if (patch.checkout / ORIGINAL).exists() else []
    for path in patch.files:
        if path != SAMPLER and patch.hash_of(path) is not None:
            actions.append(Action("remove" if patch.is_ours(path) else "keep", path))
    return actions


def revert(patch: Patch, actions: list[Action]) -> None:
    """Carry out a plan from ``plan_revert``, and remove the patch's folders and manifest."""
    for action in actions:
        if action.verb == "restore":
            os.replace(patch.checkout / ORIGINAL, patch.checkout / SAMPLER)
        if action.verb == "remove":
            (patch.checkout / action.path).unlink()
    for folder in sorted(patch.folders, key=len, reverse=True):
        path = patch.checkout / folder
        shutil.rmtree(path / "__pycache__", ignore_errors=True)
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    (patch.checkout / MANIFEST).unlink()


def run(checkout: Path, *, dry_run: bool, reverting: bool) -> None:
    """Show a plan and, unless ``dry_run``, carry it out."""
    check_checkout(checkout)
    patch = Patch.read(checkout)
    if reverting and not patch.is_applied:
        raise PatchError(f"{str(checkout)!r} is not patched: it holds no {MANIFEST}")
    actions = plan_revert(patch) if reverting else plan_apply(patch)
    for action in actions:
        print(action.show(patch))
    kept = sum(action.verb == "keep" for action in actions)
    if kept:
        print(f"{kept} files were edited since patching and stay as they are")
    if dry_run:
        print("dry run: nothing was changed")
    elif reverting:
        revert(patch, actions)
        print("the patch is off")
    elif len(actions) == kept and patch.is_applied:
        print("the patch is on already")
    else:
        apply(patch, actions)
        print(f"the patch is on; next: sh {checkout / 'script' / 'run_text2video_train.sh'} --help")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="folder of an upstream Open-Sora v1.2 checkout")
    parser.add_argument("--dry-run", action="store_true", help="only show what would change")
    parser.add_argument("--revert", action="store_true", help="revert the patch")
    args = parser.parse_args()
    try:
        run(args.checkout.expanduser().resolve(), dry_run=args.dry_run, reverting=args.revert)
    except PatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; make the checkout and the folder around it writable", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
