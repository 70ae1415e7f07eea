"""LoRA adapters through PEFT: attach, save, load. A target or key that matches nothing is an error."""

import copy
import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from Core.utils import rng
from Core.utils.damage import read_settings
from Core.utils.state_dict import describe_mismatch, load_state

if TYPE_CHECKING:  # imported where it is used: reading an adapter file must not wait for PEFT
    from peft import PeftModel

ADAPTER = "default"
WEIGHTS = "adapter_model.safetensors"
ALPHA_NOTE = "lora_alpha"  # in the metadata of an adapter that is one file
REFERENCE_ALPHA = 8  # PEFT's default, which the reference implementation left as it was
# Settings of PEFT that make other functions of the same weights; these of their values leave plain LoRA.
PLAIN: tuple[Any, ...] = (None, False, "none", {}, [])
VARIANTS = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias", "lora_bias", "modules_to_save")


@dataclass(frozen=True)
class Adapter:
    """An adapter read from disk: its weights by PEFT key, and what it takes to attach it."""

    state: dict[str, Tensor]
    rank: int
    alpha: int
    targets: tuple[str, ...]


def attach(
    model: nn.Module,
    targets: Sequence[str],
    *,
    rank: int,
    alpha: int,
    dropout: float = 0.0,
    seed: int = 0,
) -> "PeftModel":
    """Wrap ``model`` with a float32 adapter on every linear layer whose name ends in one of ``targets``.

    Only the adapter requires gradients, and only its dropout ever leaves eval mode.

    Raises:
        ValueError: a target matches no layer.
    """
    from peft import LoraConfig, get_peft_model

    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if error := target_error(target, names):
            raise ValueError(error)
    settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, settings)
    if dropout:
        for layer in lora_layers(wrapped).values():
            mask_device = layer.lora_A[ADAPTER].weight.device
            layer.lora_dropout[ADAPTER] = StepDropout(dropout, layer.in_features).to(mask_device)
    return wrapped.eval()


def target_error(target: str, names: Sequence[str]) -> str:
    """A sentence where ``target`` matches none of the linear layers ``names``; else empty."""
    if any(name == target or name.endswith("." + target) for name in names):
        return ""
    last = sorted({name.rpartition(".")[2] for name in names})
    return f"lora_targets: no linear layer is named {target!r}; there are {', '.join(last)}"


def layer_shapes(adapter: "Adapter") -> dict[str, tuple[int, int]]:
    """(rows, columns) of each weight that an adapter adapts, by the layer's name in its model."""
    prefix, down = "base_model.model.", ".lora_A.weight"
    shapes = {}
    for key, tensor in adapter.state.items():
        up = adapter.state.get(key.replace(".lora_A.", ".lora_B."))
        if key.endswith(down) and up is not None:
            shapes[key.removeprefix(prefix).removesuffix(down)] = (up.shape[0], tensor.shape[1])
    return shapes


