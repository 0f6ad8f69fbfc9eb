"""The run folder: made for one run alone, its files whole or not there at all."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from ssdkd.errors import ConfigError, SsdkdError
from ssdkd.files import atomic_write_text

CONFIG, SUMMARY, METRICS = "config.yaml", "summary.json", "metrics.jsonl"
STUDENT, CHECKPOINTS, PICTURE = "student.safetensors", "checkpoints", "buffer.png"


class RunFolder:
    """Where one run writes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, root: str | os.PathLike[str], name: str) -> RunFolder:
        """Make a folder under `root` that no other run has: the name and time, numbered where that is taken."""
        root = Path(root).expanduser()
        stamped = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            root.mkdir(parents=True, exist_ok=True)
            for number in range(1, 10_000):
                path = root / (stamped if number == 1 else f"{stamped}-{number}")
                try:
                    path.mkdir()
                except FileExistsError:
                    continue
                return cls(path)
        except OSError as error:
            raise ConfigError(
                f"out: no run folder can be made in {root} ({error.strerror or error}); choose a folder you may write to."
            ) from error
        raise ConfigError(f"out: {root} already holds ten thousand runs of this second; choose another folder.")

    @classmethod
    def existing(cls, path: str | os.PathLike[str]) -> RunFolder:
        """A folder that a run made before."""
        folder = Path(path).expanduser()
        if not (folder / CONFIG).is_file():
            raise SsdkdError(f"{folder} is not a run folder: it holds no {CONFIG}; name a folder that a run made.")
        return cls(folder)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def write_text(self, name: str, text: str) -> None:
        atomic_write_text(self.path / name, text)

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        self.write_text(name, json.dumps(values, indent=2) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        try:
            values = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SsdkdError(f"{self.path / name} cannot be read: {error}.") from error
        if not isinstance(values, dict):
            raise SsdkdError(f"{self.path / name} does not hold named values.")
        return values
