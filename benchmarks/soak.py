"""A long run, watched from outside of its loop: memory stays flat, open files stay as many, numbers stay numbers.

    python -m benchmarks.soak --rounds 2000 --seed 0

The default job on digits with everything that a run writes (checkpoints every 50 rounds, TensorBoard, metrics), but
with a smaller inversion and fewer student steps a round, so that 2,000 rounds take minutes. Ends with 1 if the
resident memory at the end is more than 5 % above that after the first 100 rounds, if a file more is open, or if a
number is not finite.
"""

from __future__ import annotations

import gc
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.arguments import require_at_least
from ssdkd import run as command
from ssdkd.errors import Parser, run_command
from ssdkd.tracking import Display

SMALLER = [
    *("--inversion.images", "16", "--inversion.steps", "2", "--distillation.steps", "2", "--distillation.batch", "32"),
    *("--policy", "ssdkd", "--checkpoint.rounds", "50", "--checkpoint.minutes", "0", "--tracking.images", "off"),
]
SETTLED = 100  # rounds after which memory should no longer grow
MOST_GROWTH = 0.05


@dataclass(frozen=True)
class Sight:
    """What the process holds after a round."""

    round: int
    mib: float
    files: int
    seconds: float
    probe_kl: float


def resident_mib() -> float:
    """Memory of this process now; its peak where the system tells no more."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def open_files() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0


def soak(rounds: int, seed: int, every: int, options: list[str]) -> tuple[list[Sight], int]:
    """Play the run, looking every `every` rounds: -> what was seen, and how many numbers were not finite."""
    seen: list[Sight] = []
    strange = 0
    began = time.monotonic()
    shown = Display.update

    def update(self: Display, statistics: dict[str, float], accuracy: float | None) -> None:
        nonlocal strange
        shown(self, statistics, accuracy)
        strange += sum(not math.isfinite(value) for value in statistics.values())
        number = int(statistics["round"])
        if number % every == 0 or number in (SETTLED, rounds):
            gc.collect()
            took = time.monotonic() - began
            seen.append(Sight(number, resident_mib(), open_files(), took, statistics["probe_kl"]))

    Display.update = update  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory(prefix="ssdkd-soak-") as out:
            argv = ["--rounds", str(rounds), "--seed", str(seed), "--out", out, "--quiet", *SMALLER, *options]
            code = command.main(argv)
            if code:
                raise SystemExit(code)
    finally:
        Display.update = shown  # type: ignore[method-assign]
    return seen, strange


def run(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="python -m benchmarks.soak",
        description="A long run on digits, its memory watched.",
        epilog="Any other option goes to the run, as those of ssdkd.run.",
    )
    parser.add_argument("--rounds", type=int, default=2000, help="(default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--every", type=int, default=250, help="rounds between lines of the table (default: 250)")
    given, more = parser.parse_known_args(argv)
    require_at_least(given, every=1)
    require_at_least(given, rounds=min(given.every, SETTLED) + 1)  # else there is nothing to compare
    seen, strange = soak(given.rounds, given.seed, given.every, more)
    print(f"{'round':>6} {'resident MiB':>13} {'open files':>11} {'probe KL':>9} {'seconds':>8}")
    for sight in seen:
        print(f"{sight.round:>6} {sight.mib:>13.1f} {sight.files:>11} {sight.probe_kl:>9.4f} {sight.seconds:>8.1f}")
    settled = next((sight for sight in seen if sight.round >= SETTLED), seen[0])
    growth, files = seen[-1].mib / settled.mib - 1.0, seen[-1].files - settled.files
    print(
        f"from round {settled.round} to {seen[-1].round}: memory {100 * growth:+.1f} %, open files {files:+d}, "
        f"{strange} numbers not finite"
    )
    if growth > MOST_GROWTH or files > 0 or strange:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(run_command(run, None))
