"""Learning from whole episodes: it finds what is best, in fair pairs, and its policies serve as all others do."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import yaml
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from agents import train
from agents.adapt import AdaptivePolicy
from agents.evolution import Evolution, slope_of
from agents.learning import Pausable
from agents.policies import Description, load_policy, policy_of
from envs.spaces import ENTRIES
from ssdkd.coefficients import RANGES, Coefficients


class Bent(gymnasium.Env[np.ndarray, np.ndarray]):
    """Three rounds; the best action is half of what is seen in the first entry, from luck that the seed decides."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), dtype=np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), dtype=np.float32)
    actions = ["w_div", "alpha"]  # noqa: RUF012
    seeds: list[int | None] = []  # noqa: RUF012  (cleared by who counts)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.round, self.luck = 0, float(self.np_random.normal(0.0, 5.0))
        return self._see(), {}

    def _see(self) -> np.ndarray:
        self.seen = self.np_random.uniform(-1.0, 1.0, 2).astype(np.float32)
        return self.seen

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        miss = float(np.abs(action - np.array([0.5 * self.seen[0], 0.4])).sum())
        self.round += 1
        return self._see(), 0.1 * (self.luck - miss), self.round == 3, False, {}


def learner(environments: int = 2, net_arch: tuple[int, ...] = (), seed: int = 0, **arguments: Any) -> Evolution:
    vector = DummyVecEnv([lambda: Pausable(Bent())] * environments)
    kwargs = {"net_arch": list(net_arch), "activation_fn": torch.nn.Tanh}
    return Evolution("MlpPolicy", vector, policy_kwargs=kwargs, seed=seed, **arguments)


def test_it_learns_what_to_do_and_when() -> None:
    model = learner().learn(12_000)
    action, _ = model.predict(np.array([[0.8, 0.0], [-0.8, 0.0]], dtype=np.float32), deterministic=True)
    assert action[:, 0] == pytest.approx([0.4, -0.4], abs=0.15)
    assert action[:, 1] == pytest.approx([0.4, 0.4], abs=0.15)


def test_constants_do_not_look() -> None:
    model = learner(constant=True).learn(6_000)
    action, _ = model.predict(np.array([[0.8, 0.5], [-0.8, -0.5]], dtype=np.float32), deterministic=True)
    assert np.allclose(action[0], action[1])
    assert action[0] == pytest.approx([0.0, 0.4], abs=0.2)


@pytest.mark.parametrize("environments", [1, 2, 3])
def test_both_episodes_of_a_pair_begin_alike(environments: int) -> None:
    model = learner(environments, pairs=3)
    Bent.seeds.clear()
    model.learn(18)
    given = [seed for seed in Bent.seeds if seed is not None and seed > 1000]
    assert len(given) == 6
    assert sorted(given) == sorted(2 * sorted(set(given)))


