"""Promises of the engine: an honest budget, a probe nobody can bend, and runs that repeat to the byte."""

import copy
import dataclasses
import io
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ssdkd
from ssdkd.buffer import Samples, random_views, render
from ssdkd.coefficients import Coefficients
from ssdkd.config import RunConfig, from_mapping, read_yaml
from ssdkd.data import ImageSpec, dataset_spec, load_dataset
from ssdkd.distiller import Replayed
from ssdkd.engine import (
    JUDGED,
    TERMS_OF_GENERATOR,
    TERMS_OF_PYRAMID,
    TERMS_WITHOUT_BATCH_NORM,
    Candidates,
    Engine,
    Recipe,
    Statistics,
    evenly,
    spread,
)
from ssdkd.errors import ConfigError
from ssdkd.evaluation import predictions
from ssdkd.inversion import TERMS
from ssdkd.models import create_model, load_weights
from ssdkd.muon import Muon
from ssdkd.trouble import trouble_in

DIGITS_TEACHER = Path(ssdkd.__file__).parent / "assets" / "digits_teacher.safetensors"
TASK = {"num_classes": 10, "in_channels": 1, "image_size": 8}
TINY: dict[str, Any] = {
    "rounds": 4,
    "inversion": {"images": 32, "steps": 2, "width": 8, "latent": 16, "warmup": 4},
    "buffer": {"capacity": 80, "views": 3, "shift": 1},
    "distillation": {"batch": 32, "steps": 4},
    "probe": {"images": 40},
}
STEERED = Coefficients(
    w_div=1.5, gamma=1.0, refresh=0.4, alpha=1.0, beta=0.7, eta=0.5, adversarial=2.0, effort=2.0, textures=0.5
)


def changed(**groups: Any) -> dict[str, Any]:
    """TINY with some settings replaced, group by group."""
    merged = copy.deepcopy(TINY)
    for name, values in groups.items():
        merged[name] = merged.get(name, {}) | values if isinstance(values, dict) else values
    return merged


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def digits_teacher() -> nn.Module:
    arguments = read_yaml("digits")[0]["teacher"]["arguments"]
    teacher = seeded(lambda: create_model("convnet", **TASK, **arguments), 0)
    load_weights(teacher, DIGITS_TEACHER)
    return teacher


def small_student(seed: int = 0, **arguments: Any) -> nn.Module:
    return seeded(lambda: create_model("convnet_small", **TASK, **arguments), seed)


def tiny_engine(
    options: dict[str, Any] = TINY,
    *,
    spec: ImageSpec | None = None,
    student: nn.Module | None = None,
    teacher: nn.Module | None = None,
    evaluate: bool = False,
) -> Engine:
    return Engine(
        digits_teacher() if teacher is None else teacher,
        small_student() if student is None else student,
        dataset_spec("digits") if spec is None else spec,
        from_mapping(RunConfig, options),
        torch.device("cpu"),
        load_dataset("digits", None, "test") if evaluate else None,
    )


def drive(engine: Engine, coefficients: Coefficients, rounds: int | None = None) -> list[Statistics]:
    """Run the loop, to its end or for some rounds -> the statistics of the warm-up and of each round."""
    loop = engine.loop()
    seen = [next(loop)]
    while rounds is None or len(seen) <= rounds:
        try:
            seen.append(loop.send(coefficients))
        except StopIteration:
            break
    return seen


def to_bytes(model: nn.Module) -> bytes:
    return b"".join(t.numpy().tobytes() for t in model.state_dict().values())


# -- the loop and its budget ----------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 5])
def test_a_budget_in_rounds_is_that_many_rounds_of_neutral_effort(rounds: int) -> None:
    engine = tiny_engine(changed(rounds=rounds))
    drive(engine, Coefficients())
    assert engine.round == rounds
    assert engine.spent == pytest.approx(engine.budget)
    assert engine.finished
    assert engine.progress == pytest.approx(1.0)


@pytest.mark.parametrize("effort", [0.25, 2.0, 4.0])
def test_effort_trades_rounds_for_student_steps_within_the_budget(effort: float) -> None:
    heavy_steps = changed(rounds=8, distillation={"steps": 40})
    engine = tiny_engine(heavy_steps)
    seen = drive(engine, Coefficients(effort=effort))
    assert abs(engine.budget - engine.spent) <= 0.5 * engine.round_cost(40)
    *full, last = (s["student_steps"] for s in seen[1:])
    assert full == [round(40 * effort)] * (engine.round - 1)
    assert 1 <= last <= round(40 * effort), "the last round takes no more than what is left"
    if effort > 1:
        assert engine.round < 8
    if effort < 1:
        assert engine.round > 8


@pytest.mark.parametrize(
    ("factor", "images"), [(1.0, 32), (0.75, 32), (0.7, 16), (0.25, 8), (1.4, 32), (1.5, 64), (2.8, 64), (4.0, 80)]
)
def test_batches_are_doubled_or_halved_and_never_larger_than_the_buffer(factor: float, images: int) -> None:
    assert tiny_engine().batch_of(factor) == images


@pytest.mark.parametrize(("configured", "capacity", "images"), [(4, 80, 2), (2, 80, 2), (1, 80, 1), (32, 3, 3)])
def test_no_batch_is_of_one_image_unless_told_so(configured: int, capacity: int, images: int) -> None:
    """Of one image, batch norm has no statistics to learn from."""
    engine = tiny_engine(changed(distillation={"batch": configured}, buffer={"capacity": capacity}))
    assert engine.batch_of(0.25) == images


def test_asking_the_teacher_anew_is_paid_for_in_each_step() -> None:
    stored, anew = (tiny_engine(changed(buffer={"views": views})) for views in (3, 0))
    teacher = anew.costs.teacher.on(32) / anew.costs.learning(32)
    assert stored.round_cost(9) - stored.round_cost(8) == pytest.approx(1.0)
    assert anew.round_cost(9) - anew.round_cost(8) == pytest.approx(1.0 + teacher)
    assert anew.round_cost(0) < stored.round_cost(0), "one view is labelled, not three"


