"""Play whole episodes and compare: `python -m agents.evaluate --policy FILE --config family`.

Every policy plays the same tasks from the same seeds, so they start from the same student, generator and probe.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import yaml

from agents import SchedulePolicy, choose_policy
from agents.fixed import Policy
from agents.processes import each_of
from agents.tasks import Task, TasksConfig, held_out_tasks, name_of, training_tasks
from envs import SampleSelectionEnv
from envs.rewards import log_kl
from ssdkd.coefficients import RANGES, Coefficients
from ssdkd.config import option, parse_command_line
from ssdkd.errors import ConfigError, first_line, run_command
from ssdkd.files import require_writable, write_result

FIXED = ("uniform", "random", "ssdkd")


@dataclass(frozen=True)
class Episode:
    """What one policy made of one task from one seed; the areas are means over the budget."""

    policy: str
    task: str
    seed: int
    probe_area: float  # how far log KL on the probe lay below its start, in nats
    probe_kl: float  # in the end
    agreement: float  # percent of the probe, in the end
    accuracy_area: float | None  # percent; null without an evaluation set
    accuracy: float | None  # percent, in the end
    rounds: int
    spent: float  # share of the budget
    seconds: float


@dataclass
class EvaluateConfig(TasksConfig):
    """A family's YAML, and how to judge on it."""

    policies: list[Any] = option(list(FIXED), "fixed ones by name, learned, policy files, or coefficients as mappings")
    on: str = option("held_out", "which tasks of the family", choices=("held_out", "tasks"))
    sample: int = option(0, "so many of these tasks, drawn at random by first_seed; 0: all", low=0)
    seeds: int = option(3, "episodes of each policy on each task", low=1)
    first_seed: int = option(1000, "the seed of the first one", low=0)
    accuracy_every: int = option(1, "rounds between measurements of accuracy; 0: only at the end", low=0)
    processes: int = option(1, "episodes played at once", low=1)
    out: str | None = option(None, "file for one JSON line an episode")


def play(name: str, base: str, task: Task, seed: int, accuracy_every: int = 1, trust: bool = False) -> Episode:
    """One episode of one policy: a fixed one's name, `learned`, or a policy file; decides without exploring."""
    policy = policy_by(name, seed, trust)
    env = SampleSelectionEnv(base, tasks=[task], reward="area")
    start = time.perf_counter()
    at: list[float] = []
    logs: list[float] = []
    right: list[float | None] = []
    right_at: list[float] = []
    for _, info, progress, ended in rounds_of(env, policy, seed):
        at.append(progress)
        logs.append(log_kl(info["statistics"]))
        if accuracy_every and (ended or env.engine.round % accuracy_every == 0):
            right.append(env.engine.accuracy(env.engine.student))
            right_at.append(at[-1])
    final = env.engine.accuracy(env.engine.student)
    known = [value for value in right if value is not None]
    return Episode(
        policy=name,
        task=name_of(task),
        seed=seed,
        probe_area=area_under(at, [logs[0] - log for log in logs]),
        probe_kl=info["statistics"]["probe_kl"],
        agreement=100.0 * info["statistics"]["probe_agreement"],
        accuracy_area=area_under(right_at, known) if known else None,
        accuracy=final,
        rounds=env.engine.round,
        spent=env.engine.spent / env.engine.budget if env.engine.budget else env.engine.progress,
        seconds=time.perf_counter() - start,
    )


def rounds_of(
    env: SampleSelectionEnv, policy: Policy, seed: int
) -> Iterator[tuple[np.ndarray, dict[str, Any], float, bool]]:
    """One episode, decided without exploring: observation, info, progress and whether it has ended, from the reset on.

    Progress begins at 0: what a warm-up takes of a budget in minutes counts as the first round's.
    """
    observation, info = env.reset(seed=seed)
    ended = False
    yield observation, info, 0.0, ended
    while not ended:
        action, _ = policy.predict(observation, deterministic=True)
        observation, _, ended, _, info = env.step(action)
        yield observation, info, info["statistics"]["progress"], ended


