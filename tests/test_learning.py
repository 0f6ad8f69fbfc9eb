"""Promises of what every learner is built of: randomness of its own, spaces by name, an episode that can rest."""

import contextlib
import copy
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents.learning import (
    NEUTRAL,
    Pausable,
    Randomness,
    Selected,
    Spaces,
    algorithm_class,
    build_learner,
    checked,
    learner_state,
    restore_learner,
    rows_of,
    spread,
)
from envs.spaces import ENTRIES, observation_space
from ssdkd.coefficients import RANGES
from ssdkd.errors import ConfigError

NAMES, ACTIONS = [entry.name for entry in ENTRIES], [entry.name for entry in RANGES]


def drawn() -> list[float]:
    return [float(torch.rand(())), float(np.random.rand())]  # noqa: NPY002


def test_a_learners_randomness_goes_on_as_if_nobody_else_drew_and_nobody_else_notices_it() -> None:
    randomness, alone = Randomness(5), Randomness(5)
    with alone.in_force():
        expected = [drawn() for _ in range(3)]
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    outside = [drawn() for _ in range(3)]
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    found, others = [], []
    for _ in range(3):
        with randomness.in_force():
            found.append(drawn())
        others.append(drawn())
    assert found == expected
    assert others == outside
    with Randomness(6).in_force():
        assert all(a != b for a, b in zip(drawn(), expected[0], strict=True)), "each seed has its own"


def test_a_learners_randomness_is_put_away_even_where_it_fails() -> None:
    randomness = Randomness(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr] # noqa: NPY002
    with contextlib.suppress(ValueError), randomness.in_force():
        drawn()
        raise ValueError
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index, union-attr] # noqa: NPY002
    again = Randomness(0)
    again.load_state_dict(randomness.state_dict())
    with randomness.in_force():
        expected = drawn()
    with again.in_force():
        assert drawn() == expected


class Echo(gymnasium.Env[np.ndarray, np.ndarray]):
    """Shows its observation's places and notes what it is told."""

    def __init__(self) -> None:
        self.observation_space = observation_space()
        self.action_space = spaces.Box(-1.0, 1.0, (len(RANGES),), dtype=np.float32)
        self.told: list[np.ndarray] = []

    def reset(self, **arguments: Any) -> tuple[np.ndarray, dict[str, Any]]:
        return np.arange(len(NAMES), dtype=np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.told.append(action)
        return np.arange(len(NAMES), dtype=np.float32), 1.0, False, False, {}


def test_some_entries_are_seen_and_some_coefficients_set_in_the_order_in_which_they_are_named() -> None:
    seen, acts = ["probe_kl", "progress"], ["effort", "alpha"]
    env = Selected(Echo(), seen, acts)
    places = [NAMES.index(name) for name in seen]
    assert env.reset()[0].tolist() == places
    assert env.step(np.array([0.25, -0.5]))[0].tolist() == places
    (action,) = env.env.told  # type: ignore[attr-defined]
    expected = NEUTRAL.copy()
    expected[[ACTIONS.index(name) for name in acts]] = 0.25, -0.5
    np.testing.assert_array_equal(action, expected)
    whole = observation_space()
    np.testing.assert_array_equal(env.observation_space.low, whole.low[places])  # type: ignore[attr-defined]
    np.testing.assert_array_equal(env.observation_space.high, whole.high[places])  # type: ignore[attr-defined]
    assert env.action_space.shape == (2,)


def test_actions_are_spread_one_by_one_and_leave_what_is_neutral_as_it_was() -> None:
    before = NEUTRAL.copy()
    whole = spread(np.array([[0.1], [0.2]]), rows_of(["beta"]))
    assert whole.shape == (2, len(RANGES))
    assert whole[:, ACTIONS.index("beta")].tolist() == pytest.approx([0.1, 0.2])
    np.testing.assert_array_equal(NEUTRAL, before)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["beta", "bets"], "no coefficient 'bets'"),
        (["beta", "eta", "beta"], "'beta' is named twice"),
        ([], "least one"),
    ],
)
def test_names_that_cannot_be_are_refused(names: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        rows_of(names)


def test_an_episode_at_rest_plays_nothing_until_it_is_reset() -> None:
    env = Pausable(Echo())
    env.reset()
    env.step(NEUTRAL)
    env.at_rest = True
    seen, reward, terminated, truncated, _ = env.step(NEUTRAL)
    assert (seen.shape, float(reward), terminated, truncated) == ((len(NAMES),), 0.0, False, False)
    assert not seen.any()
    assert len(env.env.told) == 1  # type: ignore[attr-defined]
    env.reset()
    assert env.step(NEUTRAL)[1] == 1.0


def test_arguments_of_an_algorithm_are_numbers_where_it_has_numbers_and_finite() -> None:
    assert checked("ppo", {"gamma": "0.9", "n_steps": 8}) == {"gamma": 0.9, "n_steps": 8}
    assert checked("sac", {"ent_coef": "auto_0.1"}) == {"ent_coef": "auto_0.1"}, "which has words there"
    with pytest.raises(ConfigError, match="takes a number for gamma, got 'high'"):
        checked("ppo", {"gamma": "high"})
    for value in ("inf", "nan", [1.0, float("inf")]):
        with pytest.raises(ConfigError, match=r"holds a number that is not finite"):
            checked("ppo", {"policy_delay": value})


@pytest.mark.parametrize(
    ("name", "arguments"), [("ppo", {"n_steps": 8, "batch_size": 8}), ("sac", {"buffer_size": 50, "ent_coef": "auto"})]
)
def test_a_learner_that_is_built_alike_takes_up_all_that_another_was(name: str, arguments: dict[str, Any]) -> None:
    one, other = (build_learner(name, Spaces(NAMES[:3], ACTIONS[:2]), [4], "tanh", arguments, seed) for seed in (0, 1))
    one.num_timesteps, one._n_updates, one._current_progress_remaining = 77, 5, 0.25  # type: ignore[attr-defined]
    if name == "sac":
        one.log_ent_coef.data.fill_(-3.0)  # type: ignore[attr-defined]
        seen = np.ones((1, 3), np.float32)
        told = (np.zeros((1, 2), np.float32), np.array([1.5]), np.array([0.0]), [{}])
        one.replay_buffer.add(seen, 2.0 * seen, *told)  # type: ignore[attr-defined]
    one.action_space.sample()  # so that it no longer draws as it began
    restore_learner(other, copy.deepcopy(learner_state(one)))
    assert (other.num_timesteps, other._n_updates, other._current_progress_remaining) == (77, 5, 0.25)  # type: ignore[attr-defined]
    held = other.policy.state_dict()
    assert all(torch.equal(value, held[key]) for key, value in one.policy.state_dict().items())
    assert one.action_space.sample().tolist() == other.action_space.sample().tolist()
    if name == "sac":
        assert other.log_ent_coef.item() == -3.0  # type: ignore[attr-defined]
        buffer = other.replay_buffer  # type: ignore[attr-defined]
        assert (buffer.size(), buffer.rewards[0].item(), buffer.observations[0].tolist()) == (1, 1.5, [[1.0] * 3])


def test_what_is_no_algorithm_is_refused() -> None:
    for name in ("gymnasium:Env", "json:dumps"):
        with pytest.raises(ConfigError, match=f"^algorithm: {name} is not a Stable-Baselines3 algorithm"):
            algorithm_class(name)
