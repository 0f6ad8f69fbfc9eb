"""The promise that a run killed at any instant goes on to the identical student, at a few random instants."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_agents import only_run, train_flags

import ssdkd
from agents import train
from benchmarks import kill_test as benchmark
from benchmarks.kill_test import Undisturbed, drawn_kills, kill_test
from ssdkd import run as command

ROOT = Path(ssdkd.__file__).resolve().parent.parent


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize(
    ("fault", "left"),
    [
        ("write:2:kill", []),  # in the middle of the first checkpoint
        ("replace:4:kill", ["round-00000016.safetensors"]),  # the second one is on the disk, but without its name
    ],
)
def test_a_training_killed_while_it_saves_goes_on(fault: str, left: list[str], tmp_path: Path) -> None:
    flags = train_flags(tmp_path, "ppo", "--evaluate-seeds", "0", "--steps", "48")
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SSDKD_FAULT": fault}
    died = subprocess.run([sys.executable, "-m", "agents.train", *flags], env=variables, timeout=120, check=False)
    assert died.returncode == -signal.SIGKILL
    folder = only_run(tmp_path)
    assert sorted(path.name for path in (folder / "checkpoints").glob("round-*")) == left
    assert train.main(["--resume", str(folder), "--quiet"]) == 0
    assert (folder / "policy.safetensors").is_file()
    assert (folder / "checkpoints" / "round-00000048.safetensors").is_file()


def test_a_training_says_which_damaged_checkpoint_it_skips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(train_flags(tmp_path, "ppo", "--evaluate-seeds", "0", "--steps", "32")) == 0
    newest = sorted((only_run(tmp_path) / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:-10])
    assert train.main(["--resume", str(only_run(tmp_path)), "--steps", "48", "--quiet"]) == 0
    assert f"warning: skipped a checkpoint: checkpoint {newest} is damaged" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_run_killed_again_and_again_loses_at_most_an_interval_each_time() -> None:
    options = ["--rounds", "8", "--inversion.warmup", "4", "--checkpoint.rounds", "2", "--checkpoint.minutes", "0"]
    outcomes, verdicts = kill_test(6, per_run=3, seed=0, jobs=1, options=options, interval=2)
    assert verdicts == [True, True]
    assert all(outcome.lost <= 2 for outcome in outcomes)
    assert sum(outcome.killed for outcome in outcomes) >= 3
    assert any(outcome.inside == "checkpoints" for outcome in outcomes)


def test_the_kills_follow_from_the_seed_and_most_that_hit_a_file_hit_a_checkpoint() -> None:
    first = drawn_kills(50, 5, 0)
    assert first == drawn_kills(50, 5, 0) != drawn_kills(50, 5, 1)
    assert [len(kills) for kills in first] == [5] * 10
    assert [len(kills) for kills in drawn_kills(7, 3, 0)] == [3, 3, 1]
    for kills in first:
        moments = [kill.moment for kill in kills]
        assert moments == sorted(moments), "a later kill is of a later moment"
    files = [kill for kills in first for kill in kills if kill.operation]
    assert len(files) == 25
    assert sum(kill.part == "checkpoints" for kill in files) >= 13
    assert {kill.operation for kill in files} == {"write", "fsync", "replace"}


def test_a_moment_is_a_round_of_the_undisturbed_run() -> None:
    whole = Undisturbed(rounds=100, seconds=60.0, before=10.0, student="")
    assert whole.round_at(10 / 60) == pytest.approx(0.0)
    assert whole.round_at(35 / 60) == pytest.approx(50.0)
    assert whole.round_at(0.0) < 0


def test_a_run_that_is_refused_is_refused_as_by_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        kill_test(1, per_run=1, seed=0, jobs=1, options=["--roundz", "3"], interval=2)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: unknown option --roundz")


def test_runs_are_compared_on_the_cpu_unless_another_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def noted(kills: int, per_run: int, seed: int, jobs: int, options: list[str], interval: int) -> Any:
        asked.append(command.read_command_line(options)[0].device)
        return [SimpleNamespace(lost=0)], [True]

    monkeypatch.setattr(benchmark, "kill_test", noted)
    benchmark.run([])
    benchmark.run(["--device", "cuda"])
    assert asked == ["cpu", "cuda"]
