"""Where the time of a step goes."""

import time

import torch


class Stopwatch:
    """Seconds between laps, added up by name; on a GPU measured by events, so that no lap waits for it."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.laps: list[tuple[str, object]] = []
        self.started = self._now()

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, name: str) -> None:
        """End the current stretch and name it."""
        self.laps.append((name, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds by name; waits for the GPU."""
        if self.on_gpu:
            torch.cuda.synchronize()
        total: dict[str, float] = {}
        before = self.started
        for name, now in self.laps:
            passed = before.elapsed_time(now) / 1000 if self.on_gpu else now - before
            total[name] = total.get(name, 0.0) + passed
            before = now
        return total
