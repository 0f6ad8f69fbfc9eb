"""Promises of the agents: policies as files that cannot run code, training that goes on where it stopped, families."""

import functools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import yaml
from stable_baselines3 import DDPG, DQN, PPO, TD3
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_env import TINY

from agents import choose_policy, curves, evaluate, fixed_policy, train
from agents.adapt import AdaptivePolicy
from agents.evaluate import area_under, interquartile_mean, rounds_of
from agents.learning import NEUTRAL, Spaces, algorithm_class, build_learner
from agents.policies import EVOLUTION, Description, LearnedPolicy, load_policy, policy_of
from agents.tasks import TasksConfig, digest_of, family_from, held_out_tasks, merged, name_of, training_tasks
from envs import SampleSelectionEnv
from envs.spaces import ENTRIES
from ssdkd import checkpoint, run
from ssdkd.coefficients import RANGES, Coefficients
from ssdkd.data import load_dataset
from ssdkd.errors import CheckpointError, ConfigError
from ssdkd.files import read_safetensors, write_safetensors
from ssdkd.tracking.tags import group_of, tables

NAMES = [entry.name for entry in ENTRIES]
ACTIONS = [r.name for r in RANGES]


def some_policy(algorithm: str = "ppo", **fields: Any) -> LearnedPolicy:
    """An untrained policy, with normalisation that is not the identity."""
    described = Description(algorithm, [8, 8], "tanh", **fields)
    size = len(described.observations)
    spaces = Spaces(described.observations, described.actions)
    model = build_learner(algorithm, spaces, [8, 8], "tanh", described.arguments, 0)
    random = np.random.default_rng(0)
    return policy_of(model, described, random.normal(size=size), random.uniform(0.5, 2.0, size))


def some_observations(count: int = 3) -> np.ndarray:
    return np.random.default_rng(1).uniform(0, 1, (count, len(ENTRIES))).astype(np.float32)


# ----------------------------------------------------------------------------------------------------
# Policies as files
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["ppo", "a2c", "sac", "td3"])
def test_a_policy_comes_back_as_it_was(algorithm: str, tmp_path: Path) -> None:
    policy = some_policy(algorithm, training={"steps": 12}, reward_scale=2.0)
    policy.var[1] = 0.0  # of an entry that never changed
    policy.save(tmp_path / "p.safetensors")
    again = load_policy(tmp_path / "p.safetensors")
    observations = some_observations()
    actions, _ = again.predict(observations, deterministic=True)
    np.testing.assert_array_equal(actions, policy.predict(observations, deterministic=True)[0])
    assert actions.shape == (3, len(RANGES))
    assert np.abs(actions).max() <= 1
    one, _ = again.predict(observations[0], deterministic=True)
    np.testing.assert_allclose(one, actions[0], atol=1e-6)
    value, single = again.value(observations), again.value(observations[0])
    assert value is not None
    assert single is not None
    assert value.shape == (3,)
    assert single.shape == ()
    assert again.description == policy.description
    assert again.fingerprint() == policy.fingerprint()
    assert {"value", "spread"} >= set(again.diagnostics(observations[0])) >= {"value"}


