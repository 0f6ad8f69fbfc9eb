"""Promises of `ssdkd/SampleSelection-v0`: episodes that repeat, and a probe that nobody bends."""

import copy
import inspect
import itertools
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import RecordEpisodeStatistics, TimeLimit
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from agents import choose_policy
from envs import ENV_ID, SampleSelectionEnv, sample_selection
from envs.rewards import REWARDS, budget_left, log_kl
from envs.spaces import ENTRIES, Memory, action_table, observation_space, observation_table, observe
from ssdkd import build, selection
from ssdkd.coefficients import RANGES, Coefficients
from ssdkd.config import RunConfig
from ssdkd.config import build as build_config
from ssdkd.engine import Engine
from ssdkd.errors import ConfigError, NumericalError
from ssdkd.models import create_model
from ssdkd.run import run
from ssdkd.tracking import Display

TINY: dict[str, Any] = {
    "dataset": "digits",
    "teacher": {"name": "convnet", "arguments": {"widths": [48, 96, 128]}, "checkpoint": "embedded"},
    "student": {"name": "convnet_small"},
    "rounds": 6,
    "threads": 1,
    "inversion": {"images": 16, "steps": 2, "width": 8, "latent": 16, "warmup": 3},
    "buffer": {"capacity": 40, "views": 2, "shift": 1},
    "distillation": {"batch": 16, "steps": 4},
    "probe": {"images": 24},
}
ENTRY_OF = {entry.name: index for index, entry in enumerate(ENTRIES)}


def tiny_env(**arguments: Any) -> SampleSelectionEnv:
    return SampleSelectionEnv(**{"config": TINY, **arguments})


def test_gymnasiums_check_finds_nothing() -> None:
    env = gymnasium.make(ENV_ID, config=TINY, disable_env_checker=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)


def test_stable_baselines_check_finds_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env_for_sb3(tiny_env())


# ----------------------------------------------------------------------------------------------------
# Whole episodes of extreme policies
# ----------------------------------------------------------------------------------------------------

SIZE = len(RANGES)
EXTREME: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "random": lambda step, random: random.uniform(-1, 1, SIZE),
    "all at their minimum": lambda step, random: np.full(SIZE, -1.0),
    "all at their maximum": lambda step, random: np.full(SIZE, 1.0),
    "from one extreme to the other": lambda step, random: np.full(SIZE, 1.0 - 2 * (step % 2)),
    "random corners": lambda step, random: random.choice([-1.0, 1.0], SIZE),
    "not a number": lambda step, random: np.full(SIZE, np.nan),
    "out of range": lambda step, random: np.full(SIZE, 1e30) * (1 - 2 * (step % 2)),
    "infinite": lambda step, random: np.full(SIZE, np.inf) * (1 - 2 * (step % 2)),
}


def assert_sound(engine: Engine, coefficients: Coefficients) -> None:
    """What must hold of the buffer after any round."""
    buffer = engine.buffer
    held = buffer.filled()
    assert 0 < len(held) == buffer.size <= buffer.capacity
    names = engine.teacher(engine.distiller.to_inputs(held.images.permute(0, 3, 1, 2)))
    assert torch.equal(names.argmax(dim=1), held.classes), "each slot must hold one sample with its own class"
    counts = selection.class_counts(held.classes, engine.spec.num_classes)
    assert counts.tolist() == torch.bincount(held.classes, minlength=engine.spec.num_classes).tolist()
    assert torch.isfinite(buffer.delta).all()
    assert (buffer.visits[: buffer.size] >= 0).all()
    assert (buffer.entered[: buffer.size] <= engine.round).all()
    probabilities = engine.replay_probabilities(coefficients)
    assert probabilities.sum().item() == pytest.approx(1.0)
    weights = selection.importance_weights(probabilities, coefficients.beta)
    assert ((weights > 0) & (weights <= 1)).all()


@pytest.mark.parametrize("name", EXTREME)
def test_no_policy_corrupts_an_episode(name: str) -> None:
    env, random = tiny_env(reward="area"), np.random.default_rng(1)
    observation, _ = env.reset(seed=1)
    terminated, step = False, 0
    while not terminated:
        assert env.observation_space.contains(observation)
        assert np.isfinite(observation).all()
        action = EXTREME[name](step, random).astype(np.float32)
        observation, reward, terminated, truncated, info = env.step(action)
        assert math.isfinite(reward)
        assert not truncated
        assert_sound(env.engine, Coefficients(**info["coefficients"]))
        step += 1
    assert env.observation_space.contains(observation)
    assert env.engine.finished
    one_round = env.engine.round_cost(env.engine.config.distillation.steps)
    assert abs(env.engine.spent - env.engine.budget) <= 0.5 * one_round + env.engine.config.distillation.batch


