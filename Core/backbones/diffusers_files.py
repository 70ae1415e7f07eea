"""Pipelines on disk, in the layout of ``DiffusionPipeline.save_pretrained``: a folder per component, and an index."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from Core.utils.damage import read_settings
from Core.utils.hub import Weight

INDEX = "model_index.json"
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
NETWORK_STEMS = ("diffusion_pytorch_model", "model")
# Components without weights, with the file that each must have.
MARKERS = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}


@dataclass(frozen=True, kw_only=True)
class PipelineWeight(Weight):
    """Some components of a published pipeline.

    components: their folders. optional: those that only some pipelines have, as their index says. variant: of the
    weight files, such as ``fp16``; '' for the plain ones.
    """

    kind: Any = "pipeline"
    components: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    variant: str = ""

    @property
    def patterns(self) -> tuple[tuple[str, ...], ...]:
        dot = f".{self.variant}" if self.variant else ""
        weights = [
            f"{stem}{dot}{end}" for stem in NETWORK_STEMS for end in (".safetensors", "-*.safetensors")
        ]
        parts = (*self.components, *self.optional)
        files = [f"{component}/{name}" for component in parts for name in (*SMALL_FILES, *weights)]
        return ((INDEX, *files),)

    def lacks(self, folder: Path) -> str:
        if not (folder / INDEX).is_file():
            return f"it has no {INDEX}"
        names = (*self.components, *self._held(folder))
        lacking = (lack for name in names if (lack := self._component_lacks(folder / name)))
        return next(lacking, "")

    def _held(self, folder: Path) -> list[str]:
        """The optional components that the pipeline in ``folder`` has: the others are [None, None] in its index."""
        index = read_settings(folder / INDEX) if self.optional else {}
        return [name for name in self.optional if index.get(name) not in (None, [None, None])]

    def _component_lacks(self, folder: Path) -> str:
        marker = next((file for name, file in MARKERS.items() if folder.name.startswith(name)), "config.json")
        if not (folder / marker).is_file():
            return f"its component {folder.name!r} has no {marker}"
        if marker == "config.json" and not self._has_weights(folder):
            wanted = f" of variant {self.variant!r}" if self.variant else ""
            return f"its component {folder.name!r} has no complete .safetensors{wanted}"
        return ""

    def _has_weights(self, folder: Path) -> bool:
        files = weight_files(folder, self.variant)
        return bool(files) and all(file.is_file() for file in files)


def component_config(folder: Path, component: str) -> Mapping[str, Any]:
    """Configuration of one component of the pipeline in ``folder``."""
    marker = next((file for name, file in MARKERS.items() if component.startswith(name)), "config.json")
    return read_settings(folder / component / marker)


def weight_files(folder: Path, variant: str = "") -> list[Path]:
    """The files with the weights of a component: one, or the shards that an index names; empty where there are none."""
    dot = f".{variant}" if variant else ""
    for stem in NETWORK_STEMS:
        if (whole := folder / f"{stem}{dot}.safetensors").is_file():
            return [whole]
        if (index := folder / f"{stem}.safetensors.index{dot}.json").is_file():
            return [folder / shard for shard in sorted(set(read_settings(index)["weight_map"].values()))]
    return []
