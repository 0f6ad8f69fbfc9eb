"""Promises of a policy's training beside what it learns: when it writes, what it says of itself, how it ends."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata as hparams_metadata
from tensorboard.util.tensor_util import make_ndarray
from test_agents import only_run, some_observations, some_policy, tiny_family, train_flags

from agents import curves, train
from agents.evaluate import FIXED, Episode
from agents.learning import Spaces
from agents.policies import CLIP, load_policy
from agents.tasks import family_from, training_tasks
from agents.train import EVALUATION, POLICY, Apart, Record, TrainConfig, Training, judge_on, whole_family
from ssdkd import checkpoint
from ssdkd.coefficients import RANGES
from ssdkd.errors import CheckpointError, ConfigError, NumericalError, SsdkdError
from ssdkd.saving import Stopped, StopSignals
from ssdkd.tracking.folder import CONFIG, RunFolder

# -- the policy and what its file says --------------------------------------------------------------------


def test_a_policys_file_says_nothing_of_where_files_lay() -> None:
    config = TrainConfig(
        family="/home/me/mine.yaml", begin="/home/me/b.safetensors", teachers_root="/data", out="/runs"
    )
    told = config.told()
    assert (told["family"], told["begin"]) == ("mine.yaml", "b.safetensors")
    assert "/" not in json.dumps(told)
    assert TrainConfig().told()["begin"] is None


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"algorithm": "a2c"}, "algorithm is ppo and here it is a2c"),
        ({"net_arch": [8]}, r"net_arch is \[8, 8\] and here it is \[8\]"),
        ({"activation": "relu"}, "activation is tanh and here it is relu"),
        ({"observe": ["progress"]}, r"observations is \['progress', .* and here it is \['progress'\]"),
        ({"act": ["effort"]}, r"actions is .* and here it is \['effort'\]"),
    ],
)
def test_a_training_begins_with_a_policy_of_its_own_make_alone(
    other: dict[str, Any], said: str, tmp_path: Path
) -> None:
    some_policy().save(tmp_path / "p.safetensors")
    same = {"net_arch": [8, 8], "begin": str(tmp_path / "p.safetensors")}
    assert TrainConfig(**same).beginning() is not None
    with pytest.raises(ConfigError, match=f"^begin: the policy's {said}; begin with a policy of the same make"):
        TrainConfig(**{**same, **other}).beginning()


def a_training(tmp_path: Path, **fields: Any) -> Training:
    """Made, but not begun."""
    family = family_from(tiny_family(tmp_path))
    config = TrainConfig(family=str(tmp_path / "tiny-family.yaml"), net_arch=[8, 8], processes=False, **fields)
    return Training(config, training_tasks(family), family.base)


def test_what_a_training_shows_its_algorithm_is_what_its_policys_file_says(tmp_path: Path) -> None:
    training, seen = a_training(tmp_path, arguments={"gamma": 0.5}), some_observations()
    scales = training.vector
    scales.obs_rms.mean, scales.obs_rms.var = np.full(seen.shape[1], 0.5), np.full(seen.shape[1], 1e-4)
    scales.ret_rms.var = np.float64(16.0)
    training.model.num_timesteps = 7
    policy = training.policy()
    assert np.abs(policy.seen(seen)).max() == CLIP
    np.testing.assert_array_equal(scales.normalize_obs(seen), policy.seen(seen))
    np.testing.assert_allclose(scales.normalize_reward(np.array([2.0, 1e9])), [0.5, CLIP])
    assert policy.description.reward_scale == pytest.approx(4.0)
    assert policy.description.training["steps"] == 7, "those learned, not those planned"
    assert scales.gamma == 0.5, "as the algorithm discounts"


def short(tmp_path: Path, *more: str) -> list[str]:
    """Flags of a training whose rollouts are of eight rounds."""
    alone = ["--environments", "1", "--arguments", "{n_steps: 8, batch_size: 8, n_epochs: 1}", "--evaluate-seeds", "0"]
    return [*train_flags(tmp_path, "ppo"), *alone, *more]


def test_without_normalising_a_policy_sees_what_there_is_and_a_training_goes_on(tmp_path: Path) -> None:
    assert train.main([*short(tmp_path), "--normalise", "false", "--steps", "8"]) == 0
    folder, seen = only_run(tmp_path), some_observations()
    assert not isinstance(a_training(tmp_path, normalise=False).vector, VecNormalize)
    policy = load_policy(folder / POLICY)
    assert policy.description.reward_scale == 1.0
    np.testing.assert_array_equal(policy.seen(seen), seen)
    assert train.main(["--resume", str(folder), "--steps", "16", "--quiet"]) == 0
    assert load_policy(folder / POLICY).description.training["steps"] == 16


def test_observations_hardly_move_the_scales_of_a_policy_that_was_trained_before(tmp_path: Path) -> None:
    training, policy = a_training(tmp_path), some_policy()
    training.begin_as(policy)
    training.vector.obs_rms.update(np.full((100, len(policy.mean)), 9.0))
    np.testing.assert_allclose(training.vector.obs_rms.mean, policy.mean, atol=0.02)
    assert not np.array_equal(training.vector.obs_rms.mean, policy.mean)


def test_a_training_that_begins_with_a_policy_learns_on_from_its_weights(tmp_path: Path) -> None:
    some_policy().save(tmp_path / "p.safetensors")
    flags = ["--begin", str(tmp_path / "p.safetensors"), "--net-arch", "[8, 8]", "--steps", "8", "--seed", "5"]
    assert train.main([*short(tmp_path), *flags, "--arguments", "{n_steps: 8, batch_size: 8, learning_rate: 0.0}"]) == 0
    began, ended = (load_policy(path) for path in (tmp_path / "p.safetensors", only_run(tmp_path) / POLICY))
    held = ended.network.state_dict()
    assert all(torch.equal(value, held[name]) for name, value in began.network.state_dict().items())


# -- where episodes are played ----------------------------------------------------------------------------


def test_an_episode_is_played_as_the_training_says(tmp_path: Path) -> None:
    training = a_training(tmp_path, reward="validation", warm_starts=3, observe=["progress"], act=["effort", "alpha"])
    env = training.vector.envs[0]
    assert (env.unwrapped.reward_name, env.unwrapped._warm_starts) == ("validation", 3)
    assert (env.observation_space.shape, env.action_space.shape) == ((1,), (2,))


def test_a_process_of_an_episode_has_one_thread_and_leaves_ctrl_c_to_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(train.multiprocessing, "parent_process", lambda: object())
    monkeypatch.setattr(train.signal, "signal", lambda *given: told.append(given))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: told.append(threads))
    env = a_training(tmp_path, environments=1).vector.envs[0]
    assert told == [1, (signal.SIGINT, signal.SIG_IGN)]
    assert isinstance(env, Apart)


@pytest.mark.parametrize(("error", "code"), [(ConfigError("no images"), 2), (NumericalError("no numbers"), 3)])
@pytest.mark.parametrize("where", ["reset", "step"])
def test_an_error_ends_the_process_of_an_episode_as_it_would_end_a_command(
    where: str, error: SsdkdError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    env = Spaces(["progress"], ["effort"])
    env.reset = lambda **_: (np.zeros(1), {})  # type: ignore[method-assign, assignment, misc]
    setattr(env, where, fails)
    episode = Apart(env)
    if where == "step":
        episode.reset()
    with pytest.raises(SystemExit) as ended:
        episode.reset() if where == "reset" else episode.step(np.zeros(1))
    assert ended.value.code == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_other_seeds_play_other_episodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []

    def learn(self: Any, *_: Any, **__: Any) -> None:
        told.append(seeds[-1])
        raise KeyboardInterrupt

    seeds: list[int] = []
    monkeypatch.setattr(DummyVecEnv, "seed", lambda self, seed: seeds.append(seed))
    monkeypatch.setattr(PPO, "learn", learn)
    for seed in ("0", "1", "2", "1"):
        assert train.main(train_flags(tmp_path, "ppo", "--seed", seed)) == 130
    first, second, third, again = told
    assert second == again
    assert min(second - first, third - second) > 1000, "not even those of environments beside each other meet"


# -- when it writes -----------------------------------------------------------------------------------------


class Noted:
    """A `Record` of a training that plays nothing, and what it does when: (what, step)."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, began_at: int = 0, **fields: Any) -> None:
        self.did: list[tuple[str, int]] = []
        self.shown: dict[str, Any] = {}
        logger = SimpleNamespace(
            record=lambda name, value, **_: self.shown.update({name: value}), dump=self.note("log")
        )
        self.model = SimpleNamespace(num_timesteps=began_at, logger=logger)
        policy = SimpleNamespace(save=lambda path: self.note("policy")(self.model.num_timesteps))
        config = TrainConfig(**fields)
        training: Any = SimpleNamespace(
            config=config, model=self.model, judged=0, state_dict=dict, policy=lambda: policy
        )
        self.signals = StopSignals()
        self.record = Record(training, RunFolder(folder), self.judge, self.signals)
        self.record.model = self.model  # type: ignore[assignment]
        monkeypatch.setattr(checkpoint, "save", lambda folder, state, step, keep: self.did.append(("save", step)))

    def note(self, what: str) -> Callable[[int], None]:
        return lambda step: self.did.append((what, step))

    def judge(self, steps: int) -> dict[str, dict[str, float]]:
        self.did.append(("judge", steps))
        return {"learned": {"accuracy": 70.0}}

    def play(self, rounds: int, *ended: dict[str, float]) -> None:
        """A rollout, in which these episodes end."""
        infos: list[dict[str, Any]] = [{"coefficients": {r.name: r.neutral for r in RANGES}} for _ in range(rounds)]
        for info, episode in zip(infos, ended, strict=False):
            info["episode"] = episode
        for info in infos:
            self.model.num_timesteps += 1
            self.record.locals = {"infos": [info]}
            assert self.record.on_step()
        self.record.on_rollout_start()

    def steps_of(self, what: str) -> list[int]:
        return [step for done, step in self.did if done == what]


