"""Promises of the distiller: the loss it descends, the weights it heeds, what it notes of each sample."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssdkd.buffer import ReplayBuffer, Samples, random_views
from ssdkd.distiller import Distiller, Replayed, default_bound, divergence, excess, make_optimizer
from ssdkd.muon import Muon

CLASSES, SIZE = 4, 6
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(1, 3, 1, 1)


def random_from(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear_student(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, CLASSES))


def filled_buffer(n: int = 16, views: int = 2) -> ReplayBuffer:
    generator = random_from(0)
    buffer = ReplayBuffer(n, (3, SIZE, SIZE), CLASSES, views, torch.device("cpu"))
    logits = 3 * torch.randn(n, views, CLASSES, generator=generator)
    made = Samples(
        images=torch.randint(0, 256, (n, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator),
        views=random_views(n, views, 1, True, generator),
        logits=logits,
        classes=logits[:, 0].argmax(dim=1),
        confidence=torch.rand(n, generator=generator),
    )
    buffer.append(made, delta=1.0, round_index=0)
    return buffer


def distiller(student: nn.Module, learning_rate: float = 0.1, clip: float = 0.0, t: float = 2.0) -> Distiller:
    optimizer = make_optimizer(student, "sgd", learning_rate, 0.0, 0.0)
    return Distiller(student, optimizer, MEAN, STD, t, clip, nullcontext())


def plainly(d: Distiller, buffer: ReplayBuffer, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Show each image as it is."""
    return d.to_inputs(buffer.images[rows].permute(0, 3, 1, 2)), buffer.logits[rows, 0]


def replayed(d: Distiller, buffer: ReplayBuffer, rows: Tensor, weights: Tensor, learning_rate: float) -> Replayed:
    """A replay of `rows` (K, B), each image shown as it is."""
    return d.replay(buffer, rows, weights, learning_rate, (plainly(d, buffer, batch) for batch in rows))


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


# -- the loss -------------------------------------------------------------------------------------------


def test_divergence_is_the_softened_kl_from_teacher_to_student() -> None:
    teacher, student = torch.randn(2, 5, CLASSES, generator=random_from(1)).unbind()
    p, q = torch.softmax(teacher / 3.0, dim=1), torch.softmax(student / 3.0, dim=1)
    assert torch.allclose(divergence(teacher, student, 3.0), 9.0 * (p * (p / q).log()).sum(dim=1), atol=1e-5)


def test_divergence_is_zero_only_where_both_say_the_same() -> None:
    teacher = torch.tensor([[2.0, 0.0, -1.0, 0.5], [2.0, 0.0, -1.0, 0.5]])
    student = torch.tensor([[5.0, 3.0, 2.0, 3.5], [0.0, 2.0, -1.0, 0.5]])  # the first: shifted by 3
    same, other = divergence(teacher, student, 4.0).tolist()
    assert same == pytest.approx(0.0, abs=1e-5)
    assert other > 0.1


def test_divergence_stays_finite_where_the_student_is_sure_and_wrong() -> None:
    teacher, student = torch.tensor([[300.0, 0.0]]), torch.tensor([[0.0, 300.0]])
    assert divergence(teacher, student, 1.0).item() == pytest.approx(300.0)


def test_inputs_are_pixels_normalised_as_the_teacher_was_taught() -> None:
    images = torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8, generator=random_from(0))
    expected = (images.float() / 255.0 - MEAN) / STD
    assert torch.allclose(distiller(linear_student()).to_inputs(images), expected, atol=1e-5)


# -- a step ---------------------------------------------------------------------------------------------


