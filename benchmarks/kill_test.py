"""Kill a run at random instants, go on from what is left, and compare the student that comes of it byte by byte.

    python -m benchmarks.kill_test --kills 50 --seed 0 --jobs 2

Each case is one `python -m ssdkd.run` of the default job in a process of its own, killed once with SIGKILL: half
of the cases at a random moment of its time, half inside of a write, fsync or rename of a file (`SSDKD_FAULT`, see
`ssdkd.files`; most of these are of checkpoints). What is left is given to `--resume`; a case passes if its student
has the bytes of the undisturbed run's, and if `--resume` went on from at most one checkpoint interval before the
last round that the killed run had noted. Ends with 1 if any does not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Kill:
    """When a run dies: after some seconds, or at the n-th operation of a kind."""

    seconds: float = 0.0
    fault: str = ""

    def __str__(self) -> str:
        return self.fault.removesuffix(":kill") if self.fault else f"{self.seconds:.1f} s"


@dataclass(frozen=True)
class Outcome:
    """What became of a killed run."""

    kill: Kill
    noted: int  # the last round in metrics.jsonl
    resumed_from: int
    killed: bool
    same_student: bool

    @property
    def lost(self) -> int:
        """Rounds that had to be played again."""
        return max(self.noted - self.resumed_from, 0)


def command(out: Path, options: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "ssdkd.run", "--out", str(out), *options]


def run(argv: list[str], fault: str = "", seconds: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run until the end, or kill it after `seconds`."""
    variables = {**os.environ, "SSDKD_FAULT": fault, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(argv, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


def student_of(folder: Path) -> str:
    path = folder / "student.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none"


def last_round(folder: Path) -> int:
    """The last whole line of the metrics."""
    last = 0
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            last = int(json.loads(line)["round"])
        except ValueError:
            break
    return last


def one_case(kill: Kill, expected: str, options: Sequence[str]) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="ssdkd-kill-") as name:
        out = Path(name)
        died = run(command(out, options), kill.fault, kill.seconds or None)
        folders = list(out.iterdir())
        if not folders or not (folders[0] / "config.yaml").is_file():  # nothing had begun: the user begins again
            again = run(command(out / "again", options))
            noted = resumed_from = 0
            folders = list((out / "again").iterdir())
        else:
            noted = last_round(folders[0])
            again = run([sys.executable, "-m", "ssdkd.run", "--resume", str(folders[0])])
            said = re.search(r"Going on from round-0*(\d+)\.", again.stderr)
            finished = "is finished after" in again.stdout
            resumed_from = noted if finished else int(said[1]) if said else 0
        same = again.returncode == 0 and student_of(folders[0]) == expected
        return Outcome(kill, noted, resumed_from, died.returncode == -9, same)


def drawn_kills(count: int, seconds: float, operations: dict[str, int], seed: int) -> list[Kill]:
    """Half of them at random moments, half inside of random operations."""
    chance = random.Random(seed)
    kills = []
    for number in range(count):
        if number % 2:
            kind = chance.choice(list(operations))
            kills.append(Kill(fault=f"{kind}:{chance.randint(1, operations[kind])}:kill"))
        else:
            kills.append(Kill(seconds=chance.uniform(0.02, 0.98) * seconds))
    return kills


def kill_test(kills: int, seed: int, jobs: int, options: Sequence[str], interval: int) -> list[Outcome]:
    """Run all cases and print a line for each."""
    with tempfile.TemporaryDirectory(prefix="ssdkd-kill-") as name:
        began = time.monotonic()
        whole = run(command(Path(name), options))
        seconds = time.monotonic() - began
        if whole.returncode:
            raise SystemExit(whole.stderr)
        (folder,) = Path(name).iterdir()
        expected, rounds = student_of(folder), last_round(folder)
    print(f"the undisturbed run: {rounds} rounds, {seconds:.1f} s, student {expected[:16]}")
    checkpoints = rounds // interval
    # config.yaml and metrics.jsonl come before the checkpoints, the student and what tells of it after them
    operations = {"write": checkpoints + 4, "replace": checkpoints + 4, "fsync": 2 * checkpoints + 8}
    print(f"{'killed at':>14} {'noted':>6} {'resumed from':>13} {'lost':>5}  student")
    outcomes = []
    with ThreadPoolExecutor(jobs) as pool:
        drawn = drawn_kills(kills, seconds, operations, seed)
        for outcome in pool.map(lambda kill: one_case(kill, expected, options), drawn):
            verdict = "identical" if outcome.same_student else "DIFFERS"
            verdict += "" if outcome.killed else " (the run was over before)"
            print(f"{outcome.kill!s:>14} {outcome.noted:>6} {outcome.resumed_from:>13} {outcome.lost:>5}  {verdict}")
            sys.stdout.flush()
            outcomes.append(outcome)
    killed = [outcome for outcome in outcomes if outcome.killed]
    print(
        f"{len(outcomes)} cases of {rounds} rounds, a checkpoint every {interval}: {len(killed)} killed, "
        f"{sum(bool(outcome.kill.fault) for outcome in killed)} of them inside a file operation; "
        f"{sum(outcome.same_student for outcome in outcomes)} ended with identical bytes; "
        f"at most {max(outcome.lost for outcome in outcomes)} rounds lost"
    )
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill runs, resume them, compare the students.", allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=50, help="runs to kill (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; the runs have seed 0 (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--rounds", type=int, default=400, help="length of a run (default: 400, the default job)")
    parser.add_argument("--interval", type=int, default=10, help="rounds between checkpoints (default: 10)")
    given, more = parser.parse_known_args()
    options = ["--rounds", str(given.rounds), "--checkpoint.minutes", "0"]
    options += ["--checkpoint.rounds", str(given.interval), *more]
    outcomes = kill_test(given.kills, given.seed, given.jobs, options, given.interval)
    good = all(outcome.same_student and outcome.lost <= given.interval for outcome in outcomes)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
