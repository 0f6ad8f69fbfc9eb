"""Does selection pay? Policies compared at equal compute, over several seeds.

    python -m benchmarks.selection --out runs/selection                                    # digits, 10 seeds
    python -m benchmarks.selection --tasks mnist mnist-400 --seeds 5 --data-root DATA --teacher lenet5.safetensors
    python -m benchmarks.selection --tasks held-out --teachers-root teachers/digits     # of configs/family.yaml
    python -m benchmarks.selection --policies ssdkd "schedule={alpha: 0.6, effort: [2, 0.5]}" --jobs 2
    python -m benchmarks.selection --policies learned --ablate                          # what each coefficient is worth
    python -m benchmarks.selection --policies learned --share 0.667 --out runs/less     # where it ends with less

Every run is one distillation with a run folder of its own in `--out`, so that `tensorboard --logdir OUT` and
`python -m ssdkd.report OUT/*/` show them on the same axes. A run that is finished is not repeated: stop and start
as you like, add seeds and policies later. Options that are not listed go to every run, as those of `ssdkd.run`:
`--rounds 40 --buffer.capacity 100`.

All policies of a seed start from the same student, generator and probe, and get the same budget. The figures are
interquartile means over seeds, with the 95 % interval of a percentile bootstrap (`scipy.stats.bootstrap`):

| figure | meaning |
| --- | --- |
| final | accuracy of the student handed out, in percent |
| area | mean accuracy over the budget: early and high |
| final_in_time, area_in_time | the same over seconds of work, up to where the fastest run of that seed ended |
| area_over_ssdkd | its area less that of ssdkd from the same seed; without ssdkd, area_over_learned likewise |
| reaches_ssdkd | share of the budget at which its interquartile mean first comes to ssdkd's final one, or never |
| rank_correlation | Spearman, within a run, of accuracy and -log KL on the probe; median over the runs |

Seconds are those of the machine: with `--jobs` above 1, or others at work on it, take them with a grain of salt.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from agents import choose_policy
from agents.evaluate import FIXED, area_under, interquartile_mean, schedule
from agents.learning import NEUTRAL
from agents.policies import DEFAULT, LearnedPolicy, load_policy
from agents.processes import pool
from agents.tasks import family_from, held_out_tasks, merged
from benchmarks.arguments import refuse_own, require_at_least, require_installed
from envs.spaces import ENTRIES
from ssdkd import run as command
from ssdkd.build import build_engine
from ssdkd.coefficients import RANGES
from ssdkd.config import CheckpointConfig, RunConfig, parse_command_line, read_yaml, to_yaml
from ssdkd.errors import ConfigError, NumericalError, Parser, SsdkdError
from ssdkd.files import atomic_write_bytes, atomic_write_text, expanded, require_writable, write_result
from ssdkd.report import POLICY_COLOURS
from ssdkd.saving import Stopped, StoppedAtOnce
from ssdkd.tracking import Display, RunFolder
from ssdkd.tracking.charts import COLOURS, Band, Chart, Line, to_pixels, to_svg
from ssdkd.tracking.events import to_png
from ssdkd.tracking.folder import CONFIG, METRICS, SUMMARY
from ssdkd.tracking.metrics import read_metrics

WITHOUT = "learned without "
HELD_OUT = "held-out-"
LEARNED = ("learned", "adaptive")  # the second goes on learning during the run, as with `--adapt true`
MARK = "benchmark.json"  # in the folder of a run: that it is one of these, and where its curve begins
GRID = np.linspace(0.0, 1.0, 101)
# Tight enough that selection matters and accuracy is still rising; any option may be given anew on the command line.
TASKS: dict[str, dict[str, Any]] = {
    "digits": {
        "rounds": 40,
        "inversion": {"images": 32, "steps": 3, "latent": 32, "width": 16, "warmup": 10},
        "buffer": {"capacity": 120, "views": 4},
        "distillation": {"batch": 32, "steps": 10},
        "probe": {"images": 512},
    },
    "mnist": {"rounds": 40, "threads": 1, "buffer": {"capacity": 2000}},
    "mnist-400": {"rounds": 40, "threads": 1, "buffer": {"capacity": 400}},  # NAME-VARIANT of the ready-made job NAME
}
# Entries that a schedule made for the task could know; all others tell how the run goes.
FORESEEN = (
    "progress",
    "budget",
    "steps",
    "batch_norm",
    "student_size",
    "making_share",
    "starting_share",
    "replays_per_round",
    "candidates_per_round",
    "learning_rate",
)


class Ablated:
    """The learned policy with one coefficient held at its neutral value, or without its feedback.

    Without feedback it sees the mean of its training in place of every entry that tells how the run goes.
    """

    def __init__(self, learned: LearnedPolicy, lacks: str) -> None:
        self.learned = learned
        self.row = [r.name for r in RANGES].index(lacks) if lacks != "feedback" else None
        names = [entry.name for entry in ENTRIES]
        read = dict(zip(learned.description.observations, learned.mean, strict=True))
        blind_to = [name for name in read if name not in FORESEEN and lacks == "feedback"]
        self.means = {names.index(name): read[name] for name in blind_to}

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        seen = np.array(observation)
        for place, mean in self.means.items():
            seen[..., place] = mean
        action, state = self.learned.predict(seen, state, episode_start, deterministic)
        if self.row is not None:
            action[..., self.row] = NEUTRAL[self.row]
        return action, state


@dataclass(frozen=True)
class Job:
    """One run of the comparison."""

    task: str
    policy: str  # its name in the results
    seed: int
    rule: str  # what decides: a fixed policy's name, one of LEARNED, `learned without NAME`, or coefficients
    digest: str  # of a learned policy
    config: RunConfig

    def folder(self, root: Path) -> Path:
        names = (re.sub(r"[^\w.-]+", "_", name) for name in (self.task, self.policy))
        return root / f"{'-'.join(names)}-seed{self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What one run came to: its curve, from the untrained student on, and its end."""

    task: str
    policy: str
    seed: int
    shares: list[float]  # of the budget
    seconds: list[float]  # of work
    accuracy: list[float]  # percent, at these
    probe_kl: list[float]  # nats, at these but the first
    final: float


