"""The command: one distillation, from the configuration to the student. `python -m ssdkd.run`."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from ssdkd.build import build_engine
from ssdkd.checkpoint import load_newest
from ssdkd.config import RunConfig, differences, from_mapping, parse_command_line, to_yaml
from ssdkd.engine import Engine
from ssdkd.errors import ConfigError, SsdkdError
from ssdkd.models import count_multiply_adds, count_parameters, save_weights
from ssdkd.saving import Saver, Stopped, StopSignals
from ssdkd.tracking import Display, MetricsFile, RunFolder, buffer_grid
from ssdkd.tracking.display import summary_table
from ssdkd.tracking.folder import CHECKPOINTS, CONFIG, METRICS, PICTURE, STUDENT, SUMMARY

if TYPE_CHECKING:
    from envs import SampleSelectionEnv

DESCRIPTION = "Distil a student out of a teacher without the teacher's training data."


@dataclass
class Result:
    """What a distillation gave."""

    student: nn.Module
    summary: dict[str, Any]
    history: list[dict[str, float]] = field(default_factory=list)
    folder: Path | None = None


def distill(teacher: nn.Module, student: nn.Module, *, out: str | None = None, **options: Any) -> Result:
    """Distil `teacher` into `student`, both in memory; the student is trained in place.

    `options` are those of the command, nested as in YAML: `distill(teacher, student, dataset="mnist", rounds=60,
    buffer={"capacity": 1000})`. With `out`, a run folder is written there; without it nothing is.
    """
    config = from_mapping(RunConfig, {"rounds": 100, **options}, "the options of distill()")
    if "minutes" in options and "rounds" not in options:
        config.rounds = None
    config.teacher.name, config.student.name = _name_of(teacher), _name_of(student)
    folder = None
    if out is not None:
        config.out = out
        folder = RunFolder.create(out, run_name(config))
        folder.write_text(CONFIG, to_yaml(config))
    engine = build_engine(config, copy.deepcopy(teacher), student)
    return run(config, engine, folder, Display(quiet=True))


def run(
    config: RunConfig,
    engine: Engine,
    folder: RunFolder | None,
    display: Display,
    resumed: dict[str, Any] | None = None,
) -> Result:
    """One distillation: the policy decides, the environment plays the round, until the budget is spent.

    `resumed` is the state that a checkpoint held, where a run goes on from one.
    """
    from agents import fixed_policy
    from envs import SampleSelectionEnv

    policy = fixed_policy(config.policy, config.seed)
    env = SampleSelectionEnv(engine=engine)
    saver = Saver(config.checkpoint, folder, display)
    _say_what_is_missing(engine, display)
    history: list[dict[str, float]] = []
    with display, StopSignals() as signals:
        if resumed is None:
            observation, info = env.reset()
        else:
            observation = _restore(resumed, engine, env, policy)
        metrics = MetricsFile(folder / METRICS, from_round=engine.round) if folder is not None else None
        while not engine.finished:
            action, _ = policy.predict(observation, deterministic=True)
            observation, reward, _, _, info = env.step(action)
            line = {**info["statistics"], **info["coefficients"], "reward": float(reward)}
            every = config.tracking.evaluate_every
            measured = engine.accuracy(engine.student) if every and engine.round % every == 0 else None
            if measured is not None:
                line["accuracy"] = measured
            if metrics is None:
                history.append(line)
            elif engine.round % config.tracking.metrics_every == 0:
                metrics.add(line)
            display.update(engine.statistics, measured)
            if saver.is_due(engine.round) or signals.save or signals.stop:
                saver.save(_state(engine, env, policy), engine.round)
                signals.save = False
            if signals.stop:
                raise Stopped(signals.stop, saver.folder)
        if metrics is not None:
            metrics.close()
    summary = summarise(config, engine)
    if folder is not None:
        finish(folder, engine, summary)
    return Result(engine.student, summary, history, folder.path if folder is not None else None)


def _state(engine: Engine, env: SampleSelectionEnv, policy: Any) -> dict[str, Any]:
    """Everything that determines how the run goes on."""
    of_policy = policy.state_dict() if hasattr(policy, "state_dict") else None
    return {"engine": engine.state_dict(), "env": env.state_dict(), "policy": of_policy}


def _restore(state: dict[str, Any], engine: Engine, env: SampleSelectionEnv, policy: Any) -> np.ndarray:
    engine.load_state_dict(state["engine"])
    if state["policy"] is not None:
        policy.load_state_dict(state["policy"])
    return env.resume(state["env"])


def finish(folder: RunFolder, engine: Engine, summary: dict[str, Any]) -> None:
    """Write what the run was for."""
    from PIL import Image

    save_weights(engine.student, folder / STUDENT)
    held = engine.buffer.filled()
    Image.fromarray(buffer_grid(held, engine.spec.num_classes)).save(folder / PICTURE)
    folder.write_json(SUMMARY, summary)


def summarise(config: RunConfig, engine: Engine) -> dict[str, Any]:
    """The run in named numbers; accuracies in percent, null where there is no evaluation set."""
    shape = (engine.spec.channels, engine.spec.height, engine.spec.width)
    return {
        "teacher_accuracy": engine.accuracy(engine.teacher),
        "student_accuracy": engine.accuracy(engine.student),
        "probe_agreement": 100.0 * engine.statistics["probe_agreement"],
        "probe_kl": engine.statistics["probe_kl"],
        "teacher": config.teacher.name,
        "student": config.student.name,
        "dataset": config.dataset,
        "teacher_parameters": count_parameters(engine.teacher),
        "student_parameters": count_parameters(engine.student),
        "teacher_multiply_adds": count_multiply_adds(engine.teacher, shape),
        "student_multiply_adds": count_multiply_adds(engine.student, shape),
        "buffer_images": engine.buffer.size,
        "synthesized_images": engine.synthesized,
        "rounds": engine.round,
        "budget_spent": engine.spent,
        "seconds": round(engine.seconds, 3),
        "phase_seconds": {name: round(s, 3) for name, s in engine.phase_seconds.items()},
        "policy": config.policy,
        "seed": config.seed,
        "device": str(engine.device),
    }


def run_name(config: RunConfig) -> str:
    """What a run's folder is called, before the time."""
    task = config.dataset or config.teacher.name.replace(":", ".").replace("/", ".")
    return f"{task}-{config.policy}-seed{config.seed}"


