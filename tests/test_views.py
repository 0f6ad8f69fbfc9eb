"""Promises of the comparison of stored views: ratios against asking the teacher anew, and equal steps for accuracy."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import views as benchmark


def test_views_are_timed_against_asking_anew_and_compared_after_equal_steps(tmp_path: Path) -> None:
    file = tmp_path / "views.json"
    few = ["--timed", "0,2", "--turns", "1", "--steps", "2", "--compared", "0,2", "--seeds", "2", "--share", "0.003"]
    threads = torch.get_num_threads()
    try:
        benchmark.run(["--task", "digits", *few, "--json", str(file)])
    finally:
        torch.set_num_threads(threads)
    told = json.loads(file.read_text())
    anew, stored = told["steps"]
    assert (anew["views"], anew["ratio"], stored["views"]) == (0, 1.0, 2)
    assert stored["ratio"] == pytest.approx(stored["steps_per_second"] / anew["steps_per_second"])
    assert [row["views"] for row in told["accuracy"]] == [0, 2]
    for row in told["accuracy"]:
        assert row["student_steps"] == row["rounds"] * 20
        assert len(row["accuracy"]) == 2
        assert row["mean"] == pytest.approx(sum(row["accuracy"]) / 2)
    assert told["accuracy"][0]["student_steps"] == told["accuracy"][1]["student_steps"]
