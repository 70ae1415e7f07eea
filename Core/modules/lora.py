"""LoRA adapters through PEFT: attach, save, load. A target or key that matches nothing is an error."""

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn

from Core.modules import lora_formats
from Core.modules.lora_formats import PEFT_PREFIX, Layers
from Core.utils import rng
from Core.utils.damage import read_settings
from Core.utils.files import replacing_folder
from Core.utils.state_dict import describe_mismatch, load_state, read_metadata

if TYPE_CHECKING:  # imported where it is used: reading an adapter file must not wait for PEFT
    from peft import PeftModel

ADAPTER = "default"
WEIGHTS = "adapter_model.safetensors"
ALPHA_NOTE = "lora_alpha"  # in the metadata of an adapter that is one file
ADAPTED = (nn.Linear, nn.Conv2d, nn.Conv3d)
NOTHING: Mapping[str, Any] = MappingProxyType({})
# Settings of PEFT that make other functions of the same weights; these of their values leave plain LoRA.
PLAIN: tuple[Any, ...] = (None, False, "none", {}, [])
VARIANTS = ("use_rslora", "use_dora", "bias", "lora_bias", "modules_to_save")


@dataclass(frozen=True)
class Adapter:
    """An adapter read from disk.

    Attributes:
        layers: by name of the adapted layer; float32, alpha a whole number above zero.
        targets: suffixes that name these layers.
        differences: changes of whole tensors, by the name of a layer or tensor, ``.bias`` after it where the bias is
            meant; only of a file that is merged.
    """

    layers: Layers
    targets: tuple[str, ...]
    differences: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def rank(self) -> int:
        """Rank of most layers."""
        return lora_formats.common(layer.rank for layer in self.layers.values())

    @cached_property
    def alpha(self) -> int:
        """Alpha of most layers."""
        return int(lora_formats.common(layer.alpha for layer in self.layers.values()))

    @property
    def sizes(self) -> dict[str, Any]:
        """Rank and alpha of most layers, and by name those of the others, as ``attach`` takes them."""
        ranks = {name: layer.rank for name, layer in self.layers.items() if layer.rank != self.rank}
        alphas = {name: int(layer.alpha) for name, layer in self.layers.items() if layer.alpha != self.alpha}
        return {"rank": self.rank, "alpha": self.alpha, "ranks": ranks, "alphas": alphas}

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The weights by PEFT key."""
        named = {f"{PEFT_PREFIX}{name}": layer for name, layer in self.layers.items()}
        return {
            f"{name}.lora_{factor}.weight": value
            for name, layer in named.items()
            for factor, value in (("A", layer.down), ("B", layer.up))
        }


def attach(
    model: nn.Module,
    targets: Sequence[str],
    *,
    rank: int,
    alpha: int,
    ranks: Mapping[str, int] = NOTHING,
    alphas: Mapping[str, int] = NOTHING,
    dropout: float = 0.0,
    seed: int = 0,
) -> "PeftModel":
    """Wrap ``model`` with a float32 adapter on every linear layer or convolution whose name ends in one of ``targets``.

    Only the adapter requires gradients, and only its dropout ever leaves eval mode.

    Args:
        ranks, alphas: by name, of the layers that have others than ``rank`` and ``alpha``.

    Raises:
        ValueError: a target matches no layer.
    """
    from peft import LoraConfig, get_peft_model

    names = [name for name, module in model.named_modules() if isinstance(module, ADAPTED)]
    for target in targets:
        if error := target_error(target, names):
            raise ValueError(error)
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
        **patterns(ranks, alphas),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, settings)
    for layer in lora_layers(wrapped).values():
        layer._cast_input_dtype = _cast_input  # PEFT's own copies to float32 under autocast too
        if dropout:
            weight = layer.lora_A[ADAPTER].weight
            shape = (weight.shape[1], *[1] * (weight.ndim - 2))
            layer.lora_dropout[ADAPTER] = StepDropout(dropout, shape).to(weight.device)
    return wrapped.eval()


def _cast_input(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A layer's input in its adapter's dtype; as it is under autocast, which would cast it back and leave the copy."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(dtype)


def patterns(ranks: Mapping[str, int], alphas: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """PEFT's settings for layers of another rank or alpha; ``^`` makes it the whole name."""
    return {
        "rank_pattern": {f"^{name}": rank for name, rank in ranks.items()},
        "alpha_pattern": {f"^{name}": alpha for name, alpha in alphas.items()},
    }


def target_error(target: str, names: Sequence[str]) -> str:
    """A sentence where ``target`` matches none of the layers ``names``; else empty."""
    if any(name == target or name.endswith("." + target) for name in names):
        return ""
    last = sorted({name.rpartition(".")[2] for name in names})
    return f"lora_targets: no layer that can be adapted is named {target!r}; there are {', '.join(last)}"


