"""Whether a budget counts work as a processor does: making the images of a round, in student training steps.

    python -m benchmarks.units --teachers-root teachers/digits
    python -m benchmarks.units --tasks mnist --data-root DATA --teacher lenet5.safetensors --family 0

What a round's images take, divided by what a student step takes: in processor seconds of one thread, and as
`ssdkd.costs` counts it, for several costs of starting an operation (`STARTED`; 0 counts multiply-adds alone). Then the
same over tasks drawn from the family, as the factor by which the count is off: its mean, and where two thirds lie.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from agents.tasks import family_from, training_tasks
from benchmarks.arguments import require_at_least
from benchmarks.round import Clock
from benchmarks.selection import named_tasks, task_config
from ssdkd import costs
from ssdkd.build import build_engine
from ssdkd.coefficients import Coefficients
from ssdkd.config import RunConfig, build, read_yaml
from ssdkd.errors import Parser, run_command

STARTED = (0, 250_000, 500_000, 1_000_000, 2_000_000)


def ratios(config: RunConfig, rounds: int) -> tuple[float, list[float]]:
    """What making takes, in student steps: in seconds, and as counted for each of `STARTED`."""
    engine = build_engine(replace(config, device="cpu"))
    loop, neutral, clock = engine.loop(), Coefficients(), Clock(engine.device, processor=True)
    next(loop)
    clock.watch(engine, "invert", "making")
    clock.watch(engine.distiller, "replay", "replay")
    making, step = [], []
    for _ in range(min(rounds, config.rounds or rounds)):
        clock.seconds = {}
        facts = loop.send(neutral)
        making.append(clock.seconds["making"])
        step.append(clock.seconds["replay"] / facts["student_steps"])
        if engine.finished:
            break
    in_force, counted = costs.STARTED, []
    for started in STARTED:
        costs.STARTED = started
        counted.append(engine.round_cost(0))
    costs.STARTED = in_force
    return statistics.median(making) / statistics.median(step), counted


def run(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m benchmarks.units", description=__doc__)
    parser.add_argument("--tasks", nargs="*", default=["digits", "held-out"], help="as of benchmarks.selection")
    parser.add_argument("--family", type=int, default=40, help="tasks to draw from the family that policies train on")
    parser.add_argument("--teachers-root", help="folder of the family's teachers (benchmarks.make_family)")
    parser.add_argument("--data-root", help="where the data sets are")
    parser.add_argument("--teacher", help="weights of the teacher of mnist or cifar10")
    parser.add_argument("--rounds", type=int, default=7, help="rounds to time, of which the median counts")
    given = parser.parse_args(argv)
    require_at_least(given, rounds=1, family=0)
    torch.set_num_threads(1)
    family = family_from("family", given.teachers_root) if given.teachers_root else None
    configs = {task: task_config(task, given, []) for task in named_tasks(given.tasks, given.teachers_root)}
    counts = " | ".join(f"{started / 1e6:g} M" for started in STARTED)
    print(f"| task | in seconds | counted: {counts} |\n" + "| --- " * (2 + len(STARTED)) + "|")
    for task, config in configs.items():
        in_seconds, counted = ratios(config, given.rounds)
        print(f"| {task} | {in_seconds:.1f} | " + " | ".join(f"{c:.1f}" for c in counted) + " |", flush=True)
    if family is None or not given.family:
        return
    tasks, base = training_tasks(family), read_yaml(family.base)
    off: list[list[float]] = []
    for task_layer in random.Random(0).sample(tasks, min(given.family, len(tasks))):
        in_seconds, counted = ratios(build(RunConfig, [base, (task_layer, "a task")]), given.rounds)
        off.append([math.log(c / in_seconds) for c in counted])
    cells = []
    for logs in zip(*off, strict=True):
        factor = math.exp(statistics.stdev(logs)) if len(logs) > 1 else 1.0
        cells.append(f"{math.exp(statistics.mean(logs)):.2f} */ {factor:.2f}")
    print(f"| {len(off)} of the family: counted / seconds | | " + " | ".join(cells) + " |")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; a user's mistake is one sentence and exit code 2."""
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
