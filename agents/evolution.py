"""Evolution: learn from whole episodes by moving the policy's weights, not its single actions.

    pair:        weights + noise  |  weights - noise        the same task, from the same starting state
    slope:       of the difference of their returns over the noise, by ridge regression on the newest pairs
    update:      weights += rate * slope

What a coefficient is worth shows over a whole run, and hardly in one round, so noise that is held for an episode tells
more than noise that is drawn anew in every round (parameter-exploring policy gradients: Sehnke et al. 2010, Salimans
et al. 2017). Both episodes of a pair begin alike, which takes most of the difference between tasks and seeds out.

    algorithm: agents.evolution:Evolution
    net_arch: []          # a linear policy: with `observe: [progress]`, a schedule
    arguments: {constant: true}     # only the last layer's bias: the best constants

It is a PPO that learns differently: the same network, the same file; with `--adapt` it goes on as PPO.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor, nn

from ssdkd.coefficients import RANGES, Coefficients

REMEMBERED = 10  # updates whose pairs are kept


class Evolution(PPO):
    """Parameter-exploring policy gradient with antithetic pairs of episodes.

    Args:
        pairs: pairs of episodes between two updates.
        spread: standard deviation of the noise on an action's bias; on its weights together, 1.5 times as much.
        rate: standard deviations of the noise that a weight moves for a hundredth of return that one of them is worth;
            falls to a fifth of it in the course of training.
        memory: what the pairs of one update earlier still count.
        constant: move only the last layer's bias, so that the policy is a set of constants.
        start: coefficients that the policy begins with, by name, constant; else neutral.
        acts: of policies and configurations of before: the environment's `actions` names what an action sets.
        moves: names of those whose weights move while the others stay as they begin; none: all.
        ppo: arguments of PPO, for `--adapt`.
    """

    def __init__(
        self,
        policy: Any,
        env: Any,
        pairs: int = 8,
        spread: float = 0.3,
        rate: float = 0.3,
        memory: float = 0.85,
        constant: bool = False,
        start: dict[str, float] | None = None,
        acts: list[str] | None = None,
        moves: list[str] | None = None,
        **ppo: Any,
    ) -> None:
        self.pairs, self.spread, self.rate, self.memory = int(pairs), spread, rate, memory
        self.constant = constant
        if self.pairs < 1:
            raise ValueError("pairs must be at least 1")
        if not spread > 0.0:
            raise ValueError("spread must be above 0")
        super().__init__(policy, env, **ppo)
        assert self.env is not None
        names: list[str] = self.env.get_attr("actions")[0]
        for given, listed in (("start", start or {}), ("moves", moves or [])):
            unknown = sorted(set(listed) - set(names))
            if unknown:
                raise ValueError(f"{given} names {unknown[0]}, which is none of the coefficients that the policy sets")
        for r in (r for r in RANGES if r.name in (start or {})):
            value = (start or {})[r.name]
            if not isinstance(value, (int, float)) or not r.low <= value <= r.high:
                raise ValueError(f"start sets {r.name} to {value}, which is not within {r.low:g} .. {r.high:g}")
        begin = dict(zip(Coefficients().as_dict(), Coefficients(**(start or {})).to_unit(), strict=True))
        head = self.policy.action_net
        assert isinstance(head, nn.Linear)
        with torch.no_grad():
            head.weight.zero_()
            head.bias.copy_(torch.tensor([begin[name] for name in names]))
            self.policy.log_std.fill_(math.log(0.5 * spread))
        self.moved = self._moved()
        rows = torch.tensor([not moves or name in moves for name in names])
        free = torch.cat(  # with `moves`, rows of the last layer and nothing else
            [
                rows.repeat_interleave(p.numel() // len(rows))
                if p is head.weight or p is head.bias
                else torch.full((p.numel(),), not moves)
                for p, _ in self.moved
            ]
        )
        self.places = free.nonzero()[:, 0]  # of the weights that move among all of them
        self.noise = torch.cat([torch.full((p.numel(),), scale) for p, scale in self.moved])[self.places]
        self.tried = torch.zeros((REMEMBERED * self.pairs, len(self.noise)))  # noise of the newest pairs, in its unit
        self.told = torch.zeros(len(self.tried))  # half the differences of their returns

    def _moved(self) -> list[tuple[Tensor, float]]:
        """The parameters that evolve, each with the standard deviation of its noise."""
        head = self.policy.action_net
        assert isinstance(head, nn.Linear)
        if self.constant:
            return [(head.bias, self.spread)]
        layers = [m for m in self.policy.mlp_extractor.policy_net.modules() if isinstance(m, nn.Linear)]
        found: list[tuple[Tensor, float]] = []
        for layer in [*layers, head]:
            of_weights = self.spread * min(1.0, 1.5 / math.sqrt(layer.in_features))
            found += [(layer.weight, of_weights), (layer.bias, self.spread)]
        return found

    def _weights(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p, _ in self.moved])

    def _stepped(self, step: Tensor, centre: Tensor) -> Tensor:
        """All weights, those that move by `step` away from `centre`."""
        return centre.index_add(0, self.places, step)

    def _wear(self, weights: Tensor) -> None:
        at = 0
        with torch.no_grad():
            for p, _ in self.moved:
                p.copy_(weights[at : at + p.numel()].view_as(p))
                at += p.numel()

    def learn(  # type: ignore[override]
        self,
        total_timesteps: int,
        callback: Any = None,
        log_interval: int = 1,
        tb_log_name: str = "Evolution",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Evolution:
        total, callback = self._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        callback.on_training_start(locals(), globals())
        while self.num_timesteps < total:
            callback.on_rollout_start()
            random = np.random.default_rng([self.seed or 0, self.num_timesteps])
            centre = self._weights()
            drawn = torch.from_numpy(random.standard_normal((self.pairs, len(self.noise)))).float() * self.noise
            tried = torch.cat([torch.stack((self._stepped(d, centre), self._stepped(-d, centre))) for d in drawn])
            seeds = np.repeat(random.integers(2**31, size=self.pairs), 2).tolist()
            returns = self._play(tried, seeds, callback)
            self._wear(centre)
            if returns is None:
                break
            self._update_current_progress_remaining(self.num_timesteps, total)
            self._move(centre, drawn, torch.tensor(returns).view(-1, 2))
            self._n_updates += 1
            callback.on_rollout_end()
        callback.on_training_end()
        return self

    def _move(self, centre: Tensor, drawn: Tensor, returns: Tensor) -> None:
        """One update from `drawn` (pairs, weights) and the returns with it added and taken away (pairs, 2)."""
        differences = (returns[:, 0] - returns[:, 1]) / 2.0
        self.tried = torch.cat([drawn / self.noise, self.tried])[: len(self.tried)]
        self.told = torch.cat([differences, self.told])[: len(self.told)]
        slope = slope_of(self.tried, self.told, self.memory ** (torch.arange(len(self.told)) // self.pairs))
        rate = 100.0 * self.rate * (0.2 + 0.8 * self._current_progress_remaining)
        step = (rate * slope).clamp(-1.0, 1.0)
        moved = self._stepped(self.noise * step, centre)
        size = self.moved[-1][0].numel()  # the last layer's bias: no further out than actions go
        moved[-size:] = moved[-size:].clamp(-1.2, 1.2)
        self._wear(moved)
        self.logger.record("train/return", float(returns.mean()))
        self.logger.record("train/difference", float(differences.square().mean().sqrt()))
        self.logger.record("train/step", float(step.square().mean().sqrt()))

    def _play(self, tried: Tensor, seeds: list[int], callback: Any) -> list[float] | None:
        """One episode with each row of `tried`, as many at once as there are environments: -> their returns.

        Both of a pair begin from one seed. None: the callback wants an end.
        """
        env = self.env
        assert env is not None
        scaled = env if isinstance(env, VecNormalize) else None
        if scaled is not None:  # the scales are those of the first episodes: a policy must not change by itself
            scaled.training = self._n_updates == 0
        waiting, returns = list(range(len(tried))), [0.0] * len(tried)
        playing: list[int | None] = [None] * env.num_envs
        at_rest: list[int] = []  # places
        seen = np.zeros((env.num_envs, *self.observation_space.shape), dtype=np.float32)  # type: ignore[misc]
        while True:
            for place in range(env.num_envs):
                if playing[place] is None and waiting:
                    playing[place] = job = waiting.pop(0)
                    observation: np.ndarray = env.env_method("reset", seed=seeds[job], indices=[place])[0][0]
                    seen[place] = scaled.normalize_obs(observation) if scaled is not None else observation  # type: ignore[assignment]
            idle = [place for place, job in enumerate(playing) if job is None]
            if len(idle) == env.num_envs:
                return returns
            if idle != at_rest and (scaled is None or not scaled.training):  # else what they see counts too
                env.set_attr("at_rest", True, indices=idle)
                at_rest = idle
            actions = np.zeros((env.num_envs, *self.action_space.shape), dtype=np.float32)  # type: ignore[misc]
            for place, now in enumerate(playing):
                if now is not None:
                    self._wear(tried[now])
                    actions[place], _ = self.policy.predict(seen[place], deterministic=True)
            observations, _, ended, infos = env.step(actions)
            assert isinstance(observations, np.ndarray)
            seen = observations.copy()
            live = [place for place, job in enumerate(playing) if job is not None]
            self.num_timesteps += len(live)
            infos = [infos[place] for place in live]  # of the others nobody wants to know
            callback.update_locals({"infos": infos})
            if not callback.on_step():
                return None
            for place, info in zip(live, infos, strict=True):
                if ended[place]:
                    ended_job = playing[place]
                    assert ended_job is not None
                    returns[ended_job] = float(info["episode"]["r"])
                    playing[place] = None

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        states, _ = super()._get_torch_save_params()
        return states, ["tried", "told"]

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "moved", "places", "noise"]


def slope_of(tried: Tensor, told: Tensor, counts: Tensor) -> Tensor:
    """What one unit of each weight is worth: (pairs, weights), (pairs,) and how much each counts -> (weights,).

    Ridge regression. Half of what differences vary is taken for chance, and what is expected of the slopes before
    anything is known explains the other half.
    """
    weighed = tried.T * counts
    pull = tried.shape[1] * torch.eye(tried.shape[1])
    return torch.linalg.solve(weighed @ tried + pull, weighed @ told)
