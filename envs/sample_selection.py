"""`ssdkd/SampleSelection-v0`: one episode is one distillation, one step is one round."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Generator, Iterator
from dataclasses import asdict
from typing import Any

import gymnasium
import numpy as np
import torch

from envs.rewards import OF_ACCURACY, REWARDS, reward_by
from envs.spaces import Memory, action_space, observation_space, observe, task_facts
from ssdkd.build import build_engine
from ssdkd.coefficients import RANGES, Coefficients
from ssdkd.config import RunConfig, build, cut, read_yaml
from ssdkd.devices import apart_from_caller, choose_device, seed_torch
from ssdkd.engine import Engine, Statistics
from ssdkd.errors import ConfigError, NumericalError, in_one_line

# The settings that a warm-up depends on, and what of an engine's state it makes.
_WARMED_BY = (
    *("teacher", "dataset", "data_root", "image", "inversion", "buffer", "probe"),
    *("seed", "device", "precision", "layout"),
)
_WARMED = ("inverter", "buffer", "probe", "probe_logits", "synthesized", "seconds", "phase_seconds")


class SampleSelectionEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """Steer a data-free distillation, round by round.

    ## Description
    A student learns from a teacher on synthetic images that are made out of the teacher alone. Each step, the
    agent sets the coefficients of the round: how the images are made, which of them are kept, which are replayed,
    and how much of the compute goes into making against learning. An episode is one whole distillation under a
    budget of compute, so whatever is spent on one thing is missing for another.

    ## Action Space
    `Box(-1, 1, (12,), float32)`, one entry for each coefficient, mapped to its range (equal steps multiply those
    marked with *). Entries outside [-1, 1] are clipped; NaN means the neutral value.

    | name | range | neutral | steers |
    | --- | --- | --- | --- |
    | w_div | 0 .. 2 | 0 | class balance of what is kept and of what is made next |
    | gamma | -2 .. 4 | 0 | difficulty of what is kept: above 0 hard, below 0 easy |
    | refresh | 0.02 .. 0.5* | 0.1 | how much of the buffer may change in a round |
    | wear | 0 .. 2 | 0 | how readily what was replayed often gives way to what is new |
    | alpha | 0 .. 1.5 | 0 | how strongly replay follows disagreement |
    | beta | 0 .. 1 | 0 | how fully weights undo the bias of replay |
    | eta | 0 .. 1 | 0 | how much the modulating function also steers replay |
    | adversarial | 0 .. 2 | 1 | how hard inversion looks for the student's errors |
    | effort | 0.25 .. 4* | 1 | how much is replayed in a round, against making samples |
    | batch | 0.25 .. 4* | 1 | images of a student step, of the same replays in a round |
    | anneal | 0 .. 1 | 1 | how far the learning rate follows its schedule down |
    | textures | 0.1 .. 10* | 1 | odds of random textures against inverted images |

    ## Observation Space
    `Box(low, high, (52,), float32)`: named, normalised numbers, whose number does not depend on classes, image
    size or models, so that a policy moves between tasks. What lies outside its bounds is clipped.

    | name | bounds | meaning |
    | --- | --- | --- |
    | progress | 0 .. 1 | share of the budget spent |
    | budget | 0 .. 1 | log10 of the budget in rounds of effort 1, by 5 |
    | steps | 0 .. 1 | log10 of the student steps in as many rounds, by 6 |
    | batch_norm | 0 .. 1 | 1 where the teacher has batch-norm statistics, else 0 |
    | student_size | -1 .. 1 | log10 of the student's compute over the teacher's, by 3 |
    | making_share | 0 .. 1 | share of a round of effort 1 that making samples takes |
    | starting_share | 0 .. 1 | share of a student step of batch 1 that starting its operations takes |
    | replays_per_round | -1 .. 1 | log10 of the replays in a round of effort 1 over the buffer's capacity, by 3 |
    | candidates_per_round | -1 .. 1 | log10 of the candidates in a round over the buffer's capacity, by 3 |
    | buffer_fill | 0 .. 1 | share of the buffer in use |
    | class_entropy | 0 .. 1 | class balance of the buffer: entropy over log C |
    | class_share_min | 0 .. 1 | share of the rarest class |
    | class_share_max | 0 .. 1 | share of the commonest class |
    | confidence_q10 | 0 .. 1 | teacher's confidence over the buffer, 10 % quantile |
    | confidence_q50 | 0 .. 1 | teacher's confidence over the buffer, 50 % quantile |
    | confidence_q90 | 0 .. 1 | teacher's confidence over the buffer, 90 % quantile |
    | delta_q10 | -1 .. 1 | log10 of the last seen KL over the buffer, by 6, 10 % quantile |
    | delta_q50 | -1 .. 1 | log10 of the last seen KL over the buffer, by 6, 50 % quantile |
    | delta_q90 | -1 .. 1 | log10 of the last seen KL over the buffer, by 6, 90 % quantile |
    | age_q10 | 0 .. 1 | log(1 + rounds in the buffer), by 10, 10 % quantile |
    | age_q50 | 0 .. 1 | log(1 + rounds in the buffer), by 10, 50 % quantile |
    | age_q90 | 0 .. 1 | log(1 + rounds in the buffer), by 10, 90 % quantile |
    | visits_q10 | 0 .. 1 | log(1 + times replayed), by 10, 10 % quantile |
    | visits_q50 | 0 .. 1 | log(1 + times replayed), by 10, 50 % quantile |
    | visits_q90 | 0 .. 1 | log(1 + times replayed), by 10, 90 % quantile |
    | candidate_confidence_q10 | 0 .. 1 | teacher's confidence over the newest candidates, 10 % quantile |
    | candidate_confidence_q50 | 0 .. 1 | teacher's confidence over the newest candidates, 50 % quantile |
    | candidate_confidence_q90 | 0 .. 1 | teacher's confidence over the newest candidates, 90 % quantile |
    | candidate_delta_q10 | -1 .. 1 | log10 of KL over the newest candidates, by 6, 10 % quantile |
    | candidate_delta_q50 | -1 .. 1 | log10 of KL over the newest candidates, by 6, 50 % quantile |
    | candidate_delta_q90 | -1 .. 1 | log10 of KL over the newest candidates, by 6, 90 % quantile |
    | novelty | -1 .. 1 | log10 of the newest candidates' median KL over the buffer's |
    | probe_agreement | 0 .. 1 | teacher and student name the same class |
    | probe_kl | -1 .. 1 | log10 of KL on the probe, by 6 |
    | agreement_slope | -1 .. 1 | change of the agreement over 5 rounds, per round, times 10 |
    | kl_slope | -1 .. 1 | change of log KL on the probe over 5 rounds, per round |
    | replay_agreement | 0 .. 1 | the same class on the images just replayed |
    | replay_loss | -1 .. 1 | log10 of the loss on the images just replayed, by 6 |
    | learning_rate | 0 .. 1 | share of the largest learning rate |
    | last_w_div | -1 .. 1 | the last action's w_div |
    | last_gamma | -1 .. 1 | the last action's gamma |
    | last_refresh | -1 .. 1 | the last action's refresh |
    | last_wear | -1 .. 1 | the last action's wear |
    | last_alpha | -1 .. 1 | the last action's alpha |
    | last_beta | -1 .. 1 | the last action's beta |
    | last_eta | -1 .. 1 | the last action's eta |
    | last_adversarial | -1 .. 1 | the last action's adversarial |
    | last_effort | -1 .. 1 | the last action's effort |
    | last_batch | -1 .. 1 | the last action's batch |
    | last_anneal | -1 .. 1 | the last action's anneal |
    | last_textures | -1 .. 1 | the last action's textures |
    | last_gain | -1 .. 1 | fall of log KL on the probe in the last round, per unit of budget: the reward `probe` |

    ## Rewards
    - `reward="probe"`: log(KL before / KL after) on the probe, per unit of budget spent (a round of effort 1). The
      probe is a set of synthetic images that are never trained on; it is made before the first action, so no
      action can make it easier.
    - `reward="area"`: log(KL before / KL after) times the share of the budget that was left; the episode earns
      the area between the start and the curve of log KL over compute, however the budget was cut into rounds
      (see `envs.rewards`).
    - `reward="validation"`: the same area for the accuracy on the task's evaluation set, where one is allowed.
    - `reward="outcome"`: half of it that area, half the last accuracy.

    ## Starting State
    The generator, where the search has one, is warmed up, the probe is set aside, a first buffer is filled; the
    student is new. None of it depends on actions, all of it on the seed.

    ## Episode End
    Terminated when what is left of the budget no longer pays for half a round (a budget in minutes: when they are
    over), or when training left the finite numbers (the probe's KL then counts as 10^6). Never truncated by the
    environment itself.

    ## Information
    `statistics`: everything measured in the round, by name. `coefficients`: those in force, by name. `task`: which
    entry of `tasks` the episode plays, -1 for one given to `reset`.

    ## Arguments
    - `config`: a ready-made config's name, a YAML file, a mapping, or a `RunConfig`
    - `tasks`: mappings laid over `config`, of whatever it holds (teacher, student, rounds, ...); each episode draws
      one of them
    - `reward`: "probe", "area", "validation" or "outcome"; or an import path such as "my_module:my_reward", to a
      function of the engine and of the statistics before and after the round
    - `warm_starts`: 0: every episode warms up anew. K: every teacher (with its inversion, buffer and probe) has K
      warm-ups, each done once and then copied, for all students and budgets; students start from K initial weights,
      and the rounds that follow are still random. Saves about a third of a short episode
    - `engine`: an engine to drive, for one episode, instead of building one (used by the command)
    - `render_mode`: "rgb_array", or "human", by which every `reset` and `step` prints what `render` tells

    `reset(options={"task": {...}})` plays that task instead of a drawn one.

    ```python
    import gymnasium
    import envs  # registers; or gymnasium.make("envs:ssdkd/SampleSelection-v0") without this line

    env = gymnasium.make("ssdkd/SampleSelection-v0", tasks=[{"rounds": 40}, {"rounds": 80}], reward="area")
    ```
    """

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 4}  # noqa: RUF012

    def __init__(
        self,
        config: str | dict[str, Any] | RunConfig = "digits",
        tasks: list[dict[str, Any]] | None = None,
        reward: str = "probe",
        warm_starts: int = 0,
        engine: Engine | None = None,
        render_mode: str | None = None,
    ) -> None:
        if not isinstance(reward, str):
            raise ConfigError(f"reward: expected one of {', '.join(REWARDS)} or an import path, got {reward!r}.")
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ConfigError(f"render_mode: expected rgb_array or human, got {render_mode!r}.")
        if tasks is not None and not (isinstance(tasks, (list, tuple)) and tasks and all(_is_task(t) for t in tasks)):
            raise ConfigError(f"tasks: expected a list of mappings over the config, at least one, got {cut(tasks)}.")
        if not isinstance(warm_starts, (int, np.integer)) or isinstance(warm_starts, bool) or warm_starts < 0:
            raise ConfigError(f"warm_starts: expected a whole number from 0 on, got {cut(warm_starts)}.")
        if engine is not None and not isinstance(engine, Engine):
            raise ConfigError(f"engine: expected what ssdkd.build.build_engine returns, got {cut(engine)}.")
        self.observation_space = observation_space()
        self.action_space = action_space()
        self.render_mode = render_mode
        self.reward_name, self._reward = reward, reward_by(reward)
        self._given = engine
        self._layers = [] if engine else [_as_layer(config)]
        self._tasks = list(tasks or [{}])
        self._warm_starts = int(warm_starts)
        self._warmed: dict[str, dict[str, Any]] = {}  # starting states; copied in and out, never shared
        self._engine: Engine | None = engine
        self._loop: Generator[Statistics, Coefficients, None] | None = None
        self._torch_random: list[torch.Tensor] | None = None
        self._task = -1
        self._layer: dict[str, Any] = {}  # what the episode's task sets
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
        if options is not None and not _is_task(options):
            raise ConfigError(f"reset: options are a mapping such as {{'task': {{...}}}}, not {cut(options)}.")
        unknown = sorted(set(options or {}) - {"task"})
        if unknown:
            raise ConfigError(f"reset: there is no option {unknown[0]!r}; there is task, a mapping over the config.")
        task = (options or {}).get("task")
        if task is not None and not _is_task(task):
            raise ConfigError(f"reset: the option task is a mapping over the config, not {task!r}.")
        if self._given is None:
            self._loop = None  # a task that is refused leaves no episode that would pass for it
            config, drawn = self._draw(task)
        elif self.engine.round:
            raise ConfigError("reset: the engine given has begun already; give a new one for a new episode.")
        with self._own_randomness():
            if self._given is None:
                self._engine = self._build(config, drawn)
            if self.reward_name in OF_ACCURACY and self.engine.evaluation is None:
                raise ConfigError(
                    f"reward: {self.reward_name} needs accuracy, and the task has no evaluation set; give it a dataset "
                    "and a data_root, or take area."
                )
            loop = self.engine.loop()
            self.memory = Memory(task=task_facts(self.engine))
            self.memory.recent.append(self._measured(next(loop)))
            self._loop = loop
        self._show()
        return observe(self.memory), self._info()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self._loop is None:
            raise gymnasium.error.ResetNeeded("the episode has ended or not begun: call reset() first")
        coefficients = _coefficients_of(action)
        before = self.memory.now
        with self._own_randomness():
            after = self._play(coefficients, before)
        reward = self._worth(before, after)
        self.memory.recent.append(after)
        self.memory.coefficients, self.memory.reward = coefficients, reward
        self.memory.gain = REWARDS["probe"](self.engine, before, after)
        ruined = self._given is None and not np.isfinite(after["probe_kl"])
        terminated = self.engine.finished or ruined
        if terminated:
            self._loop = None
        self._show()
        return observe(self.memory), reward, terminated, False, self._info()

    def resume(self, state: dict[str, Any]) -> np.ndarray:
        """Go on where `state_dict` was taken, the engine having been restored: -> the observation then."""
        self.memory = Memory.from_state(state)
        self._loop = self.engine.loop()
        next(self._loop)
        return observe(self.memory)

    def state_dict(self) -> dict[str, Any]:
        return self.memory.state_dict()

    def episode_state(self) -> dict[str, Any]:
        """The episode that is being played, and what the next ones will be drawn from, as plain data."""
        with self._own_randomness():
            engine = self.engine.state_dict()
        return {
            "task": self._task,
            "layer": self._layer if self._task < 0 else None,
            "seed": self.engine.config.seed,
            "engine": engine,
            "memory": self.memory.state_dict(),
            "random": self.np_random.bit_generator.state,
        }

    def restore_episode(self, state: dict[str, Any]) -> np.ndarray:
        """Go on where `episode_state` was taken, in an environment made alike: -> the observation then."""
        self.np_random.bit_generator.state = state["random"]
        self._task = state["task"]
        self._layer = state["layer"] if self._task < 0 else self._tasks[self._task]
        config = self._config(state["seed"])
        with self._own_randomness():
            self._engine = build_engine(config)
            self._engine.load_state_dict(state["engine"])
            return self.resume(state["memory"])

    def render(self) -> Any:
        """The buffer's images, its classes, its difficulty and the coefficients in force."""
        from envs.rendering import as_picture, as_text

        if self.render_mode == "human":
            print(as_text(self.engine, self.memory))
            return None
        if self.render_mode == "rgb_array":
            return as_picture(self.engine, self.memory)
        return None

    def _show(self) -> None:
        """What there is to see after a step, by `render_mode="human"`, which does not wait to be asked."""
        if self.render_mode == "human":
            self.render()

    def _draw(self, task: dict[str, Any] | None) -> tuple[RunConfig, int]:
        """The configuration of an episode, and the seed of all that is random about it."""
        self._task = -1 if task is not None else int(self.np_random.integers(len(self._tasks)))
        self._layer = task if task is not None else self._tasks[self._task]
        seed = int(self.np_random.integers(2**31))
        return self._config(seed % self._warm_starts if self._warm_starts else seed), seed

    def _build(self, config: RunConfig, seed: int) -> Engine:
        engine = build_engine(config)
        if self._warm_starts:
            self._warm_up(engine)
            for offset, random in enumerate(engine.random.values()):
                random.manual_seed(seed * 1000 + offset)
            seed_torch(seed, engine.device)
        return engine

    def _config(self, seed: int) -> RunConfig:
        config = build(RunConfig, [*self._layers, (self._layer, "the task")])
        config.seed = seed
        if choose_device(config.device).type == "cuda":
            torch.cuda.init()  # what the agent seeded before waits for this
        return config

    def _warm_up(self, engine: Engine) -> None:
        """Put `engine` where its warm-up ends; what it makes depends on `_WARMED_BY`, not on the student."""
        config = asdict(engine.config)
        key = json.dumps({name: config[name] for name in _WARMED_BY}, sort_keys=True)
        if key not in self._warmed:
            engine.warm_up()
            state = {name: value for name, value in engine.state_dict().items() if name in _WARMED}
            self._warmed[key] = copy.deepcopy({**state, "newest": engine.newest})
            return
        state = copy.deepcopy(self._warmed[key])
        engine.load_made(state)
        engine.newest = state["newest"]
        engine.begin()

    def _play(self, coefficients: Coefficients, before: Statistics) -> Statistics:
        """One round; where training fails for good, the last round's facts with an infinite KL."""
        assert self._loop is not None
        loop, self._loop = self._loop, None  # a round that is broken off, as by Ctrl-C, leaves no episode
        try:
            after = self._measured(loop.send(coefficients))
        except NumericalError:
            if self._given is not None:
                raise
            after = {**before, "probe_kl": float("inf")}
        self._loop = loop
        return after

    def _worth(self, before: Statistics, after: Statistics) -> float:
        """The reward of a round; one given by its import path is anyone's code."""
        try:
            given = self._reward(self.engine, before, after)
        except Exception as error:
            raise ConfigError(f"reward: {self.reward_name} fails: {in_one_line(error)}.") from error
        try:
            reward = float(given)
        except (TypeError, ValueError, RuntimeError):  # the last of a tensor of several numbers
            reward = math.nan
        if not math.isfinite(reward):
            raise ConfigError(f"reward: {self.reward_name} is to return a finite number, and returned {cut(given)}.")
        return reward

    @contextlib.contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Keep PyTorch's global generators apart from the agent's, so that neither disturbs the other.

        Nor does it matter whether the agent acts under `no_grad`, `inference_mode` or `autocast`.
        """
        if self._given is not None:
            yield
            return
        outside = _generators()
        if self._torch_random is not None:
            _set_generators(self._torch_random)
        try:
            with apart_from_caller():
                yield
        finally:
            self._torch_random = _generators()
            _set_generators(outside)

    def _measured(self, statistics: Statistics) -> Statistics:
        if self.reward_name not in OF_ACCURACY:
            return statistics
        accuracy = self.engine.accuracy(self.engine.student)
        assert accuracy is not None  # `reset` saw to it
        return {**statistics, "accuracy": accuracy}

    def _info(self) -> dict[str, Any]:
        statistics = dict(self.memory.now)
        if self._given is None:
            statistics.pop("seconds")  # the one fact that no seed repeats
        return {"statistics": statistics, "coefficients": self.memory.coefficients.as_dict(), "task": self._task}


def _generators() -> list[torch.Tensor]:
    """The states of PyTorch's global generators: the CPU's, and those of GPUs if they have been started."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def _set_generators(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])


def _is_task(task: Any) -> bool:
    return isinstance(task, dict) and all(isinstance(key, str) for key in task)


def _coefficients_of(action: Any) -> Coefficients:
    if isinstance(action, torch.Tensor):  # on whatever device, of whatever precision, with gradients or without
        action = action.detach().cpu().double()
    try:
        units = np.asarray(action, dtype=np.float64).ravel()
    except (TypeError, ValueError, OverflowError, RuntimeError):
        units = np.zeros(0)
    if len(units) != len(RANGES):
        raise ConfigError(f"an action is {len(RANGES)} numbers, one for each coefficient, not {cut(action)}.")
    return Coefficients.from_unit(units.tolist())


def _as_layer(config: str | dict[str, Any] | RunConfig) -> tuple[dict[str, Any], str]:
    if isinstance(config, str):
        return read_yaml(config)
    if isinstance(config, RunConfig):
        return asdict(config), "the environment's config"
    if not isinstance(config, dict):
        raise ConfigError(f"config: expected a name, a YAML file, a mapping or a RunConfig, got {cut(config)}.")
    return config, "the environment's config"
