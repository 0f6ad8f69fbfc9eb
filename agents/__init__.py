"""Who decides: fixed policies, and those that Stable-Baselines3 learns. They know Gymnasium, not the engine."""

from agents.fixed import Policy, RandomPolicy, SchedulePolicy, fixed_policy

__all__ = ["Policy", "RandomPolicy", "SchedulePolicy", "fixed_policy"]