def test_points_evaluations_and_checkpoints_come_when_they_are_due_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = Noted(tmp_path, monkeypatch, log_every=5, evaluate_every=10, checkpoint_every=15)
    for _ in range(7):
        noted.play(5)
    noted.play(2)
    noted.record.finish()
    assert [step for step in noted.steps_of("log") if step % 10 == 5] == [5, 15, 25, 35]
    assert noted.steps_of("judge") == [10, 20, 30, 37]
    assert noted.steps_of("save") == [15, 30, 37, 37], "again after the last evaluation, which it is to tell of"


def test_evaluations_and_checkpoints_that_nobody_asked_for_come_only_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seldom = Noted(tmp_path, monkeypatch, evaluate_every=0, checkpoint_every=0)
    for _ in range(3):
        seldom.play(5000)
    assert not {"judge", "save"} & {what for what, _ in seldom.did}
    seldom.record.finish()
    assert (seldom.steps_of("judge"), set(seldom.steps_of("save"))) == ([15_000], {15_000})
    never = Noted(tmp_path, monkeypatch, evaluate_every=5, evaluate_seeds=0)
    never.play(5)
    never.record.finish()
    assert not never.steps_of("judge")


def test_what_is_judged_is_the_newest_policy_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = Noted(tmp_path, monkeypatch, evaluate_every=5)
    noted.play(5)
    assert noted.did.index(("policy", 5)) < noted.did.index(("judge", 5))
    assert noted.shown["evaluation/accuracy_percent_learned"] == 70.0
    noted.record.finish()
    assert noted.steps_of("judge") == [5]