def test_a_step_follows_the_gradient_of_the_weighted_loss() -> None:
    student, buffer = linear_student(), filled_buffer()
    reference = copy.deepcopy(student)
    weights = torch.rand(16, generator=random_from(3))
    rows = torch.tensor([[3, 9, 9, 14]])
    d = distiller(student)
    outcome = replayed(d, buffer, rows, weights[rows], 0.05)
    inputs, teacher_logits = plainly(d, buffer, rows[0])
    log_q = F.log_softmax(reference(inputs) / 2.0, dim=1)
    p = torch.softmax(teacher_logits / 2.0, dim=1)
    loss = (weights[rows[0]] * 4.0 * (p * (p.log() - log_q)).sum(dim=1)).mean()
    loss.backward()
    expected = torch.cat([(q - 0.05 * q.grad).detach().flatten() for q in reference.parameters()])
    assert torch.allclose(parameters(student), expected, atol=1e-6)
    assert outcome.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert not outcome.loss.requires_grad, "each round would hold the memory of its last step"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("compiled", [False, True])
def test_an_error_of_the_student_itself_is_handed_on_at_once(compiled: bool) -> None:
    """None of compiling, it is no reason to warn of that nor to try again."""
    calls = []

    class Fails(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            calls.append(inputs)
            raise ValueError("not today")

    student, buffer = Fails(3, 4), filled_buffer()
    d = distiller(student)
    if compiled:
        d.forward = student.forward  # stands for a compiled form, which is another object
    with pytest.raises(ValueError, match="not today"):
        replayed(d, buffer, torch.arange(8)[None], torch.ones(1, 8), 0.1)
    assert len(calls) == 1


def test_a_sample_without_weight_teaches_nothing() -> None:
    student, buffer = linear_student(), filled_buffer()
    before, d = parameters(student), distiller(student)
    replayed(d, buffer, torch.arange(16).view(2, 8), torch.zeros(2, 8), 0.5)
    assert torch.equal(parameters(student), before)


def test_replay_brings_the_student_closer_to_the_teacher() -> None:
    student, buffer = linear_student(), filled_buffer()
    d = distiller(student)
    rows = torch.arange(16).repeat(30, 1)
    first = replayed(d, buffer, rows[:1], torch.ones(1, 16), 0.05)
    replayed(d, buffer, rows, torch.ones(rows.shape), 0.05)
    last = replayed(d, buffer, rows[:1], torch.ones(1, 16), 0.05)
    assert last.loss < 0.2 * first.loss
    assert last.agreement > first.agreement


def test_a_clipped_step_is_no_longer_than_the_clip() -> None:
    steps = {}
    for clip in (0.0, 0.01):
        student, buffer = linear_student(), filled_buffer()
        before, d = parameters(student), distiller(student, clip=clip)
        replayed(d, buffer, torch.arange(16)[None], torch.ones(1, 16), 1.0)
        steps[clip] = (parameters(student) - before).norm().item()
    assert steps[0.0] > 0.1
    assert steps[0.01] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.InstanceNorm2d(4)])
def test_gradients_are_bounded_by_default_where_nothing_normalises(layer: nn.Module) -> None:
    assert default_bound(nn.Sequential(nn.Linear(2, 4), nn.ReLU())) == 2.0
    assert default_bound(nn.Sequential(nn.Linear(2, 4), nn.Sequential(layer))) == 0.0


def test_delta_of_what_was_replayed_is_refreshed_and_of_the_rest_is_not() -> None:
    student, buffer = linear_student(), filled_buffer()
    d = distiller(student)
    rows = torch.tensor([1, 5, 7])
    with torch.no_grad():
        inputs, teacher_logits = plainly(d, buffer, rows)
        expected = divergence(teacher_logits, student(inputs), 2.0)
    replayed(d, buffer, rows[None], torch.ones(1, 3), 0.1)
    assert torch.allclose(buffer.delta[rows], expected, atol=1e-5)
    untouched = [i for i in range(16) if i not in rows.tolist()]
    assert buffer.delta[untouched].tolist() == [1.0] * 13


def test_agreement_is_the_share_of_images_on_which_both_name_the_same_class() -> None:
    class Says(nn.Module):
        def __init__(self, logits: Tensor) -> None:
            super().__init__()
            self.logits = nn.Parameter(logits)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.logits

    buffer = filled_buffer()
    said = F.one_hot(buffer.classes[:8], CLASSES).float()
    said[:2] = said[:2].roll(1, dims=1)
    student = Says(said)
    d = distiller(student)
    outcome = replayed(d, buffer, torch.arange(8)[None], torch.ones(1, 8), 0.0)
    assert outcome.agreement.item() == pytest.approx(6 / 8)


