"""Tiny pipelines of the real diffusers classes, with random weights, saved as they are published."""

import csv
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from twins import config_file

from Core.backbones import Backbone
from Core.build import new_backbone
from Core.cli import main
from Core.config import build_config
from Core.data.text_embeddings import encode_prompts
from Core.modules import lora
from Core.sampling.euler import DenoisingStep, run_steps

CAPTIONS = ("a red fox jumps over the snow", "two boats", "", "ugly, blurred")


def randomise(network: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """Give every parameter random values, so that no zero initialisation hides a branch."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        size = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else scale
        centre = 1.0 if name.endswith(("gamma", "norm.weight", "layer_norm.weight")) else 0.0
        parameter.data = (centre + values * size).to(parameter.dtype)
    return network.eval()


def tiny_tokenizer() -> Any:
    from transformers import T5Tokenizer

    return T5Tokenizer().train_new_from_iterator(CAPTIONS * 4, 60)


def tiny_umt5(tokenizer: Any, width: int = 16) -> nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    return randomise(UMT5EncoderModel(config), 3)


def wan_transformer(seed: int = 1, **changes: Any) -> nn.Module:
    from diffusers import WanTransformer3DModel

    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "rope_max_seq_len": 32,
    }
    return randomise(WanTransformer3DModel(**{**sizes, **changes}), seed)


def wan_vae(fine: bool = False) -> nn.Module:
    """The VAE of Wan 2.1, or the finer one of TI2V-5B."""
    from diffusers import AutoencoderKLWan

    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.8, 2.0, 1.1]}
    sizes = {"base_dim": 4, "z_dim": 4, "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
    if fine:
        sizes |= {"decoder_base_dim": 4, "is_residual": True, "in_channels": 12, "out_channels": 12}
        sizes |= {"patch_size": 2, "scale_factor_spatial": 16}
    vae = randomise(AutoencoderKLWan(dim_mult=[1, 2, 2, 2], **sizes, **statistics), 2, 0.1)
    vae.decoder.conv_out.weight.data *= (
        0.5  # far from saturated, where a reward on colours would have no gradient
    )
    return vae


def save_wan(folder: Path, kind: str = "2.1") -> Path:
    """A tiny Wan: ``2.1``, ``ti2v`` (5B), ``a14b`` or ``i2v`` (A14B)."""
    from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline

    tokenizer = tiny_tokenizer()
    channels = {"in_channels": 12} if kind == "i2v" else {}
    extra: dict[str, Any] = {"expand_timesteps": True} if kind == "ti2v" else {}
    if kind in ("a14b", "i2v"):
        extra = {"transformer_2": wan_transformer(5, **channels), "boundary_ratio": 0.875}
    parts = {
        "tokenizer": tokenizer,
        "text_encoder": tiny_umt5(tokenizer),
        "vae": wan_vae(kind == "ti2v"),
        "transformer": wan_transformer(1, **channels),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }
    if kind == "i2v":
        pipeline: Any = WanImageToVideoPipeline(**parts, **extra, image_processor=None, image_encoder=None)
    else:
        pipeline = WanPipeline(**parts, **extra)
    pipeline.save_pretrained(folder)
    return folder


def config_for(family: str, folder: Path, **keys: Any):
    """A checked configuration of a tiny pipeline, in float32."""
    settings = {
        "backbone": family,
        "model_path": str(folder),
        "dtype": "fp32",
        "mixed_precision": "no",
        "image_size": (32, 64),
        "num_frames": 9,
        "num_sampling_steps": 3,
        "max_sequence_length": 24,
        "prompt": list(CAPTIONS[:2]),
        "project_dir": str(folder / "run"),
        "text_cache": str(folder / "text"),
        "is_vader_training": False,
    }
    return build_config({**settings, **keys})


def loaded(family: str, folder: Path, **keys: Any) -> tuple[Backbone, list]:
    """The loaded family on the CPU, and its encoded prompts."""
    config = config_for(family, folder, **keys)
    backbone = new_backbone(config, torch.device("cpu"))
    assert not backbone.fetch()
    encoded = encode_prompts(backbone, config.prompt_list, config.models.text_cache)
    backbone.load()
    return backbone, encoded


def generators(count: int) -> list[torch.Generator]:
    """Of each video's noise, where its sampler draws any."""
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def sample(backbone: Backbone, encoded: list, noise: torch.Tensor) -> torch.Tensor:
    """Final latents of the family's own sampler from ``noise``."""
    predict = backbone.predictor([backbone.features(e) for e in encoded])
    step = backbone.inference_step(predict, generators(len(noise)))
    with torch.no_grad(), backbone.no_grad_steps():
        return run_steps(step, noise, 0, len(step.timesteps))


def with_adapter(backbone: Backbone, seed: int = 0) -> Backbone:
    """Attach a small adapter with weights that are not zero."""
    backbone.denoiser = lora.attach(backbone.denoiser, backbone.lora_targets, rank=2, alpha=2, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora.parameters(backbone.denoiser).values():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return backbone


def in_float64(backbone: Backbone, monkeypatch) -> Backbone:
    """The family in double precision, where finite differences are exact enough to test with."""
    # Networks of diffusers turn to float32 in places, whatever their dtype.
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    monkeypatch.setattr(
        "diffusers.models.normalization.RMSNorm.forward",
        lambda norm, x: nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.eps),
    )
    backbone.denoiser.double()
    backbone.vae.double()
    backbone.dtype = torch.float64
    backbone.negative = backbone.negative and {k: v.double() for k, v in backbone.negative.items()}
    return backbone


def gradient_error(
    backbone: Backbone,
    encoded: list,
    frames: torch.Tensor,
    context: str,
    reach: int = 1,
    first_reached: int | None = None,
) -> float:
    """Error of the adapter's gradient, through sampling and decoding, against central differences along a random
    direction, relative to the gradient's norm.

    Args:
        frames: latent frames [B, F] to decode.
        context, reach: of ``decode_frames``; what a causal frame's gradient does not reach is held in the differences.
        first_reached: first latent frame that it reaches; None where that follows from ``reach``.
    """
    parameters = list(lora.parameters(backbone.denoiser).values())
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(len(encoded), *backbone.latent_shape(), generator=generator, dtype=torch.float64)
    features = [backbone.features(e) for e in encoded]
    step = DenoisingStep(
        backbone.predictor(features), backbone.process, backbone.timesteps(len(noise)).double()
    )

    def latents():
        return run_steps(step, noise, 0, len(step.timesteps))

    def reward(z):
        pixels = backbone.decode_frames(z, frames, context, reach)
        weight = torch.linspace(-1, 1, pixels.numel(), dtype=torch.float64).sin().view_as(pixels)
        return (weight * pixels + 0.1 * pixels.square()).sum()

    z = latents()
    # What the last block makes of the text is used nowhere in some families.
    gradients = torch.autograd.grad(reward(z), parameters, allow_unused=True, materialize_grads=True)
    held, numbers = z.detach(), torch.arange(z.shape[2])
    first = frames.max() - reach + 1 if first_reached is None else first_reached
    directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    found = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)).item()

    def moved(size):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.add_(size * d)
            z = latents()
            for p, d in zip(parameters, directions, strict=True):
                p.sub_(size * d)
            if context == "causal":
                reached = ((numbers <= frames.max()) & (numbers >= first))[None, None, :, None, None]
                z = torch.where(reached, z, held)
            return reward(z).item()

    wanted = (moved(1e-5) - moved(-1e-5)) / 2e-5
    return abs(found - wanted) / torch.cat([g.flatten() for g in gradients]).norm().item()


