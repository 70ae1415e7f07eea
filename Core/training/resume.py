"""What a run folder holds already, and whether the run that starts now may continue it."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from Core.backbones import Prompt
from Core.config import Config
from Core.config.adapter_checks import misfit
from Core.config.load import RETIRED
from Core.modules import lora
from Core.training.checkpoint import Checkpoint, Checkpoints

logger = logging.getLogger("vader")
GLOBAL_BATCH = "global batch"
RUN_FILES = (
    *("checkpoints", "samples", "adapter", "metrics.csv", "validation.csv", "config.py", "config.json"),
    *("tensorboard", "evaluation", "report.html", "environment.json", "wandb_id.txt", "wandb"),
)


def choose_checkpoint(
    config: Config, checkpoints: Checkpoints, prompts: Sequence[Prompt], global_batch: int | None
) -> Checkpoint | None:
    """The checkpoint to continue from, if any; changes nothing on the disk, not even what a crash left half done.

    Args:
        global_batch: None where it is not known, and not compared.

    Raises:
        ValueError: it is damaged, or was made with other settings.
    """
    if config.run.resume == "never":
        return None
    if config.run.resume == "auto":
        chosen = checkpoints.newest()
    else:
        chosen = Checkpoint(Path(config.run.resume).expanduser())
        if damage := chosen.damage():
            raise ValueError(f"resume: checkpoint {config.run.resume!r} cannot be used: {damage}")
    if chosen:
        refuse_contradiction(config, chosen, prompts, global_batch)
        refuse_misfit(config, chosen)
    return chosen


def find_checkpoint(
    config: Config, folder: Path, prompts: Sequence[Prompt], global_batch: int
) -> Checkpoint | None:
    """The checkpoint to continue from, after undoing what a crash left half done; on the main process.

    Raises:
        ValueError: see ``choose_checkpoint``.
    """
    checkpoints = Checkpoints(folder / "checkpoints", config.run.keep_checkpoints)
    checkpoints.recover()
    return choose_checkpoint(config, checkpoints, prompts, global_batch)


def claim_folder(config: Config, folder: Path, chosen: Checkpoint | None) -> None:
    """Move aside what the run does not continue, and write its config; on the main process.

    For a run that has loaded everything, so that one that cannot start leaves an earlier run as it is.
    """
    checkpoints = Checkpoints(folder / "checkpoints", config.run.keep_checkpoints)
    if config.run.resume == "never":
        set_aside(folder)
    # What came after the chosen one, damaged or abandoned, must not be taken for this run's own later.
    later = checkpoints.set_aside_after(chosen.step if chosen else -1, _previous(folder) / "checkpoints")
    if later:
        names = ", ".join(checkpoint.folder.name for checkpoint in later)
        logger.warning("not continued, and moved to %s: %s", later[0].folder.parent, names)
    checkpoints.prune()
    config.save(folder / "config.py")


def set_aside(folder: Path) -> None:
    """Move what an earlier run left in ``folder`` into its ``previous_<n>``, so that nothing is lost."""
    left = [folder / name for name in RUN_FILES if (folder / name).exists()]
    target = _previous(folder)
    for path in left:
        target.mkdir(exist_ok=True)
        path.rename(target / path.name)


def _previous(folder: Path) -> Path:
    """The next free ``previous_<n>``."""
    numbers = [path.name.removeprefix("previous_") for path in folder.glob("previous_*")]
    return (
        folder / f"previous_{1 + max((int(number) for number in numbers if number.isdecimal()), default=0)}"
    )


def _beside_text(prompt: Prompt) -> list[str]:
    return [value for key, value in prompt.identity.items() if key == "picture"]


def identity(config: Config, prompts: Sequence[Prompt], global_batch: int) -> dict:
    """What a checkpoint's later steps depend on, to be recorded with it."""
    texts = "\n".join(" ".join([prompt.text, *_beside_text(prompt)]) for prompt in prompts)
    digest = hashlib.sha256(texts.encode()).hexdigest()
    settings = json.loads(json.dumps(config.flat()))
    settings |= config.models.base_adapter_contents()
    settings |= config.objective_class.contents(config.objective)
    return settings | {GLOBAL_BATCH: global_batch, "text of the prompts (sha256)": digest[:16]}


def refuse_misfit(config: Config, checkpoint: Checkpoint) -> None:
    """Raise ValueError where a checkpoint's adapter was made for another model than the one that its key names now."""
    if mismatch := misfit(lora.read(checkpoint.adapter), config.denoiser_shapes):
        raise ValueError(
            f"the checkpoint {str(checkpoint.folder)!r} does not fit the model: {mismatch}; restore the model, choose "
            "another project_dir, or set resume='never'"
        )


def refuse_contradiction(
    config: Config, checkpoint: Checkpoint, prompts: Sequence[Prompt], global_batch: int | None
) -> None:
    """Raise ValueError, naming the keys, where the run would not continue what the checkpoint began."""
    # A key that came with a later version stood at its default, whose meaning is what went before.
    before = json.loads(json.dumps(config.defaults())) | checkpoint.manifest()["config"]
    now = identity(config, prompts, global_batch or before.get(GLOBAL_BATCH, 0))
    fixed = config.fixed_keys()
    free = config.flat().keys() - fixed
    changed = [key for key in now if key not in free and before.get(key) != now[key]]
    changed += [key for key, off in RETIRED.items() if before.get(key, off) != off]
    now |= RETIRED
    if changed:
        listed = ", ".join(f"{key} was {before.get(key)!r} and is {now[key]!r}" for key in changed)
        raise ValueError(
            f"the run in {config.run.project_dir!r} was made with other settings: {listed}; restore them, choose "
            "another project_dir, or set resume='never'"
        )