def layer_shapes(adapter: "Adapter") -> dict[str, tuple[int, ...]]:
    """Shape of each weight that an adapter adapts, by the layer's name in its model."""
    return {name: (layer.up.shape[0], *layer.down.shape[1:]) for name, layer in adapter.layers.items()}


class StepDropout(nn.Module):
    """Dropout of input features whose mask is held for a whole optimiser step.

    One mask for every sampling step, sample and recomputation makes a step the gradient of one thinned
    adapter, and its draw independent of how the step's samples are split over processes and batches.
    """

    mask: Tensor

    def __init__(self, p: float, shape: tuple[int, ...]):
        super().__init__()
        self.p = p
        self.register_buffer("mask", torch.ones(shape), persistent=False)

    def draw(self, generator: torch.Generator) -> None:
        """Take the mask of a new step from ``generator``."""
        kept = torch.rand(self.mask.shape, generator=generator) >= self.p
        self.mask.copy_(kept / (1 - self.p))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask if self.training else x


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's LoRA layers by name."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def parameters(model: "PeftModel") -> dict[str, nn.Parameter]:
    """The adapter's weights by their key on disk, in a fixed order."""
    marker = f".{ADAPTER}"
    return {name.replace(marker, ""): p for name, p in model.named_parameters() if "lora_" in name}


def set_dropout(model: "PeftModel", active: bool, *step: int) -> None:
    """Switch the adapter's dropout on for training, with the masks of ``step`` (seed, number), or off."""
    for name, layer in lora_layers(model).items():
        layer.lora_dropout.train(active)
        if active and isinstance(layer.lora_dropout[ADAPTER], StepDropout):
            layer.lora_dropout[ADAPTER].draw(rng.generator(step[0], "dropout", name, *step[1:]))


def set_scale(model: "PeftModel", scale: float) -> None:
    """Strength of the adapter relative to alpha / rank."""
    for layer in lora_layers(model).values():
        layer.set_scale(ADAPTER, scale)


@contextmanager
def base_only(model: "PeftModel") -> Iterator[None]:
    """Within this context the adapter adds zero. Unlike PEFT's switch it leaves ``requires_grad`` alone, so that
    it may be used while a graph is kept."""
    scaling = {name: layer.scaling[ADAPTER] for name, layer in lora_layers(model).items()}
    set_scale(model, 0)
    try:
        yield
    finally:
        for name, layer in lora_layers(model).items():
            layer.scaling[ADAPTER] = scaling[name]


def digest(tensors: Iterable[Tensor]) -> str:
    """A hash of the exact bytes, to compare adapters between processes."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return sha.hexdigest()


def save(model: "PeftModel", folder: Path) -> None:
    """Write an adapter folder as PEFT reads it; one that lies there is replaced only when the new one is whole.

    Raises:
        OSError: the disk is full or not writable.
    """
    with replacing_folder(folder) as partial:
        write_into(partial, model)


def write_into(folder: Path, model: "PeftModel") -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json`` into an empty folder."""
    state = {key: p.detach().cpu().contiguous() for key, p in parameters(model).items()}
    settings = copy.copy(model.peft_config[ADAPTER])
    settings.inference_mode = True
    # Through bytes, since safetensors' own writer reports a full disk as an error of its own kind.
    (folder / WEIGHTS).write_bytes(serialize(state, metadata={"format": "pt"}))
    settings.save_pretrained(str(folder))


def read(path: str | Path, names: Mapping[str, str] = NOTHING, *, differences: bool = False) -> Adapter:
    """An adapter in any format: PEFT's folder, one file as ``lora_formats`` lists them, or the reference's
    ``peft_model_<step>.pt``.

    Args:
        names: the model family's table of original names.
        differences: whether it may change whole tensors, too, as what is merged may.

    Raises:
        FileNotFoundError, ValueError: nothing there, damaged, not an adapter, or not a plain LoRA.
    """
    path = Path(path).expanduser()
    file = _weights_file(path)
    state = load_state(file)
    settings = _settings(file)
    _refuse_variants(path, settings)
    _refuse_other_numbers(path, state)
    try:
        factors, changes = lora_formats.split_differences(state, names)
        if changes and not differences:
            raise ValueError(_no_lora(state, len(changes)))
        layers = lora_formats.read_layers(factors, settings, names) if factors or not changes else {}
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    if any(key.startswith(PEFT_PREFIX) for key in state):
        _refuse_disagreement(path, layers, settings)
    layers = {name: layer.in_float32().with_whole_alpha() for name, layer in layers.items()}
    return Adapter(layers, tuple(sorted(_targets(state, settings, layers))), changes)


