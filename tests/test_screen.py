"""Promises of the screening of coefficients: effects are found whatever else is shifted, and pairs are played once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks import screen
from benchmarks.screen import (
    Pair,
    columns,
    dearer_than,
    effects,
    halves_of,
    main,
    no_longer_than,
    play_pair,
    shift_at,
    show,
)
from ssdkd.coefficients import RANGES
from ssdkd.config import read_yaml
from ssdkd.errors import ConfigError

TINY = """
base: digits
common:
  rounds: 2
  inversion: {images: 8, steps: 1, warmup: 1}
  buffer: {capacity: 16, views: 1}
  distillation: {batch: 8, steps: 2}
  probe: {images: 8}
tasks: [{}, {rounds: 3}]
"""


def place(name: str) -> int:
    return [r.name for r in RANGES].index(name)


def test_effects_are_told_apart_though_all_are_shifted_at_once() -> None:
    random = np.random.default_rng(0)
    signs = random.choice([-1.0, 1.0], (400, 5))
    true = np.array([1.0, 0.0, -0.5, 0.0, 0.25])
    found, errors = effects(signs, signs @ true + random.normal(size=400))
    assert np.abs(found - true).max() < 0.2
    assert errors == pytest.approx(np.full(5, 0.05), rel=0.2)


def test_a_shift_is_steady_or_rises_with_progress() -> None:
    shifts = {"effort": 0.25, "effort*progress": -0.1, "alpha*progress": 0.3}
    for progress, effort, alpha in ((0.0, 0.35, -0.3), (0.5, 0.25, 0.0), (1.0, 0.15, 0.3)):
        added = shift_at(shifts, progress)
        assert added[place("effort")] == pytest.approx(effort)
        assert added[place("alpha")] == pytest.approx(alpha)
        assert np.count_nonzero(added) <= 2


def test_the_same_pair_is_the_same_and_its_episodes_differ_by_the_shifts_alone() -> None:
    task = yaml.safe_load(TINY)["common"]
    pair, again = (play_pair(3, "ssdkd", 7, "digits", task, {"effort": 0.5}) for _ in range(2))
    assert pair == again
    assert pair.shifts.keys() == {"effort", "effort*progress"}
    first, second = pair.curves
    assert first[0] == second[0]  # the same student from the same start
    assert first != second
    none = play_pair(3, "ssdkd", 7, "digits", task, {})
    assert none.curves[0] == none.curves[1]


def test_pairs_that_were_played_are_not_played_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family, out = tmp_path / "tiny.yaml", tmp_path / "pairs.jsonl"
    family.write_text(TINY)
    asked = ["--family", str(family), "--policy", "ssdkd", "--turn", "effort=0.5", "--out", str(out)]
    assert main([*asked, "--pairs", "2"]) == 0
    assert "2 pairs do not tell" in capsys.readouterr().out
    first = out.read_text()
    out.write_text(first + '{"number": 2, "cut')
    assert main([*asked, "--pairs", "4"]) == 0
    told = capsys.readouterr().out
    assert out.read_text().startswith(first)
    assert [json.loads(line)["number"] for line in out.read_text().splitlines()] == [0, 1, 2, 3]
    for shift in ("effort", "effort*progress"):
        assert f"| `{shift}` | 0.5 |" in told


def test_ctrl_c_keeps_the_pairs_that_were_played_and_says_how_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    family, out = tmp_path / "tiny.yaml", tmp_path / "pairs.jsonl"
    family.write_text(TINY)

    def interrupted(number: int, *rest: Any) -> Pair:
        if number == 1:
            raise KeyboardInterrupt
        return play_pair(number, *rest)

    monkeypatch.setattr(screen, "play_pair", interrupted)
    asked = ["--family", str(family), "--policy", "ssdkd", "--turn", "effort=0.5", "--pairs", "2", "--out", str(out)]
    assert main(asked) == 130
    assert capsys.readouterr().err == "stopped; the same command goes on with the pairs that are left.\n"
    assert [json.loads(line)["number"] for line in out.read_text().splitlines()] == [0]


def test_an_effect_that_hangs_on_what_is_seen_is_found() -> None:
    random = np.random.default_rng(0)
    pairs = []
    for number in range(200):
        sign, seen = float(random.choice([-1.0, 1.0])), float(random.normal(3.0, 0.5))
        half = sign * (1.0 + 2.0 * (seen - 3.0) / 0.5)
        shifts, begins = {"effort": 0.25 * sign}, {"budget": seen}
        pairs.append(Pair(number, "", 0, "", shifts, begins, [half, -half], [0.0, 0.0], [[0.0] * 31] * 2))
    shifted = columns(pairs, "budget")
    found, _ = effects(np.stack(list(shifted.values()), axis=1), halves_of(pairs)["area"])
    spread = np.std([pair.begins["budget"] for pair in pairs])
    assert list(shifted) == ["`effort` | 0.25", f"`effort` | 0.25, `budget` {spread:.3f} higher"]
    assert found == pytest.approx([1.0, 2.0], rel=0.2)


def test_pairs_from_before_an_entry_are_not_told_apart_by_it() -> None:
    pair = Pair(0, "", 0, "", {"effort": 0.25}, {"budget": 0.4}, [1.0, 2.0], [1.0, 2.0], [[0.0] * 31] * 2)
    with pytest.raises(ConfigError, match="--by: there are pairs from before the entry novelty"):
        columns([pair], "novelty")


def test_pairs_whose_signs_go_together_are_too_few(capsys: pytest.CaptureFixture[str]) -> None:
    both = [{"effort": 0.25 * sign, "alpha": -0.3 * sign} for sign in (1.0, -1.0, 1.0, 1.0)]
    show([Pair(n, "", 0, "", shifts, {}, [1.0, 2.0], [1.0, 2.0], [[0.0] * 31] * 2) for n, shifts in enumerate(both)])
    assert capsys.readouterr().out == "4 pairs do not tell 2 effects apart: play more\n"


def test_tasks_are_chosen_by_their_rounds_wherever_these_stand() -> None:
    tasks: list[dict[str, Any]] = [{"rounds": 3}, {}, {"rounds": None}, {"minutes": 1.0}, {"rounds": 30}]
    assert no_longer_than(20, tasks, {"rounds": 20}) == [{"rounds": 3}, {}]
    assert no_longer_than(19, tasks, {"rounds": 20}) == [{"rounds": 3}]
    assert no_longer_than(20, tasks, {"minutes": 1.0}) == []
    assert no_longer_than(100, [{}], {}) == [{}]


def test_tasks_are_chosen_by_what_their_images_cost() -> None:
    base = {**read_yaml("digits")[0], **yaml.safe_load(TINY)["common"]}
    cheap, dear = ({"inversion": {"steps": steps}} for steps in (1, 50))
    assert dearer_than(0.0, [cheap, dear], base) == [cheap, dear]
    assert dearer_than(0.9, [cheap, dear], base) == [dear]
    assert dearer_than(1.0, [cheap, dear], base) == []


def line_with(**other: Any) -> str:
    """A pair as a file has it."""
    whole: dict[str, Any] = {"number": 0, "policy": "ssdkd", "seed": 0, "task": ""}
    whole |= {"shifts": {"effort": 0.5}, "begins": {"budget": 0.4}}
    whole |= {"area": [1.0, 2.0], "final": [1.0, 2.0], "curves": [[0.0] * 31] * 2}
    return json.dumps({**whole, **other}) + "\n"


@pytest.mark.parametrize(
    "held",
    [
        "a letter without a line's end",
        '{"seed": 1}\n',
        '{"number": 3}\n',
        line_with() + "[]\n",
        line_with() + '{"number": 1\n' + line_with(number=2),
        line_with() * 2,
        line_with(number=0.5),
        line_with(task=["rounds=2"]),
        line_with(area=[1.0]),
        line_with(final=[1.0, "2.0"]),
        line_with(curves=[[0.0] * 31, [0.0] * 30]),
        line_with(curves={"0": 1, "1": 2}),
        line_with(shifts=["effort"]),
        line_with(begins={"budget": float("nan")}),
        line_with(area=[1.0, 10**400]),
    ],
)
def test_a_file_of_somebody_else_is_left_as_it_is(
    held: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family, out = tmp_path / "tiny.yaml", tmp_path / "letter.txt"
    family.write_text(TINY)
    out.write_text(held)
    assert main(["--family", str(family), "--policy", "ssdkd", "--pairs", "1", "--out", str(out)]) == 2
    assert "is no file of pairs" in capsys.readouterr().err
    assert out.read_text() == held


def test_what_cannot_be_judged_or_told_apart_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family, out = tmp_path / "tiny.yaml", tmp_path / "pairs.jsonl"
    family.write_text(TINY)
    asked = ["--family", str(family), "--policy", "ssdkd", "--turn", "effort=0.5", "--pairs", "4"]
    assert main([*asked, "--out", str(out), "--by", "progress"]) == 2
    assert "progress is 0 at the start" in capsys.readouterr().err
    out.write_text(line_with(number=1, shifts={"effort": 0.3}))  # beyond the pairs that are asked for
    assert main([*asked, "--out", str(out), "--pairs", "1"]) == 2
    assert "another policy, seed, family or shift" in capsys.readouterr().err
    without = (
        "common:\n  dataset: null\n  image: {height: 8, width: 8, channels: 1, classes: 10, mean: [0.3], std: [0.4]}"
    )
    family.write_text(TINY.replace("common:", without))
    assert main([*asked, "--out", str(tmp_path / "others.jsonl")]) == 2
    assert "no evaluation set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--turn", "effor=0.5"], "--turn"),
        (["--turn", "effort"], "--turn"),
        (["--turn", "effort=2"], "--turn"),
        (["--by", "budge"], "--by"),
        (["--longest", "0"], "--longest"),
        (["--dearer-than", "1"], "--dearer-than"),
        (["--policy", "nobody.safetensors"], "nobody.safetensors"),
        (["--pairs", "0"], "--pairs"),
        (["--out", "o" * 300], "--out: "),
        (["--first-seed", "1"], "another policy, seed, family or shift"),
        (["--turn", "alpha=0.3"], "another policy, seed, family or shift"),
    ],
)
def test_a_mistake_is_one_sentence(
    wrong: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family, out = tmp_path / "tiny.yaml", tmp_path / "pairs.jsonl"
    family.write_text(TINY)
    out.write_text(line_with())
    assert main(["--family", str(family), "--policy", "ssdkd", "--out", str(out), *wrong]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert told in error
