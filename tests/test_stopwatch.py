"""Promise of the stopwatch: a phase takes as long as the device was at it, also where the host did not wait."""

import time
from itertools import count

import pytest
import torch

from ssdkd.stopwatch import Stopwatch


class Mark:
    """A mark in a queue that the device reaches a second after the one before it."""

    passed = count()

    def __init__(self) -> None:
        self.at, self.waited = 1000.0 * next(self.passed), False

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, end: "Mark") -> float:
        assert end.waited
        return end.at - self.at


def test_on_a_cpu_a_phase_takes_what_the_host_took() -> None:
    watch = Stopwatch(("replay", "rest"), torch.device("cpu"))
    start = watch.now()
    time.sleep(0.05)
    assert watch.stop("replay", start) == watch.seconds["replay"]
    assert 0.05 <= watch.seconds["replay"] < 1.0
    watch.read()
    assert watch.seconds["rest"] == 0.0


def test_on_a_gpu_a_phase_takes_what_the_device_took_once_it_was_waited_for() -> None:
    watch = Stopwatch(("replay", "rest"), torch.device("cuda"), lambda device: Mark())
    for phase in ("replay", "rest", "replay"):
        assert watch.stop(phase, watch.now()) < 0.5
    assert watch.seconds == {"replay": 0.0, "rest": 0.0}
    for _ in range(2):  # nothing is counted twice
        watch.read()
        assert watch.seconds == pytest.approx({"replay": 2.0, "rest": 1.0})
