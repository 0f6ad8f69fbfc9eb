"""The default job on several seeds: how far the student stays below its teacher.

    python -m benchmarks.default_run [--seeds 5] [--jobs 2] [any option of ssdkd.run]

Each seed is one `python -m ssdkd.run`, in one of as many processes as `--jobs` says.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from agents.processes import pool
from benchmarks.arguments import refuse_own, require_at_least
from ssdkd import run as command
from ssdkd.build import has_evaluation
from ssdkd.errors import ConfigError, Parser, run_command


def one(options: list[str], root: str, seed: int) -> dict[str, Any]:
    """Run the command with `seed` in a folder of its own below `root`, and return its summary."""
    out = Path(root, str(seed))
    command.start(["--seed", str(seed), "--quiet", *options, "--out", str(out)])
    (summary,) = out.glob("*/summary.json")
    read: dict[str, Any] = json.loads(summary.read_text())
    return read


def run(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="python -m benchmarks.default_run",
        description="The default job on several seeds.",
        epilog="Any other option goes to every run, as those of ssdkd.run.",
    )
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from the first on")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    known, options = parser.parse_known_args(argv)
    require_at_least(known, first=0, seeds=1, jobs=1)
    refuse_own(options, {"--seed": "--first and --seeds"})
    config, _ = command.read_command_line(options)
    if not has_evaluation(config.dataset, config.data_root):
        raise ConfigError("without an evaluation set there is no gap to tell: give --dataset and --data-root.")
    head = f"{'seed':>4} {'teacher':>8} {'student':>8} {'gap':>6} {'kept':>6} {'made':>7} {'fewer':>6} {'seconds':>8}"
    gaps: list[float] = []
    # made here, for Ctrl-C leaves workers no time to remove one
    with tempfile.TemporaryDirectory() as root, pool(known.jobs) as workers:
        seeds = range(known.first, known.first + known.seeds)
        for seed, s in zip(seeds, workers.map(partial(one, options, root), seeds), strict=True):
            if not gaps:  # not before, for what the options name may be none that a run can have
                print(head)
            gaps.append(s["teacher_accuracy"] - s["student_accuracy"])
            fewer = s["teacher_parameters"] / s["student_parameters"]
            print(
                f"{seed:>4} {s['teacher_accuracy']:>8.2f} {s['student_accuracy']:>8.2f} {gaps[-1]:>6.2f} "
                f"{s['buffer_images']:>6} {s['synthesized_images']:>7} {fewer:>6.1f} {s['seconds']:>8.1f}",
                flush=True,
            )
    print(f"largest gap {max(gaps):.2f} points, mean {sum(gaps) / len(gaps):.2f}")


if __name__ == "__main__":
    sys.exit(run_command(run, None, stopped="stopped."))
