"""The gradient of a training step: right against central differences, and as costly as its window alone."""

import weakref
from collections.abc import Callable

import pytest
import torch
import twin_runs
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from twin_runs import SIZE

from Core.training.trainer import Trainer
from Core.utils.timing import Stopwatch

SAMPLES = (0, 1)
EPSILON = 1e-5
DIRECTIONS = 2


def frames_of(trainer: Trainer, first: int) -> Tensor:
    """Decoded frames of two samples, with a graph from sampling step ``first`` on."""
    timer = Stopwatch(trainer.backbone.device)
    z, _ = trainer.objective.rollout.sample(trainer.prompts_of(SAMPLES), SAMPLES, first, timer)
    return trainer.backbone.decode_frames(z, trainer.objective.rollout.frame_numbers(SAMPLES))


def loss_of(trainer: Trainer, first: int) -> Tensor:
    """The training step's loss of those samples: sampler, VAE, reward."""
    texts = [encoded.prompt.reward_text for encoded in trainer.prompts_of(SAMPLES)]
    return trainer.objective.reward(frames_of(trainer, first), texts).loss.mean()


def shift_inside_window(trainer: Trainer, monkeypatch) -> Callable[[list[Tensor], float], None]:
    """Make the adapter depend on the step: shifted where a graph is kept, unshifted before.

    Steps before the window have no gradient by definition, so a difference must not move them either.
    """
    make, original = trainer.backbone.predictor, [p.detach().clone() for p in trainer.parameters]
    shift = [torch.zeros_like(p) for p in original]

    def predictor(*args, **kwargs):
        inner = make(*args, **kwargs)

        def shifted(*inputs):
            if torch.is_grad_enabled():
                for parameter, start, change in zip(trainer.parameters, original, shift, strict=True):
                    parameter.data = start + change
            return inner(*inputs)

        return shifted

    def move(direction: list[Tensor], size: float) -> None:
        for parameter, start, change, towards in zip(
            trainer.parameters, original, shift, direction, strict=True
        ):
            parameter.data = start.clone()
            change.copy_(size * towards)

    monkeypatch.setattr(trainer.backbone, "predictor", predictor)
    return move


def assert_gradient_is_right(trainer: Trainer, first: int, monkeypatch) -> None:
    """Slopes along random directions, and along the gradient itself, against central differences."""
    assert frames_of(trainer, first).abs().max() < 1
    gradient = torch.autograd.grad(loss_of(trainer, first), trainer.parameters)
    assert all(bool((g != 0).any()) for g in gradient)
    norm = torch.stack([g.square().sum() for g in gradient]).sum().sqrt()
    generator = torch.Generator().manual_seed(1)
    directions = [[g / norm for g in gradient]]
    for _ in range(DIRECTIONS):
        noise = [torch.randn(g.shape, generator=generator, dtype=torch.float64) for g in gradient]
        length = torch.stack([n.square().sum() for n in noise]).sum().sqrt()
        # Part gradient, so that the slope is not the small difference of large terms.
        directions.append([n / length + g / norm for n, g in zip(noise, gradient, strict=True)])
    move = shift_inside_window(trainer, monkeypatch)
    for direction in directions:
        slope = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True)).item()
        sides = []
        for sign in (1, -1):
            move(direction, sign * EPSILON)
            sides.append(loss_of(trainer, first).item())
        measured = (sides[0] - sides[1]) / (2 * EPSILON)
        assert abs(slope - measured) <= 1e-4 * abs(measured)


