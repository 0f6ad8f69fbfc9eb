"""Accuracy over wall time, side by side: this project's methods and the field's, on one machine and one teacher.

    python -m benchmarks.field --size cifar10 --teacher wrn16_2.pth --data-root DATA --out runs/field
    python -m benchmarks.field --size mnist --teacher lenet5.safetensors --data-root DATA --out runs/field-mnist
    python -m benchmarks.field --size cifar10-gpu --data-root DATA --out runs/field-gpu --minutes 8

Each method is one `python -m ssdkd.run` in a process of its own, one after the other, all with the same device,
threads and precision. What is finished is not repeated and what was interrupted is gone on with, so the same command
again continues: after `--minutes` it stops by itself, saved, within another minute. Without `--teacher` one is trained
first, by `python -m ssdkd.teacher`, in one go. Writes into `--out`: field.png, field.json (or `--json FILE`) and run
folders.

Seconds are those of work: warm-up, inversion, replay and bookkeeping, without evaluation. `to target` is when a curve
first reaches the target: the accuracy with which the reference method ends (fastdfkd; on MNIST 97.5 %). `ratio` is
how many times sooner that is than the reference gets there. Accuracy is measured on the test set for these curves
alone; nothing is chosen by it, and `final` is the last student's.
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from agents.tasks import merged
from benchmarks.arguments import names_in, require_at_least
from benchmarks.selection import differing, draw, first_reached
from ssdkd.config import RunConfig, build, read_yaml
from ssdkd.errors import ConfigError, Parser, SsdkdError, run_command
from ssdkd.files import atomic_write_text, expanded, require_writable, write_result
from ssdkd.tracking.charts import COLOURS, Chart, Line
from ssdkd.tracking.folder import METRICS, SUMMARY
from ssdkd.tracking.metrics import read_metrics

Settings = dict[str, Any]
POINTS = 120  # evaluations of a curve
GRACE = 60.0  # seconds that a run has to finish its round and save


@dataclass(frozen=True)
class Size:
    """A teacher, a student, and the methods that compete over them: each a ready-made config and what it changes."""

    common: Settings
    methods: dict[str, tuple[str, Settings]]
    reference: str
    target: float | None = None  # percent; none: what the reference ends with
    teacher_training: Sequence[str] = field(default_factory=tuple)


def fastdfkd(g_steps: int, rounds: int, warmup: int, **groups: Settings) -> tuple[str, Settings]:
    """FastDFKD with so many generator steps and rates as published, its pool as large as all that is ever made."""
    rate, latent_rate = {2: (5e-3, 0.015), 5: (3e-3, 0.015), 10: (2e-3, 0.01)}[g_steps]
    inversion = {"steps": g_steps, "generator_rate": rate, "latent_rate": latent_rate, "meta_rate": g_steps * rate}
    images = groups.get("inversion", {}).get("images", 256)
    own: Settings = {
        "rounds": rounds,
        "inversion": {**inversion, "warmup": warmup},
        "buffer": {"capacity": (rounds + warmup) * images},
    }
    return "fastdfkd", merged(own, groups)


def ours(config: str, **settings: Any) -> dict[str, tuple[str, Settings]]:
    """The project's own method: the fixed formula, and the learned policy."""
    return {name: (config, {**settings, "policy": name}) for name in ("ssdkd", "learned")}


def _cifar10(teacher: str, student: str) -> Settings:
    return {"dataset": "cifar10", "teacher": {"name": teacher}, "student": {"name": student}}


def _cifar10_cpu(student: str) -> Size:
    methods = {**ours("cifar10"), "fastdfkd": fastdfkd(5, 52, 8), "dafl": ("dafl", {})}
    training = ("--model", "wrn16_2", "--dataset", "cifar10", "--epochs", "20", "--shift", "4")
    return Size(_cifar10("wrn16_2", student), methods, "fastdfkd", teacher_training=training)


