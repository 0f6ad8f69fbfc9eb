"""The mean of policies that several searches found: what they agree on stays, what chance gave each of them goes.

    python -m agents.train --config train-digits --seed 0 --teachers-root teachers/digits       # and seeds 1, 2
    python -m benchmarks.mean_policy runs/policy-A runs/policy-B runs/policy-C --out policy.safetensors
    python -m benchmarks.mean_policy policy.safetensors "{w_div: 1.2, effort: 1.5}" --out nearer.safetensors

All must be linear (`net_arch: []`) in the same entries and coefficients. Prints what the mean does: each coefficient at
the start and at the end of a run, all else as on average in training, and what its place in its range (-1 to 1) gains
with each entry. Works as well for what `train-ssdkd`, `train-constants` and `train-schedule` find.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from stable_baselines3.common.policies import ActorCriticPolicy

from agents.evaluate import schedule
from agents.learning import rows_of
from agents.policies import Description, LearnedPolicy, fresh_network, load_policy
from agents.train import POLICY
from envs.spaces import ENTRIES
from ssdkd.coefficients import RANGES, Coefficients
from ssdkd.errors import ConfigError, Parser, run_command
from ssdkd.files import expanded

Rules = dict[str, dict[str, float]]  # coefficient -> entry -> weight, "" for the bias; places in the range (-1 to 1)


def linear(policy: LearnedPolicy) -> tuple[np.ndarray, np.ndarray]:
    """Weights (coefficients, entries) and biases (coefficients,) on raw observations."""
    head = policy.network.action_net
    weights, biases = (p.detach().double().numpy() for p in (head.weight, head.bias))  # type: ignore[operator,union-attr]
    raw = weights / np.sqrt(policy.var + 1e-8)
    return raw, biases - raw @ policy.mean


def mean_of(policies: Sequence[LearnedPolicy]) -> LearnedPolicy:
    """A linear policy whose weights and biases on raw observations are the mean of theirs."""
    first = policies[0].description
    for each in (p.description for p in policies):
        if each.net_arch or (each.observations, each.actions) != (first.observations, first.actions):
            raise ConfigError("the policies must be linear, and read and set the same entries and coefficients.")
    found = [linear(policy) for policy in policies]
    weights, biases = (np.mean([parts[place] for parts in found], axis=0) for place in (0, 1))
    mean, var = (np.mean([getattr(p, name) for p in policies], axis=0) for name in ("mean", "var"))
    training = {"mean_of": [p.description.training for p in policies]}
    return with_weights(policies[0], replace(first, training=training), weights, biases, mean, var)


def with_weights(
    like: LearnedPolicy,
    described: Description,
    weights: np.ndarray,
    biases: np.ndarray,
    mean: np.ndarray,
    var: np.ndarray,
) -> LearnedPolicy:
    """A linear policy by its weights and biases on raw observations; `mean` and `var` are what it scales them by."""
    described = replace(described, net_arch=[])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for the critic, of which nothing is asked: the same file every time
        network = fresh_network(described)
    with torch.no_grad():
        head = network.action_net
        head.weight.copy_(torch.from_numpy(weights * np.sqrt(var + 1e-8)))  # type: ignore[union-attr,operator]
        head.bias.copy_(torch.from_numpy(biases + weights @ mean))  # type: ignore[union-attr,operator]
        spread = like.network.log_std  # of single actions, for --adapt
        alike = len(spread) == len(biases)  # type: ignore[arg-type]
        network.log_std.copy_(spread if alike else spread.mean())  # type: ignore[operator,arg-type,union-attr]
    return LearnedPolicy(network, described, mean, var)


def as_linear(coefficients: str, like: LearnedPolicy) -> LearnedPolicy:
    """Constants, or a schedule, as a policy that reads and sets what `like` does, and scales it alike."""
    fixed, described = schedule(coefficients), like.description
    rows = rows_of(described.actions)
    weights = np.zeros((len(rows), len(described.observations)))
    if "progress" in described.observations:
        weights[:, described.observations.index("progress")] = (fixed.end - fixed.start)[rows]
    elif (fixed.end != fixed.start).any():
        raise ConfigError(f"{coefficients[:80]!r} changes with progress, which the policies do not read.")
    described = replace(described, training={"coefficients": coefficients})
    return with_weights(like, described, weights, fixed.start[rows], like.mean, like.var)


def widened(policy: LearnedPolicy, also: dict[str, tuple[float, float]]) -> LearnedPolicy:
    """The same linear policy, which also reads these entries, as yet to no effect: name -> mean and deviation.

    An entry that it reads already is given this scale, by which a search that begins here moves its weights.
    """
    known = policy.description.observations
    names = [entry.name for entry in ENTRIES if entry.name in {*known, *also}]
    useless = sorted(set(also) - set(names))
    if useless:
        raise ConfigError(f"--also: {useless[0]} is no entry of the observation.")
    narrow, biases = linear(policy)
    weights = np.zeros((len(biases), len(names)))
    weights[:, [names.index(name) for name in known]] = narrow
    scales = dict(zip(known, zip(policy.mean, policy.var, strict=True), strict=True))
    scales |= {name: (mean, deviation**2) for name, (mean, deviation) in also.items()}
    mean, var = np.array([scales[name] for name in names]).T
    return with_weights(policy, replace(policy.description, observations=names), weights, biases, mean, var)


def by_hand(policy: LearnedPolicy, given: Rules, added: bool = False) -> LearnedPolicy:
    """The same linear policy, but it sets these coefficients as given, or by so much further.

    A coefficient that it has left alone is one that it sets from now on; an entry must be one that it reads.
    """
    option = "--add" if added else "--by-hand"
    weights, biases = linear(policy)
    entries, set_before = policy.description.observations, policy.description.actions
    names = [r.name for r in RANGES if r.name in {*set_before, *given}]
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ConfigError(f"{option}: {unknown[0]} is no coefficient.")
    unread = sorted({entry for terms in given.values() for entry in terms} - {"", *entries})
    if unread:
        raise ConfigError(f"{option}: {unread[0]} is no entry that the policy reads; --also has it read one.")
    neutral = dict(zip((r.name for r in RANGES), Coefficients().to_unit(), strict=True))
    all_weights, all_biases = np.zeros((len(names), len(entries))), np.array([neutral[name] for name in names])
    kept = [names.index(name) for name in set_before]
    all_weights[kept], all_biases[kept] = weights, biases
    for name, terms in given.items():
        row = names.index(name)
        if not added:
            all_weights[row], all_biases[row] = 0.0, 0.0
        all_weights[row] += [terms.get(entry, 0.0) for entry in entries]
        all_biases[row] += terms.get("", 0.0)
    before = policy.description
    described = replace(before, actions=names, training={**before.training, "added" if added else "by_hand": given})
    return with_weights(policy, described, all_weights, all_biases, policy.mean, policy.var)


def told(policy: LearnedPolicy) -> str:
    """The policy in words: a row for each coefficient."""
    weights, biases = linear(policy)
    names = policy.description.observations
    ranges = {r.name: r for r in RANGES}
    heads = ["coefficient", "at the start", "at the end", *(f"per {name}" for name in names)]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for name, slopes, bias in zip(policy.description.actions, weights, biases, strict=True):
        ends = []
        for progress in (0.0, 1.0):
            seen = np.where(np.array(names) == "progress", progress, policy.mean)
            ends.append(f"{ranges[name].from_unit(float(slopes @ seen + bias)):.3g}")
        lines.append("| " + " | ".join([name, *ends, *(f"{slope:+.2f}" for slope in slopes)]) + " |")
    return "\n".join(lines)


def expected(text: str) -> tuple[str, tuple[float, float]]:
    """NAME=MEAN,DEVIATION."""
    try:
        name, numbers = text.split("=")
        mean, deviation = (float(number) for number in numbers.split(","))
    except ValueError as error:
        raise ConfigError(f"--also: expected ENTRY=MEAN,DEVIATION, got {text!r}.") from error
    if not deviation > 0:
        raise ConfigError(f"--also: the deviation of {name} must be above 0.")
    return name, (mean, deviation)


def rule(text: str) -> tuple[str, dict[str, float]]:
    """COEFFICIENT=BIAS,ENTRY*WEIGHT,...: what a place in its range (-1 to 1) is, or how much further it goes."""
    try:
        name, terms = text.split("=")
        found: dict[str, float] = {}
        for term in terms.split(","):
            entry, _, weight = term.rpartition("*")
            found[entry] = float(weight)
    except ValueError as error:
        raise ConfigError(f"--by-hand, --add: expected COEFFICIENT=BIAS,ENTRY*WEIGHT,..., got {text!r}.") from error
    return name, found


def loaded(name: str) -> LearnedPolicy:
    """The policy of a training's folder, or of a file."""
    policy = load_policy(Path(name) / POLICY if os.path.isdir(name) else Path(name))
    if not isinstance(policy.network, ActorCriticPolicy):
        raise ConfigError(f"{name} is a policy of {policy.description.algorithm}; a mean is of evolution, PPO or A2C.")
    return policy