def test_a_budget_in_minutes_is_spent_by_the_seconds_of_work() -> None:
    engine = tiny_engine(changed(rounds=None, minutes=0.5))
    assert (engine.budget_rounds, engine.budget) == (0, 0.0)
    for seconds, progress in ((0.0, 0.0), (15.0, 0.5), (29.0, 29 / 30), (30.0, 1.0), (60.0, 1.0)):
        engine.seconds = seconds
        assert engine.progress == pytest.approx(progress)
        assert engine.finished == (progress == 1.0)


def test_a_budget_that_the_warm_up_takes_whole_is_refused() -> None:
    engine = tiny_engine(changed(rounds=None, minutes=1e-4))
    with pytest.raises(ConfigError, match=r"minutes: a budget of 0\.0001 leaves nothing to learn in.* give more"):
        next(engine.loop())


def test_other_batches_are_of_the_same_replays_and_cost_what_their_steps_cost() -> None:
    steps = changed(rounds=6, distillation={"batch": 16, "steps": 8})
    for factor, batch, count in ((0.5, 8, 16), (2.0, 32, 4)):
        engine = tiny_engine(steps)
        seen = drive(engine, Coefficients(batch=factor))
        assert {s["student_batch"] for s in seen[1:]} == {batch}
        assert {s["student_steps"] for s in seen[1:-1]} == {count}, "of 128 replays a round"
        unit = engine.costs.learning(16)
        assert seen[2]["spent"] - seen[1]["spent"] == pytest.approx(
            engine.round_cost(0) + count * engine.costs.learning(batch) / unit
        )
        assert engine.round > 6 if factor > 1 else engine.round < 6, "small steps cost more for the same replays"
        assert engine.spent <= 1.05 * engine.budget


def test_double_effort_costs_exactly_the_additional_student_steps() -> None:
    engine = tiny_engine()
    assert engine.round_cost(8) - engine.round_cost(4) == pytest.approx(4)
    assert engine.round_cost(0) > 0, "making samples is not free"


def test_a_loop_gives_statistics_for_the_warm_up_and_every_round() -> None:
    engine = tiny_engine()
    seen = drive(engine, Coefficients())
    assert [s["round"] for s in seen] == [0, 1, 2, 3, 4]
    assert [s["synthesized"] for s in seen] == [32 * (4 + 2 + n) for n in range(5)], (
        "for the warm-up and the probe first"
    )
    assert seen[0]["progress"] == 0
    assert all(set(s) == set(seen[1]) for s in seen[2:])
    assert all(torch.isfinite(torch.tensor(list(s.values()))).all() for s in seen)


def test_the_learning_rate_falls_with_the_budget() -> None:
    engine = tiny_engine(changed(distillation={"schedule": "cosine"}))
    rates = [s["learning_rate_fraction"] for s in drive(engine, Coefficients())]
    assert rates[0] == 1.0
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.02
    engine.spent = engine.budget
    assert engine.learning_rate_fraction(1.0) == pytest.approx(1e-3), "the last step teaches something too"
    steady = drive(tiny_engine(changed(distillation={"schedule": "constant"})), Coefficients())
    assert {s["learning_rate_fraction"] for s in steady} == {1.0}


def test_the_learning_rate_falls_as_far_as_it_is_told_to() -> None:
    def rates(anneal: float) -> list[float]:
        engine = tiny_engine(changed(distillation={"schedule": "cosine"}))
        return [s["learning_rate_fraction"] for s in drive(engine, Coefficients(anneal=anneal))]

    whole = rates(1.0)
    assert rates(0.25) == pytest.approx([1.0 - 0.25 * (1.0 - rate) for rate in whole])
    assert set(rates(0.0)) == {1.0}


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_learning_rate_that_is_told_is_the_one_that_was_used(share: float) -> None:
    engine = tiny_engine(changed(distillation={"schedule": "cosine", "learning_rate": 0.2}))
    engine.guard.step["student"] = share  # as after a rollback
    used: list[float] = []
    step = engine.distiller.optimizer.step

    def noted(*arguments: Any, **named: Any) -> Any:
        used.append(engine.distiller.optimizer.param_groups[0]["lr"])
        return step(*arguments, **named)

    engine.distiller.optimizer.step = noted  # type: ignore[method-assign]
    told = [s["learning_rate"] for s in drive(engine, Coefficients(anneal=0.5))][1:]
    assert told == pytest.approx(list(dict.fromkeys(used)))
    assert len(told) > 2


@pytest.mark.parametrize(("batch_norm", "told", "bound"), [(True, {}, 0), (False, {}, 2), (False, {"clip": 0}, 0)])
def test_a_student_without_batch_norm_is_held_back_unless_told_otherwise(
    batch_norm: bool, told: dict[str, float], bound: float
) -> None:
    engine = tiny_engine(changed(distillation=told), student=small_student(batch_norm=batch_norm))
    assert engine.distiller.clip == bound


def test_the_student_comes_to_do_the_teachers_job() -> None:
    """On digits that nobody trained on: from guessing to most of them right, in seconds."""
    engine = tiny_engine(
        changed(
            rounds=60,
            inversion={
                "images": 64,
                "steps": 3,
                "width": 16,
                "warmup": 20,
                "conditional": False,
                "memory": 0.0,
            },
            buffer={"capacity": 400},
            distillation={"batch": 64, "steps": 10, "temperature": 10.0},
        ),
        evaluate=True,
    )
    before = engine.accuracy(engine.student)
    seen = drive(engine, Coefficients())
    after = engine.accuracy(engine.student)
    assert before is not None
    assert after is not None
    assert before < 30
    assert after > 55
    assert seen[-1]["probe_kl"] < 0.5 * seen[0]["probe_kl"]
    assert seen[-1]["probe_agreement"] > seen[0]["probe_agreement"] + 0.3


