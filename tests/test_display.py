"""Promises of what is shown while a run goes on, and of the table at its end."""

import io
from typing import Any

import pytest
from rich.console import Console

from ssdkd.tracking import display as module
from ssdkd.tracking.display import Display, describe, summary_table

FACTS = {
    "round": 20.0,
    "progress": 0.25,
    "seconds": 10.0,
    "probe_kl": 0.0625,
    "probe_agreement": 0.5,
    "class_entropy": 1.0,
}


def shown_on(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> io.StringIO:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=40)
    monkeypatch.setattr(module, "Console", lambda **_: console)
    return stream


@pytest.mark.parametrize("terminal", [True, False])
def test_sentences_stand_as_they_are_however_long_and_whatever_is_in_them(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path that is broken over lines could not be copied, and a list in it is no markup."""
    stream, display = shown_on(monkeypatch, terminal), Display()
    sentence = "kept [1, 2] [red]of[/red] /a/long/path/" + "x" * 60
    display.say(sentence)
    display.warn(sentence)
    assert stream.getvalue() == f"{sentence}\nwarning: {sentence}\n"


def test_a_warning_is_given_once_and_where_all_else_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = shown_on(monkeypatch, terminal=True)
    with Display(quiet=True) as display:
        display.say("all is well")
        display.update(FACTS, 70.0)
        for sentence in ("this", "that", "this"):
            display.warn(sentence)
    assert stream.getvalue() == "warning: this\nwarning: that\n"


def test_without_a_terminal_a_line_comes_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = shown_on(monkeypatch, terminal=False)
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    display = Display()
    for second in range(25):
        now = 1000.0 + second
        display.update({**FACTS, "round": float(second)}, None)
    lines = stream.getvalue().splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"round {n} (25 %)" for n in (0, 10, 20)]


def test_the_bar_is_gone_when_the_run_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = shown_on(monkeypatch, terminal=True)
    with Display() as display:
        display.update(FACTS, None)
    assert stream.getvalue().endswith("\x1b[2K"), "its last line is wiped"
    display.say("the end")
    assert stream.getvalue().endswith("\x1b[2Kthe end\n")


def test_a_round_is_described_by_its_pace_the_probe_and_the_balance_of_classes() -> None:
    told = describe(FACTS, None)
    assert told == "2.0 rounds/s, probe KL 0.062, agreement 50.0 %, class balance 1.00"


SUMMARY: dict[str, Any] = {
    "teacher_accuracy": 99.0,
    "student_accuracy": 97.5,
    "probe_agreement": 88.25,
    "teacher_parameters": 12_000,
    "student_parameters": 4_000,
    "teacher_multiply_adds": 5_000_000,
    "student_multiply_adds": 500_000,
    "buffer_images": 1_200,
    "synthesized_images": 34_567,
    "rounds": 30,
    "policy": "ssdkd",
    "budget_rounds": 40,
    "phase_seconds": {"inversion": 1.0, "replay": 3.0, "evaluation": 0.04},
    "seconds": 4.0,
}


def rows(**changes: Any) -> dict[str, tuple[str, str]]:
    columns = [list(column.cells) for column in summary_table({**SUMMARY, **changes}).columns]
    return {str(name): (str(teacher), str(student)) for name, teacher, student in zip(*columns, strict=True)}


def test_the_table_at_the_end_says_what_came_of_what() -> None:
    assert rows() == {
        "accuracy": ("99.00 %", "97.50 % (-1.50)"),
        "agreement on the probe": ("", "88.25 %"),
        "parameters": ("12,000", "4,000 (3.0 times fewer)"),
        "multiply-adds": ("5,000,000", "500,000 (10.0 times fewer)"),
        "synthetic images": ("", "1,200 kept of 34,567 made"),
        "rounds": ("", "30 by ssdkd (budget: 40)"),
        "time": ("", "4.0 s: inversion 25 %, replay 75 %"),
    }


def test_the_table_leaves_out_what_is_not_known_and_takes_nothing_for_something() -> None:
    nothing = {"inversion": 0.0, "replay": 0.0, "evaluation": 0.05}
    told = rows(teacher_accuracy=None, budget_rounds=None, student_parameters=0, phase_seconds=nothing)
    assert "accuracy" not in told
    assert told["rounds"][1] == "30 by ssdkd"
    assert told["parameters"][1] == "0 (12000.0 times fewer)"
    assert told["time"][1] == "4.0 s: inversion 0 %, replay 0 %; evaluation 0.1 s more"


def test_a_larger_student_is_told_to_have_more() -> None:
    assert rows(student_parameters=24_000)["parameters"][1] == "24,000 (2.0 times more)"
    assert rows(student_parameters=12_000)["parameters"][1] == "12,000 (1.0 times fewer)"
