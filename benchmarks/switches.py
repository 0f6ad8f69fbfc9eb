"""What each switch brings: seconds of a student step and of an inversion step beside those of the automatic choice.

    python -m benchmarks.switches --cifar-teacher wrn16_2.pth --mnist-teacher lenet5.safetensors [--json FILE]

`precision`, `layout`, `buffer.rendered` and `compile`, one at a time, on the ready-made jobs, in turn in one process,
so that a busy machine slows all of them; a ratio above 1 is slower than the automatic choice, and is the median over
the turns. `compile` concerns the student's step alone.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.arguments import names_in, require_at_least
from benchmarks.round import TASKS, Clock, add_timing_options, fill, prepare, ratio_of, write_json
from ssdkd.coefficients import Coefficients
from ssdkd.devices import choose_device, compiles, has_compiler
from ssdkd.engine import Engine
from ssdkd.errors import Parser, run_command
from ssdkd.files import require_writable

AUTOMATIC = "automatic"
SWITCHES: dict[str, dict[str, Any]] = {
    AUTOMATIC: {},
    "precision float32": {"precision": "float32"},
    "precision bfloat16": {"precision": "bfloat16"},
    "layout contiguous": {"layout": "contiguous"},
    "rendered anew": {"buffer": {"rendered": False}},
    "compile on": {"compile": "on"},
    "compile off": {"compile": "off"},
}


def switches_on(device: torch.device) -> list[str]:
    """Those that differ there: a GPU's automatic choice, for runs as long as these, is to compile, a CPU's is not."""
    same = ["compile on", "compile off"]
    if has_compiler(device):
        same = same[:1] if compiles("auto", device, long_run=True) else same[1:]
    return [name for name in SWITCHES if name not in same]


def steps_of(engine: Engine, student_steps: int) -> dict[str, Any]:
    """The two pieces of work, as functions that do so many steps of each."""
    learning = engine.config.distillation
    some = Coefficients(alpha=0.6, beta=0.4, effort=student_steps / learning.steps)
    targets = torch.arange(engine.recipe().inverted, device=engine.device) % engine.spec.num_classes

    def invert() -> None:
        engine.student.eval()
        engine.inverter.invert(targets, engine.student, 1.0)

    return {"student": partial(engine.replay, some), "inversion": invert}


def time_switches(
    task: str, teacher: str | None, device: str, steps: int, turns: int, processor: bool
) -> list[dict[str, Any]]:
    """Seconds of a step under each switch, and how many times those of the automatic choice."""
    names = switches_on(choose_device(device))
    works: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    for name in names:
        engine = prepare(task, teacher, device, {"inversion": {"steps": 2}, **SWITCHES[name]})
        fill(engine.buffer)
        works[name] = steps_of(engine, steps)
        first = Clock(engine.device).time(works[name]["student"])  # fills caches, and compiles
        rows.append({"task": task, "switch": name, "first_seconds": first})
        works[name]["inversion"]()
    clock, counts = Clock(choose_device(device), processor), {"student": steps, "inversion": 2}
    for kind, count in counts.items():
        took: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(turns):
            for name in names:
                took[name].append(clock.time(works[name][kind]) / count)
        for row in rows:
            own = took[row["switch"]]
            row[kind] = {"seconds": statistics.median(own), **ratio_of(own, took[AUTOMATIC])}
    return rows


def show(row: dict[str, Any]) -> None:
    told = f"{row['task']:<8} {row['switch']:<19}"
    for kind in ("student", "inversion"):
        low, high = row[kind]["ratio_range"]
        told += f"{1e3 * row[kind]['seconds']:>10.1f} ms {row[kind]['ratio']:>6.2f} ({low:.2f} to {high:.2f})"
    print(f"{told} {row['first_seconds']:>7.1f} s", flush=True)


def run(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m benchmarks.switches", description=__doc__)
    parser.add_argument("--tasks", default="cifar10,mnist", help="which of digits, mnist, cifar10; comma-separated")
    parser.add_argument("--mnist-teacher", help="weights of LeNet-5; random without")
    parser.add_argument("--cifar-teacher", help="weights of WRN-16-2; random without")
    parser.add_argument("--steps", type=int, default=5, help="student steps in a turn")
    parser.add_argument("--turns", type=int, default=7, help="turns of timing")
    add_timing_options(parser)
    given = parser.parse_args(argv)
    require_at_least(given, steps=1, turns=1, threads=1)
    tasks = names_in(given.tasks, TASKS, "--tasks")
    require_writable(given.json, "--json")
    torch.set_num_threads(given.threads)
    teachers = {"mnist": given.mnist_teacher, "cifar10": given.cifar_teacher}
    rows: list[dict[str, Any]] = []
    for task in tasks:
        processor = given.clock == "processor"
        timed = time_switches(task, teachers.get(task), given.device, given.steps, given.turns, processor)
        if not rows:
            print(f"{'':<28}{'a student step':>34}{'an inversion step':>34} {'first':>7}")
        for row in timed:
            show(row)
        rows += timed
    if not has_compiler(choose_device(given.device)):
        print("compile was not timed: no compiler was found")
    write_json(given.json, {"switches": rows, "threads": given.threads, "clock": given.clock})


if __name__ == "__main__":
    sys.exit(run_command(run, None))
