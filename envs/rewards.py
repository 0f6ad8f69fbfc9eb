"""What a round is worth: one small function for each way of telling.

`area`, `validation` and `outcome` telescope. Let L(p) be what is watched (the log of the probe's KL, the accuracy)
when the share p of the budget is spent; between two rounds it goes in a straight line, and after the last one it stays.
The area between the start and the curve, which is how early and how far L fell, is by parts

    int_0^1 (L(0) - L(p)) dp  =  int_0^1 (1 - p) (-L'(p)) dp  =  sum over rounds (L_before - L_after) (1 - p_mid)

with p_mid the middle of the round's stretch of the budget. So a round earns what it gained for the whole rest of
the budget, the undiscounted episode earns the area, and it does not matter into how many rounds the budget was
cut: two half rounds with the same curve earn as much as a whole one. `probe` is a rate instead; its sum over an
episode favours many cheap rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ssdkd.engine import Engine, Statistics
from ssdkd.errors import ConfigError
from ssdkd.importing import registered_or_imported

Reward = Callable[[Engine, Statistics, Statistics], float]
REWARDS: dict[str, Reward] = {}
OF_ACCURACY = ("validation", "outcome")  # those that need a real evaluation set


def register_reward(name: str) -> Callable[[Reward], Reward]:
    """Make a reward known under the name that the environment's `reward` argument uses."""

    def register(reward: Reward) -> Reward:
        REWARDS[name] = reward
        return reward

    return register


def reward_by(name: str) -> Reward:
    """The reward known under `name`, or what an import path such as `my_module:my_reward` leads to.

    Raises:
        ConfigError: there is none.
    """
    found: Reward = registered_or_imported("reward", name, REWARDS, "my_module:my_reward")
    if not callable(found):
        raise ConfigError(f"reward: {name} is a {type(found).__name__}, not a function of engine, before and after.")
    return found


def log_kl(statistics: Statistics) -> float:
    """Natural log of the KL on the probe, bounded so that neither perfection nor ruin is infinite."""
    kl = statistics["probe_kl"]
    return math.log(min(max(kl, 1e-8), 1e6)) if math.isfinite(kl) else math.log(1e6)


def budget_left(before: Statistics, after: Statistics) -> float:
    """Share of the budget that was left in the middle of the round."""
    return 1.0 - (before["progress"] + after["progress"]) / 2.0


@register_reward("probe")
def probe(engine: Engine, before: Statistics, after: Statistics) -> float:
    """log(KL before / KL after) on the probe, per unit of budget spent; the unit is a round of effort 1."""
    neutral = engine.round_cost(engine.config.distillation.steps)
    spent = max((after["spent"] - before["spent"]) / neutral, 1e-3)
    return (log_kl(before) - log_kl(after)) / spent


@register_reward("area")
def area(engine: Engine, before: Statistics, after: Statistics) -> float:
    """log(KL before / KL after) on the probe, for all the budget that was left: the episode earns the area."""
    return (log_kl(before) - log_kl(after)) * budget_left(before, after)


@register_reward("validation")
def validation(engine: Engine, before: Statistics, after: Statistics) -> float:
    """The same for the accuracy (as a share) on a real evaluation set, for tasks where one is allowed.

    The episode earns the mean accuracy over the budget, less the untrained student's.
    """
    return _risen(before, after) * budget_left(before, after)


@register_reward("outcome")
def outcome(engine: Engine, before: Statistics, after: Statistics) -> float:
    """How the accuracy rises and where it ends, half each.

    The episode earns the mean of its accuracy over the budget and its last accuracy, less the untrained student's. The
    area alone favours what is quick, even where it ends lower.
    """
    return _risen(before, after) * (budget_left(before, after) + 1.0) / 2.0


def _risen(before: Statistics, after: Statistics) -> float:
    """By how much the accuracy rose, as a share."""
    return (after["accuracy"] - before["accuracy"]) / 100.0
