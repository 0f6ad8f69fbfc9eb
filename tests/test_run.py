"""Promises of `python -m ssdkd.run`: what a run leaves behind, and one clear sentence for every mistake."""

import io
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

import ssdkd
from ssdkd.config import RunConfig, build, read_yaml
from ssdkd.data import dataset_spec, load_dataset
from ssdkd.errors import ConfigError
from ssdkd.models import create_model, load_weights, save_weights
from ssdkd.run import main
from ssdkd.tracking.display import Display, describe, summary_table
from ssdkd.tracking.folder import RunFolder

ROOT = Path(ssdkd.__file__).resolve().parent.parent
TASK = {"num_classes": 10, "in_channels": 1, "image_size": 8}
SMALL = [
    *("--rounds", "3", "--device", "cpu", "--inversion.images", "32", "--inversion.warmup", "2"),
    *("--inversion.steps", "2", "--inversion.width", "8", "--probe.images", "16"),
    *("--buffer.capacity", "64", "--distillation.batch", "32", "--distillation.steps", "3"),
    *("--policy", "ssdkd"),  # whose effort is 1, so that a budget of three rounds is three rounds
]


def one_run(out: Path, *more: str) -> Path:
    """Run the command in this process -> the folder that it made."""
    before = set(out.iterdir()) if out.is_dir() else set()
    assert main([*SMALL, "--out", str(out), "--quiet", *more]) == 0
    (made,) = set(out.iterdir()) - before
    return made


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def as_a_user(*argv: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, as a user at a prompt would."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    variables.pop("FORCE_COLOR", None)
    return subprocess.run([sys.executable, *argv], cwd=cwd, env=variables, capture_output=True, text=True, timeout=120)


# -- what a run leaves behind ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return one_run(tmp_path_factory.mktemp("runs"), "--seed", "3")


def test_a_run_leaves_its_student_and_what_it_took(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {"config.yaml", "student.safetensors", "metrics.jsonl", "summary.json", "buffer.png"}
    assert not [name for name in names if name.endswith(".tmp")]
    assert re.fullmatch(r"digits-ssdkd-seed3-\d{8}-\d{6}", finished.name)


def test_the_summary_says_what_was_reached_and_at_what_cost(finished: Path) -> None:
    summary = summary_of(finished)
    assert summary["teacher_accuracy"] > 95
    assert 0 <= summary["student_accuracy"] <= 100
    assert summary["teacher_parameters"] >= 10 * summary["student_parameters"] > 0
    assert summary["teacher_multiply_adds"] > summary["student_multiply_adds"] > 0
    assert summary["buffer_images"] == 64
    assert summary["synthesized_images"] == 32 * (2 + 3) + 16  # warm-up, rounds, probe
    assert (summary["rounds"], summary["policy"], summary["seed"]) == (3, "ssdkd", 3)
    assert summary["budget_rounds"] == 3
    phases = summary["phase_seconds"]
    assert summary["seconds"] == pytest.approx(sum(phases.values()) - phases["evaluation"], abs=0.01)


def test_the_student_file_holds_the_student_that_was_measured(finished: Path) -> None:
    config = build(RunConfig, [read_yaml(str(finished / "config.yaml"))])
    student = create_model(config.student.name, config.student.arguments, **TASK)
    load_weights(student, finished / "student.safetensors")
    digits = load_dataset("digits", None)
    mean, std = digits.spec.normalisation()
    with torch.no_grad():
        named = student.eval()((digits.images / 255.0 - mean) / std).argmax(dim=1)
    right, told = int((named == digits.labels).sum()), summary_of(finished)["student_accuracy"]
    assert 100 * right / 360 == pytest.approx(told, abs=0.3)
    assert told in {100 * n / 360 for n in range(361)}, "not rounded on the way"


def test_metrics_are_one_line_of_json_for_each_round(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3]
    for key in ("probe_kl", "probe_agreement", "class_entropy", "reward", "w_div", "effort"):
        assert all(isinstance(line[key], float) for line in lines)


@pytest.mark.parametrize(
    ("every", "measured", "rounds"), [("2", "0", [2, 3]), ("5", "0", [3]), ("5", "5", [1, 3]), ("5", "2", [1, 2, 3])]
)
def test_what_is_measured_and_the_last_round_are_noted_however_seldom_lines_are_asked_for(
    every: str, measured: str, rounds: list[int], tmp_path: Path
) -> None:
    folder = one_run(tmp_path, "--tracking.metrics-every", every, "--tracking.evaluate-every", measured)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == rounds
    assert "3 rounds by ssdkd" in (folder / "report.html").read_text()


def test_the_picture_shows_a_row_of_images_for_each_class(finished: Path) -> None:
    with Image.open(finished / "buffer.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.shape[0] >= 10 * 8
    assert pixels.std() > 10


def test_the_config_of_a_run_gives_the_same_student_again(finished: Path, tmp_path: Path) -> None:
    assert main(["--config", str(finished / "config.yaml"), "--out", str(tmp_path), "--quiet"]) == 0
    (again,) = tmp_path.iterdir()
    assert (again / "student.safetensors").read_bytes() == (finished / "student.safetensors").read_bytes()


def test_another_seed_gives_another_student(finished: Path, tmp_path: Path) -> None:
    other = one_run(tmp_path, "--seed", "4")
    assert (other / "student.safetensors").read_bytes() != (finished / "student.safetensors").read_bytes()


@pytest.mark.parametrize("policy", ["uniform", "random", "ssdkd", "learned"])
def test_every_policy_runs_through_the_same_command(policy: str, tmp_path: Path) -> None:
    folder = one_run(tmp_path, "--policy", policy, "--rounds", "6")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert summary_of(folder)["policy"] == policy
    constant = len({line["alpha"] for line in lines}) == 1
    assert constant == (policy in ("uniform", "ssdkd"))


@pytest.mark.parametrize("adapt", [(), ("--adapt", "true")])
def test_the_policy_that_ships_decides_unless_another_is_named(adapt: tuple[str, ...], tmp_path: Path) -> None:
    without = [word for word in SMALL if word not in ("--policy", "ssdkd")]
    assert main([*without, *adapt, "--rounds", "6", "--out", str(tmp_path), "--quiet"]) == 0
    (folder,) = tmp_path.iterdir()
    summary, lines = summary_of(folder), (folder / "metrics.jsonl").read_text().splitlines()
    assert summary["policy"] == "learned"
    first = json.loads(lines[0])
    if not adapt:  # which draws its actions
        assert first["effort"] > 1.5, "images are dear here"
        assert first["w_div"] > 0.5, "less in so short a run, but not neutral"
        assert first["gamma"] == pytest.approx(0.0, abs=1e-6), "which it does not set"
        assert first["student_batch"] == 32, "as configured: the teacher has batch norm"


def test_the_student_is_the_same_with_and_without_an_evaluation_set(tmp_path: Path) -> None:
    spec = dataset_spec("digits")
    blind = [
        *("--dataset", "null", "--image.channels", "1", "--image.height", "8", "--image.width", "8"),
        *("--image.classes", "10", f"--image.mean={list(spec.mean)}", f"--image.std={list(spec.std)}"),
    ]
    seeing = one_run(tmp_path, "--tracking.evaluate-every", "1", "--rounds", "5")
    unseeing = one_run(tmp_path, *blind, "--rounds", "5")
    assert summary_of(seeing)["student_accuracy"] is not None
    assert summary_of(unseeing)["student_accuracy"] is None
    assert summary_of(unseeing)["teacher_accuracy"] is None
    assert (seeing / "student.safetensors").read_bytes() == (unseeing / "student.safetensors").read_bytes()


def test_a_budget_in_minutes_ends_in_time(tmp_path: Path) -> None:
    assert main([*SMALL[2:], "--minutes", "0.02", "--out", str(tmp_path), "--quiet"]) == 0
    (folder,) = tmp_path.iterdir()
    summary = summary_of(folder)
    assert summary["rounds"] >= 1
    assert 1.2 <= summary["seconds"] < 4


def test_runs_that_begin_in_the_same_second_get_folders_of_their_own(tmp_path: Path) -> None:
    made: list[Path] = []
    threads = [
        threading.Thread(target=lambda: made.append(RunFolder.create(tmp_path / "runs", "digits").path))
        for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 20


def test_two_runs_started_at_once_into_one_output_root_do_not_disturb_each_other(tmp_path: Path) -> None:
    alone = one_run(tmp_path / "alone", "--threads", "1", "--checkpoint.rounds", "1")
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "ssdkd.run", *SMALL, "--threads", "1", "--checkpoint.rounds", "1"]
    argv += ["--out", str(tmp_path / "both")]
    running = [subprocess.Popen(argv, env=variables, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    folders = sorted((tmp_path / "both").iterdir())
    assert len(folders) == 2
    for folder in folders:
        assert sum(f"run folder: {folder}\n" in text for text in said) == 1, "each run names a folder of its own"
        assert (folder / "student.safetensors").read_bytes() == (alone / "student.safetensors").read_bytes()
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["round"] for line in lines] == [1, 2, 3]
        for name in (".", "checkpoints"):
            assert len(list((folder / name).iterdir())) == len(list((alone / name).iterdir()))


def test_a_folder_that_one_run_writes_is_refused_to_another(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder.existing(finished).claimed():
        assert main(["--resume", str(finished)]) == 2
    assert "is being written by another run" in capsys.readouterr().err
    assert main(["--resume", str(finished)]) == 0


def test_a_teacher_of_ones_own_is_brought_with_flags(tmp_path: Path) -> None:
    """Neither the default job's arguments nor its settings get in the way."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wide = create_model("wrn16_1", num_classes=5, in_channels=3, image_size=16)
    torch.save({"state_dict": wide.state_dict()}, tmp_path / "teacher.pth")
    flags = [
        *("--teacher.name", "wrn16_1", "--teacher.checkpoint", str(tmp_path / "teacher.pth")),
        *("--student.name", "convnet_small", "--image.classes", "5", "--image.channels", "3"),
        *("--image.height", "16", "--image.width", "16"),
    ]
    folder = one_run(tmp_path / "runs", *flags)
    summary = summary_of(folder)
    assert (summary["teacher"], summary["student"]) == ("wrn16_1", "convnet_small")
    assert summary["student_accuracy"] is None
    assert folder.name.startswith("wrn16_1-ssdkd-seed0-")
    assert "latent: 128" in (folder / "config.yaml").read_text()


# -- what a user sees -----------------------------------------------------------------------------------


def test_the_output_is_plain_where_there_is_no_terminal(tmp_path: Path) -> None:
    done = as_a_user("-m", "ssdkd.run", *SMALL, "--out", "runs", cwd=tmp_path)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stdout + done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert done.stdout == f"run folder: runs/{folder.name}\n"
    for words in ("accuracy", "parameters", "multiply-adds", "64 kept of 176 made", "inversion", "replay"):
        assert words in done.stderr


def test_what_pixels_the_teacher_is_shown_is_said_where_nobody_said_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = ["--image.channels", "1", "--image.height", "8", "--image.width", "8", "--image.classes", "10"]
    unknown = [*SMALL, "--dataset", "null", *shape, "--out", str(tmp_path)]
    assert main(unknown) == 0
    said = "the teacher is shown pixels normalised by 0.5 and 0.25"
    assert said in " ".join(capsys.readouterr().err.split())
    np.savez(tmp_path / "own.npz", images=np.zeros((10, 8, 8), np.uint8), labels=np.arange(10))  # which cannot say it
    teacher = str(Path(ssdkd.__file__).parent / "assets" / "digits_teacher.safetensors")
    own = [*SMALL, "--teacher.checkpoint", teacher, "--out", str(tmp_path)]
    own += ["--dataset", "npz", "--data-root", str(tmp_path / "own.npz")]
    assert main(own) == 0
    assert said in " ".join(capsys.readouterr().err.split())
    for command in (unknown, own):
        assert main([*command, "--image.mean", "[0.3]", "--image.std", "[0.4]"]) == 0
        assert "normalised" not in capsys.readouterr().err


def test_whose_weights_a_teacher_has_is_said_where_no_file_was_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function may load them itself, or was it forgotten?"""
    (tmp_path / "their_nets.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    said = "No --teacher.checkpoint: the teacher has the weights that their_nets:build gave it."
    own = [*SMALL, "--dataset", "digits", "--teacher.name", "their_nets:build", "--out", str(tmp_path / "runs")]
    student = ["--student.name", "convnet_small"]
    assert main([*own, *student]) == 0
    assert said in " ".join(capsys.readouterr().err.split())
    save_weights(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), tmp_path / "theirs.safetensors")
    assert main([*own, *student, "--teacher.checkpoint", str(tmp_path / "theirs.safetensors")]) == 0
    assert "No --teacher.checkpoint" not in capsys.readouterr().err


def test_quiet_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_run(tmp_path)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_a_first_accuracy_is_told_after_the_first_round(tmp_path: Path) -> None:
    def rounds_measured(*more: str) -> list[float]:
        lines = (one_run(tmp_path, *more) / "metrics.jsonl").read_text().splitlines()
        return [line["round"] for line in map(json.loads, lines) if "accuracy" in line]

    assert rounds_measured() == [1]
    assert rounds_measured("--tracking.evaluate-every", "2") == [1, 2]
    assert rounds_measured("--tracking.evaluate-every", "0") == []


def test_an_accuracy_stays_in_sight_until_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("ssdkd.tracking.display.PLAIN_SECONDS", 0.0)
    monkeypatch.setattr(Display, "say", lambda display, sentence: said.append(sentence))
    facts = {"progress": 0.5, "seconds": 9.0, "probe_kl": 1.0, "probe_agreement": 0.5, "class_entropy": 1.0}
    display = Display()
    for number, accuracy in enumerate([None, 70.0, None, 80.0]):
        display.update({**facts, "round": float(number)}, accuracy)
    shown = [re.findall(r"accuracy .*?(?=,)", sentence) for sentence in said]
    assert shown == [[], ["accuracy 70.00 %"], ["accuracy 70.00 % in round 1"], ["accuracy 80.00 %"]]


def test_bar_and_facts_have_room_on_a_terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=80)
    monkeypatch.setattr("ssdkd.tracking.display.Console", lambda **_: terminal)
    facts = {"progress": 0.5, "seconds": 900.0, "probe_kl": 1.0, "probe_agreement": 0.5, "class_entropy": 1.0}
    with Display() as display:
        display.update({**facts, "round": 4321.0}, 70.0)
        display.update({**facts, "round": 4322.0}, None)
    lines = [re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", line).strip("\r") for line in shown.getvalue().splitlines()]
    assert any(re.fullmatch(r"round 4322 ━+.━* +50% .*", line) for line in lines)
    assert any(re.fullmatch(r".*agreement 50.0 %, accuracy 70.00 % in round 4321.*", line) for line in lines)
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize(
    ("seconds", "pace"), [(10.0, "2.0 rounds/s"), (20.0, "1.0 rounds/s"), (340.0, "17.0 s a round")]
)
def test_the_pace_of_slow_rounds_can_be_read(seconds: float, pace: str) -> None:
    facts = {"round": 20.0, "seconds": seconds, "probe_kl": 1.0, "probe_agreement": 0.5, "class_entropy": 1.0}
    assert describe(facts, None).startswith(f"{pace}, probe KL 1.000")
    assert describe({**facts, "class_entropy": -1e-9}, None).endswith("class balance 0.00")


def test_the_shares_of_the_time_are_of_the_seconds_beside_them(finished: Path) -> None:
    phases = {"warmup": 30.0, "inversion": 4.0, "replay": 12.0, "rest": 4.0, "evaluation": 9.0}
    table = summary_table({**summary_of(finished), "seconds": 50.0, "phase_seconds": phases})
    told = list(table.columns[-1].cells)[-1]
    assert told == "50.0 s: warmup 60 %, inversion 8 %, replay 24 %, rest 8 %; evaluation 9.0 s more"


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--config", "--resume", "--policy", "--teacher.checkpoint", "--distillation.temperature"):
        assert flag in shown
    assert "(default: 10.0)" in shown


def test_garbage_is_collected_during_a_run_and_a_callers_collector_is_left_alone(tmp_path: Path) -> None:
    as_command = "import gc, runpy\ntry: runpy.run_module('ssdkd.run', run_name='__main__')"
    done = as_a_user("-c", f"{as_command}\nexcept SystemExit: print(gc.isenabled())", "--no-such-option", cwd=tmp_path)
    assert (done.stdout, done.stderr[:6]) == ("True\n", "error:")
    called = "import gc; from ssdkd.run import main; main(['-x']); print(gc.isenabled(), gc.get_freeze_count())"
    assert as_a_user("-c", called, cwd=tmp_path).stdout == "True 0\n"


def test_a_teacher_without_batch_norm_is_said_once_and_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_weights(create_model("convnet", {"batch_norm": False}, **TASK), tmp_path / "teacher.safetensors")
    job = tmp_path / "job.yaml"
    job.write_text(
        f"dataset: digits\nteacher: {{name: convnet, checkpoint: '{tmp_path}/teacher.safetensors', "
        "arguments: {batch_norm: false}}\nstudent: {name: convnet_small}\n"
    )
    terms = ["--inversion.terms", "{batch_norm: 10, one_hot: 2}"]
    assert main(["--config", str(job), *SMALL, *terms, "--out", str(tmp_path / "runs")]) == 0
    said = capsys.readouterr().err
    assert said.count("no batch-norm") == 1
    assert "goes by the other terms: one_hot 2." in said


@pytest.mark.parametrize("package", ["envs", "agents"])
@pytest.mark.parametrize("marker", [True, False], ids=["package", "bare-folder"])
def test_a_package_in_front_of_ours_is_named(package: str, marker: bool, tmp_path: Path) -> None:
    (tmp_path / package).mkdir()
    if marker:
        (tmp_path / package / "__init__.py").touch()
    done = as_a_user("-m", "ssdkd.run", *SMALL, cwd=tmp_path)
    if not marker:  # a folder without __init__.py gives way to a package, wherever that is
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 2
    assert f"the package '{package}' that Python finds is {tmp_path / package}, not ssdkd's" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_package_in_front_of_ours_is_named_by_every_command_and_to_who_imports(tmp_path: Path) -> None:
    (tmp_path / "envs.py").touch()
    told = f"the package 'envs' that Python finds is {tmp_path / 'envs.py'}, not ssdkd's; run from another folder"
    for command in ("agents.train", "agents.evaluate"):
        done = as_a_user("-m", command, "--help", cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {told}")
        assert done.stderr.count("\n") == 1
    done = as_a_user("-c", "import agents", cwd=tmp_path)
    assert done.returncode == 1
    assert f"ImportError: {told}" in done.stderr


def test_the_installed_command_finds_networks_where_it_is_started(tmp_path: Path) -> None:
    (tmp_path / "my_nets.py").write_text("from ssdkd.models.convnet import convnet_small as small\n")
    own = ["--student.name", "my_nets:small", "--student.arguments", "{num_classes: 10, in_channels: 1, image_size: 8}"]
    as_installed = "import sys; sys.path.remove(''); from ssdkd.run import command; sys.exit(command())"
    done = as_a_user("-c", as_installed, *SMALL, *own, "--out", "runs", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# -- bad input: one clear sentence, exit code 2 ---------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], *argv: str, out: Path) -> str:
    """What the command says when it refuses; nothing may have been made by then."""
    assert main([*SMALL, "--out", str(out), *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, "one sentence on one line"
    assert "Traceback" not in captured.err
    assert not out.exists()
    return captured.err


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def teacher_file(folder: Path, **task: int) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = create_model("convnet", {"widths": [48, 96, 128]}, **{**TASK, **task})
    save_weights(teacher, folder / "teacher.safetensors")
    return folder / "teacher.safetensors"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--teacher.checkpoint", "nowhere.pth"], "nowhere.pth does not exist"),
        (["--teacher.checkpoint", "null"], "teacher.checkpoint is missing"),
        (["--buffer.capacity", "31"], "buffer.capacity is 31 but distillation.batch is 32"),
        (["--rounds", "0"], "rounds: expected at least 1"),
        (["--minutes", "1", "--rounds", "5"], "exclude each other"),
        (["--rounds", "null"], "no budget"),
        (["--device", "gpu"], "'gpu' is not a device"),
        (["--device", "cuda:99"], "'cuda:99' is not here"),
        (["--device", "meta"], "'meta' is not supported"),
        (["--dataset", "mnits"], "did you mean 'mnist'"),
        (["--dataset", "folder"], "folder"),
        (["--student.name", "convent_small"], "did you mean 'convnet_small'"),
        (["--student.name", "no_such_package:build"], "no_such_package"),
        (["--student.arguments", "{width: 3}"], "has no argument 'width'"),
        (["--config", "digit"], "did you mean digits"),
        (["--policy", "ssdk"], "did you mean ssdkd"),
        (["--sed", "1"], "did you mean --seed"),
        (["--rounds", "many"], "rounds in the command line: expected whole number"),
        (["--inversion.terms", "{one_hut: 1.0}"], "no term is called 'one_hut'"),
        (["--image.mean", "[0.1, 0.2]"], "image.mean has 2 entries for 1 channels"),
        (["--image.std", "[0.0]"], "image.std must be above 0"),
        (["--image.mean", "[33.3]", "--image.std", "[78.6]"], "divide both by 255"),
        (["--image.mean", "[0.0]", "--image.std", "[255.0]"], "divide both by 255"),
        (["--image.classes", "7"], "10 classes where the teacher has 7"),
        (["--image.channels", "3"], "1 image channel(s) where the teacher takes 3"),
        (["--image.height", "16"], "images of 8x8 pixels but image.height and image.width say 16x8"),
        (["--dataset", "mnist"], "the embedded teacher knows 8x8 digits, not mnist"),
        (["--resume", "nowhere"], "nowhere is not a run folder"),
        (["--resume", "~nobody.here/run"], "~nobody.here/run is not a run folder"),
        (["--teacher.checkpoint", "~nobody.here/t.pth"], "weights file ~nobody.here/t.pth does not exist"),
        (["--policy", "learned", "--policy-file", "~nobody.here/p"], "policy ~nobody.here/p does not exist"),
    ],
)
def test_a_mistake_is_one_sentence(argv: list[str], says: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refusal(capsys, *argv, out=out)


def test_a_budget_of_no_minutes_is_refused(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL[2:], "--minutes", "0", "--out", str(out)]) == 2
    assert "minutes: a budget of 0 leaves nothing to do" in capsys.readouterr().err


def test_a_budget_that_the_warm_up_takes_hands_out_no_student(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL[2:], "--minutes", "1e-6", "--out", str(out)]) == 2
    assert "minutes: a budget of 1e-06 leaves nothing to learn in, for the warm-up" in capsys.readouterr().err
    assert not out.exists()


def test_what_the_warm_up_refuses_leaves_no_folder(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    terms = {"one_hot": 0.0, "batch_norm": 0.0, "total_variation": 0.0, "adversarial": 1.0}
    assert main([*SMALL, "--inversion.terms", str(terms), "--out", str(out)]) == 2
    assert "inversion.terms: none of them can be searched by" in capsys.readouterr().err
    assert not out.exists()
    folder = one_run(out)
    assert main([*SMALL, "--out", str(out), "--distillation.learning-rate", "1e9", "--rounds", "8"]) == 3
    assert len(list(out.iterdir())) == 2, "a run that fails later keeps its folder"
    assert main(["--resume", str(folder), "--seed", "1"]) == 2
    assert folder.exists()


def test_a_refused_run_leaves_no_folder_that_it_made_above_its_own(tmp_path: Path) -> None:
    terms = {"one_hot": 0.0, "batch_norm": 0.0, "total_variation": 0.0, "adversarial": 1.0}
    refused = [*SMALL, "--inversion.terms", str(terms)]
    assert main([*refused, "--out", str(tmp_path / "new" / "runs")]) == 2
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    assert main([*refused, "--out", str(tmp_path / "mine")]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine"], "which was there before"
    folder = RunFolder.create(tmp_path / "shared", "refused")
    (tmp_path / "shared" / "another").mkdir()
    with pytest.raises(ConfigError, match="refused"), folder.begun(""):
        raise ConfigError("refused")
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["another"]


@pytest.mark.parametrize("option", ["--resume", "--out", "--config", "--teacher.checkpoint", "--rounds"])
def test_an_option_without_a_value_is_refused(
    option: str, finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what a shell makes of a variable that is not set."""
    monkeypatch.chdir(finished)  # where an empty path would find a run
    assert main([*SMALL, option, ""]) == 2
    said = capsys.readouterr().err
    assert re.search(f"{option}: expected a value, got an empty word|an empty name is not that of a run", said)
    assert main([*SMALL, f"{option}="]) == 2


def test_a_truncated_checkpoint_is_refused(tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = teacher_file(tmp_path)
    file.write_bytes(file.read_bytes()[:-1000])
    assert f"{file} is damaged or cut short" in refusal(capsys, "--teacher.checkpoint", str(file), out=out)


def test_a_checkpoint_with_nan_is_refused(tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.random.fork_rng():
        teacher = create_model("convnet", {"widths": [48, 96, 128]}, **TASK)
    with torch.no_grad():
        next(teacher.parameters()).view(-1)[0] = float("nan")
    save_weights(teacher, tmp_path / "teacher.safetensors")
    said = refusal(capsys, "--teacher.checkpoint", str(tmp_path / "teacher.safetensors"), out=out)
    assert re.search("NaN|not finite|infin", said)


def test_a_checkpoint_for_other_classes_is_refused(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = teacher_file(tmp_path, num_classes=7)
    said = refusal(capsys, "--teacher.checkpoint", str(file), out=out)
    assert "7" in said
    assert "10" in said


def test_a_student_for_other_classes_is_refused(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    said = refusal(capsys, "--student.name", "my_nets:build", out=out)
    assert "10 classes" in said


def test_an_image_size_that_the_student_cannot_take_is_refused(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "8x8" in refusal(capsys, "--student.name", "lenet5_half", out=out)


def test_an_evaluation_set_of_another_kind_is_refused(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "colour.npz"
    np.savez(file, x_test=np.zeros((14, 8, 8, 3), np.uint8), y_test=np.arange(14) % 7)
    argv = ["--dataset", "npz", "--data-root", str(file), "--image.classes", "10", "--image.channels", "1"]
    said = refusal(capsys, *argv, out=out)
    assert "7 classes where the teacher has 10" in said
    assert "3 image channel(s) where the teacher takes 1" in said


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main([*SMALL, "--out", str(tmp_path / "file" / "runs")]) == 2
    said = capsys.readouterr().err
    assert "no run folder can be made" in said
    assert said.count("\n") == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_folder_without_permission_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    assert main([*SMALL, "--out", str(tmp_path / "runs")]) == 2
    assert "no run folder can be made" in capsys.readouterr().err


def test_training_that_diverges_is_one_sentence_and_keeps_what_was_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*SMALL, "--out", str(tmp_path), "--checkpoint.rounds", "1", "--distillation.learning-rate", "1e9"]
    assert main([*argv, "--rounds", "8"]) == 3
    said = capsys.readouterr().err.splitlines()[-1]
    assert "training diverged; lower distillation.learning_rate" in said
    (folder,) = tmp_path.iterdir()
    assert not (folder / "student.safetensors").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_is_one_sentence(
    error: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("ssdkd.engine.Engine.replay", no_memory)
    assert main([*SMALL, "--out", str(tmp_path), "--quiet"]) == 3
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory: lower inversion.images")
    assert said.count("\n") == 1
    (folder,) = tmp_path.iterdir()
    assert f"its student so far is in {folder / 'student.so-far.safetensors'}; there is no checkpoint to go on" in said
    assert (folder / "student.so-far.safetensors").is_file()


def test_a_student_that_cannot_be_measured_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher is first shown the evaluation set when all is done."""

    def no_memory(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr("ssdkd.engine.predictions", no_memory)
    assert main([*SMALL, "--out", str(tmp_path), "--quiet", "--tracking.evaluate-every", "0"]) == 3
    (folder,) = tmp_path.iterdir()
    assert (folder / "student.safetensors").is_file()


def test_memory_that_is_not_there_before_the_first_round_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags in ("--buffer.capacity 100000000000000", "--inversion.latent 1000000 --inversion.width 100000000"):
        assert main([*SMALL, "--out", str(tmp_path), *flags.split()]) == 3
        said = capsys.readouterr().err
        assert said.startswith("error: out of memory: lower inversion.images")
        assert all(flag[2:] in said for flag in flags.split()[::2])
        assert said.count("\n") == 1