@pytest.mark.parametrize(
    ("algorithm", "arguments"),
    [("ppo", {"use_sde": True}), ("sac", {"use_sde": True}), ("stable_baselines3:DDPG", {})],
)
def test_a_network_that_its_algorithm_makes_otherwise_comes_back(
    algorithm: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    model = build_learner(algorithm, Spaces(NAMES, ACTIONS), [8], "tanh", arguments, 0)
    policy = policy_of(model, Description(algorithm, [8], "tanh", arguments=arguments))
    policy.save(tmp_path / "p.safetensors")
    again = load_policy(tmp_path / "p.safetensors")
    seen = some_observations()
    np.testing.assert_array_equal(
        again.predict(seen, deterministic=True)[0], policy.predict(seen, deterministic=True)[0]
    )


def test_the_value_of_a_critic_that_tells_quantiles_is_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """As TQC's does: (observations, critics, quantiles)."""
    policy, seen = some_policy("sac", reward_scale=2.0), some_observations()
    told = torch.tensor([[1.0, 3.0], [4.0, 2.0]]).expand(3, 2, 2)
    monkeypatch.setattr(policy.network.critic, "forward", lambda *given: told)
    assert policy.value(seen) == pytest.approx([4.0, 4.0, 4.0])


class OwnPPO(PPO):
    """An algorithm of somebody's own."""


class ThreeCritics(TD3):
    """An algorithm whose network no description tells."""

    def __init__(self, *given: Any, policy_kwargs: dict[str, Any], **more: Any) -> None:
        super().__init__(*given, policy_kwargs={**policy_kwargs, "n_critics": 3}, **more)


def test_a_policy_that_could_not_be_read_again_is_neither_trained_nor_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{__name__}:ThreeCritics"
    assert train.main([*train_flags(tmp_path, "td3", "--steps", "16"), "--algorithm", name]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: a policy of {name} with these arguments could not be read from its file")
    assert told.count("\n") == 1
    assert not (tmp_path / "runs").exists()
    model = build_learner(name, Spaces(NAMES, ACTIONS), [8], "tanh", {}, 0)
    with pytest.raises(CheckpointError, match="could not be read"):
        policy_of(model, Description(name, [8], "tanh")).save(tmp_path / "p.safetensors")
    wide = build_learner("ppo", Spaces(NAMES, ACTIONS), [1025], "tanh", {}, 0)
    with pytest.raises(CheckpointError, match=r"could not be read from its file \(its net_arch has a layer"):
        policy_of(wide, Description("ppo", [1025], "tanh")).save(tmp_path / "p.safetensors")
    assert not (tmp_path / "p.safetensors").exists()


def test_a_critic_that_has_learned_nothing_says_nothing() -> None:
    observation = some_observations()[0]
    assert set(load_policy().diagnostics(observation)) == {"spread"}
    learning = AdaptivePolicy(load_policy())
    assert set(learning.diagnostics(observation)) == {"spread", "updates"}
    learning.model._n_updates = 1
    assert set(learning.diagnostics(observation)) == {"spread", "updates", "value"}


def test_a_policy_sees_observations_as_vec_normalize_showed_them_in_training() -> None:
    policy, seen = some_policy(), some_observations()
    policy.var[0], policy.var[1] = 1e-6, 0.0  # an entry that hardly changed, and one that never did
    shown = VecNormalize(DummyVecEnv([lambda: Spaces(NAMES, ACTIONS)]), clip_obs=10.0)
    shown.obs_rms.mean, shown.obs_rms.var = policy.mean, policy.var
    np.testing.assert_array_equal(policy.seen(seen), shown.normalize_obs(seen))


def test_whatever_changes_decisions_changes_the_fingerprint() -> None:
    def changed(what: str) -> str:
        policy = some_policy()
        if what in ("mean", "var"):
            getattr(policy, what)[3] += 0.5
        elif what == "weights":
            policy.network.state_dict()["action_net.bias"][0] += 0.5
        return policy.fingerprint()

    assert changed("nothing") == some_policy().fingerprint()
    assert len({changed(what) for what in ("nothing", "mean", "var", "weights")}) == 4


def test_reading_a_policy_draws_nothing_from_its_callers_random_numbers() -> None:
    before = torch.get_rng_state()
    load_policy()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_spread_that_is_shown_is_the_standard_deviation_of_actions() -> None:
    drawn, squashed = some_policy("ppo"), some_policy("sac")
    with torch.no_grad():
        drawn.network.log_std.fill_(math.log(0.3))  # type: ignore[operator, union-attr]
        for part in squashed.network.actor.log_std.parameters():  # type: ignore[union-attr]
            part.fill_(math.log(0.3) if part.ndim == 1 else 0.0)
    for policy in (drawn, squashed):
        assert policy.diagnostics(some_observations()[0])["spread"] == pytest.approx(0.3)


def test_without_determinism_actions_are_drawn() -> None:
    policy, observation = some_policy(), some_observations(1)[0]
    drawn = [policy.predict(observation)[0] for _ in range(2)]
    assert not np.array_equal(*drawn)


def test_a_policy_may_read_some_entries_and_set_some_coefficients(tmp_path: Path) -> None:
    policy = some_policy(observations=["probe_kl", "progress"], actions=["effort", "alpha"])
    policy.save(tmp_path / "p.safetensors")
    again = load_policy(tmp_path / "p.safetensors")
    observations = some_observations(2)
    observations[1] = observations[0]
    unread = [i for i, name in enumerate(NAMES) if name not in ("probe_kl", "progress")]
    observations[1, unread] = 0.123
    actions, _ = again.predict(observations, deterministic=True)
    np.testing.assert_array_equal(actions[0], actions[1])
    unset = [i for i, name in enumerate(ACTIONS) if name not in ("effort", "alpha")]
    np.testing.assert_array_equal(actions[0, unset], NEUTRAL[unset])
    expected, _ = again.network.predict(again.seen(observations[0]), deterministic=True)
    np.testing.assert_allclose(actions[0, [ACTIONS.index("effort"), ACTIONS.index("alpha")]], expected, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_the_callers_autocast_changes_no_decision(algorithm: str) -> None:
    policy, observations = some_policy(algorithm), some_observations()

    def decided() -> list[Any]:
        torch.manual_seed(0)  # what an action of sac is worth is drawn
        learning = AdaptivePolicy(policy)
        drawn = [learning.predict(observations[0])[0].tolist()]
        learning.learn(0.5, observations[1], False)
        action, value = policy.predict(observations, deterministic=True)[0], policy.value(observations)
        assert value is not None
        return [*drawn, action.tolist(), value.tolist(), policy.diagnostics(observations[0])]

    alone = decided()
    with torch.autocast("cpu", torch.bfloat16):
        assert decided() == alone


def rewritten(path: Path, changes: dict[str, Any], tensors: dict[str, Any] | None = None) -> Path:
    """The same file with another description or other tensors, properly sealed, as a forger would."""
    held, metadata = read_safetensors(path, "policy", sealed=True)
    described = {**json.loads(metadata["ssdkd.policy"]), **changes}
    described = {key: value for key, value in described.items() if value is not ...}
    held = {name: value for name, value in {**held, **(tensors or {})}.items() if value is not None}
    forged = path.with_name("forged.safetensors")
    write_safetensors(forged, held, {"ssdkd.policy": json.dumps(described)}, seal=True)
    return forged


@pytest.mark.parametrize(
    ("changes", "tensors", "word"),
    [
        ({"format": "9"}, None, "format"),
        ({"training": ...}, None, "training"),
        ({"surprise": 1}, None, "surprise"),
        ({"net_arch": [1024] * 6}, None, "more weights than the file"),
        ({"net_arch": [10**9]}, None, "net_arch"),
        ({"net_arch": [8, -1]}, None, "net_arch"),
        ({"net_arch": [8] * 99}, None, "net_arch"),
        ({"net_arch": "wide"}, None, "net_arch"),
        ({"net_arch": {"pi": [8, 8], "os": [8, 8]}}, None, "net_arch"),
        ({"net_arch": [8, 9]}, None, "expected"),
        ({"activation": "eval"}, None, "activation"),
        ({"algorithm": "os:system"}, None, "import"),
        ({"algorithm": "agents_evolution:Evolution"}, None, "would have to be imported"),
        ({"algorithm": "stable_baselines3:DQN"}, None, "cannot be used: "),
        ({"algorithm": "stable_baselines3:HER"}, None, "cannot be used: algorithm: stable_baselines3:HER"),
        ({"algorithm": 3}, None, "algorithm"),
        ({"observations": [*NAMES[:-1], "yesterdays_entry"]}, None, "yesterdays_entry"),
        ({"observations": [*NAMES[:-1], NAMES[0]]}, None, "named twice"),
        ({"observations": NAMES[:-1]}, None, "normalise.mean"),
        ({"observations": 7}, None, "names"),
        ({"actions": ["alpha", "courage"]}, None, "courage"),
        ({"actions": ["alpha"]}, None, "expected"),
        ({"reward": "fame"}, None, "reward"),
        ({"reward": ["area"]}, None, "reward"),
        ({"activation": ["tanh"]}, None, "activation"),
        *(({"reward_scale": scale}, None, "reward_scale") for scale in (0, -1.0, math.inf, math.nan, True)),
        ({"arguments": []}, None, "arguments"),
        ({}, {"normalise.var": torch.full((len(NAMES),), -1.0)}, "negative"),
        ({}, {"normalise.mean": torch.full((len(NAMES),), math.nan)}, "normalise.mean"),
        ({}, {"normalise.mean": None}, "normalise.mean"),
        ({}, {"policy.action_net.bias": torch.full((len(RANGES),), math.inf)}, "NaN or infinity"),
        ({}, {"policy.action_net.bias": torch.zeros(len(RANGES), dtype=torch.float64), "x": None}, "expected"),
        ({}, {"policy.action_net.bias": None}, "lacks"),
        ({}, {"policy.more": torch.zeros(1)}, "policy.more"),
    ],
)
def test_a_forged_policy_is_refused_in_one_sentence(
    changes: dict[str, Any], tensors: dict[str, Any] | None, word: str, tmp_path: Path
) -> None:
    some_policy().save(tmp_path / "p.safetensors")
    with pytest.raises(CheckpointError, match=word) as refused:
        load_policy(rewritten(tmp_path / "p.safetensors", changes, tensors))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_files_that_are_no_policy_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    some_policy().save(path)
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[:-1], whole[:-4] + b"abcd", b"\x80\x04."):
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            load_policy(path)
    for name in ("nowhere.safetensors", "alpha: 0.4, " * 30):  # the second is too long for a file's name
        with pytest.raises(CheckpointError, match="does not exist"):
            load_policy(tmp_path / name)
    with pytest.raises(CheckpointError, match="safetensors"):
        some_policy().save(tmp_path / "p.pth")


@pytest.mark.parametrize("use_sde", [False, True])
def test_a_zip_of_stable_baselines_needs_trust(use_sde: bool, tmp_path: Path) -> None:
    model = PPO("MlpPolicy", Spaces(NAMES, ACTIONS), policy_kwargs={"net_arch": [8]}, use_sde=use_sde, device="cpu")
    model.save(tmp_path / "foreign.zip")
    with pytest.raises(CheckpointError, match="--trust"):
        load_policy(tmp_path / "foreign.zip")
    trusted = load_policy(tmp_path / "foreign.zip", trust=True)
    observations = some_observations()
    expected, _ = model.predict(observations, deterministic=True)
    np.testing.assert_allclose(trusted.predict(observations, deterministic=True)[0], expected, atol=1e-6)
    trusted.save(tmp_path / "own.safetensors")
    own = load_policy(tmp_path / "own.safetensors")
    np.testing.assert_allclose(own.predict(observations, deterministic=True)[0], expected, atol=1e-6)


def test_a_zip_of_other_tables_is_refused(tmp_path: Path) -> None:
    PPO("MlpPolicy", Spaces(NAMES[1:], ACTIONS), device="cpu").save(tmp_path / "older.zip")
    with pytest.raises(
        CheckpointError, match=rf"reads \({len(NAMES) - 1},\) and sets \({len(ACTIONS)},\).*train it again"
    ):
        load_policy(tmp_path / "older.zip", trust=True)


@pytest.mark.parametrize("algorithm", ["ppo", "a2c", "sac", "td3"])
def test_a_zip_tells_which_algorithm_it_is_of(algorithm: str, tmp_path: Path) -> None:
    build_learner(algorithm, Spaces(NAMES, ACTIONS), [8], "relu", {}, 0).save(tmp_path / "p.zip")
    found = load_policy(tmp_path / "p.zip", trust=True).description
    assert (found.algorithm, found.activation) == (algorithm, "relu")


def test_a_zip_tells_which_algorithm_it_is_of_or_is_refused(tmp_path: Path) -> None:
    DDPG("MlpPolicy", Spaces(NAMES, ACTIONS), buffer_size=9, device="cpu").save(tmp_path / "ddpg.zip")
    load_policy(tmp_path / "ddpg.zip", trust=True).save(tmp_path / "own.safetensors")
    assert load_policy(tmp_path / "own.safetensors").description.algorithm == "stable_baselines3:DDPG"

    class Other(PPO.policy_aliases["MlpPolicy"]):  # type: ignore[name-defined,misc]
        """As a recurrent one is, which has a state."""

    PPO(Other, Spaces(NAMES, ACTIONS), device="cpu").save(tmp_path / "other.zip")
    with pytest.raises(CheckpointError, match=r"not a readable \.zip of .*: its network is a Other, theirs a Actor"):
        load_policy(tmp_path / "other.zip", trust=True)
    discrete = Spaces(NAMES, ACTIONS)
    discrete.action_space = gymnasium.spaces.Discrete(3)  # type: ignore[assignment]
    DQN("MlpPolicy", discrete, device="cpu", buffer_size=9).save(tmp_path / "dqn.zip")
    with pytest.raises(CheckpointError, match=r"not a readable \.zip of ppo, td3, sac, a2c: "):
        load_policy(tmp_path / "dqn.zip", trust=True)


def test_a_policy_of_no_known_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="policy: expected uniform, random, ssdkd or learned, got 'clever'"):
        choose_policy("clever", 0)


def test_fixed_policies_take_neither_file_nor_lessons(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="policy_file"):
        choose_policy("ssdkd", 0, "p.safetensors")
    with pytest.raises(ConfigError, match="adapt"):
        choose_policy("uniform", 0, None, True)


# ----------------------------------------------------------------------------------------------------
# In the command
# ----------------------------------------------------------------------------------------------------


def settings(tmp_path: Path, **more: Any) -> str:
    """TINY as a file for the command, quick and quiet."""
    quiet = {"tracking": {"evaluate_every": 0, "tensorboard": False, "report": False}, "checkpoint": {"rounds": 7}}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **quiet, "out": str(tmp_path / "runs"), **more}))
    return str(path)


