"""Policies that do not learn: uniform, the formula after the paper, any schedule, and chance.

They have the `predict` of a Stable-Baselines3 model, so that the command runs all policies alike.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from envs.spaces import PROGRESS
from ssdkd.coefficients import RANGES, Coefficients
from ssdkd.errors import ConfigError


class Policy(Protocol):
    """What the command asks of a policy; every Stable-Baselines3 model is one."""

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]: ...


class SchedulePolicy:
    """Coefficients that go in a straight line, in action space, from `start` to `end` as the budget is spent."""

    def __init__(self, start: Coefficients, end: Coefficients | None = None) -> None:
        self.start = np.array(start.to_unit(), dtype=np.float32)
        self.end = np.array((end or start).to_unit(), dtype=np.float32)

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """Observations (..., entries) -> actions (..., coefficients)."""
        progress = np.asarray(observation)[..., PROGRESS : PROGRESS + 1]
        return (self.start + (self.end - self.start) * progress).astype(np.float32), state


class RandomPolicy:
    """A new action every round, uniform over the action space."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        shape = (*np.asarray(observation).shape[:-1], len(RANGES))
        return self.random.uniform(-1.0, 1.0, shape).astype(np.float32), state

    def state_dict(self) -> dict[str, Any]:
        return {"random": self.random.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.random.bit_generator.state = state["random"]


def uniform() -> SchedulePolicy:
    """All-neutral coefficients: nothing is selected, everything is replayed alike."""
    return SchedulePolicy(Coefficients())


def ssdkd() -> SchedulePolicy:
    """The formula after the SSD-KD paper, with the constants of the coefficient table."""
    start, end = (Coefficients(**{r.name: r.formula[when] for r in RANGES}) for when in (0, 1))
    return SchedulePolicy(start, end)


def fixed_policy(name: str, seed: int) -> Policy:
    """A policy that needs no training, by its name in results."""
    if name == "random":
        return RandomPolicy(seed)
    known = {"uniform": uniform, "ssdkd": ssdkd}
    if name not in known:
        raise ConfigError(f"policy: expected uniform, random, ssdkd or learned, got {name!r}.")
    return known[name]()
