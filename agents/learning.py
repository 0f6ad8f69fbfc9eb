"""Stable-Baselines3 algorithms by name, and everything that determines how one goes on learning, as plain data."""

from __future__ import annotations

import contextlib
import inspect
import json
import pickle
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.save_util import recursive_getattr
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch import nn

from envs.spaces import ENTRIES
from ssdkd.coefficients import RANGES
from ssdkd.errors import ConfigError, SsdkdError, first_line
from ssdkd.importing import registered_or_imported

ALGORITHMS: dict[str, type[BaseAlgorithm]] = {"ppo": PPO, "a2c": A2C, "sac": SAC, "td3": TD3}
ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}


def algorithm_class(name: str) -> type[BaseAlgorithm]:
    """The class behind ppo, a2c, sac, td3 or an import path such as `sb3_contrib:TQC`."""
    found = registered_or_imported("algorithm", name, ALGORITHMS, "sb3_contrib:TQC")
    if not (isinstance(found, type) and issubclass(found, BaseAlgorithm)):
        raise ConfigError(f"algorithm: {name} is not a Stable-Baselines3 algorithm.")
    return found


def seen_space(names: list[str]) -> spaces.Box:
    """The space of normalised observations with these entries."""
    return spaces.Box(-np.inf, np.inf, (len(names),), dtype=np.float32)


def set_space(names: list[str]) -> spaces.Box:
    """The space of actions that set these coefficients."""
    return spaces.Box(-1.0, 1.0, (len(names),), dtype=np.float32)


class Selected(gymnasium.Wrapper[np.ndarray, np.ndarray, np.ndarray, np.ndarray]):
    """The environment with some entries of the observation and the action only; the other coefficients are neutral."""

    def __init__(self, env: gymnasium.Env[Any, Any], observations: list[str], actions: list[str]) -> None:
        super().__init__(env)
        self.columns, self.rows, self.actions = columns_of(observations), rows_of(actions), actions
        full = env.observation_space
        assert isinstance(full, spaces.Box)
        self.observation_space = spaces.Box(full.low[self.columns], full.high[self.columns], dtype=np.float32)
        self.action_space = set_space(actions)

    def reset(self, **arguments: Any) -> tuple[np.ndarray, dict[str, Any]]:
        observation, info = self.env.reset(**arguments)
        return observation[self.columns], info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(spread(action, self.rows))
        return observation[self.columns], reward, terminated, truncated, info


class Pausable(Monitor):
    """A monitored environment whose episode can be put away, and taken up by another process.

    Both go by bytes: between processes, PyTorch would send the tensors themselves, to be shared. Set `at_rest` where
    nobody wants to know of the episode: until the next reset, a step plays nothing.
    """

    at_rest = False

    def reset(self, **arguments: Any) -> tuple[Any, dict[str, Any]]:
        self.at_rest = False
        return super().reset(**arguments)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        if self.at_rest:
            return np.zeros(self.observation_space.shape, np.float32), 0.0, False, False, {}  # type: ignore[arg-type]
        return super().step(action)

    def pause(self) -> bytes:
        """The episode that is being played; it goes on undisturbed."""
        env: Any = self.unwrapped
        return pickle.dumps({"env": env.episode_state(), "rewards": [float(reward) for reward in self.rewards]})

    def take_up(self, paused: bytes) -> None:
        """Go on with an episode that `pause` gave, in this or an earlier process of one's own."""
        state, env = pickle.loads(paused), self.unwrapped
        env.restore_episode(state["env"])  # type: ignore[attr-defined]
        self.rewards, self.needs_reset = state["rewards"], False


def columns_of(names: list[str]) -> list[int]:
    """Where entries of these names stand in the observation."""
    return _places(names, [entry.name for entry in ENTRIES], "observation")


def rows_of(names: list[str]) -> list[int]:
    """Where coefficients of these names stand in the action."""
    return _places(names, [entry.name for entry in RANGES], "coefficient")


def _places(names: list[str], table: list[str], what: str) -> list[int]:
    missing = [name for name in names if name not in table]
    if missing:
        raise ConfigError(f"there is no {what} {missing[0]!r} (any more); there are {', '.join(table)}.")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"the {what} {twice!r} is named twice; name each once.")
    if not names:
        raise ConfigError(f"there must be at least one {what}.")
    return [table.index(name) for name in names]


NEUTRAL = np.array([r.to_unit(r.neutral) for r in RANGES], dtype=np.float32)


def spread(action: np.ndarray, rows: list[int]) -> np.ndarray:
    """Put (..., len(rows)) into the whole action (..., coefficients), neutral elsewhere."""
    action = np.asarray(action, dtype=np.float32)
    whole: np.ndarray = np.broadcast_to(NEUTRAL, (*action.shape[:-1], len(NEUTRAL))).copy()
    whole[..., rows] = action
    return whole


class Spaces(gymnasium.Env[np.ndarray, np.ndarray]):
    """An environment that is nothing but its spaces: what an algorithm is built on when someone else steps."""

    def __init__(self, observations: list[str], actions: list[str]) -> None:
        self.observation_space, self.action_space, self.actions = seen_space(observations), set_space(actions), actions


def build_learner(
    name: str, env: Any, net_arch: Any, activation: str, arguments: dict[str, Any], seed: int
) -> BaseAlgorithm:
    """A fresh algorithm on `env`; networks this small run fastest on the CPU."""
    try:
        return algorithm_class(name)(
            "MlpPolicy",
            env,
            policy_kwargs={"net_arch": net_arch, "activation_fn": ACTIVATIONS[activation]},
            seed=seed,
            device="cpu",
            **checked(name, arguments),
        )
    except (SsdkdError, EOFError, ConnectionError):  # the latter two of an environment's process
        raise
    except Exception as error:  # whatever the algorithm makes of its arguments
        raise ConfigError(f"{name} cannot be built with the arguments given: {first_line(error)}.") from error


