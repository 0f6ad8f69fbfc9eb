"""What a round is worth: one small function for each way of telling."""

from __future__ import annotations

import math
from collections.abc import Callable

from ssdkd.engine import Engine, Statistics

Reward = Callable[[Engine, Statistics, Statistics], float]
REWARDS: dict[str, Reward] = {}


def register_reward(name: str) -> Callable[[Reward], Reward]:
    """Make a reward known under the name that the environment's `reward` argument uses."""

    def register(reward: Reward) -> Reward:
        REWARDS[name] = reward
        return reward

    return register


def _neutral_rounds(engine: Engine, before: Statistics, after: Statistics) -> float:
    """What the round spent, in rounds of effort 1."""
    neutral = engine.round_cost(engine.config.distillation.steps)
    return max((after["spent"] - before["spent"]) / neutral, 1e-3)


@register_reward("probe")
def probe(engine: Engine, before: Statistics, after: Statistics) -> float:
    """log(KL before / KL after) on the probe, per unit of budget spent."""
    fell = math.log(max(before["probe_kl"], 1e-8)) - math.log(max(after["probe_kl"], 1e-8))
    return fell / _neutral_rounds(engine, before, after)


@register_reward("validation")
def validation(engine: Engine, before: Statistics, after: Statistics) -> float:
    """Rise of the accuracy on a real evaluation set, per unit of budget: for training policies where one is allowed."""
    if "accuracy" not in before or "accuracy" not in after:
        raise ValueError("reward 'validation' needs an evaluation set in the environment's task")
    return (after["accuracy"] - before["accuracy"]) / 10.0 / _neutral_rounds(engine, before, after)
