"""The command: one distillation, from the configuration to the student. `python -m ssdkd.run`."""

from __future__ import annotations

import argparse
import gc
import io
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    gc.disable()  # until `alone`: nothing that is imported is garbage, and it takes a quarter of a second to see that

import numpy as np
import torch
from torch import nn

from ssdkd.build import build_engine, image_spec, is_in_memory, name_in_memory, require_apart, take_shape
from ssdkd.checkpoint import load_newest
from ssdkd.config import RunConfig, build, differences, from_mapping, parse_command_line, read_yaml, to_yaml
from ssdkd.data import says_normalisation
from ssdkd.devices import apart_from_caller, choose_device, is_out_of_memory, threads_given_back
from ssdkd.engine import Engine, Statistics, copy_of
from ssdkd.errors import CheckpointError, ConfigError, NumericalError, Parser, first_line
from ssdkd.importing import hidden
from ssdkd.models import count_parameters, load_weights, save_trained
from ssdkd.saving import Saver, Stopped, StopSignals, run_until_stopped
from ssdkd.tracking import Display, MetricsFile, RunFolder, buffer_grid
from ssdkd.tracking.display import summary_table
from ssdkd.tracking.folder import CHECKPOINTS, CONFIG, METRICS, PICTURE, STUDENT, SUMMARY
from ssdkd.tracking.tensorboard import Tracker

if TYPE_CHECKING:
    from envs import SampleSelectionEnv

PROG = "python -m ssdkd.run"
DESCRIPTION = "Distil a student out of a teacher without the teacher's training data."


@dataclass
class Result:
    """What a distillation gave."""

    student: nn.Module  # the last one, in evaluation mode
    summary: dict[str, Any]  # what summary.json holds
    history: list[dict[str, float]] = field(default_factory=list)  # one entry for each round that was played here
    folder: Path | None = None


def distill(
    teacher: nn.Module,
    student: nn.Module,
    *,
    out: str | None = None,
    resume: str | Path | None = None,
    **options: Any,
) -> Result:
    """Distil `teacher` into `student`, both in memory; the student is trained in place, the teacher stays as it is.

    Args:
        teacher: takes normalised images (N, channels, height, width), returns logits (N, classes).
        student: the same, smaller.
        out: a run folder is made in this folder; without it nothing is written.
        resume: the run folder of an earlier call with the same networks, to go on with; takes no `options`. Where that
            run is finished, `student` becomes the one that it ended with.
        options: those of the command, nested as in YAML: `dataset="mnist", rounds=60, buffer={"capacity": 1000}`.
            Without a budget, 100 rounds. `device` may be a torch.device.

    Raises:
        SsdkdError: the options or the networks do not fit, in one sentence.
        Stopped: SIGINT or SIGTERM came; the round was finished and, where there is a folder, saved.
    """
    for network, role in ((teacher, "teacher"), (student, "student")):
        if not isinstance(network, nn.Module):
            raise ConfigError(f"the {role} is a {type(network).__name__}; hand over a torch.nn.Module.")
    require_apart(teacher, student)  # while they are what the caller has; the teacher is copied below
    from_folder = None
    if resume is not None:
        if options or out is not None:
            raise ConfigError("distill(resume=...) goes on with the options of that run; leave out all others.")
        from_folder = RunFolder.existing(resume)
        config = build(RunConfig, [read_yaml(str(from_folder / CONFIG))])
        if from_folder.is_finished:
            with apart_from_caller(), torch.random.fork_rng(devices=[]):
                take_shape(student.eval(), image_spec(config))
                load_weights(student, from_folder / STUDENT)
            return Result(student, from_folder.read_json(SUMMARY), folder=from_folder.path)
    else:
        budget = {} if "minutes" in options else {"rounds": 100}
        if isinstance(options.get("device"), torch.device):
            options["device"] = str(options["device"])
        config = from_mapping(RunConfig, {**budget, **options}, "the options of distill()")
        config.teacher.name, config.student.name = name_in_memory(teacher), name_in_memory(student)
        if out is not None:
            config.out = out
    if choose_device(config.device).type == "cuda":
        torch.cuda.init()  # what the caller seeded before waits for this
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    # the caller's random numbers go on as if nothing had been drawn
    with apart_from_caller(), threads_given_back(), torch.random.fork_rng(devices):
        engine = build_engine(config, copy_of(teacher, "teacher"), student)
        display = Display(quiet=True)
        if from_folder is not None:
            with from_folder.claimed():
                return run(config, engine, from_folder, display, _newest_state(from_folder, display))
        if out is None:
            return run(config, engine, None, display)
        folder = RunFolder.create(out, run_name(config))
        with folder.begun(to_yaml(config)):
            return run(config, engine, folder, display)