def names_of(policies: Sequence[Any]) -> list[str]:
    """Policies as a YAML may have them, coefficients as the text that `policy_by` takes."""
    for policy in policies:
        if not isinstance(policy, (str, dict)):
            raise ConfigError(f"policies: expected names and mappings of coefficients, got {str(policy)[:60]!r}.")
    dumped = (p if isinstance(p, str) else yaml.safe_dump(p, default_flow_style=True, width=math.inf) for p in policies)
    return [text.strip() for text in dumped]


def policy_by(name: str, seed: int, trust: bool = False) -> Any:
    """A fixed policy by name, the shipped one as `learned`, constants as a mapping, any other from its file."""
    if name in FIXED:
        return choose_policy(name, seed)
    if name.lstrip().startswith("{"):
        return schedule(name)
    from agents.policies import load_policy

    return load_policy(None if name == "learned" else name, trust=trust)


def schedule(text: str) -> SchedulePolicy:
    """Coefficients as YAML, constant or from start to end, else neutral: `{alpha: 0.6, beta: [0.4, 1.0]}`."""
    try:
        values = yaml.safe_load(text)
        known = [r.name for r in RANGES]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is none of {', '.join(known)}")
        if any(isinstance(v, list) and len(v) != 2 for v in values.values()):
            raise ValueError("a list is a start and an end")
        ends = [{k: float(v[at] if isinstance(v, list) else v) for k, v in values.items()} for at in (0, -1)]
        start, end = (Coefficients(**values) for values in ends)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"policies: {text[:80]!r} are not coefficients ({first_line(error)}).") from error
    outside = next((r for r in RANGES for c in (start, end) if not r.low <= getattr(c, r.name) <= r.high), None)
    if outside is not None:
        raise ConfigError(f"policies: {outside.name} of {text[:80]!r} is outside {outside.low:g} .. {outside.high:g}.")
    return SchedulePolicy(start, end)


def area_under(at: Sequence[float], values: Sequence[float]) -> float:
    """Mean of a curve over the budget [0, 1]: straight between its points, level after the last."""
    x, y = np.asarray(at), np.asarray(values)
    return float(np.sum((y[1:] + y[:-1]) / 2.0 * np.diff(x)) + y[-1] * (1.0 - x[-1]))


def interquartile_mean(values: Any, axis: int = -1) -> Any:
    """Mean along an axis without its lowest and highest quarter, rounded down; robust to a run that went wrong."""
    ordered = np.sort(np.moveaxis(np.asarray(values, dtype=np.float64), axis, 0), axis=0)
    cut = len(ordered) // 4
    return ordered[cut : len(ordered) - cut].mean(axis=0)


def evaluate(
    names: Sequence[str],
    base: str,
    tasks: Sequence[Task],
    seeds: Sequence[int],
    processes: int = 1,
    accuracy_every: int = 1,
    trust: bool = False,
) -> Iterator[Episode]:
    """Every policy on every task from every seed, each as soon as it and all before it have ended."""
    jobs = [(name, base, task, seed, accuracy_every, trust) for task in tasks for seed in seeds for name in names]
    labels = [label for label in told_apart([name_of(task) for task in tasks]) for _ in seeds for _ in names]
    for episode, label in zip(each_of(jobs, play, processes), labels, strict=True):
        yield replace(episode, task=label)


def told_apart(names: Sequence[str]) -> list[str]:
    """Names of tasks, numbered where some have one: they differ in what it does not tell, such as the terms."""
    return [f"{n} ({names[:at].count(n) + 1})" if names.count(n) > 1 else n for at, n in enumerate(names)]


MEASURES = ("accuracy_area", "accuracy", "probe_area", "agreement")