# -- the probe ------------------------------------------------------------------------------------------


def test_the_probe_is_the_same_whatever_is_decided_and_whoever_learns() -> None:
    calm, steered = tiny_engine(), tiny_engine()
    other = tiny_engine(student=small_student(seed=5, widths=[4, 8, 8]))
    drive(calm, Coefficients())
    drive(steered, STEERED)
    other.warm_up()
    assert len(calm.probe) == 40
    for engine in (steered, other):
        assert torch.equal(calm.probe, engine.probe)
        assert torch.equal(calm.probe_logits, engine.probe_logits)
    assert to_bytes(calm.student) != to_bytes(steered.student)


@pytest.mark.parametrize(("images", "probed"), [(32, [32, 32]), (80, [40])])
def test_the_probe_is_searched_for_longer_and_no_more_of_it_than_is_needed(images: int, probed: list[int]) -> None:
    engine = tiny_engine(changed(inversion={"images": images, "warmup": 1}, probe={"patience": 3}))
    searches: list[tuple[int, int | None]] = []
    invert = engine.inverter.invert

    def watched(targets: torch.Tensor, *rest: Any) -> Any:
        searches.append((len(targets), rest[2]))
        return invert(targets, *rest)

    engine.inverter.invert = watched  # type: ignore[method-assign]
    engine.warm_up()
    assert searches == [(images, 2), *((count, 6) for count in probed)]
    assert len(engine.probe) == 40


def test_another_seed_gives_another_probe() -> None:
    one, two = tiny_engine(changed(seed=1)), tiny_engine(changed(seed=2))
    one.warm_up()
    two.warm_up()
    assert not torch.equal(one.probe, two.probe)


def test_no_probe_image_is_ever_in_the_buffer() -> None:
    engine = tiny_engine()
    drive(engine, Coefficients(refresh=0.5))
    held = engine.distiller.to_inputs(engine.buffer.filled().images.permute(0, 3, 1, 2)).flatten(1)
    probed = engine.probe.flatten(1)
    assert torch.cdist(probed, held).min() > 1e-3


# -- the same run, to the byte --------------------------------------------------------------------------


@pytest.mark.parametrize("views", [3, 0])
def test_the_same_seed_and_coefficients_give_the_same_student(views: int) -> None:
    options = changed(buffer={"views": views})
    students = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        engine = tiny_engine(options)
        drive(engine, STEERED)
        students.append(to_bytes(engine.student))
    assert students[0] == students[1]
    other = tiny_engine(options | {"seed": 1})
    drive(other, STEERED)
    assert to_bytes(other.student) != students[0]


class Forgetful(nn.Module):
    """A student with dropout: what PyTorch's own generator gives is part of the run, too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = create_model("convnet_small", **TASK)
        self.drop = nn.Dropout(0.3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.net(self.drop(inputs))


@pytest.mark.parametrize(("pixels", "most"), [(8, 1000), (64, 250)])
def test_of_large_images_fewer_are_measured_on_at_once(pixels: int, most: int) -> None:
    shown: list[int] = []

    class Counting(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            shown.append(len(images))
            return images.mean(dim=(2, 3))

    images = torch.zeros((1100, 1, pixels, pixels), dtype=torch.uint8)
    named = predictions(Counting(), images, torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), nullcontext())
    assert len(named) == sum(shown) == 1100
    assert max(shown) == most


class Unsteady(Forgetful):
    """Draws when it is measured as it does when it learns."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.net(nn.functional.dropout(inputs, 0.3))


@pytest.mark.parametrize("student", [Forgetful, Unsteady])
def test_an_evaluation_set_changes_nothing_about_the_student(student: Callable[[], nn.Module]) -> None:
    blind = tiny_engine(student=seeded(student, 0))
    watched = tiny_engine(student=seeded(student, 0), evaluate=True)
    torch.manual_seed(0)
    drive(blind, STEERED)
    torch.manual_seed(0)
    loop = watched.loop()
    next(loop)
    accuracies = []
    while not watched.finished:
        loop.send(STEERED)
        accuracies.append(watched.accuracy(watched.student))
    assert len(accuracies) >= 2
    assert all(a is not None and 0 <= a <= 100 for a in accuracies)
    assert to_bytes(blind.student) == to_bytes(watched.student)
    assert blind.accuracy(blind.student) is None


@pytest.mark.parametrize("optimizer", ["sgd", "muon", "adam"])
@pytest.mark.parametrize("views", [3, 0])
def test_a_run_that_was_cut_and_restored_ends_like_one_that_was_not(optimizer: str, views: int) -> None:
    options = changed(
        rounds=5,
        buffer={"views": views},
        distillation={"optimizer": optimizer, "learning_rate": 0.01},
        inversion={"memory": 0.5},
    )

    def build() -> Engine:
        engine = tiny_engine(options, student=seeded(Forgetful, 0))
        torch.manual_seed(0)
        return engine

    whole = build()
    drive(whole, STEERED, rounds=2)
    drive(whole, Coefficients())
    cut = build()
    drive(cut, STEERED, rounds=2)
    file = io.BytesIO()
    torch.save(cut.state_dict(), file)
    file.seek(0)
    restored = tiny_engine(options, student=seeded(Forgetful, 8))
    torch.manual_seed(99)
    restored.load_state_dict(torch.load(file, weights_only=True))
    last = drive(restored, Coefficients())
    assert to_bytes(restored.student) == to_bytes(whole.student)
    assert (restored.round, restored.spent) == (whole.round, whole.spent)
    for name in ("images", "logits", "delta", "entered", "visits"):
        assert torch.equal(getattr(restored.buffer, name), getattr(whole.buffer, name)), name
    timed = {"seconds"}
    assert {k: v for k, v in last[-1].items() if k not in timed} == {
        k: v for k, v in whole.statistics.items() if k not in timed
    }


