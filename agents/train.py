"""Train a policy: `python -m agents.train --config train-digits --teachers-root FOLDER`.

Every environment draws a task of the family for each episode. The run's folder holds the configuration, the
TensorBoard event files, checkpoints, `policy.safetensors` (the newest) and `evaluation.jsonl` (whole episodes on
held-out tasks, beside the fixed policies).

`--resume FOLDER` goes on from the last checkpoint and ends with the same policy, to the byte, as a training that
nothing interrupted: it holds weights, optimisers, experience, normalisation, random numbers, counters, and every
episode that was being played. Checkpoints are written between two rollouts, where nothing is half done. (The one
exception is Stable-Baselines3's `use_sde`, whose noise is drawn before a rollout and then anew.)

SIGINT (Ctrl-C) and SIGTERM let the rollout or the evaluation finish, save, and say how to go on; a second one leaves at
once. SIGUSR1 saves after the rollout and goes on.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import multiprocessing.connection
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import HumanOutputFormat, Logger
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize

from agents.curves import EventOutput, of_coefficients, of_episodes, of_evaluation
from agents.evaluate import FIXED, Episode, evaluate, summary
from agents.learning import (
    Pausable,
    Selected,
    Spaces,
    build_learner,
    checked,
    columns_of,
    episodes_state,
    learner_state,
    restore_episodes,
    restore_learner,
    rows_of,
)
from agents.policies import CLIP, Description, LearnedPolicy, fault_in, load_policy, policy_of
from agents.tasks import Task, TasksConfig, digest_of, family_from, held_out_tasks, merged, name_of, training_tasks
from envs import SampleSelectionEnv
from envs.rewards import OF_ACCURACY, REWARDS, reward_by
from envs.spaces import ENTRIES
from ssdkd import checkpoint
from ssdkd.build import has_evaluation
from ssdkd.coefficients import RANGES
from ssdkd.config import differences, option, parse_command_line, read_yaml, to_yaml
from ssdkd.errors import CheckpointError, ConfigError, NumericalError, SsdkdError, first_line
from ssdkd.saving import Stopped, StopSignals, run_until_stopped
from ssdkd.tracking.folder import CHECKPOINTS, CONFIG, RunFolder

SEEN_FOR_LONG = 1e5  # observations; those of a training then move the scales of a policy that was trained before little
POLICY, EVALUATION = "policy.safetensors", "evaluation.jsonl"
Judge = Callable[[int], dict[str, dict[str, float]]]  # steps learned -> policy -> measure -> value


@dataclass
class TrainConfig:
    """How a policy is trained; the tasks stand in the family's own YAML."""

    algorithm: str = option("ppo", "ppo, a2c, sac, td3, or an import path such as sb3_contrib:TQC")
    arguments: dict[str, Any] = option({}, "keyword arguments of the algorithm")
    net_arch: list[int] = option([64, 64], "hidden layers of actor and critic")
    activation: str = option("tanh", "between them", choices=("tanh", "relu", "elu", "silu"))
    family: str = option("family", "family of tasks, by name or YAML file")
    teachers_root: str | None = option(None, "folder of the family's teachers; null: as the family says")
    reward: str = option(
        "area", f"what a round is worth: {', '.join(REWARDS)}, or an import path such as my_module:my_reward"
    )
    observe: list[str] | None = option(None, "names of the observation's entries to read; null: all")
    act: list[str] | None = option(None, "names of the coefficients to set, the others stay neutral; null: all")
    begin: str | None = option(None, "policy file to begin with, of the same make; null: as the algorithm begins")
    steps: int = option(20_000, "rounds to learn from, over all environments", low=1)
    environments: int = option(4, "episodes played at once", low=1)
    processes: bool = option(True, "whether each of them has a process of its own")
    warm_starts: int = option(2, "warm-ups kept for each teacher and buffer; 0: a new one every episode", low=0)
    normalise: bool = option(True, "whether observations and rewards are scaled by their running statistics")
    seed: int = option(0, "everything random follows from it", low=0, high=2**31)
    evaluate_every: int = option(5_000, "steps between evaluations on held-out tasks; 0: only at the end", low=0)
    evaluate_seeds: int = option(2, "episodes on each held-out task; 0: no evaluation", low=0)
    log_every: int = option(500, "steps between points of TensorBoard's curves", low=1)
    checkpoint_every: int = option(2_000, "steps between checkpoints; 0: only at the end", low=0)
    out: str = option("runs", "folder in which every training makes a folder of its own")

    def observed(self) -> list[str]:
        return [entry.name for entry in ENTRIES] if self.observe is None else self.observe

    def acted(self) -> list[str]:
        return [r.name for r in RANGES] if self.act is None else self.act

    def told(self) -> dict[str, Any]:
        """What a policy's file says of its training: all of this but where files lay on one machine."""
        files = {"family": Path(self.family).name, "begin": Path(self.begin).name if self.begin else None}
        return {k: v for k, v in asdict(self).items() if k not in ("teachers_root", "out")} | files

    def description(self, **more: Any) -> Description:
        """What a policy's file says of the policy."""
        return Description(
            algorithm=self.algorithm,
            net_arch=list(self.net_arch),
            activation=self.activation,
            observations=self.observed(),
            actions=self.acted(),
            reward=self.reward,
            arguments=dict(self.arguments),
            **more,
        )

    def beginning(self) -> LearnedPolicy | None:
        """The policy to begin with, if there is one; it must be of the make that is trained."""
        if self.begin is None:
            return None
        policy = load_policy(self.begin)
        made, mine = policy.description, self.description()
        names = ("algorithm", "net_arch", "activation", "observations", "actions")
        both = {name: (getattr(made, name), getattr(mine, name)) for name in names}
        both["use_sde"] = (bool(made.arguments.get("use_sde")), bool(mine.arguments.get("use_sde")))
        for name, (other, value) in both.items():
            if other != value:
                raise ConfigError(
                    f"begin: the policy's {name} is {other} and here it is {value}; "
                    "begin with a policy of the same make."
                )
        return policy


