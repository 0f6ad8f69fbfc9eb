"""Promises of a run that is cut off: it says how to go on, and what goes on ends as if nothing had happened."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ssdkd
from ssdkd import files
from ssdkd.checkpoint import load_newest, save
from ssdkd.models import create_model, save_weights
from ssdkd.run import main
from ssdkd.tracking import Display

ROOT = Path(ssdkd.__file__).resolve().parent.parent
OPTIONS = [
    *("--rounds", "8", "--device", "cpu", "--threads", "1", "--inversion.images", "32", "--inversion.warmup", "2"),
    *("--inversion.steps", "2", "--inversion.width", "8", "--probe.images", "16", "--policy", "random"),
    *("--buffer.capacity", "64", "--distillation.batch", "32", "--distillation.steps", "3"),
    *("--checkpoint.rounds", "2", "--checkpoint.minutes", "0"),
]
needs_signals = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


def command(out: Path, *more: str) -> list[str]:
    return [*OPTIONS, "--out", str(out), *more]


def only_folder(out: Path) -> Path:
    (folder,) = out.iterdir()
    return folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def student(folder: Path) -> bytes:
    return (folder / "student.safetensors").read_bytes()


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed, to compare with."""
    out = tmp_path_factory.mktemp("uninterrupted")
    assert main(command(out, "--quiet")) == 0
    return only_folder(out)


def assert_as_if_nothing_had_happened(folder: Path, uninterrupted: Path) -> None:
    """Student, metrics and summary are those of the undisturbed run, times aside."""
    assert student(folder) == student(uninterrupted)
    timed = ("seconds", "accuracy")
    ours, theirs = (
        [{k: v for k, v in line.items() if k not in timed} for line in metrics(f)] for f in (folder, uninterrupted)
    )
    assert [line["round"] for line in ours] == list(range(1, len(theirs) + 1)), "no round is doubled or missing"
    assert ours == theirs
    first, second = (json.loads((f / "summary.json").read_text()) for f in (folder, uninterrupted))
    for key in ("student_accuracy", "rounds", "synthesized_images", "budget_spent"):
        assert first[key] == second[key]


