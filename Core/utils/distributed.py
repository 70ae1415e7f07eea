"""accelerate lives here and nowhere else: devices, processes, autocast, gradient averaging, gathering."""

import functools
import math
import os
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.optim import Optimizer

from Core.utils.process import end_with_launcher

PROCESSES_ASKED_FOR = "VADER_NUM_PROCESSES"
# Others wait while one downloads weights or encodes captions; torch's own patience with GPUs is ten minutes.
PATIENCE = timedelta(hours=6)
SCALE_FLOOR = 1.0  # a gradient that overflows fp16 without any scaling overflows by itself


class Distributed:
    """The processes of a run and what they do together.

    Args:
        mixed_precision: ``no``, ``bf16`` or ``fp16`` arithmetic under autocast.
    """

    def __init__(self, mixed_precision: str = "no"):
        end_with_launcher()
        # accelerate keeps the precision of an earlier run in the same Python process, and refuses another.
        AcceleratorState._reset_state()
        # Told so, it joins processes on CPU cores; left to itself it starts as many trainers that ignore each other.
        on_cpu = not torch.accelerator.is_available()
        patience = InitProcessGroupKwargs(timeout=PATIENCE)
        self.accelerator = Accelerator(
            mixed_precision=mixed_precision, cpu=on_cpu, kwargs_handlers=[patience]
        )
        self._bucket: Tensor | None = None
        asked = int(os.environ.get(PROCESSES_ASKED_FOR) or os.environ.get("WORLD_SIZE") or 0)
        if asked and asked != self.accelerator.num_processes:
            raise ValueError(
                f"{asked} processes were asked for but {self.accelerator.num_processes} started; launch with "
                "`vader train`, torchrun or accelerate launch"
            )

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def num_processes(self) -> int:
        return self.accelerator.num_processes

    @functools.cached_property
    def mesh(self) -> Any:
        """All processes in a row, for networks that are split over them; they talk as they do elsewhere."""
        from torch.distributed.device_mesh import DeviceMesh

        return DeviceMesh.from_group(torch.distributed.group.WORLD, self.device.type)

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def is_first_on_machine(self) -> bool:
        return self.accelerator.is_local_main_process

    def autocast(self):
        return self.accelerator.autocast()

    def prepare(self, optimizer: Optimizer) -> Optimizer:
        """The optimiser behind the gradient scaler of fp16; the model itself is never wrapped."""
        if self.scales_gradients:
            # Its scale is made when it is first asked for, which a step without a loss does not.
            self.accelerator.scaler.scale(torch.zeros((), device=self.device))
        return self.accelerator.prepare_optimizer(optimizer)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def average_gradients(self, parameters: Iterable[nn.Parameter], flags: Sequence[bool]) -> list[bool]:
        """Replace each gradient by its mean over the processes; whether each flag is raised on any of them.

        One all-reduce carries both. A parameter that no gradient reached counts as zero. From then on the gradients lie
        in one buffer, which is kept, since on a CPU to make it anew takes longer than to send it: they must be
        forgotten (None) before the next call.
        """
        parameters = list(parameters)
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.num_processes == 1:
            return list(flags)
        raised = parameters[0].grad.new_tensor([float(flag) for flag in flags])
        parts = [*(p.grad.flatten() for p in parameters), raised]
        size = sum(part.numel() for part in parts)
        if self._bucket is None or self._bucket.numel() != size:
            self._bucket = raised.new_empty(size)
        torch.cat(parts, out=self._bucket)
        torch.distributed.all_reduce(self._bucket)
        *means, raised = self._bucket.div_(self.num_processes).split([part.numel() for part in parts])
        for p, mean in zip(parameters, means, strict=True):
            p.grad = mean.view_as(p)
        return (raised > 0).tolist()

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is raised on any process."""
        return any(self.gather_objects([flag]))

    def clip(self, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
        """Unscale fp16 gradients, clip them, and return the norm they had."""
        return float(self.accelerator.clip_grad_norm_(parameters, max_norm))

    def optimizer_step(self, optimizer: Optimizer, grad_norm: float, faulty: bool) -> bool:
        """Take the optimiser's step unless it is ``faulty`` or its gradients are not finite, and forget them.

        Returns:
            Whether fp16's scaler took the gradients for overflown, and lowered its scale for the next step. It
            starts high on purpose and finds its scale so: nothing is wrong until it stands at ``SCALE_FLOOR``.
        """
        finite, scaler = math.isfinite(grad_norm), self.accelerator.scaler
        calibrating = scaler is not None and not (faulty or finite) and scaler.get_scale() > SCALE_FLOOR
        if calibrating or (finite and not faulty):
            optimizer.step()
        elif scaler is not None:
            scaler.update(scaler.get_scale())  # it forgets that the gradients were unscaled
        optimizer.zero_grad()
        return calibrating

    @property
    def scales_gradients(self) -> bool:
        """Whether fp16's scaler is at work."""
        return self.accelerator.scaler is not None

    def scaler_state(self) -> dict | None:
        return self.accelerator.scaler.state_dict() if self.scales_gradients else None

    def load_scaler(self, state: dict | None) -> None:
        if state is not None and self.scales_gradients:
            self.accelerator.scaler.load_state_dict(state)

    def gather(self, values: Tensor) -> Tensor:
        """[B] of every process → [B · processes], on the CPU."""
        return self.accelerator.gather(values.detach().to(self.device)).cpu()

    def gather_objects(self, objects: list[Any]) -> list[Any]:
        """The lists of all processes as one, by rank."""
        return gather_object(objects) if self.num_processes > 1 else list(objects)

    def broadcast(self, value: Any) -> Any:
        """The main process's ``value``, on every process."""
        return broadcast_object_list([value])[0] if self.num_processes > 1 else value

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        self.barrier()
        self.accelerator.end_training()
