"""Promises of the baselines: the field's methods as configurations, with the settings that their authors publish."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from ssdkd.buffer import Samples
from ssdkd.build import build_engine
from ssdkd.coefficients import Coefficients
from ssdkd.config import RunConfig, build, read_yaml
from ssdkd.distiller import make_optimizer
from ssdkd.engine import Engine

SMALL: dict[str, dict[str, Any]] = {
    "fastdfkd": {
        "rounds": 3,
        "inversion": {"images": 8, "steps": 2, "latent": 8, "width": 4, "warmup": 2},
        "buffer": {"capacity": (3 + 2) * 8, "shift": 1},
        "distillation": {"batch": 8, "steps": 2},
    },
    "dafl": {
        "rounds": 3,
        "inversion": {"images": 8, "latent": 8, "width": 4},
        "buffer": {"capacity": 8},
        "distillation": {"batch": 8},
    },
}


def published(name: str) -> RunConfig:
    return build(RunConfig, [read_yaml(name)])


class Counting(nn.Module):
    """A teacher for 8x8 digits that counts the images it is asked about without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
        self.asked = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.asked += 0 if images.requires_grad else len(images)
        answer: torch.Tensor = self.body(images)
        return answer


def small_engine(name: str) -> Engine:
    """The method's settings at the size of a toy."""
    on_digits = {"dataset": "digits", "probe": {"images": 8}, **SMALL[name]}
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return build_engine(build(RunConfig, [read_yaml(name), (on_digits, "test")]), Counting(), student)


def rounds_of(engine: Engine) -> list[Samples]:
    """Play all rounds -> what the buffer held after the warm-up and after each of them."""
    loop, held = engine.loop(), []
    next(loop)
    while True:
        copy = torch.arange(engine.buffer.size)
        held.append(engine.buffer.filled()[copy])
        if engine.finished:
            return held
        loop.send(Coefficients())


@pytest.mark.parametrize("name", ["fastdfkd", "dafl"])
def test_a_baseline_replays_uniformly_with_sgd_without_looking_ahead(name: str) -> None:
    config = published(name)
    assert config.policy == "uniform"
    assert (config.distillation.optimizer, config.distillation.momentum) == ("sgd", 0.9)
    optimizer = make_optimizer(nn.Linear(2, 2), "sgd", 0.1, 0.9, 0.0, config.distillation.nesterov)
    assert optimizer.defaults["nesterov"] is False
    engine = small_engine(name)
    rounds_of(engine)
    shares = engine.replay_probabilities(Coefficients())
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / len(shares)))


def test_fastdfkd_has_its_authors_settings() -> None:
    config = published("fastdfkd")
    made, learning = config.inversion, config.distillation
    assert made.terms == {"batch_norm": 10.0, "one_hot": 0.4, "adversarial": 1.1}
    assert (made.images, made.steps, made.latent, made.width, made.subpixel) == (256, 5, 256, 64, False)
    assert (made.meta, made.memory, made.output) == ("fomaml", 0.9, "sigmoid")
    assert made.meta_rate == pytest.approx(made.steps * made.generator_rate)
    assert (learning.temperature, learning.learning_rate, learning.weight_decay) == (20.0, 0.2, 1e-4)
    assert learning.schedule == "cosine"
    assert made.restart == 120
    assert (made.augment, made.targets) == (True, "drawn")
    assert (config.buffer.views, config.buffer.shift, config.buffer.border) == (0, 4, "black")


def test_fastdfkds_pool_has_room_for_all_that_is_ever_made() -> None:
    config = published("fastdfkd")
    assert config.buffer.capacity == (config.rounds + config.inversion.warmup) * config.inversion.images


def test_fastdfkd_keeps_every_image_from_the_warm_ups_first_on() -> None:
    held = rounds_of(small_engine("fastdfkd"))
    assert [len(samples) for samples in held] == [16, 24, 32, 40]
    for before, after in itertools.pairwise(held):
        assert torch.equal(after.images[: len(before)], before.images), "nothing moves or leaves"


def test_fastdfkds_generator_begins_its_first_layer_anew_once() -> None:
    engine = small_engine("fastdfkd")
    engine.config.inversion.restart = 2
    base, begun, invert = engine.inverter.base, [], engine.inverter.invert

    def watched(*given: Any) -> Any:
        drawn = base.project.weight.detach()
        begun.append(bool((base.project.bias == 0).all()) and drawn.std().item() == pytest.approx(0.02, rel=0.1))
        return invert(*given)

    engine.inverter.invert = watched
    rounds_of(engine)
    assert begun == [False] * 3 + [False, True, False], "warm-up, probe and three rounds"


def test_fastdfkd_asks_its_teacher_at_every_student_step() -> None:
    engine = small_engine("fastdfkd")
    loop = engine.loop()
    next(loop)
    asked = engine.teacher.asked
    loop.send(Coefficients())
    made, replayed = 8, 2 * 8
    assert engine.teacher.asked - asked == made + replayed


def test_dafl_has_its_authors_settings() -> None:
    config = published("dafl")
    made, learning = config.inversion, config.distillation
    assert made.terms == {"one_hot_argmax": 1.0, "balance": 5.0, "activation": 0.1}
    assert (made.latent, made.images, learning.batch) == (1000, 1024, 1024)
    assert (learning.temperature, learning.learning_rate) == (1.0, 0.1)
    assert made.meta_rate == 0.02


def test_dafl_learns_from_a_fresh_batch_at_every_step_and_keeps_nothing() -> None:
    engine = small_engine("dafl")
    held = rounds_of(engine)
    assert engine.statistics["student_steps"] == 1
    assert [len(samples) for samples in held] == [8, 8, 8, 8]
    assert (engine.buffer.entered == engine.round - 1).all()
    for before, after in itertools.pairwise(held):
        assert not torch.equal(before.images, after.images)


def test_dafls_generator_takes_one_plain_adam_step_a_round() -> None:
    """With one adaptation step, FOMAML's gradient is the plain one."""
    config = published("dafl")
    assert (config.inversion.steps, config.inversion.meta) == (1, "fomaml")
    engine = small_engine("dafl")
    loop = engine.loop()
    next(loop)
    before = [p.detach().clone() for p in engine.inverter.base.parameters()]
    loop.send(Coefficients())
    optimizer = engine.inverter.base_optimizer
    moved = [(p - b).abs().max().item() for p, b in zip(engine.inverter.base.parameters(), before, strict=True)]
    assert 0 < max(moved) < 3 * config.inversion.meta_rate
    assert {int(state["step"]) for state in optimizer.state.values()} == {3}, "warm-up, probe and one round: one Adam"