def only_run(tmp_path: Path) -> Path:
    (folder,) = (tmp_path / "runs").iterdir()
    return folder


def test_the_command_runs_a_learned_policy(tmp_path: Path) -> None:
    some_policy().save(tmp_path / "p.safetensors")
    arguments = ["--config", settings(tmp_path), "--policy", "learned", "--quiet"]
    assert run.main([*arguments, "--policy-file", str(tmp_path / "p.safetensors")]) == 0
    summary = json.loads((only_run(tmp_path) / "summary.json").read_text())
    assert (summary["policy"], summary["rounds"] > 1) == ("learned", True)


def test_a_policy_that_cannot_be_had_is_noticed_before_a_folder_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--config",
        settings(tmp_path),
        "--policy",
        "learned",
        "--policy-file",
        str(tmp_path / "no.safetensors"),
    ]
    assert run.main(arguments) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("algorithm", "arguments"),
    [("ppo", {}), ("sac", {"batch_size": 8}), ("sac", {"batch_size": 8, "use_sde": True})],
)
def test_a_run_that_adapts_learns_and_resumes_exactly(
    algorithm: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    """Cut at round 10, it ends with the same student, and the same policy and optimisers, as without the cut."""
    some_policy(algorithm, arguments=arguments).save(tmp_path / "p.safetensors")
    config = settings(tmp_path, rounds=40, checkpoint={"rounds": 10, "minutes": 0.0, "keep": 9})
    flags = ["--policy", "learned", "--adapt", "--policy-file", str(tmp_path / "p.safetensors"), "--quiet"]
    assert run.main(["--config", config, *flags]) == 0
    whole = only_run(tmp_path)
    newest = sorted((whole / "checkpoints").iterdir())[-1]
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    for name in ("summary.json", "student.safetensors"):
        (cut / name).unlink()
    for later in (cut / "checkpoints").iterdir():
        if later.name != "round-00000010.safetensors":
            later.unlink()
    assert run.main(["--resume", str(cut), "--quiet"]) == 0
    assert (cut / "student.safetensors").read_bytes() == (whole / "student.safetensors").read_bytes()
    one, other = (checkpoint.load(folder / "checkpoints" / newest.name)["policy"] for folder in (whole, cut))
    assert_same(one, other)
    assert one["learner"]["updates"] > 0
    began = load_policy(tmp_path / "p.safetensors").network.state_dict()
    learned = one["learner"]["parameters"]["policy"]
    assert any(not torch.equal(began[name], learned[name]) for name in began)


def assert_same(one: Any, other: Any) -> None:
    """Two trees of plain data, equal to the last bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, np.ndarray):
        np.testing.assert_array_equal(one, other)
    else:
        assert one == other


def test_another_policy_file_cannot_take_over_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, name in enumerate(("a", "b")):
        some_policy(training={"seed": seed}).save(tmp_path / f"{name}.safetensors")
    first, second = (load_policy(tmp_path / f"{name}.safetensors") for name in ("a", "b"))
    first.load_state_dict(first.state_dict())
    for began, policy in ((first, second), (AdaptivePolicy(first), AdaptivePolicy(second))):
        with pytest.raises(CheckpointError, match="not the one"):
            policy.load_state_dict(began.state_dict())


@pytest.mark.parametrize("algorithm", ["td3", "stable_baselines3:DDPG"])
def test_a_deterministic_actor_tries_other_actions_when_it_learns_on(algorithm: str) -> None:
    learning, seen = AdaptivePolicy(some_policy(algorithm)), some_observations(1)[0]
    tried = [learning.predict(seen)[0] for _ in range(2)]
    assert not np.array_equal(*tried)


@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_noise_that_is_held_for_long_is_another_after_an_update(algorithm: str) -> None:
    learning, other = (AdaptivePolicy(some_policy(algorithm, arguments={"use_sde": True})) for _ in range(2))
    seen = some_observations(1)[0]
    noise = []
    for _ in range(65):  # of which 16 make an on-policy update, 64 the first of another
        action, _ = learning.predict(seen)
        noise.append(action - learning.learned.predict(seen, deterministic=True)[0])
        learning.learn(0.0, seen, False)
    np.testing.assert_allclose(noise[0], noise[15], atol=1e-5)
    assert not np.allclose(noise[0], noise[64], atol=1e-2)
    other.load_state_dict(learning.state_dict())
    np.testing.assert_array_equal(other.predict(seen)[0], learning.predict(seen)[0])


@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_learning_on_begins_as_what_was_learned(algorithm: str) -> None:
    policy, seen = some_policy(algorithm), some_observations()
    begun = AdaptivePolicy(policy, seed=2**40 + 5).learned
    np.testing.assert_array_equal(
        begun.predict(seen, deterministic=True)[0], policy.predict(seen, deterministic=True)[0]
    )


@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_what_is_learned_on_from_is_what_was_seen_and_done_and_came_of_it_scaled_as_in_training(algorithm: str) -> None:
    policy, (first, second, third) = some_policy(algorithm, reward_scale=4.0), some_observations()
    learning = AdaptivePolicy(policy)
    done = [learning.predict(first)[0]]
    learning.learn(2.0, second, True)
    done += [learning.predict(second)[0]]
    learning.learn(-1e9, third, False)
    held = learning.model.rollout_buffer if algorithm == "ppo" else learning.model.replay_buffer
    np.testing.assert_allclose(held.observations[:2, 0], policy.seen([first, second]))
    np.testing.assert_allclose(np.clip(held.actions[:2, 0], -1, 1), done)
    assert held.rewards[:2, 0].tolist() == [0.5, -10.0], "the bound is that of training"
    if algorithm == "ppo":
        assert held.episode_starts[:2, 0].tolist() == [1.0, 1.0]
        learning.predict(third)
        learning.learn(0.0, third, False)
        assert held.episode_starts[2, 0] == 0.0
    else:
        np.testing.assert_allclose(held.next_observations[:2, 0], policy.seen([second, third]))
        assert held.dones[:2, 0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("ended", [False, True])
def test_an_on_policy_algorithm_learns_on_every_16_rounds_from_what_the_state_it_came_to_is_worth(
    ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    learning, (seen, reached, _) = AdaptivePolicy(some_policy()), some_observations()
    told: list[Any] = []
    monkeypatch.setattr(
        learning.model.rollout_buffer, "compute_returns_and_advantage", lambda **facts: told.append(facts)
    )
    worth = float(learning.value(reached))  # type: ignore[arg-type]
    for n in range(20):
        assert np.abs(learning.predict(seen)[0]).max() <= 1.0, "drawn, and within what an action is"
        learning.learn(0.1, reached, ended and n == 15)
    (facts,) = told
    assert facts["last_values"].item() == pytest.approx(worth, rel=1e-5)
    assert facts["dones"].tolist() == [ended]


@pytest.mark.parametrize(("given", "batch"), [({"batch_size": 8}, 8), ({"batch_size": 1024}, 64), ({}, 64)])
def test_an_off_policy_algorithm_learns_on_after_each_round_once_it_has_a_batch(
    given: dict[str, int], batch: int
) -> None:
    learning, seen = AdaptivePolicy(some_policy("sac", arguments=given)), some_observations()[0]
    for n in range(batch + 1):
        learning.predict(seen)
        learning.learn(0.1, seen, False)
        assert learning.diagnostics(seen)["updates"] == max(n + 2 - batch, 0)


def test_learning_on_needs_no_real_images() -> None:
    assert AdaptivePolicy(some_policy(reward="validation")).reward == "area"
    assert AdaptivePolicy(some_policy(reward="outcome")).reward == "area"
    assert AdaptivePolicy(some_policy(reward="probe")).reward == "probe"


def test_a_policy_is_trained_on_a_reward_by_import_path_that_its_file_does_not_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rewards_of_mine.py").write_text("def kept(engine, before, after):\n    return after['accepted']\n")
    with monkeypatch.context() as patched:
        patched.syspath_prepend(tmp_path)
        assert train.main(train_flags(tmp_path, "ppo", "--steps", "16", "--reward", "rewards_of_mine:kept")) == 0
    del sys.modules["rewards_of_mine"]
    policy = load_policy(only_run(tmp_path) / "policy.safetensors")
    assert policy.description.reward == "rewards_of_mine:kept"
    assert AdaptivePolicy(policy).reward == "area"
    assert "rewards_of_mine" not in sys.modules


# ----------------------------------------------------------------------------------------------------
# Families of tasks
# ----------------------------------------------------------------------------------------------------


def test_axes_span_the_tasks() -> None:
    axes = {
        "student": [{"student": {"arguments": {"widths": [4, 8, 8]}}}, {"student": {"name": "convnet_small"}}],
        "budget": [{"rounds": 2}, {"rounds": 3}, {"rounds": 4}],
    }
    family = TasksConfig(base="digits", common={"threads": 1}, tasks=[{"rounds": 9}], axes=axes)
    tasks = training_tasks(family)
    assert len(tasks) == 1 + 2 * 3
    assert sorted(task["rounds"] for task in tasks) == [2, 2, 3, 3, 4, 4, 9]
    assert all(task["threads"] == 1 for task in tasks)
    assert held_out_tasks(family) == tasks, "without held-out tasks, the training tasks"
    assert len({name_of(task) for task in tasks}) == len(tasks)


def test_a_family_without_tasks_is_its_base_alone() -> None:
    assert training_tasks(TasksConfig()) == [{}]
    assert training_tasks(TasksConfig(common={"rounds": 9})) == [{"rounds": 9}]


def test_what_a_task_sets_goes_before_what_all_share() -> None:
    family = TasksConfig(common={"rounds": 9, "buffer": {"capacity": 150, "views": 1}}, tasks=[{"rounds": 2}, {}])
    family.held_out = [{"buffer": {"capacity": 160}}]
    assert [task["rounds"] for task in training_tasks(family)] == [2, 9]
    assert held_out_tasks(family) == [{"rounds": 9, "buffer": {"capacity": 160, "views": 1}}]


def test_a_task_is_known_by_the_settings_that_set_it_apart() -> None:
    task = {"teacher": {"checkpoint": "/far/away/wide.safetensors"}, "student": {"arguments": {"widths": [4, 8]}}}
    long = {"threads": 1, "data_root": "/far", "image": {"height": 8}, "inversion": {"terms": {"one_hot": 1.0}}}
    assert name_of({**task, "rounds": 3, **long}) == "wide widths=4-8 rounds=3"
    assert name_of({}) == "base"


def test_a_models_arguments_are_replaced_as_a_whole() -> None:
    below = {"teacher": {"name": "convnet", "arguments": {"widths": [4], "depth": 2}}}
    over = {"teacher": {"arguments": {"widths": [8]}}}
    assert merged(below, over) == {"teacher": {"name": "convnet", "arguments": {"widths": [8]}}}


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"tasks": [{"rouns": 1}]}, "rouns"),
        ({"axes": {"budget": {"rounds": 3}}}, "axes.budget"),
        ({"axes": {"budget": []}}, "axes.budget"),
        ({"axes": {"budget": [{"rounds": 3}, 4]}}, "axes.budget"),
        ({"tasks": [{"teacher": {"checkpoint": "nobody.safetensors"}}]}, "make_family"),
        ({"base": "no_such_config"}, "no_such_config"),
    ],
)
def test_a_family_is_checked_before_hours_are_spent(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        training_tasks(TasksConfig(**fields))


def test_teachers_and_images_are_looked_for_in_their_folder_or_where_their_path_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, far = tmp_path / "home", tmp_path / "far"
    for folder in (home / "teachers", far):
        folder.mkdir(parents=True)
        (folder / "wide.safetensors").touch()
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.chdir(tmp_path)
    here, afar = ({"teacher": {"checkpoint": f"{at}wide.safetensors"}, "data_root": f"{at}x.npz"} for at in ("", "~/"))
    (home / "wide.safetensors").touch()
    family = {"base": "digits", "tasks": [here, afar, {"teacher": {"checkpoint": "embedded"}}]}
    (tmp_path / "family.yaml").write_text(yaml.safe_dump({**family, "teachers_root": "~/teachers"}))
    for named, root in ((None, home / "teachers"), ("far", far)):
        first, second, third = training_tasks(family_from("family.yaml", named))
        for task, folder in ((first, root), (second, home)):
            assert task["teacher"]["checkpoint"] == str((folder / "wide.safetensors").resolve())
            assert task["data_root"] == str((folder / "x.npz").resolve())
        assert third["teacher"]["checkpoint"] == "embedded"


def test_a_family_is_known_by_what_it_trains_on_in_whatever_order_it_says_so(tmp_path: Path) -> None:
    def digest(text: str) -> str:
        (tmp_path / "family.yaml").write_text(text)
        return digest_of(str(tmp_path / "family.yaml"))

    known = digest("base: digits\ntasks: [{rounds: 2, seed: 1}]\n")
    assert (
        digest("tasks: [{seed: 1, rounds: 2}]\nbase: digits\nheld_out: [{rounds: 9}]\nteachers_root: /far\n") == known
    )
    assert digest("base: digits\ntasks: [{rounds: 3, seed: 1}]\n") != known
    assert digest("base: mnist\ntasks: [{rounds: 2, seed: 1}]\n") != known


def test_a_setting_is_checked_once_however_many_tasks_it_is_part_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the hundreds of tasks that axes span are checked in a second."""
    checks: list[Any] = []
    monkeypatch.setattr("agents.tasks.build", lambda schema, layers: checks.append(layers))
    axes = {"rounds": [{"rounds": n} for n in range(1, 9)], "views": [{"buffer": {"views": n}} for n in range(1, 9)]}
    assert len(training_tasks(TasksConfig(axes=axes))) == 64
    assert len(checks) == 8 + 8 - 1, "the first task has one of each"


@pytest.mark.parametrize("wrong", [{"views": -1}, {"views": {}}, {"views": [2]}, {"viws": 2}, {"rounds": 1}])
def test_the_one_setting_that_is_wrong_is_found_in_whatever_task_it_is(wrong: dict[str, Any]) -> None:
    buffers = [{"buffer": {"views": 2}}, {"buffer": {"views": 1}}, {"buffer": wrong}]
    rounds = [{"rounds": n} for n in range(1, 4)]
    with pytest.raises(ConfigError, match=r"buffer\."):
        training_tasks(TasksConfig(axes={"rounds": rounds, "buffer": buffers}))
    with pytest.raises(ConfigError, match=r"buffer\."):
        held_out_tasks(TasksConfig(held_out=buffers))


def shipped_where(**entries: float) -> Coefficients:
    """What the policy that ships sets where these entries of the observation are so, and all others 0."""
    seen = np.array([entries.get(entry.name, 0.0) for entry in ENTRIES], dtype=np.float32)
    return Coefficients.from_unit(load_policy().predict(seen, deterministic=True)[0])


@pytest.mark.parametrize(
    ("starting_share", "batch_norm", "doublings"),
    [(0.05, 0, -1), (0.39, 0, -1), (0.42, 0, 0), (0.95, 0, 0), (0.0, 1, 0), (0.9, 1, 0)],
)
def test_the_policy_that_ships_halves_batches_of_plain_networks_whose_steps_are_mostly_arithmetic(
    starting_share: float, batch_norm: int, doublings: int
) -> None:
    batch = shipped_where(starting_share=starting_share, batch_norm=batch_norm).batch
    assert round(math.log2(batch)) == doublings


def test_the_policy_that_ships_does_not_say_where_files_lay_when_it_was_trained() -> None:
    assert "/" not in json.dumps(load_policy().description.training)


def test_the_policy_that_ships_lets_the_learning_rate_fall_further_in_longer_runs() -> None:
    found = [shipped_where(steps=math.log10(steps) / 6).anneal for steps in (240, 1000, 6000, 16_000, 1e6)]
    assert found == sorted(found)
    assert found[0] < 0.5 < 0.7 < found[2] < found[3] < 0.9 < found[4]


def test_the_policy_that_ships_lets_worn_images_go_the_more_readily_the_longer_the_run() -> None:
    found = [shipped_where(steps=math.log10(steps) / 6).wear for steps in (240, 1000, 16_000)]
    assert found == pytest.approx([0.27, 0.48, 0.88], abs=0.02)


def test_the_shipped_family_is_whole(tmp_path: Path) -> None:
    from benchmarks.make_family import TEACHERS

    for name in TEACHERS:
        (tmp_path / f"{name}.safetensors").touch()
    family = family_from("family", str(tmp_path))
    tasks, held_out = training_tasks(family), held_out_tasks(family)
    assert len(tasks) == 550
    seen = {task.get("teacher", {}).get("checkpoint") for task in tasks}
    judged = {task["teacher"]["checkpoint"] for task in held_out}
    assert not seen & judged, "a held-out teacher must not be trained on"
    assert len(seen | judged) == len(TEACHERS)
    validation = {str(tmp_path / name) for name in ("validation.npz", "validation16.npz", "validation28.npz")}
    assert {task["data_root"] for task in tasks} == validation, "not the test digits"
    assert {task["data_root"] for task in held_out} == {None, str(tmp_path / "test16.npz")}, "the test digits"
    recipes = {str((tmp_path / f"{name}.safetensors").resolve()): recipe for name, recipe in TEACHERS.items()}
    for task in [*tasks, *held_out]:
        if "teacher" in task:
            recipe, arguments = recipes[task["teacher"]["checkpoint"]], task["teacher"]["arguments"]
            assert tuple(arguments["widths"]) == recipe.widths
            assert arguments.get("batch_norm", True) == recipe.batch_norm
            assert arguments.get("depth", 1) == recipe.depth


def test_policies_are_judged_on_digits_that_none_is_trained_on(tmp_path: Path) -> None:
    from benchmarks.make_family import save_images

    save_images(tmp_path)
    shipped = load_dataset("digits", None)
    judged, seen = (np.load(tmp_path / f"{name}16.npz") for name in ("test", "validation"))
    assert judged["images"].shape == (360, 16, 16, 1)
    assert np.array_equal(judged["labels"], shipped.labels.numpy())
    smaller = judged["images"].reshape(360, 8, 2, 8, 2).mean(axis=(2, 4))
    assert np.abs(smaller - shipped.images[:, 0].numpy()).mean() < 15, "the digits that ship, enlarged"
    known = {image.tobytes() for image in seen["images"]}
    assert not any(image.tobytes() in known for image in judged["images"])


# ----------------------------------------------------------------------------------------------------
# Training and evaluation
# ----------------------------------------------------------------------------------------------------


def tiny_family(tmp_path: Path) -> str:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**TINY, "rounds": 4}))
    family = {"base": str(tmp_path / "base.yaml"), "tasks": [{}, {"rounds": 3}], "held_out": [{"rounds": 5}]}
    path = tmp_path / "tiny-family.yaml"
    path.write_text(yaml.safe_dump(family))
    return str(path)