def checked(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the algorithm `name`, numbers as numbers.

    Raises:
        ConfigError: one is none where the algorithm has a number, or is infinite, which else shows in the middle of a
            training.
    """
    classes = reversed(algorithm_class(name).__mro__)
    usual = {key: p.default for c in classes for key, p in inspect.signature(c.__init__).parameters.items()}  # type: ignore[misc]
    found = {key: _number(value) for key, value in arguments.items()}
    for key, value in found.items():
        if type(usual.get(key)) in (int, float) and not isinstance(value, (int, float)):
            raise ConfigError(f"arguments: {name} takes a number for {key}, got {str(value)[:60]!r}.")
        try:
            json.dumps(value, allow_nan=False)
        except ValueError as error:
            raise ConfigError(
                f"arguments: {key} holds a number that is not finite, which a policy's file cannot: {str(value)[:60]}; "
                "give a finite one."
            ) from error
    return found


def _number(value: Any) -> Any:
    """YAML takes 3e-4 for text; an algorithm means the number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


# ----------------------------------------------------------------------------------------------------
# What determines how learning goes on
# ----------------------------------------------------------------------------------------------------


def learner_state(model: BaseAlgorithm) -> dict[str, Any]:
    """Weights, optimisers, experience and counters, as tensors, arrays and plain values."""
    variables = model._get_torch_save_params()[1]
    return {
        "parameters": model.get_parameters(),
        "variables": {name: recursive_getattr(model, name).detach() for name in variables},
        "experience": _buffer_state(model),
        "timesteps": model.num_timesteps,
        "updates": int(getattr(model, "_n_updates", 0)),
        "remaining": float(model._current_progress_remaining),
        "actions": model.action_space.np_random.bit_generator.state,
    }


def restore_learner(model: BaseAlgorithm, state: dict[str, Any]) -> None:
    """Put back what `learner_state` took, into an algorithm that was built alike."""
    model.set_parameters(state["parameters"], exact_match=True, device="cpu")
    for name, value in state["variables"].items():
        recursive_getattr(model, name).data.copy_(value)
    _restore_buffer(_experience(model), state["experience"])
    model.num_timesteps = state["timesteps"]
    model._n_updates = state["updates"]  # type: ignore[attr-defined]
    model._current_progress_remaining = state["remaining"]
    model.action_space.np_random.bit_generator.state = state["actions"]


def episodes_state(model: BaseAlgorithm, vector: VecEnv) -> dict[str, Any]:
    """The episodes that are being played in `vector`, and where the algorithm stands in them, as plain data."""
    last = {name: getattr(model, name) for name in _LAST}
    returns = vector.returns if isinstance(vector, VecNormalize) else None
    return {"last": last, "returns": returns, "each": [pickle.loads(paused) for paused in vector.env_method("pause")]}


def restore_episodes(model: BaseAlgorithm, vector: VecEnv, state: dict[str, Any]) -> None:
    """Put back what `episodes_state` took, into environments that were made alike."""
    for index, episode in enumerate(state["each"]):
        vector.env_method("take_up", pickle.dumps(episode), indices=index)
    for name, value in state["last"].items():
        setattr(model, name, value)
    if isinstance(vector, VecNormalize):
        vector.returns = state["returns"]


_LAST = ("_last_obs", "_last_original_obs", "_last_episode_starts")


def _experience(model: BaseAlgorithm) -> Any:
    return model.rollout_buffer if isinstance(model, OnPolicyAlgorithm) else getattr(model, "replay_buffer", None)


def _buffer_state(model: BaseAlgorithm) -> dict[str, Any]:
    buffer = _experience(model)
    used_up = isinstance(model, OnPolicyAlgorithm) and buffer.full  # learned from; the next rollout begins anew
    size = 0 if used_up else buffer.size()
    if not size:
        return {"size": 0, "pos": 0, "full": False, "arrays": {}}
    arrays = {
        name: value[:size] for name, value in vars(buffer).items() if isinstance(value, np.ndarray) and value.ndim > 1
    }
    return {"size": size, "pos": buffer.pos, "full": buffer.full, "arrays": arrays}


def _restore_buffer(buffer: Any, state: dict[str, Any]) -> None:
    buffer.reset()
    for name, held in state["arrays"].items():
        getattr(buffer, name)[: state["size"]] = held
    buffer.pos, buffer.full = state["pos"], state["full"]


class Randomness:
    """The global generators of PyTorch and NumPy, which Stable-Baselines3 draws from, as one learner's own.

    Inside `with randomness.in_force():` they continue the learner's sequence; outside they are as if it did not exist.
    """

    def __init__(self, seed: int) -> None:
        self.torch = torch.Generator().manual_seed(seed).get_state()
        self.numpy: dict[str, Any] = np.random.RandomState(seed % 2**32).get_state(legacy=False)

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        outside = torch.get_rng_state(), np.random.get_state(legacy=False)  # noqa: NPY002
        torch.set_rng_state(self.torch)
        np.random.set_state(self.numpy)  # noqa: NPY002
        try:
            yield
        finally:
            self.torch = torch.get_rng_state()
            self.numpy = np.random.get_state(legacy=False)  # type: ignore[assignment]  # noqa: NPY002
            torch.set_rng_state(outside[0])
            np.random.set_state(outside[1])  # noqa: NPY002

    def state_dict(self) -> dict[str, Any]:
        return {"torch": self.torch, "numpy": self.numpy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.torch, self.numpy = state["torch"], state["numpy"]
