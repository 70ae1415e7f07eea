"""Bytes of the tensors that are alive, followed storage by storage: on real tensors, or on those without content."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

COLLECT_EVERY = 20  # new storages, at least
COLLECT_LATEST = 640
# (operator, its arguments) → bytes that its kernel allocates and frees again, which no tensor shows
Workspace = Callable[[Any, tuple], int]


class LiveBytes(TorchDispatchMode):
    """Peak bytes of the tensors that operators made since it was entered, while they lived.

    Every operator is seen, whatever the device; tensors on the meta device count as nothing.

    Args:
        workspace: of kernels that need more than their outputs.

    Attributes:
        now, peak: bytes, the latter since it was entered or since the last ``lap``.
        phases: peak bytes by the name given to ``lap``.
    """

    def __init__(self, workspace: Workspace | None = None):
        super().__init__()
        self.now = self.peak = 0
        self.phases: dict[str, int] = {}
        self.sizes: dict[int, int] = {}  # of living storages
        self.made, self.patience = 0, COLLECT_EVERY
        self.workspace = workspace
        self.counts = True

    def __enter__(self):
        self.resizes = self.following_resizes()
        self.resizes.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.resizes.__exit__(*error)
        super().__exit__(*error)

    @contextmanager
    def following_resizes(self) -> Iterator[None]:
        """Within this context a resized storage counts with its new size; split or streamed weights are freed so."""
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            done = resize(storage, size)
            self._resize(id(storage), size)
            return done

        torch.UntypedStorage.resize_ = resized
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = storages_in((args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.note(func, args, given, out)
        return out

    def note(self, func: Any, args: tuple, given: set[int], out: Any) -> None:
        """Count what an operator made that is not in the storages it was ``given``."""
        for tensor in map(local_part, tensors_in(out)):
            if tensor.device.type != "meta" and id(tensor.untyped_storage()) not in given:
                self._add(tensor.untyped_storage())
        if self.workspace and (extra := self.workspace(func, args)):
            self.reach(extra)

    def add(self, module: nn.Module) -> None:
        """Count parameters and buffers that were made elsewhere."""
        for tensor in (*module.parameters(), *module.buffers()):
            self._add(local_part(tensor).untyped_storage())

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Within this context new tensors count as nothing, until their storage is given another size."""
        self.counts = False
        try:
            yield
        finally:
            self.counts = True

    def height_of(self, run: Callable[[], Any]) -> tuple[Any, int]:
        """What ``run`` returns, and by how many bytes it raised the living ones at its highest point."""
        gc.collect()  # garbage of others that the run frees would lower the height
        before, start = self.peak, self.now
        self.peak = start
        out = run()
        height = self.peak - start
        self.peak = max(before, self.peak)
        return out, height

    def reach(self, height: int) -> None:
        """Something took so many bytes beside those that live, and gave them up again."""
        self._raise_peak(self.now + height)

    def lap(self, name: str) -> None:
        """The peak since the last lap is that of phase ``name``, or of an earlier one of that name if larger."""
        self.phases[name] = max(self.phases.get(name, 0), self.peak)
        self.peak = self.now

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self.sizes:
            return
        self.sizes[key] = 0
        self.made += 1
        weakref.finalize(storage, self._drop, key)
        self._resize(key, storage.nbytes() if self.counts else 0)

    def _resize(self, key: int, size: int) -> None:
        if key in self.sizes:
            self.now += size - self.sizes[key]
            self.sizes[key] = size
            self._raise_peak(self.now)

    def _raise_peak(self, wanted: int) -> None:
        if wanted > self.peak and self.made >= self.patience:
            before = self.now
            gc.collect()  # under a dispatch mode, what checkpointing recomputed hangs in cycles
            freed = before - self.now
            # A forward pass grows without any cycle: there to look often costs time for nothing.
            self.patience = COLLECT_EVERY if freed else min(2 * self.patience, COLLECT_LATEST)
            self.made, wanted = 0, wanted - freed
        self.peak = max(self.peak, wanted)

    def _drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def local_part(tensor: Any) -> Tensor:
    """What this process holds of a tensor that may be split over several."""
    return getattr(tensor, "_local_tensor", tensor)


def storages_in(values: Any) -> set[int]:
    return {id(tensor.untyped_storage()) for tensor in tensors_in(values)}


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Tensors among an operator's arguments or results, in lists and dicts too."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))