# ----------------------------------------------------------------------------------------------------
# Statistics
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """An interquartile mean over seeds and its 95 % interval; without an interval where there is one seed."""

    value: float
    low: float | None
    high: float | None
    values: list[float] = field(default_factory=list)


def estimate(values: Sequence[float]) -> Estimate:
    """Interquartile mean and percentile bootstrap over (seeds,)."""
    from scipy import stats

    held = np.asarray(values, dtype=np.float64)
    value = float(interquartile_mean(held))
    if len(held) < 2:
        return Estimate(value, None, None, held.tolist())
    interval = stats.bootstrap(
        (held,),
        interquartile_mean,
        confidence_level=0.95,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high), held.tolist())


def band(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same interval at every point: (seeds, points) -> lower and upper edge, (points,) each."""
    from scipy import stats

    if len(curves) < 2:
        return curves[0], curves[0]
    found = stats.bootstrap(
        (curves,),
        interquartile_mean,
        axis=0,
        method="percentile",
        n_resamples=2000,
        batch=100,
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return found.low, found.high


def area_until(x: Sequence[float], y: Sequence[float], end: float) -> float:
    """Mean of a curve over [0, end]: cut there; level before its first point and after its last."""
    kept = [(0.0, y[0]), *((a, b) for a, b in zip(x, y, strict=True) if 0 < a < end)]
    kept.append((end, float(np.interp(end, x, y))))
    return area_under([a / end for a, _ in kept], [b for _, b in kept])


def first_reached(x: Sequence[float], y: Sequence[float], target: float) -> float | None:
    """Where a curve first comes to `target`, None where it never does."""
    return next((float(a) for a, b in zip(x, y, strict=True) if b >= target), None)


def on_grid(outcome: Outcome) -> np.ndarray:
    """Its accuracy over the budget, at the points of GRID."""
    return np.interp(GRID, outcome.shares, outcome.accuracy)


def reaches(curves: np.ndarray, of_ssdkd: np.ndarray) -> dict[str, Any]:
    """Where the interquartile mean of `curves` (seeds, points of GRID) first comes to that of `of_ssdkd`, (seeds,).

    With a percentile bootstrap over seeds, which both share. None: never.
    """
    random, n = np.random.default_rng(0), len(of_ssdkd)

    def at(rows: np.ndarray) -> float:
        target = float(interquartile_mean(of_ssdkd[rows])) - 1e-9  # means of the same numbers differ by their order
        found = first_reached(GRID.tolist(), interquartile_mean(curves[rows], axis=0).tolist(), target)
        return math.inf if found is None else found

    value = at(np.arange(n))
    resampled = [at(random.integers(n, size=n)) for _ in range(1000)] if n > 1 else [math.nan]
    low, high = np.quantile(resampled, [0.025, 0.975], method="inverted_cdf")
    told = {"value": value, "low": float(low), "high": float(high)}
    return {name: number if math.isfinite(number) else None for name, number in told.items()}


def rank_correlation(probe_kl: Sequence[float], accuracy: Sequence[float]) -> float | None:
    """Spearman's, of -log KL on the probe and accuracy over the rounds of a run; None where one is constant."""
    from scipy import stats

    known = [(-math.log(kl), right) for kl, right in zip(probe_kl, accuracy, strict=True) if 0 < kl < math.inf]
    if any(len({pair[side] for pair in known}) < 2 for side in (0, 1)):
        return None
    return float(stats.spearmanr(*zip(*known, strict=True)).statistic)


Figures = dict[str, dict[str, float]]  # policy -> what its run came to, by name


def figures_of(runs: dict[str, Outcome]) -> Figures:
    """What every policy's run of one task and seed came to; in time: up to where the fastest of them ended."""
    end = min(o.seconds[-1] for o in runs.values())
    return {
        p: {
            "final": o.final,
            "area": area_under(o.shares, o.accuracy),
            "final_in_time": float(np.interp(end, o.seconds, o.accuracy)),
            "area_in_time": area_until(o.seconds, o.accuracy, end),
        }
        for p, o in runs.items()
    }


def estimates(of_seeds: Sequence[Figures]) -> dict[str, Any]:
    """The middle of each policy's figures over the seeds, and of what its area is above ssdkd's, or else learned's."""
    found: dict[str, Any] = {}
    other = next((p for p in ("ssdkd", "learned") if p in of_seeds[0]), None)
    for p in of_seeds[0]:
        found[p] = {name: asdict(estimate([f[p][name] for f in of_seeds])) for name in of_seeds[0][p]}
        if other is not None:
            found[p][f"area_over_{other}"] = asdict(estimate([f[p]["area"] - f[other]["area"] for f in of_seeds]))
    return found


def compare(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The figures of one task's runs, by policy; seeds that not every policy has are left out."""
    policies = list(dict.fromkeys(o.policy for o in outcomes))
    of = {(o.policy, o.seed): o for o in outcomes}
    seeds = [s for s in sorted({o.seed for o in outcomes}) if all((p, s) in of for p in policies)]
    if not seeds:
        raise ConfigError("there is no seed that every policy has finished; let the runs come to their end.")
    found = estimates([figures_of({p: of[p, s] for p in policies}) for s in seeds])
    targets = np.array([of["ssdkd", s].final for s in seeds]) if "ssdkd" in policies else None
    for p in policies:
        runs = [of[p, s] for s in seeds]
        ranks = [rank_correlation(o.probe_kl, o.accuracy[1:]) for o in runs]
        known = [rank for rank in ranks if rank is not None]
        found[p] |= {
            "rank_correlation": float(np.median(known)) if known else None,
            "rank_correlations": ranks,
            "seconds": float(np.median([o.seconds[-1] for o in runs])),
        }
        if targets is not None:
            found[p]["reaches_ssdkd"] = reaches(np.stack([on_grid(o) for o in runs]), targets)
    return {"seeds": seeds, "policies": found}


def over_tasks(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Mean over the tasks, for each seed that every policy has on every task: the figures that tasks can share.

    `reaches_ssdkd` is of the mean of the tasks' curves.
    """
    policies, tasks = (list(dict.fromkeys(getattr(o, name) for o in outcomes)) for name in ("policy", "task"))
    of = {(o.policy, o.task, o.seed): o for o in outcomes}
    known = sorted({o.seed for o in outcomes})
    seeds = [s for s in known if all((p, t, s) in of for p in policies for t in tasks)]
    if not seeds:
        return {}
    of_seeds = []
    for s in seeds:
        of_tasks = [figures_of({p: of[p, t, s] for p in policies}) for t in tasks]
        of_seeds.append(
            {p: {name: float(np.mean([f[p][name] for f in of_tasks])) for name in of_tasks[0][p]} for p in policies}
        )
    found = estimates(of_seeds)
    if "ssdkd" in policies:
        targets = np.array([f["ssdkd"]["final"] for f in of_seeds])
        for p in policies:
            curves = np.stack([np.mean([on_grid(of[p, t, s]) for t in tasks], axis=0) for s in seeds])
            found[p]["reaches_ssdkd"] = reaches(curves, targets)
    return {"tasks": tasks, "seeds": seeds, "policies": found}


# ----------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------


def play(job: Job, root: Path) -> Outcome:
    """Make the run of a job, unless it is there already."""
    folder = RunFolder(job.folder(root))
    if (folder / SUMMARY).is_file():
        _refuse_another(job, folder)
        return read(job, folder)
    if folder.path.exists():
        with folder.claimed():  # unless another command is at it
            is_empty = folder.path.is_dir() and not any(folder.path.iterdir())  # cut off before it had its mark
            if not is_empty and not (folder / MARK).is_file():
                raise ConfigError(f"{folder.path} is in the way and is no run of this benchmark; choose another --out.")
            shutil.rmtree(folder.path)  # a run that was cut off
    policy: Any
    if job.rule.lstrip().startswith("{"):
        policy = schedule(job.rule)
    elif job.rule.startswith(WITHOUT):
        policy = Ablated(load_policy(job.config.policy_file), job.rule.removeprefix(WITHOUT))
    else:
        name = "learned" if job.rule in LEARNED else job.rule
        policy = choose_policy(name, job.seed, job.config.policy_file, job.config.adapt)
    engine = build_engine(job.config)
    begins_at = engine.accuracy(engine.student)
    if begins_at is None:
        raise ConfigError(f"task {job.task} has no evaluation set to compare on; give --data-root.")
    folder.path.mkdir(parents=True)
    with folder.claimed():
        folder.write_json(MARK, {"rule": job.rule, "digest": job.digest, "accuracy_at_start": begins_at})
        folder.write_text(CONFIG, to_yaml(job.config))
        try:
            command.run(job.config, engine, folder, Display(quiet=True), policy=policy)
        except (Stopped, StoppedAtOnce) as stopped:
            raise SsdkdError("stopped; the same command goes on with the runs that are left.") from stopped
    return read(job, folder)


def read(job: Job, folder: RunFolder) -> Outcome:
    """What a finished run's folder tells."""
    summary, mark = folder.read_json(SUMMARY), folder.read_json(MARK)
    measured = [line for line in read_metrics(folder / METRICS) if line.get("accuracy") is not None]
    start, warmed = float(mark["accuracy_at_start"]), float(summary["phase_seconds"].get("warmup", 0.0))
    return Outcome(
        task=job.task,
        policy=job.policy,
        seed=job.seed,
        shares=[0.0, *(line["progress"] for line in measured)],
        seconds=[warmed, *(line["seconds"] for line in measured)],
        accuracy=[start, *(line["accuracy"] for line in measured)],
        probe_kl=[line["probe_kl"] if line["probe_kl"] is not None else math.inf for line in measured],
        final=float(summary["student_accuracy"]),
    )


def _refuse_another(job: Job, folder: RunFolder) -> None:
    """A finished run of the same name must be the same run."""
    mark = folder.read_json(MARK) if (folder / MARK).is_file() else {}
    other = differing(read_yaml(str(folder / CONFIG))[0], yaml.safe_load(to_yaml(job.config)))
    decides = {"rule": "set of coefficients", "digest": "learned policy"}
    other += [called for name, called in decides.items() if mark.get(name) != getattr(job, name)]
    if other:
        raise ConfigError(
            f"{folder.path} is a run with another {other[0]}: choose another --out, or remove that folder."
        )


def differing(held: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The dotted keys at which two settings would be two runs."""
    one, other = dict(flat(held)), dict(flat(wanted))
    harmless = (*command.HARMLESS, "out")
    return [k for k in {**one, **other} if one.get(k) != other.get(k) and not k.startswith(harmless)]


def flat(values: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted keys."""
    if isinstance(values, dict) and values:
        for name, value in values.items():
            yield from flat(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, values


def play_all(jobs: Sequence[Job], root: Path, at_once: int) -> tuple[list[Outcome], list[str]]:
    """-> what the runs came to, and a sentence for each that failed; some at once."""
    outcomes: list[Outcome] = []
    failed: list[str] = []

    def note(job: Job, result: Any) -> None:
        name = job.folder(root).name
        try:
            outcome = result()
        except NumericalError as error:
            failed.append(f"{name}: {error}")
            print(f"  {failed[-1]}", flush=True)
            return
        outcomes.append(outcome)
        print(f"  {name}: {outcome.final:.2f} % in {outcome.seconds[-1]:.1f} s", flush=True)

    if at_once == 1:
        for job in jobs:
            note(job, lambda job=job: play(job, root))
    else:
        with pool(at_once) as workers:
            futures = {workers.submit(play, job, root): job for job in jobs}
            for future in as_completed(futures):
                note(futures[future], future.result)
    order = {(job.task, job.policy, job.seed): place for place, job in enumerate(jobs)}
    return sorted(outcomes, key=lambda o: order[o.task, o.policy, o.seed]), failed


# ----------------------------------------------------------------------------------------------------
# What is asked for
# ----------------------------------------------------------------------------------------------------


def task_config(task: str, given: argparse.Namespace, options: Sequence[str]) -> RunConfig:
    """The configuration of a task's runs, but for policy and seed."""
    refuse_own(options, {"--seed": "--first-seed and --seeds", "--policy": "--policies", "--config": "--tasks"})
    every_round = {"tracking": {"evaluate_every": 1}}
    own: dict[str, Any] = {}
    if task.startswith(HELD_OUT):
        family = family_from("family", given.teachers_root)
        known = {f"{HELD_OUT}{n + 1}": each for n, each in enumerate(held_out_tasks(family))}
        if task not in known:
            raise ConfigError(f"--tasks: {task!r} is none of {', '.join(known)}.")
        base, over = read_yaml(family.base), known[task]
    else:
        base, over = read_yaml(task.split("-")[0] if task in TASKS else task), TASKS.get(task, {})
    if not is_known_whole(task):
        own = {"data_root": given.data_root} if given.data_root else {}
        own |= {"teacher": {"checkpoint": given.teacher}} if given.teacher else {}
    config, _ = parse_command_line(
        RunConfig,
        options,
        prog="python -m benchmarks.selection",
        description="",
        exclusive=("rounds", "minutes"),
        below=[base, (merged(every_round, over, own), f"task {task}")],
    )
    if config.rounds is None or config.minutes is not None:
        raise ConfigError("minutes: policies are compared at equal compute; give --rounds.")
    if config.adapt:
        raise ConfigError("adapt: name the policy adaptive among --policies instead.")
    if config.teacher.checkpoint is None:
        raise ConfigError(f"task {task} needs a teacher: give --teacher FILE.")
    if not config.tracking.evaluate_every:
        raise ConfigError("tracking.evaluate_every: 0 leaves no curve to compare; give at least 1.")
    config.checkpoint = CheckpointConfig(rounds=0, minutes=0.0)  # a run that was cut off begins anew
    return config


def is_known_whole(task: str) -> bool:
    """Whether its teacher and images need not be given."""
    return task == "digits" or task.startswith(HELD_OUT)


def named_tasks(tasks: Sequence[str], teachers_root: str | None) -> list[str]:
    """Each once, `held-out` as the tasks that it stands for."""
    how_many = len(held_out_tasks(family_from("family", teachers_root))) if "held-out" in tasks else 0
    all_held_out = [f"{HELD_OUT}{n + 1}" for n in range(how_many)]
    return list(dict.fromkeys(name for task in tasks for name in (all_held_out if task == "held-out" else [task])))


def named_rules(policies: Sequence[str]) -> dict[str, str]:
    """Policies as the command line names them -> name in the results -> what decides."""
    rules: dict[str, str] = {}
    for text in policies:
        found = re.fullmatch(r"(?:(\w+)=)?(\{.*\})", text.strip(), re.DOTALL)
        name, rule = (found[1] or "schedule", found[2]) if found else (text, text)
        if found:
            schedule(rule)  # a mistake is noticed before the first run
        elif name not in (*FIXED, *LEARNED):
            raise ConfigError(
                f"policies: {text!r} is none of {', '.join((*FIXED, *LEARNED))}, nor coefficients such as "
                "'name={alpha: 0.6, beta: [0.4, 1]}'."
            )
        if name in rules or (found and name in (*FIXED, *LEARNED)):
            raise ConfigError(f"policies: {name!r} is there twice; call the other 'NAME={{...}}'.")
        rules[name] = rule
    return rules


def jobs_for(given: argparse.Namespace, options: Sequence[str]) -> tuple[list[Job], list[str]]:
    """-> every run that is asked for, and a sentence for each policy that is left out."""
    rules, left_out, digest = named_rules(given.policies), [], ""
    if given.policy_file is not None and not set(LEARNED) & set(rules):
        raise ConfigError("--policy-file is of a learned policy: name learned or adaptive among --policies.")
    for name in (name for name in LEARNED if name in rules):
        if given.policy_file is None and not DEFAULT.is_file():
            left_out.append(f"{name} is left out: no policy ships with this version; give one with --policy-file.")
            del rules[name]
        else:
            digest = load_policy(given.policy_file).fingerprint()
    if given.ablate and "learned" not in given.policies:
        raise ConfigError("--ablate takes the learned policy apart: name learned among --policies.")
    if given.coefficients and "learned" not in given.policies:
        raise ConfigError("--coefficients draws what the learned policy set: name learned among --policies.")
    if given.ablate and digest:
        read = load_policy(given.policy_file).description.actions
        rules |= {f"without_{name}": WITHOUT + name for name in (*read, "feedback")}
    jobs: list[Job] = []
    tasks = named_tasks(given.tasks, given.teachers_root)
    for option, value in {"--teacher": given.teacher, "--data-root": given.data_root}.items():
        if value and all(map(is_known_whole, tasks)):
            raise ConfigError(f"{option} is of other tasks than digits and held-out ones, which have their own.")
    labels = [task if task in TASKS else Path(task).stem for task in tasks]
    if len(set(labels)) < len(labels):
        raise ConfigError(f"--tasks: two of {', '.join(tasks)} have one name, by which results are told apart.")
    for label, task in zip(labels, tasks, strict=True):
        shared = task_config(task, given, options)
        shared.rounds = max(1, round(given.share * (shared.rounds or 1)))  # task_config refuses None
        for seed in range(given.first_seed, given.first_seed + given.seeds):
            for name, rule in rules.items():
                config = copy.deepcopy(shared)
                config.seed, config.policy = seed, name
                config.adapt = rule == "adaptive"
                learned = rule in LEARNED or rule.startswith(WITHOUT)
                config.policy_file = given.policy_file if learned else None
                jobs.append(Job(label, name, seed, rule, digest if learned else "", config))
    return jobs, left_out


# ----------------------------------------------------------------------------------------------------
# What is shown
# ----------------------------------------------------------------------------------------------------


def shown(value: Any, digits: int = 2) -> str:
    """An estimate, or a plain number, as text."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        text = "never" if value["value"] is None else shown(value["value"], digits)
        if value["low"] is None:
            return text
        high = "never" if value["high"] is None else shown(value["high"], digits)
        return f"{text} [{shown(value['low'], digits)}, {high}]"
    return f"{round(value, digits) + 0.0:.{digits}f}"  # never -0.00


COLUMNS = (
    *("final", "area", "area_over_ssdkd", "area_over_learned"),
    *("final_in_time", "area_in_time", "reaches_ssdkd", "rank_correlation"),
)


def as_table(task: str, compared: dict[str, Any]) -> str:
    """The figures of a task in Markdown."""
    columns = [name for name in COLUMNS if any(name in figures for figures in compared["policies"].values())]
    rows = [f"{task}, {len(compared['seeds'])} seeds", "", f"| policy | {' | '.join(columns)} |"]
    rows.append("| --- " * (len(columns) + 1) + "|")
    for policy, figures in compared["policies"].items():
        rows.append(f"| {policy} | {' | '.join(shown(figures.get(name)) for name in columns)} |")
    return "\n".join(rows)


def colour_of(policy: str, policies: Sequence[str]) -> str:
    """The same for the same policy, in whatever order the runs were made."""
    free = [colour for colour in COLOURS if colour not in POLICY_COLOURS.values()]
    others = sorted(set(policies) - set(POLICY_COLOURS))
    return POLICY_COLOURS[policy] if policy in POLICY_COLOURS else free[others.index(policy) % len(free)]


def charts(task: str, outcomes: Sequence[Outcome]) -> list[Chart]:
    """Accuracy over compute and over seconds: interquartile mean and its interval, for each policy."""
    policies = list(dict.fromkeys(o.policy for o in outcomes))
    end = float(np.median([o.seconds[-1] for o in outcomes]))
    axes = (("compute budget spent (%)", "shares", GRID, 100.0), ("seconds of work", "seconds", GRID * end, 1.0))
    found = []
    for label, key, grid, scale in axes:
        lines, bands, late = [], [], []
        for policy in policies:
            colour = colour_of(policy, policies)
            curves = np.stack([np.interp(grid, getattr(o, key), o.accuracy) for o in outcomes if o.policy == policy])
            low, high = band(curves)
            x = (scale * grid).tolist()
            bands.append(Band(x, low.tolist(), high.tolist(), colour))
            lines.append(Line(policy, x, interquartile_mean(curves, axis=0).tolist(), colour))
            late += [*low[len(grid) // 4 :], *high[len(grid) // 4 :]]
        room = max(0.05 * (max(late) - min(late)), 0.1)
        y_range = (max(min(late) - room, 0.0), min(max(late) + room, 100.0))
        found.append(Chart(f"{task}: accuracy (%)", label, lines, bands, y_range=y_range))
    return found


def coefficient_charts(root: Path, names: Sequence[str]) -> list[Chart]:
    """What the learned policy set in the runs under `root`: each coefficient over the budget, a line for each task.

    Mean over seeds, in action space, so that the ends of the axis are those of the range; read as values.
    """
    runs: dict[str, list[list[dict[str, Any]]]] = {}
    for folder in sorted(root.glob("*-learned-seed*")):
        rounds = list(read_metrics(folder / METRICS)) if (folder / METRICS).is_file() else []
        if rounds:  # else it ended in its first one
            runs.setdefault(folder.name.rsplit("-learned-", 1)[0], []).append(rounds)
    found = []
    for r in (r for r in RANGES if r.name in names):
        lines = []
        for place, (task, those) in enumerate(runs.items()):
            curves = []
            for run in those:
                # a round's coefficients hold from where the round before ended
                ends = [0.0, *(line["progress"] for line in run)]
                values = [r.to_unit(line[r.name]) for line in run]
                at = np.searchsorted(ends[1:-1], GRID, side="right")
                curves.append(np.array(values)[at])
            colour = COLOURS[place % len(COLOURS)]
            lines.append(Line(task, (100 * GRID).tolist(), np.mean(curves, axis=0).tolist(), colour))
        span = f"{r.low:g} to {r.high:g}{', each step multiplies' if r.logarithmic else ''}"
        neutral = r.to_unit(r.neutral)
        lines.append(Line("neutral", [0.0, 100.0], [neutral, neutral], "#8a8f98", width=1.0))
        found.append(Chart(f"{r.name} (-1 to 1: {span})", "compute budget spent (%)", lines, y_range=(-1.05, 1.05)))
    return found


def draw(drawn: Sequence[Chart], out: Path) -> None:
    """The charts, two in a row, as PNG or SVG by the file's name."""
    width, height = 480, 300
    if out.suffix == ".svg":
        parts = []
        for place, chart in enumerate(drawn):
            row, column = divmod(place, 2)
            where = f'<svg x="{column * width}" y="{row * height}" width="{width}" height="{height}" '
            parts.append(to_svg(chart, width, height).replace("<svg ", where, 1))
        size = f'width="{2 * width}" height="{-(-len(drawn) // 2) * height}"'
        style = "<style>svg{background:#fff;font-family:sans-serif}.rule{stroke:#dfe2e6}</style>"
        text = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{style}{"".join(parts)}</svg>\n'
        atomic_write_text(out, text)
    else:
        atomic_write_bytes(out, to_png(to_pixels(drawn, columns=2, width=width, height=height)))


def run(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The comparison, whole: -> what `--json` writes."""
    parser = Parser(
        prog="python -m benchmarks.selection",
        description="Compare policies at equal compute.",
        epilog="Any other option goes to every run, as those of ssdkd.run.",
    )
    parser.add_argument(
        "--out", type=expanded, default="runs/selection", help="folder of all the run folders (%(default)s)"
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=["digits"],
        help="digits, mnist, mnist-400, held-out (all of them), held-out-1 and so on, another ready-made job such as "
        "cifar10, or a run's YAML (%(default)s)",
    )
    parser.add_argument(
        "--policies",
        nargs="+",
        default=["uniform", "random", "ssdkd", "learned"],
        help="uniform, random, ssdkd, learned, adaptive (learned, and going on with it during the run), or "
        "coefficients: 'NAME={alpha: 0.6, beta: [0.4, 1]}' (the first four)",
    )
    parser.add_argument("--policy-file", help="the learned policy; the one that ships")
    parser.add_argument("--share", type=float, default=1.0, help="of its task's rounds, for every run (%(default)s)")
    parser.add_argument("--ablate", action="store_true", help="also: the learned policy without each of its parts")
    parser.add_argument("--teachers-root", help="folder of the held-out tasks' teachers")
    parser.add_argument("--seeds", type=int, default=10, help="how many (%(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first one (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (%(default)s)")
    parser.add_argument("--data-root", help="where the evaluation sets lie; digits ship")
    parser.add_argument("--teacher", help="weights of the teacher; those for digits ship")
    parser.add_argument("--json", help="file for all figures and curves")
    parser.add_argument(
        "--coefficients", type=expanded, help="file for a picture of what the learned policy set, .png or .svg"
    )
    parser.add_argument("--plot", type=expanded, help="file for the picture, .png or .svg (OUT/selection.png)")
    given, options = parser.parse_known_args(argv)
    require_at_least(given, seeds=1, jobs=1, first_seed=0)
    if not 0.0 < given.share <= 1.0:
        raise ConfigError("--share: above 0 and at most 1.")
    require_installed("scipy", "SciPy")
    plot = given.plot or given.out / "selection.png"
    jobs, left_out = jobs_for(given, options)
    for sentence in left_out:
        print(sentence)
    files = {
        "--out": given.out / MARK,
        "--plot": plot,
        "--json": given.json,
        "--coefficients": given.coefficients,
    }
    for option, file in files.items():
        require_writable(file, option)
    for option in ("--plot", "--coefficients"):
        file = files[option]
        if file and Path(file).suffix not in (".png", ".svg"):
            raise ConfigError(f"{option}: {file} must end in .png or .svg.")
    outcomes, failed = play_all(jobs, given.out, given.jobs)
    by_task = {task: [o for o in outcomes if o.task == task] for task in dict.fromkeys(o.task for o in outcomes)}
    result: dict[str, Any] = {"tasks": {}, "left_out": left_out, "failed": failed}
    for task, own in by_task.items():
        result["tasks"][task] = compare(own)
        print(f"\n{as_table(task, result['tasks'][task])}")
    together = over_tasks(outcomes) if len(by_task) > 1 else {}
    if together:
        result["over_tasks"] = together
        print(f"\n{as_table(f'mean of {len(by_task)} tasks', together)}")
    result["runs"] = [asdict(o) for o in outcomes]
    write_result(given.json, "--json", json.dumps(result, indent=1) + "\n")
    if not outcomes:
        return result
    try:
        draw([chart for task, own in by_task.items() for chart in charts(task, own)], plot)
        if given.coefficients:
            read = load_policy(given.policy_file).description.actions
            draw(coefficient_charts(given.out, read), given.coefficients)
    except OSError as error:
        raise ConfigError(f"the pictures cannot be written: {error}.") from error
    print(f"\nplot: {plot}\nruns: tensorboard --logdir {given.out}; python -m ssdkd.report {given.out}/*/")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """The command; a user's mistake is one sentence and exit code 2."""
    torch.set_num_threads(1)
    try:
        result = run(argv)
    except SsdkdError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the runs that are left.", file=sys.stderr)
        return 130
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