# -- teacher, buffer and views --------------------------------------------------------------------------


@pytest.mark.parametrize("average", [0.0, 0.3])
@pytest.mark.parametrize("begins_wrapped", [True, False])
def test_a_run_goes_on_with_networks_that_are_wrapped_and_those_that_are_not(
    begins_wrapped: bool, average: float
) -> None:
    def engine(wrapped: bool) -> Engine:
        teacher, student = digits_teacher(), small_student()
        if wrapped:
            teacher, student = nn.DataParallel(teacher), nn.DataParallel(student)
        return tiny_engine(changed(distillation={"average": average}), teacher=teacher, student=student)

    begun, goes_on = engine(begins_wrapped), engine(not begins_wrapped)
    drive(begun, Coefficients(), rounds=1)
    goes_on.load_state_dict(copy.deepcopy(begun.state_dict()))
    ends = [drive(each, Coefficients(), rounds=1)[-1]["probe_kl"] for each in (begun, goes_on)]
    assert ends[0] == ends[1]


def test_a_run_leaves_the_teacher_as_it_was() -> None:
    engine = tiny_engine()
    before = to_bytes(engine.teacher)
    drive(engine, STEERED)
    assert to_bytes(engine.teacher) == before
    assert all(p.grad is None and not p.requires_grad for p in engine.teacher.parameters())
    assert not engine.teacher.training


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_making_samples_leaves_the_student_as_it_was(average: float) -> None:
    engine = tiny_engine(changed(distillation={"average": average}))
    drive(engine, Coefficients(), rounds=1)
    engine.learner.train()
    before = to_bytes(engine.learner), to_bytes(engine.student)
    engine.keep(engine.invert(STEERED), STEERED)
    assert (to_bytes(engine.learner), to_bytes(engine.student)) == before


@pytest.mark.parametrize("border", ["mirrored", "black"])
def test_stored_logits_are_what_the_teacher_says_of_the_stored_view(border: str) -> None:
    spec = dataclasses.replace(dataset_spec("digits"), flip=True)
    engine = tiny_engine(changed(buffer={"shift": 2, "border": border}), spec=spec)
    drive(engine, Coefficients(refresh=0.5))
    buffer, n = engine.buffer, engine.buffer.size
    assert buffer.entered[:n].max() >= 2, "nothing was exchanged"
    assert buffer.views[:n, 1:].abs().amax(dim=(0, 1)).tolist() == [2, 2, 1]
    rows = torch.arange(n)
    with torch.no_grad():
        for view in range(3):
            shown = render(buffer.images, rows, buffer.views[:n, view], border)
            answers = engine.teacher(engine.distiller.to_inputs(shown))
            assert torch.allclose(answers, buffer.logits[:n, view], atol=1e-4)
    confidence, classes = torch.softmax(buffer.logits[:n, 0], dim=1).max(dim=1)
    assert torch.equal(classes, buffer.classes[:n])
    assert torch.allclose(confidence, buffer.confidence[:n], atol=1e-5)


def test_the_buffer_fills_and_turns_over_no_faster_than_refresh() -> None:
    engine = tiny_engine(changed(rounds=3))
    drive(engine, Coefficients(), rounds=1)
    assert engine.buffer.size == 80, "the warm-up and one round fill it"
    for refresh in (0.05, 0.2):
        before = engine.buffer.images.clone()
        candidates = engine.invert(Coefficients())
        engine.keep(candidates, Coefficients(refresh=refresh))
        turned = (engine.buffer.images != before).flatten(1).any(dim=1).sum().item()
        assert 0 < turned <= refresh * 80


def test_every_draw_of_the_run_is_counted_as_a_visit() -> None:
    engine = tiny_engine(changed(inversion={"warmup": 8}))
    drive(engine, Coefficients(refresh=0.02), rounds=1)
    assert engine.buffer.visits.sum().item() == 4 * 32


# -- what the coefficients steer ------------------------------------------------------------------------


def candidates_of(engine: Engine, classes: torch.Tensor, confidence: torch.Tensor) -> Candidates:
    generator = torch.Generator().manual_seed(0)
    n, views = len(classes), engine.stored_views
    samples = Samples(
        images=torch.randint(0, 256, (n, 8, 8, 1), dtype=torch.uint8, generator=generator),
        views=random_views(n, views, 0, False, generator),
        logits=torch.zeros(n, views, 10),
        classes=classes,
        confidence=confidence,
    )
    return Candidates(samples, Recipe(n, 0, 0), classes, {}, torch.ones(n))


def kept_classes(coefficients: Coefficients) -> torch.Tensor:
    """Fill the buffer from a stream in which class 0 has nine parts of ten -> the classes it ends with."""
    engine = tiny_engine(changed(buffer={"capacity": 200}))
    generator = torch.Generator().manual_seed(1)
    for _ in range(40):
        classes = torch.where(
            torch.rand(50, generator=generator) < 0.9, 0, torch.randint(1, 10, (50,), generator=generator)
        )
        engine.keep(candidates_of(engine, classes, torch.full((50,), 0.5)), coefficients)
    return torch.bincount(engine.buffer.filled().classes, minlength=10) / 200


def test_w_div_keeps_a_balanced_buffer_out_of_a_skewed_stream() -> None:
    plain = kept_classes(Coefficients(refresh=0.2))
    balanced = kept_classes(Coefficients(refresh=0.2, w_div=2.0))
    assert plain[0] > 0.75
    assert balanced[0] < 0.5
    assert balanced[1:].min() > 0


