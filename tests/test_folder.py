"""Promises of the run folder: one run's alone, whole files, and no trace of a run that never began."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from ssdkd.errors import CheckpointError, ConfigError, SsdkdError
from ssdkd.tracking.folder import CONFIG, STUDENT, SUMMARY, RunFolder


def test_folders_of_one_second_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda form: "19700101-000000")
    names = [RunFolder.create(tmp_path, "digits").path.name for _ in range(3)]
    assert names == ["digits-19700101-000000", "digits-19700101-000000-2", "digits-19700101-000000-3"]


def test_a_folder_under_the_home_is_found_by_its_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    made = RunFolder.create("~/runs", "digits")
    assert made.path.parent == tmp_path / "runs"
    made.write_text(CONFIG, "")
    assert RunFolder.existing(f"~/runs/{made.path.name}").path == made.path


def test_what_holds_no_configuration_is_no_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SsdkdError, match="is not a run folder: it holds no config"):
            RunFolder.existing(path)
    (tmp_path / CONFIG).touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SsdkdError, match="an empty name is not that of a run folder"):
        RunFolder.existing("")


def test_a_run_is_finished_when_it_left_both_its_student_and_its_summary(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for here, finished in (((), False), ((STUDENT,), False), ((SUMMARY,), False), ((STUDENT, SUMMARY), True)):
        for name in (STUDENT, SUMMARY):
            (tmp_path / name).unlink(missing_ok=True)
        for name in here:
            (tmp_path / name).touch()
        assert folder.is_finished is finished, here


@pytest.mark.skipif(os.name != "posix", reason="locks")
def test_a_claim_ends_with_its_block_and_clears_away_what_a_killed_run_left_half_written(tmp_path: Path) -> None:
    folder, cut_off = RunFolder(tmp_path), tmp_path / ".summary.json.0123abcd.tmp"
    mine = tmp_path / ".summary.json.tmp"
    for path in (cut_off, mine):
        path.touch()
    with contextlib.suppress(ConfigError), folder.claimed():
        assert not cut_off.exists()
        assert mine.exists(), "which no run wrote"
        raise ConfigError("the run cannot be")
    with folder.claimed():
        cut_off.touch()
        with pytest.raises(SsdkdError, match="is being written by another run"), folder.claimed():
            pass
        assert cut_off.exists(), "it may be the other run's, which writes it"


@pytest.mark.skipif(os.name != "posix", reason="locks")
def test_where_there_are_no_locks_a_run_goes_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    for name in ("fcntl.flock", "os.open"):
        with monkeypatch.context() as patched, RunFolder(tmp_path).claimed():
            patched.setattr(name, refuses)
            with RunFolder(tmp_path).claimed():
                (tmp_path / "written").touch()


def test_a_run_that_fails_leaves_its_folder_only_if_it_wrote_something_or_was_interrupted(tmp_path: Path) -> None:
    def fails(error: BaseException, wrote: bool) -> bool:
        folder = RunFolder.create(tmp_path / "new" / "runs", "digits")
        with contextlib.suppress(ConfigError, KeyboardInterrupt), folder.begun("seed: 0"):
            assert (folder / CONFIG).read_text() == "seed: 0"
            if wrote:
                (folder / "metrics.jsonl").touch()
            raise error
        return folder.path.exists()

    assert not fails(ConfigError("it cannot be"), wrote=False)
    assert not (tmp_path / "new").exists()
    assert fails(ConfigError("it cannot be"), wrote=True)
    assert fails(KeyboardInterrupt(), wrote=False), "after which --resume begins anew"


def test_a_file_that_cannot_be_written_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / SUMMARY).mkdir()
    with pytest.raises(CheckpointError, match=r"summary.json cannot be written: [A-Z][a-z ]+\.$"):
        RunFolder(tmp_path).write_text(SUMMARY, "{}")


def test_what_is_written_as_json_is_read_again_and_anything_else_is_refused_by_its_name(tmp_path: Path) -> None:
    folder, values = RunFolder(tmp_path), {"rounds": 3, "policy": "ssdkd"}
    folder.write_json(SUMMARY, values)
    assert folder.read_json(SUMMARY) == values == json.loads((tmp_path / SUMMARY).read_text())
    for content, said in (
        (b"[1]", "does not hold named values"),
        (b"{", "cannot be read"),
        (b"\xff", "cannot be read"),
    ):
        (tmp_path / SUMMARY).write_bytes(content)
        with pytest.raises(SsdkdError, match=f"summary.json {said}.*delete it and go on with the run"):
            folder.read_json(SUMMARY)
    with pytest.raises(SsdkdError, match="cannot be read"):
        folder.read_json("nowhere.json")
