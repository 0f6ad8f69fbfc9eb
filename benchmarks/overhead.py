"""What deciding costs: policy, environment and logging as a share of a round.

    python -m benchmarks.overhead --config mnist --teacher.checkpoint lenet5.safetensors --rounds 30
    python -m benchmarks.overhead --policy ssdkd                                    # digits

A whole run of `ssdkd.run`, with metrics.jsonl, TensorBoard and its pictures. From one decision to the next, all that is
not the engine's own work (invert, keep, replay, measure) nor the evaluation set is overhead. The first round is left
out, and so are checkpoints and the report at the end.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from agents import choose_policy
from ssdkd import run as command
from ssdkd.build import build_engine
from ssdkd.config import CheckpointConfig, RunConfig, parse_command_line, to_yaml
from ssdkd.errors import ConfigError, run_command
from ssdkd.tracking import Display, RunFolder
from ssdkd.tracking.folder import CONFIG


class Watched:
    """A policy that notes the time at every decision."""

    def __init__(self, policy: Any, engine: Any) -> None:
        self.policy, self.engine = policy, engine
        self.at: list[tuple[float, float]] = []  # seconds in all, and of them the engine's
        self.deciding = 0.0

    def predict(self, *given: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        self.at.append((begun, self.engine.seconds + self.engine.phase_seconds["evaluation"]))
        answer = self.policy.predict(*given, **named)
        self.deciding += time.perf_counter() - begun
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)


def measure(config: RunConfig) -> dict[str, float]:
    """Overhead of a run in percent of its rounds, and in milliseconds a round."""
    config.checkpoint = CheckpointConfig(rounds=0, minutes=0.0)
    engine = build_engine(config)
    policy = Watched(choose_policy(config.policy, config.seed, config.policy_file, config.adapt), engine)
    with tempfile.TemporaryDirectory() as out:
        folder = RunFolder.create(out, "overhead")
        folder.write_text(CONFIG, to_yaml(config))
        with folder.claimed():
            command.run(config, engine, folder, Display(quiet=True), policy=policy)
    if len(policy.at) < 3:
        raise ConfigError(f"rounds: {len(policy.at)} played tell nothing, for the first is left out; give more.")
    whole, own = np.diff(np.array(policy.at[1:]), axis=0).T
    return {
        "rounds": len(whole),
        "round_ms": 1000 * float(whole.mean()),
        "overhead_ms": 1000 * float((whole - own).mean()),
        "deciding_ms": 1000 * policy.deciding / len(policy.at),
        "overhead_percent": 100 * float((whole - own).sum() / whole.sum()),
    }


def run(argv: Sequence[str] | None = None) -> None:
    config, _ = parse_command_line(
        RunConfig,
        argv,
        prog="python -m benchmarks.overhead",
        description="What deciding costs.",
        default_config="digits",
        exclusive=("rounds", "minutes"),
    )
    print("  ".join(f"{name} {value:.2f}" for name, value in measure(config).items()))


if __name__ == "__main__":
    sys.exit(run_command(run, None))
