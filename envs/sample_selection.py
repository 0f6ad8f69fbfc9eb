"""`ssdkd/SampleSelection-v0`: one episode is one distillation, one step is one round."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import asdict
from typing import Any

import gymnasium
import numpy as np

from envs.rewards import REWARDS
from envs.spaces import Memory, action_space, observation_space, observe
from ssdkd.build import build_engine
from ssdkd.coefficients import Coefficients
from ssdkd.config import RunConfig, build, read_yaml
from ssdkd.engine import Engine, Statistics
from ssdkd.errors import ConfigError


class SampleSelectionEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """Steer a data-free distillation, round by round.

    ## Description
    A student learns from a teacher on synthetic images that are made out of the teacher alone. Each step, the
    agent sets the coefficients of the round: how the images are made, which of them are kept, which are replayed,
    and how much of the compute goes into making against learning.

    ## Action Space
    `Box(-1, 1, (8,), float32)`, one entry for each coefficient of `ssdkd.coefficients`, mapped to its range there.
    Entries outside [-1, 1] are clipped; NaN means the neutral value.

    ## Observation Space
    A flat `Box` of named, normalised numbers whose size does not depend on classes, image size or models; the
    table is `envs.spaces.ENTRIES`.

    ## Rewards
    `reward="probe"`: log(KL before / KL after) on a probe of synthetic images that are never trained on and do not
    depend on the actions, per unit of budget spent. `reward="validation"`: the rise of the accuracy on the task's
    evaluation set, where one is allowed.

    ## Starting State
    The generator has been warmed up, the probe is set aside, a first buffer is filled; the student is new.

    ## Episode End
    Terminated when the budget is spent. Never truncated by the environment itself.

    ## Arguments
    - `config`: a ready-made config's name, a YAML file, a mapping, or a `RunConfig`
    - `tasks`: mappings laid over `config`; each episode draws one of them
    - `reward`: "probe" or "validation"
    - `engine`: an engine to drive instead of building one (used by the command)
    - `render_mode`: "rgb_array" or "human"

    `reset(options={"task": {...}})` lays a mapping over the config for that episode.
    """

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 4}  # noqa: RUF012

    def __init__(
        self,
        config: str | dict[str, Any] | RunConfig = "digits",
        tasks: list[dict[str, Any]] | None = None,
        reward: str = "probe",
        engine: Engine | None = None,
        render_mode: str | None = None,
    ) -> None:
        if reward not in REWARDS:
            raise ConfigError(f"reward: expected one of {', '.join(REWARDS)}, got {reward!r}.")
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ConfigError(f"render_mode: expected rgb_array or human, got {render_mode!r}.")
        self.observation_space = observation_space()
        self.action_space = action_space()
        self.render_mode = render_mode
        self.reward_name = reward
        self._given = engine
        self._layers = [] if engine else [_as_layer(config)]
        self._tasks = tasks or [{}]
        self._engine: Engine | None = engine
        self._loop: Generator[Statistics, Coefficients, None] | None = None
        self.memory = Memory()

    @property
    def engine(self) -> Engine:
        """The distillation that the current episode is."""
        if self._engine is None:
            raise gymnasium.error.ResetNeeded("there is no episode yet: call reset() first")
        return self._engine

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if self._given is None:
            self._engine = self._build((options or {}).get("task", {}))
        self._loop = self.engine.loop()
        self.memory = Memory()
        self.memory.recent.append(self._measured(next(self._loop)))
        return observe(self.memory), self._info()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self._loop is None:
            raise gymnasium.error.ResetNeeded("the episode has ended or not begun: call reset() first")
        coefficients = Coefficients.from_unit(np.asarray(action, dtype=np.float64).ravel().tolist())
        before = self.memory.now
        after = self._measured(self._loop.send(coefficients))
        reward = REWARDS[self.reward_name](self.engine, before, after)
        self.memory.recent.append(after)
        self.memory.coefficients, self.memory.reward = coefficients, reward
        terminated = self.engine.finished
        if terminated:
            self._loop = None
        return observe(self.memory), reward, terminated, False, self._info()

    def resume(self, state: dict[str, Any]) -> np.ndarray:
        """Go on where `state_dict` was taken, the engine having been restored: -> the observation then."""
        self.memory = Memory.from_state(state)
        self._loop = self.engine.loop()
        next(self._loop)
        return observe(self.memory)

    def state_dict(self) -> dict[str, Any]:
        return self.memory.state_dict()

    def render(self) -> Any:
        """The buffer's images, its classes, its difficulty and the coefficients in force."""
        from envs.rendering import as_picture, as_text

        if self.render_mode == "human":
            print(as_text(self.engine, self.memory))
            return None
        if self.render_mode == "rgb_array":
            return as_picture(self.engine, self.memory)
        return None

    def _build(self, task: dict[str, Any]) -> Engine:
        drawn = self._tasks[int(self.np_random.integers(len(self._tasks)))]
        config = build(RunConfig, [*self._layers, (drawn, "the environment's tasks"), (task, "the task of reset()")])
        config.seed = int(self.np_random.integers(2**31))
        return build_engine(config)

    def _measured(self, statistics: Statistics) -> Statistics:
        if self.reward_name != "validation":
            return statistics
        value = self.engine.accuracy(self.engine.student)
        return statistics if value is None else {**statistics, "accuracy": value}

    def _info(self) -> dict[str, Any]:
        return {"statistics": self.memory.now, "coefficients": self.memory.coefficients.as_dict()}


def _as_layer(config: str | dict[str, Any] | RunConfig) -> tuple[dict[str, Any], str]:
    if isinstance(config, str):
        return read_yaml(config)
    if isinstance(config, RunConfig):
        return asdict(config), "the environment's config"
    return config, "the environment's config"