@pytest.mark.parametrize(("gamma", "sign"), [(2.0, -1), (-2.0, 1)])
def test_gamma_keeps_hard_or_easy_samples(gamma: float, sign: int) -> None:
    def mean_confidence(coefficients: Coefficients) -> float:
        engine = tiny_engine(changed(buffer={"capacity": 100}))
        generator = torch.Generator().manual_seed(2)
        for _ in range(20):
            confidence = torch.rand(50, generator=generator)
            engine.keep(candidates_of(engine, torch.arange(50) % 10, confidence), coefficients)
        return engine.buffer.filled().confidence.mean().item()

    neutral = mean_confidence(Coefficients(refresh=0.3))
    steered = mean_confidence(Coefficients(refresh=0.3, gamma=gamma))
    assert neutral == pytest.approx(0.5, abs=0.1)
    assert sign * (steered - neutral) > 0.15


def test_wear_lets_what_was_replayed_often_give_way() -> None:
    def stayed(wear: float) -> float:
        """How many of the buffer's images that were replayed a hundred times stay, over those that never were."""
        engine = tiny_engine(changed(buffer={"capacity": 200}))
        classes = torch.arange(200) % 10
        engine.keep(candidates_of(engine, classes, torch.full((200,), 0.5)), Coefficients())
        engine.buffer.visits[:100] = 100
        old = engine.buffer.images.clone()
        new = candidates_of(engine, classes.flip(0), torch.full((200,), 0.5))
        new.samples.images.bitwise_not_()
        engine.keep(new, Coefficients(refresh=0.5, wear=wear))
        same = (engine.buffer.images == old).flatten(1).all(dim=1)
        return same[:100].sum().item() / same[100:].sum().item()

    assert stayed(0.0) == pytest.approx(1.0, abs=0.4)
    assert stayed(0.5) < 0.5
    assert stayed(2.0) < stayed(0.5)


@pytest.mark.parametrize("augment", [False, True])
def test_the_search_looks_at_shifted_images_only_where_it_is_told_to(augment: bool) -> None:
    spec = dataclasses.replace(dataset_spec("digits"), flip=True)
    engine = tiny_engine(changed(inversion={"augment": augment}, buffer={"shift": 2, "border": "black"}), spec=spec)
    settings = engine.inverter.settings
    assert (settings.shift, settings.flip) == ((2, True) if augment else (0, False))
    assert settings.border == engine.buffer.border == "black"


def test_drawn_targets_scatter_as_dice_do_and_balanced_ones_do_not() -> None:
    """Of 200 images for 10 classes, a class is drawn 20 times on average, with a variance of 18."""

    def spread(targets: str) -> tuple[float, float]:
        engine = tiny_engine(changed(inversion={"images": 200, "targets": targets}))
        counts = torch.stack(
            [torch.bincount(engine._targets(torch.zeros(10), 0.0, 200), minlength=10).float() for _ in range(100)]
        )
        return counts.mean(dim=0).sub(20).abs().max().item(), counts.var(dim=0).mean().item()

    off, variance = spread("drawn")
    assert off < 2.0
    assert variance == pytest.approx(18, rel=0.2)
    assert spread("balanced") == (0.0, 0.0)


@pytest.mark.parametrize("targets", ["balanced", "drawn"])
def test_w_div_makes_more_of_the_classes_that_the_buffer_lacks(monkeypatch: pytest.MonkeyPatch, targets: str) -> None:
    engine = tiny_engine(changed(inversion={"images": 200, "targets": targets}))
    engine.keep(candidates_of(engine, torch.tensor([0] * 45 + [1] * 5), torch.full((50,), 0.5)), Coefficients())
    wanted: list[torch.Tensor] = []
    invert = engine.inverter.invert

    def listen(targets: torch.Tensor, *rest: Any) -> Any:
        wanted.append(torch.bincount(targets, minlength=10))
        return invert(targets, *rest)

    monkeypatch.setattr(engine.inverter, "invert", listen)
    engine.invert(Coefficients(w_div=0.0))
    engine.invert(Coefficients(w_div=1.0))
    even, lacking = wanted
    assert targets == "drawn" or even.tolist() == [20] * 10
    assert lacking[0] < lacking[1] < lacking[2:].min()


def test_alpha_replays_more_of_what_the_student_has_not_learned() -> None:
    engine = tiny_engine()
    drive(engine, Coefficients(), rounds=1)
    n = engine.buffer.size
    engine.buffer.delta[:n] = torch.linspace(0.01, 1.0, n)
    neutral = engine.replay_probabilities(Coefficients())
    steered = engine.replay_probabilities(Coefficients(alpha=1.0))
    assert neutral.tolist() == pytest.approx([1 / n] * n)
    assert (steered[1:] > steered[:-1]).all()
    assert steered[-1] > 50 * steered[0]


