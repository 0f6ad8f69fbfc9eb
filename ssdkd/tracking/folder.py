"""The run folder: made for one run alone, its files whole or not there at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ssdkd.errors import CheckpointError, ConfigError, SsdkdError
from ssdkd.files import atomic_write_bytes, expanded, temporary_files

CONFIG, SUMMARY, METRICS = "config.yaml", "summary.json", "metrics.jsonl"
STUDENT, CHECKPOINTS, PICTURE = "student.safetensors", "checkpoints", "buffer.png"
REPLAYS, REPORT = "replays.png", "report.html"


class RunFolder:
    """Where one run writes."""

    def __init__(self, path: Path, made: Sequence[Path] = ()) -> None:
        """`made` are the folders above it that are there for its sake alone, the nearest first."""
        self.path, self.made = path, made

    @classmethod
    def create(cls, root: str | os.PathLike[str], name: str) -> RunFolder:
        """Make a folder under `root` that no other run has: the name and time, numbered where that is taken."""
        root = expanded(root)
        stamped = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            missing = [folder for folder in (root, *root.parents) if not folder.exists()]
            root.mkdir(parents=True, exist_ok=True)
            for number in range(1, 10_000):
                path = root / (stamped if number == 1 else f"{stamped}-{number}")
                try:
                    path.mkdir()
                except FileExistsError:
                    continue
                return cls(path, missing)
        except OSError as error:
            raise ConfigError(
                f"out: no run folder can be made in {root} ({error.strerror or error}); choose one you may write to."
            ) from error
        raise ConfigError(f"out: {root} already holds ten thousand runs of this second; choose another folder.")

    @classmethod
    def existing(cls, path: str | os.PathLike[str]) -> RunFolder:
        """A folder that a run made before."""
        folder = expanded(path)
        if not os.fspath(path):
            raise SsdkdError("an empty name is not that of a run folder; name a folder that a run made.")
        if not (folder / CONFIG).is_file():
            raise SsdkdError(f"{folder} is not a run folder: it holds no {CONFIG}; name a folder that a run made.")
        return cls(folder)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def is_finished(self) -> bool:
        """Whether its run came to its end, which nothing takes any further."""
        return (self / SUMMARY).is_file() and (self / STUDENT).is_file()

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the folder while it is written to: a second run that wants it is refused.

        The claim is a lock on the folder itself, which the system lets go of when the process ends, however it
        ends. Where locks do not exist (Windows, some network file systems) there is none.
        """
        try:
            import fcntl

            held = os.open(self.path, os.O_RDONLY)
        except (ImportError, OSError):
            yield
            return
        try:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise SsdkdError(
                        f"{self.path} is being written by another run: stop that one first, or wait for its end."
                    ) from error
            else:
                with contextlib.suppress(OSError):
                    for leftover in temporary_files(self.path, "*"):  # of whoever held it before, and was killed
                        leftover.unlink()
            yield
        finally:
            os.close(held)

    @contextlib.contextmanager
    def begun(self, config: str) -> Iterator[None]:
        """Hold a new folder, with its configuration; a run that fails before it wrote anything else leaves none."""
        with self.claimed():
            try:
                self.write_text(CONFIG, config)
                yield
            except Exception:  # not an interrupt, after which --resume begins anew
                with contextlib.suppress(OSError):
                    if set(os.listdir(self.path)) <= {CONFIG}:
                        self.discard()
                raise

    def discard(self) -> None:
        """Remove it, and the folders above it that it alone was the reason for."""
        with contextlib.suppress(OSError):
            shutil.rmtree(self.path)
            for folder in self.made:
                folder.rmdir()  # unless another run came

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write or replace one file, whole or not at all."""
        try:
            atomic_write_bytes(self.path / name, data)
        except OSError as error:
            raise CheckpointError(f"{self.path / name} cannot be written: {error.strerror or error}.") from error

    def write_text(self, name: str, text: str) -> None:
        self.write_bytes(name, text.encode("utf-8"))

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        self.write_text(name, json.dumps(values, indent=2) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        anew = "delete it and go on with the run, which writes it anew"
        try:
            values = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SsdkdError(f"{self.path / name} cannot be read: {error}; {anew}.") from error
        if not isinstance(values, dict):
            raise SsdkdError(f"{self.path / name} does not hold named values; {anew}.")
        return values
