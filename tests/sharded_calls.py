"""What a process of ``test_sharded.py`` does, beside the other one."""

from pathlib import Path

import diffusers
import pipelines
import torch
import torch._dynamo
import torch.distributed.fsdp
from reward_twins import qwen2_vl_arguments
from torch import Tensor, nn

from Core.backbones.base import Backbone
from Core.build import new_backbone
from Core.cli import main
from Core.data.text_embeddings import encode_prompts
from Core.modules import lora, sharding
from Core.modules.recompute import recompute_parts
from Core.rewards import build_reward
from Core.sampling.euler import DenoisingStep, run_steps
from Core.utils.distributed import Distributed

# Imported once, before the processes are made.
NETWORKS = [
    diffusers.WanTransformer3DModel,
    diffusers.AutoencoderKLWan,
    diffusers.HunyuanVideo15Transformer3DModel,
    diffusers.HunyuanVideo15Pipeline,
    diffusers.LTXVideoTransformer3DModel,
    diffusers.CogVideoXTransformer3DModel,
    diffusers.UNet3DConditionModel,
]
SMALLER = {"modelscope": {"num_frames": 2}}
LARGEST_SHARE = 0.55  # of the frozen bytes, on each of two processes
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}  # of a gradient, relative


def compare_family(folder: str, family: str) -> None:
    """The adapter's gradient of a whole denoiser and of one that is split are the same, as are their weights."""
    mesh = Distributed().mesh
    for dtype in ("fp32", "bf16"):
        whole, encoded = loaded(family, folder, None, dtype)
        split, _ = loaded(family, folder, mesh, dtype)
        compare_weights(whole.denoiser, split.denoiser)
        share = sharding.held_bytes(split.denoiser) / sharding.held_bytes(whole.denoiser)
        assert share <= LARGEST_SHARE, share
        if dtype == "fp32" or family == "wan":  # of which some weights stay float32 beside those in bf16
            wanted = adapter_gradient(whole, encoded)
            parts = "parts" if "parts" in whole.recomputations else True
            close(wanted, adapter_gradient(split, encoded, parts), TOLERANCE[dtype])


def compare_weights(whole: nn.Module, split: nn.Module) -> None:
    """Parameters and buffers agree in value and dtype, and each process holds its rows."""
    states = whole.state_dict(), split.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, weight in states[0].items():
        gathered = states[1][name]
        gathered = gathered.full_tensor() if hasattr(gathered, "full_tensor") else gathered
        assert gathered.dtype == weight.dtype and torch.equal(gathered, weight), name
        held, part = sharding.own_part(states[1][name], weight)
        assert torch.equal(held, part), name
    buffers = [dict(network.named_buffers()) for network in (whole, split)]
    for name, buffer in buffers[0].items():
        assert buffers[1][name].dtype == buffer.dtype and torch.equal(buffer, buffers[1][name]), name


def compare_experts(folder: str) -> None:
    """Two processes whose videos ask different experts get what each would get alone."""
    distributed = Distributed()
    whole, encoded = loaded("wan", folder, None)
    split, _ = loaded("wan", folder, distributed.mesh)
    for backbone in (whole, split):
        pipelines.with_adapter(backbone).enable_checkpointing()
    for times in ([999.0, 990.0], [100.0, 999.0], [100.0, 200.0]):
        # The other process asks in the opposite order, and with the other expert alone in the first and last rounds.
        t = torch.tensor(times if distributed.rank == 0 else [1099.0 - time for time in times])
        gradients = []
        for backbone in (whole, split):
            z = torch.randn(2, *backbone.latent_shape(), generator=torch.Generator().manual_seed(2))
            predict = backbone.predictor([backbone.features(e) for e in encoded])
            predict(z, t).square().mean().backward()
            gradients.append(taken_gradient(backbone))
        close(*gradients)


def compare_rewards(folder: str) -> None:
    """A language model that is split scores and differentiates as a whole one, and is no less frozen."""
    distributed = Distributed()
    frames = torch.rand(2, 4, 3, 56, 56, generator=torch.Generator().manual_seed(distributed.rank)) - 0.5
    for name in ("hpsv3", "videoalign"):
        rewards = [build_reward(name, qwen2_vl_arguments(name), mesh=m) for m in (None, distributed.mesh)]
        results = []
        for reward in rewards:
            given = frames.clone().requires_grad_()
            reward.requires_grad_()
            score = reward(given, ["a fox", "two boats"]).score
            score.sum().backward()
            results.append((score.detach(), given.grad))
            assert not any(parameter.requires_grad for parameter in reward.parameters())
        close(results[0][0], results[1][0])
        close(results[0][1], results[1][1])
        held = [sharding.held_bytes(reward.reader.network) for reward in rewards]
        assert held[1] / held[0] <= LARGEST_SHARE


def train(*argv: str) -> int:
    """The entry point without the report, whose charts take longer than the run."""
    from Core.training import setup

    setup.report = lambda folder: None
    return main(list(argv))


def with_a_faulty_prompt(*argv: str) -> int:
    """The entry point, in which the batch with the second prompt fails before it is sampled, and so does it alone."""
    conditions = Backbone.conditions

    def failing(backbone, prompts):
        if any("blue bird" in prompt.text for prompt in prompts):
            raise ValueError("its picture cannot be read")
        return conditions(backbone, prompts)

    from Core.backbones.opensora import OpenSora

    OpenSora.conditions = failing
    return main(list(argv))


def loaded(family: str, folder: str, mesh, dtype: str = "fp32") -> tuple[Backbone, list]:
    keys = {"num_sampling_steps": 2, "dtype": dtype, **SMALLER.get(family, {})}
    config = pipelines.config_for(family, Path(folder), **keys)
    backbone = new_backbone(config, torch.device("cpu"))
    backbone.mesh = mesh
    encoded = encode_prompts(backbone, config.prompt_list, config.models.text_cache)
    backbone.load()
    return backbone, encoded


def adapter_gradient(backbone: Backbone, encoded: list, grad_checkpoint: bool | str = True) -> Tensor:
    """Through a step without and a step with a graph, which is recomputed block by block."""
    if grad_checkpoint == "parts":
        recompute_parts(backbone.blocks)
    pipelines.with_adapter(backbone)
    if grad_checkpoint:
        backbone.enable_checkpointing()
    noise = torch.randn(len(encoded), *backbone.latent_shape(), generator=torch.Generator().manual_seed(1))
    predict = backbone.predictor([backbone.features(e) for e in encoded])
    step = DenoisingStep(predict, backbone.process, backbone.timesteps(len(noise)))
    with torch.no_grad(), backbone.no_grad_steps():
        z = run_steps(step, noise, 0, 1)
    run_steps(step, z, 1, 2).square().mean().backward()
    return taken_gradient(backbone)


def taken_gradient(backbone: Backbone) -> Tensor:
    """The adapter's gradient as one vector, which is forgotten."""
    parts = []
    for parameter in lora.parameters(backbone.denoiser).values():
        parts.append((torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten())
        parameter.grad = None
    return torch.cat(parts)


def close(wanted: Tensor, found: Tensor, tolerance: float = TOLERANCE["fp32"]) -> None:
    """To the rounding of a dtype, which depends on where in memory a weight lies."""
    assert wanted.norm() > 0
    assert (found - wanted).norm() <= tolerance * wanted.norm()
