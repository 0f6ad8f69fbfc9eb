"""What is shown while a run goes on: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ssdkd.engine import Statistics

PLAIN_SECONDS = 10.0


class _TwoLines(Progress):
    """A bar, and the facts below it: beside it they would leave none of it on a terminal of 80 columns."""

    facts = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.facts, no_wrap=True, overflow="ellipsis")


class Display:
    """Shows progress; a context manager, so that the terminal is given back whatever happens."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(file=sys.stderr)
        self.live = self.console.is_terminal and not quiet
        self.quiet = quiet
        self._last = 0.0
        self._accuracy: float | None = None  # as it was measured last
        self._measured_in = 0.0  # round
        self._progress: _TwoLines | None = None
        self._warned: set[str] = set()

    def __enter__(self) -> Display:
        if self.live:
            self._progress = _TwoLines(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._task = self._progress.add_task("warming up", total=1.0)
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def say(self, sentence: str) -> None:
        """One sentence, above the live bar."""
        if not self.quiet:
            self.console.print(sentence, highlight=False, markup=False, soft_wrap=True)

    def warn(self, sentence: str) -> None:
        """Something went wrong that does not end the run: said once, even where the rest is quiet."""
        if sentence in self._warned:
            return
        self._warned.add(sentence)
        self.console.print(f"warning: {sentence}", highlight=False, markup=False, soft_wrap=True)

    def update(self, statistics: Statistics, accuracy: float | None) -> None:
        """Show where the run stands."""
        if self.quiet:
            return
        if accuracy is not None:
            self._accuracy, self._measured_in = accuracy, statistics["round"]
        facts = describe(statistics, self._accuracy, self._measured_in)
        if self._progress is not None:
            self._progress.facts = facts
            done, description = statistics["progress"], f"round {statistics['round']:.0f}"
            self._progress.update(self._task, completed=done, description=description)
        elif time.monotonic() - self._last >= PLAIN_SECONDS:
            self._last = time.monotonic()
            self.say(f"round {statistics['round']:.0f} ({100 * statistics['progress']:.0f} %): {facts}")


def describe(statistics: Statistics, accuracy: float | None, measured_in: float = 0.0) -> str:
    """A round in one line: rate, probe, accuracy with the round that it is of where that is another, class balance."""
    seconds = max(statistics["seconds"], 1e-9) / max(statistics["round"], 1)
    parts = [
        f"{1 / seconds:.1f} rounds/s" if seconds <= 1 else f"{seconds:.1f} s a round",
        f"probe KL {statistics['probe_kl']:.3f}",
        f"agreement {100 * statistics['probe_agreement']:.1f} %",
    ]
    if accuracy is not None:
        of_round = "" if measured_in == statistics["round"] else f" in round {measured_in:.0f}"
        parts.append(f"accuracy {accuracy:.2f} %{of_round}")
    parts.append(f"class balance {abs(statistics['class_entropy']):.2f}")  # rounding takes 0 below 0
    return ", ".join(parts)


def times_fewer(of_teacher: int, of_student: int) -> tuple[str, str]:
    """How the student's number compares, in two pieces: `3.0 times`, `fewer`, or `more` where it has more."""
    if of_student > of_teacher:
        return f"{of_student / max(of_teacher, 1):.1f} times", "more"
    return f"{of_teacher / max(of_student, 1):.1f} times", "fewer"


def summary_table(summary: dict[str, Any]) -> Table:
    """The end of a run as a table."""
    table = Table(title="distilled without data", show_header=True)
    for heading in ("", "teacher", "student"):
        table.add_column(heading, justify="left" if not heading else "right")
    teacher, student = summary["teacher_accuracy"], summary["student_accuracy"]
    if teacher is not None:
        table.add_row("accuracy", f"{teacher:.2f} %", f"{student:.2f} % ({student - teacher:+.2f})")
    table.add_row("agreement on the probe", "", f"{summary['probe_agreement']:.2f} %")
    for key, label in (("parameters", "parameters"), ("multiply_adds", "multiply-adds")):
        of_teacher, of_student = summary[f"teacher_{key}"], summary[f"student_{key}"]
        times, which = times_fewer(of_teacher, of_student)
        table.add_row(label, f"{of_teacher:,}", f"{of_student:,} ({times} {which})")
    table.add_row(
        "synthetic images", "", f"{summary['buffer_images']:,} kept of {summary['synthesized_images']:,} made"
    )
    budget = f" (budget: {summary['budget_rounds']})" if summary["budget_rounds"] else ""
    table.add_row("rounds", "", f"{summary['rounds']} by {summary['policy']}{budget}")
    work = {name: s for name, s in summary["phase_seconds"].items() if name != "evaluation"}
    total = max(sum(work.values()), 1e-9)
    shares = ", ".join(f"{name} {100 * s / total:.0f} %" for name, s in work.items())
    measuring = summary["phase_seconds"]["evaluation"]
    evaluation = f"; evaluation {measuring:.1f} s more" if measuring >= 0.05 else ""
    table.add_row("time", "", f"{summary['seconds']:.1f} s: {shares}{evaluation}")
    return table
