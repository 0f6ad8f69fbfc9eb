"""Promises of the timing of a round: its parts add up, and its file says what was timed."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import round as benchmark
from ssdkd.muon import Muon


def test_a_round_is_its_floor_and_what_is_told_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "round.json"
    words = ["--tasks", "digits", "--repetitions", "1", "--buffers", "300", "--image", "1,8,8", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["round", *words])
    threads = torch.get_num_threads()
    try:
        assert benchmark.main() == 0
    finally:
        torch.set_num_threads(threads)
    written = json.loads(file.read_text())
    (row,) = written["rounds"]
    assert row["task"] == "digits"
    assert row["ratio"] == pytest.approx(row["round_seconds"] / row["floor_seconds"])
    assert sum(row["floor"].values()) == pytest.approx(row["floor_seconds"])
    assert sum(row["above"].values()) == pytest.approx(row["round_seconds"] - row["floor_seconds"])
    (replay,) = written["replay"]
    assert replay["capacity"] == 300
    assert replay["bytes_per_sample"] > replay["image_bytes"] == 64
    assert {"ssdkd", "multinomial"} <= set(replay["microseconds"])


@pytest.mark.parametrize(("task", "kind"), [("digits", torch.optim.SGD), ("mnist", torch.optim.SGD), ("cifar10", Muon)])
def test_the_floor_has_the_optimiser_of_the_round(task: str, kind: type[torch.optim.Optimizer]) -> None:
    """Also where the job leaves it open, which is no name of an optimiser."""
    threads = torch.get_num_threads()
    try:
        engine = benchmark.prepare(task, None, "cpu", {})
    finally:
        torch.set_num_threads(threads)
    assert type(benchmark.Floor(engine).optimizer) is type(engine.distiller.optimizer) is kind
