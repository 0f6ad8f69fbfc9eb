"""Promises of the comparison with real digits: which ones, how many, and for how long."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import real_digits
from benchmarks.make_digits import split
from ssdkd.config import RunConfig, build, read_yaml
from ssdkd.data import LabelledImages
from ssdkd.errors import run_command
from ssdkd.teacher import TeacherTraining

JOB = build(RunConfig, [read_yaml("digits")])


@pytest.mark.parametrize(("count", "used"), [(None, 1437), (180, 180)])
def test_a_student_sees_so_many_of_the_teachers_digits_for_as_long_as_the_job(
    count: int | None, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[LabelledImages, TeacherTraining]] = []

    def instead(model: nn.Module, data: LabelledImages, options: TeacherTraining, device: torch.device) -> None:
        seen.append((data, options))

    monkeypatch.setattr(real_digits, "train", instead)
    for seed in (0, 1):
        real_digits.trained_on_real(JOB, count, seed)
    known = {image.tobytes() for image in split()[0]}
    for data, options in seen:
        assert len(data.images) == used
        assert {image.numpy().tobytes() for image in data.images} <= known
        per_class = torch.bincount(data.labels, minlength=10).float() / used
        assert ((per_class - 0.1).abs() < 0.01).all()
        steps = options.epochs * (used // options.batch)
        assert steps == pytest.approx(JOB.rounds * JOB.distillation.steps, rel=0.01)  # type: ignore[operator]
    assert torch.equal(seen[0][0].images, seen[1][0].images) == (count is None)


def test_more_real_digits_teach_more(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(real_digits, "build", lambda *_: replace(JOB, rounds=30))
    assert run_command(real_digits.run, ["--seeds", "1"]) == 0
    torch.set_num_threads(threads)
    every, few = (float(line.split()[-2]) for line in capsys.readouterr().out.splitlines())
    assert 100.0 >= every > few > 50.0
