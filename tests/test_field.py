"""Promises of the comparison with the field: what its figures mean, and that the same command goes on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import field
from benchmarks.selection import differing
from ssdkd.errors import ConfigError, SsdkdError

CURVES = {
    "ours": {"seconds": [1.0, 2.0, 3.0], "accuracy": [50.0, 70.0, 80.0], "synthesized": [10.0, 20.0, 30.0]},
    "theirs": {"seconds": [4.0, 8.0], "accuracy": [40.0, 70.0], "synthesized": [100.0, 200.0]},
    "lame": {"seconds": [9.0], "accuracy": [20.0], "synthesized": [1.0]},
}


def test_the_ratio_is_how_many_times_sooner_the_references_final_accuracy_is_reached() -> None:
    outcome = field.compare(CURVES, "theirs", None)
    assert outcome["target"] == 70.0
    ours = outcome["methods"]["ours"]
    assert (ours["to_target"], ours["images_to_target"], ours["ratio"]) == (2.0, 20.0, 4.0)
    assert outcome["methods"]["theirs"]["ratio"] == 1.0
    assert outcome["methods"]["lame"]["ratio"] is None


def test_a_given_target_that_the_reference_misses_gives_times_but_no_ratio() -> None:
    outcome = field.compare(CURVES, "theirs", 75.0)
    assert outcome["methods"]["ours"]["to_target"] == 3.0
    assert outcome["methods"]["ours"]["ratio"] is None


@pytest.mark.parametrize("size", field.SIZES)
def test_every_method_of_every_size_is_a_valid_configuration_over_the_same_networks(size: str) -> None:
    chosen = field.SIZES[size]()
    settings = [field.settings_of(chosen, name, {}) for name in chosen.methods]
    assert len({json.dumps([s["dataset"], s["teacher"], s["student"]]) for s in settings}) == 1
    for name, found in zip(chosen.methods, settings, strict=True):
        if name.startswith("fastdfkd"):
            made = found["inversion"]
            assert found["buffer"]["capacity"] == (found["rounds"] + made["warmup"]) * made["images"]
            assert made["meta_rate"] == pytest.approx(made["steps"] * made["generator_rate"])


@pytest.mark.parametrize("size", field.SIZES)
def test_what_a_run_writes_does_not_grow_with_its_rounds(size: str) -> None:
    chosen = field.SIZES[size]()
    for name in chosen.methods:
        found = field.settings_of(chosen, name, {})
        assert found["rounds"] // found["tracking"]["metrics_every"] <= 2 * field.POINTS
        assert found["tracking"]["evaluate_every"] % found["tracking"]["metrics_every"] == 0, "no accuracy is lost"
        assert found["checkpoint"] == {"rounds": 0}, "saved by the clock alone"


def test_a_comparison_that_ran_out_of_time_is_finished_by_the_same_command(tmp_path: Path) -> None:
    words = ["--size", "tiny", "--out", str(tmp_path), "--threads", "1", "--methods", "ssdkd,fastdfkd,dafl"]
    first = field.run([*words, "--minutes", "0"])
    assert not any(row["finished"] for row in first["methods"].values())
    second = field.run(words)
    assert all(row["finished"] for row in second["methods"].values())
    for row in second["methods"].values():
        assert 0 <= row["final"] <= 100
    assert second["methods"]["fastdfkd"]["ratio"] == pytest.approx(1.0)
    assert (tmp_path / "field.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "field.json").read_text())["target"] == second["target"]
    again = field.run(words)
    assert again["curves"] == second["curves"], "what is finished is not repeated"
    with pytest.raises(ConfigError, match=r"other settings \(precision\)"):
        field.run([*words, "--precision", "bfloat16"])
    assert field.run([*words, "--data-root", "."])["curves"] == second["curves"], "where images lie is no setting"
    (tmp_path / "dafl-seed0" / "job.yaml").unlink()
    with pytest.raises(ConfigError, match=r"dafl-seed0 is a run with other settings \(job.yaml is missing\)"):
        field.run(words)


def test_images_are_found_from_wherever_the_comparison_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots = []

    def noted(folder: Path, settings: dict[str, Any], deadline: float) -> bool:
        roots.append(settings["data_root"])
        return False

    monkeypatch.setattr(field, "play", noted)
    monkeypatch.chdir(tmp_path)
    field.run(["--size", "tiny", "--out", "out", "--methods", "ssdkd", "--data-root", "images"])
    assert roots == [str(tmp_path / "images")]


def test_a_run_whose_round_takes_too_long_to_stop_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(field, "GRACE", 0.1)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it does not listen from now on
        process.terminate()
        field.end(process)
        assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("code", [0, 143])
def test_a_run_that_ends_as_the_time_is_up_is_finished_if_that_was_its_end(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = f"import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit({code}))"
    popen = subprocess.Popen

    def begun(_: list[str]) -> subprocess.Popen[bytes]:
        process = popen([sys.executable, "-c", f"{ends}; print(flush=True); time.sleep(600)"], stdout=subprocess.PIPE)
        assert process.stdout is not None
        with process.stdout as told:
            told.readline()  # it listens from now on
        return process

    monkeypatch.setattr(field.subprocess, "Popen", begun)
    assert field.called("ssdkd.run", [], time.monotonic()) == (code == 0)


def test_whoever_stops_the_comparison_stops_its_run_too_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen
    monkeypatch.setattr(field.subprocess, "Popen", lambda words: started.append(popen(words)) or started[-1])
    settings = field.settings_of(field.SIZES["tiny"](), "ssdkd", {"rounds": 100_000, "threads": 1})

    def stop_once_it_runs() -> None:
        for _ in range(1200):
            if list(tmp_path.glob("*/metrics.jsonl")):
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.05)

    watching = threading.Thread(target=stop_once_it_runs, daemon=True)
    watching.start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        field.play(tmp_path, settings, time.monotonic() + 60.0)
    watching.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert started[0].poll() is not None, "the run is over"
    assert list(tmp_path.glob("*/checkpoints/*")), "and was saved"


def test_a_teacher_that_cannot_be_trained_is_one_sentence(tmp_path: Path) -> None:
    size = field.Size({}, {}, "ssdkd", teacher_training=["--dataset", "no_such_set"])
    with pytest.raises(SsdkdError, match=r"ssdkd\.teacher ended with code 2"):
        field.train_teacher(size, tmp_path / "teacher.safetensors", None, "cpu")


def test_a_teacher_that_takes_longer_than_there_is_time_is_one_sentence(tmp_path: Path) -> None:
    size = field.Size({}, {}, "ssdkd", teacher_training=["--dataset", "digits"])
    with pytest.raises(SsdkdError, match=r"--minutes: .* python -m ssdkd\.teacher --dataset digits"):
        field.train_teacher(size, tmp_path / "teacher.safetensors", None, "cpu", time.monotonic())


def test_what_an_unfinished_reference_has_is_no_target() -> None:
    assert field.compare(CURVES, "theirs", None, ended=False)["target"] is None
    assert field.compare(CURVES, "theirs", 70.0, ended=False)["methods"]["ours"]["ratio"] == pytest.approx(4.0)


def test_an_unknown_method_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dalf"):
        field.run(["--size", "tiny", "--out", str(tmp_path), "--methods", "dalf"])


def test_where_a_run_lies_does_not_make_it_another() -> None:
    held = {"out": "here", "data_root": "there", "rounds": 3, "distillation": {"batch": 16}}
    assert differing(held, {**held, "out": "elsewhere", "data_root": None}) == []
    assert differing(held, {**held, "out": "elsewhere", "distillation": {"batch": 32}}) == ["distillation.batch"]
