"""A clock for calls with cold caches, on a CPU or a GPU."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


class Clock:
    """Times calls with cold caches. The calls take turns, so that a slow minute of the machine affects all of them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Reading this buffer empties the caches, since it is larger than any L2 or L3 in use. It is not written: dirty
        # cache lines would go back to memory during the timed calls.
        self._flush = torch.zeros(8 << 20 if device.type == "cpu" else 32 << 20, dtype=torch.int64, device=device)

    def measure(
        self, calls: Sequence[Callable[[], Any]], repeats: int, tick: Callable[[], object] = lambda: None
    ) -> list[list[float]]:
        """Return the times of each call in microseconds, ``repeats`` of them; ``tick`` is called after each turn."""
        times: list[list[float]] = [[] for _ in calls]
        ready = calls if self.device.type == "cpu" else [self._graph(call) for call in calls]
        for turn in range(repeats + 2):
            order = [(turn + i) % len(ready) for i in range(len(ready))]
            for i, microseconds in zip(order, self._round([ready[i] for i in order]), strict=True):
                if turn >= 2:  # the first two turns warm up
                    times[i].append(microseconds)
            tick()
        return times

    def bandwidth(self) -> tuple[float, float]:
        """Return the GB/s of a copy (bytes read plus written) and of a read, both of more bytes than a cache holds."""
        size = (128 << 20) if self.device.type == "cpu" else (1 << 30)
        source = torch.ones(size // 2, dtype=torch.bfloat16, device=self.device)
        target = torch.empty_like(source)
        grid = source.view(1024, -1)
        copy, read = self.measure([lambda: target.copy_(source), lambda: grid.amax(dim=1)], 11)
        return 2 * size / statistics.median(copy) / 1e3, size / statistics.median(read) / 1e3

    def _round(self, calls: list[Callable[[], Any]]) -> list[float]:
        if self.device.type == "cpu":
            times = []
            for call in calls:
                self._flush.amax()
                began = time.perf_counter()
                call()
                times.append((time.perf_counter() - began) * 1e6)
            return times
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in calls]
        for call, (start, end) in zip(calls, events, strict=True):
            self._flush.amax()  # this also keeps the GPU busy while the host enqueues the timed call
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) * 1e3 for start, end in events]

    def _graph(self, call: Callable[[], Any]) -> Callable[[], Any]:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay
