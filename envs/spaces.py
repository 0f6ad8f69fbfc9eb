"""The observation, entry by entry: one table that the space, the documentation and TensorBoard read."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gymnasium import spaces

from ssdkd.coefficients import RANGES, Coefficients

SLOPE_ROUNDS = 5


@dataclass
class Memory:
    """What the environment remembers of an episode: the last rounds' statistics, the last action and reward."""

    recent: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=SLOPE_ROUNDS + 1))
    coefficients: Coefficients = field(default_factory=Coefficients)
    reward: float = 0.0

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
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Memory:
        recent = deque((dict(entry) for entry in state["recent"]), maxlen=SLOPE_ROUNDS + 1)
        return cls(recent, Coefficients(**state["coefficients"]), float(state["reward"]))


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


def _quantile_entries(
    key: str, meaning: str, low: float, read: Callable[[str], Callable[[Memory], float]]
) -> list[Entry]:
    return [Entry(f"{key}_q{q}", low, 1.0, f"{meaning}, {q} % quantile", read(f"{key}_q{q}")) for q in (10, 50, 90)]


ENTRIES: tuple[Entry, ...] = (
    Entry("progress", 0.0, 1.0, "share of the budget spent", _plain("progress")),
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
        lambda memory: memory.slope(lambda s: math.log(max(s["probe_kl"], 1e-8))),
    ),
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
    Entry("last_reward", -1.0, 1.0, "the last reward", lambda memory: memory.reward),
)
PROGRESS = next(i for i, entry in enumerate(ENTRIES) if entry.name == "progress")


def observation_space() -> spaces.Box:
    low = np.array([entry.low for entry in ENTRIES], dtype=np.float32)
    high = np.array([entry.high for entry in ENTRIES], dtype=np.float32)
    return spaces.Box(low, high, dtype=np.float32)


def action_space() -> spaces.Box:
    return spaces.Box(-1.0, 1.0, (len(RANGES),), dtype=np.float32)


def observe(memory: Memory) -> np.ndarray:
    """The observation (len(ENTRIES),) float32, every entry inside its bounds."""
    values = [min(max(entry.read(memory), entry.low), entry.high) for entry in ENTRIES]
    return np.array(values, dtype=np.float32)
