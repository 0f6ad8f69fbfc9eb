"""Promises of the averaged student: what its mean is of, that it is what is handed out, that it survives a restart."""

from __future__ import annotations

import copy
from collections.abc import Callable

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


class Counting(nn.Module):
    """Holds what a mean is of and what it is not, and makes each of it anew."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.zeros(2))
        self.register_buffer("ready", torch.tensor(False))
        self.register_buffer("seen", torch.zeros(0))
        self.register_buffer("later", None)

    def live(self, value: float) -> None:
        self.level = torch.full((2,), value)
        self.ready = torch.tensor(True)
        self.seen = torch.full((3,), value)
        self.later = torch.full((1,), value)


def test_buffers_that_a_network_makes_anew_are_averaged_and_what_has_no_mean_follows() -> None:
    network = nn.Sequential(nn.Linear(2, 2), Counting())
    mean = copy.deepcopy(network)
    average = Average(mean, network, 1.0)
    for value in (1.0, 3.0):
        network[1].live(value)
        average.update()
    average.follow()
    assert mean[1].level.tolist() == [2.0, 2.0]
    assert mean[1].ready
    assert mean[1].seen.tolist() == [3.0] * 3
    assert mean[1].later.tolist() == [3.0]
    network[1].seen.zero_()
    assert mean[1].seen.tolist() == [3.0] * 3


@pytest.mark.filterwarnings("ignore:.*spectral_norm:FutureWarning")
@pytest.mark.parametrize("spectral_norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_the_mean_of_weights_under_spectral_norm_is_under_it_too(spectral_norm: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    network = spectral_norm(nn.Linear(8, 8, bias=False))
    with torch.no_grad():
        network(torch.zeros(1, 8))
    mean = copy.deepcopy(network)
    average, weight = Average(mean, network, 0.1), next(network.parameters())
    for _ in range(100):
        with torch.no_grad():
            weight.add_(0.1 * torch.randn(8, 8))
            network.train()(torch.zeros(1, 8))
        average.update()
    average.follow()
    with torch.no_grad():
        mean.eval()(torch.zeros(1, 8))
        assert torch.linalg.matrix_norm(mean.weight, 2) == pytest.approx(1.0, abs=0.1)


def test_the_mean_has_counted_the_batches_that_the_learner_has_seen() -> None:
    engine = tiny_engine(changed(distillation={"average": 0.5}))
    drive(engine, Coefficients())
    student, learner = engine.student.state_dict(), engine.learner.state_dict()
    counts = [name for name in learner if name.endswith(".num_batches_tracked")]
    assert counts
    assert all(student[name] == learner[name] > 0 for name in counts)


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
