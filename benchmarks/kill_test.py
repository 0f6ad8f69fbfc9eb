"""Kill a run again and again, go on each time from what is left, and compare the student byte by byte.

    python -m benchmarks.kill_test --kills 50 --kills-per-run 5 --seed 0 --jobs 1

Each run is the default job (`python -m ssdkd.run`) in a process of its own, on the CPU, since no GPU repeats itself to
the byte. It dies with SIGKILL, is given to `--resume`, dies again, and so on, `--kills-per-run` times in a row; then it
is left to finish. The moments are random, the earlier ones first. Every second kill comes at such a moment, whatever
the run is doing; the others come inside the write, fsync or rename of a file (`SSDKD_FAULT`, see `ssdkd.files`): three
quarters of these of the checkpoint that is due next, the rest of the configuration, the metrics or the results.

A run passes if its student has the bytes of the undisturbed run's, and if each `--resume` went on from at most one
checkpoint interval before the last round that the killed run had noted. Ends with 1 if any does not.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.arguments import require_at_least
from ssdkd.checkpoint import load_newest
from ssdkd.errors import CheckpointError, Parser, run_command
from ssdkd.tracking.folder import CHECKPOINTS, CONFIG, METRICS, STUDENT, SUMMARY
from ssdkd.tracking.metrics import read_metrics

OPERATIONS = ("write", "fsync", "replace")
FIRST, AGAIN, LAST = (CONFIG, METRICS), (METRICS,), (STUDENT, SUMMARY)  # files that a run writes, by when it does


@dataclass(frozen=True)
class Kill:
    """A moment to die at, and which operation on which file is waited for then, if any."""

    moment: float  # share of the undisturbed run's time
    operation: str = ""
    number: int = 1  # 1, or 2 for the fsync of the folder that follows the file's own
    part: str = ""  # of the file's path


@dataclass(frozen=True)
class Undisturbed:
    """What the run is that nobody kills."""

    rounds: int
    seconds: float
    before: float  # seconds until its first round was noted
    student: str

    def round_at(self, moment: float) -> float:
        """The round that is played at this share of the time; below 0 before the first one."""
        return (moment * self.seconds - self.before) / (self.seconds - self.before) * self.rounds


@dataclass(frozen=True)
class Outcome:
    """What a kill did."""

    how: str
    inside: str  # the part of a path that was being written, or nothing
    noted: int  # the last round in metrics.jsonl
    resumed_from: int
    killed: bool

    @property
    def lost(self) -> int:
        """Rounds that had to be played again."""
        return max(self.noted - self.resumed_from, 0)


def command(out: Path, options: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "ssdkd.run", *options, "--out", str(out)]


def resume(folder: Path) -> list[str]:
    return [sys.executable, "-m", "ssdkd.run", "--resume", str(folder)]


def run_or_kill(
    argv: list[str], fault: str = "", until: Callable[[float], bool] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run until the end, or kill it as soon as `until`, told the seconds gone by, says so."""
    variables = {**os.environ, "SSDKD_FAULT": fault, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    with subprocess.Popen(argv, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while True:
            try:
                out, err = process.communicate(timeout=0.05)
                break
            except subprocess.TimeoutExpired:
                if until is not None and until(time.monotonic() - began):
                    process.kill()
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


def student_of(folder: Path) -> str:
    path = folder / STUDENT
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none"


def last_round(folder: Path) -> int:
    """The last whole line of the metrics."""
    path = folder / METRICS
    lines = read_metrics(path) if path.is_file() else []
    return int(lines[-1]["round"]) if lines else 0


def begun(out: Path) -> Path | None:
    """The run's folder in `out`, if it came so far that it can be resumed."""
    return next((path.parent for path in out.glob(f"*/{CONFIG}")), None)


def newest_checkpoint(folder: Path | None) -> int:
    """The round that `--resume` will go on from."""
    try:
        return int(load_newest(folder / CHECKPOINTS)[0]["engine"]["round"]) if folder is not None else 0
    except CheckpointError:
        return 0


def undisturbed_run(options: Sequence[str]) -> Undisturbed:
    with tempfile.TemporaryDirectory(prefix="ssdkd-kill-") as name:
        out, first = Path(name), [math.inf]

        def note_first_round(seconds: float) -> bool:
            folder = begun(out) if math.isinf(first[0]) else None
            if folder is not None and last_round(folder):
                first[0] = seconds
            return False

        began = time.monotonic()
        whole = run_or_kill(command(out, options), until=note_first_round)
        seconds = time.monotonic() - began
        if whole.returncode:
            print(whole.stderr, end="", file=sys.stderr)
            raise SystemExit(whole.returncode)
        (folder,) = out.iterdir()
        return Undisturbed(last_round(folder), seconds, min(first[0], seconds / 2), student_of(folder))


def one_run(
    kills: Sequence[Kill], undisturbed: Undisturbed, options: Sequence[str], interval: int
) -> tuple[list[Outcome], bool]:
    """Kill one run so often: -> what each kill did, and whether the student is the undisturbed one."""
    with tempfile.TemporaryDirectory(prefix="ssdkd-kill-") as name:
        out, folder = Path(name) / "0", None
        dead: list[tuple[str, str, int, int, bool]] = []
        said: list[int | None] = []  # the round that the process after each death went on from
        for number in range(len(kills) + 1):
            argv = command(out, options) if folder is None else resume(folder)
            kill = kills[number] if number < len(kills) else None
            how, fault, until = _plan(kill, undisturbed, out, newest_checkpoint(folder), interval)
            process = run_or_kill(argv, fault, until)
            told = re.search(r"Going on from round-0*(\d+)\.", process.stderr)
            said.append(int(told[1]) if told else None)
            folder = begun(out)
            if kill is None:
                break
            part = kill.part if process.returncode == -9 else ""
            noted = last_round(folder) if folder is not None else 0
            dead.append((how, part, noted, newest_checkpoint(folder), process.returncode == -9))
            if process.returncode != -9:
                break
            if folder is None:  # nothing had begun: the user begins again
                out = Path(name) / str(number + 1)
        outcomes = [
            Outcome(how, part, noted, newest if told is None else told, killed)
            for (how, part, noted, newest, killed), told in zip(dead, [*said[1:], None], strict=False)
        ]
        same = process.returncode == 0 and folder is not None and student_of(folder) == undisturbed.student
        return outcomes, same


def _plan(
    kill: Kill | None, undisturbed: Undisturbed, out: Path, newest: int, interval: int
) -> tuple[str, str, Callable[[float], bool] | None]:
    """-> how the kill is told, what SSDKD_FAULT breaks, and when to kill otherwise."""
    if kill is None:
        return "", "", None
    aimed = undisturbed.round_at(kill.moment)
    if kill.operation:
        each = 2 if kill.operation == "fsync" else 1
        saves = max(math.ceil((aimed - newest) / interval), 1) if kill.part == CHECKPOINTS else 1
        fault = f"{kill.operation}:{each * (saves - 1) + kill.number}:kill:{kill.part}"
        which = " (folder)" if kill.number == 2 else ""
        name = f"checkpoint {newest + saves * interval}" if kill.part == CHECKPOINTS else kill.part
        return f"{kill.operation}{which} of {name}", fault, None
    if aimed < 0:
        wait = kill.moment * undisturbed.seconds
        return f"{wait:.1f} s", "", lambda seconds: seconds >= wait
    pause = aimed % 1.0 * (undisturbed.seconds - undisturbed.before) / undisturbed.rounds
    reached: list[float] = []

    def until(seconds: float) -> bool:
        folder = begun(out)
        if not reached and folder is not None and last_round(folder) >= int(aimed):
            reached.append(seconds)
        return bool(reached) and seconds >= reached[0] + pause

    return f"round {aimed:.1f}", "", until


def drawn_kills(count: int, per_run: int, seed: int) -> list[list[Kill]]:
    """The kills of every run: half of them at random moments, half inside of an operation on a file."""
    chance = random.Random(seed)
    runs: list[list[Kill]] = []
    files = 0
    for first in range(0, count, per_run):
        moments = sorted(chance.uniform(0.0, 0.98) for _ in range(min(per_run, count - first)))
        kills = []
        for number, moment in enumerate(moments):
            if (first + number) % 2 == 0:
                kills.append(Kill(moment))
                continue
            files += 1
            operation = chance.choice(OPERATIONS)
            fsync = chance.randint(1, 2) if operation == "fsync" else 1
            elsewhere = FIRST if number == 0 else LAST if number == len(moments) - 1 else AGAIN
            part = CHECKPOINTS if files % 4 else chance.choice(elsewhere)
            kills.append(Kill(moment, operation, fsync, part))
        runs.append(kills)
    return runs


def kill_test(
    kills: int, per_run: int, seed: int, jobs: int, options: Sequence[str], interval: int
) -> tuple[list[Outcome], list[bool]]:
    """Kill all runs and print a line for each kill: -> the kills, and for each run whether its student is the same."""
    undisturbed = undisturbed_run(options)
    seconds, rounds, began = undisturbed.seconds, undisturbed.rounds, time.monotonic()
    print(f"the undisturbed run: {rounds} rounds, {seconds:.1f} s, student {undisturbed.student[:16]}")
    print(f"{'run':>3}  {'killed at':<32} {'noted':>6} {'resumed from':>13} {'lost':>5}  student")
    outcomes, verdicts = [], []
    with ThreadPoolExecutor(jobs) as pool:
        drawn = drawn_kills(kills, per_run, seed)
        done = pool.map(lambda chain: one_run(chain, undisturbed, options, interval), drawn)
        for number, (chain, same) in enumerate(done, start=1):
            for outcome in chain:
                last = ("identical" if same else "DIFFERS") if outcome is chain[-1] else ""
                last += "" if outcome.killed else " (the run was over before)"
                told = f"{outcome.noted:>6} {outcome.resumed_from:>13} {outcome.lost:>5}"
                print(f"{number:>3}  {outcome.how:<32} {told}  {last}".rstrip())
            sys.stdout.flush()
            outcomes += chain
            verdicts.append(same)
    killed = [outcome for outcome in outcomes if outcome.killed]
    inside = [outcome.inside for outcome in killed if outcome.inside]
    print(
        f"{len(killed)} kills of {len(verdicts)} runs of {rounds} rounds, a checkpoint every {interval}: "
        f"{len(inside)} inside a file operation, {inside.count(CHECKPOINTS)} of these in a checkpoint; "
        f"{sum(verdicts)} of {len(verdicts)} runs ended with identical bytes; "
        f"at most {max(outcome.lost for outcome in outcomes)} rounds lost by a kill; {time.monotonic() - began:.0f} s"
    )
    return outcomes, verdicts


def run(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="python -m benchmarks.kill_test",
        description="Kill runs, resume them, compare the students.",
        epilog="Any other option goes to every run, as those of ssdkd.run.",
    )
    parser.add_argument("--kills", type=int, default=50, help="kills over all runs (default: 50)")
    parser.add_argument("--kills-per-run", type=int, default=5, help="so often each run is killed (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; the runs have seed 0 (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--interval", type=int, default=10, help="rounds between checkpoints (default: 10)")
    given, more = parser.parse_known_args(argv)
    require_at_least(given, kills=1, kills_per_run=1, jobs=1, interval=1)
    options = ["--device", "cpu", "--checkpoint.minutes", "0", "--checkpoint.rounds", str(given.interval), *more]
    outcomes, verdicts = kill_test(given.kills, given.kills_per_run, given.seed, given.jobs, options, given.interval)
    if not all(verdicts) or any(outcome.lost > given.interval for outcome in outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(run_command(run, None))