def test_a_request_to_save_is_granted_once_and_one_to_stop_ends_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = Noted(tmp_path, monkeypatch)
    noted.signals.save = True
    for _ in range(3):
        noted.play(5)
    assert noted.steps_of("save") == [5]
    noted.signals.stop = signal.SIGTERM
    with pytest.raises(Stopped, match=f"SIGTERM; the training is saved as of step 15 .* --resume {tmp_path}$"):
        noted.record.finish()
    assert noted.steps_of("save") == [5, 15]
    assert not noted.steps_of("judge"), "which would take its time"


def test_a_point_of_a_curve_tells_of_the_rounds_and_episodes_since_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = Noted(tmp_path, monkeypatch, log_every=5, evaluate_seeds=0, began_at=100_000)
    clock = iter([100.0, 102.0])
    noted.record.began = 92.0
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    noted.play(5, {"r": 1.0, "l": 4.0}, {"r": 3.0, "l": 2.0})
    assert noted.shown["episodes/ended"] == 2
    assert len(noted.shown["coefficients/effort"]) == 5
    noted.play(5, {"r": 8.0, "l": 6.0})
    assert noted.shown["episodes/ended"] == 1
    assert (noted.shown["episodes/return"], noted.shown["episodes/rounds"]) == (8.0, 6.0)
    assert noted.shown["speed/rounds_per_second"] == 1.0, "those of this process: 10 rounds in 10 seconds"
    noted.record.log()
    assert noted.steps_of("log") == [100_005, 100_010], "where nothing happened there is no point"


