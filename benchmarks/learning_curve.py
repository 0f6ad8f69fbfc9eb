"""How searches for policies went: the return of an episode while weights are tried, over the episodes played.

    python -m benchmarks.learning_curve learned=runs/policy-A ssdkd=runs/policy-B --out docs/images/learning_curve.svg

Each point is the mean over one update's episodes, smoothed over the newest `--smooth` updates. Tasks are drawn anew for
every episode, so the curve is noisier than what is learned from it, which is differences within pairs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.arguments import require_at_least
from benchmarks.selection import draw
from ssdkd.errors import ConfigError, Parser, run_command
from ssdkd.files import expanded, require_writable
from ssdkd.tracking.charts import COLOURS, Chart, Line


def returns(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Episodes played and the mean return of the newest, at each point of a training's event files."""
    events = EventAccumulator(str(folder)).Reload() if folder.is_dir() else None
    if events is None or not {"episodes/ended", "episodes/return"} <= set(events.Tags()["scalars"]):
        raise ConfigError(f"{folder} holds no curves of a training: name the folder of one.")
    ended = np.cumsum([event.value for event in events.Scalars("episodes/ended")])
    return ended, np.array([event.value for event in events.Scalars("episodes/return")])


def smoothed(values: np.ndarray, over: int) -> np.ndarray:
    """Mean of the newest `over` values, of fewer at the start: (n,) -> (n,)."""
    return np.array([values[max(0, i + 1 - over) : i + 1].mean() for i in range(len(values))])


def run(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m benchmarks.learning_curve", description="Draw how searches for policies went.")
    parser.add_argument("runs", nargs="+", help="NAME=FOLDER of a training")
    parser.add_argument("--smooth", type=int, default=8, help="updates (%(default)s)")
    parser.add_argument("--out", type=expanded, required=True, help=".svg or .png")
    given = parser.parse_args(argv)
    require_at_least(given, smooth=1)
    unnamed = [text for text in given.runs if "=" not in text]
    if unnamed:
        raise ConfigError(f"expected NAME=FOLDER, got {unnamed[0]!r}.")
    require_writable(given.out, "--out")
    lines = []
    for place, text in enumerate(given.runs):
        name, _, folder = text.partition("=")
        ended, values = returns(Path(folder))
        level = 100.0 * smoothed(values, given.smooth)
        lines.append(Line(name, ended.tolist(), level.tolist(), COLOURS[place % len(COLOURS)]))
        first = level[min(given.smooth, len(level)) - 1]
        print(f"{name}: {int(ended[-1])} episodes; first {first:.1f}, last {level[-1]:.1f}")
    draw([Chart("return of an episode (x 100)", "episodes played", lines)], given.out)


if __name__ == "__main__":
    sys.exit(run_command(run, None))
