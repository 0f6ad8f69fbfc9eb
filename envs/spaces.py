"""The observation, entry by entry: one table that the space, the documentation and TensorBoard read.

No entry comes from real images, whatever the reward is: a policy that was trained where a validation set is
allowed reads nothing that would be missing where there is none.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gymnasium import spaces

from envs.rewards import log_kl
from ssdkd.coefficients import RANGES, Coefficients
from ssdkd.engine import Engine

SLOPE_ROUNDS = 5


@dataclass
class Memory:
    """What the environment remembers of an episode: the task's facts, the last rounds, the last action and reward."""

    recent: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=SLOPE_ROUNDS + 1))
    coefficients: Coefficients = field(default_factory=Coefficients)
    reward: float = 0.0
    gain: float = 0.0  # the last round's `probe` reward, whatever the reward is
    task: dict[str, float] = field(default_factory=dict)

    @property
    def now(self) -> dict[str, float]:
        return self.recent[-1]

    def slope(self, read: Callable[[dict[str, float]], float]) -> float:
        """Mean change per round over the rounds remembered."""
        if len(self.recent) < 2:
            return 0.0
        return (read(self.recent[-1]) - read(self.recent[0])) / (len(self.recent) - 1)

    def state_dict(self) -> dict[str, Any]:
        return {
            "recent": [dict(entry) for entry in self.recent],
            "coefficients": self.coefficients.as_dict(),
            "reward": self.reward,
            "gain": self.gain,
            "task": dict(self.task),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Memory:
        recent = deque((dict(entry) for entry in state["recent"]), maxlen=SLOPE_ROUNDS + 1)
        return cls(
            recent,
            Coefficients(**state["coefficients"]),
            float(state["reward"]),
            float(state["gain"]),
            dict(state["task"]),
        )


def task_facts(engine: Engine) -> dict[str, float]:
    """What is known of a task before its first round, in numbers that mean the same for every task."""
    config, costs = engine.config, engine.costs
    neutral = engine.round_cost(config.distillation.steps)
    return {
        "batch_norm": float(engine.inverter.observer.has_batch_norm),
        "student_size": max(costs.student.multiply_adds, 1) / max(costs.teacher.multiply_adds, 1),
        "making_share": engine.round_cost(0) / neutral,
        "starting_share": costs.starting(config.distillation.batch),
        "replays_per_round": config.distillation.steps * config.distillation.batch / config.buffer.capacity,
        "candidates_per_round": config.inversion.images / config.buffer.capacity,
        "neutral_cost": neutral,
        "rounds": float(engine.budget_rounds),
        "steps": float(config.distillation.steps),
    }


@dataclass(frozen=True)
class Entry:
    """One number of the observation: its name, its bounds, what it means and how it is read."""

    name: str
    low: float
    high: float
    meaning: str
    read: Callable[[Memory], float]


def log_scaled(value: float) -> float:
    """log10 of a positive number, 1e-6 -> -1, 1 -> 0, 1e6 -> 1."""
    return math.log10(max(value, 0.0) + 1e-6) / 6.0


def _plain(key: str) -> Callable[[Memory], float]:
    return lambda memory: memory.now[key]


def _log(key: str) -> Callable[[Memory], float]:
    return lambda memory: log_scaled(memory.now[key])


def _counted(key: str) -> Callable[[Memory], float]:
    return lambda memory: math.log1p(max(memory.now[key], 0.0)) / 10.0


def _fact(key: str) -> Callable[[Memory], float]:
    return lambda memory: memory.task[key]


def _log_fact(key: str) -> Callable[[Memory], float]:
    return lambda memory: math.log10(max(memory.task[key], 1e-9)) / 3.0


def _novelty(memory: Memory) -> float:
    """How much less the student knows of new images than of those it replays (of which 1 nat is due at first)."""
    return 6.0 * (log_scaled(memory.now["candidate_delta_q50"]) - log_scaled(memory.now["delta_q50"]))


def _rounds(memory: Memory) -> float:
    """The budget in rounds of effort 1; one in minutes is judged by what it bought so far, at first by nothing."""
    rounds, now = memory.task["rounds"], memory.now
    if not rounds and now["progress"] > 0:
        rounds = now["spent"] / now["progress"] / memory.task["neutral_cost"]
    return max(rounds, 1.0)


def _budget(memory: Memory) -> float:
    return math.log10(_rounds(memory)) / 5.0


def _steps(memory: Memory) -> float:
    return math.log10(_rounds(memory) * memory.task["steps"]) / 6.0


def _quantile_entries(
    key: str, meaning: str, low: float, read: Callable[[str], Callable[[Memory], float]]
) -> list[Entry]:
    return [Entry(f"{key}_q{q}", low, 1.0, f"{meaning}, {q} % quantile", read(f"{key}_q{q}")) for q in (10, 50, 90)]


ENTRIES: tuple[Entry, ...] = (
    Entry("progress", 0.0, 1.0, "share of the budget spent", _plain("progress")),
    Entry("budget", 0.0, 1.0, "log10 of the budget in rounds of effort 1, by 5", _budget),
    Entry("steps", 0.0, 1.0, "log10 of the student steps in as many rounds, by 6", _steps),
    Entry("batch_norm", 0.0, 1.0, "1 where the teacher has batch-norm statistics, else 0", _fact("batch_norm")),
    Entry(
        "student_size", -1.0, 1.0, "log10 of the student's compute over the teacher's, by 3", _log_fact("student_size")
    ),
    Entry("making_share", 0.0, 1.0, "share of a round of effort 1 that making samples takes", _fact("making_share")),
    Entry(
        "starting_share",
        0.0,
        1.0,
        "share of a student step of batch 1 that starting its operations takes",
        _fact("starting_share"),
    ),
    Entry(
        "replays_per_round",
        -1.0,
        1.0,
        "log10 of the replays in a round of effort 1 over the buffer's capacity, by 3",
        _log_fact("replays_per_round"),
    ),
    Entry(
        "candidates_per_round",
        -1.0,
        1.0,
        "log10 of the candidates in a round over the buffer's capacity, by 3",
        _log_fact("candidates_per_round"),
    ),
    Entry("buffer_fill", 0.0, 1.0, "share of the buffer in use", _plain("buffer_fill")),
    Entry("class_entropy", 0.0, 1.0, "class balance of the buffer: entropy over log C", _plain("class_entropy")),
    Entry("class_share_min", 0.0, 1.0, "share of the rarest class", _plain("class_share_min")),
    Entry("class_share_max", 0.0, 1.0, "share of the commonest class", _plain("class_share_max")),
    *_quantile_entries("confidence", "teacher's confidence over the buffer", 0.0, _plain),
    *_quantile_entries("delta", "log10 of the last seen KL over the buffer, by 6", -1.0, _log),
    *_quantile_entries("age", "log(1 + rounds in the buffer), by 10", 0.0, _counted),
    *_quantile_entries("visits", "log(1 + times replayed), by 10", 0.0, _counted),
    *_quantile_entries("candidate_confidence", "teacher's confidence over the newest candidates", 0.0, _plain),
    *_quantile_entries("candidate_delta", "log10 of KL over the newest candidates, by 6", -1.0, _log),
    Entry("novelty", -1.0, 1.0, "log10 of the newest candidates' median KL over the buffer's", _novelty),
    Entry("probe_agreement", 0.0, 1.0, "teacher and student name the same class", _plain("probe_agreement")),
    Entry("probe_kl", -1.0, 1.0, "log10 of KL on the probe, by 6", _log("probe_kl")),
    Entry(
        "agreement_slope",
        -1.0,
        1.0,
        f"change of the agreement over {SLOPE_ROUNDS} rounds, per round, times 10",
        lambda memory: 10.0 * memory.slope(lambda s: s["probe_agreement"]),
    ),
    Entry(
        "kl_slope",
        -1.0,
        1.0,
        f"change of log KL on the probe over {SLOPE_ROUNDS} rounds, per round",
        lambda memory: memory.slope(log_kl),
    ),
    Entry("replay_agreement", 0.0, 1.0, "the same class on the images just replayed", _plain("replay_agreement")),
    Entry("replay_loss", -1.0, 1.0, "log10 of the loss on the images just replayed, by 6", _log("replay_loss")),
    Entry("learning_rate", 0.0, 1.0, "share of the largest learning rate", _plain("learning_rate_fraction")),
    *(
        Entry(
            f"last_{entry.name}",
            -1.0,
            1.0,
            f"the last action's {entry.name}",
            lambda memory, r=entry: r.to_unit(getattr(memory.coefficients, r.name)),  # type: ignore[misc]
        )
        for entry in RANGES
    ),
    Entry(
        "last_gain",
        -1.0,
        1.0,
        "fall of log KL on the probe in the last round, per unit of budget: the reward `probe`",
        lambda memory: memory.gain,
    ),
)
PROGRESS = next(i for i, entry in enumerate(ENTRIES) if entry.name == "progress")


_LOW = np.array([entry.low for entry in ENTRIES])
_HIGH = np.array([entry.high for entry in ENTRIES])


def observation_space() -> spaces.Box:
    return spaces.Box(_LOW.astype(np.float32), _HIGH.astype(np.float32), dtype=np.float32)


def action_space() -> spaces.Box:
    return spaces.Box(-1.0, 1.0, (len(RANGES),), dtype=np.float32)


def observe(memory: Memory) -> np.ndarray:
    """The observation (len(ENTRIES),) float32, every entry inside its bounds; what is not a number is the upper one."""
    values = np.array([entry.read(memory) for entry in ENTRIES], dtype=np.float64)
    values = np.where(np.isnan(values), _HIGH, values)
    return np.clip(values, _LOW, _HIGH).astype(np.float32)


def action_table() -> str:
    """The action, entry by entry, as a table in Markdown; * marks ranges that equal steps multiply."""
    lines = ["| name | range | neutral | steers |", "| --- | --- | --- | --- |"]
    for r in RANGES:
        star = "*" if r.logarithmic else ""
        lines.append(f"| {r.name} | {r.low:g} .. {r.high:g}{star} | {r.neutral:g} | {r.steers} |")
    return "\n".join(lines)


def observation_table() -> str:
    """The observation, entry by entry, as a table in Markdown."""
    lines = ["| name | bounds | meaning |", "| --- | --- | --- |"]
    lines += [f"| {entry.name} | {entry.low:g} .. {entry.high:g} | {entry.meaning} |" for entry in ENTRIES]
    return "\n".join(lines)
