"""The promise that a run killed at any instant goes on to the identical student, at a few random instants."""

import os

import pytest

from benchmarks.kill_test import Kill, drawn_kills, kill_test


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
