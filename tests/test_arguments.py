"""The promise that what a benchmark cannot do is one sentence, before the work and before the head of a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cost, default_run, kill_test, learning_curve, make_family, screen, switches, units, views
from benchmarks import round as rounds
from ssdkd.errors import run_command

WRONG: list[tuple[Any, str, str]] = [
    (cost, "--axes capacity,foo", "--axes: 'foo' is none of capacity, classes, size, teacher."),
    (cost, "--rounds 0", "--rounds: at least 1."),
    (default_run, "--seeds 0", "--seeds: at least 1."),
    (default_run, "--jobs 0", "--jobs: at least 1."),
    (default_run, "--first -1", "--first: at least 0."),
    (default_run, "--seeds 1 --jobs 1 --foo", "unknown option --foo."),
    (kill_test, "--jobs 0", "--jobs: at least 1."),
    (kill_test, "--kills-per-run 0", "--kills-per-run: at least 1."),
    (learning_curve, "a=nowhere --out curve.png", "nowhere holds no curves of a training"),
    (learning_curve, "a=. --out curve.png", ". holds no curves of a training"),
    (learning_curve, "foo --out curve.png", "expected NAME=FOLDER, got 'foo'."),
    (learning_curve, "a=. --smooth 0 --out curve.png", "--smooth: at least 1."),
    (make_family, "--processes 0 --out family", "--processes: at least 1."),
    (rounds, "--tasks digits --repetitions 0", "--repetitions: at least 1."),
    (rounds, "--tasks foo", "--tasks: 'foo' is none of digits, mnist, cifar10."),
    (rounds, "--buffers many", "--buffers: expected whole numbers from 1 on, comma-separated, got 'many'."),
    (rounds, "--image 1,28", "--image: expected channels, height and width, got '1,28'."),
    (rounds, "--tasks digits,mnist --mnist-teacher nowhere", "weights file nowhere does not exist"),
    (screen, "--processes 0 --out pairs.jsonl", "--processes: at least 1."),
    (switches, "--tasks foo", "--tasks: 'foo' is none of digits, mnist, cifar10."),
    (switches, "--tasks mnist --mnist-teacher nowhere", "weights file nowhere does not exist"),
    (switches, "--turns 0", "--turns: at least 1."),
    (units, "--tasks digits foo", "config 'foo' is neither a file nor a ready-made config"),
    (units, "--family -1", "--family: at least 0."),
    (views, "--timed x", "--timed: expected whole numbers from 0 on, comma-separated, got 'x'."),
    (views, "--seeds 0", "--seeds: at least 1."),
]


@pytest.mark.parametrize(("module", "words", "told"), WRONG)
def test_an_option_that_cannot_be_is_one_sentence(
    module: Any,
    words: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    code = run_command(module.run, words.split())
    torch.set_num_threads(threads)
    said = capsys.readouterr()
    assert code == 2
    assert said.err.startswith(f"error: {told}")
    assert said.err.count("\n") == 1
    assert said.out == ""


@pytest.mark.parametrize(
    ("words", "told"), [("--every 0", "--every: at least 1."), ("--rounds 9", "--rounds: at least 100.")]
)
def test_soaking_looks_at_a_round(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    soak = pytest.importorskip("benchmarks.soak", reason="POSIX")
    assert run_command(soak.run, words.split()) == 2
    assert capsys.readouterr() == ("", f"error: {told}\n")


def test_fuzzing_takes_a_worker(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fuzz = pytest.importorskip("benchmarks.fuzz", reason="POSIX")
    monkeypatch.setattr("sys.argv", ["fuzz", "--workers", "0"])
    with pytest.raises(SystemExit) as ended:
        fuzz.main()
    assert ended.value.code == 2
    assert "--workers and --cases must be at least 1" in capsys.readouterr().err
