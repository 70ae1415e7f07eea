"""Model families whose networks have their sizes and no weights.

A family's own code builds and runs them; only where it would read a file, the sizes are taken from the published
configuration, or from the files on this machine.
"""

import functools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from Core.backbones import Backbone, Features, TextEncoder
from Core.backbones.diffusers_base import DiffusersBackbone
from Core.backbones.opensora import OpenSora
from Core.config import Config
from Core.estimate.live_bytes import LiveBytes
from Core.estimate.operations import WorkCounter
from Core.estimate.published import T5_XXL, write_pipeline
from Core.estimate.repeats import RepeatedBlock, RepeatedChunk, RepeatedPrediction, Repeats
from Core.estimate.stand_ins import StandInTokens
from Core.modules.autocast import keep_out_of_autocast
from Core.modules.sharding import parameters_on_meta
from Core.sampling.euler import Predict
from Core.utils.damage import read_settings
from Core.utils.hub import present


class Weightless(Backbone):
    """What sized families share: work without a gradient that repeats is run once and counted.

    Attributes:
        live: the counter of bytes, told of tensors that lie elsewhere than on the card.
        repeats: what was run and is counted from then on.
    """

    live: LiveBytes
    repeats: Repeats

    def predictor(self, text: Sequence[Features], **settings: Any) -> Predict:
        predict = super().predictor(text, **settings)  # type: ignore[safe-super]
        return RepeatedPrediction(predict, self.repeats, self.expert_at)

    def expert_at(self, t: Tensor) -> bool:
        """Whether timesteps [B] are those of a second expert."""
        return bool((t < getattr(self.denoiser, "boundary", 0)).any())

    def no_grad_steps(self) -> AbstractContextManager:
        for block in self.repeated_blocks:
            block.begun = False  # what its runs share is made in this context and dropped at its end
        return super().no_grad_steps()

    @contextmanager
    def loading(self, what: str, keys: Any) -> Iterator[None]:
        yield

    @property
    def decode_step(self) -> Any:
        """Of a family whose VAE decodes chunk by chunk."""
        return RepeatedChunk(super().decode_step, self.repeats)  # type: ignore[misc]

    def load(self) -> None:
        self.offload_device = torch.device("meta")  # whose tensors take no memory of the card
        super().load()
        self.repeated_blocks = [RepeatedBlock(block, self.repeats) for block in self.blocks]
        for repeated in self.repeated_blocks:
            repeated.block.forward = repeated

    def load_denoiser(self) -> nn.Module:
        if self.mesh is None:
            return super().load_denoiser()  # type: ignore[safe-super]
        with parameters_on_meta():
            return super().load_denoiser()  # type: ignore[safe-super]

    def _fill(self) -> None:
        for module in self.denoiser.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    here = torch.empty_like(weight, device=self.device)
                    module._parameters[name] = nn.Parameter(here, requires_grad=False)

    def _stream(self) -> None:
        for module in self._unstreamed:
            module.to(self.device)
        with self.live.elsewhere():
            for block in self.blocks:
                block.to(self.device)
            super()._stream()


class WeightlessOpenSora(Weightless, OpenSora):
    """Open-Sora 1.2."""

    def load_denoiser(self) -> nn.Module:
        return super().load_denoiser().to(self.dtype)

    def _pinned(self, name: str) -> dict[str, Any]:
        entry = getattr(self.settings, name)
        here = present(self.weights_of(self.settings)[f"{name}.from_pretrained"])
        return {**entry, "from_pretrained": str(here) if here else None}

    def text_encoder(self) -> TextEncoder:
        from transformers import T5EncoderModel

        folder = present(self.weights_of(self.settings)["text_encoder.from_pretrained"])
        config = read_settings(folder / "config.json") if folder else T5_XXL
        network = sized(T5EncoderModel, config, self.dtype)
        return PaddedFeatures(tokenizer_of(folder), network, self.settings.text_encoder["model_max_length"])


class PaddedFeatures(TextEncoder):
    """What ``OpenSoraText`` gives, of a T5 without weights."""

    def __init__(self, tokenizer: Any, network: nn.Module, length: int):
        self.tokenizer, self.network, self.length = tokenizer, network, length

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Features]:
        tokens = self.tokenizer(
            list(captions), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        features = self.network(tokens.input_ids, tokens.attention_mask).last_hidden_state
        lengths = tokens.attention_mask.sum(1).tolist()
        return [{"features": row[:length]} for row, length in zip(features, lengths, strict=True)]


class WeightlessDiffusers(Weightless, DiffusersBackbone):
    """A family of diffusers, before the family's own class in the order of methods."""

    @functools.cached_property
    def folder(self) -> Path:
        weight = self.weights_of(self.settings)["model_path"]
        if (found := present(weight)) and (found / "model_index.json").is_file():
            return found
        self._written = tempfile.TemporaryDirectory()
        write_pipeline(weight.source, Path(self._written.name))
        return Path(self._written.name)

    @functools.cached_property
    def text_folder(self) -> Path:
        return present(self.weights_of(self.settings)["text_encoder_path"]) or self.folder

    def load_network(self, kind: Any, component: str, dtype: torch.dtype) -> nn.Module:
        config = {key: value for key, value in self.read_config(component).items() if key[:1] != "_"}
        kept = set(getattr(kind, "_keep_in_fp32_modules", None) or ())
        with default_dtype(dtype):
            network = kind.from_config(config)
        for name, module in network.named_modules():
            if kept & set(name.split(".")):
                module.float()
        keep_out_of_autocast(network, kept)
        return network

    def load_text_model(self, kind: Any, component: str = "text_encoder") -> nn.Module:
        return sized(kind, read_settings(self.text_folder / component / "config.json"), self.dtype)

    def load_tokenizer(self, component: str = "tokenizer") -> Any:
        return tokenizer_of(self.text_folder / component)


def sized(kind: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    """A network of transformers, frozen."""
    from transformers.initialization import no_init_weights

    own = {key: value for key, value in config.items() if key not in ("class", "architectures", "dtype")}
    with default_dtype(dtype), no_init_weights():
        return kind(kind.config_class(**own)).eval().requires_grad_(False)


def tokenizer_of(folder: Path | None) -> Any:
    """The tokenizer in ``folder``, or one that counts letters."""
    if folder and any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return StandInTokens()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def weightless_backbone(config: Config, live: LiveBytes, work: WorkCounter) -> Any:
    """The model family that a configuration names, whose ``load`` reads no weights; see ``Weightless``."""
    family = config.backbone
    mixin = WeightlessOpenSora if issubclass(family, OpenSora) else WeightlessDiffusers
    kind = type(
        f"Weightless{family.__name__}", (mixin, family), {"live": live, "repeats": Repeats(live, work)}
    )
    return kind(config.family, config.models, config.video_spec, torch.device("cpu"))
