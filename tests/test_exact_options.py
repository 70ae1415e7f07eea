"""What is on by default for speed or memory changes neither the final latent nor the adapter's gradient."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import twin_runs
import twins
from operators import Recorder
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from Core.backbones import ModelSettings, VideoSpec
from Core.backbones.opensora import OpenSora, OpenSoraSettings
from Core.generation.generate import generate
from Core.generation.manifest import plan_samples
from Core.modules import lora
from Core.modules.frozen_conv import forget_conv_inputs
from Core.sampling.no_grad_steps import fused_adapter
from Core.training.trainer import Trainer
from Core.utils.timing import Stopwatch
from scripts.bench.plain import kept_conv_inputs, undoing, undone

SAMPLES = (0, 1)
FIRST = 2
# Relative errors of latent and gradient. In bf16 two roundings of a twin lie 0.9% to 1.3% apart, as its captions fall.
BOUNDS = {"fp32": (1e-5, 1e-4), "bf16": (2e-2, 2e-2)}
SAVINGS = (
    "fused attention",
    "text keys and values computed once",
    "no frame mask",
    "checkpointing once",
    "fused adapter",
    "no autocast in the prefix",
    "norms in one operation",
    "rotary position in three operations",
    "modulation in one operation",
    "gates in one operation",
    "tokens in one order",
)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(scope="module", params=BOUNDS)
def trained(request, twin, tmp_path_factory) -> Trainer:
    """A trainer whose adapter is no longer zero, in the dtype of the parameter."""
    mixed = {"fp32": "no", "bf16": "bf16"}[request.param]
    folder = tmp_path_factory.mktemp("exact") / "run"
    options = dict(dtype=request.param, mixed_precision=mixed, backprop_steps=2, lora_dropout=0.1)
    trainer = twin_runs.built_trainer(twin, folder, **options)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in trainer.named_parameters.items():
        if "lora_B" in name:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    outcome(
        trainer
    )  # position tables are computed once, and would count as operators of the first test alone
    return trainer


def outcome(trainer: Trainer, samples: tuple[int, ...] = SAMPLES, step: int = 0) -> tuple[Tensor, Tensor]:
    """Final latents of two samples, and the adapter's gradient as one vector.

    The gradient is that of the training loss; in bf16 that of a projection of the latents, since the twin's scorer in
    bf16 turns a rounding of its pixels into another gradient.
    """
    lora.set_dropout(trainer.backbone.denoiser, True, 0, step)
    prompts = trainer.prompts_of(samples)
    with trainer.distributed.autocast():
        timer = Stopwatch(trainer.backbone.device)
        z, _ = trainer.objective.rollout.sample(prompts, samples, FIRST, timer)
        if trainer.backbone.dtype == torch.bfloat16:
            loss = (z * torch.randn(z.shape, generator=torch.Generator().manual_seed(3))).sum()
        else:
            frames = trainer.backbone.decode_frames(z, trainer.objective.rollout.frame_numbers(samples))
            texts = [encoded.prompt.reward_text for encoded in prompts]
            loss = trainer.objective.reward(frames, texts).loss.mean()
    gradient = torch.autograd.grad(loss, trainer.parameters)
    return z.detach(), torch.cat([g.flatten() for g in gradient])


def errors(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> list[float]:
    return [relative(*pair) for pair in zip(found, expected, strict=True)]


def bounds_of(trainer: Trainer) -> tuple[float, float]:
    return BOUNDS["bf16" if trainer.backbone.dtype == torch.bfloat16 else "fp32"]


def counted(trainer: Trainer) -> tuple[tuple[Tensor, Tensor], Counter]:
    with Recorder() as ran:
        found = outcome(trainer)
    return found, Counter(ran.calls)


def saves_nothing(name: str, dtype: torch.dtype) -> bool:
    """Whether this saving runs no other operators on a CPU in this dtype."""
    return {
        "no autocast in the prefix": True,  # it widens norms on a GPU only
        "norms in one operation": dtype == torch.float32,  # a CPU writes them out
    }.get(name, False)


@pytest.mark.parametrize("name", SAVINGS)
def test_a_saving_computes_what_the_plain_way_does(name, trained):
    assert set(SAVINGS) == undoing(trained).keys()
    found, run = counted(trained)
    with undone(trained, name):
        plain, plainly_run = counted(trained)
    assert all(e <= bound for e, bound in zip(errors(found, plain), bounds_of(trained), strict=True))
    assert (run != plainly_run) or saves_nothing(name, trained.backbone.dtype)


def test_the_plain_path_keeps_the_prefix_that_the_configuration_asks_for(trained, monkeypatch):
    with undone(trained, *SAVINGS):
        exact = outcome(trained)[0]
        assert not torch.equal(changed(trained, monkeypatch, prefix_steps=1)[0], exact)


def test_checkpointing_and_forgotten_inputs_change_no_gradient(trained, monkeypatch):
    assert any("forward" in vars(module) for module in trained.backbone.vae.modules())
    found = outcome(trained)
    with kept_conv_inputs(trained):
        plain = outcome(trained)
    assert all(e <= bound for e, bound in zip(errors(found, plain), bounds_of(trained), strict=True))
    for module in trained.backbone.denoiser.modules():
        monkeypatch.setattr(module, "grad_checkpointing", False, raising=False)
    assert errors(outcome(trained), found) == [0, 0]


def test_a_frozen_convolution_under_autocast_has_the_gradient_of_its_own():
    conv, x = nn.Conv2d(4, 4, 3).requires_grad_(False), torch.randn(1, 4, 6, 6, requires_grad=True)

    def gradient() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.autograd.grad(conv(x).float().square().sum(), x)[0]

    expected = gradient()
    forget_conv_inputs(conv)
    assert relative(gradient(), expected) <= 1e-2


def test_the_prefix_alone_fuses_the_adapter_and_leaves_autocast_to_its_own_dtype(trained, monkeypatch):
    half = trained.backbone.dtype == torch.bfloat16
    layers = [m for m in trained.backbone.denoiser.modules() if hasattr(m, "lora_A")]
    seen = []
    make = trained.backbone.predictor

    def predictor(*args, **kwargs):
        inner = make(*args, **kwargs)

        def watched(z, t, generated=None):
            fused = all("forward" in vars(layer) for layer in layers)
            seen.append((torch.is_grad_enabled(), fused, torch.is_autocast_enabled("cpu")))
            return inner(z, t, generated)

        return watched

    monkeypatch.setattr(trained.backbone, "predictor", predictor)
    outcome(trained)
    assert seen == [(False, True, False)] * FIRST + [(True, False, half)] * 2


def test_inference_adds_the_adapter_by_one_product_too(trained):
    lora.set_dropout(trained.backbone.denoiser, False)
    texts = trained.prompts_of([0])
    samples = plan_samples([text.prompt for text in texts], 1, seed=0)

    def video() -> tuple[Tensor, Counter]:
        with Recorder() as ran:
            made = generate(trained.backbone, samples, texts)
        return made, Counter(ran.calls)

    with undone(trained, "fused adapter"):
        plain, plainly_run = video()
    found, run = video()
    in_place = torch.ops.aten.addmm_
    assert run[in_place] and not plainly_run[in_place]
    assert relative(found, plain) <= 10 * bounds_of(trained)[0]


def test_weights_in_another_dtype_keep_autocast_in_the_prefix(trained, monkeypatch):
    monkeypatch.setattr(trained.backbone, "dtype", torch.float16)
    with torch.autocast("cpu", torch.bfloat16), trained.backbone.no_grad_steps():
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("place", ["entry", "body"])
def test_an_exception_leaves_no_fused_layer_behind(place, trained, monkeypatch):
    if place == "entry":
        factors = iter([(torch.zeros(1, 1), torch.zeros(1, 1))])
        monkeypatch.setattr("Core.sampling.no_grad_steps._factors", lambda layer: next(factors))
    with pytest.raises((RuntimeError, StopIteration)), fused_adapter(trained.backbone.denoiser):
        if place == "entry":
            pytest.fail("entered")
        raise RuntimeError
    assert not any("forward" in vars(m) for m in trained.backbone.denoiser.modules())


def changed(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, **values) -> tuple[Tensor, Tensor]:
    """``outcome`` with these keys of the configuration."""
    with monkeypatch.context() as patch:
        settings = dataclasses.replace(trainer.config.objective, **values)
        patch.setattr(trainer.objective.rollout, "settings", settings)
        return outcome(trainer)


def programs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("dtype", "mixed"), [("fp32", "no"), ("bf16", "bf16")])
def test_compiled_blocks_are_the_plain_path_in_a_few_programs(dtype, mixed, twin, tmp_path, monkeypatch):
    """They are traced, and split into forward and backward; to make kernels of them takes PyTorch most of a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    options = dict(dtype=dtype, mixed_precision=mixed, backprop_steps=2, lora_dropout=0.1)
    options |= dict(prompt=["fox", "a fox", "a red fox"], aes=None)  # captions of 5, 7 and 10 tokens
    plain, compiled = (
        twin_runs.built_trainer(twin, tmp_path / str(flag), compile_blocks=flag, **options)
        for flag in (False, True)
    )
    for trainer in (plain, compiled):
        for name, parameter in trainer.named_parameters.items():
            if "lora_B" in name:
                parameter.data.fill_(0.02)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counts, lengths = [], set()
    for step in range(4):
        samples = (2 * step, 2 * step + 1)
        lengths.add(max(len(p.features_of()["features"]) for p in plain.prompts_of(samples)))
        for expected, found, bound in zip(
            outcome(plain, samples, step), outcome(compiled, samples, step), BOUNDS[dtype], strict=True
        ):
            assert relative(found, expected) <= bound, step
        counts.append(programs())
    # Spatial and temporal blocks, with and without a gradient, captions of one length or of several; not each length.
    assert len(lengths) > 1 and 4 <= counts[0] and counts[-1] <= 10, counts
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_prefix_of_fewer_steps_is_another_video(trained, monkeypatch):
    latent, _ = outcome(trained)
    assert not torch.equal(changed(trained, monkeypatch, prefix_steps=1)[0], latent)
    assert torch.equal(changed(trained, monkeypatch, prefix_steps=FIRST)[0], latent)