def _no_lora(state: Mapping[str, Tensor], count: int) -> str:
    """Why a file that changes whole tensors is no adapter."""
    example = next(key for key in state if lora_formats.DIFFERENCE.fullmatch(key))
    return (
        f"holds changes of whole weights or biases: {count} keys such as {example!r}, which an adapter cannot hold; "
        "name it in base_adapters, which adds them to the frozen model"
    )


def _targets(state: Mapping[str, Tensor], settings: Mapping[str, Any], layers: Layers) -> Sequence[str]:
    """Suffixes that name the adapted layers; of another program's file their whole names, which mean no others."""
    if not any(key.startswith(PEFT_PREFIX) for key in state):
        return list(layers)
    # A target may be longer than a layer's own name, which the keys alone do not tell.
    if (named := settings.get("target_modules")) and isinstance(named, list):
        return named
    short = {name.split(".")[-1] for name in layers}
    # A number, as in to_out.0, would name layers of other kinds, too.
    return list(layers) if any(name.isdigit() for name in short) else list(short)


def _refuse_variants(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise ValueError for an adapter whose weights mean something else than alpha / rank · B A."""
    used = [f"{key}={settings[key]!r}" for key in VARIANTS if settings.get(key) not in PLAIN]
    if used:
        raise ValueError(
            f"the adapter {path} was made with {', '.join(used)}, which is not supported: give a plain LoRA "
            "adapter, or merge it into its model with PEFT and give the result as model.from_pretrained"
        )


def _refuse_other_numbers(path: Path, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError for tensors that are not floating-point numbers."""
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"the adapter {path} is damaged or quantised: {key} is {tensor.dtype} {list(tensor.shape)}, not of "
                "floating-point numbers; export the adapter again"
            )


def _refuse_disagreement(path: Path, layers: Layers, settings: Mapping[str, Any]) -> None:
    """Raise ValueError where tensors have other ranks, or other layers, than the settings beside them tell."""
    ranks, stated = {layer.rank for layer in layers.values()}, settings.get("r")
    if stated is not None and not settings.get("rank_pattern") and ranks != {stated}:
        raise ValueError(
            f"the adapter {path} is of rank {', '.join(map(str, sorted(ranks)))}, and its adapter_config.json says "
            f"r={stated!r}; mend the file that is wrong"
        )
    targets = settings.get("target_modules")
    listed = targets if isinstance(targets, list) else []
    if unknown := [t for t in listed if not any(name == t or name.endswith(f".{t}") for name in layers)]:
        raise ValueError(
            f"the adapter {path} has no tensors for {', '.join(map(repr, unknown))}, which target_modules of its "
            "adapter_config.json names; mend the file that is wrong"
        )


def _settings(file: Path) -> dict[str, Any]:
    """What the file's metadata say, or else the configuration beside it; the reference's files have neither."""
    config = file.with_name("adapter_config.json")
    if file.suffix != ".safetensors":
        return {}
    noted = read_metadata(file)
    if ALPHA_NOTE in noted:
        return {ALPHA_NOTE: noted[ALPHA_NOTE]}
    if lora_formats.METADATA not in noted:
        return read_settings(config) if config.exists() else {}
    try:
        return lora_formats.settings_in(noted[lora_formats.METADATA])
    except ValueError as error:
        raise ValueError(
            f"{file} has metadata that are no JSON or damaged; export the adapter again"
        ) from error


def _weights_file(path: Path) -> Path:
    if path.is_file():
        return path
    if (path / WEIGHTS).is_file():  # beside it may lie the same for another program
        return path / WEIGHTS
    found = sorted(file for file in path.glob("*") if file.suffix in (".safetensors", ".pt"))
    if len(found) != 1:
        raise FileNotFoundError(
            f"no adapter at {path}: expected a folder with {WEIGHTS}, or a file; found {len(found)} weight files"
        )
    return found[0]


def load(model: "PeftModel", adapter: Adapter, source: str) -> None:
    """Copy ``adapter`` into ``model``.

    Raises:
        ValueError: the adapter was made for another model; the message lists what differs.
    """
    own = parameters(model)
    state = adapter.state
    shapes = {key: (state[key].shape, own[key].shape) for key in own.keys() & state.keys()}
    differing = {key: pair for key, pair in shapes.items() if pair[0] != pair[1]}
    if mismatch := describe_mismatch(own.keys() - state.keys(), state.keys() - own.keys(), differing):
        raise ValueError(f"the adapter {source} does not fit the model: {mismatch}")
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(state[key])