@pytest.mark.parametrize("efforts", [[-1.0], [1.0], [-1.0, 1.0], [1.0, 0.3, -0.2]])
def test_no_effort_overdraws_the_budget(efforts: list[float]) -> None:
    """On a task whose student steps are what costs, the last round must not be a free lunch."""
    costly = {"distillation": {"batch": 32, "steps": 40}, "student": {"name": "convnet"}}
    env = tiny_env(config={**TINY, **costly, "rounds": 5})
    env.reset(seed=0)
    terminated, step = False, 0
    while not terminated:
        action = np.where([r.name == "effort" for r in RANGES], efforts[step % len(efforts)], 0.0)
        *_, terminated, _, _ = env.step(action)
        step += 1
    engine = env.engine
    assert engine.budget * 0.9 <= engine.spent <= engine.budget * 1.05


@pytest.mark.parametrize(("name", "units"), [("all at their minimum", -1.0), ("not a number", None)])
def test_what_is_outside_the_action_space_counts_as_its_edge_and_nan_as_neutral(name: str, units: float | None) -> None:
    env = tiny_env()
    env.reset(seed=0)
    wild = np.full(SIZE, np.nan if units is None else units * 1e9, dtype=np.float32)
    *_, info = env.step(wild)
    expected = {r.name: r.neutral if units is None else r.low for r in RANGES}
    assert info["coefficients"] == pytest.approx(expected)


# ----------------------------------------------------------------------------------------------------
# Repeatability, and the probe
# ----------------------------------------------------------------------------------------------------


def trajectory(env: SampleSelectionEnv, seed: int, disturb: bool = False) -> list[np.ndarray]:
    random = np.random.default_rng(5)
    observation, _ = env.reset(seed=seed)
    seen, terminated = [observation], False
    while not terminated:
        if disturb:
            torch.rand(3)
        observation, reward, terminated, _, _ = env.step(random.uniform(-1, 1, SIZE))
        seen += [observation, np.array([reward])]
    return seen


@pytest.mark.parametrize("warm_starts", [0, 2])
def test_same_seed_and_actions_give_the_identical_trajectory(warm_starts: int) -> None:
    env = tiny_env(warm_starts=warm_starts)
    first = trajectory(env, 3)
    again = trajectory(env, 3, disturb=True)  # the second time from the copy, where there are warm starts
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(first[-2], trajectory(env, 4)[-2])


@pytest.mark.parametrize("policy", ["ssdkd", "learned"])
def test_an_episode_is_the_run_of_the_command(policy: str) -> None:
    env = gymnasium.make(ENV_ID, config=TINY)
    observation, _ = env.reset(seed=4)
    config = env.unwrapped.engine.config  # type: ignore[attr-defined]
    chosen, ended, told = choose_policy(policy, config.seed), False, []
    while not ended:
        action, _ = chosen.predict(observation, deterministic=True)
        observation, _, ended, _, info = env.step(action)
        told.append({**info["statistics"], **info["coefficients"]})
    of_command = build_config(RunConfig, [(TINY, "here"), ({"policy": policy, "seed": config.seed}, "here")])
    result = run(of_command, build.build_engine(of_command), None, Display(quiet=True))
    played = env.unwrapped.engine.student.state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(value, played[name]) for name, value in result.student.state_dict().items())
    assert len(told) == len(result.history)
    for here, there in zip(told, result.history, strict=True):
        assert {k: v for k, v in here.items() if k != "seconds"}.items() <= there.items()


def test_a_task_or_options_that_are_no_mapping_are_refused() -> None:
    with pytest.raises(ConfigError, match="the option task is a mapping"):
        tiny_env().reset(options={"task": "digits"})
    for options in (3, [], "task", ["task"], {3: 4, "task": {}}):
        with pytest.raises(ConfigError, match="reset: options are a mapping"):
            tiny_env().reset(options=options)  # type: ignore[arg-type]


def test_a_copied_warm_start_tells_what_the_first_one_told() -> None:
    env = tiny_env(warm_starts=1)
    (_, first), (_, again) = (env.reset(seed=3) for _ in range(2))
    assert first == again
    assert env.step(np.zeros(SIZE))[-1]["task"] == first["task"]


def test_the_environment_leaves_the_agents_random_numbers_alone() -> None:
    env = tiny_env(warm_starts=1)
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)
        env.reset(seed=0)
        env.step(np.zeros(SIZE))
        env.reset()
        drawn.append(torch.rand(4))
    torch.manual_seed(7)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], torch.rand(4))


