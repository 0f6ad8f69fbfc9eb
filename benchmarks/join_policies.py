"""Put the policy that ships together: the best schedule, and on top of it what another policy learned to see.

    python -m agents.train --config train-schedule --teachers-root teachers/digits
    python -m agents.train --config train-digits --teachers-root teachers/digits
    python -m benchmarks.join_policies --schedule runs/policy-A --context runs/policy-B --out policy.safetensors

Both are linear (`net_arch: []`). The schedule says how the coefficients go with progress. Of the other policy, the
weights of every entry but progress are added for the coefficients in `--coefficients`, times `--share`: a search among
few tasks takes some chance for worth, and less of it travels better.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from agents.policies import Description, LearnedPolicy, _network, load_policy
from agents.train import POLICY


def linear(policy: LearnedPolicy) -> tuple[np.ndarray, np.ndarray]:
    """Weights (coefficients, entries) and biases (coefficients,) on raw observations."""
    head = policy.network.action_net
    weights, biases = (p.detach().double().numpy() for p in (head.weight, head.bias))  # type: ignore[operator,union-attr]
    raw = weights / np.sqrt(policy.var + 1e-8)
    return raw, biases - raw @ policy.mean


def join(schedule: LearnedPolicy, context: LearnedPolicy, coefficients: list[str], share: float) -> LearnedPolicy:
    """A linear policy that acts as `schedule`, plus `share` of what `context` does about all but progress."""
    of_schedule, of_context = schedule.description, context.description
    if of_schedule.observations != ["progress"] or of_context.observations[0] != "progress":
        raise SystemExit("the schedule must read progress alone, the other policy progress first")
    (slopes, biases), (seen, _) = linear(schedule), linear(context)
    weights = np.zeros((len(biases), len(of_context.observations)))
    weights[:, 0] = slopes[:, 0]
    for name in coefficients:
        row = of_schedule.actions.index(name)
        weights[row, 1:] = share * seen[of_context.actions.index(name), 1:]
        biases[row] -= weights[row, 1:] @ context.mean[1:]  # on average over the family it is the schedule
    described = Description(
        algorithm=of_context.algorithm,
        net_arch=[],
        activation=of_context.activation,
        observations=of_context.observations,
        actions=of_schedule.actions,
        reward=of_context.reward,
        reward_scale=of_context.reward_scale,
        arguments={**of_context.arguments, "acts": of_schedule.actions},
        training={
            "joined": {"coefficients": coefficients, "share": share},
            "schedule": of_schedule.training,
            "context": of_context.training,
        },
    )
    network = _network(described, len(described.actions))
    scale = np.sqrt(context.var + 1e-8)
    with torch.no_grad():
        head = network.action_net
        head.weight.copy_(torch.from_numpy(weights * scale))  # type: ignore[union-attr,operator]
        head.bias.copy_(torch.from_numpy(biases + weights @ context.mean))  # type: ignore[union-attr,operator]
        network.log_std.copy_(torch.full_like(network.log_std, float(context.network.log_std.mean())))  # type: ignore
    return LearnedPolicy(network, described, context.mean, context.var)


def main() -> None:
    parser = argparse.ArgumentParser(description="Join a schedule and what another policy learned to see.")
    parser.add_argument("--schedule", required=True, help="folder of a training of train-schedule.yaml")
    parser.add_argument("--context", required=True, help="folder of a training of train-digits.yaml")
    parser.add_argument("--coefficients", nargs="+", default=["effort"], help="whose context counts (%(default)s)")
    parser.add_argument("--share", type=float, default=0.5, help="of it (%(default)s)")
    parser.add_argument("--out", required=True, help=".safetensors")
    given = parser.parse_args()
    schedule, context = (load_policy(Path(folder) / POLICY) for folder in (given.schedule, given.context))
    join(schedule, context, given.coefficients, given.share).save(given.out)


if __name__ == "__main__":
    main()