def test_a_place_without_an_episode_plays_nothing_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    played, step = [0], Bent.step

    def counted(self: Bent, action: np.ndarray) -> Any:
        played[0] += 1
        return step(self, action)

    monkeypatch.setattr(Bent, "step", counted)
    alone, beside = (learner(environments, pairs=3).learn(36) for environments in (1, 7))
    assert played == [72], "two updates of six episodes of three rounds, twice"
    for mine, its in zip(alone.policy.parameters(), beside.policy.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_each_update_tries_other_noise_from_other_seeds_and_so_does_each_training() -> None:
    tried, given = [], []
    for seed in (0, 1):
        model = learner(pairs=2, seed=seed)
        Bent.seeds.clear()
        model.learn(24)
        given += [seed for seed in Bent.seeds if seed is not None and seed > 1000]
        tried += model.tried[:4].tolist()
    assert len(set(given)) == len(given) / 2 == 8
    assert len({tuple(noise) for noise in tried}) == 8


def test_what_a_weight_is_worth_is_found_by_ridge_regression_on_pairs_that_count_the_less_the_older_they_are() -> None:
    tried, told = torch.eye(2), torch.tensor([3.0, 6.0])
    assert slope_of(tried, told, torch.tensor([1.0, 0.5])).tolist() == pytest.approx([3.0 / 3.0, 3.0 / 2.5])


def test_an_update_moves_by_the_rate_that_it_documents() -> None:
    """Worked out by hand: two weights, each of which one pair tried by itself."""
    model = learner(constant=True, pairs=2, spread=0.2, rate=0.5, memory=0.5)
    model.set_logger(Logger(None, []))
    drawn, weights = 0.2 * torch.eye(2), model.policy.action_net.bias
    begun = weights.detach().clone()
    model._move(begun, drawn, torch.tensor([[5.006, 4.994], [1.0, 1.012]]))
    slopes = np.array([0.006, -0.006]) / (1 + 2)
    assert (weights - begun).tolist() == pytest.approx((0.2 * 100 * 0.5 * slopes).tolist(), rel=1e-3)
    model._current_progress_remaining = 0.0
    model._move(begun, drawn, torch.ones(2, 2))
    slopes = 0.5 * np.array([0.006, -0.006]) / (1 + 0.5 + 2)
    assert (weights - begun).tolist() == pytest.approx((0.2 * 20 * 0.5 * slopes).tolist(), rel=1e-3), "a fifth of it"
    model._move(begun, drawn, torch.tensor([[500.0, -500.0], [-500.0, 500.0]]))
    assert (weights - begun).tolist() == pytest.approx([0.2, -0.2]), "at most by the noise"
    model._move(torch.tensor([1.15, -1.15]), drawn, torch.tensor([[500.0, -500.0], [-500.0, 500.0]]))
    assert weights.tolist() == pytest.approx([1.2, -1.2]), "and hardly further out than actions go"


def test_noise_on_an_actions_weights_together_is_half_as_much_again_as_on_its_bias() -> None:
    model = learner(net_arch=(16,), spread=0.2)
    (weights, of_weights), (bias, of_bias) = model.moved[-2:]
    assert (weights.shape, bias.shape) == ((2, 16), (2,))
    assert of_bias == 0.2
    assert of_weights * 16**0.5 == pytest.approx(1.5 * 0.2)


def test_observations_are_scaled_by_those_of_the_first_update_and_the_rate_has_fallen_in_the_end() -> None:
    vector = VecNormalize(DummyVecEnv([lambda: Pausable(Bent())]))
    model = Evolution("MlpPolicy", vector, policy_kwargs={"net_arch": []}, seed=0, pairs=2)
    model.learn(12)
    seen = vector.obs_rms.count
    assert seen > 10
    model.learn(36, reset_num_timesteps=False)
    assert vector.obs_rms.count == seen
    assert model._current_progress_remaining == 0.0


def test_the_first_observation_of_an_episode_is_scaled_as_all_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    vector = VecNormalize(DummyVecEnv([lambda: Pausable(Bent())]), clip_obs=1000.0)
    vector.obs_rms.mean, vector.obs_rms.var, vector.obs_rms.count = np.full(2, 100.0), np.ones(2), 1e9
    model = Evolution("MlpPolicy", vector, policy_kwargs={"net_arch": []}, seed=0, pairs=1)
    model._n_updates = 1  # after which the scales stay
    seen, predict = [], model.policy.predict
    monkeypatch.setattr(model.policy, "predict", lambda o, **how: [seen.append(o), predict(o, **how)][1])
    model.learn(6)
    assert len(seen) == 6
    assert np.max(seen) < -90.0


def test_it_begins_where_it_is_told() -> None:
    model = learner(start={"w_div": 1.5, "alpha": 0.3}, acts=["alpha", "w_div"])  # of before; the environment knows
    action, _ = model.predict(np.zeros((1, 2), dtype=np.float32), deterministic=True)
    told = {"w_div": action[0, 0], "alpha": action[0, 1]}
    begun = Coefficients.from_unit([told.get(r.name, 0) for r in RANGES])
    assert begun.w_div == pytest.approx(1.5)
    assert begun.alpha == pytest.approx(0.3)
    spread = learner(spread=0.2).policy.log_std.exp()
    assert spread.tolist() == pytest.approx([0.1] * len(spread)), "what `--adapt` tries at first"


def test_its_policy_is_read_without_trust_and_goes_on_learning(tmp_path: Path) -> None:
    model = learner()
    told = Description(
        algorithm="agents.evolution:Evolution",
        net_arch=[],
        activation="tanh",
        observations=["progress", "making_share"],
        actions=["w_div", "alpha"],
        reward="validation",
        arguments={"pairs": 4, "acts": ["w_div", "alpha"], "start": {"effort": 2.0}},  # of before: not set
    )
    policy_of(model, told, np.zeros(2), np.ones(2)).save(tmp_path / "policy.safetensors")
    policy = load_policy(tmp_path / "policy.safetensors")
    seen = np.zeros(len(ENTRIES), dtype=np.float32)
    assert policy.predict(seen)[0].shape == (len(RANGES),)
    adaptive = AdaptivePolicy(policy, seed=0)
    before = [p.clone() for p in adaptive.model.policy.parameters()]
    for n in range(16):
        adaptive.predict(seen)
        adaptive.learn(0.1 * n, seen, False)
    assert any(not torch.equal(a, b) for a, b in zip(before, adaptive.model.policy.parameters(), strict=True))


def test_a_training_that_was_cut_off_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    small = {"images": 8, "steps": 1, "warmup": 2, "latent": 4, "width": 4}
    base = {
        "dataset": "digits",
        "teacher": {"name": "convnet", "arguments": {"widths": [48, 96, 128]}, "checkpoint": "embedded"},
        "student": {"name": "convnet_small", "arguments": {"widths": [4, 6, 8]}},
        "threads": 1,
        "inversion": small,
        "buffer": {"capacity": 20, "views": 1},
        "distillation": {"batch": 8, "steps": 1},
        "probe": {"images": 8},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    family = {"base": str(tmp_path / "base.yaml"), "tasks": [{"rounds": 2}, {"rounds": 3}]}
    (tmp_path / "family.yaml").write_text(yaml.safe_dump(family))
    training = {
        "algorithm": "agents.evolution:Evolution",
        "arguments": {"pairs": 2, "start": {"effort": 2.0}},
        "net_arch": [],
        "observe": ["progress"],
        "act": ["w_div", "effort"],
        "family": str(tmp_path / "family.yaml"),
        "environments": 1,
        "steps": 40,
        "evaluate_seeds": 0,
        "checkpoint_every": 1,
        "out": str(tmp_path / "runs"),
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(training))
    assert train.main(["--config", str(tmp_path / "train.yaml"), "--quiet"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    whole = (folder / "policy.safetensors").read_bytes()
    sorted((folder / "checkpoints").iterdir())[-1].unlink()  # killed before its last checkpoint
    (folder / "policy.safetensors").unlink()
    assert train.main(["--resume", str(folder), "--quiet"]) == 0
    assert (folder / "policy.safetensors").read_bytes() == whole


def test_only_what_moves_moves() -> None:
    model = learner(moves=["alpha"], start={"w_div": 1.5}).learn(6_000)
    head = model.policy.action_net.requires_grad_(False)
    assert head.weight[0].abs().max() == 0.0
    assert head.bias[0] == pytest.approx(0.5)
    assert float(head.bias[1]) == pytest.approx(0.4, abs=0.2)
    deep = learner(net_arch=(4,), moves=["alpha"], pairs=2)
    hidden = [p.clone() for p in deep.policy.mlp_extractor.policy_net.parameters()]
    deep.learn(60)
    assert all(
        torch.equal(a, b) for a, b in zip(hidden, deep.policy.mlp_extractor.policy_net.parameters(), strict=True)
    )
    assert deep.policy.action_net.weight[1].abs().max() > 0.0
    with pytest.raises(ValueError, match="moves names gamma"):
        learner(moves=["gamma"])
    with pytest.raises(ValueError, match="start names effort, which is none of the coefficients that the policy sets"):
        learner(start={"alpha": 0.3, "effort": 2.0})