# -- what is shown --------------------------------------------------------------------------------------


def test_a_stored_view_comes_with_the_answer_that_was_stored_for_it() -> None:
    buffer, d, generator = filled_buffer(views=4), distiller(linear_student()), random_from(2)
    answers = {tuple(a): (i, v) for i, per in enumerate(buffer.logits.tolist()) for v, a in enumerate(per)}
    batch = torch.arange(16).repeat(8)
    ((inputs, logits),) = d.show_stored(buffer, batch[None], generator)
    found = [answers[tuple(a)] for a in logits.tolist()]
    assert [i for i, _ in found] == batch.tolist(), "the answer belongs to another image"
    assert {v for _, v in found} == {0, 1, 2, 3}
    plain = torch.tensor([v == 0 for _, v in found])
    expected = d.to_inputs(buffer.images[batch].permute(0, 3, 1, 2))
    assert torch.equal(inputs[plain], expected[plain])


def test_a_new_view_comes_with_what_the_teacher_says_of_it() -> None:
    buffer, d, teacher = filled_buffer(), distiller(linear_student()), linear_student(7)
    ((inputs, logits),) = d.show_anew(buffer, torch.arange(16)[None], teacher, 2, True, random_from(0))
    assert torch.allclose(logits, teacher(inputs), atol=1e-5)
    plain = d.to_inputs(buffer.images.permute(0, 3, 1, 2))
    assert not torch.equal(inputs, plain), "no view was drawn"
    ((unmoved, _),) = d.show_anew(buffer, torch.arange(16)[None], teacher, 0, False, random_from(0))
    assert torch.equal(unmoved, plain)
    assert not logits.requires_grad


@pytest.mark.parametrize("stored", [True, False])
def test_a_black_border_is_shown_black(stored: bool) -> None:
    buffer, d, generator = filled_buffer(views=3), distiller(linear_student()), random_from(0)
    buffer.images.clamp_(min=1)
    buffer.border = "black"
    rows = torch.arange(16).repeat(8)
    if stored:
        ((inputs, _),) = d.show_stored(buffer, rows[None], generator)
    else:
        ((inputs, _),) = d.show_anew(buffer, rows[None], linear_student(7), 1, True, generator)
    black = torch.isclose(inputs, d.to_inputs(torch.zeros(1, 3, 1, 1))).all(dim=1)
    assert black.any(), "nothing was shifted"
    assert not black[:, 1:-1, 1:-1].any()


# -- the optimiser --------------------------------------------------------------------------------------


def hidden_student() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 6), nn.Tanh(), nn.Linear(6, CLASSES))


@pytest.mark.parametrize(
    ("name", "kind", "momentum", "nesterov", "told"),
    [
        ("sgd", torch.optim.SGD, 0.8, True, {"momentum": 0.8, "nesterov": True}),
        ("sgd", torch.optim.SGD, 0.8, False, {"momentum": 0.8, "nesterov": False}),
        ("sgd", torch.optim.SGD, 0.0, True, {"momentum": 0.0, "nesterov": False}),  # PyTorch knows none without it
        ("adam", torch.optim.Adam, 0.8, True, {"betas": (0.9, 0.999)}),
        ("adamw", torch.optim.AdamW, 0.8, True, {"betas": (0.9, 0.999)}),
        ("muon", Muon, 0.8, False, {"momentum": 0.8, "nesterov": False}),
    ],
)
def test_an_optimiser_is_the_one_of_its_name_and_heeds_its_settings(
    name: str, kind: type, momentum: float, nesterov: bool, told: dict[str, object]
) -> None:
    optimizer = make_optimizer(hidden_student(), name, 0.02, momentum, 3e-3, nesterov)
    assert type(optimizer) is kind
    for group in optimizer.param_groups:
        assert (group["lr"], group["weight_decay"]) == (0.02, 3e-3)
        assert {key: group[key] for key in told} == told


