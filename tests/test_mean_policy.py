"""Promises of the mean of policies: it acts half-way between them, whatever scales each of them learned with."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from agents.policies import DEFAULT, Description, LearnedPolicy, fresh_network, load_policy
from benchmarks.mean_policy import as_linear, by_hand, linear, main, mean_of, rule, widened
from envs.spaces import ENTRIES, PROGRESS
from ssdkd.coefficients import RANGES, Coefficients
from ssdkd.errors import ConfigError


def another(policy: LearnedPolicy) -> LearnedPolicy:
    """The same entries and coefficients, other weights and other scales."""
    other = copy.deepcopy(policy)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weights in (other.network.action_net.weight, other.network.action_net.bias):
            weights += 0.3 * torch.randn(weights.shape, generator=random)
    other.mean, other.var = policy.mean + 0.2, policy.var * 3.0
    return other


def test_the_mean_of_one_policy_is_that_policy() -> None:
    one = load_policy(DEFAULT)
    for mine, its in zip(linear(mean_of([one])), linear(one), strict=True):
        assert np.allclose(mine, its, atol=1e-5)


def test_the_same_mean_is_the_same_file() -> None:
    one, again = (mean_of([load_policy(DEFAULT)]) for _ in range(2))
    assert one.fingerprint() == again.fingerprint()


def test_the_mean_acts_half_way_between_two_policies_on_any_observation() -> None:
    one = load_policy(DEFAULT)
    other = another(one)
    seen = np.random.default_rng(0).random(len(one.mean))
    acted = [weights @ seen + biases for weights, biases in map(linear, (one, other, mean_of([one, other])))]
    assert not np.allclose(acted[0], acted[1], atol=0.05)
    assert np.allclose(acted[2], (acted[0] + acted[1]) / 2, atol=1e-5)


def test_policies_that_see_different_things_have_no_mean() -> None:
    one = load_policy(DEFAULT)
    other = copy.deepcopy(one)
    other.description.observations[-1] = "probe_kl"
    with pytest.raises(ConfigError, match="same entries"):
        mean_of([one, other])


def test_the_mean_is_saved_as_a_policy_that_runs_can_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mean.safetensors"
    monkeypatch.setattr(sys, "argv", ["mean_policy", str(DEFAULT), str(DEFAULT), "--out", str(out)])
    assert main() == 0
    assert "| effort |" in capsys.readouterr().out
    assert load_policy(out).description.actions == load_policy(DEFAULT).description.actions


@pytest.mark.parametrize("name", ["nobody.safetensors", "{alpha: 0.4, " * 30])
def test_a_file_that_is_not_there_is_refused_in_a_sentence(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mean_policy", name])
    assert main() == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("others", [[], ["{effort: 2.0}"]])
def test_a_policy_without_one_last_layer_is_refused_in_a_sentence(
    others: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    described = Description("sac", [], "tanh")
    LearnedPolicy(fresh_network(described), described).save(tmp_path / "sac.safetensors")
    assert main([str(tmp_path / "sac.safetensors"), *others]) == 2
    told = capsys.readouterr().err
    assert told.endswith("sac.safetensors is a policy of sac; a mean is of evolution, PPO or A2C.\n")


def test_a_widened_policy_does_the_same_until_it_learns_to_use_what_it_sees(tmp_path: Path) -> None:
    narrow = load_policy(DEFAULT)
    new = next(entry.name for entry in ENTRIES if entry.name not in narrow.description.observations)
    wide = widened(narrow, {new: (0.4, 0.25)})
    seen = np.random.default_rng(0).uniform(0, 1, (5, len(ENTRIES))).astype(np.float32)
    assert wide.description.observations != narrow.description.observations
    assert np.allclose(
        wide.predict(seen, deterministic=True)[0], narrow.predict(seen, deterministic=True)[0], atol=1e-6
    )
    wide.save(tmp_path / "wide.safetensors")
    read = load_policy(tmp_path / "wide.safetensors")
    assert read.description.observations == [e.name for e in ENTRIES if e.name in wide.description.observations]
    assert read.mean[read.description.observations.index(new)] == pytest.approx(0.4)


@pytest.mark.parametrize("text", ["novelty", "novelty=1", "novelty=0.4,0", "nothing=0.4,0.2"])
def test_what_it_cannot_read_in_addition_is_refused_in_a_sentence(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mean_policy", str(DEFAULT), "--also", text])
    assert main() == 2
    assert "error: --also:" in capsys.readouterr().err


def test_an_entry_that_is_read_already_can_be_scaled_anew_to_no_effect() -> None:
    one = load_policy(DEFAULT)
    scaled = widened(one, {"budget": (0.31, 0.08)})
    assert scaled.description.observations == one.description.observations
    assert scaled.var[one.description.observations.index("budget")] == pytest.approx(0.08**2)
    for mine, its in zip(linear(scaled), linear(one), strict=True):
        assert np.allclose(mine, its, atol=1e-5)


def test_coefficients_are_a_policy_to_average_with() -> None:
    one = load_policy(DEFAULT)
    fixed = as_linear("{effort: 2.0, alpha: [0.0, 1.5]}", one)
    seen = np.zeros((2, len(ENTRIES)), dtype=np.float32)
    seen[1, PROGRESS] = 1.0
    start, end = (Coefficients.from_unit(action) for action in fixed.predict(seen, deterministic=True)[0])
    assert (start.effort, end.effort) == pytest.approx((2.0, 2.0), rel=1e-4)
    assert (start.alpha, end.alpha) == pytest.approx((0.0, 1.5), abs=1e-4)
    assert np.allclose(linear(mean_of([one, fixed]))[0], (linear(one)[0] + linear(fixed)[0]) / 2, atol=1e-5)
    with pytest.raises(ConfigError, match="'efort' is none of w_div, "):
        as_linear("{efort: 2.0}", one)


def test_a_policy_that_is_not_linear_has_no_mean_with_coefficients() -> None:
    deep = copy.deepcopy(load_policy(DEFAULT))
    deep.description.net_arch.append(8)
    with pytest.raises(ConfigError, match="must be linear"):
        mean_of([deep, as_linear("{effort: 2.0}", deep)])


def test_a_coefficient_can_be_set_by_hand_and_leaves_the_others_alone() -> None:
    one = load_policy(DEFAULT)
    assert "beta" not in one.description.actions
    changed = by_hand(one, dict([rule("beta=0.5,progress*-1"), rule("alpha=-1")]))
    assert changed.description.actions == [r.name for r in RANGES if r.name in {*one.description.actions, "beta"}]
    assert changed.description.training["by_hand"] == {"beta": {"": 0.5, "progress": -1.0}, "alpha": {"": -1.0}}
    seen = np.zeros((2, len(ENTRIES)), dtype=np.float32)
    seen[1, PROGRESS] = 1.0
    now, before = (policy.predict(seen, deterministic=True)[0] for policy in (changed, one))
    start, end = (Coefficients.from_unit(action) for action in now)
    assert (start.beta, end.beta) == pytest.approx((0.75, 0.25), abs=1e-5)
    assert start.alpha == end.alpha == 0.0
    others = [i for i, r in enumerate(RANGES) if r.name not in ("alpha", "beta")]
    np.testing.assert_allclose(now[:, others], before[:, others], atol=1e-5)


def test_a_coefficient_can_be_moved_from_where_it_is_or_from_neutral() -> None:
    one = load_policy(DEFAULT)
    moved = by_hand(one, dict([rule("effort=-0.2,progress*0.1"), rule("beta=0.5")]), added=True)
    seen = np.full((2, len(ENTRIES)), 0.3, dtype=np.float32)
    seen[0, PROGRESS] = 0.0
    seen[1, PROGRESS] = 1.0
    now, before = (policy.predict(seen, deterministic=True)[0] for policy in (moved, one))
    effort, beta = ([r.name for r in RANGES].index(name) for name in ("effort", "beta"))
    np.testing.assert_allclose((now - before)[:, effort], [-0.2, -0.1], atol=1e-5)
    assert Coefficients.from_unit(before[0]).beta == 0.0
    assert Coefficients.from_unit(now[0]).beta == pytest.approx(0.25, abs=1e-5)  # a quarter of its range of 1 above
    others = [i for i in range(len(RANGES)) if i not in (effort, beta)]
    np.testing.assert_allclose(now[:, others], before[:, others], atol=1e-5)


@pytest.mark.parametrize("text", ["beta", "beta=", "beta=one", "beta=progress*", "beta=1=2"])
def test_a_rule_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--by-hand"):
        rule(text)


@pytest.mark.parametrize("text", ["betas=1", "beta=0,progres*1", "effort=0.1,alpha*0.3", "budget=0.1"])
def test_a_rule_of_what_is_not_there_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"(betas|budget) is no coefficient|(progres|alpha) is no entry"):
        by_hand(load_policy(DEFAULT), dict([rule(text)]))


def test_a_policy_that_cannot_be_saved_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mean_policy", str(DEFAULT), "--out", "policy.pt"])
    assert main() == 2
    assert "policy.pt" in capsys.readouterr().err