# -- judging ------------------------------------------------------------------------------------------------


def test_the_fixed_policies_are_played_once_and_the_newest_each_time_on_the_same_episodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played: list[Any] = []

    def play(names: Any, base: str, tasks: Any, seeds: Any, processes: int, trust: bool = False) -> list[Episode]:
        played.append((list(names), base, tasks, list(seeds), processes))
        return [Episode(name, "a task", 0, 1.0, 1.0, 50.0, 60.0, 70.0, 9, 1.0, 2.0) for name in names]

    monkeypatch.setattr(train, "evaluate", play)
    folder = RunFolder(tmp_path)
    folder.write_text(EVALUATION, "".join(f'{{"steps": {steps}}}\n' for steps in (10, 20, 30)) + '{"steps": 3')
    config = TrainConfig(evaluate_seeds=3, environments=5)
    judge = judge_on([{"rounds": 5}], "digits", config, folder, after=20)
    assert list(judge(30)) == ["learned", *FIXED]
    judge(40)
    rest = ("digits", [{"rounds": 5}], [1000, 1001, 1002], 5)
    mine = [str(tmp_path / POLICY)]
    assert played == [(list(FIXED), *rest), (mine, *rest), (mine, *rest)]
    lines = [json.loads(line) for line in (tmp_path / EVALUATION).read_text().splitlines()]
    assert [line["steps"] for line in lines] == [10, 20, 30, 40]
    assert lines[-1]["ssdkd"]["accuracy"] == 70.0
    (tmp_path / EVALUATION).unlink()
    (tmp_path / EVALUATION).mkdir()
    with pytest.raises(CheckpointError, match=f"{EVALUATION} cannot be written: [A-Z]"):
        judge(50)
    (tmp_path / EVALUATION).rmdir()
    alone = TrainConfig(environments=5, processes=False)
    judge_on([], "digits", alone, folder)(50)
    assert played[-1][-1] == 1, "without processes of their own, one at a time"


# -- how it is said to go, and how it ends ------------------------------------------------------------------