ARGUMENTS = {
    "ppo": "{n_steps: 8, batch_size: 16, n_epochs: 2, gamma: 1.0}",
    "a2c": "{n_steps: 8, gamma: 1.0}",
    "sac": "{learning_starts: 4, batch_size: 8, buffer_size: 100}",
    "td3": "{learning_starts: 4, batch_size: 8, buffer_size: 100}",
    f"{__name__}:OwnPPO": "{n_steps: 8, batch_size: 16, n_epochs: 2}",
}


def train_flags(tmp_path: Path, algorithm: str, *more: str) -> list[str]:
    config = tmp_path / "train.yaml"
    config.write_text(f"algorithm: {algorithm}\narguments: {ARGUMENTS[algorithm]}\nnet_arch: [8]\n")
    flags = ["--family", tiny_family(tmp_path), "--out", str(tmp_path / "runs"), "--environments", "2", "--quiet"]
    return ["--config", str(config), *flags, "--processes", "false", "--checkpoint-every", "16", *more]


@pytest.mark.parametrize("algorithm", ARGUMENTS)
def test_training_leaves_a_policy_curves_and_checkpoints(algorithm: str, tmp_path: Path) -> None:
    evaluation = ["--evaluate-seeds", "1" if algorithm == "ppo" or ":" in algorithm else "0"]
    flags = train_flags(tmp_path, algorithm, "--steps", "32", "--log-every", "8", *evaluation)
    assert train.main(flags) == 0
    folder = only_run(tmp_path)
    policy = load_policy(folder / "policy.safetensors", trust=":" in algorithm)
    assert policy.description.training["steps"] >= 32
    assert str(tmp_path) not in str(policy.description), "where its files lay is nobody's business"
    assert not np.allclose(policy.mean, 0), "observations were normalised by their statistics"
    shown = EventAccumulator(str(folder), {"histograms": 0}).Reload()
    patterns = {tag: re.compile(re.sub(r"\\{\w+\\}", r"\\w+", re.escape(tag.name))) for tag in curves.TAGS}
    for kind, names in (("scalar", shown.Tags()["scalars"]), ("histogram", shown.Tags()["histograms"])):
        planned = {tag: pattern for tag, pattern in patterns.items() if tag.kind == kind}
        assert all(any(pattern.fullmatch(name) for pattern in planned.values()) for name in names)
        for tag, pattern in planned.items():
            if algorithm == "ppo" or not tag.name.startswith("evaluation/"):
                assert any(pattern.fullmatch(name) for name in names), tag.name
    steps = [event.step for event in shown.Scalars("coefficients/alpha_mean")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 32
    tried = shown.Histograms("coefficients/alpha")
    assert sum(event.histogram_value.num for event in tried) == 32, "every round counts once"
    assert tried[0].histogram_value.sum / tried[0].histogram_value.num == pytest.approx(
        shown.Scalars("coefficients/alpha_mean")[0].value, rel=1e-5
    )
    assert all(2 <= event.value <= 16 for event in shown.Scalars("episodes/rounds"))
    if algorithm == "ppo":
        (judged,) = map(json.loads, (folder / "evaluation.jsonl").read_text().splitlines())
        assert set(judged) == {"steps", "learned", "uniform", "random", "ssdkd"}
        for policy in ("learned", "uniform", "random", "ssdkd"):
            (event,) = shown.Scalars(f"evaluation/accuracy_percent_{policy}")
            assert event.step == judged["steps"] == 32
            assert event.value == pytest.approx(judged[policy]["accuracy"])
    if ":" in algorithm:
        with pytest.raises(CheckpointError, match="import"):
            load_policy(folder / "policy.safetensors")


def test_a_resumed_training_continues_its_curves_without_doubled_points(tmp_path: Path) -> None:
    """Killed after step 48, it goes on from step 32: what came later is forgotten, then comes anew."""
    flags = train_flags(tmp_path, "ppo", "--evaluate-seeds", "1", "--evaluate-every", "32", "--log-every", "8")
    assert train.main([*flags, "--steps", "48"]) == 0
    folder = only_run(tmp_path)
    held = sorted((folder / "checkpoints").iterdir())
    assert len(held) == 2
    held[-1].unlink()
    with (folder / "evaluation.jsonl").open("ab") as file:
        file.write(b'{"steps": 1, "learned": {"accuracy": 9.0}\n\xff{}\n[]')  # what a kill may leave
    for _ in range(2):  # the second time nothing is left to do, and nothing is written
        assert train.main(["--resume", str(folder), "--steps", "64", "--quiet"]) == 0
    shown = EventAccumulator(str(folder), {"histograms": 0}).Reload()
    assert [event.step for event in shown.Scalars("coefficients/alpha_mean")] == [16, 32, 48, 64]
    assert [event.step for event in shown.Histograms("coefficients/alpha")] == [16, 32, 48, 64]
    assert [event.step for event in shown.Scalars("evaluation/agreement_percent_learned")] == [32, 64]
    judged = [json.loads(line)["steps"] for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    assert judged == [32, 64]


def test_the_page_lists_what_a_training_shows() -> None:
    page = (Path(train.__file__).parent.parent / "docs" / "tensorboard.md").read_text(encoding="utf-8")
    for table in tables(curves.TAGS, curves.GROUPS).strip().split("\n\n### "):
        assert table in page, "paste what `python -m agents.curves` prints into docs/tensorboard.md"
    assert {group_of(tag) for tag in curves.TAGS} == set(curves.GROUPS)


def test_a_policy_is_trained_on_the_entries_and_coefficients_that_are_named(tmp_path: Path) -> None:
    named = ["--observe", "[progress, probe_kl]", "--act", "[effort]", "--evaluate-seeds", "0", "--steps", "16"]
    assert train.main(train_flags(tmp_path, "ppo", *named)) == 0
    policy = load_policy(only_run(tmp_path) / "policy.safetensors")
    assert policy.description.observations == ["progress", "probe_kl"]
    assert policy.description.actions == ["effort"]


@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_training_goes_on_with_all_that_it_had(
    algorithm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = train_flags(tmp_path, algorithm, "--evaluate-seeds", "0")
    assert train.main([*flags, "--steps", "32"]) == 0
    folder = only_run(tmp_path)
    state, path, _ = checkpoint.load_newest(folder / "checkpoints")
    assert state["learner"]["timesteps"] == 32
    config, _ = train._read([], str(folder / "config.yaml"))
    family = family_from(config.family)
    again = train.Training(config, training_tasks(family), family.base)
    again.load_state_dict(checkpoint.load(path))
    assert_same(checkpoint_form(again.state_dict(), tmp_path), state)
    again.vector.close()
    assert train.main(["--resume", str(folder), "--steps", "48", "--quiet"]) == 0
    after, _, _ = checkpoint.load_newest(folder / "checkpoints")
    assert after["learner"]["timesteps"] == 48
    assert after["learner"]["updates"] > state["learner"]["updates"]
    assert after["scales"]["observation"]["count"] > state["scales"]["observation"]["count"]
    del after["episodes"]
    checkpoint.save(folder / "checkpoints", after, 99)
    assert train.main(["--resume", str(folder), "--steps", "64", "--quiet"]) == 2
    assert "the checkpoint does not fit this training ('episodes')" in capsys.readouterr().err


def test_a_training_goes_on_only_with_the_tasks_that_it_began_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained(tmp_path, "ppo", "--evaluate-seeds", "0", "--steps", "16")
    family = tmp_path / "tiny-family.yaml"
    written = yaml.safe_load(family.read_text())
    family.write_text(yaml.safe_dump({**written, "tasks": [{"rounds": 50}, {"rounds": 60}]}))
    assert train.main(["--resume", str(folder), "--steps", "32", "--quiet"]) == 2
    assert capsys.readouterr().err.startswith(f"error: the tasks of {family} have changed since the training began")
    family.write_text(yaml.safe_dump({**written, "held_out": [], "teachers_root": str(tmp_path)}))
    assert train.main(["--resume", str(folder), "--steps", "32", "--quiet"]) == 0


def test_a_training_may_begin_with_a_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = trained(tmp_path, "ppo", "--evaluate-seeds", "0", "--steps", "32") / "policy.safetensors"
    flags = train_flags(tmp_path, "ppo", "--evaluate-seeds", "0", "--steps", "16", "--seed", "5", "--begin", str(first))
    config, _ = train._read(flags, "train-digits")
    family = family_from(config.family)
    second = train.Training(config, training_tasks(family), family.base)
    begun, seen = load_policy(first), some_observations()
    second.begin_as(begun)
    assert np.array_equal(
        second.policy().predict(seen, deterministic=True)[0], begun.predict(seen, deterministic=True)[0]
    )
    second.vector.close()
    assert train.main(flags) == 0, "and it learns on"
    folders = len(list((tmp_path / "runs").iterdir()))
    assert train.main([*flags, "--net-arch", "[4]"]) == 2
    assert "begin: the policy's net_arch is [8] and here it is [4]" in capsys.readouterr().err
    assert train.main([*flags, "--arguments", "{use_sde: true}"]) == 2
    assert "begin: the policy's use_sde is False and here it is True" in capsys.readouterr().err
    assert train.main([*flags, "--begin", "nowhere.safetensors"]) == 2
    assert len(list((tmp_path / "runs").iterdir())) == folders
    assert train.main([*flags, "--net-arch", "[4]", "--out", str(tmp_path / "new" / "runs")]) == 2
    assert not (tmp_path / "new").exists()


def trained(tmp_path: Path, algorithm: str, *more: str) -> Path:
    """Train, and -> the folder."""
    before = set((tmp_path / "runs").glob("*"))
    assert train.main(train_flags(tmp_path, algorithm, "--log-every", "8", *more)) == 0
    (folder,) = set((tmp_path / "runs").glob("*")) - before
    return folder


@pytest.mark.parametrize(
    ("algorithm", "processes"),
    [("ppo", "false"), ("sac", "false"), pytest.param("sac", "true", marks=pytest.mark.slow)],
)
def test_a_resumed_training_ends_with_the_policy_of_an_uninterrupted_one(
    algorithm: str, processes: str, tmp_path: Path
) -> None:
    """Cut in the middle of episodes."""
    cut_at = "22" if algorithm == "sac" else "16"
    seed = "0" if algorithm == "sac" else "2"  # by which an episode goes on over the cut
    flags = ["--processes", processes, "--evaluate-seeds", "0", "--seed", seed]
    whole = trained(tmp_path, algorithm, *flags, "--steps", "40")
    cut = trained(tmp_path, algorithm, *flags, "--steps", cut_at)
    episodes = checkpoint.load_newest(cut / "checkpoints")[0]["episodes"]["each"]
    assert any(episode["rewards"] for episode in episodes), "an episode was being played"
    assert train.main(["--resume", str(cut), "--steps", "40", "--quiet"]) == 0
    assert (cut / "policy.safetensors").read_bytes() == (whole / "policy.safetensors").read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_lets_the_rollout_finish_and_the_training_goes_on_to_the_same_policy(
    name: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--steps", "40", "--evaluate-seeds", "0", "--checkpoint-every", "0"]
    whole = trained(tmp_path, "ppo", *flags)
    on_step = train.Record._on_step

    def signalled(self: Any) -> bool:
        if self.model.num_timesteps == 6:
            os.kill(os.getpid(), getattr(signal, name))
        return on_step(self)

    with monkeypatch.context() as patched:
        patched.setattr(train.Record, "_on_step", signalled)
        assert train.main(train_flags(tmp_path, "ppo", "--log-every", "8", *flags)) == code
    (stopped,) = set((tmp_path / "runs").iterdir()) - {whole}
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"stopped by {name}; the training is saved as of step 16 and goes on with: ")
    assert said.endswith(f"python -m agents.train --resume {stopped}")
    assert train.main(["--resume", str(stopped), "--quiet"]) == 0
    assert (stopped / "policy.safetensors").read_bytes() == (whole / "policy.safetensors").read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_signal_during_an_evaluation_stops_the_training_after_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "judge_on", lambda *_: lambda steps: os.kill(os.getpid(), signal.SIGINT) or {})
    flags = ["--steps", "64", "--evaluate-seeds", "1", "--evaluate-every", "16", "--checkpoint-every", "0"]
    assert train.main(train_flags(tmp_path, "ppo", *flags)) == 130
    assert "the training is saved as of step 16 and goes on with: " in capsys.readouterr().err


def test_an_environment_whose_process_ends_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*_: Any, **__: Any) -> None:
        raise EOFError

    monkeypatch.setattr("stable_baselines3.common.vec_env.DummyVecEnv.step_wait", ended)
    monkeypatch.setattr("stable_baselines3.common.vec_env.SubprocVecEnv.__init__", ended)
    for processes in ("false", "true"):  # the second as it begins
        assert train.main(train_flags(tmp_path, "ppo", "--steps", "16", "--processes", processes)) == 2
        said = capsys.readouterr().err
        assert "error: a process that played an episode has ended" in said
        assert said.count("\n") == 1
        assert (Path(said.split()[-1].rstrip(".")) / "config.yaml").is_file(), "to go on with"


def test_a_task_that_cannot_be_played_in_a_process_of_its_own_is_a_sentence_and_leaves_no_folder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = train_flags(tmp_path, "ppo", "--steps", "16", "--processes", "true")
    family = tmp_path / "tiny-family.yaml"
    family.write_text(f"base: {tmp_path / 'base.yaml'}\ntasks: [{{buffer: {{capacity: 2}}}}]\n")
    assert train.main(flags) == 2
    told = capfd.readouterr().err
    assert "error: buffer.capacity is 2 but distillation.batch is 16" in told
    assert told.endswith("error: an episode could not be played, for the reason above.\n")
    assert "Traceback" not in told
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_a_training_killed_at_a_random_moment_ends_with_the_same_policy(algorithm: str, tmp_path: Path) -> None:
    flags = ["--steps", "96", "--evaluate-seeds", "0"]
    whole = trained(tmp_path, algorithm, *flags)
    before = set((tmp_path / "runs").iterdir())
    variables = {**os.environ, "PYTHONPATH": str(Path(train.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "agents.train", *train_flags(tmp_path, algorithm, "--log-every", "8", *flags)]
    with subprocess.Popen(argv, env=variables, stdout=subprocess.DEVNULL) as process:
        while not [folder for folder in (tmp_path / "runs").iterdir() if folder not in before]:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(random.uniform(0.0, 6.0))
        process.kill()
    assert process.returncode in (-9, 0)
    (killed,) = set((tmp_path / "runs").iterdir()) - before
    assert train.main(["--resume", str(killed), "--quiet"]) == 0
    assert (killed / "policy.safetensors").read_bytes() == (whole / "policy.safetensors").read_bytes()


def test_evaluations_leave_the_training_as_it_is(tmp_path: Path) -> None:
    alone = trained(tmp_path, "ppo", "--steps", "48", "--evaluate-seeds", "0")
    judged = trained(tmp_path, "ppo", "--steps", "48", "--evaluate-seeds", "1", "--evaluate-every", "16")
    assert len((judged / "evaluation.jsonl").read_text().splitlines()) == 3
    one, other = (load_policy(folder / "policy.safetensors") for folder in (alone, judged))
    assert_same(dict(one.network.state_dict()), dict(other.network.state_dict()))


def checkpoint_form(state: Any, tmp_path: Path) -> Any:
    """A state as it comes back from a file."""
    return checkpoint.load(checkpoint.save(tmp_path / "form", state, 0))


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--algorithm", "dreamer"], "dreamer"),
        (["--algorithm", "no_such_package:Agent"], "no_such_package"),
        (["--algorithm", "pathlib:Path"], "not a Stable-Baselines3"),
        (["--arguments", "{n_stps: 3}"], "n_stps"),
        (["--arguments", "{gamma: high}"], "arguments: ppo takes a number for gamma, got 'high'."),
        (["--arguments", "{clip_range: [0.1]}"], "takes a number for clip_range"),
        (["--arguments", "{max_grad_norm: .inf}"], "max_grad_norm holds a number that is not finite"),
        (["--algorithm", EVOLUTION, "--arguments", "{rate: high}"], "takes a number for rate"),
        (["--algorithm", EVOLUTION, "--arguments", "{gae_lambda: null}"], "takes a number for gae_lambda"),
        (["--algorithm", EVOLUTION, "--arguments", "{pairs: 0}"], "pairs must be at least 1"),
        (["--algorithm", EVOLUTION, "--arguments", "{spread: 0}"], "spread must be above 0"),
        (["--algorithm", EVOLUTION, "--arguments", "{start: {effort: 0}}"], "start sets effort to 0, which is not"),
        (["--algorithm", EVOLUTION, "--arguments", "{start: {alpha: 9}}"], "start sets alpha to 9, which is"),
        (["--arguments", "{n_epochs: 0}"], "ppo cannot learn with the arguments given"),
        (["--algorithm", "td3", "--arguments", "{policy_delay: 0, learning_starts: 0}"], "td3 cannot learn"),
        (["--observe", "[progress, wisdom]"], "wisdom"),
        (["--act", "[alpha, alpha]"], "twice"),
        (["--observe", "[]"], "there must be at least one observation"),
        (["--act", "[]"], "there must be at least one coefficient"),
        (["--reward", "fame"], "reward"),
        (["--reward", "no_such_module:reward"], "reward: no_such_module:reward cannot be imported"),
        (["--family", "no_family"], "no_family"),
    ],
)
def test_a_training_that_cannot_be_is_refused_in_one_sentence_and_leaves_no_folder(
    flags: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*train_flags(tmp_path, "ppo", "--steps", "16"), *flags]) == 2
    told = capsys.readouterr().err
    assert word in told
    assert told.count("\n") == 1
    assert not list(tmp_path.glob("runs/*"))


