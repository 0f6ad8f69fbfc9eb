"""Gymnasium environments over the engine; importing this package registers them."""

from __future__ import annotations

import gymnasium

from envs.sample_selection import SampleSelectionEnv

ENV_ID = "ssdkd/SampleSelection-v0"


def register_envs() -> None:
    """Make `gymnasium.make("ssdkd/SampleSelection-v0")` work; done once, on import."""
    if ENV_ID not in gymnasium.registry:
        gymnasium.register(ENV_ID, entry_point="envs.sample_selection:SampleSelectionEnv")


register_envs()

__all__ = ["ENV_ID", "SampleSelectionEnv", "register_envs"]