def _cifar10_gpu(teacher: str, student: str) -> Size:
    long: Settings = {"distillation": {"steps": 400}}
    methods: dict[str, tuple[str, Settings]] = {
        **ours("cifar10", rounds=100, inversion={"images": 256}, distillation={"batch": 256, "steps": 400}),
        **{f"fastdfkd-{k}": fastdfkd(k, 200, 20, **long) for k in (2, 5, 10)},
        "dafl": ("dafl", {"rounds": 240_000}),
    }
    training = ("--model", teacher, "--dataset", "cifar10", "--epochs", "60", "--shift", "4")
    return Size(_cifar10(teacher, student), methods, "fastdfkd-5", teacher_training=training)


def _mnist() -> Size:
    small: Settings = {"inversion": {"latent": 100}, "buffer": {"shift": 2}}
    dafl: Settings = {
        "rounds": 200 * 120,
        "inversion": {"images": 512, "latent": 100, "meta_rate": 0.2},
        "buffer": {"capacity": 512},
        "distillation": {"batch": 512, "optimizer": "adam", "learning_rate": 2e-3, "weight_decay": 0.0},
    }
    methods = {**ours("mnist", rounds=100), "fastdfkd": fastdfkd(5, 52, 8, **small), "dafl": ("dafl", dafl)}
    common: Settings = {"dataset": "mnist", "teacher": {"name": "lenet5"}, "student": {"name": "lenet5_half"}}
    training = ("--model", "lenet5", "--dataset", "mnist", "--epochs", "12", "--learning-rate", "0.05", "--shift", "2")
    return Size(common, methods, "dafl", 97.5, training)


def _tiny() -> Size:
    """Digits, in seconds: whether it all works."""
    digits = read_yaml("digits")[0]
    common: Settings = {
        "dataset": "digits",
        "teacher": digits["teacher"],
        "student": digits["student"],
        "probe": {"images": 16},
        "inversion": {"images": 16, "latent": 16, "width": 8},
        "distillation": {"batch": 16},
    }
    few: Settings = {"rounds": 4, "inversion": {"warmup": 2}, "distillation": {"steps": 2}}
    methods: dict[str, tuple[str, Settings]] = {
        "ssdkd": ("digits", merged(few, {"policy": "ssdkd", "buffer": {"capacity": 40}})),
        "fastdfkd": fastdfkd(2, 4, 2, inversion={"images": 16}, buffer={"shift": 1}, distillation={"steps": 2}),
        "dafl": ("dafl", {"rounds": 8, "buffer": {"capacity": 16}}),
    }
    return Size(common, methods, "fastdfkd")


SIZES = {
    "tiny": _tiny,
    "mnist": _mnist,
    "cifar10": lambda: _cifar10_cpu("wrn16_1"),
    "cifar10-resnet8": lambda: _cifar10_cpu("resnet8"),
    "cifar10-gpu": lambda: _cifar10_gpu("wrn40_2", "wrn16_1"),
    "cifar10-gpu-resnet": lambda: _cifar10_gpu("resnet34", "resnet18"),
}