def run(
    config: RunConfig,
    engine: Engine,
    folder: RunFolder | None,
    display: Display,
    resumed: dict[str, Any] | None = None,
    policy: Any = None,
    remember: bool = True,
) -> Result:
    """One distillation: the policy decides, the environment plays the round, until the budget is spent.

    `resumed` is the state that a checkpoint held, where a run goes on from one. `policy` decides instead of the one
    that the configuration names. Without `remember` the result has no history, and memory does not grow with rounds.
    """
    from agents import choose_policy
    from envs import SampleSelectionEnv

    policy = policy or choose_policy(config.policy, config.seed, config.policy_file, config.adapt)
    env = SampleSelectionEnv(engine=engine, reward=getattr(policy, "reward", "probe"))
    in_memory = any(is_in_memory(role.name) for role in (config.teacher, config.student))
    saver = Saver(config.checkpoint, folder, display, in_memory)
    _say_what_is_missing(engine, display)
    history: list[dict[str, float]] = []
    with display, StopSignals() as signals, ExitStack() as opened:
        if resumed is None:
            observation, _ = env.reset()
            if engine.teacher_wavers():
                display.warn(WAVERING)
        else:
            observation = _restore(resumed, engine, env, policy)
            saver.saved = engine.round
        metrics, tracker = None, None
        if folder is not None:
            metrics = opened.enter_context(closing(MetricsFile(folder / METRICS, from_round=engine.round)))
            tracker = opened.enter_context(closing(Tracker(config, engine, folder, display.warn, policy)))
        while not engine.finished:
            action, _ = policy.predict(observation, deterministic=True)
            try:
                observation, reward, _, _, info = env.step(action)
            except (NumericalError, RuntimeError, MemoryError) as error:
                if not isinstance(error, NumericalError) and not is_out_of_memory(error):
                    raise
                raise _with_what_is_left(error, engine, saver) from error
            if hasattr(policy, "learn"):
                policy.learn(float(reward), observation, engine.finished)
            line = {**info["statistics"], **info["coefficients"], "reward": env.memory.gain}
            every = config.tracking.evaluate_every
            is_measured = every and (engine.round % every == 0 or engine.round == 1)  # 10 rounds may take minutes
            measured = engine.accuracy(engine.student) if is_measured else None
            if measured is not None:
                line["accuracy"] = measured
            if remember:
                history.append(line)
            is_due = engine.round % config.tracking.metrics_every == 0 or engine.finished
            if metrics is not None and (is_due or measured is not None):
                metrics.add(line)
            if tracker is not None:
                tracker.update(line, observation)
            display.update(engine.statistics, measured)
            _say_what_looks_wrong(engine.statistics, metrics, display)
            if saver.is_due(engine.round) or signals.save or signals.stop:
                saver.save(_state(engine, env, policy), engine.round)
            if signals.save and saver.saved == engine.round:
                display.say(f"saved at round {engine.round}")
            signals.save = False
            if signals.stop and not engine.finished:
                raise Stopped(signals.stop, saver.how_to_go_on())
        engine.student.eval()
        if folder is not None:
            save_trained(engine.student, folder / STUDENT)  # before it is measured, which may fail
        summary = summarise(config, engine)
        if folder is not None:
            finish(folder, engine, summary)
        if tracker is not None:
            tracker.finish(summary)
    return Result(engine.student, summary, history, folder.path if folder is not None else None)


WAVERING = (
    "the teacher answers otherwise when the same image is shown alone: its answer depends on chance or on the images "
    "beside it (dropout that evaluation mode leaves on, or batch norm without running statistics)."
)
OUT_OF_MEMORY = (
    "out of memory: lower inversion.images, probe.images, distillation.batch, buffer.views or buffer.capacity, or a "
    "generator's inversion.latent or inversion.width"
)
SO_FAR = "student.so-far.safetensors"


def _with_what_is_left(error: Exception, engine: Engine, saver: Saver) -> NumericalError:
    """`error` as the end of a run, with where its student is and how to go on; puts the student there."""
    what = str(error) if isinstance(error, NumericalError) else OUT_OF_MEMORY
    kept = "its student so far is in memory only"
    if saver.folder is not None:
        kept = f"its student so far is in {saver.folder / SO_FAR}"
        try:
            save_trained(engine.student, saver.folder / SO_FAR)
        except CheckpointError as failed:
            kept = f"its student so far is not in its folder ({str(failed).rstrip('.')})"
    return NumericalError(f"{what}; {kept}; {saver.how_to_go_on()}")