class Training:
    """One training: the vector of environments, the algorithm, and what is scaled by what."""

    def __init__(self, config: TrainConfig, tasks: Sequence[Task], base: str) -> None:
        self.config = config
        self.family = digest_of(config.family)  # as it is when its tasks are read
        discount = checked(config.algorithm, config.arguments).get("gamma", 0.99)
        make = _environment(base, list(tasks), config)
        several = config.processes and config.environments > 1
        vector: Any = (
            SubprocVecEnv([make] * config.environments, start_method="spawn")
            if several
            else DummyVecEnv([make] * config.environments)
        )
        self.vector: Any = (
            VecNormalize(vector, clip_obs=CLIP, clip_reward=CLIP, gamma=discount) if config.normalise else vector
        )
        try:
            self.model: BaseAlgorithm = build_learner(
                config.algorithm, self.vector, config.net_arch, config.activation, config.arguments, config.seed
            )
        except BaseException:
            vector.close()
            raise
        self.judged = 0  # the step of the last evaluation

    def begin_as(self, policy: LearnedPolicy) -> None:
        """Take over its weights, and the scales of what it sees, as if they had been seen for long."""
        self.model.policy.load_state_dict(policy.network.state_dict())
        if self.config.normalise:
            seen = self.vector.obs_rms
            seen.mean, seen.var, seen.count = policy.mean.copy(), policy.var.copy(), SEEN_FOR_LONG

    def policy(self) -> LearnedPolicy:
        """What is learned so far."""
        scaled = self.config.normalise
        described = self.config.description(
            reward_scale=float(np.sqrt(self.vector.ret_rms.var + 1e-8)) if scaled else 1.0,
            training={"steps": self.model.num_timesteps, "config": self.config.told()},
        )
        if not scaled:
            return policy_of(self.model, described)
        return policy_of(self.model, described, self.vector.obs_rms.mean.copy(), self.vector.obs_rms.var.copy())

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "learner": learner_state(self.model),
            "random": {"torch": torch.get_rng_state(), "numpy": np.random.get_state(legacy=False)},  # noqa: NPY002
            "judged": self.judged,
            "family": self.family,
            "episodes": episodes_state(self.model, self.vector),
        }
        if self.config.normalise:
            state["scales"] = {
                name: {"mean": np.array(rms.mean), "var": np.array(rms.var), "count": float(rms.count)}
                for name, rms in (("observation", self.vector.obs_rms), ("return", self.vector.ret_rms))
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore_learner(self.model, state["learner"])
        self.judged = state["judged"]
        if self.config.normalise:
            for name, rms in (("observation", self.vector.obs_rms), ("return", self.vector.ret_rms)):
                held = state["scales"][name]
                rms.mean, rms.var, rms.count = np.asarray(held["mean"]), np.asarray(held["var"]), held["count"]
        restore_episodes(self.model, self.vector, state["episodes"])
        torch.set_rng_state(state["random"]["torch"])  # last, for building networks draws from it
        np.random.set_state(state["random"]["numpy"])  # noqa: NPY002


def _environment(base: str, tasks: list[Task], config: TrainConfig) -> Callable[[], Pausable]:
    def make() -> Pausable:
        apart = multiprocessing.parent_process() is not None
        if apart:
            torch.set_num_threads(1)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one decides
        env = SampleSelectionEnv(base, tasks=tasks, reward=config.reward, warm_starts=config.warm_starts)
        return (Apart if apart else Pausable)(Selected(env, config.observed(), config.acted()))

    return make


class Apart(Pausable):
    """In a process of its own, which an error ends: with its sentence and exit code, as it would end a command."""

    def reset(self, **arguments: Any) -> Any:
        with _said():
            return super().reset(**arguments)

    def step(self, action: Any) -> Any:
        with _said():
            return super().step(action)


@contextlib.contextmanager
def _said() -> Iterator[None]:
    try:
        yield
    except SsdkdError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from error


class Record(BaseCallback):
    """Curves, evaluations and checkpoints while the algorithm learns.

    What is written at a step is written before its checkpoint, so a training that goes on from it repeats no point.
    """

    def __init__(self, training: Training, folder: RunFolder, judge: Judge, signals: StopSignals) -> None:
        super().__init__()
        self.training, self.folder, self.judge, self.signals = training, folder, judge, signals
        self.chosen: list[list[float]] = []  # coefficients of every round since the last point
        self.ended: list[dict[str, float]] = []  # episodes likewise
        self.began, self.began_at = time.perf_counter(), training.model.num_timesteps
        self.logged = self.saved = training.model.num_timesteps

    def _on_step(self) -> bool:
        self.chosen += [[info["coefficients"][r.name] for r in RANGES] for info in self.locals["infos"]]
        self.ended += [info["episode"] for info in self.locals["infos"] if "episode" in info]
        return True

    def _on_rollout_start(self) -> None:
        """Between two rollouts nothing is half done: the time to write things down."""
        config, now = self.training.config, self.model.num_timesteps
        self.heed()
        if now - self.logged >= config.log_every:
            self.log()
        if config.evaluate_every and config.evaluate_seeds and now - self.training.judged >= config.evaluate_every:
            self.evaluate()
            self.heed()
        if config.checkpoint_every and now - self.saved >= config.checkpoint_every:
            self.save()

    def heed(self) -> None:
        """Save where a signal asked for it; stop where it asked for that."""
        if self.signals.save or self.signals.stop:
            self.signals.save = False
            self.save()
        if self.signals.stop:
            how = f"goes on with: python -m agents.train --resume {self.folder.path}"
            raise Stopped(self.signals.stop, f"the training is saved as of step {self.saved} and {how}")

    def finish(self) -> None:
        """What is still to be written at the end."""
        self.heed()
        self.save()
        if self.training.config.evaluate_seeds:
            self.evaluate()
            self.save()

    def log(self) -> None:
        """A point of every curve, unless nothing happened since the last one."""
        self.logged = self.model.num_timesteps
        if not self.chosen:
            return
        chosen = np.array(self.chosen)
        for r, values in zip(RANGES, chosen.T, strict=True):
            self.logger.record(f"coefficients/{r.name}", values, exclude="stdout")
        for name, value in of_coefficients(chosen).items():
            self.logger.record(name, value, exclude="stdout")
        for name, value in (of_episodes(self.ended) if self.ended else {}).items():
            self.logger.record(name, value)
        rate = (self.logged - self.began_at) / (time.perf_counter() - self.began)
        self.logger.record("speed/rounds_per_second", rate)
        self.chosen, self.ended = [], []
        self.logger.dump(self.logged)

    def save(self) -> None:
        self.log()
        self.saved = self.model.num_timesteps
        checkpoint.save(self.folder / CHECKPOINTS, self.training.state_dict(), self.saved, keep=2)
        self.training.policy().save(self.folder / POLICY)

    def evaluate(self) -> None:
        """Play the held-out tasks, unless that was done with what is learned so far."""
        if self.training.judged == self.model.num_timesteps:
            return
        self.log()
        self.training.policy().save(self.folder / POLICY)
        judged = self.judge(self.model.num_timesteps)
        for name, value in of_evaluation(judged).items():
            self.logger.record(name, value)
        self.training.judged = self.model.num_timesteps
        self.logger.dump(self.training.judged)


def judge_on(tasks: Sequence[Task], base: str, config: TrainConfig, folder: RunFolder, after: int = 0) -> Judge:
    """-> a function that plays the newest policy on held-out tasks; the fixed ones are played once, the first time.

    Each time adds a line to the folder's `evaluation.jsonl`; those of later steps than `after` are dropped first.
    """
    known: list[Episode] = []
    seeds = range(1000, 1000 + config.evaluate_seeds)
    processes = config.environments if config.processes else 1
    if (folder / EVALUATION).is_file():
        lines = (folder / EVALUATION).read_text(encoding="utf-8", errors="replace").splitlines()
        folder.write_text(EVALUATION, "".join(line + "\n" for line in lines if _steps_of(line) <= after))

    def judge(steps: int) -> dict[str, dict[str, float]]:
        nonlocal known
        if not known:
            known = list(evaluate(FIXED, base, tasks, seeds, processes))
        newest = list(evaluate([str(folder / POLICY)], base, tasks, seeds, processes, trust=True))  # it was made here
        judged = {"learned": summary(newest)[str(folder / POLICY)], **summary(known)}
        try:
            with (folder / EVALUATION).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"steps": steps, **judged}) + "\n")
        except OSError as error:
            raise CheckpointError(f"{folder / EVALUATION} cannot be written: {error.strerror or error}.") from error
        return judged

    return judge