def settings_of(size: Size, method: str, over: Settings) -> Settings:
    """All settings of one run, whole and checked."""
    name, own = size.methods[method]
    settings = merged(read_yaml(name)[0], size.common, own, over)
    every = max(1, settings.get("rounds", 100) // POINTS)
    tracking: Settings = {"tensorboard": False, "report": False, "images": False}
    # of the 240,000 rounds of a long run, neither each is noted nor each hundredth saved, with 100 MB and more
    tracking |= {"evaluate_every": every, "metrics_every": every}
    settings = merged(settings, {"tracking": tracking, "checkpoint": {"rounds": 0}})
    build(RunConfig, [(settings, f"the settings of {method}")])
    return settings


def train_teacher(size: Size, file: Path, data_root: str | None, device: str, deadline: float = math.inf) -> None:
    if not size.teacher_training:
        raise ConfigError("this size has no teacher to train; it comes with one.")
    where = ["--data-root", data_root] if data_root else []
    words = [*size.teacher_training, "--out", str(file), "--device", device, *where]
    if not called("ssdkd.teacher", words, deadline):
        raise ConfigError(
            f"--minutes: the teacher's training takes longer, and cannot be gone on with; give it more time, or "
            f"run it by itself: python -m ssdkd.teacher {' '.join(words)}"
        )


def play(folder: Path, settings: Settings, deadline: float) -> bool:
    """Begin a run, or go on with it, until it is finished or the time is up: -> whether it is finished."""
    folder.mkdir(parents=True, exist_ok=True)
    begun, job, asked = run_in(folder), folder / "job.yaml", yaml.safe_dump(settings, sort_keys=False)
    if begun is not None:
        other = differing(read_yaml(str(job))[0], settings) if job.is_file() else ["job.yaml is missing"]
        if other:
            raise ConfigError(
                f"{folder} is a run with other settings ({other[0]}): choose another --out, or remove that folder."
            )
    if begun is not None and (begun / SUMMARY).is_file():
        return True
    if time.monotonic() > deadline:
        return False
    if begun is None:
        atomic_write_text(job, asked)
        words = ["--config", str(job), "--out", str(folder), "--quiet"]
    else:
        words = ["--resume", str(begun), "--quiet"]
        words += ["--data-root", settings["data_root"]] if settings.get("data_root") else []
    return called("ssdkd.run", words, deadline)


def called(module: str, words: Sequence[str], deadline: float) -> bool:
    """Run a command of the package until it is done or the time is up, or this process is stopped: -> whether it is."""
    process = subprocess.Popen([sys.executable, "-m", module, *words])

    def pass_on(*_: object) -> NoReturn:
        process.send_signal(signal.SIGTERM)  # else it would go on alone
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        process.wait(None if deadline == math.inf else max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # it finishes its round and saves
        end(process)
        return process.returncode == 0  # that round was the last
    except KeyboardInterrupt:
        end(process)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if process.returncode != 0:
        raise SsdkdError(f"python -m {module} ended with code {process.returncode}; its message stands above.")
    return True


def end(process: subprocess.Popen[bytes]) -> None:
    """Wait for a command that was asked to stop; one in too long a round is killed, and goes on from its checkpoint."""
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def run_in(folder: Path) -> Path | None:
    """The newest run folder that a method has."""
    found = sorted((p.parent for p in folder.glob(f"*/{METRICS}")), key=lambda p: p.stat().st_mtime)
    return found[-1] if found else None


def curve(folder: Path) -> dict[str, list[float]]:
    """Seconds, accuracy and images made, wherever accuracy was measured; the last point is the student handed out."""
    begun = run_in(folder)
    if begun is None:
        return {"seconds": [], "accuracy": [], "synthesized": []}
    lines = [line for line in read_metrics(begun / METRICS) if line.get("accuracy") is not None]
    points = {name: [line[name] for line in lines] for name in ("seconds", "accuracy", "synthesized")}
    if (begun / SUMMARY).is_file():
        summary = json.loads((begun / SUMMARY).read_text(encoding="utf-8"))
        last = (summary["seconds"], summary["student_accuracy"], summary["synthesized_images"])
        if last[1] is not None:
            for values, value in zip(points.values(), last, strict=True):
                values.append(float(value))
    return points


def compare(
    curves: dict[str, dict[str, list[float]]], reference: str, target: float | None, ended: bool = True
) -> dict[str, Any]:
    """Final figures, and times to the target with their ratio to the reference's; `ended`: whether that is finished."""
    if target is None and ended:  # else nobody knows what it will come to
        ends = curves.get(reference, {}).get("accuracy")
        target = ends[-1] if ends else None
    bar = math.inf if target is None else target
    after = {name: first_reached(points["seconds"], points["accuracy"], bar) for name, points in curves.items()}
    rows: dict[str, Any] = {}
    for name, points in curves.items():
        theirs, own = after.get(reference), after[name]
        rows[name] = {
            "final": points["accuracy"][-1] if points["accuracy"] else None,
            "seconds": points["seconds"][-1] if points["seconds"] else None,
            "images": points["synthesized"][-1] if points["synthesized"] else None,
            "to_target": own,
            "images_to_target": first_reached(points["synthesized"], points["accuracy"], bar),
            "ratio": theirs / own if theirs and own else None,
        }
    return {"reference": reference, "target": target, "methods": rows}


def table(outcome: dict[str, Any]) -> str:
    def shown(value: float | None, places: int = 1) -> str:
        return "-" if value is None else f"{value:,.{places}f}"

    target = shown(outcome["target"], 2)
    heads = ("method", "final %", "seconds", "images", f"to {target} %", "images to it", "ratio")
    lines = ["| " + " | ".join(heads) + " |", "| --- " + "| ---: " * (len(heads) - 1) + "|"]
    for name, row in outcome["methods"].items():
        state = "" if row["finished"] else " (unfinished)"
        cells = [name + state, shown(row["final"], 2), shown(row["seconds"]), shown(row["images"], 0)]
        cells += [shown(row["to_target"]), shown(row["images_to_target"], 0), shown(row["ratio"], 2)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def charts(curves: dict[str, dict[str, list[float]]]) -> list[Chart]:
    """Accuracy over wall time, and over images synthesised."""
    return [
        Chart(
            "accuracy (%)",
            label,
            [
                Line(name, points[what], points["accuracy"], colour)
                for (name, points), colour in zip(curves.items(), COLOURS, strict=False)
                if points["accuracy"]
            ],
            log_x=True,
        )
        for what, label in (("seconds", "seconds of work"), ("synthesized", "images synthesised"))
    ]


def run(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = Parser(prog="python -m benchmarks.field", description="Accuracy over wall time, side by side.")
    parser.add_argument("--size", default="cifar10", choices=SIZES, help="teacher, student and lengths")
    parser.add_argument("--methods", help="which of them, comma-separated; all without")
    parser.add_argument("--teacher", help="weights; without, a teacher is trained first")
    parser.add_argument("--data-root", help="where the data set lies")
    parser.add_argument("--out", type=expanded, required=True, help="folder for runs and results; the same one goes on")
    parser.add_argument("--minutes", type=float, help="stop after so long, to go on with the same command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--compile", default="auto", help="for every method alike: auto, on or off")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", help="file to write instead of field.json")
    given = parser.parse_args(argv)
    if given.minutes is not None:
        require_at_least(given, minutes=0)
    deadline = time.monotonic() + 60 * given.minutes if given.minutes is not None else math.inf
    size, out = SIZES[given.size](), given.out
    chosen = names_in(given.methods or "", size.methods, "--methods") or list(size.methods)
    if given.size != "tiny" and not given.data_root:
        raise ConfigError("--data-root is missing: accuracy over time needs the test set.")
    require_writable(out / "field.png", "--out")
    require_writable(given.json, "--json")
    over: Settings = {"seed": given.seed, "device": given.device, "precision": given.precision}
    data_root = str(expanded(given.data_root).resolve()) if given.data_root else None
    over |= {"threads": given.threads, "data_root": data_root, "compile": given.compile}
    weights = given.teacher
    if weights is None and size.teacher_training:
        own = out / f"teacher-{given.size}.safetensors"
        if not own.is_file():
            train_teacher(size, own, given.data_root, given.device, deadline)
        weights = str(own)
    if weights is not None:
        over["teacher"] = {"checkpoint": str(expanded(weights).resolve())}
    finished = {}
    for name in chosen:
        finished[name] = play(out / f"{name}-seed{given.seed}", settings_of(size, name, over), deadline)
        print(f"{name}: {'finished' if finished[name] else 'to be gone on with'}", flush=True)
    curves = {name: curve(out / f"{name}-seed{given.seed}") for name in chosen}
    outcome = compare(curves, size.reference, size.target, finished.get(size.reference, False))
    for name, row in outcome["methods"].items():
        row["finished"] = finished[name]
    outcome |= {"size": given.size, "seed": given.seed, "curves": curves}
    draw(charts(curves), out / "field.png")
    write_result(given.json or out / "field.json", "--json", json.dumps(outcome, indent=2))
    print(table(outcome))
    return outcome


def main(argv: Sequence[str] | None = None) -> int:
    """The command; a user's mistake is one sentence and exit code 2."""
    return run_command(run, argv, stopped="stopped; the same command goes on.")


if __name__ == "__main__":
    sys.exit(main())