def _name_of(network: nn.Module) -> str:
    return type(network).__name__


def _say_what_is_missing(engine: Engine, display: Display) -> None:
    if not engine.inverter.observer.has_batch_norm:
        terms = ", ".join(f"{name} {weight:g}" for name, weight in engine.terms.items() if weight)
        display.say(f"The teacher has no batch-norm statistics; inversion goes by the other terms: {terms}.")
    if engine.evaluation is None:
        display.say("No evaluation set (--dataset with --data-root): agreement on synthetic images is all there is.")


def start(argv: Sequence[str] | None) -> None:
    """Read the command line, then begin a run or go on with one."""
    config, given = _read(argv, "digits")
    display = Display(quiet=given.quiet)
    if given.resume is None:
        engine = build_engine(config)
        folder = RunFolder.create(config.out, run_name(config))
        folder.write_text(CONFIG, to_yaml(config))
        resumed = None
    else:
        folder = RunFolder.existing(given.resume)
        config = _config_to_resume(folder, argv, display)
        engine = build_engine(config)
        resumed = _newest_state(folder, display)
    result = run(config, engine, folder, display, resumed)
    if not given.quiet:
        display.console.print(summary_table(result.summary))
        print(f"run folder: {result.folder}")


def _read(argv: Sequence[str] | None, default_config: str) -> tuple[RunConfig, argparse.Namespace]:
    config, given = parse_command_line(
        RunConfig,
        argv,
        prog="python -m ssdkd.run",
        description=DESCRIPTION,
        extra=(("resume", "run folder to go on with", None), ("quiet", "say nothing but errors", False)),
        default_config=default_config,
        exclusive=("rounds", "minutes"),
    )
    return config, given


HARMLESS = ("tracking.", "checkpoint.", "out", "data_root")


def _config_to_resume(folder: RunFolder, argv: Sequence[str] | None, display: Display) -> RunConfig:
    """The run's own configuration, with what the command line changes, if that leaves the outcome as it is."""
    before, _ = _read([], str(folder / CONFIG))
    after, _ = _read(argv, str(folder / CONFIG))
    for key, (old, new) in differences(before, after).items():
        if not key.startswith(HARMLESS):
            raise ConfigError(
                f"{key} was {old!r} in {folder.path} and is {new!r} now: that would be another run; "
                "leave it out, or start a new run without --resume."
            )
        display.say(f"{key}: {old!r} -> {new!r}")
    return after


def _newest_state(folder: RunFolder, display: Display) -> dict[str, Any] | None:
    if not (folder / CHECKPOINTS).is_dir():
        display.say("The run has no checkpoint yet; it begins anew.")
        return None
    state, path, warnings = load_newest(folder / CHECKPOINTS)
    for warning in warnings:
        display.say(f"warning: {warning}")
    display.say(f"Going on from {path.name}.")
    resumed: dict[str, Any] = state
    return resumed


def main(argv: Sequence[str] | None = None) -> int:
    """The command; a user's mistake is one sentence and exit code 2."""
    try:
        start(argv)
    except SsdkdError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    except ImportError as error:
        print(f"error: {_shadowed(error)}", file=sys.stderr)
        return ConfigError.exit_code
    return 0


def _shadowed(error: ImportError) -> str:
    """Say so where another package called `envs` or `agents` stands in front of ours."""
    name = (error.name or "").split(".")[0]
    loaded = sys.modules.get(name)
    where = getattr(loaded, "__file__", None)
    if name in ("envs", "agents") and where is not None:
        return (
            f"the package {name!r} that Python finds is {Path(where).parent}, not ssdkd's; "
            "run from another folder or remove the other package."
        )
    return f"{error}; is ssdkd installed in this environment (pip install ssdkd)?"


if __name__ == "__main__":
    sys.exit(main())