def _steps_of(line: str) -> float:
    """The step of a line of `evaluation.jsonl`; infinity for one that a kill cut off."""
    try:
        return float(json.loads(line)["steps"])
    except (ValueError, TypeError, KeyError):
        return math.inf


def train(
    config: TrainConfig,
    family: TasksConfig,
    folder: RunFolder,
    begin: LearnedPolicy | None = None,
    state: dict[str, Any] | None = None,
    quiet: bool = False,
) -> Path:
    """Learn until `config.steps`, from the beginning, perhaps with a policy, or from a checkpoint's `state`.

    The family's tasks are whole, as `whole_family` gives them. Returns the policy's file.
    """
    lost = (
        "a process that played an episode has ended, perhaps for lack of memory; go on from the last checkpoint "
        f"with: python -m agents.train --resume {folder.path}"
    )
    try:
        training = Training(config, family.tasks, family.base)
    except (EOFError, ConnectionError) as error:
        raise SsdkdError(lost) from error
    model = training.model
    try:
        if state is None:
            training.vector.seed(config.seed * 1_000_003)
            if begin is not None:
                training.begin_as(begin)
        else:
            _restore(training, state)
        outputs: list[Any] = [EventOutput(folder.path, config, after=model.num_timesteps)]
        if not quiet:
            outputs.append(HumanOutputFormat(sys.stdout))
        model.set_logger(Logger(str(folder.path), outputs))
        judge = judge_on(family.held_out, family.base, config, folder, model.num_timesteps)
        with StopSignals() as signals:
            record = Record(training, folder, judge, signals)
            if config.steps > model.num_timesteps:
                model.learn(
                    config.steps - model.num_timesteps,
                    callback=record,
                    log_interval=10**9,  # type: ignore[call-arg]
                    reset_num_timesteps=False,
                )
            record.init_callback(model)
            record.finish()
        model.logger.close()
    except (EOFError, ConnectionError) as error:
        said = _has_said(training.vector)
        _abandon(training.vector)
        if said:
            raise ConfigError("an episode could not be played, for the reason above.") from error
        raise SsdkdError(lost) from error
    except BaseException as error:
        _abandon(training.vector)
        if isinstance(error, Exception) and _is_of_the_algorithm(error):
            raise ConfigError(
                f"{config.algorithm} cannot learn with the arguments given: {first_line(error)}."
            ) from error
        raise
    training.vector.close()
    return folder / POLICY


