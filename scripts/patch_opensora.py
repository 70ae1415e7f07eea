"""Patch this project into an upstream Open-Sora v1.2 checkout, or revert it: patch_opensora.py CHECKOUT [flags].

All of it goes inside the checkout, and no file of upstream's is changed. A manifest records every file, so that
applying again updates the patch and reverting removes it. Files edited since are never overwritten or removed.

Uses only the standard library, so it runs in the checkout's own environment.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MANIFEST, PARTIAL = ".vader_patch.json", ".vader_patch.partial"
# What tells Open-Sora v1.2 from other versions, whose setup.py may say 1.2.0 as well: files, and what they hold.
LAYOUT = {
    "opensora/schedulers/rf/rectified_flow.py": b"def timestep_transform",
    "opensora/models/stdit/stdit3.py": b"class STDiT3",
    "opensora/models/vae/vae_temporal.py": b"class VAE_Temporal",
    "opensora/models/text_encoder/t5.py": b"class T5Embedder",
    "opensora/utils/inference_utils.py": b"def prepare_multi_resolution_info",
}
INSIDE = (
    "scripts/train_t2v_lora.py",
    "scripts/launch.sh",
    *(
        f"{folder}/run_text2video_{task}.sh"
        for folder in ("scripts", "script")
        for task in ("train", "inference")
    ),
    *(f"configs/opensora-v1-2/vader/vader_{task}.py" for task in ("train", "inference")),
)


class PatchError(Exception):
    """Nothing was changed; the message says why and what to do."""


def check_checkout(checkout: Path) -> None:
    """Refuse anything but an upstream Open-Sora v1.2 checkout.

    Raises:
        PatchError: with the reason.
    """
    name = repr(str(checkout))
    if checkout == ROOT / "Open-Sora":
        raise PatchError(f"{name} is this project's own and needs no patch; give an upstream checkout")
    if (checkout / "configs/opensora-v1-3").exists():
        raise PatchError(f"{name} is Open-Sora v1.3; run `git checkout v1.2.0` there")
    for path, mark in LAYOUT.items():
        file = checkout / path
        if not file.is_file() or mark not in file.read_bytes():
            raise PatchError(
                f"{name} is not an Open-Sora v1.2 checkout: it lacks {path} with {mark.decode()!r}; give the folder "
                "that holds opensora/, and run `git checkout v1.2.0` there if it is of another version"
            )


def wanted_files() -> dict[str, tuple[bytes, int]]:
    """Path relative to the checkout → content and mode of this project's file that belongs there."""
    sources = {path: ROOT / "Open-Sora" / path for path in INSIDE}
    for folder in ("Core", "assets/prompts"):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                sources[file.relative_to(ROOT).as_posix()] = file
    wanted = {path: (file.read_bytes(), file.stat().st_mode & 0o777) for path, file in sources.items()}
    for path in INSIDE:  # there, assets lie one folder closer to the configs than here
        wanted[path] = wanted[path][0].replace(b"/../../../../assets/", b"/../../../assets/"), wanted[path][1]
    return wanted


@dataclass
class Patch:
    """What the manifest records of this project in a checkout.

    files: path → hashes of all that was written there, so that a half-finished update is still known as ours.
    folders: those that were created.
    """

    checkout: Path
    files: dict[str, list[str]] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, checkout: Path) -> "Patch":
        manifest = checkout / MANIFEST
        if not manifest.exists():
            return cls(checkout)
        try:
            patch = cls(checkout, **json.loads(manifest.read_bytes()))
            parts = [part for path in (*patch.files, *patch.folders) for part in Path(path).parts]
            if {"..", "/"} & set(parts) or not all(isinstance(own, list) for own in patch.files.values()):
                raise ValueError("it names paths outside or no hashes")
        except (ValueError, TypeError, AttributeError) as error:
            raise PatchError(
                f"{str(manifest)!r} is damaged ({error}); restore it, or remove it and, by hand, what is new there "
                "(`git clean -nd` lists it), and run this again"
            ) from error
        return patch

    def put(self, path: str, data: bytes, mode: int) -> None:
        """Write a file in one step."""
        partial = self.checkout / PARTIAL
        partial.write_bytes(data)
        partial.chmod(mode)
        os.replace(partial, self.checkout / path)

    def remove(self, plan: list[tuple[str, str]]) -> None:
        for path in (path for verb, path in plan if verb == "remove"):
            (self.checkout / path).unlink()

    def holds(self, path: str, hashes: list[str]) -> bool:
        """Whether a file is there with one of these contents."""
        file = self.checkout / path
        return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() in hashes


