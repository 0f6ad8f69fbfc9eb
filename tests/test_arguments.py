"""The promise that what a benchmark cannot do is one sentence, before the work and before the head of a table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    cost,
    default_run,
    field,
    kill_test,
    learning_curve,
    make_digits,
    make_family,
    overhead,
    screen,
    selection,
    switches,
    units,
    views,
)
from benchmarks import round as rounds
from ssdkd.errors import first_line, run_command

WRONG: list[tuple[Any, str, str]] = [
    (cost, "--axes capacity,foo", "--axes: 'foo' is none of capacity, classes, size, teacher."),
    (cost, "--rounds 0", "--rounds: at least 1."),
    (default_run, "--seeds 0", "--seeds: at least 1."),
    (default_run, "--jobs 0", "--jobs: at least 1."),
    (default_run, "--first -1", "--first: at least 0."),
    (default_run, "--seeds 1 --jobs 1 --foo", "unknown option --foo."),
    (default_run, "--seed 5", "--seed: every run has its own; give --first and --seeds."),
    (default_run, "--dataset mnist", "without an evaluation set there is no gap to tell"),
    (field, "--size tiny --out field --minutes -1", "--minutes: at least 0."),
    (kill_test, "--jobs 0", "--jobs: at least 1."),
    (kill_test, "--kills-per-run 0", "--kills-per-run: at least 1."),
    (learning_curve, "a=nowhere --out curve.png", "nowhere holds no curves of a training"),
    (learning_curve, "a=. --out curve.png", ". holds no curves of a training"),
    (learning_curve, "foo --out curve.png", "expected NAME=FOLDER, got 'foo'."),
    (learning_curve, "a=. --smooth 0 --out curve.png", "--smooth: at least 1."),
    (learning_curve, "a=. --smoo 3 --out curve.png", "unrecognized arguments: --smoo 3"),
    (make_family, "--processes 0 --out family", "--processes: at least 1."),
    (overhead, "--rounds 1 --threads 1 --inversion.warmup 1", "rounds: 1 played tell nothing"),
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
    ("name", "words", "told"),
    [
        ("cost", "--rounds one", "argument --rounds: invalid int value: 'one'"),
        ("default_run", "--seeds one", "argument --seeds: invalid int value: 'one'"),
        ("field", "--size foo", "argument --size: invalid choice: 'foo'"),
        ("fuzz", "--foo", "unrecognized arguments: --foo"),
        ("kill_test", "--kills one", "argument --kills: invalid int value: 'one'"),
        ("learning_curve", "", "the following arguments are required: runs, --out"),
        ("make_digits", "--out", "argument --out: expected one argument"),
        ("make_family", "", "the following arguments are required: --out"),
        ("mean_policy", "", "the following arguments are required: trainings"),
        ("real_digits", "--seeds one", "argument --seeds: invalid int value: 'one'"),
        ("round", "--foo", "unrecognized arguments: --foo"),
        ("screen", "--longest one", "argument --longest: invalid int value: 'one'"),
        ("selection", "--seeds one", "argument --seeds: invalid int value: 'one'"),
        ("soak", "--rounds one", "argument --rounds: invalid int value: 'one'"),
        ("switches", "--foo", "unrecognized arguments: --foo"),
        ("units", "--foo", "unrecognized arguments: --foo"),
        ("views", "--task foo", "argument --task: invalid choice: 'foo'"),
    ],
)
def test_what_the_parser_refuses_is_one_sentence_that_names_the_help(
    name: str, words: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = pytest.importorskip(f"benchmarks.{name}", reason="POSIX")
    monkeypatch.setattr("sys.argv", [name, *words.split()])
    assert (module.main() if hasattr(module, "main") else run_command(module.run, None)) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {told}")
    assert said.err.endswith(f"; see python -m benchmarks.{name} --help.\n")
    assert (said.err.count("\n"), said.out) == (1, "")


@pytest.mark.parametrize(
    ("words", "told"), [("--every 0", "--every: at least 1."), ("--rounds 9", "--rounds: at least 101.")]
)
def test_soaking_looks_at_two_rounds(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    soak = pytest.importorskip("benchmarks.soak", reason="POSIX")
    assert run_command(soak.run, words.split()) == 2
    assert capsys.readouterr() == ("", f"error: {told}\n")


def test_fuzzing_takes_a_worker(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fuzz = pytest.importorskip("benchmarks.fuzz", reason="POSIX")
    for words, told in (("--workers 0", "--workers: at least 1."), ("--case 3", "--case needs --target; see ")):
        monkeypatch.setattr("sys.argv", ["fuzz", *words.split()])
        assert fuzz.main() == 2
        assert capsys.readouterr().err.startswith(f"error: {told}")


@pytest.mark.parametrize(
    ("benchmark", "arguments", "module"),
    [(make_digits, "--out made", "sklearn"), (make_family, "--out made", "sklearn"), (selection, "--seeds 1", "scipy")],
)
def test_a_package_that_is_missing_is_named_before_the_work(
    benchmark: Any,
    arguments: str,
    module: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)  # as Python sees what is not installed
    assert run_command(benchmark.run, arguments.split()) == 2
    assert capsys.readouterr().err.endswith("which is not installed: pip install -e '.[bench]'.\n")
    assert not list(tmp_path.rglob("*.*"))


def test_what_a_library_says_in_colour_is_told_without() -> None:
    assert first_line(RuntimeError("\x1b[96mThis is step 3/3\x1b[0m of the export.\nMore.")) == (
        "This is step 3/3 of the export"
    )
