"""Promises of the coefficient table: names, ranges, and the way between an action and what it stands for."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssdkd.coefficients import RANGES, Coefficients

UNITS = st.lists(st.floats(-1.0, 1.0), min_size=len(RANGES), max_size=len(RANGES))
ANYTHING = st.lists(st.floats(width=32), min_size=len(RANGES), max_size=len(RANGES))


@given(UNITS)
def test_an_action_survives_the_way_to_coefficients_and_back(action: list[float]) -> None:
    assert Coefficients.from_unit(action).to_unit() == pytest.approx(action, abs=1e-6)


@given(ANYTHING)
def test_whatever_a_policy_says_the_coefficients_stay_in_range(action: list[float]) -> None:
    decided = Coefficients.from_unit(action).as_dict()
    for r in RANGES:
        assert r.low * (1 - 1e-9) <= decided[r.name] <= r.high * (1 + 1e-9) or (
            r.low - 1e-9 <= decided[r.name] <= r.high + 1e-9
        )


def test_the_ends_of_the_action_are_the_ends_of_the_ranges() -> None:
    lowest = Coefficients.from_unit([-1.0] * len(RANGES)).as_dict()
    highest = Coefficients.from_unit([1.0] * len(RANGES)).as_dict()
    assert lowest == pytest.approx({r.name: r.low for r in RANGES})
    assert highest == pytest.approx({r.name: r.high for r in RANGES})


def test_not_a_number_in_an_action_means_neutral() -> None:
    assert Coefficients.from_unit([math.nan] * len(RANGES)) == Coefficients()


def test_an_action_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shorter|longer"):
        Coefficients.from_unit([0.0] * (len(RANGES) - 1))


def test_without_a_decision_every_coefficient_is_neutral() -> None:
    assert Coefficients().as_dict() == {r.name: r.neutral for r in RANGES}


@pytest.mark.parametrize("entry", RANGES, ids=lambda r: r.name)
def test_neutral_and_the_papers_values_lie_inside_the_range(entry) -> None:
    for value in (entry.neutral, *entry.formula):
        assert entry.low <= value <= entry.high
        assert entry.from_unit(entry.to_unit(value)) == pytest.approx(value, abs=1e-9)
    assert entry.steers


@pytest.mark.parametrize("entry", [r for r in RANGES if r.logarithmic], ids=lambda r: r.name)
def test_equal_action_steps_multiply_a_logarithmic_coefficient(entry) -> None:
    at = [entry.from_unit(u) for u in (-0.5, 0.0, 0.5)]
    assert at[1] / at[0] == pytest.approx(at[2] / at[1])
    assert at[1] == pytest.approx(math.sqrt(entry.low * entry.high))


@pytest.mark.parametrize("entry", [r for r in RANGES if not r.logarithmic], ids=lambda r: r.name)
def test_equal_action_steps_add_to_a_linear_coefficient(entry) -> None:
    assert entry.from_unit(0.0) == pytest.approx((entry.low + entry.high) / 2)