def _is_of_the_algorithm(error: Exception) -> bool:
    """Whether it arose while learning, and neither in an episode nor where something is written."""
    if isinstance(error, (OSError, MemoryError)):
        return False
    modules = [frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__)]
    # callbacks call Record
    others = ("envs", "ssdkd", "agents.learning", "agents.curves", "stable_baselines3.common.callbacks")
    return any(m.startswith("stable_baselines3") for m in modules) and not any(m.startswith(others) for m in modules)


def _has_said(vector: VecEnv) -> bool:
    """Whether a process that has ended told why, as `Apart` does."""
    if not isinstance(vector.unwrapped, SubprocVecEnv):
        return False
    processes = {process.sentinel: process for process in vector.unwrapped.processes}
    ended = [processes[sentinel] for sentinel in multiprocessing.connection.wait(list(processes), timeout=5.0)]  # type: ignore[index]
    for process in ended:
        process.join(5.0)
    return any(process.exitcode in (ConfigError.exit_code, NumericalError.exit_code) for process in ended)


def _abandon(vector: VecEnv) -> None:
    """Close without waiting for answers, which may never come."""
    if isinstance(vector.unwrapped, SubprocVecEnv):
        for process in vector.unwrapped.processes:
            process.kill()
            process.join()
    else:
        vector.close()


