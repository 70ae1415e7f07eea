"""Pack what a GPU machine without a network lacks: carry.py [--to FOLDER].

Downloads wheels for Python 3.12 on Linux x86-64, at the versions of requirements.txt where it names them, puts their
files into one archive, packages.tar.xz, and checks that archive and checkout together stay within 64 MiB. The machine
is taken to have torch, transformers, peft, accelerate, safetensors, numpy and what these need. prove.sh unpacks the
archive there.
"""

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# diffusers and av themselves, what mmengine's configurations need, and what ftfy needs.
PACKAGES = ("av", "diffusers", "mmengine", "addict", "yapf", "termcolor", "platformdirs", "ftfy", "wcwidth")
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
LIMIT = 64 * 2**20
ARCHIVE = "packages.tar.xz"


def pinned(packages: Iterable[str], requirements: str) -> list[str]:
    """Each package with the first version that ``requirements`` pins, if any."""
    versions = dict(reversed(re.findall(r"^([\w-]+)==([\w.]+)", requirements, re.MULTILINE)))
    return [f"{name}=={versions[name]}" if name in versions else name for name in packages]


def download(packages: Sequence[str], folder: Path) -> list[Path]:
    """The wheels; pip says on the error stream what it could not find."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--python-version", PYTHON, "--implementation", "cp"]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run([*command, "--dest", str(folder), *packages], check=True)
    return sorted(folder.glob("*.whl"))


def pack(wheels: Iterable[Path], archive: Path) -> None:
    """One archive of all files: smaller than the wheels, since files that are alike are packed together."""
    with tempfile.TemporaryDirectory() as folder:
        for wheel in wheels:
            zipfile.ZipFile(wheel).extractall(folder)
        partial = archive.with_name(f".{archive.name}.partial")
        with tarfile.open(partial, "w:xz") as packed:
            packed.add(folder, arcname=".")
        partial.replace(archive)


def checkout_bytes(root: Path) -> int:
    """Size of what git tracks, and of new files that it does not ignore."""
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    files = [root / name for name in listed.split("\0") if name]
    return sum(file.lstat().st_size for file in files if file.is_file())


def fits(archive: int, checkout: int) -> tuple[bool, str]:
    """Whether archive and checkout may travel together, and a sentence on it."""
    mib = 2**20
    total = archive + checkout
    said = f"{archive / mib:.1f} MiB of packages and {checkout / mib:.1f} MiB of checkout are {total / mib:.1f} MiB"
    if total <= LIMIT:
        return True, f"{said}, within {LIMIT // mib}"
    return (
        False,
        f"{said}, above {LIMIT // mib}; remove files from the checkout, or packages that are not needed",
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", type=Path, default=ROOT / "build" / "carry", metavar="FOLDER")
    folder = parser.parse_args(argv).to
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / ARCHIVE
    with tempfile.TemporaryDirectory() as place:
        wanted = pinned(PACKAGES, (ROOT / "requirements.txt").read_text(encoding="utf-8"))
        try:
            wheels = download(wanted, Path(place))
        except subprocess.CalledProcessError:
            print("error: pip could not fetch the wheels; its message is above", file=sys.stderr)
            return 2
        pack(wheels, archive)
    good, said = fits(archive.stat().st_size, checkout_bytes(ROOT))
    print(f"{archive}: {said}" if good else f"error: {said}", file=sys.stdout if good else sys.stderr)
    return 0 if good else 2


if __name__ == "__main__":
    sys.exit(main())
