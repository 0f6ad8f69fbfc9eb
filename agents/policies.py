"""Learned policies as files: weights and plain data in one safetensors file, read without running anything in it.

The header holds, as JSON under `ssdkd.policy`, what a policy is made of:

| field | meaning |
| --- | --- |
| format | "1" |
| algorithm | ppo, a2c, sac, td3 or an import path: of evolution, stable_baselines3, sb3_contrib, else only if trusted |
| net_arch | hidden layers: a list, or lists under "pi" (actor) and "vf" or "qf" (critic) |
| activation | tanh, relu, elu, silu |
| observations | names of the entries of `envs.spaces.ENTRIES` that it reads, in its order |
| actions | names of the coefficients that it sets, in its order; the others stay neutral |
| reward | what it was trained on; on-line learning goes on with it, or with `area` for accuracy and import paths |
| reward_scale | what that reward was divided by |
| arguments | keyword arguments of the algorithm |
| training | how it came about, free text and numbers |

The tensors are Stable-Baselines3's policy under `policy.` and, where observations were normalised, their
`normalise.mean` and `normalise.var`, one number for each name in `observations`. Because entries are stored by
name, a policy survives new entries in the table; it is refused where one that it reads is gone.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import math
import os
import re
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from stable_baselines3 import DDPG
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from torch import Tensor, nn

from agents.learning import ACTIVATIONS, ALGORITHMS, algorithm_class, columns_of, rows_of, seen_space, set_space, spread
from envs.rewards import REWARDS
from envs.spaces import ENTRIES
from ssdkd.coefficients import RANGES
from ssdkd.errors import CheckpointError, first_line, in_short
from ssdkd.files import expanded, read_safetensors, write_safetensors
from ssdkd.models import fingerprint

EVOLUTION = "agents.evolution:Evolution"  # its critic has learned nothing
DEFAULT = Path(__file__).parent / "policies" / "default.safetensors"
CLIP = 10.0  # bound on normalised observations, as in VecNormalize
MOST_LAYERS, WIDEST = 6, 1024
_FORMAT = "1"
# what is imported whoever wrote the file
_IMPORTED = re.compile(rf"{re.escape(EVOLUTION)}|(stable_baselines3|sb3_contrib):[A-Za-z0-9]+")


@dataclass
class Description:
    """What a policy is made of, as the head of this module tells."""

    algorithm: str
    net_arch: list[int] | dict[str, list[int]]
    activation: str
    observations: list[str] = field(default_factory=lambda: [entry.name for entry in ENTRIES])
    actions: list[str] = field(default_factory=lambda: [r.name for r in RANGES])
    reward: str = "area"
    reward_scale: float = 1.0
    arguments: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


class LearnedPolicy:
    """A policy with the `predict` of Stable-Baselines3 over the environment's whole observation and action."""

    def __init__(
        self,
        network: BasePolicy,
        description: Description,
        mean: np.ndarray | None = None,
        var: np.ndarray | None = None,
    ) -> None:
        self.network = network
        self.description = description
        self.columns, self.rows = columns_of(description.observations), rows_of(description.actions)
        self.mean = np.zeros(len(self.columns)) if mean is None else mean
        self.var = np.ones(len(self.columns)) if var is None else var
        self.network.set_training_mode(False)

    def seen(self, observation: Any) -> np.ndarray:
        """What the network gets of observations (..., entries): its own entries, normalised."""
        own = np.asarray(observation, dtype=np.float64)[..., self.columns]
        scaled = (own - self.mean) / np.sqrt(self.var + 1e-8)
        return np.clip(scaled, -CLIP, CLIP).astype(np.float32)

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """Observations (..., entries) -> actions (..., coefficients) in [-1, 1]."""
        with torch.autocast("cpu", enabled=False):  # the caller's is not the policy's, and NumPy knows no bfloat16
            action, _ = self.network.predict(self.seen(observation), deterministic=deterministic)
        return spread(action, self.rows), state

    def value(self, observation: Any) -> np.ndarray | None:
        """The return that the critic expects from observations (..., entries): (...), None where there is no critic."""
        inputs = torch.as_tensor(self.seen(observation))
        flat = inputs.reshape(-1, inputs.shape[-1])
        network: Any = self.network
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            if isinstance(network, ActorCriticPolicy):
                worth = network.predict_values(flat)[:, 0]
            elif hasattr(network, "critic") and hasattr(network.critic, "q_networks"):
                action = network._predict(flat, deterministic=True)
                told = network.critic(flat, action)  # of each critic one number, or (TQC) the quantiles of one
                worth = (torch.cat(told, dim=1) if isinstance(told, tuple) else told.mean(dim=2)).min(dim=1).values
            else:
                return None
        values: np.ndarray = worth.reshape(inputs.shape[:-1]).numpy() * self.description.reward_scale
        return values

    def diagnostics(self, observation: Any) -> dict[str, float]:
        """What it makes of one observation (entries,): the value that it expects, the spread of its actions."""
        told: dict[str, float] = {}
        value = None if self.description.algorithm == EVOLUTION else self.value(observation)
        if value is not None:
            told["value"] = float(value)
        network: Any = self.network
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            if isinstance(network, ActorCriticPolicy) and hasattr(network, "log_std"):
                told["spread"] = float(network.log_std.exp().mean())
            elif hasattr(getattr(network, "actor", None), "get_action_dist_params"):
                inputs = torch.as_tensor(self.seen(observation))[None]
                told["spread"] = float(network.actor.get_action_dist_params(inputs)[1].exp().mean())
        return told

    def fingerprint(self) -> str:
        """A digest of all that decides what the policy does."""
        digest = hashlib.sha256(json.dumps(asdict(self.description), sort_keys=True).encode())
        for part in (self.mean, self.var):
            digest.update(np.ascontiguousarray(part, dtype=np.float64).tobytes())
        digest.update(fingerprint(self.network.state_dict()).encode())
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        require_same(state.get("fingerprint"), self.fingerprint())

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of it, beside the description."""
        tensors: dict[str, Tensor] = {
            f"policy.{name}": value for name, value in self.network.state_dict().items() if "_target." not in name
        }
        tensors["normalise.mean"] = torch.as_tensor(self.mean, dtype=torch.float64)
        tensors["normalise.var"] = torch.as_tensor(self.var, dtype=torch.float64)
        return tensors

    def _text(self) -> str:
        return json.dumps({"format": _FORMAT, **asdict(self.description)}, allow_nan=False)

    def require_readable(self) -> None:
        """Refuse a network that is not the one which its description builds: its file could never be read."""
        try:
            _assembled(self.tensors(), _description_in(self._text(), trust=True))
        except Exception as error:  # whatever the algorithm's policy makes of the description
            raise CheckpointError(
                f"a policy of {self.description.algorithm} with these arguments could not be read from its file "
                f"({first_line(error)}); take another algorithm or other arguments."
            ) from error

    def save(self, path: str | Path) -> None:
        """Write the policy as one file, whole or not at all."""
        path = Path(path)
        if path.suffix != ".safetensors":
            raise CheckpointError(f"a policy cannot be saved as {path}: let the name end in .safetensors.")
        self.require_readable()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(path, self.tensors(), {"ssdkd.policy": self._text()}, seal=True)
        except OSError as error:
            raise CheckpointError(f"policy {path} cannot be saved: {error.strerror or error}.") from error


def require_same(began_as: object, fingerprint: str) -> None:
    """Refuse to go on with another policy than the one of the checkpoint, by their fingerprints."""
    if began_as != fingerprint:
        raise CheckpointError(
            "the policy file is not the one that the run began with: put that one back, or start a new run."
        )


def load_policy(path: str | Path | None = None, *, trust: bool = False) -> LearnedPolicy:
    """Read a policy; without a path, the one that ships.

    Args:
        path: a file that `LearnedPolicy.save` wrote; with `trust`, also a `.zip` of Stable-Baselines3.
        trust: whether the file may run code: a `.zip` is unpickled, an algorithm's import path is imported.

    Raises:
        CheckpointError: the file is missing, damaged, does not fit today's tables, or needs trust.
    """
    if path is None and not DEFAULT.is_file():
        raise CheckpointError(
            "no learned policy ships with this version: give one (--policy-file FILE, see python -m agents.train), "
            "or take --policy ssdkd."
        )
    path = DEFAULT if path is None else expanded(path)
    if not os.path.isfile(path):  # nor a text too long to name one, at which `is_file` fails
        raise CheckpointError(f"policy {path} does not exist or is not a file: check the path.")
    if path.suffix == ".zip" or zipfile.is_zipfile(path):
        return _load_zip(path, trust)
    tensors, metadata = read_safetensors(path, "policy", sealed=True)
    if "ssdkd.policy" not in metadata:
        raise CheckpointError(f"policy {path} holds no description of a policy: is it the weights of a model?")
    try:
        return _assembled(tensors, _description_in(metadata["ssdkd.policy"], trust))
    except Exception as error:  # whatever the algorithm's policy makes of the description
        raise CheckpointError(f"policy {path} cannot be used: {in_short(error)}.") from error


def _refuse(what: str) -> NoReturn:
    raise ValueError(what)


def fault_in(layers: Any) -> str | None:
    """Why a policy cannot have these hidden layers; None where it can."""
    if not isinstance(layers, list) or len(layers) > MOST_LAYERS:
        return f"is not a list of at most {MOST_LAYERS} layers"
    if not all(type(width) is int and 1 <= width <= WIDEST for width in layers):
        return f"has a layer that is not of 1 to {WIDEST} units"
    return None


def _description_in(text: str, trust: bool) -> Description:
    values = json.loads(text)
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        shown = str(values.get("format") if isinstance(values, dict) else None)[:20]
        _refuse(f"it is of format {shown!r}, this ssdkd reads {_FORMAT!r}")
    del values["format"]
    names = set(Description.__dataclass_fields__)
    if set(values) != names:
        _refuse(f"its description lacks or adds {sorted(set(values) ^ names)[0][:40]!r}")
    described = Description(**values)
    if not isinstance(described.algorithm, str) or described.activation not in list(ACTIVATIONS):
        _refuse("its algorithm or activation is unknown")
    if described.algorithm not in ALGORITHMS and not _IMPORTED.fullmatch(described.algorithm) and not trust:
        _refuse(
            f"its algorithm {described.algorithm[:60]!r} would have to be imported, which runs code; if you trust "
            "the file, read it with agents.policies.load_policy(path, trust=True)"
        )
    arch = described.net_arch
    for layers in arch.values() if isinstance(arch, dict) else [arch]:
        fault = fault_in(layers)
        if fault is not None:
            _refuse(f"its net_arch {fault}")
    if isinstance(arch, dict) and set(arch) not in ({"pi", "vf"}, {"pi", "qf"}):
        _refuse("its net_arch names neither pi and vf nor pi and qf")
    for listed in (described.observations, described.actions):
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            _refuse("its observations and actions are not lists of names")
    columns_of(described.observations)
    rows_of(described.actions)
    scale = described.reward_scale
    if type(scale) not in (int, float) or not math.isfinite(scale) or scale <= 0:
        _refuse("its reward_scale is not a number above 0")
    reward = described.reward  # an import path is never followed
    if not isinstance(reward, str) or (reward not in REWARDS and ":" not in reward):
        _refuse(f"its reward is none of {', '.join(REWARDS)}")
    if not isinstance(described.arguments, dict) or not isinstance(described.training, dict):
        _refuse("its arguments or training are not tables")
    return described


def _assembled(tensors: dict[str, Tensor], described: Description) -> LearnedPolicy:
    """The network that the description tells, with the weights of the file if they are exactly its own."""
    inputs = len(described.observations)
    arch = described.net_arch
    layers = max((arch.values() if isinstance(arch, dict) else [arch]), key=sum)
    widths = [inputs, *layers]
    if 4 * sum(a * b for a, b in itertools.pairwise(widths)) > sum(t.nbytes for t in tensors.values()):
        _refuse("its net_arch claims more weights than the file holds")
    statistics = []
    for name in ("normalise.mean", "normalise.var"):
        value = tensors.pop(name, None)
        if value is None or value.shape != (inputs,) or not value.is_floating_point() or not value.isfinite().all():
            _refuse(f"its {name} is not one finite number for each observation")
        statistics.append(value.double().numpy())
    if (statistics[1] < 0).any():
        _refuse("its normalise.var is negative")
    network = fresh_network(described)
    expected = network.state_dict()
    found: dict[str, Tensor] = {}
    for name, value in expected.items():
        stored = tensors.pop(f"policy.{name}", None)
        if stored is None and "_target." in name:
            stored = found.get(name.replace("_target.", "."))
        if stored is None:
            _refuse(f"it lacks the weights {name}")
        if stored.shape != value.shape or stored.dtype != value.dtype:
            _refuse(f"its weights {name} are {tuple(stored.shape)} where {tuple(value.shape)} were expected")
        if not stored.isfinite().all():
            _refuse(f"its weights {name} hold NaN or infinity")
        found[name] = stored
    if tensors:
        _refuse(f"it holds {next(iter(tensors))[:60]!r}, which belongs nowhere")
    network.load_state_dict(found)
    return LearnedPolicy(network, described, *statistics)


def fresh_network(described: Description) -> BasePolicy:
    """The network that a description tells, with weights drawn by chance."""
    cls = algorithm_class(described.algorithm)
    arguments: dict[str, Any] = {
        "net_arch": described.net_arch,
        "activation_fn": ACTIVATIONS[described.activation],
    }
    policy_class = cls.policy_aliases["MlpPolicy"]
    if described.arguments.get("use_sde") and "use_sde" in inspect.signature(policy_class).parameters:
        arguments["use_sde"] = True
    if issubclass(cls, DDPG):
        arguments["n_critics"] = 1  # in which it differs from TD3, whose policy it has
    with torch.random.fork_rng(devices=[]):  # the first weights are drawn and then replaced
        policy: BasePolicy = policy_class(
            seen_space(described.observations), set_space(described.actions), lambda _: 0.0, **arguments
        )
    return policy


def policy_of(
    model: BaseAlgorithm, description: Description, mean: np.ndarray | None = None, var: np.ndarray | None = None
) -> LearnedPolicy:
    """What an algorithm has learned so far, as a policy that shares its network."""
    network: nn.Module = model.policy
    assert isinstance(network, BasePolicy)
    return LearnedPolicy(network, description, mean, var)


# ----------------------------------------------------------------------------------------------------
# Files of others
# ----------------------------------------------------------------------------------------------------

_MARKS = {"ppo": "clip_range", "td3": "policy_delay", "sac": "target_entropy", "a2c": "n_steps"}


def _load_zip(path: Path, trust: bool) -> LearnedPolicy:
    if not trust:
        raise CheckpointError(
            f"policy {path} was refused and nothing in it was run: a .zip of Stable-Baselines3 is unpickled, which "
            "runs code; if you trust where it comes from, evaluate it with --trust, or save it anew: "
            "agents.policies.load_policy(path, trust=True).save('policy.safetensors')."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            data = json.loads(archive.read("data"))
        name = next((name for name, mark in _MARKS.items() if mark in data), None)
        if name is None:
            _refuse("it is of another algorithm")
        model = ALGORITHMS[name].load(path, device="cpu")
        kind = ALGORITHMS[name].policy_aliases["MlpPolicy"]
        if type(model.policy) is not kind:
            _refuse(f"its network is a {type(model.policy).__name__}, theirs a {kind.__name__}")
    except Exception as error:  # whatever the code in the file does
        told = f"policy {path} is not a readable .zip of {', '.join(_MARKS)}"
        raise CheckpointError(f"{told}: {in_short(error)}.") from error
    seen, acts = model.observation_space.shape, model.action_space.shape
    if seen != (len(ENTRIES),) or acts != (len(RANGES),):
        raise CheckpointError(
            f"policy {path} reads {seen} and sets {acts}, today's tables have ({len(ENTRIES)},) and ({len(RANGES)},): "
            "train it again."
        )
    network: Any = model.policy
    activation = next((name for name, kind in ACTIVATIONS.items() if kind is network.activation_fn), None)
    if activation is None:
        raise CheckpointError(f"policy {path} uses an activation other than {', '.join(ACTIVATIONS)}: train it again.")
    arguments = {"use_sde": True} if model.use_sde else {}  # by which its weights are others
    if name == "td3" and model.policy_kwargs.get("n_critics") == 1:
        name = "stable_baselines3:DDPG"
    described = Description(name, network.net_arch, activation, arguments=arguments, training={"from": path.name})
    return policy_of(model, described)