@pytest.mark.parametrize("name", ["sgd", "muon", "adam", "adamw"])
def test_every_named_optimiser_learns(name: str) -> None:
    student, buffer = hidden_student(), filled_buffer()
    optimizer = make_optimizer(student, name, 0.01, 0.9, 1e-4)
    d = Distiller(student, optimizer, MEAN, STD, 2.0, 0.0, nullcontext())
    rows = torch.arange(16).repeat(40, 1)
    first = replayed(d, buffer, rows[:1], torch.ones(1, 16), 0.01).loss
    replayed(d, buffer, rows, torch.ones(rows.shape), 0.01)
    assert replayed(d, buffer, rows[:1], torch.ones(1, 16), 0.01).loss < 0.5 * first


def test_frozen_parts_of_a_student_stay_as_they_are() -> None:
    student, buffer = linear_student(), filled_buffer()
    student[1].weight.requires_grad_(False)
    weight, bias = student[1].weight.clone(), student[1].bias.detach().clone()
    d = distiller(student)
    replayed(d, buffer, torch.arange(16)[None], torch.ones(1, 16), 0.1)
    assert torch.equal(student[1].weight, weight)
    assert not torch.equal(student[1].bias, bias)


def test_parts_put_into_evaluation_mode_stay_in_it_while_the_student_learns() -> None:
    student, buffer = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), linear_student()), filled_buffer()
    student[0].eval()
    before = [layer.running_mean.clone() for layer in student[:2]]
    d = distiller(student)
    for _ in range(2):
        student.eval()  # as an engine does to look at it between rounds
        replayed(d, buffer, torch.arange(16)[None], torch.ones(1, 16), 0.1)
    assert torch.equal(student[0].running_mean, before[0])
    assert not torch.equal(student[1].running_mean, before[1])


def test_a_student_wholly_in_evaluation_mode_learns_as_any_other() -> None:
    student, buffer = nn.Sequential(nn.BatchNorm2d(3), linear_student()).eval(), filled_buffer()
    before = student[0].running_mean.clone()
    replayed(distiller(student), buffer, torch.arange(16)[None], torch.ones(1, 16), 0.1)
    assert student.training
    assert not torch.equal(student[0].running_mean, before)


@pytest.mark.parametrize("largest", [0.05, 1e3])
@pytest.mark.parametrize("name", ["sgd", "muon", "adam", "adamw"])
def test_a_bounded_step_is_as_torchs_with_clipped_gradients(name: str, largest: float) -> None:
    def learned(by_torch: bool) -> Tensor:
        student = hidden_student()
        optimizer = make_optimizer(student, name, 0.01, 0.9, 1e-2)
        d = Distiller(student, optimizer, MEAN, STD, 2.0, 0.0 if by_torch else largest, nullcontext())
        step = optimizer.step

        def clipped() -> None:
            nn.utils.clip_grad_norm_(student.parameters(), largest)
            step()

        if by_torch:
            optimizer.step = clipped  # type: ignore[assignment]
        inputs, logits = torch.randn(8, 3, SIZE, SIZE, generator=random_from(1)), 3 * torch.eye(8, CLASSES)
        for _ in range(3):
            d._step(inputs, logits, torch.ones(8))
        return parameters(student)

    assert torch.allclose(learned(by_torch=False), learned(by_torch=True), atol=1e-6)


def test_parts_without_a_gradient_do_not_count_to_its_norm() -> None:
    one = nn.Sequential(nn.Linear(4, 3), nn.Linear(7, 7))  # the last has none
    one[0](torch.randn(5, 4)).square().sum().backward()
    norm = nn.utils.clip_grad_norm_(one.parameters(), 1e9)
    assert excess(list(one.parameters()), 0.5) == pytest.approx(norm.item() / 0.5)
    assert excess(list(one.parameters()), 1e6) == 1
    doubled = excess(list(one.double().parameters()), 0.5)  # the optimisers take no scale but a float32
    assert doubled.dtype == torch.float32