def test_an_algorithm_whose_module_fails_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_agents.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"^algorithm: broken_agents:Agent cannot be imported: RuntimeError: no lic"):
        algorithm_class("broken_agents:Agent")


@pytest.mark.parametrize(
    "flags",
    [
        ["--observe", "[wisdom]"],
        ["--act", "[alpha, alpha]"],
        ["--arguments", "{gamma: high}"],
        ["--arguments", "{n_steps: 0}"],
        ["--arguments", "{buffer: 3}"],
        ["--algorithm", "sac", "--arguments", "{buffer_size: 1_000_000_000_000_000}"],
        ["--family", "nofile"],
        *(["--net-arch", layers] for layers in ("[2048]", "[0]", "[-3]", "[8, 8, 8, 8, 8, 8, 8]")),
    ],
    ids=" ".join,
)
def test_what_cannot_be_trained_is_noticed_before_there_is_a_folder(flags: list[str], tmp_path: Path) -> None:
    assert train.main([*train_flags(tmp_path, "ppo", "--steps", "16"), *flags]) == 2
    assert not (tmp_path / "runs").exists()


def test_another_algorithm_begins_without_the_arguments_of_the_one_before() -> None:
    usual, _ = train._read([], "train-digits")
    other, _ = train._read(["--algorithm", "sac"], "train-digits")
    assert "pairs" in usual.arguments
    assert (other.algorithm, other.arguments, other.family) == ("sac", {}, usual.family)
    given, _ = train._read(["--algorithm", "sac", "--arguments", "{batch_size: 8}"], "train-digits")
    assert given.arguments == {"batch_size": 8}
    same, _ = train._read(["--arguments", "{moves: [effort]}"], "train-digits")
    assert same.arguments == {**usual.arguments, "moves": ["effort"]}


