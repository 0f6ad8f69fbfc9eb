"""The promise that a result is not lost for its file: one that cannot be written is refused before the work."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_agents import tiny_family, train_flags
from test_benchmarks import SMALL

import ssdkd
from agents import evaluate, train
from agents.policies import DEFAULT
from benchmarks import (
    cost,
    default_run,
    field,
    kill_test,
    learning_curve,
    make_digits,
    make_family,
    mean_policy,
    screen,
    selection,
    switches,
    views,
)
from benchmarks import round as rounds
from ssdkd.errors import ConfigError, run_command
from ssdkd.files import atomic_write_text, require_writable, write_result

ASSETS = Path(ssdkd.__file__).parent / "assets"
FILES: list[tuple[Any, str, str, list[str]]] = [  # module, what does the work, option, what else it needs
    (evaluate, "evaluate", "--out", []),
    (cost, "in_a_process", "--json", []),
    (field, "play", "--json", ["--size", "tiny"]),
    (learning_curve, "returns", "--out", ["a=runs/a"]),
    (rounds, "prepare", "--json", []),
    (screen, "play_pair", "--out", ["--policy", "ssdkd"]),
    (selection, "play_all", "--json", []),
    (selection, "play_all", "--coefficients", []),
    (switches, "time_switches", "--json", []),
    (views, "time_steps", "--json", []),
]
FOLDERS: list[tuple[Any, str, list[str]]] = [
    (field, "play", ["--size", "tiny"]),
    (make_digits, "train", []),
    (make_family, "save_images", []),
    (selection, "play_all", []),
]


@pytest.fixture
def refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Any, str, list[str]], str]:
    """A command that must end before its work: -> the sentence that it ends with."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def command(module: Any, work: str, words: list[str]) -> str:
        def too_late(*_: Any, **__: Any) -> None:
            raise AssertionError("the work had begun")

        monkeypatch.setattr(module, work, too_late)
        if module in (evaluate, screen):
            words = [*words, "--config" if module is evaluate else "--family", tiny_family(tmp_path)]
        if module is field:
            words = [*words, *([] if "--out" in words else ["--out", str(tmp_path / "field")])]
        code = run_command(module.run, words)
        torch.set_num_threads(threads)
        told = capsys.readouterr().err
        assert code == 2
        assert told.count("\n") == 1
        return told

    return command


@pytest.mark.parametrize(("module", "work", "option", "more"), FILES)
def test_a_file_that_cannot_be_written_is_refused_at_once(
    module: Any, work: str, option: str, more: list[str], tmp_path: Path, refuses: Callable[[Any, str, list[str]], str]
) -> None:
    folder, below = tmp_path / "a folder", tmp_path / "file" / "result"
    folder.mkdir()
    below.parent.write_text("in the way")
    for path, why in ((folder, "Is a directory"), (below, "Not a directory")):
        assert f"{option.strip('-')}: {path} cannot be written: {why}." in refuses(
            module, work, [*more, option, str(path)]
        )


@pytest.mark.parametrize(("module", "work", "option", "more"), [*FILES, *((m, w, "--out", o) for m, w, o in FOLDERS)])
def test_a_result_below_a_home_is_looked_for_there(
    module: Any,
    work: str,
    option: str,
    more: list[str],
    tmp_path: Path,
    refuses: Callable[[Any, str, list[str]], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A shell spells ~ out in `--out ~/x`, and leaves it in `--out=~/x`."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "file").mkdir(parents=True)
    (tmp_path / "home" / "file" / "in the way").touch()
    at_fault = "file" if (module, work, option) in [entry[:3] for entry in FILES] else "file/in the way"
    assert "cannot be written" in refuses(module, work, [*more, option, f"~/{at_fault}"])
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(("module", "work", "more"), FOLDERS)
def test_a_folder_that_cannot_be_one_is_refused_at_once(
    module: Any, work: str, more: list[str], tmp_path: Path, refuses: Callable[[Any, str, list[str]], str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "--out: " in refuses(module, work, [*more, "--out", str(tmp_path / "file")])
    assert (tmp_path / "file").read_text() == "in the way"


def test_the_digits_are_made_where_it_is_said_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(make_digits, "train", lambda *_: None)
    assert make_digits.main([]) == 2
    with pytest.raises(SystemExit):
        make_digits.main(["--help"])
    assert make_digits.main(["--out", str(tmp_path / "new")]) == 0
    torch.set_num_threads(threads)
    made, shipped = (np.load(folder / "digits.npz") for folder in (tmp_path / "new", ASSETS))
    assert np.array_equal(made["test_images"], shipped["test_images"])
    assert (tmp_path / "new" / "digits_teacher.safetensors").is_file()


def test_a_training_is_refused_a_folder_that_cannot_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert train.main([*train_flags(tmp_path, "ppo"), "--out", str(tmp_path / "file")]) == 2
    assert "no run folder can be made" in capsys.readouterr().err


def test_a_mean_policy_is_refused_a_folder_in_place_of_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.safetensors").mkdir()
    assert mean_policy.main([str(DEFAULT), "--out", f"{tmp_path}/p.safetensors"]) == 2
    assert "cannot be saved" in capsys.readouterr().err


def test_runs_in_a_folder_of_their_own_stay_there(tmp_path: Path) -> None:
    elsewhere = ["--out", str(tmp_path / "elsewhere")]
    assert default_run.one([*SMALL, *elsewhere], str(tmp_path / "root"), seed=0)["student_accuracy"] > 0
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["0"]
    assert kill_test.command(tmp_path, elsewhere)[-2:] == ["--out", str(tmp_path)]
    assert not (tmp_path / "elsewhere").exists()


def test_whether_a_file_can_be_written_is_tried_without_leaving_one(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "result.json", "--json")
    assert list((tmp_path / "new").iterdir()) == []
    old = tmp_path / "old.json"
    old.write_text("{}")
    require_writable(old, "--json")
    assert old.read_text() == "{}"
    write_result(old, "--json", "[]")
    assert old.read_text() == "[]"
    for nothing in (None, ""):
        require_writable(nothing, "--json")
        write_result(nothing, "--json", "text")
    with pytest.raises(ConfigError, match=r"^--json: .* cannot be written: Is a directory\.$"):
        write_result(tmp_path, "--json", "text")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name")
def test_what_is_no_file_is_written_to_and_stays_what_it_is(tmp_path: Path) -> None:
    """As /dev/null is, which a file in its place would be the end of."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        require_writable(pipe, "--out")
        atomic_write_text(pipe, "a result")
        assert os.read(reader, 100) == b"a result"
        assert pipe.is_fifo()
    finally:
        os.close(reader)
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_link_goes_on_to_be_one_and_its_file_is_replaced(tmp_path: Path) -> None:
    file, link = tmp_path / "here.json", tmp_path / "link.json"
    file.write_text("old")
    link.symlink_to(file)
    write_result(link, "--json", "new")
    assert link.is_symlink()
    assert file.read_text() == "new"