class StepDropout(nn.Module):
    """Dropout of input features whose mask is held for a whole optimiser step.

    One mask for every sampling step, sample and recomputation makes a step the gradient of one thinned
    adapter, and its draw independent of how the step's samples are split over processes and batches.
    """

    mask: Tensor

    def __init__(self, p: float, features: int):
        super().__init__()
        self.p = p
        self.register_buffer("mask", torch.ones(features), persistent=False)

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
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``, as PEFT reads them.

    An adapter that lies there is replaced only when the new one is whole.

    Raises:
        OSError: the disk is full or not writable.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    replaced = folder.with_name(f".{folder.name}.replaced")
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    # Through bytes, since safetensors' own writer reports a full disk as an error of its own kind.
    state = {key: p.detach().cpu().contiguous() for key, p in parameters(model).items()}
    (partial / WEIGHTS).write_bytes(serialize(state, metadata={"format": "pt"}))
    settings = copy.copy(model.peft_config[ADAPTER])
    settings.inference_mode = True
    settings.save_pretrained(str(partial))
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def read(path: str | Path) -> Adapter:
    """An adapter folder in PEFT's layout, one ``.safetensors``, or the reference's ``peft_model_<step>.pt``.

    Raises:
        FileNotFoundError, ValueError: nothing there, damaged, not an adapter, or not a plain LoRA.
    """
    path = Path(path).expanduser()
    file = _weights_file(path)
    loaded = load_state(file)
    state = {key.replace(f".{ADAPTER}.", "."): value for key, value in loaded.items()}
    settings = _settings(file)
    _refuse_variants(path, settings)
    downs = [key for key in state if key.endswith("lora_A.weight")]
    if not downs or len(state) != 2 * len(downs):
        raise ValueError(
            f"{path} is no LoRA adapter: it holds {len(state)} tensors, {len(downs)} of them lora_A"
        )
    _refuse_damage(path, state, settings)
    ranks = {state[key].shape[0] for key in downs}
    alpha = float(settings.get("lora_alpha", REFERENCE_ALPHA))
    if len(ranks) > 1 or not alpha.is_integer():
        raise ValueError(
            f"the adapter {path} has layers of rank {', '.join(map(str, sorted(ranks)))} and alpha {alpha:g}; "
            "only one rank and a whole alpha for all layers are supported"
        )
    state = {key: value.float() for key, value in state.items()}
    # A target may be longer than a layer's own name, which the keys alone do not tell.
    named = settings.get("target_modules")
    targets = named if named and isinstance(named, list) else {key.split(".")[-3] for key in downs}
    return Adapter(state, ranks.pop(), int(alpha), tuple(sorted(targets)))


def _refuse_variants(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise ValueError for an adapter whose weights mean something else than alpha / rank · B A."""
    used = [f"{key}={settings[key]!r}" for key in VARIANTS if settings.get(key) not in PLAIN]
    if used:
        raise ValueError(
            f"the adapter {path} was made with {', '.join(used)}, which is not supported: give a plain LoRA "
            "adapter, or merge it into its model with PEFT and give the result as model.from_pretrained"
        )


def _refuse_damage(path: Path, state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Raise ValueError for tensors that are no matrices of floating-point numbers, or not those that settings tell."""
    for key, tensor in state.items():
        if tensor.dim() < 2 or not tensor.is_floating_point():
            raise ValueError(
                f"the adapter {path} is damaged or quantised: {key} is {tensor.dtype} {list(tensor.shape)}, not a "
                "matrix of floating-point numbers; export the adapter again"
            )
    downs = {key.rpartition(".lora_A.")[0]: value for key, value in state.items() if ".lora_A." in key}
    ranks, stated = {len(value) for value in downs.values()}, settings.get("r")
    if stated is not None and downs and ranks != {stated}:
        raise ValueError(
            f"the adapter {path} is of rank {', '.join(map(str, sorted(ranks)))}, and its adapter_config.json says "
            f"r={stated!r}; mend the file that is wrong"
        )
    targets = settings.get("target_modules")
    listed = targets if isinstance(targets, list) else []
    if unknown := [t for t in listed if not any(name == t or name.endswith(f".{t}") for name in downs)]:
        raise ValueError(
            f"the adapter {path} has no tensors for {', '.join(map(repr, unknown))}, which target_modules of its "
            "adapter_config.json names; mend the file that is wrong"
        )


def _settings(file: Path) -> dict[str, Any]:
    """What a note in the file says, or else the configuration beside it; the reference's files have neither."""
    config = file.with_name("adapter_config.json")
    if file.suffix != ".safetensors":
        return {}
    with safe_open(file, "pt") as content:
        noted = (content.metadata() or {}).get(ALPHA_NOTE)
    if noted:
        return {ALPHA_NOTE: noted}
    return read_settings(config) if config.exists() else {}


def _weights_file(path: Path) -> Path:
    if path.is_file():
        return path
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
