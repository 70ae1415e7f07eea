"""VBench's files: its prompt list in, and the folder of videos that its own tool reads out (Huang et al. 2024)."""

import errno
import json
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from Core.generation.manifest import Sample, read_manifest
from Core.utils.registry import did_you_mean

COPIES = 5  # videos of a prompt that VBench scores
LONGEST_NAME = 255  # bytes of a file's name that file systems take


def read_vbench_prompts(path: Path, dimensions: Collection[str] = ()) -> list[str]:
    """Prompts of a list in the layout of ``VBench_full_info.json``, each once, of all dimensions or the given ones.

    Raises:
        FileNotFoundError, ValueError: no such file, another layout, or a dimension that is not in it.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"prompt list {str(path)!r} does not exist; give VBench's VBench_full_info.json"
        )
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
        listed = [(str(entry["prompt_en"]).strip(), set(entry["dimension"])) for entry in entries]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} is no prompt list of VBench ({type(error).__name__}: {error}); it must be JSON, a list of "
            '{"prompt_en": …, "dimension": […]}'
        ) from error
    known = sorted(set().union(*(own for _, own in listed)))
    if unknown := [name for name in dimensions if name not in known]:
        hint = did_you_mean(unknown[0], known)
        raise ValueError(
            f"{str(path)!r} has no prompts of dimension {unknown[0]!r}: {hint and hint + ' '}it has {', '.join(known)}"
        )
    wanted = set(dimensions or known)
    prompts = list(dict.fromkeys(prompt for prompt, own in listed if own & wanted))
    if not prompts:
        raise ValueError(f"{str(path)!r} holds no prompts; give VBench's VBench_full_info.json")
    return prompts


# What a file system without hard links, or another one, answers.
NO_LINKS = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK)


def name_errors(prompts: Sequence[str]) -> list[str]:
    """Sentences on prompts that cannot be the name of a file, as VBench wants it, each of another prompt."""
    repeated = [prompt for prompt, count in Counter(prompts).items() if count > 1]
    return [
        f"VBench names a video by its prompt, but {prompt[:60]!r} stands twice; remove one"
        for prompt in repeated
    ] + [
        f"VBench names a video by its prompt, but {prompt[:60]!r}… {reason}; shorten or change that prompt"
        for prompt in prompts
        for reason in (_unfit(prompt),)
        if reason
    ]


def _unfit(prompt: str) -> str:
    if "/" in prompt:
        return "holds a slash"
    spare = len("-99.mp4")
    return "is too long" if len(prompt.encode()) + spare > LONGEST_NAME else ""


def write_vbench_folder(videos: Path, samples: Sequence[Sample], target: Path) -> None:
    """Fill ``target``, emptied before, with the videos of a folder as ``{prompt}-{number}.mp4``.

    They are hard links where the file system has them, else copies.
    """
    files = {entry["name"]: videos / entry["file"] for entry in read_manifest(videos)}
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for sample in samples:
        file = files[sample.name]
        named = target / f"{sample.prompt.reward_text}-{sample.copy}{file.suffix}"
        try:
            os.link(file, named)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            shutil.copy2(file, named)


def vbench_command(folder: Path, prompts: Path | None, dimensions: Sequence[str]) -> str:
    """The line that runs VBench's own tool on such a folder, once for each dimension.

    Args:
        prompts: VBench's list that the prompts are from; None for other prompts.
    """
    source = f"--full_json_dir {shlex.quote(str(prompts))}" if prompts else "--mode custom_input"
    run = f'vbench evaluate --videos_path {shlex.quote(str(folder))} {source} --dimension "$dimension"'
    return f"for dimension in {' '.join(dimensions)}; do {run}; done"
