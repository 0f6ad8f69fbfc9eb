"""Metrics as JSON lines: one line a round, appended, readable at any moment."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import TextIO

from ssdkd.files import atomic_write_text


class MetricsFile:
    """`metrics.jsonl`; a resumed run drops the lines written after the checkpoint it goes on from."""

    def __init__(self, path: Path, from_round: int = 0) -> None:
        """Lines of rounds above `from_round` are removed, the rest stays.

        A file that cannot be written ends nothing: `error` says what happened, and lines are no longer taken.
        """
        self.error: OSError | None = None
        self._stream: TextIO | None = None
        try:
            kept = [line for line in read_metrics(path) if line["round"] <= from_round] if path.is_file() else []
            atomic_write_text(path, "".join(_as_line(values) for values in kept))
            self._stream = path.open("a", encoding="utf-8")
        except OSError as error:
            self.error = error

    def add(self, values: dict[str, float]) -> None:
        """Append one line."""
        if self._stream is None:
            return
        try:
            self._stream.write(_as_line(values))
            self._stream.flush()
        except OSError as error:
            self.error, self._stream = error, None

    def close(self) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError):  # what could be written was flushed before
                self._stream.close()


def _as_line(values: dict[str, float]) -> str:
    shown = {k: (v if v is None or math.isfinite(v) else None) for k, v in values.items()}
    return json.dumps(shown) + "\n"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics file; one cut off by a kill, and any other that is not of numbers, is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(text)
        except ValueError:
            continue
        told = values if isinstance(values, dict) else {}
        if told.get("round") is not None and all(v is None or isinstance(v, (int, float)) for v in told.values()):
            lines.append(told)
    return lines