def summary(episodes: Sequence[Episode]) -> dict[str, dict[str, float]]:
    """Interquartile mean of each measure, by policy."""
    table: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(e.policy for e in episodes):
        own = [asdict(e) for e in episodes if e.policy == name]
        told = {m: [e[m] for e in own if e[m] is not None] for m in MEASURES}
        table[name] = {m: float(interquartile_mean(values)) for m, values in told.items() if values}
    return table


def difference(episodes: Sequence[Episode], name: str, other: str, measure: str) -> tuple[float, float] | None:
    """By how much policy `name` is above `other` where both played the same: mean and its standard error.

    None where they did not, or fewer than two times, or where the measure is not known.
    """
    found = {(e.policy, e.task, e.seed): getattr(e, measure) for e in episodes}
    pairs = [(mine, found.get((other, task, seed))) for (by, task, seed), mine in found.items() if by == name]
    gaps = np.array([mine - yours for mine, yours in pairs if mine is not None and yours is not None])
    if len(gaps) < 2:
        return None
    return float(gaps.mean()), float(gaps.std(ddof=1) / len(gaps) ** 0.5)


def show(episodes: Sequence[Episode]) -> None:
    """Print the summary, over all tasks and for each, and what each policy is worth beside the first."""
    width = min(max(len(e.policy) for e in episodes), 60)  # a longer name stands out, and whole
    for task in ["all tasks", *dict.fromkeys(e.task for e in episodes)]:
        own = [e for e in episodes if task in ("all tasks", e.task)]
        print(f"\n{task} (interquartile means; episodes of each policy: {len({(e.task, e.seed) for e in own})})")
        for name, values in summary(own).items():
            print(f"  {name:{width}} " + "  ".join(f"{m} {v:7.3f}" for m, v in values.items()))
    first, *others = dict.fromkeys(e.policy for e in episodes)
    known = {name: {m: g for m in MEASURES if (g := difference(episodes, name, first, m))} for name in others}
    if any(known.values()):
        print(f"\nabove {first}, on the same task from the same seed (mean, standard error)")
        for name, gaps in known.items():
            print(f"  {name:{width}} " + "  ".join(f"{m} {g[0]:+.2f} ({g[1]:.2f})" for m, g in gaps.items()))


def run(argv: Sequence[str] | None = None) -> list[Episode]:
    config, given = parse_command_line(
        EvaluateConfig,
        argv,
        prog="python -m agents.evaluate",
        description="Compare policies over whole episodes.",
        extra=(
            ("policy", "policy file to compare with `policies`", None),
            ("trust", "let policy files run code", False),
        ),
        default_config="family",
    )
    tasks = held_out_tasks(config) if config.on == "held_out" else training_tasks(config)
    if 0 < config.sample < len(tasks):
        drawn = np.random.default_rng(config.first_seed).choice(len(tasks), config.sample, replace=False)
        tasks = [tasks[i] for i in drawn]
    names = [*names_of(config.policies), *([given.policy] if given.policy else [])]
    if not names:
        raise ConfigError("policies: name at least one.")
    for name in names:
        policy_by(name, 0, given.trust)  # a file that cannot be used is noticed before the first episode
    require_writable(config.out, "out")
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    episodes: list[Episode] = []
    try:
        for episode in evaluate(names, config.base, tasks, seeds, config.processes, config.accuracy_every, given.trust):
            episodes.append(episode)
    finally:  # what was played before Ctrl-C, or before an episode that failed, is kept
        if episodes:
            write_result(config.out, "out", "".join(json.dumps(asdict(e)) + "\n" for e in episodes))
    show(episodes)
    return episodes


def main(argv: Sequence[str] | None = None) -> int:
    """The command; a user's mistake is one sentence and exit code 2."""
    torch.set_num_threads(1)
    return run_command(run, argv, stopped="stopped; --out, if given, holds the episodes that have ended.")


if __name__ == "__main__":
    sys.exit(main())