def test_the_help_names_the_config_that_is_taken_where_none_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--help"])
    assert "(default: train-digits, whose values go before the defaults below)" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_reward_of_accuracy_needs_tasks_with_an_evaluation_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = train_flags(tmp_path, "ppo", "--steps", "16", "--reward", "outcome")
    image = {"channels": 1, "height": 8, "width": 8, "classes": 10, "mean": [0.3], "std": [0.4]}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**TINY, "rounds": 4, "dataset": None, "image": image}))
    assert train.main(asked) == 2
    assert "no evaluation set" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_evaluation_compares_policies_on_the_same_episodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some_policy().save(tmp_path / "p.safetensors")
    flags = ["--config", tiny_family(tmp_path), "--seeds", "2", "--policy", str(tmp_path / "p.safetensors")]
    out = tmp_path / "a new folder" / "episodes.jsonl"
    assert evaluate.main([*flags, "--out", str(out), "--policies", "[uniform, ssdkd]"]) == 0
    episodes = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(episodes) == 3 * 2
    assert {e["task"] for e in episodes} == {"rounds=5"}
    assert all(0.8 < e["spent"] < 1.2 for e in episodes)
    assert all(0 <= e["accuracy_area"] <= 100 for e in episodes)
    shown = capsys.readouterr().out
    assert "accuracy_area" in shown
    of = {(e["policy"], e["seed"]): e["accuracy_area"] for e in episodes}
    gaps = [of["ssdkd", seed] - of["uniform", seed] for seed in (1000, 1001)]
    expected = f"{np.mean(gaps):+.2f} ({np.std(gaps, ddof=1) / 2**0.5:.2f})"
    assert f"accuracy_area {expected}" in shown.partition("above uniform")[2]
    evaluate.show([evaluate.Episode(**e) for e in episodes if e["seed"] == 1000])
    assert "above" not in capsys.readouterr().out, "of one pair no standard error is known"
    again = evaluate.play("uniform", *base_and_task(tmp_path), seed=1000)
    assert again.accuracy_area == episodes[0]["accuracy_area"], "the same seed gives the same episode"


