"""Promises of the table of costs: every case in a process of its own, its time split, its memory its own."""

import json
from pathlib import Path

import pytest

from benchmarks import cost as benchmark


def test_memory_grows_with_the_buffer_and_a_round_is_the_sum_of_its_phases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cost.json"
    monkeypatch.setattr(benchmark, "AXES", {"capacity": (64, 100_064)})
    benchmark.run(["--axes", "capacity", "--rounds", "1", "--json", str(file)])
    small, large = json.loads(file.read_text())["cases"]
    for row in (small, large):
        assert row["round_seconds"] == pytest.approx(sum(row["phases"].values()))
        assert min(row["phases"].values()) > 0
    held = 100_000 * large["bytes_per_sample"] / 2**20
    assert large["peak_mib"] - small["peak_mib"] == pytest.approx(held, rel=0.5)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_case_that_fails_says_which_process_it_was() -> None:
    with pytest.raises(benchmark.SsdkdError, match="code 3"):
        benchmark.in_a_process(["-c", "raise SystemExit(3)"])
