"""Metrics as JSON lines: one line a round, appended, readable at any moment."""

from __future__ import annotations

import json
import math
from pathlib import Path


class MetricsFile:
    """`metrics.jsonl`; a resumed run drops the lines written after the checkpoint it goes on from."""

    def __init__(self, path: Path, from_round: int = 0) -> None:
        """Lines of rounds above `from_round` are removed, the rest stays."""
        kept = [line for line in read_metrics(path) if line["round"] <= from_round] if path.is_file() else []
        self._stream = path.open("w", encoding="utf-8")
        for line in kept:
            self._write(line)

    def add(self, values: dict[str, float]) -> None:
        self._write(values)

    def _write(self, values: dict[str, float]) -> None:
        shown = {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        self._stream.write(json.dumps(shown) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics file; a last line cut off by a kill is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(text)
        except ValueError:
            continue
        if isinstance(values, dict) and "round" in values:
            lines.append(values)
    return lines