@pytest.mark.parametrize(
    ("mode", "steps", "decode_frame"),
    [
        ("last", 4, 0),
        ("last", 4, "fml"),
        ("last", 4, "all"),
        ("rand", 4, -1),
        ("rand", 4, "fml"),
        ("specific", 17, 2),
        ("specific", 17, "alt"),
    ],
)
def test_gradient_matches_central_differences(mode, steps, decode_frame, double_trainer, monkeypatch):
    trainer = double_trainer(steps, backprop_mode=mode, decode_frame=decode_frame)
    # A step whose random cut-off lies in the middle, where there is a prefix and a window.
    windows = [trainer.objective.rollout.first_grad_step(step) for step in range(20)]
    first = next(window for window in windows if 0 < window < steps)
    assert mode == "rand" or set(windows) == {{"last": steps - 1, "specific": 15}[mode]}
    assert_gradient_is_right(trainer, first, monkeypatch)


def test_gradient_through_every_step_matches_central_differences(double_trainer, monkeypatch):
    trainer = double_trainer(3, backprop_steps=3, decode_frame=1)
    assert_gradient_is_right(trainer, 0, monkeypatch)


def test_checkpointing_changes_no_gradient(double_trainer):
    """Passes through a layer are counted: where its block is recomputed, and where its part is recomputed too."""
    gradients, runs = [], []
    for switch in (False, True, "parts"):
        trainer = double_trainer(backprop_steps=2, decode_frame="fml", grad_checkpoint=switch, resume="never")
        layer, passes = trainer.backbone.blocks[0].mlp.fc1, []
        layer.register_forward_hook(lambda *_, passes=passes: passes.append(torch.is_grad_enabled()))
        gradients.append(torch.autograd.grad(loss_of(trainer, 2), trainer.parameters))
        runs.append(sum(passes))
    for recomputed in gradients[1:]:
        for plain, other in zip(gradients[0], recomputed, strict=True):
            torch.testing.assert_close(plain, other, rtol=1e-9, atol=1e-15)
    assert runs == [2, 4, 6]


def test_nothing_but_the_adapter_gets_a_gradient(twin, tmp_path):
    trainer = twin_runs.built_trainer(twin, tmp_path / "run")
    loss_of(trainer, 3).backward()
    assert all(p.grad is not None for p in trainer.parameters)
    own = {id(p) for p in trainer.parameters}
    networks = (trainer.backbone.denoiser, trainer.backbone.vae, trainer.objective.reward)
    others = [
        p for network in networks for p in (*network.parameters(), *network.buffers()) if id(p) not in own
    ]
    assert others and not any(p.requires_grad or p.grad is not None for p in others)


class PeakOfSavedTensors:
    """Most bytes that the graph's saved tensors held at one time."""

    class Saved:
        def __init__(self, tensor: Tensor):
            self.tensor = tensor

    def __init__(self):
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> Saved:
        saved = self.Saved(tensor)
        size = tensor.numel() * tensor.element_size()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(saved, self._release, size)
        return saved

    def _release(self, size: int) -> None:
        self.now -= size

    def during(self, action: Callable[[], object]) -> int:
        with saved_tensors_hooks(self.pack, lambda saved: saved.tensor):
            action()
        return self.peak


@pytest.fixture
def peak_bytes(twin, tmp_path) -> Callable[[int, int], int]:
    def measure(steps: int, window: int) -> int:
        """Peak of one whole optimiser step."""
        scheduler = dict(type="rflow", num_sampling_steps=steps, cfg_scale=3.0)
        options = dict(scheduler=scheduler, image_size=SIZE, backprop_steps=window, grad_checkpoint=False)
        folder = tmp_path / f"run_{steps}_{window}"
        trainer = twin_runs.built_trainer(twin, folder, **options)
        return PeakOfSavedTensors().during(trainer.train_step)

    return measure


def test_memory_grows_with_the_window_and_not_with_the_number_of_steps(peak_bytes):
    few, many = peak_bytes(10, 1), peak_bytes(40, 1)
    assert abs(many - few) <= 0.05 * few
    two, four = peak_bytes(10, 2), peak_bytes(10, 4)
    step = two - few
    assert step > 0.05 * few
    # Each further step adds what one step keeps.
    assert four - two == pytest.approx(2 * step, rel=0.05)
