"""Stored views of an image against asking the teacher again at every step: speed, and what it costs in accuracy.

    python -m benchmarks.views --teacher wrn16_2.pth --data-root DATA [--task cifar10|mnist|digits] [--json FILE]

Speed: student steps per second with 1, 2, 4 or 8 stored views (`buffer.views`), each against 0, where the teacher is
asked at each step for a new view; in turn in one process on a full buffer of noise, so that a busy machine slows all of
them, and the ratio is the median over the turns.

Accuracy: whole runs of the job, shortened to a share of its rounds, over seeds. All of them take equally many student
steps on equally many images made by equally many inversion steps; only the views differ. Without `--data-root` there is
none (digits come with the package).
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.arguments import numbers_in, require_at_least
from benchmarks.round import TASKS, Clock, add_timing_options, fill, prepare, ratio_of, write_json
from ssdkd import run as command
from ssdkd.build import build_engine
from ssdkd.coefficients import Coefficients
from ssdkd.config import RunConfig, build, read_yaml
from ssdkd.errors import ConfigError, Parser, run_command
from ssdkd.files import require_writable
from ssdkd.tracking import Display


def time_steps(
    task: str,
    views: list[int],
    teacher: str | None,
    steps: int,
    turns: int,
    options: dict[str, Any],
    processor: bool = False,
) -> list[dict[str, Any]]:
    """Student steps per second with each number of views, and how many times that of asking anew."""
    device = options["device"]
    engines = {n: prepare(task, teacher, device, {**options, "buffer": {"views": n}}) for n in views}
    seconds: dict[int, list[float]] = {n: [] for n in views}
    for turn in range(turns + 1):
        for n, engine in engines.items():
            if turn == 0:
                fill(engine.buffer)
            some = Coefficients(alpha=0.6, beta=0.4, effort=steps / engine.config.distillation.steps)
            took = Clock(engine.device, processor).time(partial(engine.replay, some))
            if turn > 0:  # the first one fills caches
                seconds[n].append(took / steps)
    rows = []
    for n in views:
        row: dict[str, Any] = {"views": n, "steps_per_second": 1.0 / statistics.median(seconds[n])}
        if 0 in seconds:
            row |= ratio_of(seconds[0], seconds[n])
        rows.append(row)
    return rows


class Counting(Display):
    """Shows nothing, and counts the student steps of a run."""

    steps = 0

    def update(self, statistics: dict[str, float], accuracy: float | None) -> None:
        self.steps += int(statistics["student_steps"])


def compare_accuracy(
    task: str, views: list[int], seeds: int, share: float, over: dict[str, Any]
) -> list[dict[str, Any]]:
    """Accuracy after equal steps with each number of views; seed by seed, so that a break leaves whole seeds."""
    rows: list[dict[str, Any]] = [{"views": n, "accuracy": [], "seconds": []} for n in views]
    for seed in range(seeds):
        for row in rows:
            config = build(RunConfig, [read_yaml(task), (over, "the command line")])
            config.rounds, config.seed = max(1, round(share * (config.rounds or 1))), seed
            config.policy = "ssdkd"  # which takes as many steps a round whatever the views cost
            config.buffer.views, config.tracking.evaluate_every = row["views"], 0
            engine = build_engine(config)
            test, engine.evaluation = engine.evaluation, None  # measured once, at the end, and the teacher not at all
            counting = Counting(quiet=True)
            command.run(config, engine, None, counting, remember=False)
            engine.evaluation = test
            row |= {"rounds": engine.round, "student_steps": counting.steps}
            row["accuracy"].append(engine.accuracy(engine.student))
            row["seconds"].append(engine.seconds)
            print(f"    seed {seed}, views {row['views']}: {row['accuracy'][-1]:.2f} %", flush=True)
    for row in rows:
        row |= {"mean": statistics.mean(row["accuracy"])}
    return rows


def show_steps(rows: list[dict[str, Any]]) -> None:
    print(f"{'views':>5} {'steps/s':>8} {'times that of asking anew':>26}")
    for row in rows:
        ratio = ""
        if "ratio" in row:
            low, high = row["ratio_range"]
            ratio = f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"
        print(f"{row['views']:>5} {row['steps_per_second']:>8.2f} {ratio:>26}")


def show_accuracy(rows: list[dict[str, Any]]) -> None:
    print(f"{'views':>5} {'accuracy':>8} {'lowest':>8} {'highest':>8} {'seconds':>8}")
    for row in rows:
        low, high, took = min(row["accuracy"]), max(row["accuracy"]), statistics.mean(row["seconds"])
        print(f"{row['views']:>5} {row['mean']:>8.2f} {low:>8.2f} {high:>8.2f} {took:>8.1f}")


def run(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m benchmarks.views", description=__doc__)
    parser.add_argument("--task", default="cifar10", choices=TASKS, help="a ready-made job")
    parser.add_argument("--teacher", help="its teacher's weights; without them random, and no accuracy")
    parser.add_argument("--data-root", help="where its evaluation set lies; without it no accuracy")
    parser.add_argument("--timed", default="0,1,2,4,8", help="numbers of views to time; '' for none")
    parser.add_argument("--steps", type=int, default=10, help="student steps in a turn")
    parser.add_argument("--turns", type=int, default=9, help="turns of timing")
    parser.add_argument("--compared", default="0,1,2,4,8", help="numbers of views to compare in accuracy; '' for none")
    parser.add_argument("--seeds", type=int, default=3, help="runs with each number of views")
    parser.add_argument("--share", type=float, default=0.25, help="share of the job's rounds that a run takes")
    parser.add_argument("--precision", default="auto", help="auto, float32, bfloat16")
    parser.add_argument("--compile", default="auto", choices=("auto", "on", "off"), help="the student's step")
    add_timing_options(parser)
    given = parser.parse_args(argv)
    require_at_least(given, steps=1, turns=1, seeds=1, threads=1)
    if not 0.0 < given.share <= 1.0:
        raise ConfigError("--share: above 0 and at most 1.")
    timed, compared = numbers_in(given.timed, "--timed", 0), numbers_in(given.compared, "--compared", 0)
    require_writable(given.json, "--json")
    torch.set_num_threads(given.threads)
    options = {"device": given.device, "precision": given.precision, "compile": given.compile, "threads": given.threads}
    told: dict[str, Any] = {"task": given.task, "clock": given.clock, **options}
    told |= {"steps": [], "accuracy": []}
    if timed:
        processor = given.clock == "processor"
        told["steps"] = time_steps(given.task, timed, given.teacher, given.steps, given.turns, options, processor)
        show_steps(told["steps"])
    if compared and given.task != "digits" and not (given.teacher and given.data_root):
        print("no accuracy without --teacher and --data-root")
        compared = []
    if compared:
        over: dict[str, Any] = {"data_root": given.data_root, **options}
        if given.teacher:
            over["teacher"] = {"checkpoint": given.teacher}
        told["accuracy"] = compare_accuracy(given.task, compared, given.seeds, given.share, over)
        show_accuracy(told["accuracy"])
    write_json(given.json, told)


if __name__ == "__main__":
    sys.exit(run_command(run, None))
