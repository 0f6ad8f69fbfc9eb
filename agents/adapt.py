"""A learned policy that goes on learning during the run that it serves.

    action = policy.predict(observation)            # drawn, not the mean: whoever learns has to try
    observation, reward, ended, ... = env.step(action)
    policy.learn(reward, observation, ended)        # remembers, and trains when there is enough

PPO and A2C train on every `ROUNDS` rounds; SAC and TD3 after each round, as soon as the replay buffer holds a
batch. Which reward it is and how observations and rewards are scaled stays as it was in training, but that `area`
stands in for a reward of accuracy, which a run without an evaluation set does not know, and for one by import path,
since a policy's file runs no code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO, TD3
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from agents.learning import Randomness, Spaces, algorithm_class, build_learner, learner_state, restore_learner, spread
from agents.policies import CLIP, LearnedPolicy, require_same
from envs.rewards import OF_ACCURACY, REWARDS

ROUNDS = 16  # experience between two updates of an on-policy algorithm
BATCH = 64  # of an off-policy one
EXPERIENCE = 4096  # rounds that an off-policy one remembers
NOISE = 0.1  # standard deviation of the exploration of a deterministic actor


class AdaptivePolicy:
    """Continues from a learned policy's weights; everything random about it is its own."""

    def __init__(self, learned: LearnedPolicy, seed: int = 0) -> None:
        self.description = described = learned.description
        self.began_as = learned.fingerprint()
        seed %= 2**31  # as much as NumPy takes
        self.random = Randomness(seed)
        with self.random.in_force():
            self.model: Any = build_learner(
                described.algorithm,
                Spaces(described.observations, described.actions),
                described.net_arch,
                described.activation,
                self._arguments(described.arguments),
                seed=seed,
            )
        self.model.policy.load_state_dict(learned.network.state_dict())
        self.model.set_logger(Logger(folder=None, output_formats=[]))
        self.on_policy = isinstance(self.model, OnPolicyAlgorithm)
        self.learned = LearnedPolicy(self.model.policy, described, learned.mean, learned.var)
        self.starts = True  # whether the next round is the first of an episode
        self.last: dict[str, Any] | None = None  # what was seen and done in the round being played

    @property
    def reward(self) -> str:
        """What it learns from: what it was trained on, unless that needs real images or to be imported."""
        trained = self.description.reward
        return "area" if trained in OF_ACCURACY or trained not in REWARDS else trained

    def _arguments(self, trained: dict[str, Any]) -> dict[str, Any]:
        """The algorithm's arguments, cut down to what one run offers; with which weights it started does not matter."""
        left_out = ("verbose", "device", "seed", "tensorboard_log", "start")
        arguments = {k: v for k, v in trained.items() if k not in left_out}
        algorithm = algorithm_class(self.description.algorithm)
        if issubclass(algorithm, OnPolicyAlgorithm):
            arguments["n_steps"] = ROUNDS
            if "batch_size" in arguments or issubclass(algorithm, PPO):
                arguments["batch_size"] = ROUNDS
            return arguments
        arguments |= {"buffer_size": EXPERIENCE, "batch_size": min(int(trained.get("batch_size", BATCH)), BATCH)}
        return arguments

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[np.ndarray, Any]:
        """One observation (entries,) -> an action (coefficients,), drawn whatever `deterministic` says."""
        seen = self.learned.seen(observation)[None]
        self.last = {"seen": seen}
        policy = self.model.policy
        policy.set_training_mode(False)
        with self.random.in_force(), torch.no_grad(), torch.autocast("cpu", enabled=False):
            if self.on_policy:
                drawn, value, log_probability = policy(torch.as_tensor(seen))
                self.last |= {"value": value, "log_probability": log_probability}
                action = drawn.numpy()
            else:
                action, _ = policy.predict(seen, deterministic=False)
                if isinstance(self.model, TD3):  # or DDPG, which is one
                    action = action + np.random.normal(0.0, NOISE, action.shape)  # noqa: NPY002
                action = np.clip(action, -1.0, 1.0).astype(np.float32)
        self.last["action"] = action
        return spread(np.clip(action[0], -1.0, 1.0), self.learned.rows), state

    def value(self, observation: Any) -> np.ndarray | None:
        return self.learned.value(observation)

    def diagnostics(self, observation: Any) -> dict[str, float]:
        told = {**self.learned.diagnostics(observation), "updates": float(self.model._n_updates)}
        if "value" not in told and self.model._n_updates:  # the critic has learned by now
            value = self.value(observation)
            if value is not None:
                told["value"] = float(value)
        return told

    def learn(self, reward: float, observation: Any, ended: bool) -> None:
        """Take in what came of the last action, and train if it is time."""
        if self.last is None:
            raise RuntimeError("learn() comes after predict()")
        last = self.last
        self.last = None
        scaled = np.array([np.clip(reward / self.description.reward_scale, -CLIP, CLIP)], dtype=np.float32)
        seen = self.learned.seen(observation)[None]
        over = np.array([ended])
        self.model.num_timesteps += 1
        with self.random.in_force(), torch.autocast("cpu", enabled=False):
            if self.on_policy:
                buffer = self.model.rollout_buffer
                buffer.add(
                    last["seen"],
                    last["action"],
                    scaled,
                    np.array([self.starts]),
                    last["value"],
                    last["log_probability"],
                )
                if buffer.full:
                    with torch.no_grad():
                        value = self.model.policy.predict_values(torch.as_tensor(seen))
                    buffer.compute_returns_and_advantage(last_values=value, dones=over)
                    self.model.train()
                    buffer.reset()
                    if self.model.use_sde:  # as before a rollout in training
                        self.model.policy.reset_noise()
            else:
                buffer = self.model.replay_buffer
                buffer.add(last["seen"], seen, last["action"], scaled, over, [{}])
                if buffer.size() >= self.model.batch_size:
                    self.model.train(gradient_steps=1, batch_size=self.model.batch_size)
        self.starts = ended

    def state_dict(self) -> dict[str, Any]:
        """All that determines how it goes on, between two rounds."""
        return {
            "began_as": self.began_as,
            "learner": learner_state(self.model),
            "random": self.random.state_dict(),
            "noise": {name: value.detach() for name, value in self._noise().items() if name.startswith("exploration_")},
            "starts": self.starts,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        require_same(state.get("began_as"), self.began_as)
        restore_learner(self.model, state["learner"])
        self.random.load_state_dict(state["random"])
        self._noise().update(state.get("noise", {}))  # older states lack it
        self.starts = bool(state["starts"])

    def _noise(self) -> dict[str, Any]:
        """Where `use_sde` holds the noise that it draws actions with until the next update."""
        policy = self.model.policy
        drawn_from = getattr(getattr(policy, "actor", policy), "action_dist", None)
        return vars(drawn_from) if isinstance(drawn_from, StateDependentNoiseDistribution) else {}