def train(family: str, folder: Path, run: Path, *flags: str, **keys: Any) -> list[dict[str, str]]:
    """Rows of ``metrics.csv`` of a training run of a tiny pipeline towards saturated colours."""
    settings = {
        "backbone": family,
        "model_path": str(folder),
        "dtype": "fp32",
        "mixed_precision": "no",
        "image_size": (32, 64),
        "num_frames": 5,
        "num_sampling_steps": 2,
        "max_sequence_length": 24,
        "prompt": list(CAPTIONS[:2]),
        "text_cache": str(run.parent / "text"),
        "project_dir": str(run),
        "reward_fn": "saturation",
        "train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "lr": 3e-2,
        "max_train_steps": 30,
        "validation_steps": 30,
        "checkpointing_steps": 10,
        "num_val_runs": 1,
        "decode_frame": 0,
    }
    with pytest.MonkeyPatch.context() as patch:
        # Its charts take longer than the run.
        patch.setattr("Core.training.setup.report", lambda folder: None)
        assert main([str(config_file(run.with_suffix(".py"), {**settings, **keys})), *flags]) == 0
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def assert_learns(family: str, folder: Path, place: Path, gain: float = 0.03, **keys: Any) -> None:
    """30 steps raise the reward by ``gain``."""
    rewards = [float(row["reward"]) for row in train(family, folder, place / "whole", **keys)]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 5 * gain, rewards


def assert_learns_and_resumes(
    family: str, folder: Path, place: Path, gain: float = 0.03, **keys: Any
) -> None:
    """30 steps raise the reward by ``gain``, and 10 steps resumed to 30 give the same adapter to the last bit."""
    assert_learns(family, folder, place, gain, **keys)
    train(family, folder, place / "halves", "--max-train-steps", "10", **keys)
    train(family, folder, place / "halves", **keys)
    adapters = [load_file(place / name / "adapter" / lora.WEIGHTS) for name in ("whole", "halves")]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[0])


def saved_bytes(compute: Any) -> tuple[int, Any]:
    """Bytes that are kept for the backward pass of ``compute()``, each storage once; and its result.

    Tensors on the meta device count as others do.

    What autograd saves is seen by its hooks; what checkpointing keeps to run a part again, by looking for tensors that
    are alive and were not before.
    """
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    def alive() -> list[torch.Tensor]:
        gc.collect()
        found = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
        return [tensor for tensor in found if not isinstance(tensor, FakeTensor)]

    before = {tensor.untyped_storage()._cdata for tensor in alive()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = compute()
    for tensor in alive():
        keep(tensor)
    return sum(size for pointer, size in storages.items() if pointer not in before), result
