"""Promises of the policies that do not learn: what each decides, for one observation and for many."""

import math

import numpy as np
import pytest

from agents import RandomPolicy, SchedulePolicy, fixed_policy
from envs.spaces import ENTRIES, PROGRESS
from ssdkd.coefficients import RANGES, Coefficients
from ssdkd.errors import ConfigError


def at(*progress: float) -> np.ndarray:
    """Observations (N, entries) of which only the progress differs."""
    seen = np.full((len(progress), len(ENTRIES)), 0.5, dtype=np.float32)
    seen[:, PROGRESS] = progress
    return seen


def test_a_schedule_goes_in_a_straight_line_of_action_space_as_the_budget_is_spent() -> None:
    policy = SchedulePolicy(Coefficients(effort=0.25, beta=0.0), Coefficients(effort=4.0, beta=1.0))
    actions, _ = policy.predict(at(0.0, 0.25, 0.5, 1.0))
    told = [Coefficients.from_unit(list(action)) for action in actions]
    assert [c.beta for c in told] == pytest.approx([0.0, 0.25, 0.5, 1.0])
    assert [math.log2(c.effort) for c in told] == pytest.approx([-2.0, -1.0, 0.0, 2.0]), "equal steps multiply it"
    assert actions.dtype == np.float32
    one, _ = policy.predict(at(0.25)[0])
    np.testing.assert_array_equal(one, actions[1])


def test_a_schedule_without_an_end_stays_where_it_starts() -> None:
    actions, _ = SchedulePolicy(Coefficients(gamma=3.0)).predict(at(0.0, 0.7, 1.0))
    assert (actions == actions[0]).all()
    assert Coefficients.from_unit(list(actions[0])).gamma == pytest.approx(3.0)


@pytest.mark.parametrize(("name", "column"), [("uniform", "neutral"), ("ssdkd", "formula")])
def test_uniform_and_ssdkd_set_what_their_column_of_the_table_says(name: str, column: str) -> None:
    actions, _ = fixed_policy(name, seed=0).predict(at(0.0, 1.0))
    for when in (0, 1):
        told = Coefficients.from_unit(list(actions[when])).as_dict()
        expected = {r.name: r.neutral if column == "neutral" else r.formula[when] for r in RANGES}
        assert told == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_chance_is_uniform_over_the_whole_action_space_and_follows_its_seed_alone() -> None:
    many, _ = fixed_policy("random", seed=3).predict(at(*[0.5] * 4000))
    assert many.shape == (4000, len(RANGES))
    assert many.dtype == np.float32
    assert (many.min(), many.max()) == pytest.approx((-1.0, 1.0), abs=0.01)
    assert abs(many).max() <= 1.0
    assert many.mean(axis=0) == pytest.approx(0.0, abs=0.05)
    again, _ = RandomPolicy(3).predict(at(*[0.9] * 4000))
    np.testing.assert_array_equal(many, again)
    other, _ = RandomPolicy(4).predict(at(*[0.5] * 4000))
    assert (other != many).mean() > 0.99


def test_chance_that_is_restored_goes_on_where_it_was() -> None:
    policy, other = RandomPolicy(3), RandomPolicy(8)
    first, _ = policy.predict(at(0.1)[0])
    other.load_state_dict(policy.state_dict())
    second, _ = policy.predict(at(0.2)[0])
    assert first.shape == second.shape == (len(RANGES),)
    assert (first != second).any()
    np.testing.assert_array_equal(second, other.predict(at(0.2)[0])[0])


def test_a_policy_of_no_known_name_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match="expected uniform, random, ssdkd or learned, got 'best'"):
        fixed_policy("best", seed=0)