@pytest.mark.parametrize("warm_starts", [0, 1])
def test_the_environment_leaves_the_agents_gpu_alone(warm_starts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pretended one, which the first reset starts; nothing is computed on it."""
    gpu, loop = {"started": 0, "state": 7}, Engine.loop
    drawn: list[int] = []

    def seeded(seed: int, device: torch.device) -> None:
        assert gpu["started"], "it is started before anything is drawn, for what the agent seeded waits for that"
        torch.default_generator.manual_seed(seed)
        gpu["state"] = 1000 + seed

    def drawing(engine: Engine) -> Any:
        drawn.append(gpu["state"])
        gpu["state"] += 1
        return loop(engine)

    for module in (build, sample_selection):
        monkeypatch.setattr(module, "seed_torch", seeded)
    monkeypatch.setattr(Engine, "loop", drawing)
    monkeypatch.setattr(sample_selection, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "init", lambda: gpu.update(started=1))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: bool(gpu["started"]))
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [torch.tensor(gpu["state"])])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda states: gpu.update(state=int(states[0])))
    env = tiny_env(warm_starts=warm_starts)
    for _ in range(2):
        env.reset(seed=3)
        env.step(np.zeros(SIZE))
        assert gpu == {"started": 1, "state": 7}
        gpu["state"] = 7
    assert drawn[0] == drawn[1] > 1000


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_agent_may_act_without_gradients(mode: Any) -> None:
    expected = trajectory(tiny_env(), 3)
    with mode():
        found = trajectory(tiny_env(), 3)
        assert not torch.is_grad_enabled(), "the agent's mode stays as it was"
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_agents_autocast_changes_no_trajectory() -> None:
    expected = trajectory(tiny_env(), 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = trajectory(tiny_env(), 3)
        assert torch.is_autocast_enabled("cpu"), "the agent's mode stays as it was"
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_warm_starts_share_no_state_between_episodes() -> None:
    env = tiny_env(warm_starts=1)
    env.reset(seed=0)
    untouched = [p.clone() for p in env.engine.student.parameters()]
    images = env.engine.buffer.images.clone()
    for _ in range(3):
        env.step(np.ones(SIZE))
    assert not all(torch.equal(a, b) for a, b in zip(untouched, env.engine.student.parameters(), strict=True))
    env.reset(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(untouched, env.engine.student.parameters(), strict=True))
    assert torch.equal(images, env.engine.buffer.images)


def test_as_many_warm_ups_and_first_students_as_are_asked_for_are_kept() -> None:
    env, buffers, students = tiny_env(warm_starts=2), set(), set()
    for seed in range(6):
        env.reset(seed=seed)
        buffers.add(env.engine.buffer.images.sum().item())
        students.add(sum(p.sum().item() for p in env.engine.student.parameters()))
    assert len(buffers) == len(students) == 2


@pytest.mark.parametrize(
    "other",
    [
        {"teacher": {"checkpoint": None, "name": f"{__name__}:plain"}},
        {"inversion": {"steps": 3}},
        {"buffer": {"capacity": 30}},
        {"probe": {"images": 30}},
        {"layout": "contiguous"},
        {"precision": "bfloat16"},
    ],
    ids=str,
)
def test_a_warm_up_serves_no_task_whose_own_would_be_another(other: dict[str, Any]) -> None:
    both, alone = tiny_env(warm_starts=1), tiny_env(warm_starts=1)
    both.reset(seed=0)
    seen = [env.reset(seed=1, options={"task": other})[0] for env in (both, alone)]
    np.testing.assert_array_equal(*seen)


def test_a_warm_start_serves_another_student_as_its_own_warm_up_would() -> None:
    tasks = [{}, {"student": {"arguments": {"widths": [4, 8, 8]}}, "rounds": 3}]
    both, alone = tiny_env(tasks=tasks, warm_starts=1), tiny_env(tasks=tasks, warm_starts=1)
    both.reset(seed=0, options={"task": tasks[0]})
    seen = [env.reset(seed=1, options={"task": tasks[1]})[0] for env in (both, alone)]
    np.testing.assert_array_equal(*seen)
    assert len(both._warmed) == len(alone._warmed) == 1
    seen = [env.step(np.ones(SIZE))[0] for env in (both, alone)]
    np.testing.assert_array_equal(*seen)


def test_a_warm_start_only_saves_time_not_randomness() -> None:
    env = tiny_env(warm_starts=1)
    finals = []
    for seed in range(2):
        env.reset(seed=seed)
        drawn_from = [random.get_state().numpy().tobytes() for random in env.engine.random.values()]
        assert len(set(drawn_from)) == len(drawn_from), "each purpose has random numbers of its own"
        finals.append(env.step(np.zeros(SIZE))[0])
    assert not np.array_equal(finals[0], finals[1])


def test_two_policies_see_the_same_probe() -> None:
    probes = []
    for action in (-np.ones(SIZE), np.ones(SIZE)):
        env = tiny_env()
        env.reset(seed=2)
        before = env.engine.probe.clone(), env.engine.probe_logits.clone()
        terminated = False
        while not terminated:
            *_, terminated, _, _ = env.step(action)
        assert torch.equal(env.engine.probe, before[0]), "the probe must not change in an episode"
        probes.append(before)
    assert torch.equal(probes[0][0], probes[1][0])
    assert torch.equal(probes[0][1], probes[1][1])


# ----------------------------------------------------------------------------------------------------
# Tasks
# ----------------------------------------------------------------------------------------------------


def test_each_episode_draws_a_task() -> None:
    tasks = [{"rounds": 2}, {"rounds": 5, "student": {"arguments": {"widths": [4, 8, 8]}}}]
    env = tiny_env(tasks=tasks)
    drawn = set()
    for seed in range(12):
        _, info = env.reset(seed=seed)
        assert env.engine.config.rounds == tasks[info["task"]]["rounds"]
        drawn.add(info["task"])
    assert drawn == {0, 1}


def test_reset_takes_a_task_of_its_own() -> None:
    env = tiny_env(tasks=[{"rounds": 2}])
    observation, info = env.reset(seed=0, options={"task": {"rounds": 4}})
    assert env.engine.config.rounds == 4
    assert info["task"] == -1
    assert observation[ENTRY_OF["budget"]] == pytest.approx(math.log10(4) / 5)


@pytest.mark.parametrize("options", [None, {"task": {"rounds": 4, "buffer": {"capacity": 30}}}], ids=["drawn", "given"])
def test_an_episode_that_is_taken_up_elsewhere_goes_on_as_it_would_have_and_so_do_the_next(options: Any) -> None:
    tasks = [{"rounds": 5}, {"student": {"arguments": {"widths": [4, 8, 8]}}}, {"rounds": 3}]
    one, other = (tiny_env(tasks=tasks, reward="area") for _ in range(2))
    one.reset(seed=1, options=options)
    one.step(np.zeros(SIZE))
    other.restore_episode(copy.deepcopy(one.episode_state()))
    for _ in range(2):
        expected, found = (env.step(np.ones(SIZE)) for env in (one, other))
        np.testing.assert_array_equal(found[0], expected[0])
        assert found[1:] == expected[1:]
    (expected, told), (found, its) = (env.reset() for env in (one, other))
    np.testing.assert_array_equal(found, expected)
    assert told == its


def test_an_engine_that_is_given_serves_one_episode_and_its_owner_is_told_of_its_ruin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env = SampleSelectionEnv(engine=build.build_engine(build_config(RunConfig, [(TINY, "this test")])))
    env.reset(seed=0)
    env.step(np.zeros(SIZE))
    with pytest.raises(ConfigError, match="the engine given has begun already"):
        env.reset(seed=0)

    def fail(coefficients: Coefficients) -> None:
        raise NumericalError("the loss is not finite")

    monkeypatch.setattr(env.engine, "replay", fail)
    with pytest.raises(NumericalError, match="the loss is not finite"):
        env.step(np.zeros(SIZE))


@pytest.mark.parametrize(
    ("arguments", "options", "word"),
    [
        ({"reward": "fame"}, None, "reward"),
        ({"render_mode": "opera"}, None, "render_mode"),
        ({"tasks": [{"rouns": 3}]}, None, "rouns"),
        ({}, {"task": {"rounds": "many"}}, "rounds"),
        ({}, {"rounds": 3}, "rounds"),
        (
            {
                "reward": "validation",
                "config": {**TINY, "dataset": None, "image": {"channels": 1, "height": 8, "width": 8, "classes": 10}},
            },
            None,
            "evaluation set",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(arguments: dict[str, Any], options: Any, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        tiny_env(**arguments).reset(options=options)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        *(
            ({"tasks": tasks}, "tasks: expected a list of mappings over the config, at least one")
            for tasks in ({"rounds": 3}, "abc", ["digits"], [None], [{3: 4}], [])
        ),
        *(({"config": config}, "config: expected a name, a YAML file") for config in (None, 3, ["digits"])),
        *(({"warm_starts": n}, "warm_starts: expected a whole number") for n in (-1, 1.5, "2", None, True)),
        ({"engine": 3}, "engine: expected what ssdkd.build.build_engine returns"),
        *(({"reward": reward}, "reward: expected one of") for reward in ("fame", ["area"], None)),
    ],
)
def test_an_argument_that_cannot_be_is_refused_at_once(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        tiny_env(**arguments)


@pytest.mark.parametrize("action", [None, "up", 0.5, np.zeros(SIZE + 1), [[0.0], [0.0, 1.0]]])
def test_an_action_that_is_none_is_refused_and_the_episode_goes_on(action: Any) -> None:
    env = tiny_env()
    env.reset(seed=0)
    with pytest.raises(ConfigError, match=f"an action is {SIZE} numbers"):
        env.step(action)
    assert env.step([0.0] * SIZE)[0].shape == env.observation_space.shape


@pytest.mark.parametrize("change", [{"requires_grad": True}, {"dtype": torch.bfloat16}])
def test_an_action_may_come_straight_from_a_network(change: dict[str, Any]) -> None:
    env = tiny_env()
    env.reset(seed=0)
    *_, info = env.step(torch.full((SIZE,), 0.5, **change))
    assert info["coefficients"] == Coefficients.from_unit([0.5] * SIZE).as_dict()


def test_a_round_that_is_broken_off_leaves_no_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(*_: Any) -> None:
        raise KeyboardInterrupt

    env = tiny_env()
    whole = env.reset(seed=0)[0]
    monkeypatch.setattr(env.engine, "replay", break_off)
    with pytest.raises(KeyboardInterrupt):
        env.step(np.zeros(SIZE))
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros(SIZE))
    assert np.array_equal(env.reset(seed=0)[0], whole)


def test_no_step_before_reset_or_after_the_end() -> None:
    env = tiny_env(config={**TINY, "rounds": 1})
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros(SIZE))
    env.reset(seed=0)
    assert env.step(np.zeros(SIZE))[2]
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros(SIZE))


@pytest.mark.parametrize("task", [{"rouns": 3}, {"minutes": 1e-6}])
def test_a_reset_that_is_refused_leaves_no_episode(task: dict[str, Any]) -> None:
    env = tiny_env()
    env.reset(seed=0)
    with pytest.raises(ConfigError):
        env.reset(options={"task": task})
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros(SIZE))


def test_training_that_leaves_the_finite_numbers_ends_the_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    env = tiny_env(reward="area")
    env.reset(seed=0)
    env.step(np.zeros(SIZE))
    ruined = NumericalError("the loss is not finite")

    def fail(coefficients: Coefficients) -> None:
        raise ruined

    monkeypatch.setattr(env.engine, "replay", fail)
    observation, reward, terminated, _, _ = env.step(np.zeros(SIZE))
    assert terminated
    assert math.isfinite(reward)
    assert reward < -1
    assert env.observation_space.contains(observation)


def test_observations_stay_inside_whatever_is_measured() -> None:
    space = observation_space()
    env = tiny_env()
    env.reset(seed=0)
    for value in (math.nan, math.inf, -math.inf, 1e300, -1e300):
        memory = Memory(task=dict.fromkeys(env.memory.task, 1.0), gain=value)
        memory.recent.append(dict.fromkeys(env.memory.now, value))
        memory.recent.append(dict.fromkeys(env.memory.now, value))
        assert space.contains(observe(memory)), value
        assert not math.isnan(value) or observe(memory)[ENTRY_OF["probe_kl"]] == 1.0, "as if it were beyond all bounds"


@pytest.mark.parametrize("minutes", [False, True])
def test_the_length_of_a_budget_is_told_in_rounds_and_in_student_steps(minutes: bool) -> None:
    """One in minutes by what half of it bought: 50 rounds' worth."""
    names = [entry.name for entry in ENTRIES]
    facts = {"neutral_cost": 30.0, "rounds": 0.0 if minutes else 100.0, "steps": 20.0}
    env = tiny_env()
    env.reset(seed=0)
    memory = Memory(task={**env.memory.task, **facts})
    memory.recent.append({**env.memory.now, "progress": 0.5, "spent": 1500.0})
    seen = dict(zip(names, observe(memory).tolist(), strict=True))
    assert seen["budget"] == pytest.approx(math.log10(100) / 5)
    assert seen["steps"] == pytest.approx(math.log10(2000) / 6)
    few = Memory(env.memory.recent, task={**env.memory.task, "rounds": 3.0})
    assert observe(few)[names.index("budget")] == pytest.approx(math.log10(3) / 5)


def plain() -> torch.nn.Module:
    """A teacher without batch norm."""
    return create_model("convnet", {"widths": [8], "batch_norm": False}, num_classes=10, in_channels=1)


def test_a_task_is_told_by_what_it_costs_and_how_much_of_the_buffer_a_round_replays_and_makes() -> None:
    def told(**task: Any) -> tuple[dict[str, float], Engine]:
        env = tiny_env()
        observation, _ = env.reset(seed=0, options={"task": task})
        return dict(zip(ENTRY_OF, observation.tolist(), strict=True)), env.engine

    seen, engine = told()
    assert seen["replays_per_round"] == pytest.approx(math.log10(4 * 16 / 40) / 3)
    assert seen["candidates_per_round"] == pytest.approx(math.log10(16 / 40) / 3)
    student, teacher = (work.multiply_adds for work in (engine.costs.student, engine.costs.teacher))
    assert student < teacher
    assert seen["student_size"] == pytest.approx(math.log10(student / teacher) / 3)
    step, whole = engine.round_cost(5) - engine.round_cost(4), engine.round_cost(4)
    assert seen["making_share"] == pytest.approx(1.0 - 4 * step / whole)
    assert seen["starting_share"] == pytest.approx(1.0 - 16 * student / engine.costs.student.on(16))
    assert seen["batch_norm"] == 1.0
    assert told(teacher={"name": f"{__name__}:plain", "checkpoint": None})[0]["batch_norm"] == 0.0


def test_where_minutes_are_given_the_rounds_that_stand_beside_them_are_no_budget() -> None:
    env = tiny_env(tasks=[{"minutes": 5.0}])
    env.reset(seed=0)
    assert env.engine.config.rounds
    assert env.memory.task["rounds"] == env.engine.budget == 0


def test_slopes_are_mean_changes_per_round_over_the_last_five() -> None:
    memory = Memory()
    for number in range(9):
        memory.recent.append({"probe_agreement": 0.01 * number**2, "probe_kl": math.exp(-0.1 * number)})
        slope = memory.slope(lambda s: s["probe_agreement"])
        begin = max(number - 5, 0)
        assert slope == pytest.approx(0.01 * (number**2 - begin**2) / max(number - begin, 1))
    again = Memory.from_state(memory.state_dict())
    assert again.slope(log_kl) == memory.slope(log_kl) == pytest.approx(-0.1)
    again.recent.append(again.now)
    assert len(again.recent) == 6, "one that is restored forgets as soon"


def test_an_entry_is_read_on_the_scale_that_it_tells() -> None:
    memory = Memory(coefficients=Coefficients(effort=4.0, w_div=0.0), gain=0.3)
    memory.task = {"student_size": 0.1, "making_share": 0.4, "rounds": 1000.0, "steps": 10.0, "neutral_cost": 20.0}
    memory.recent.append({"progress": 0.5, "probe_kl": 1e-3 - 1e-6, "age_q50": math.e**2 - 1.0, "visits_q90": -1.0})
    memory.now["probe_agreement"] = 0.5
    memory.recent.append(memory.now | {"probe_agreement": 0.54})
    told = {
        **{"progress": 0.5, "probe_kl": -0.5, "age_q50": 0.2, "visits_q90": 0.0, "student_size": -1 / 3},
        **{"making_share": 0.4, "budget": 3 / 5, "steps": 4 / 6, "last_effort": 1.0, "last_w_div": -1.0},
        **{"last_gain": 0.3, "agreement_slope": 0.4, "kl_slope": 0.0},
    }
    assert {name: ENTRIES[ENTRY_OF[name]].read(memory) for name in told} == pytest.approx(told, abs=1e-9)


def test_an_entry_reads_the_statistic_of_its_name_on_the_scale_that_its_meaning_tells() -> None:
    env = tiny_env()
    env.reset(seed=0)
    facts = {name: (1 + place) / 1000 for place, name in enumerate(env.memory.now)}
    facts["learning_rate"] = facts["learning_rate_fraction"]
    memory = Memory(task=env.memory.task)
    memory.recent.append(facts)
    named = [entry for entry in ENTRIES if entry.name in facts]
    assert len(named) > 25
    for entry in named:
        value = expected = facts[entry.name]
        if entry.meaning.startswith("log10 of"):
            expected = math.log10(value + 1e-6) / 6
        elif entry.meaning.startswith("log(1 + "):
            expected = math.log1p(value) / 10
        assert entry.read(memory) == pytest.approx(expected), entry.name


def test_what_is_remembered_of_an_episode_comes_back_as_it_was() -> None:
    memory = Memory(coefficients=Coefficients(alpha=0.5), reward=1.5, gain=2.5, task={"rounds": 3.0})
    memory.recent.append({"probe_kl": 4.5})
    assert Memory.from_state(memory.state_dict()) == memory


def test_novelty_tells_how_much_less_is_known_of_new_images_than_of_replayed_ones() -> None:
    env = tiny_env()
    env.reset(seed=0)
    place = [entry.name for entry in ENTRIES].index("novelty")

    def told(**facts: float) -> float:
        memory = Memory(task=env.memory.task)
        memory.recent.append({**env.memory.now, **facts})
        return float(observe(memory)[place])

    assert told(candidate_delta_q50=2.0, delta_q50=0.5) == pytest.approx(math.log10(4.0), abs=1e-4)
    assert told(candidate_delta_q50=0.5, delta_q50=2.0) == pytest.approx(-math.log10(4.0), abs=1e-4)
    assert told(candidate_delta_q50=2.0, delta_q50=0.0) == 1.0, "the bound"


# ----------------------------------------------------------------------------------------------------
# Rewards
# ----------------------------------------------------------------------------------------------------


def area_of(curve: Callable[[float], float], cuts: np.ndarray) -> float:
    """What `area` pays in all for a KL that follows `curve` over the budget, cut into rounds at `cuts`."""
    states = [{"progress": float(p), "probe_kl": math.exp(curve(float(p)))} for p in cuts]
    return sum(REWARDS["area"](None, a, b) for a, b in itertools.pairwise(states))  # type: ignore[arg-type]


@pytest.mark.parametrize("curve", [lambda p: 1.0 - 3.0 * p, lambda p: math.log(2.0 * math.exp(-6.0 * p) + 0.05)])
def test_the_area_does_not_depend_on_how_the_budget_was_cut(curve: Callable[[float], float]) -> None:
    fine = np.linspace(0.0, 1.0, 20_001)
    values = np.array([curve(p) for p in fine])
    exact = float(np.sum((values[0] - (values[1:] + values[:-1]) / 2.0) * np.diff(fine)))
    random = np.random.default_rng(0)
    for rounds in (30, 60, 200):
        uneven = np.concatenate([[0.0], np.sort(random.uniform(0, 1, rounds)), [1.0]])
        for cuts in (np.linspace(0.0, 1.0, rounds + 1), uneven):
            assert area_of(curve, cuts) == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("reward", ["area", "validation", "outcome"])
def test_an_episode_earns_the_area_under_its_curve(reward: str) -> None:
    env, random = tiny_env(reward=reward), np.random.default_rng(3)
    _, info = env.reset(seed=1)
    seen, earned, terminated = [info["statistics"]], 0.0, False
    while not terminated:
        _, value, terminated, _, info = env.step(random.uniform(-1, 1, SIZE))
        seen.append(info["statistics"])
        earned += value
    curve = np.array([log_kl(s) if reward == "area" else -s["accuracy"] / 100.0 for s in seen])
    at = np.array([s["progress"] for s in seen])
    under = np.sum((curve[1:] + curve[:-1]) / 2.0 * np.diff(at)) + curve[-1] * (1.0 - at[-1])
    area, end = curve[0] - under, curve[0] - curve[-1]
    assert earned == pytest.approx((area + end) / 2.0 if reward == "outcome" else area, rel=1e-6)


def test_a_rate_is_paid_by_probe() -> None:
    env = tiny_env(reward="probe")
    _, info = env.reset(seed=1)
    before = info["statistics"]
    observation, reward, _, _, info = env.step(Coefficients(effort=4.0).to_unit())  # four times the student steps
    assert observation[ENTRY_OF["last_gain"]] == pytest.approx(min(max(reward, -1.0), 1.0)), "whatever the reward is"
    rounds = (info["statistics"]["spent"] - before["spent"]) / env.engine.round_cost(4)
    assert rounds > 1.1
    assert reward == pytest.approx((log_kl(before) - log_kl(info["statistics"])) / rounds)
    assert budget_left(before, info["statistics"]) == pytest.approx(1.0 - rounds / 12.0)


@pytest.mark.parametrize(
    ("kl", "told"), [(0.5, 0.5), (0.0, 1e-8), (1e-9, 1e-8), (1e7, 1e6), (math.inf, 1e6), (math.nan, 1e6)]
)
def test_neither_perfection_nor_ruin_is_worth_infinitely_much(kl: float, told: float) -> None:
    assert log_kl({"probe_kl": kl}) == math.log(told)


def test_a_round_that_cost_next_to_nothing_is_paid_as_a_thousandth_of_one() -> None:
    env = tiny_env(reward="probe")
    env.reset(seed=1)
    before, after = {"probe_kl": 2.0, "spent": 7.0}, {"probe_kl": 1.0, "spent": 7.0}
    assert REWARDS["probe"](env.engine, before, after) == pytest.approx(1000.0 * math.log(2.0))


def test_a_reward_of_ones_own_is_given_by_its_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def kept(engine, before, after):\n    return after['accepted']\n\nno = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    env = tiny_env(reward="my_rewards:kept")
    env.reset(seed=1)
    _, reward, _, _, info = env.step(np.ones(SIZE))
    assert reward == info["statistics"]["accepted"] > 0
    for name, told in {
        "my_rewards:": "expected one of .* or an import path such as my_module:my_reward, got 'my_rewards:'",
        "my_rewards:lost": "my_rewards:lost cannot be imported: AttributeError: .* no attribute 'lost'",
        "my_rewart:kept": "my_rewart:kept cannot be imported: ModuleNotFoundError: No module named 'my_rewart'",
        "my_rewards:no": "my_rewards:no is a int, not a function of engine, before and after",
    }.items():
        with pytest.raises(ConfigError, match=rf"^reward: {told}"):
            tiny_env(reward=name)


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("after['nothing']", "fails: KeyError: 'nothing'"),
        ("None", "is to return a finite number, and returned None"),
        ("'much'", "is to return a finite number, and returned 'much'"),
        ("float('nan')", "is to return a finite number, and returned nan"),
        ("[1.0]", r"is to return a finite number, and returned \[1.0\]"),
    ],
)
def test_a_reward_that_is_no_number_is_refused_in_one_sentence(
    written: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd_rewards.py").write_text(f"def odd(engine, before, after):\n    return {written}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_rewards", raising=False)
    env = tiny_env(reward="odd_rewards:odd")
    env.reset(seed=1)
    with pytest.raises(ConfigError, match=rf"^reward: odd_rewards:odd {told}\.$"):
        env.step(np.ones(SIZE))


def test_the_observation_is_blind_to_the_reward() -> None:
    seen = []
    for reward in REWARDS:
        env = tiny_env(reward=reward)
        env.reset(seed=0)
        seen.append(env.step(np.ones(SIZE))[0])
    for other in seen[1:]:
        np.testing.assert_array_equal(seen[0], other)


# ----------------------------------------------------------------------------------------------------
# Wrappers and vectors
# ----------------------------------------------------------------------------------------------------


def test_time_limit_and_episode_statistics() -> None:
    env = RecordEpisodeStatistics(TimeLimit(tiny_env(), max_episode_steps=2))
    env.reset(seed=0)
    *_, truncated, _ = env.step(np.zeros(SIZE, dtype=np.float32))
    assert not truncated
    *_, terminated, truncated, info = env.step(np.zeros(SIZE, dtype=np.float32))
    assert truncated
    assert not terminated
    assert info["episode"]["l"] == 2


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_make_vec(mode: str) -> None:
    vector = gymnasium.make_vec(ENV_ID, 2, mode, config={**TINY, "rounds": 2}, tasks=[{}, {"rounds": 3}])
    try:
        observations, _ = vector.reset(seed=0)
        assert observations.shape == (2, len(ENTRIES))
        ended = np.zeros(2, dtype=bool)
        for _ in range(4):
            observations, rewards, terminated, _, infos = vector.step(vector.action_space.sample() * 0.1)
            assert vector.observation_space.contains(observations)
            assert np.isfinite(rewards).all()
            assert infos["_statistics"].all()
            ended |= terminated
        assert ended.all()
    finally:
        vector.close()


@pytest.mark.parametrize("kind", [DummyVecEnv, SubprocVecEnv])
def test_stable_baselines_vectors(kind: Any) -> None:
    vector = VecNormalize(kind([lambda: gymnasium.make("envs:" + ENV_ID, config={**TINY, "rounds": 2})] * 2))
    try:
        vector.seed(0)
        observations = vector.reset()
        for _ in range(3):
            observations, _, _, infos = vector.step(np.zeros((2, SIZE), dtype=np.float32))
            assert np.isfinite(observations).all()
        assert observations.shape == (2, len(ENTRIES))
        assert infos[0]["coefficients"]["adversarial"] == pytest.approx(1.0)
    finally:
        vector.close()


# ----------------------------------------------------------------------------------------------------
# The manual
# ----------------------------------------------------------------------------------------------------


def test_the_docstring_holds_both_tables() -> None:
    manual = inspect.getdoc(SampleSelectionEnv) or ""
    assert action_table() in manual
    assert observation_table() in manual
    assert f"({len(ENTRIES)},)" in manual
    assert f"({len(RANGES)},)" in manual


def test_no_two_entries_share_a_name() -> None:
    assert len(ENTRY_OF) == len(ENTRIES)
