"""The promise that a run killed at any instant goes on to the identical student, at a few random instants."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_agents import only_run, train_flags

import ssdkd
from agents import train
from benchmarks.kill_test import Kill, drawn_kills, kill_test

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
def test_three_random_kills_lose_at_most_one_interval() -> None:
    options = ["--rounds", "8", "--inversion.warmup", "4", "--checkpoint.rounds", "2", "--checkpoint.minutes", "0"]
    outcomes = kill_test(3, seed=0, jobs=1, options=options, interval=2)
    assert all(outcome.same_student for outcome in outcomes)
    assert all(outcome.lost <= 2 for outcome in outcomes)
    assert any(outcome.killed for outcome in outcomes)


def test_the_kills_follow_from_the_seed_and_half_of_them_hit_a_file() -> None:
    operations = {"write": 10, "replace": 10, "fsync": 20}
    first = drawn_kills(50, 60.0, operations, 0)
    assert first == drawn_kills(50, 60.0, operations, 0) != drawn_kills(50, 60.0, operations, 1)
    assert sum(bool(kill.fault) for kill in first) == 25
    assert all(0.0 < kill.seconds < 60.0 for kill in first if not kill.fault)
    assert str(Kill(fault="fsync:3:kill")) == "fsync:3"
