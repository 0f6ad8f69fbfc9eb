"""Who decides: fixed policies, and those that Stable-Baselines3 learns. They know Gymnasium, not the engine."""

from __future__ import annotations

import sys
from typing import Any

from ssdkd.errors import ConfigError
from ssdkd.importing import hidden

if another := hidden("envs"):
    if sys.argv[0] == "-m":  # python -m agents.train: a user's mistake is one sentence
        print(f"error: {another}", file=sys.stderr)
        sys.exit(ConfigError.exit_code)
    raise ImportError(another, name="envs")

from agents.fixed import Policy, RandomPolicy, SchedulePolicy, fixed_policy


def choose_policy(name: str, seed: int, file: str | None = None, adapt: bool = False) -> Any:
    """The policy that a run asks for: a fixed one by name, or a learned one from `file` (none: the one that ships).

    With `adapt` the learned one goes on learning; it has `learn`, and `reward` says from what.
    """
    if name != "learned":
        if file is not None or adapt:
            given = "policy_file" if file is not None else "adapt"
            raise ConfigError(f"{given} is for --policy learned; {name} does not learn: leave it out.")
        return fixed_policy(name, seed)
    from agents.policies import load_policy  # Stable-Baselines3 takes a second to import

    learned = load_policy(file)
    if not adapt:
        return learned
    from agents.adapt import AdaptivePolicy

    return AdaptivePolicy(learned, seed)


__all__ = ["Policy", "RandomPolicy", "SchedulePolicy", "choose_policy", "fixed_policy"]