def at_round(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Do something while round `number` is being shown."""
    shown = Display.update

    def update(self: Display, statistics: dict[str, float], accuracy: float | None) -> None:
        shown(self, statistics, accuracy)
        if statistics["round"] == number:
            act()

    monkeypatch.setattr(Display, "update", update)


def sends(name: str) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), getattr(signal, name))


# -- signals --------------------------------------------------------------------------------------------


@needs_signals
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_the_run_after_its_round_and_resume_completes_it(
    name: str,
    code: int,
    tmp_path: Path,
    uninterrupted: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        at_round(patched, 3, sends(name))
        assert main(command(tmp_path)) == code
    folder = only_folder(tmp_path)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        f"stopped by {name}; the run is saved as of round 3 and goes on with: python -m ssdkd.run --resume {folder}"
    )
    assert checkpoints(folder)[-1] == "round-00000003.safetensors"
    assert not (folder / "student.safetensors").exists()
    assert main(["--resume", str(folder), "--quiet"]) == 0
    assert_as_if_nothing_had_happened(folder, uninterrupted)


@needs_signals
def test_a_real_process_answers_sigterm_with_143(tmp_path: Path) -> None:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "ssdkd.run", *command(tmp_path / "runs", "--rounds", "100000")]
    with subprocess.Popen(argv, env=variables, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("runs/*/checkpoints/round-*.safetensors")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "--resume" in said
    assert "Traceback" not in said


@needs_signals
def test_sigusr1_saves_and_the_run_goes_on(
    tmp_path: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    at_round(monkeypatch, 3, sends("SIGUSR1"))
    at_round(monkeypatch, 4, lambda: seen.extend(checkpoints(only_folder(tmp_path))))
    assert main(command(tmp_path, "--checkpoint.rounds", "0")) == 0
    assert seen == ["round-00000003.safetensors"]
    assert "saved at round 3" in capsys.readouterr().err
    assert_as_if_nothing_had_happened(only_folder(tmp_path), uninterrupted)


def test_checkpoints_come_by_time_too_and_the_newest_are_kept(tmp_path: Path, uninterrupted: Path) -> None:
    seldom = ["--checkpoint.rounds", "0", "--checkpoint.minutes", "60"]
    assert main(command(tmp_path / "seldom", "--quiet", *seldom)) == 0
    assert not (only_folder(tmp_path / "seldom") / "checkpoints").exists()
    often = ["--checkpoint.rounds", "0", "--checkpoint.minutes", "1e-9", "--checkpoint.keep", "3"]
    assert main(command(tmp_path / "often", "--quiet", *often)) == 0
    folder, rounds = only_folder(tmp_path / "often"), len(metrics(uninterrupted))
    assert checkpoints(folder) == [f"round-{n:08d}.safetensors" for n in range(rounds - 2, rounds + 1)]


@needs_signals
def test_a_second_signal_does_not_wait_for_the_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        sends("SIGTERM")()
        sends("SIGTERM")()

    at_round(monkeypatch, 3, twice)
    assert main(command(tmp_path)) == 143
    assert "stopped at once by a second SIGTERM" in capsys.readouterr().err
    assert checkpoints(only_folder(tmp_path)) == ["round-00000002.safetensors"]


@needs_signals
def test_a_signal_in_the_last_round_leaves_a_finished_run(
    tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_round(monkeypatch, len(metrics(uninterrupted)), sends("SIGTERM"))
    assert main(command(tmp_path, "--quiet")) == 0
    assert_as_if_nothing_had_happened(only_folder(tmp_path), uninterrupted)


@needs_signals
def test_signals_are_the_users_own_again_afterwards(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    assert main(command(tmp_path, "--quiet", "--rounds", "1")) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


# -- killed ---------------------------------------------------------------------------------------------


@needs_signals
@pytest.mark.parametrize(
    "fault",
    [
        "write:3:kill",  # in the middle of the first checkpoint
        "replace:5:kill",  # the third one is on the disk, but without its name
        "replace:1:kill:student.safetensors",  # so is the student, and all rounds were played
    ],
)
def test_a_run_killed_at_any_instant_goes_on_to_the_identical_end(
    fault: str, tmp_path: Path, uninterrupted: Path
) -> None:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SSDKD_FAULT": fault}
    argv = [sys.executable, "-m", "ssdkd.run", *command(tmp_path, "--quiet")]
    assert subprocess.run(argv, env=variables, timeout=120, check=False).returncode == -signal.SIGKILL
    folder = only_folder(tmp_path)
    (folder / ".notes.of.mine.tmp").touch()
    assert main(["--resume", str(folder), "--quiet"]) == 0
    assert_as_if_nothing_had_happened(folder, uninterrupted)
    assert [path.name for path in folder.rglob("*.tmp")] == [".notes.of.mine.tmp"], "no leftovers, but what is not ours"


def interrupted(out: Path, monkeypatch: pytest.MonkeyPatch, *more: str, round_index: int = 5) -> Path:
    """The folder of a run that SIGTERM stopped."""
    with monkeypatch.context() as patched:
        at_round(patched, round_index, sends("SIGTERM"))
        assert main(command(out, "--quiet", *more)) == 143
    return only_folder(out)


@needs_signals
def test_metrics_written_after_the_checkpoint_are_not_doubled(
    tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill leaves it: lines beyond the newest checkpoint, the last one cut off."""
    folder = interrupted(tmp_path, monkeypatch)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"round": 6.0, "probe_kl": 1.0}\n{"round": 7.0, "pro')
    assert main(["--resume", str(folder), "--quiet"]) == 0
    assert_as_if_nothing_had_happened(folder, uninterrupted)


@needs_signals
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = interrupted(tmp_path, monkeypatch)
    newest = folder / "checkpoints" / checkpoints(folder)[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    assert main(["--resume", str(folder)]) == 0
    said = capsys.readouterr().err
    assert "warning: skipped a checkpoint" in said
    assert "Going on from round-00000004.safetensors" in said
    assert_as_if_nothing_had_happened(folder, uninterrupted)


def refusal(folder: Path, capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The sentence that going on with a run ends with."""
    capsys.readouterr()
    assert main(["--resume", str(folder)]) == code
    return capsys.readouterr().err.splitlines()[-1]


@needs_signals
def test_without_any_usable_checkpoint_the_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = interrupted(tmp_path, monkeypatch)
    for path in (folder / "checkpoints").iterdir():
        path.write_bytes(b"not a checkpoint")
    assert "none of the 2 checkpoints" in refusal(folder, capsys)


@needs_signals
def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = interrupted(tmp_path, monkeypatch)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("- 40\n", "- 44\n"))  # the student's width
    assert refusal(folder, capsys).startswith("error: the checkpoint does not fit this run")


@needs_signals
def test_a_run_goes_on_where_its_teacher_was_moved_and_not_with_another(
    tmp_path: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, moved, out = (tmp_path / name for name in ("teacher.safetensors", "moved.safetensors", "out"))
    teacher.write_bytes((ROOT / "ssdkd" / "assets" / "digits_teacher.safetensors").read_bytes())
    folder = interrupted(out, monkeypatch, "--teacher.checkpoint", str(teacher))
    teacher.rename(moved)
    assert f"weights file {teacher} does not exist" in refusal(folder, capsys)
    other = create_model("convnet", {"widths": [48, 96, 128]}, num_classes=10, in_channels=1, image_size=8)
    save_weights(other, teacher)
    assert "the teacher has other weights than the one that the run began with" in refusal(folder, capsys)
    assert main(["--resume", str(folder), "--teacher.checkpoint", str(moved)]) == 0
    assert_as_if_nothing_had_happened(folder, uninterrupted)


@needs_signals
def test_a_run_that_began_on_a_gpu_is_not_gone_on_with_on_a_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = interrupted(tmp_path, monkeypatch)
    state, _, _ = load_newest(folder / "checkpoints")
    state["engine"]["device_random"] = torch.zeros(16, dtype=torch.uint8)  # as it is of CUDA
    save(folder / "checkpoints", state, state["engine"]["round"])
    assert "the run began on a GPU, which draws other random numbers than a CPU" in refusal(folder, capsys)


@needs_signals
def test_memory_that_is_not_there_to_go_on_is_not_said_to_be_another_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = interrupted(tmp_path, monkeypatch)

    def no_memory(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr("ssdkd.engine.Engine.load_state_dict", no_memory)
    assert refusal(folder, capsys, code=3).startswith("error: out of memory")


@needs_signals
def test_resume_refuses_by_name_what_would_change_the_outcome_and_shows_what_would_not(
    tmp_path: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = interrupted(tmp_path, monkeypatch)
    capsys.readouterr()
    for flag, value in (("--seed", "7"), ("--distillation.steps", "5"), ("--rounds", "9"), ("--policy", "uniform")):
        assert main(["--resume", str(folder), flag, value]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {flag[2:].replace('-', '_')} was ")
        assert said.count("\n") == 1
    assert main(["--resume", str(folder), "--checkpoint.rounds", "3", "--tracking.evaluate-every", "2"]) == 0
    said = capsys.readouterr().err
    assert "checkpoint.rounds: 2 -> 3" in said
    assert "tracking.evaluate_every: 10 -> 2" in said
    assert_as_if_nothing_had_happened(folder, uninterrupted)


def test_the_configuration_shown_of_a_run_to_go_on_with_is_its_own(
    uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["--print-config", "--resume", str(uninterrupted)])
    assert ended.value.code == 0
    assert capsys.readouterr().out == (uninterrupted / "config.yaml").read_text()


def test_resuming_a_finished_run_says_that_it_is_finished(
    uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.iterdir() if path.is_file()}
    assert main(["--resume", str(uninterrupted)]) == 0
    assert f"{uninterrupted} is finished after" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before


# -- a disk that does not play along --------------------------------------------------------------------


@pytest.fixture
def broken_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Arm SSDKD_FAULT for this process."""

    def arm(fault: str) -> None:
        files._operations.clear()
        monkeypatch.setenv("SSDKD_FAULT", fault)

    return arm


def test_a_checkpoint_that_cannot_be_written_is_a_warning(
    tmp_path: Path, uninterrupted: Path, broken_disk: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    broken_disk("write:3:error")
    assert main(command(tmp_path, "--quiet")) == 0
    said = capsys.readouterr().err
    assert said.startswith("warning: checkpoint ")
    assert "No space left on device" in said
    assert_as_if_nothing_had_happened(only_folder(tmp_path), uninterrupted)


def test_or_it_ends_the_run_where_that_was_asked_for(
    tmp_path: Path, uninterrupted: Path, broken_disk: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    broken_disk("write:4:error")
    assert main(command(tmp_path, "--quiet", "--checkpoint.on-error", "stop")) == 2
    folder = only_folder(tmp_path)
    how = f"the run is saved as of round 2 and goes on with: python -m ssdkd.run --resume {folder}\n"
    assert capsys.readouterr().err.endswith(f"No space left on device; any earlier ones are still there; {how}")
    assert checkpoints(folder) == ["round-00000002.safetensors"]
    assert main(["--resume", str(folder), "--quiet"]) == 0
    assert_as_if_nothing_had_happened(folder, uninterrupted)


def test_a_student_that_does_not_fit_on_the_disk_is_put_elsewhere(
    tmp_path: Path,
    uninterrupted: Path,
    broken_disk: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    broken_disk("write:3:error")
    assert main(command(tmp_path / "runs", "--quiet", "--checkpoint.rounds", "0")) == 2
    said = capsys.readouterr().err
    (saved,) = elsewhere.glob("*/student.safetensors")
    assert f"they were put into {saved} instead" in said
    assert saved.read_bytes() == student(uninterrupted)


def test_a_summary_that_cannot_be_written_leaves_the_student_and_the_run_to_be_finished(
    tmp_path: Path, uninterrupted: Path, broken_disk: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    broken_disk("write:5:error")
    assert main(command(tmp_path, "--quiet", "--checkpoint.rounds", "0")) == 2
    folder = only_folder(tmp_path)
    assert f"the student is in {folder / 'student.safetensors'}" in capsys.readouterr().err
    assert student(folder) == student(uninterrupted)
    broken_disk("")
    assert main(["--resume", str(folder), "--quiet"]) == 0
    assert_as_if_nothing_had_happened(folder, uninterrupted)


def test_a_run_folder_that_is_deleted_underneath_does_not_lose_the_training(
    tmp_path: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_round(monkeypatch, 3, lambda: shutil.rmtree(only_folder(tmp_path)))
    assert main(command(tmp_path, "--quiet")) == 0
    folder = only_folder(tmp_path)
    assert student(folder) == student(uninterrupted)
    assert (folder / "config.yaml").is_file()
    assert json.loads((folder / "summary.json").read_text())["rounds"] == len(metrics(uninterrupted))
    assert "cannot be saved" in capsys.readouterr().err


def test_a_disk_that_turns_read_only_does_not_lose_the_training(
    tmp_path: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    write = files._write_whole

    def read_only(path: Path, chunks: Any) -> None:
        if "runs" in path.parts:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        write(path, chunks)

    at_round(monkeypatch, 3, lambda: monkeypatch.setattr(files, "_write_whole", read_only))
    assert main(command(tmp_path / "runs", "--quiet")) == 2
    said = capsys.readouterr().err
    (saved,) = elsewhere.glob("*/student.safetensors")
    assert "Read-only file system" in said
    assert f"they were put into {saved} instead" in said
    assert saved.read_bytes() == student(uninterrupted)
    assert checkpoints(only_folder(tmp_path / "runs")) == ["round-00000002.safetensors"], "the older one is intact"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_metrics_that_cannot_be_written_do_not_end_the_run(
    tmp_path: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssdkd.tracking import metrics as module

    made = module.MetricsFile.__init__

    def on_a_full_disk(self: Any, path: Path, from_round: int = 0) -> None:
        made(self, path, from_round)
        self._stream = Path("/dev/full").open("a")  # noqa: SIM115

    monkeypatch.setattr(module.MetricsFile, "__init__", on_a_full_disk)
    assert main(command(tmp_path, "--quiet")) == 0
    said = capsys.readouterr().err
    assert said.count("metrics.jsonl cannot be written") == 1
    assert student(only_folder(tmp_path)) == student(uninterrupted)


def test_the_callers_random_state_does_not_matter(tmp_path: Path, uninterrupted: Path) -> None:
    torch.manual_seed(12345)
    assert main(command(tmp_path, "--quiet")) == 0
    assert student(only_folder(tmp_path)) == student(uninterrupted)
