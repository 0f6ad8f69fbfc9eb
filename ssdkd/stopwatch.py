"""How long each phase of a round takes, on a device that works while the host goes on too."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

Moment = tuple[float, Any]  # the host's clock, and a mark in the device's queue


class Stopwatch:
    """Seconds of each phase.

    A GPU has only been handed its work when the host goes on to the next phase. So the ends of a phase are marked in
    its queue as well, and the time between the marks is read when the device is waited for anyway, once a round.
    """

    def __init__(
        self, phases: Iterable[str], device: torch.device, mark: Callable[[torch.device], Any] | None = None
    ) -> None:
        """`mark` puts a mark into the device's queue: those of CUDA for a GPU, for a CPU none."""
        self.seconds = dict.fromkeys(phases, 0.0)
        self._device = device
        self._mark = mark or (_mark_of_cuda if device.type == "cuda" else None)
        self._marked: list[tuple[str, Any, Any]] = []

    def now(self) -> Moment:
        return time.perf_counter(), self._mark(self._device) if self._mark is not None else None

    def stop(self, phase: str, start: Moment) -> float:
        """The phase that began at `start` ends: -> how long the host was at it."""
        end = self.now()
        took = end[0] - start[0]
        if end[1] is None:
            self.seconds[phase] += took
        else:
            self._marked.append((phase, start[1], end[1]))
        return took

    def read(self) -> None:
        """Wait for the device, and count what it took for the phases that have ended."""
        for phase, start, end in self._marked:
            end.synchronize()
            self.seconds[phase] += start.elapsed_time(end) / 1000.0  # it counts milliseconds
        self._marked.clear()


def _mark_of_cuda(device: torch.device) -> torch.cuda.Event:
    mark = torch.cuda.Event(enable_timing=True)
    mark.record(torch.cuda.current_stream(device))
    return mark