def saved_bytes(model: nn.Module, action: Callable[[], object]) -> int:
    """Bytes of the distinct tensors that the graph of ``action`` holds, the weights of ``model`` left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        kept.append(action())
    return sum(size for storage, size in sizes.items() if storage not in weights)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(8, 8), (2, 5, 8)),
        (nn.Conv2d(8, 8, 3, padding=1, groups=2), (2, 8, 6, 6)),
        (nn.Conv2d(8, 8, 3, stride=2), (2, 8, 6, 6)),
        (nn.Conv3d(8, 8, 3, bias=False), (2, 8, 4, 6, 6)),
    ],
    ids=["linear", "grouped", "strided", "3d"],
)
def test_a_frozen_layer_keeps_no_activation(module, shape):
    module.requires_grad_(False)
    x = torch.randn(shape, requires_grad=True)
    expected = torch.autograd.grad(module(x).square().sum(), x)[0]
    forget_conv_inputs(module)
    assert saved_bytes(module, lambda: module(x)) == 0
    assert relative(torch.autograd.grad(module(x).square().sum(), x)[0], expected) <= 1e-5


def test_a_convolution_that_is_trainable_or_padded_by_name_is_left_alone():
    trainable, named = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding="same").requires_grad_(False)
    biased = nn.Conv2d(4, 4, 3)
    biased.weight.requires_grad_(False)
    for conv in (trainable, named, biased):
        forget_conv_inputs(conv)
        assert "forward" not in vars(conv)


def decoder(num_frames: int) -> OpenSora:
    """The twin's VAE alone, as the backbone holds it."""
    settings, models = OpenSoraSettings(), ModelSettings(dtype="fp32")
    backbone = OpenSora(settings, models, VideoSpec(16, 16, num_frames, 24), torch.device("cpu"))
    backbone.vae = twins.vae().requires_grad_(False)
    return backbone


def test_decoding_a_frame_keeps_a_third_less_without_the_convolutions_inputs():
    backbone = decoder(17)
    z = torch.randn(1, *backbone.latent_shape(), requires_grad=True)
    before = saved_bytes(backbone.vae, lambda: backbone.decode_frames(z, torch.tensor([[2]])))
    forget_conv_inputs(backbone.vae)
    after = saved_bytes(backbone.vae, lambda: backbone.decode_frames(z, torch.tensor([[2]])))
    assert after <= 0.7 * before


@pytest.mark.parametrize("num_frames", [17, 23, 34])
def test_a_frame_decoded_in_its_context_is_a_frame_of_the_video(num_frames):
    backbone = decoder(num_frames)
    torch.manual_seed(0)
    z = torch.randn(2, *backbone.latent_shape())
    latents = z.shape[2]
    index = torch.arange(latents).repeat(2, 1)
    frames = backbone.decode_frames(z, index, "causal")
    video = backbone.decode(z).transpose(1, 2)
    assert frames.shape == (2, latents, 3, 16, 16)
    # The last of the frames that each latent frame makes: a whole chunk's are 1, 4, 4, 4, 4.
    last = [sum(ends) for ends in zip(*_chunk_ends(num_frames), strict=True)]
    torch.testing.assert_close(frames, video[:, last], rtol=1e-4, atol=1e-4)


def _chunk_ends(num_frames: int) -> tuple[list[int], list[int]]:
    """Of each latent frame: where its chunk begins in the video, and its last frame within the chunk."""
    begins, ends = [], []
    for begin in range(0, num_frames, 17):
        frames = min(17, num_frames - begin)
        within = list(range(frames - 1, -1, -4))[::-1]
        begins += [begin] * len(within)
        ends += within
    return begins, ends


def test_the_context_reaches_the_gradient_and_checkpointing_keeps_it():
    backbone = decoder(34)
    z = torch.randn(1, *backbone.latent_shape(), requires_grad=True)
    index = torch.tensor([[2]])
    (plain,) = torch.autograd.grad(backbone.decode_frames(z, index, "causal").square().sum(), z)
    assert (plain[:, :, :5] != 0).any(dim=(0, 1, 3, 4)).all() and not plain[:, :, 5:].any()
    backbone.denoiser = twins.stdit()
    backbone.enable_checkpointing()
    (recomputed,) = torch.autograd.grad(backbone.decode_frames(z, index, "causal").square().sum(), z)
    torch.testing.assert_close(recomputed, plain)
