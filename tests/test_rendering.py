"""Promises of `render()`: frames of one size that show what changed, and words for a terminal."""

import itertools

import numpy as np
import pytest

from envs import SampleSelectionEnv
from ssdkd.coefficients import RANGES

TINY = {
    "rounds": 4,
    "device": "cpu",
    "inversion": {"images": 32, "warmup": 2, "steps": 1, "width": 8},
    "buffer": {"capacity": 64},
    "probe": {"images": 16},
    "distillation": {"batch": 16, "steps": 2},
}


def env(mode: str) -> SampleSelectionEnv:
    made = SampleSelectionEnv(config="digits", tasks=[TINY], render_mode=mode)
    made.reset(seed=0)
    return made


def test_frames_have_one_size_and_follow_the_episode() -> None:
    shown = env("rgb_array")
    frames = [shown.render()]
    for _ in range(2):
        shown.step(np.ones(len(RANGES), dtype=np.float32))
        frames.append(shown.render())
    assert {(frame.shape, frame.dtype.name) for frame in frames} == {((600, 960, 3), "uint8")}
    assert all((before != after).mean() > 0.01 for before, after in itertools.pairwise(frames))


def test_words_have_no_zero_below_zero(capsys: pytest.CaptureFixture[str]) -> None:
    """Rounding takes the class balance there, of a buffer of one class."""
    shown = env("human")
    shown.memory.recent[-1]["class_entropy"] = -1e-9
    capsys.readouterr()
    shown.render()
    assert "class balance 0.000" in capsys.readouterr().out


def test_words_name_the_round_and_every_coefficient(capsys: pytest.CaptureFixture[str]) -> None:
    shown = env("human")
    assert capsys.readouterr().out.startswith("round 0, "), "nobody has to ask for it"
    shown.step(np.ones(len(RANGES), dtype=np.float32))
    said = capsys.readouterr().out
    assert shown.render() is None
    assert capsys.readouterr().out == said
    assert said.startswith("round 1, ")
    for entry in RANGES:
        assert f"{entry.name} {entry.high:.3g}" in said