def test_tasks_of_one_name_are_told_apart_and_compared_each_with_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They differ in what a name does not tell, such as the terms of the search."""
    accuracy = {("uniform", 0.0): 50.0, ("ssdkd", 0.0): 52.0, ("uniform", 1.0): 90.0, ("ssdkd", 1.0): 94.0}

    def play(name: str, base: str, task: dict[str, Any], *rest: Any) -> evaluate.Episode:
        right = accuracy[name, task["inversion"]["terms"]["balance"]]
        return evaluate.Episode(name, name_of(task), 0, 1.0, 1.0, 50.0, 60.0, right, 9, 1.0, 2.0)

    monkeypatch.setattr(evaluate, "play", play)
    alike = [{"rounds": 5, "inversion": {"terms": {"balance": weight}}} for weight in (0.0, 1.0)]
    episodes = list(evaluate.evaluate(["uniform", "ssdkd"], "digits", alike, [0]))
    assert [e.task for e in episodes] == ["rounds=5 (1)", "rounds=5 (1)", "rounds=5 (2)", "rounds=5 (2)"]
    assert evaluate.difference(episodes, "ssdkd", "uniform", "accuracy") == pytest.approx((3.0, 1.0))
    evaluate.show(episodes)
    shown = capsys.readouterr().out
    assert shown.count("rounds=5 (") == 2
    assert "all tasks (interquartile means; episodes of each policy: 2)" in shown


def test_a_summary_tells_each_policy_by_its_own_episodes_and_nothing_of_what_none_knows() -> None:
    def episode(name: str, seed: int, accuracy: float | None) -> evaluate.Episode:
        return evaluate.Episode(name, "a task", seed, 2.0, 1.0, 50.0 + seed, None, accuracy, 9, 1.0, 2.0)

    told = evaluate.summary([episode(n, s, a) for n, a in (("ssdkd", 80.0), ("blind", None)) for s in (0, 1)])
    assert told["ssdkd"] == {"accuracy": 80.0, "probe_area": 2.0, "agreement": 50.5}
    assert told["blind"] == {"probe_area": 2.0, "agreement": 50.5}


def test_an_evaluation_stopped_by_ctrl_c_keeps_the_episodes_that_have_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def play(ends: int, name: str, base: str, task: dict[str, Any], seed: int, *rest: Any) -> evaluate.Episode:
        if seed == ends:
            raise KeyboardInterrupt
        return evaluate.Episode(name, name_of(task), seed, 1.0, 1.0, 50.0, 60.0, 70.0, 9, 1.0, 2.0)

    out = tmp_path / "episodes.jsonl"
    for ends in (1002, 1000):  # the second time before anything: what an earlier evaluation wrote stays
        monkeypatch.setattr(evaluate, "play", functools.partial(play, ends))
        flags = ["--config", tiny_family(tmp_path), "--policies", "[uniform]", "--out", str(out)]
        assert evaluate.main(flags) == 130
        assert capsys.readouterr().err.startswith("stopped; ")
        assert [json.loads(line)["seed"] for line in out.read_text().splitlines()] == [1000, 1001]


def test_a_sample_of_the_tasks_is_drawn_by_its_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[int]] = []

    def note(names: Any, base: str, tasks: list[Any], *rest: Any) -> list[evaluate.Episode]:
        drawn.append([task["rounds"] for task in tasks])
        return [evaluate.Episode("uniform", "a task", 0, 1.0, 1.0, 50.0, 60.0, 70.0, 9, 1.0, 2.0)]

    monkeypatch.setattr(evaluate, "evaluate", note)
    family = tmp_path / "family.yaml"
    family.write_text(yaml.safe_dump({"base": "digits", "tasks": [{"rounds": n} for n in range(1, 31)]}))
    for seed in ("7", "7", "8"):
        flags = ["--config", str(family), "--on", "tasks", "--sample", "5", "--first-seed", seed]
        assert evaluate.main(flags) == 0
    assert drawn[0] == drawn[1] != drawn[2]
    assert [len(set(tasks)) for tasks in drawn] == [5, 5, 5]


def base_and_task(tmp_path: Path) -> tuple[str, dict[str, Any]]:
    family = family_from(str(tmp_path / "tiny-family.yaml"))
    return family.base, held_out_tasks(family)[0]


def test_an_episode_is_judged_by_its_curves_over_the_budget_and_by_its_end(tmp_path: Path) -> None:
    tiny_family(tmp_path)
    base, task = base_and_task(tmp_path)
    env, policy = SampleSelectionEnv(base, tasks=[task], reward="area"), fixed_policy("random", 1007)
    played = [
        (told["statistics"], progress, env.engine.accuracy(env.engine.student))
        for _, told, progress, _ in rounds_of(env, policy, 1007)
    ]
    last, at, right = (list(column) for column in zip(*played, strict=True))
    assert len(at) % 2 == 0, "the last round is not among every second one"
    found = evaluate.play("random", base, task, 1007, accuracy_every=2)
    logs = [math.log(statistics["probe_kl"]) for statistics in last]
    assert found.probe_area == pytest.approx(area_under(at, [logs[0] - log for log in logs]))
    assert found.accuracy_area == pytest.approx(area_under([*at[::2], at[-1]], [*right[::2], right[-1]]))
    assert (found.accuracy, found.rounds, found.seed) == (right[-1], len(at) - 1, 1007)
    assert (found.probe_kl, found.agreement) == (last[-1]["probe_kl"], 100.0 * last[-1]["probe_agreement"])
    at_the_end = evaluate.play("random", base, task, 1007, accuracy_every=0)
    assert (at_the_end.accuracy_area, at_the_end.accuracy) == (None, right[-1])


def test_coefficients_may_stand_for_a_policy() -> None:
    policy = evaluate.policy_by("{alpha: 0.75, beta: [0.0, 1.0]}", seed=0)
    late = np.zeros(len(ENTRIES), dtype=np.float32)
    late[NAMES.index("progress")] = 1.0
    first, last = (policy.predict(o)[0] for o in (np.zeros_like(late), late))
    assert first[ACTIONS.index("alpha")] == pytest.approx(0.0)
    assert (first[ACTIONS.index("beta")], last[ACTIONS.index("beta")]) == (-1.0, 1.0)
    for wrong in (
        "{alfa: 1}",
        "{alpha: 99}",
        "{alpha: [}",
        "{alpha: much}",
        "{alpha: [0.1, 0.9, 0.2]}",
        "{alpha: []}",
        "{alpha: [1, 9]}",
    ):
        with pytest.raises(ConfigError, match="policies"):
            evaluate.policy_by(wrong, seed=0)
    mappings = [{"alpha": 0.75, "beta": [0.0, 1.0]}, {r.name: r.neutral for r in RANGES}]
    assert evaluate.names_of(["ssdkd", *mappings])[:2] == ["ssdkd", "{alpha: 0.75, beta: [0.0, 1.0]}"]
    assert [yaml.safe_load(text) for text in evaluate.names_of(mappings)] == mappings
    for wrong in (3, None, ["alpha"]):
        with pytest.raises(ConfigError, match="policies: expected names and mappings of coefficients"):
            evaluate.names_of([wrong])


def test_a_curve_begins_where_the_budget_does() -> None:
    """A warm-up takes of a budget in minutes, so that the first progress is above 0."""

    class Late:
        def reset(self, seed: int) -> Any:
            return np.zeros(1), {"statistics": {"progress": 0.4}}

        def step(self, action: Any) -> Any:
            return np.zeros(1), 0.0, True, False, {"statistics": {"progress": 1.0}}

    class Idle:
        def predict(self, observation: Any, deterministic: bool) -> Any:
            assert deterministic, "whoever is judged does not explore"
            return np.zeros(1), None

    played: Any = rounds_of(Late(), Idle(), 0)  # type: ignore[arg-type]
    assert [progress for _, _, progress, _ in played] == [0.0, 1.0]


def test_numbers_that_yaml_takes_for_text_are_numbers() -> None:
    model = build_learner("ppo", Spaces(NAMES[:2], ACTIONS[:1]), [4], "tanh", yaml.safe_load("learning_rate: 3e-4"), 0)
    assert model.learning_rate == 3e-4


def test_means_and_areas() -> None:
    assert area_under([0.0, 0.5, 1.0], [0.0, 1.0, 1.0]) == pytest.approx(0.75)
    assert area_under([0.0, 0.5], [0.0, 1.0]) == pytest.approx(0.75), "after the last point the curve is level"
    assert interquartile_mean([1, 2, 3, 1000]) == pytest.approx(2.5)
    assert interquartile_mean([5.0]) == 5.0
    assert interquartile_mean([0, 1, 2, 3, 100]) == pytest.approx(2.0)


def test_policies_with_long_names_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"{{w_div: 1.46, refresh: 0.3, alpha: 0.42, eta: 0.2, gamma: {gamma}}}" for gamma in (0.0, 0.7)]
    evaluate.show([evaluate.Episode(name, "a task", 0, 1.0, 1.0, 50.0, 60.0, 70.0, 9, 1.0, 2.0) for name in names])
    shown = capsys.readouterr().out
    assert all(name in shown for name in names)
