"""Promises of the averaged student: what its mean is of, that it is what is handed out, that it survives a restart."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ssdkd.averaging import Average
from ssdkd.coefficients import Coefficients
from ssdkd.errors import ConfigError
from tests.test_engine import changed, drive, tiny_engine


def walk(share: float, places: list[float]) -> float:
    """Where the mean is after a network of one weight has been at `places`."""
    network = nn.Linear(1, 1, bias=False)
    mean = copy.deepcopy(network)
    average = Average(mean, network, share)
    for place in places:
        nn.init.constant_(network.weight, place)
        average.update()
    return float(mean.weight.detach())


def test_with_share_one_all_steps_count_alike() -> None:
    assert walk(1.0, [3.0, 5.0, 10.0]) == pytest.approx(6.0)


def test_the_first_step_is_taken_whole() -> None:
    assert walk(0.1, [7.0]) == pytest.approx(7.0)


def test_the_mean_reaches_back_over_the_same_share_of_a_short_run_and_of_a_long_one() -> None:
    """A weight that grows by one a step: the mean lags behind by a fixed share of the way."""
    lags = [1.0 - walk(0.1, [float(t) for t in range(1, steps + 1)]) / steps for steps in (100, 1000)]
    assert lags[0] == pytest.approx(lags[1], rel=0.1)
    assert 0.05 < lags[1] < 0.1


def test_statistics_of_batch_norm_are_averaged_too() -> None:
    network = nn.BatchNorm1d(2)
    mean = copy.deepcopy(network)
    average = Average(mean, network, 1.0)
    for value in (1.0, 3.0):
        network.running_mean.fill_(value)
        average.update()
    assert torch.allclose(mean.running_mean, torch.full((2,), 2.0))


def test_a_mask_of_infinities_stays_as_it_is() -> None:
    network = nn.Linear(2, 2)
    mask = torch.full((2, 2), -torch.inf).triu(1)
    network.register_buffer("mask", mask.clone(), persistent=False)
    mean = copy.deepcopy(network)
    average = Average(mean, network, 1.0)
    for _ in range(2):
        average.update()
    assert torch.equal(mean.mask, mask)


def test_the_mean_is_what_is_measured_and_the_learner_what_learns() -> None:
    engine = tiny_engine(changed(distillation={"average": 0.5}))
    begun = copy.deepcopy(engine.student.state_dict())
    drive(engine, Coefficients())
    learner, student = engine.learner.state_dict(), engine.student.state_dict()
    weights = [name for name in begun if name.endswith("weight")]
    assert any(not torch.equal(student[name], begun[name]) for name in weights)
    assert any(not torch.equal(student[name], learner[name]) for name in weights)
    with torch.no_grad():
        agree = (engine.student.eval()(engine.probe).argmax(1) == engine.probe_logits.argmax(1)).float().mean()
    assert engine.statistics["probe_agreement"] == pytest.approx(float(agree))


def test_without_a_mean_the_student_itself_learns() -> None:
    engine = tiny_engine(changed(distillation={"average": 0.0}))
    assert engine.learner is engine.student
    assert engine.distiller.average is None


def test_averaging_does_not_change_what_is_learned() -> None:
    """It only watches: the learner is the student of a run without it."""
    learned = []
    for share in (0.0, 0.3):
        engine = tiny_engine(changed(distillation={"average": share}))
        drive(engine, Coefficients())
        learned.append(engine.learner.state_dict())
    assert all(torch.equal(value, learned[1][name]) for name, value in learned[0].items())


def test_a_student_that_cannot_be_copied_is_refused_with_advice() -> None:
    class Unique(nn.Linear):
        def __deepcopy__(self, memo: object) -> Unique:
            raise RuntimeError("there is only one of me")

    with pytest.raises(ConfigError, match=r"only one of me.*distillation.average to 0"):
        tiny_engine(student=nn.Sequential(nn.Flatten(), Unique(64, 10)))