def _say_what_looks_wrong(statistics: Statistics, metrics: MetricsFile | None, display: Display) -> None:
    """What does not end a run but should be known; each sentence is shown once."""
    if metrics is not None and metrics.error is not None:
        display.warn(f"{METRICS} cannot be written ({metrics.error.strerror}); the run goes on without it.")
    if statistics["rollbacks"]:
        display.warn("a round was taken back for numerical trouble; `rollbacks` of metrics.jsonl counts such rounds.")
    if statistics["candidates_broken"]:
        display.warn("the teacher's answer to some candidates is not finite; they are left out.")
    if statistics["class_share_max"] > 0.9:
        display.warn("nine tenths of the buffer are of one class; w_div above 0 or the balance term spreads them.")


def _state(engine: Engine, env: SampleSelectionEnv, policy: Any) -> dict[str, Any]:
    """Everything that determines how the run goes on."""
    of_policy = policy.state_dict() if hasattr(policy, "state_dict") else None
    return {"engine": engine.state_dict(), "env": env.state_dict(), "policy": of_policy}


def _restore(state: dict[str, Any], engine: Engine, env: SampleSelectionEnv, policy: Any) -> np.ndarray:
    try:
        places = {True: "a GPU", False: "a CPU"}
        began, now = places[state["engine"]["device_random"] is not None], places[engine.device.type == "cuda"]
        if began != now:
            raise CheckpointError(
                f"the run began on {began}, which draws other random numbers than {now}: go on with it where device "
                f"{engine.config.device!r} is {began}, or start a new run."
            )
        engine.load_state_dict(state["engine"])
        if state["policy"] is not None:
            policy.load_state_dict(state["policy"])
        return env.resume(state["env"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"the checkpoint does not fit this run ({first_line(error)}): it is of other networks or of another "
            "version of ssdkd; start a new run."
        ) from error


def finish(folder: RunFolder, engine: Engine, summary: dict[str, Any]) -> None:
    """Write what is told of the student; the summary comes last, and marks the run as finished.

    Raises:
        CheckpointError: the disk does not take it; says where the student is.
    """
    from PIL import Image

    picture = io.BytesIO()
    Image.fromarray(buffer_grid(engine.buffer.filled(), engine.spec.num_classes)).save(picture, "png")
    try:
        if not (folder / CONFIG).is_file():  # somebody deleted the folder meanwhile; saving the student made it anew
            folder.write_text(CONFIG, to_yaml(engine.config))
        folder.write_bytes(PICTURE, picture.getvalue())
        folder.write_json(SUMMARY, summary)
    except CheckpointError as error:
        raise CheckpointError(f"{str(error).rstrip('.')}; the student is in {folder / STUDENT}.") from error


def summarise(config: RunConfig, engine: Engine) -> dict[str, Any]:
    """The run in named numbers; accuracies in percent, null where there is no evaluation set."""
    spec = engine.spec
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
        "teacher_multiply_adds": engine.costs.teacher.multiply_adds,
        "student_multiply_adds": engine.costs.student.multiply_adds,
        "buffer_images": engine.buffer.size,
        "synthesized_images": engine.synthesized,
        "rounds": engine.round,
        "budget_rounds": engine.budget_rounds or None,
        "rollbacks": engine.guard.rollbacks,
        "budget_spent": engine.spent,
        "seconds": round(engine.seconds, 3),
        "phase_seconds": {name: round(s, 3) for name, s in engine.phase_seconds.items()},
        "policy": config.policy,
        "seed": config.seed,
        "device": str(engine.device),
        "chosen": engine.chosen,
        "image": {
            **{"channels": spec.channels, "height": spec.height, "width": spec.width, "classes": spec.num_classes},
            **{"mean": list(spec.mean), "std": list(spec.std)},
            "class_names": list(spec.class_names),
        },
    }


def run_name(config: RunConfig) -> str:
    """What a run's folder is called, before the time."""
    task = config.dataset or re.sub(r"[^\w.-]+", ".", config.teacher.name).strip(".")
    return f"{task}-{config.policy}-seed{config.seed}"


def _say_what_is_missing(engine: Engine, display: Display) -> None:
    teacher = engine.config.teacher
    if teacher.checkpoint is None and not is_in_memory(teacher.name):
        display.say(f"No --teacher.checkpoint: the teacher has the weights that {teacher.name} gave it.")
    observer = engine.inverter.observer
    if not observer.has_batch_norm:
        others = {name: weight for name, weight in engine.terms.items() if weight and name != "batch_norm"}
        terms = ", ".join(f"{name} {weight:g}" for name, weight in others.items())
        how = f"starts from {engine.starts_from} and goes by the other terms: {terms}"
        if observer.unseen:
            display.warn(f"the teacher's batch norm goes unseen, as its forward calls no such layer; inversion {how}.")
        else:
            display.say(f"The teacher has no batch-norm statistics; inversion {how}.")
    given, dataset = engine.config.image, engine.config.dataset
    if (given.mean is None or given.std is None) and (dataset is None or not says_normalisation(dataset)):
        mean, std = (" ".join(f"{v:g}" for v in dict.fromkeys(of)) for of in (engine.spec.mean, engine.spec.std))
        display.say(f"No --image.mean or no --image.std: the teacher is shown pixels normalised by {mean} and {std}.")
    if engine.evaluation is None:
        display.say("No evaluation set (--dataset with --data-root); agreement on synthetic images is all there is.")