def run(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m benchmarks.mean_policy", description="The mean of linear policies.")
    parser.add_argument(
        "trainings",
        nargs="+",
        help="folders of agents.train, or policies' files; after the first also coefficients: '{alpha: 0.4, ...}'",
    )
    parser.add_argument(
        "--also",
        nargs="+",
        default=[],
        metavar="ENTRY=MEAN,DEVIATION",
        help="entries of the observation that it is to read as well, at weight 0, or to scale so: to search on from it "
        "with --begin",
    )
    parser.add_argument(
        "--by-hand",
        nargs="+",
        default=[],
        metavar="COEFFICIENT=BIAS,ENTRY*WEIGHT,...",
        help="set these coefficients so, whatever the policies did; places in the range, on raw observations",
    )
    parser.add_argument(
        "--add",
        nargs="+",
        default=[],
        metavar="COEFFICIENT=BIAS,ENTRY*WEIGHT,...",
        help="then move these coefficients by so much: from where they are, or from neutral",
    )
    parser.add_argument("--out", type=expanded, help=".safetensors; without, it is only told")
    given = parser.parse_args(argv)
    first = loaded(given.trainings[0])
    others = [as_linear(n, first) if n.lstrip().startswith("{") else loaded(n) for n in given.trainings[1:]]
    policy = mean_of([first, *others])
    if given.also:
        policy = widened(policy, dict(expected(text) for text in given.also))
    if given.by_hand:
        policy = by_hand(policy, dict(rule(text) for text in given.by_hand))
    if given.add:
        policy = by_hand(policy, dict(rule(text) for text in given.add), added=True)
    if given.out:
        policy.save(given.out)
    print(told(policy))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; a user's mistake is one sentence and exit code 2."""
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