def test_a_training_prints_its_curves_and_where_its_policy_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(short(tmp_path, "--steps", "8")) == 0
    folder = only_run(tmp_path)
    assert capsys.readouterr().out == f"policy: {folder / POLICY}\n", "asked to be quiet"
    assert train.main(["--resume", str(folder), "--steps", "16"]) == 0
    said = capsys.readouterr().out
    assert "rounds_per_second" in said
    assert "ended" in said
    assert "effort" not in said, "of twelve coefficients it would be too much"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `run` would have trained: no training takes place."""
    told: list[Any] = []

    def note(config: TrainConfig, family: Any, folder: RunFolder, begin: Any, state: Any, quiet: bool) -> Path:
        told.append(SimpleNamespace(config=config, family=family, folder=folder, begin=begin, state=state, quiet=quiet))
        return folder / POLICY

    monkeypatch.setattr(train, "train", note)
    return told


def test_a_training_killed_before_its_first_checkpoint_begins_anew_with_the_same_policy(
    tmp_path: Path, asked: list[Any]
) -> None:
    some_policy().save(tmp_path / "p.safetensors")
    flags = train_flags(tmp_path, "ppo", "--begin", str(tmp_path / "p.safetensors"), "--net-arch", "[8, 8]")
    assert train.main(flags) == 0
    assert train.main(["--resume", str(only_run(tmp_path))]) == 0
    first, again = asked
    assert first.begin.fingerprint() == again.begin.fingerprint()
    assert (first.state, again.state) == (None, None)
    assert (first.quiet, again.quiet) == (True, False)


def test_a_training_has_one_thread_and_a_folder_named_by_its_algorithm_and_seed(
    tmp_path: Path, asked: list[Any]
) -> None:
    torch.set_num_threads(2)
    assert train.main(train_flags(tmp_path, "sac", "--seed", "3")) == 0
    assert torch.get_num_threads() == 1
    assert only_run(tmp_path).name.startswith("policy-sac-seed3-")


def test_a_training_goes_on_in_other_rhythms_and_places_but_not_with_other_settings(
    tmp_path: Path, asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(train_flags(tmp_path, "ppo")) == 0
    folder = only_run(tmp_path)
    rhythms = ["--log-every", "7", "--checkpoint-every", "9", "--evaluate-every", "8", "--evaluate-seeds", "5"]
    places = ["--out", str(tmp_path / "elsewhere"), "--teachers-root", str(tmp_path)]
    assert train.main(["--resume", str(folder), *rhythms, *places, "--steps", "99"]) == 0
    config = asked[-1].config
    assert (config.log_every, config.checkpoint_every, config.evaluate_every) == (7, 9, 8)
    assert (config.evaluate_seeds, config.steps) == (5, 99)
    for other in (["--seed", "5"], ["--reward", "probe"], ["--normalise", "false"], ["--environments", "3"]):
        assert train.main(["--resume", str(folder), *other]) == 2
        key = other[0][2:]
        assert capsys.readouterr().err.startswith(f"error: {key} was ")
    assert len(asked) == 2


def test_a_training_that_is_to_go_further_than_planned_goes_as_far_after_it_was_stopped_again(
    tmp_path: Path, asked: list[Any]
) -> None:
    assert train.main(train_flags(tmp_path, "ppo", "--steps", "16")) == 0
    folder = only_run(tmp_path)
    assert train.main(["--resume", str(folder), "--steps", "64", "--reward", "probe"]) == 2, "which is not remembered"
    assert train.main(["--resume", str(folder)]) == 0
    assert train.main(["--resume", str(folder), "--steps", "32"]) == 0
    assert train.main(["--resume", str(folder)]) == 0
    assert [told.config.steps for told in asked] == [16, 16, 32, 32]


def test_a_training_is_on_all_tasks_of_its_family_whose_teachers_lie_where_it_is_told(
    tmp_path: Path, asked: list[Any]
) -> None:
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "wide.safetensors").touch()
    common = {"teacher": {"checkpoint": "wide.safetensors"}}
    axes = {"rounds": [{"rounds": 2}, {"rounds": 3}], "seed": [{"seed": 1}, {"seed": 2}]}
    (tmp_path / "family.yaml").write_text(yaml.safe_dump({"common": common, "axes": axes, "held_out": [{"rounds": 9}]}))
    flags = ["--family", str(tmp_path / "family.yaml"), "--teachers-root", str(tmp_path / "here")]
    assert train.main([*train_flags(tmp_path, "ppo"), *flags]) == 0
    assert train.main(["--resume", str(only_run(tmp_path)), "--teachers-root", str(tmp_path / "there")]) == 0
    for told, place in zip(asked, ("here", "there"), strict=True):
        assert [(task["rounds"], task["seed"]) for task in told.family.tasks] == [(2, 1), (2, 2), (3, 1), (3, 2)]
        assert [task["rounds"] for task in told.family.held_out] == [9]
        teachers = {task["teacher"]["checkpoint"] for task in [*told.family.tasks, *told.family.held_out]}
        assert teachers == {str((tmp_path / place / "wide.safetensors").resolve())}


@pytest.mark.skipif(os.name != "posix", reason="locks")
def test_two_trainings_do_not_write_one_folder(
    tmp_path: Path, asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(train_flags(tmp_path, "ppo")) == 0
    with asked[0].folder.claimed():
        assert train.main(["--resume", str(asked[0].folder.path)]) == 2
    assert "is being written by another run" in capsys.readouterr().err


def test_a_folder_that_holds_a_policy_or_is_gone_on_with_stays_where_the_training_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: set[str] = set()

    def refused(config: Any, family: Any, folder: RunFolder, *rest: Any) -> Path:
        for name in learned:
            (folder / name).touch()
        raise ConfigError("it cannot learn")

    monkeypatch.setattr(train, "train", refused)
    assert train.main(train_flags(tmp_path, "ppo")) == 2
    assert not (tmp_path / "runs").exists()
    learned.add(POLICY)
    assert train.main(train_flags(tmp_path, "ppo")) == 2
    folder = only_run(tmp_path)
    learned.clear()
    (folder / POLICY).unlink()
    assert train.main(["--resume", str(folder)]) == 2
    assert (folder / CONFIG).is_file()


@pytest.mark.parametrize(("code", "said"), [(2, True), (3, True), (1, False), (-9, False)])
def test_the_process_of_an_episode_that_ended_with_the_code_of_a_sentence_has_said_why(code: int, said: bool) -> None:
    ended, other = multiprocessing.Pipe()
    other.close()
    vector = object.__new__(SubprocVecEnv)
    vector.processes = [SimpleNamespace(sentinel=ended, join=lambda seconds: None, exitcode=code)]
    assert train._has_said(vector) is said


@pytest.mark.parametrize(
    "fault",
    [OSError(28, "No space left on device"), MemoryError("no memory")],
    ids=["disk", "memory"],
)
def test_what_the_machine_lacks_is_not_laid_to_the_algorithms_arguments(
    fault: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any) -> None:
        raise fault

    monkeypatch.setattr(PPO, "train", fails)
    with pytest.raises(type(fault)):
        train.main(short(tmp_path, "--steps", "8"))


def test_a_flaw_of_an_episode_or_of_what_is_written_is_not_laid_to_the_algorithms_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise ValueError("a flaw")

    flags = short(tmp_path, "--evaluate-seeds", "1", "--evaluate-every", "8", "--steps", "16")
    with monkeypatch.context() as patched:
        patched.setattr("ssdkd.engine.Engine.replay", fails)
        with pytest.raises(ValueError, match="a flaw"):
            train.main(flags)
    judged: list[Any] = []
    monkeypatch.setattr(train, "judge_on", lambda tasks, *_: judged.extend(tasks) or fails)
    with pytest.raises(ValueError, match="a flaw"):
        train.main(flags)
    assert [task["rounds"] for task in judged] == [5], "the held-out tasks"


# -- tasks ----------------------------------------------------------------------------------------------------


def test_a_reward_that_there_is_not_is_known_before_a_process_ends_by_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reward: expected .*'fame'"):
        whole_family(TrainConfig(family=tiny_family(tmp_path), reward="fame"))


def test_a_reward_of_accuracy_needs_an_evaluation_set_of_each_task_or_of_the_base(tmp_path: Path) -> None:
    family = whole_family(TrainConfig(family=tiny_family(tmp_path), reward="outcome"))
    assert len(family.tasks) == 2
    assert [task["rounds"] for task in family.held_out] == [5]
    (tmp_path / "blind.yaml").write_text("tasks: [{rounds: 3}, {rounds: 7, dataset: null}]")
    with pytest.raises(ConfigError, match="outcome needs accuracy, and task 'rounds=7 dataset=None' has no evaluation"):
        whole_family(TrainConfig(family=str(tmp_path / "blind.yaml"), reward="outcome"))
    assert len(whole_family(TrainConfig(family=str(tmp_path / "blind.yaml"), reward="probe")).tasks) == 2


# -- its curves -----------------------------------------------------------------------------------------------


def test_the_figures_of_episodes_and_coefficients_are_what_their_names_say() -> None:
    ended = [{"r": 1.0, "l": 4.0}, {"r": 3.0, "l": 2.0}, {"r": 8.0, "l": 3.0}]
    assert curves.of_episodes(ended) == pytest.approx(
        {"episodes/return": 4, "episodes/return_spread": (26 / 3) ** 0.5, "episodes/rounds": 3, "episodes/ended": 3}
    )
    found = curves.of_coefficients(np.arange(11.0)[:, None] + 100 * np.arange(len(RANGES)))
    for place, r in enumerate(RANGES):
        figures = [found[f"coefficients/{r.name}_{name}"] - 100 * place for name in ("q10", "mean", "q90")]
        assert figures == pytest.approx([1.0, 5.0, 9.0])
        assert found[f"coefficients/{r.name}_spread"] == pytest.approx(10**0.5)


@pytest.mark.parametrize("judged", [True, False])
def test_the_charts_put_the_learned_policy_beside_the_fixed_ones_and_draw_a_band_of_each_coefficient(
    judged: bool,
) -> None:
    pages = curves.layout(judged)
    beside = [page for page in pages if "beside the fixed" in page]
    assert bool(beside) is judged
    for page in beside:
        named = [[tag.strip("^$").rpartition("_")[2] for tag in chart.multiline.tag] for chart in pages[page]]
        assert named == [["learned", *FIXED]] * len(curves.MEASURES)
    bands = [series for chart in pages["coefficients: what is tried"] for series in chart.margin.series]
    drawn = [[name.rpartition("_")[2] for name in (band.lower, band.value, band.upper)] for band in bands]
    assert drawn == [["q10", "mean", "q90"]] * len(RANGES)


def test_what_an_algorithm_logs_is_in_tensorboard_beside_a_plan_the_settings_and_how_it_went(tmp_path: Path) -> None:
    config = TrainConfig(seed=3, evaluate_seeds=1)
    logged = {"train/loss": np.float32(0.5), "coefficients/effort": torch.ones(4), "words": "none", "unseen": 1.0}
    for after in (0, 20):  # the second process goes on from step 20
        output = curves.EventOutput(tmp_path, config, after)
        for step in (10, 20):
            output.write(logged, {"unseen": ("tensorboard",), "words": ("stdout",)}, after + step)
        output.close()
    shown = EventAccumulator(str(tmp_path), {"histograms": 0}).Reload()
    assert [event.step for event in shown.Scalars("train/loss")] == [10, 20, 30, 40]
    assert shown.Tags()["scalars"] == ["train/loss"]
    assert [event.histogram_value.num for event in shown.Histograms("coefficients/effort")] == [4] * 4
    assert "tried" in shown.SummaryMetadata("coefficients/effort").summary_description
    assert [event.step for event in shown.Tensors("plan")] == [10], "once"
    (event,) = shown.Tensors("custom_scalars__config__")
    titles = [page.title for page in layout_pb2.Layout.FromString(make_ndarray(event.tensor_proto).item()).category]
    assert titles == list(curves.layout(True))
    about = shown.PluginTagToContent("hparams")
    settings = hparams_metadata.parse_session_start_info_plugin_data(about["_hparams_/session_start_info"]).hparams
    assert (settings["seed"].number_value, settings["algorithm"].string_value) == (3, "ppo")
    listed = hparams_metadata.parse_experiment_plugin_data(about["_hparams_/experiment"])
    assert {info.name for info in listed.hparam_infos if info.differs} == {"algorithm", "steps", "seed"}
    assert "evaluation/accuracy_percent_learned" in {info.name.tag for info in listed.metric_infos}


def test_a_training_that_nobody_judges_is_told_by_its_return(tmp_path: Path) -> None:
    output = curves.EventOutput(tmp_path, TrainConfig(evaluate_seeds=0))
    output.write({"episodes/return": 0.5}, {}, 10)
    output.close()
    about = EventAccumulator(str(tmp_path)).Reload().PluginTagToContent("hparams")
    listed = hparams_metadata.parse_experiment_plugin_data(about["_hparams_/experiment"])
    assert [info.name.tag for info in listed.metric_infos] == ["episodes/return"]


# -- taking up a checkpoint -----------------------------------------------------------------------------------


def taken_up(state: dict[str, Any], fault: Exception | None = None) -> list[Any]:
    """What of `state` a training of the family "mine" is given."""
    given: list[Any] = []

    def load(state: dict[str, Any]) -> None:
        if fault is not None:
            raise fault
        given.append(state)

    training: Any = SimpleNamespace(family="mine", config=TrainConfig(family="mine.yaml"), load_state_dict=load)
    train._restore(training, state)
    return given


def test_a_checkpoint_is_taken_up_by_a_training_on_its_family_and_an_older_one_that_does_not_tell_by_any() -> None:
    for state in ({"family": "mine"}, {"judged": 0}):
        assert taken_up(state) == [state]
    with pytest.raises(CheckpointError, match=r"the tasks of mine\.yaml have changed since the training began"):
        taken_up({"family": "another"})


@pytest.mark.parametrize("kind", [KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError])
def test_a_checkpoint_of_another_version_is_refused_in_one_sentence(kind: type[Exception]) -> None:
    with pytest.raises(CheckpointError, match=r"does not fit this training \(.*two lines.*\).*start a new training\.$"):
        taken_up({"family": "mine"}, kind("two lines\nof which one is shown"))