def test_eta_lets_the_modulating_function_steer_replay_too() -> None:
    engine = tiny_engine()
    drive(engine, Coefficients(), rounds=1)
    n = engine.buffer.size
    engine.buffer.classes[:n] = torch.where(torch.arange(n) < n // 10, 1, 0)  # class 1 is rare
    engine.buffer.confidence[:n] = 0.5
    unsteered = engine.replay_probabilities(Coefficients(w_div=2.0))
    assert unsteered.tolist() == pytest.approx([1 / n] * n), "without it, classes count for what is kept alone"
    half, whole = (engine.replay_probabilities(Coefficients(w_div=2.0, eta=eta)) for eta in (0.5, 1.0))
    assert half[0] > 1.2 * half[-1]
    assert (whole[0] / whole[-1]).item() == pytest.approx((half[0] / half[-1]).item() ** 2, rel=1e-3)
    engine.buffer.confidence[: n // 2] = 0.9
    engine.buffer.classes[:n] = 0
    by_difficulty = engine.replay_probabilities(Coefficients(gamma=2.0, eta=1.0))
    assert by_difficulty[-1] > 1.2 * by_difficulty[0]


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_every_fact_of_a_round_is_what_its_name_says(average: float) -> None:
    engine = tiny_engine(changed(distillation={"average": average}))
    loop = engine.loop()
    first = dict(next(loop))
    assert (first["replay_ess"], first["replay_loss"]) == (1.0, 0.0), "nothing has been replayed"
    assert first["replay_top_decile"] == pytest.approx(0.1)
    for _ in range(2):
        facts = loop.send(Coefficients(alpha=1.0))
    buffer = engine.buffer
    assert buffer.size == 80
    share = torch.bincount(buffer.classes, minlength=10).double() / 80
    surprise = torch.where(share > 0, -share * share.clamp(min=1e-9).log(), 0.0)
    with torch.no_grad():
        said, told = engine.student.eval()(engine.probe), engine.probe_logits
    p, q = told.softmax(dim=1), said.softmax(dim=1)
    ess, decile = facts["replay_ess"], facts["replay_top_decile"]
    expected = {
        "class_entropy": surprise.sum().item() / math.log(10),
        "class_share_min": share.min().item(),
        "class_share_max": share.max().item(),
        "probe_kl": (p * (p / q).log()).sum(dim=1).mean().item(),
        "probe_agreement": (said.argmax(dim=1) == told.argmax(dim=1)).double().mean().item(),
        "buffer_size": 80.0,
        "buffer_fill": 1.0,
        "candidates_broken": 0.0,
        "student_steps": 4.0,
    }
    columns = {"confidence": buffer.confidence, "delta": buffer.delta, "visits": buffer.visits}
    for name, column in (columns | {"age": engine.round - 1 - buffer.entered}).items():
        for q10 in (10, 50, 90):
            expected[f"{name}_q{q10}"] = torch.quantile(column.double(), q10 / 100).item()
    assert {name: facts[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert 0.1 < ess < 0.99
    assert 0.11 < decile < 1.0
    assert (facts["age_q90"], facts["visits_q90"]) > (0.0, 0.0)


@pytest.mark.parametrize(("inverted", "largest"), [(4, 0.75), (0, 1.0)])
def test_facts_of_candidates_are_of_the_inverted_ones_that_are_usable(inverted: int, largest: float) -> None:
    engine = tiny_engine()
    drive(engine, Coefficients(), rounds=1)
    made = candidates_of(engine, torch.tensor([1, 1, 2, 3, 4, 5]), torch.linspace(0.1, 0.6, 6))
    made.samples.logits[3] = math.nan
    made = dataclasses.replace(
        made, recipe=Recipe(inverted, 6 - inverted, 0), targets=torch.tensor([7, 7, 7, 8])[:inverted]
    )
    silence = torch.zeros(())
    facts = engine.measure(made, silence + 5.0, Replayed(silence, silence))
    assert facts["candidates"] == 6
    assert facts["inverted"] == inverted
    assert facts["candidates_broken"] == 1
    assert facts["candidate_classes"] == (2 if inverted else 1), "of broken ones and of textures, none counts"
    assert facts["target_share_max"] == pytest.approx(largest)
    assert facts["candidate_confidence_q90"] == pytest.approx(0.55), "one of no answer counts as nothing"
    assert facts["accepted"] == 5


# -- looking --------------------------------------------------------------------------------------------


def test_a_look_in_parts_says_the_same_as_one_at_all() -> None:
    engine = tiny_engine()
    spec = engine.spec
    inputs = torch.randn(engine.looked_at_once * 2 + 3, *spec.shape)
    torch.testing.assert_close(engine._answers(engine.teacher, inputs), engine.teacher(inputs))


def test_an_even_part_reaches_from_the_first_to_the_last() -> None:
    values = torch.arange(1001)
    part = evenly(values, 100)
    assert 50 < len(part) <= 100
    assert (part.diff() == part[1] - part[0]).all()
    assert part[0] == 0
    assert part[-1] > 980
    assert torch.equal(evenly(values, 1001), values)
    assert len(evenly(values[:0], 10)) == 0


def test_the_student_looks_at_an_even_part_of_many_candidates() -> None:
    engine = tiny_engine()
    drive(engine, Coefficients(), rounds=1)
    few = engine.buffer.filled()[:5]
    many = few[torch.arange(5).repeat_interleave(JUDGED)]

    def judged(samples: Samples) -> torch.Tensor:
        return engine._judged(Candidates(samples, Recipe(0, len(samples), 0), torch.empty(0), {})).delta

    torch.testing.assert_close(judged(many), judged(few).repeat_interleave(JUDGED)[::5])


def test_the_spread_of_pixels_is_their_standard_deviation() -> None:
    images = torch.randint(0, 256, (40, 6, 5, 3), dtype=torch.uint8)
    assert spread(images).item() == pytest.approx(images.float().std(dim=0, correction=0).mean().item(), rel=1e-5)


# -- odd but normal cases -------------------------------------------------------------------------------


def test_a_teacher_without_batch_norm_runs_and_its_loss_has_other_terms() -> None:
    teacher = seeded(lambda: create_model("convnet", **TASK, batch_norm=False), 3)
    engine = tiny_engine(teacher=teacher)
    seen = drive(engine, Coefficients())
    assert "batch_norm" not in engine.terms
    assert "term_batch_norm" not in seen[-1]
    assert {"term_one_hot", "term_adversarial"} <= set(seen[-1])
    assert "term_batch_norm" in drive(tiny_engine(), Coefficients(), rounds=1)[-1]


def test_an_unknown_loss_term_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"'one_hott'.*one_hot"):
        tiny_engine(changed(inversion={"terms": {"one_hott": 1.0}}))


@pytest.mark.parametrize(
    ("term", "weight"), [*((name, -1.0) for name in TERMS), ("one_hot", math.nan), ("one_hot", math.inf)]
)
def test_no_term_counts_the_other_way_round(term: str, weight: float) -> None:
    told = rf"inversion\.terms\.{term}: expected a number of at least 0, got {weight}\."
    with pytest.raises(ConfigError, match=told):
        tiny_engine(changed(inversion={"terms": {"one_hot": 1.0, term: weight}}))


@pytest.mark.parametrize("terms", [{}, {"one_hot": 0.0}, {"adversarial": 1.0}])
def test_terms_that_leave_nothing_to_search_for_are_refused(terms: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"inversion\.terms"):
        tiny_engine(changed(inversion={"terms": terms})).warm_up()


@pytest.mark.parametrize(
    ("size", "batch_norm", "start", "steps"),
    [
        ((16, 16), True, "pyramid", 10),
        ((16, 40), True, "pyramid", 10),
        ((15, 40), True, "generator", 5),
        ((40, 15), True, "generator", 5),
        ((16, 16), False, "textures", 5),
        ((8, 8), False, "textures", 5),
    ],
)
def test_where_the_search_starts_follows_from_the_teacher_and_the_size_of_its_images(
    size: tuple[int, int], batch_norm: bool, start: str, steps: int
) -> None:
    def network() -> nn.Module:
        normalised = nn.BatchNorm2d(4) if batch_norm else nn.Identity()
        return nn.Sequential(nn.Conv2d(1, 4, 3), normalised, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

    spec = dataclasses.replace(dataset_spec("digits"), height=size[0], width=size[1])
    left_open = changed(inversion={"steps": None}, buffer={"shift": None})
    engine = tiny_engine(left_open, spec=spec, teacher=network(), student=network())
    assert (engine.starts_from, engine.inversion_steps) == (start, steps)
    assert engine.shift == min(size) // 8
    usual = {"pyramid": TERMS_OF_PYRAMID, "generator": TERMS_OF_GENERATOR, "textures": TERMS_WITHOUT_BATCH_NORM}
    assert engine.terms == usual[start]
    assert (engine.costs.generator.multiply_adds > 0) == (start == "generator"), "which the budget pays for"
    with pytest.raises(ConfigError, match=f"out of sight; give at most {min(size) - 1}"):
        tiny_engine(changed(buffer={"shift": min(size)}), spec=spec, teacher=network(), student=network())
    assert tiny_engine(spec=spec, teacher=network(), student=network()).inversion_steps == 2, "what is given counts"


@pytest.mark.parametrize(
    ("start", "usual"),
    [("generator", (20, 0.5, 0.0, 0.0)), ("textures", (3, 1.0, 0.0, 0.5)), ("pyramid", (3, 1.0, 1.0, 0.0))],
)
def test_what_is_left_open_follows_from_where_the_search_starts(
    start: str, usual: tuple[int, float, float, float]
) -> None:
    def settled(shift: int | None, **inversion: Any) -> tuple[Any, ...]:
        engine = tiny_engine(changed(inversion={"start": start, **inversion}, buffer={"shift": shift}))
        return engine.warmup, engine.warmup_kept, engine.blends, engine.texture_share, engine.shift

    assert settled(None, warmup=None) == (*usual, 1), "an eighth of 8 pixels"
    assert settled(0, warmup=7, warmup_kept=0.0, blends=0.0, textures=0.0) == (7, 0.0, 0.0, 0.0, 0), (
        "what is given counts"
    )


@pytest.mark.parametrize(
    ("start", "width", "kind"),
    [
        ("pyramid", 8, Muon),
        ("pyramid", 400, torch.optim.SGD),  # more than a million weights, in which each of its steps would take long
        ("textures", 8, torch.optim.SGD),
        ("generator", 8, torch.optim.SGD),
    ],
)
def test_a_small_student_of_images_from_a_pyramid_learns_by_muon(start: str, width: int, kind: type) -> None:
    student = small_student(widths=[width, width])
    engine = tiny_engine(changed(inversion={"start": start}), student=student)
    assert type(engine.distiller.optimizer) is kind


class HeadFirst(nn.Module):
    """Defines its head before what leads to it, and may run it by way of no layer."""

    def __init__(self, bypassed: bool = False) -> None:
        super().__init__()
        self.head = nn.Linear(8, 10)
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
        self.bypassed = bypassed

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        flat = self.body(inputs).mean(dim=(2, 3))
        result: torch.Tensor = self.head.forward(flat) if self.bypassed else self.head(flat)
        return result


def test_muon_takes_for_the_head_what_is_used_last_wherever_it_is_defined() -> None:
    options = changed(distillation={"optimizer": "muon", "average": 0.0})

    def turned(student: HeadFirst) -> list[bool]:
        groups = tiny_engine(options, student=student).distiller.optimizer.param_groups
        moved = {id(weight) for group in groups for weight in group["params"] if group["turned"]}
        return [id(layer.weight) in moved for layer in (*student.body, student.head)]

    assert turned(HeadFirst()) == [False, True, True, False]
    assert turned(HeadFirst(bypassed=True)) == [False, True, False, True], "as defined, where not all are seen"


def test_a_generator_that_is_told_to_keeps_to_the_pixels_of_the_teachers_normalisation() -> None:
    engine = tiny_engine(changed(rounds=1, inversion={"output": "normalised"}))
    told = engine.spec.normalisation(torch.device("cpu"))
    base = engine.inverter.base  # type: ignore[attr-defined]
    assert torch.equal(base.pixel_mean, told[0])
    assert torch.equal(base.pixel_std, told[1])
    assert drive(engine, Coefficients())[-1]["candidates"] == 32
    assert tiny_engine().inverter.base.standardise is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("start", ["pyramid", "generator"])
@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("muon", Muon)])
def test_an_optimiser_that_is_named_is_taken(start: str, name: str, kind: type) -> None:
    engine = tiny_engine(changed(inversion={"start": start}, distillation={"optimizer": name}))
    assert type(engine.distiller.optimizer) is kind


def test_a_generator_begins_as_its_seed_says_and_not_as_others_draw() -> None:
    begun = []
    for seed, drawn_by_others in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(drawn_by_others)
        teacher, student, state = digits_teacher(), small_student(), torch.get_rng_state()
        engine = tiny_engine(changed(seed=seed), teacher=teacher, student=student)
        assert torch.equal(torch.get_rng_state(), state)
        begun.append(to_bytes(engine.inverter.base))  # type: ignore[attr-defined]
    assert begun[0] == begun[1] != begun[2]


def test_a_shift_as_large_as_the_image_is_refused() -> None:
    with pytest.raises(ConfigError, match="shift"):
        drive(tiny_engine(changed(buffer={"shift": 8})), Coefficients())


def test_a_probe_and_a_buffer_larger_than_what_is_made_at_first_are_fine() -> None:
    engine = tiny_engine(
        changed(rounds=2, inversion={"images": 5, "warmup": 1}, buffer={"capacity": 500}, probe={"images": 13})
    )
    drive(engine, STEERED)
    assert len(engine.probe) == 13
    assert 0 < engine.buffer.size < 500
    assert engine.finished


def test_textures_multiply_their_odds_and_save_the_search() -> None:
    engine = tiny_engine(changed(inversion={"images": 32, "textures": 0.25}))
    assert engine.recipe() == Recipe(24, 8, 0), "neutral is as configured"
    assert engine.recipe(3.0) == Recipe(16, 16, 0), "odds 1 to 3 become 3 to 3"
    assert engine.recipe(10.0) == Recipe(7, 25, 0)
    assert engine.recipe(0.1) == Recipe(31, 1, 0)
    next(loop := engine.loop())
    before = engine.spent
    engine.invert(Coefficients(textures=3.0))
    assert engine.spent - before == pytest.approx(engine.round_cost(0, Recipe(16, 16, 0)))
    searched = engine.costs.searching(24, engine.inversion_steps) - engine.costs.searching(16, engine.inversion_steps)
    step = engine.costs.learning(engine.config.distillation.batch)
    assert engine.round_cost(0) - (engine.spent - before) == pytest.approx(searched / step)
    assert loop.send(Coefficients(textures=3.0))["inverted"] == 16


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_textures_of_none_or_all_stays(share: float) -> None:
    engine = tiny_engine(changed(inversion={"textures": share}))
    assert {engine.recipe(odds).textures for odds in (0.1, 1.0, 10.0)} == {round(32 * share)}
    drive(engine, Coefficients(textures=10.0))
    assert engine.finished


def test_blends_are_candidates_between_two_images_and_cost_a_look_of_the_teacher() -> None:
    plain, blended = tiny_engine(), tiny_engine(changed(inversion={"blends": 0.5}))
    costs, views = blended.costs, blended.stored_views
    looks = costs.labelling(48, views) - costs.labelling(32, views)
    assert looks == 16 * (views * costs.teacher.multiply_adds + costs.student.multiply_adds), "no look begins for them"
    assert blended.round_cost(0) == pytest.approx(plain.round_cost(0) + looks / costs.learning(32))
    statistics = drive(blended, STEERED, rounds=2)[-1]
    assert statistics["candidates"] == 48
    assert blended.synthesized == (4 + 2 + 2) * 48


def test_a_blend_is_of_a_quarter_to_three_quarters_of_either_image() -> None:
    engine = tiny_engine(changed(buffer={"shift": 0, "capacity": 8}))
    new, held = (torch.full((8, 8, 8, 1), level, dtype=torch.uint8) for level in (0, 200))
    engine.buffer.images, engine.buffer.size = held, 8
    shares = engine._blended(new, 2000)[:, 0, 0, 0] / 200.0
    assert (shares.min().item(), shares.max().item()) == pytest.approx((0.25, 0.75), abs=0.01)
    assert shares.mean().item() == pytest.approx(0.5, abs=0.02)


def test_a_blend_of_one_image_with_itself_is_that_image() -> None:
    engine = tiny_engine(changed(inversion={"blends": 1.0}, buffer={"shift": 0}))
    image = torch.randint(0, 256, (1, 8, 8, 1), dtype=torch.uint8)
    engine.buffer.images[0], engine.buffer.size = image[0], 1
    assert torch.equal(engine._blended(image, 32), image.expand(32, -1, -1, -1))
    engine.buffer.images[0] = 0
    shares = engine._blended(image, 32).float() / image.clamp(min=1)
    between = shares[:, image[0] > 60]
    assert between.min() >= 0.23
    assert between.max() <= 0.77


def test_a_round_of_textures_alone_tells_nothing_of_a_search() -> None:
    engine = tiny_engine(changed(inversion={"images": 8, "textures": 0.9, "targets": "drawn"}))
    loop = engine.loop()
    next(loop)
    assert "term_loss" in loop.send(Coefficients(textures=0.1))
    told = loop.send(Coefficients(textures=10.0))
    assert told["inverted"] == 0
    assert not [key for key in told if key.startswith("term_")], "not that of the round before"


@pytest.mark.parametrize(("inverted", "collapsed"), [(16, True), (15, False)])
def test_few_inverted_images_of_one_class_are_no_collapse_among_many_textures(inverted: int, collapsed: bool) -> None:
    before = {"candidate_pixel_spread": 30.0, "candidate_classes": 10.0}
    now = {
        **{"replay_loss": 1.0, "probe_kl": 1.0, "student_finite": 1.0, "generator_finite": 1.0},
        **{"candidates": 64.0, "candidates_broken": 0.0, "inverted": float(inverted)},
        **{"candidate_pixel_spread": 30.0, "candidate_classes": 1.0, "target_share_max": 0.1},
    }
    assert bool(trouble_in(now, before)) == collapsed
    for start, searched, rate in (("generator", "generator", "generator_rate"), ("pyramid", "search", "pixel_rate")):
        for trouble in trouble_in(now, before, start):
            assert trouble.what == f"the {searched} collapsed: every candidate is of one class"
            assert f"inversion.{rate}" in trouble.advice
