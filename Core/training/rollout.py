"""The videos of a training step: which noise, which frames, which sampling steps keep their gradient.

Axes: B batch, C channels, T latent frames, h, w latent rows and columns, F chosen frames.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from Core.backbones import Backbone
from Core.data.prompts import Prompt
from Core.sampling.frame_choice import choose_frames
from Core.sampling.no_grad_steps import lean_steps, reused_outputs
from Core.schedulers.rf import euler_sample, first_gradient_step, thin_prefix
from Core.training.nan_check import BaseDistance
from Core.utils import rng as draws
from Core.utils.timing import Stopwatch


class Rollout:
    """Sampling with a gradient window; every draw follows from seed, step and global sample number.

    Args:
        text: features [L, D] of every caption of the prompts.
    """

    def __init__(self, config, backbone: Backbone, text: Mapping[str, Tensor]):
        self.config, self.backbone, self.text = config, backbone, text

    def gradient_window(self, step: int) -> int:
        """First sampling step with a gradient; one draw per optimiser step, the same on every process."""
        generator = draws.generator(self.config.seed, "window", step)
        return first_gradient_step(
            self.config.backprop_mode,
            self.backbone.num_sampling_steps,
            lambda n: int(torch.randint(n, (), generator=generator)),
            self.config.backprop_steps,
        )

    def sample(
        self,
        prompts: Sequence[Prompt],
        samples: Sequence[int],
        first: int,
        repeat: int = 0,
        finished: Tensor | None = None,
        clock: Stopwatch | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Latents [B, C, T, h, w] whose graph begins at step ``first``, and their distance [B] to the base model.

        A ``repeat`` after the first noises the ``finished`` latents back to the last step and takes that step
        again: more gradients for one run of the sampler (DRaFT-LV, Clark et al., 2023). The distance is 0
        unless ``kl_weight`` asks for it. ``clock`` learns when the gradient steps begin.
        """
        timesteps = self.backbone.timesteps(len(samples))
        z = self.noise(samples, repeat)
        if repeat:
            timesteps, first = timesteps[-1:], 0
            level = (timesteps[0] / self.backbone.num_timesteps)[:, None, None, None, None]
            z = (1 - level) * finished + level * z
        timesteps, first = thin_prefix(timesteps, first, self.config.prefix_steps)
        text = [self.text[self.backbone.caption(prompt.text())] for prompt in prompts]
        distance = None
        if self.config.kl_weight:
            distance = BaseDistance(self.backbone.denoiser, self.backbone.velocity(text, guided=False))
        velocity = self.backbone.velocity(
            text,
            null_grad=self.config.guidance_grad == "both",
            observe=distance.observe if distance else None,
        )
        z = euler_sample(
            clock.split(velocity) if clock else velocity,
            z,
            timesteps,
            first_gradient_step=first,
            num_timesteps=self.backbone.num_timesteps,
            detach_input=self.config.detach_input,
            prefix=self.prefix(),
        )
        return z, distance.per_sample() if distance else z.new_zeros(len(samples))

    @contextmanager
    def prefix(self) -> Iterator[None]:
        """Context of the steps before the gradient window."""
        model, every = self.backbone.denoiser, self.config.prefix_cache
        with ExitStack() as stack:
            stack.enter_context(lean_steps(self.backbone, compiled=self.config.compile_blocks))
            if every > 1:
                stack.enter_context(reused_outputs(model, self.backbone.residual_branches(), every))
            yield

    def noise(self, samples: Sequence[int], repeat: int = 0) -> Tensor:
        """[B, C, T, h, w], each video's own."""
        generators = self._generators("noise", samples, repeat)
        return draws.noise(generators, self.backbone.latent_shape()).to(self.backbone.device)

    def frame_numbers(self, samples: Sequence[int], repeat: int = 0) -> Tensor:
        """Latent frames [B, F] to decode; on the CPU, where reading them waits for no GPU."""
        frames = self.backbone.latent_shape()[1]
        generators = self._generators("frame", samples, repeat)
        return choose_frames(self.config.decode_frame, frames, generators)

    def _generators(self, name: str, samples: Sequence[int], repeat: int) -> list[torch.Generator]:
        return [draws.generator(self.config.seed, name, sample, repeat) for sample in samples]