def start(argv: Sequence[str] | None) -> None:
    """Read the command line, then begin a run or go on with one."""
    from agents import choose_policy  # another package of that name is noticed before anything is made
    from envs import SampleSelectionEnv  # noqa: F401

    config, given = read_command_line(argv)
    display = Display(quiet=given.quiet)
    if given.resume is None:
        choose_policy(config.policy, config.seed, config.policy_file, config.adapt)  # likewise one that cannot be had
        engine = build_engine(config)
        folder = RunFolder.create(config.out, run_name(config))
        with folder.begun(to_yaml(config)):
            result = run(config, engine, folder, display, remember=False)
    else:
        folder = RunFolder.existing(given.resume)
        with folder.claimed():
            config = _config_to_resume(folder, argv, display)
            if folder.is_finished:
                rounds = folder.read_json(SUMMARY).get("rounds")
                print(f"{folder.path} is finished after {rounds} rounds; its student is {folder / STUDENT}")
                return
            engine = build_engine(config)
            result = run(config, engine, folder, display, _newest_state(folder, display), remember=False)
    if not given.quiet:
        display.console.print(summary_table(result.summary))
        print(f"run folder: {result.folder}")


def read_command_line(argv: Sequence[str] | None) -> tuple[RunConfig, argparse.Namespace]:
    """What the command's words make of its configuration, and its flags that are no part of one."""
    return _read(argv, _default_config(argv))


def _default_config(argv: Sequence[str] | None) -> str | None:
    """The digits job; that of a run to go on with; none for one's own teacher, whom no such settings would suit."""
    peek = Parser(prog=PROG, add_help=False)
    for flag in ("--resume", "--teacher.name"):
        peek.add_argument(flag)
    given = vars(peek.parse_known_args(argv)[0])
    if given["resume"] is not None:
        return str(RunFolder.existing(given["resume"]) / CONFIG)
    return "digits" if given["teacher.name"] is None else None


def _read(argv: Sequence[str] | None, default_config: str | None) -> tuple[RunConfig, argparse.Namespace]:
    config, given = parse_command_line(
        RunConfig,
        argv,
        prog=PROG,
        description=DESCRIPTION,
        extra=(("resume", "run folder to go on with", None), ("quiet", "say nothing but warnings and errors", False)),
        default_config=default_config,
        exclusive=("rounds", "minutes"),
    )
    return config, given


# of these last two the checkpoint knows the content
HARMLESS = ("tracking.", "checkpoint.", "data_root", "policy_file", "teacher.checkpoint")


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
    if not any((folder / CHECKPOINTS).glob("round-*")):
        display.say("The run has no checkpoint yet; it begins anew.")
        return None
    state, path, warnings = load_newest(folder / CHECKPOINTS)
    for warning in warnings:
        display.warn(warning)
    display.say(f"Going on from {path.name}.")
    resumed: dict[str, Any] = state
    return resumed


def main(argv: Sequence[str] | None = None) -> int:
    """The command; a user's mistake is one sentence and exit code 2."""
    try:
        return run_until_stopped(start, argv)
    except KeyboardInterrupt:
        print("stopped before the run began", file=sys.stderr)
        return 130
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: {OUT_OF_MEMORY}.", file=sys.stderr)
        return NumericalError.exit_code
    except ImportError as error:
        print(f"error: {_shadowed(error)}", file=sys.stderr)
        return ConfigError.exit_code


def command() -> int:
    """`ssdkd`: as with `python -m ssdkd.run`, a network's import path may begin in the folder it is started from."""
    sys.path.append("")  # last, so that nothing there hides an installed package
    return alone()


def alone() -> int:
    """The command as all that its process does: what it has imported stays, and is not searched for garbage."""
    gc.enable()
    gc.freeze()
    try:
        return main()
    finally:
        gc.freeze()  # what came since, too: Python searches all of it again, at its end


def _shadowed(error: ImportError) -> str:
    """Say so where another package called `envs` or `agents` stands in front of ours."""
    name = (error.name or "").split(".")[0]
    told = hidden(name) if name in ("envs", "agents") else None
    return told or f"{error}; is ssdkd installed in this environment (pip install -e . in its checkout)?"


if __name__ == "__main__":
    sys.exit(alone())
