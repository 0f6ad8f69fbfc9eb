"""What a round costs as a run grows: seconds and memory against buffer, classes, image size and teacher.

    python -m benchmarks.cost [--json FILE] [--axes capacity,classes,size,teacher]
    python -m benchmarks.cost --axes '' --job digits      # the peak memory of a whole ready-made job

One axis at a time around a base, each case in a process of its own, so that its peak of resident memory is its own.
The buffer is full of noise and the networks are random, which neither time nor memory sees. A round is small (32
images of 5 inversion steps, 10 student steps on batches of 32), so that the largest case takes minutes; what is
compared is how it grows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.arguments import names_in, require_at_least
from benchmarks.round import ENDLESS, Clock, add_timing_options, engine_of, fill, write_json
from ssdkd.coefficients import Coefficients
from ssdkd.config import RunConfig, from_mapping
from ssdkd.errors import Parser, SsdkdError, run_command
from ssdkd.files import require_writable

PHASES = ("inversion", "replay", "rest")


@dataclass(frozen=True)
class Case:
    """What grows, one at a time."""

    capacity: int = 5_000  # images in the buffer
    classes: int = 10
    size: int = 32  # pixels across an image of three channels
    teacher: str = "wrn16_2"
    student: str = "wrn16_1"


AXES: dict[str, tuple[Any, ...]] = {
    "capacity": (500, 5_000, 50_000),
    "classes": (10, 100, 1_000),
    "size": (32, 64, 224),
    "teacher": ("wrn16_1", "wrn16_2", "wrn40_2", "resnet18"),
}


def time_case(case: Case, rounds: int, threads: int, device: str, processor: bool) -> dict[str, Any]:
    """Play some rounds of `case`: -> seconds of a round, its phases, and what a sample takes."""
    torch.set_num_threads(threads)
    settings: dict[str, Any] = {
        "teacher": {"name": case.teacher},
        "student": {"name": case.student},
        "image": {"channels": 3, "height": case.size, "width": case.size, "classes": case.classes, "flip": True},
        "inversion": {"images": 32, "steps": 5, "start": "pyramid", "blends": 0.0, "warmup": 1},
        "buffer": {"capacity": case.capacity, "views": 4, "shift": 4},
        "distillation": {"batch": 32, "steps": 10, "optimizer": "sgd"},
        "probe": {"images": 32},
        "rounds": ENDLESS,
        "device": device,
    }
    engine = engine_of(from_mapping(RunConfig, settings, "the case"))
    loop = engine.loop()
    next(loop)
    fill(engine.buffer)
    clock, some = Clock(engine.device, processor), Coefficients(w_div=1.0, refresh=0.2, alpha=0.6, beta=0.4)
    clock.watch(engine, "invert", "inversion")
    clock.watch(engine, "replay", "replay")
    taken: list[dict[str, float]] = []
    for _ in range(rounds + 1):
        whole = clock.time(lambda: loop.send(some))
        taken.append({**clock.seconds, "rest": whole - sum(clock.seconds.values())})
        clock.seconds = {}
    median = {phase: statistics.median(one[phase] for one in taken[1:]) for phase in PHASES}  # the first fills caches
    row: dict[str, Any] = {"round_seconds": sum(median.values()), "phases": median}
    if engine.device.type == "cuda":
        row["device_mib"] = torch.cuda.max_memory_allocated(engine.device) / 2**20
    own = own_peak()
    return row | {"bytes_per_sample": engine.buffer.bytes_per_sample()} | ({"peak_mib": own} if own else {})


def own_peak() -> float | None:
    """Peak of this process's resident memory in MiB, where the system tells it (Linux).

    What a parent learns of its child includes what the parent itself held when it started the child.
    """
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)


def in_a_process(command: list[str]) -> tuple[str, float]:
    """Run a Python command to its end: -> what it printed, and its peak of resident memory in MiB."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed:
        process = subprocess.Popen([sys.executable, *command], stdout=printed)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise SsdkdError(f"a process ended with code {process.returncode}: {' '.join(command)}")
        printed.seek(0)
        return printed.read(), usage.ru_maxrss / 1024


def show(axis: str, row: dict[str, Any]) -> None:
    phases = "".join(f"{row['phases'][phase]:>10.3f}" for phase in PHASES)
    on_device = f"{row['device_mib']:>9.0f} MiB on the GPU" if "device_mib" in row else ""
    print(
        f"{axis:<9} {row[axis]!s:>9} {row['round_seconds']:>9.3f}{phases} "
        f"{row['peak_mib']:>9.0f} {row['bytes_per_sample']:>12,}{on_device}",
        flush=True,
    )


def run(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m benchmarks.cost", description=__doc__)
    parser.add_argument("--axes", default=",".join(AXES), help="what grows; comma-separated, '' for none")
    parser.add_argument("--rounds", type=int, default=3, help="rounds timed in each case")
    parser.add_argument("--job", help="a ready-made job to run whole, for its peak memory")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # what the processes are given
    add_timing_options(parser)
    given = parser.parse_args(argv)
    if given.case:
        case, processor = Case(**json.loads(given.case)), given.clock == "processor"
        print(json.dumps(time_case(case, given.rounds, given.threads, given.device, processor)))
        return
    require_at_least(given, rounds=1, threads=1)
    axes = names_in(given.axes, AXES, "--axes")
    require_writable(given.json, "--json")
    told: dict[str, Any] = {"cases": [], "threads": given.threads, "clock": given.clock, "rounds": given.rounds}
    seen: dict[Case, dict[str, Any]] = {}
    common = ["--rounds", str(given.rounds), "--threads", str(given.threads)]
    common += ["--device", given.device, "--clock", given.clock]
    if axes:
        print(
            f"{'':<19} {'s a round':>9} {'inversion':>9} {'replay':>9} {'rest':>9} {'peak MiB':>9} {'bytes/sample':>12}"
        )
    for axis in axes:
        for value in AXES[axis]:
            case = dataclasses.replace(Case(), **{axis: value})
            if case not in seen:
                words = ["-m", "benchmarks.cost", "--case", json.dumps(dataclasses.asdict(case)), *common]
                printed, peak = in_a_process(words)
                seen[case] = {"peak_mib": peak} | json.loads(printed.splitlines()[-1])
            row = {"axis": axis, **dataclasses.asdict(case), **seen[case]}
            told["cases"].append(row)
            show(axis, row)
    if given.job:
        with tempfile.TemporaryDirectory() as out:
            _, peak = in_a_process(["-m", "ssdkd.run", "--config", given.job, "--out", out, "--quiet"])
        told["job"] = {"name": given.job, "peak_mib": peak}
        print(f"{given.job}, a whole run: {peak:.0f} MiB at its peak")
    write_json(given.json, told)


if __name__ == "__main__":
    sys.exit(run_command(run, None))