def _restore(training: Training, state: dict[str, Any]) -> None:
    if state.get("family", training.family) != training.family:  # older checkpoints do not tell
        raise CheckpointError(
            f"the tasks of {training.config.family} have changed since the training began, and episodes of the old "
            "ones are not over; bring them back, or start a new training."
        )
    try:
        training.load_state_dict(state)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        raise CheckpointError(
            f"the checkpoint does not fit this training ({first_line(error)}): its family of tasks has changed, or it "
            "is of another version of ssdkd; start a new training."
        ) from error


HARMLESS = ("steps", "out", "teachers_root", "evaluate_", "log_every", "checkpoint_every")


def run(argv: Sequence[str] | None = None) -> None:
    config, given = _read(argv, "train-digits")
    torch.set_num_threads(1)
    if given.resume is None:
        columns_of(config.observed())  # names that cannot be are noticed before there is a folder
        rows_of(config.acted())
        fault = fault_in(config.net_arch)
        if fault is not None:
            raise ConfigError(f"net_arch {fault}, so that its policy could not be read: {str(config.net_arch)[:60]}.")
        state, begin, family = None, config.beginning(), whole_family(config)
        spaces = DummyVecEnv([lambda: Spaces(config.observed(), config.acted())] * config.environments)
        learner = build_learner(
            config.algorithm, spaces, config.net_arch, config.activation, config.arguments, config.seed
        )
        policy_of(learner, config.description()).require_readable()
        folder = RunFolder.create(config.out, f"policy-{config.algorithm.replace(':', '.')}-seed{config.seed}")
        folder.write_text(CONFIG, to_yaml(config))
    else:
        folder = RunFolder.existing(given.resume)
        before, _ = _read([], str(folder / CONFIG))
        config, _ = _read(argv, str(folder / CONFIG))
        changed = differences(before, config)
        for key, (old, new) in changed.items():
            if not key.startswith(HARMLESS):
                raise ConfigError(f"{key} was {old!r} in {folder.path} and is {new!r} now; start a new training.")
        state = _newest_state(folder)
        begin, family = config.beginning() if state is None else None, whole_family(config)
    with folder.claimed():
        if given.resume is not None and changed:  # so that the next --resume goes as far without being told again
            folder.write_text(CONFIG, to_yaml(config))
        try:
            print(f"policy: {train(config, family, folder, begin, state, given.quiet)}")
        except ConfigError:
            if given.resume is None and not (folder / POLICY).exists():  # it could not begin to learn
                folder.discard()
            raise


def whole_family(config: TrainConfig) -> TasksConfig:
    """The family with all its tasks, each whole and fit for the reward."""
    reward_by(config.reward)
    family = family_from(config.family, config.teachers_root)
    tasks = training_tasks(family)
    _require_accuracy(tasks, family.base, config.reward)
    return replace(family, tasks=tasks, held_out=held_out_tasks(family))


def _require_accuracy(tasks: Sequence[Task], base: str, reward: str) -> None:
    """A reward of accuracy needs tasks with an evaluation set; known here, before a worker ends by it."""
    if reward not in OF_ACCURACY:
        return
    values, _ = read_yaml(base)
    for task in tasks:
        whole = merged(values, task)
        if not has_evaluation(whole.get("dataset"), whole.get("data_root")):
            raise ConfigError(
                f"reward: {reward} needs accuracy, and task {name_of(task)!r} has no evaluation set; give it a dataset "
                "and a data_root, or choose area or probe."
            )


def _newest_state(folder: RunFolder) -> dict[str, Any] | None:
    """What a training was killed with; nothing where it was killed before its first checkpoint."""
    if not any((folder / CHECKPOINTS).glob("round-*")):
        return None
    state: dict[str, Any]
    state, _, warnings = checkpoint.load_newest(folder / CHECKPOINTS)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return state


def _read(argv: Sequence[str] | None, default_config: str) -> tuple[TrainConfig, Any]:
    return parse_command_line(
        TrainConfig,
        argv,
        prog="python -m agents.train",
        description="Train a policy on a family of tasks.",
        extra=(("resume", "folder of a training to go on with", None), ("quiet", "print no curves", False)),
        default_config=default_config,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; a user's mistake is one sentence and exit code 2."""
    try:
        return run_until_stopped(run, argv)
    except KeyboardInterrupt:
        print("stopped; go on with --resume and the folder of the training", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