def plan_apply(patch: Patch) -> list[tuple[str, str]]:
    """(verb, path) of each change that brings the checkout up to date, and of each edited file that stays.

    Raises:
        PatchError: a file that is not from this project is in the way.
    """
    wanted = wanted_files()
    plan = [(plan_file(patch, path, data), path) for path, (data, _) in wanted.items()]
    if foreign := [path for verb, path in plan if verb == "blocked"]:
        raise PatchError(
            f"{len(foreign)} files that are not from here stand in the way in {str(patch.checkout)!r}: "
            f"{', '.join(foreign[:5])}; move them away and run this again"
        )
    gone = [path for path, own in patch.files.items() if path not in wanted and patch.holds(path, own)]
    return [(verb, path) for verb, path in plan if verb] + [("remove", path) for path in gone]


def plan_file(patch: Patch, path: str, data: bytes) -> str:
    """What to do to one file; '' if nothing."""
    if patch.holds(path, [hashlib.sha256(data).hexdigest()]):
        return ""
    if patch.holds(path, patch.files.get(path, [])):
        return "update"
    if os.path.lexists(patch.checkout / path):
        return "keep" if path in patch.files else "blocked"
    existing = next(parent for parent in (patch.checkout / path).parents if os.path.lexists(parent))
    return "add" if existing.is_dir() else "blocked"


def apply(patch: Patch, plan: list[tuple[str, str]]) -> None:
    """Carry out a plan. The manifest is written first, so that an interrupted run can be finished or reverted."""
    wanted = wanted_files()
    written = [path for verb, path in plan if verb in ("add", "update")]
    for path in written:
        patch.files.setdefault(path, []).append(hashlib.sha256(wanted[path][0]).hexdigest())
        new = [str(parent) for parent in Path(path).parents if not (patch.checkout / parent).exists()]
        patch.folders += [folder for folder in new if folder not in patch.folders]
    stored = {"files": patch.files, "folders": patch.folders}
    patch.put(MANIFEST, (json.dumps(stored, indent=1) + "\n").encode(), 0o644)
    for path in written:
        (patch.checkout / path).parent.mkdir(parents=True, exist_ok=True)
        patch.put(path, *wanted[path])
    patch.remove(plan)


def plan_revert(patch: Patch) -> list[tuple[str, str]]:
    """(verb, path) of each of this project's files that is there; edited ones stay."""
    there = {path: own for path, own in patch.files.items() if os.path.lexists(patch.checkout / path)}
    return [("remove" if patch.holds(path, own) else "keep", path) for path, own in there.items()]


def revert(patch: Patch, plan: list[tuple[str, str]]) -> None:
    """Carry out a plan, and remove the patch's folders and manifest."""
    patch.remove(plan)
    for folder in sorted(patch.folders, key=len, reverse=True):
        path = patch.checkout / folder
        shutil.rmtree(path / "__pycache__", ignore_errors=True)
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    (patch.checkout / PARTIAL).unlink(missing_ok=True)
    (patch.checkout / MANIFEST).unlink()


def run(checkout: Path, *, dry_run: bool, reverting: bool) -> None:
    """Show a plan and, unless ``dry_run``, carry it out."""
    if not checkout.is_dir():
        raise PatchError(f"there is no folder {str(checkout)!r}; give the path of an Open-Sora v1.2 checkout")
    patched = (checkout / MANIFEST).exists()
    if reverting and not patched:
        raise PatchError(f"{str(checkout)!r} is not patched: it holds no {MANIFEST}")
    if not reverting:
        check_checkout(checkout)
    patch = Patch.read(checkout)
    plan = plan_revert(patch) if reverting else plan_apply(patch)
    for verb, path in plan:
        print(f"{verb:<8} {path}")
    kept = sum(verb == "keep" for verb, _ in plan)
    if kept:
        print(f"{kept} files were edited since patching and stay as they are")
    if dry_run:
        print("dry run: nothing was changed")
    elif reverting:
        revert(patch, plan)
        print("the patch is off")
    elif len(plan) == kept and patched:
        print("the patch is on already")
    else:
        apply(patch, plan)
        print(f"the patch is on; next: sh {checkout / 'script' / 'run_text2video_train.sh'} --help")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="folder of an upstream Open-Sora v1.2 checkout")
    parser.add_argument("--dry-run", action="store_true", help="only show what would change")
    parser.add_argument("--revert", action="store_true", help="revert the patch")
    args = parser.parse_args()
    try:
        run(args.checkout.expanduser().resolve(), dry_run=args.dry_run, reverting=args.revert)
    except (PatchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
