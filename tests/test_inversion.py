"""Promises of the inversion: what each loss term rewards, and an inverter that learns and harms nothing."""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssdkd
from ssdkd.buffer import render
from ssdkd.config import read_yaml
from ssdkd.errors import ConfigError
from ssdkd.inversion import (
    TERMS,
    ConvGenerator,
    Inverter,
    InverterSettings,
    Observer,
    PyramidInverter,
    Scene,
    TextureInverter,
    register_term,
    textures,
)
from ssdkd.inversion.generators import _Clip, to_bytes
from ssdkd.inversion.textures import _smooth_field, random_textures
from ssdkd.models import available_models, count_work, create_model, load_weights
from ssdkd.models.counting import _Operations

DIGITS_TEACHER = Path(ssdkd.__file__).parent / "assets" / "digits_teacher.safetensors"
MEAN, STD = torch.full((1, 1, 1, 1), 0.3), torch.full((1, 1, 1, 1), 0.37)
DIGITS = {"num_classes": 10, "in_channels": 1, "image_size": 8}


def random_from(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeded_model(name: str, seed: int = 0, **arguments: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return create_model(name, **(DIGITS | arguments)).eval()


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    model = seeded_model("convnet", **read_yaml("digits")[0]["teacher"]["arguments"])
    load_weights(model, DIGITS_TEACHER)
    return model.eval().requires_grad_(False)


# -- terms on hand-made scenes --------------------------------------------------------------------------


def scene(**changes: Any) -> Scene:
    """Four images of three classes, on which the teacher is unsure."""
    plain = Scene(
        images=torch.full((4, 1, 2, 2), 0.5),
        inputs=torch.zeros(4, 1, 2, 2),
        targets=torch.tensor([0, 1, 2, 0]),
        teacher_logits=torch.zeros(4, 3),
        student_logits=None,
        batch=[],
        remembered=None,
        running=[],
        features=None,
        memory=0.9,
    )
    return replace(plain, **changes)


def value(name: str, **changes: Any) -> float:
    return TERMS[name].compute(scene(**changes)).item()


def pull(name: str, key: str, start: Tensor, **changes: Any) -> Tensor:
    """The direction in which descending the term moves `start`."""
    moving = start.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(TERMS[name].compute(scene(**{key: moving}, **changes)), moving)
    return -gradient


def test_one_hot_is_the_cross_entropy_to_the_target() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, 0.0], [0.5, 0.5, 0.5], [-1.0, 0.0, 1.0]])
    p = torch.softmax(logits, dim=1)
    by_hand = -(p[0, 0].log() + p[1, 1].log() + p[2, 2].log() + p[3, 0].log()) / 4
    assert value("one_hot", teacher_logits=logits) == pytest.approx(by_hand.item(), rel=1e-5)
    direction = pull("one_hot", "teacher_logits", logits)
    assert (direction.argmax(dim=1) == torch.tensor([0, 1, 2, 0])).all()


def test_one_hot_argmax_follows_the_teachers_own_belief() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, 0.0], [0.5, 0.4, 0.6], [2.0, 0.0, 1.0]])
    direction = pull("one_hot_argmax", "teacher_logits", logits, targets=torch.tensor([0, 0, 0, 1]))
    assert (direction.argmax(dim=1) == logits.argmax(dim=1)).all()
    assert value("one_hot_argmax", teacher_logits=30 * logits) == pytest.approx(0.0, abs=0.02)


RUNNING = [
    (torch.tensor([1.0, 2.0]), torch.tensor([0.5, 1.5])),
    (torch.tensor([0.0, -1.0, 3.0]), torch.ones(3)),
]
BATCH = [
    (torch.tensor([1.0, 5.0]), torch.tensor([0.5, 1.5])),
    (torch.tensor([0.0, 3.0, 0.0]), torch.tensor([1.0, 1.0, 3.0])),
]


def test_batch_norm_is_zero_where_the_statistics_match() -> None:
    assert value("batch_norm", batch=RUNNING, running=RUNNING) == 0.0
    assert value("batch_norm", batch=RUNNING, running=RUNNING, remembered=RUNNING) == pytest.approx(0.0)


def test_batch_norm_is_zero_where_no_layer_is_used() -> None:
    assert value("batch_norm", batch=[], running=[]) == 0.0


def test_batch_norm_is_the_summed_distance_of_means_and_variances() -> None:
    by_hand = 3.0 + 0.0 + math.hypot(4.0, 3.0) + 2.0
    assert value("batch_norm", batch=BATCH, running=RUNNING) == pytest.approx(by_hand)


def test_batch_norm_draws_the_batch_toward_the_teachers_statistics() -> None:
    mean, running = torch.tensor([5.0, -5.0]), (torch.zeros(2), torch.ones(2))
    moving = mean.clone().requires_grad_(True)
    TERMS["batch_norm"].compute(scene(batch=[(moving, torch.ones(2))], running=[running])).backward()
    assert moving.grad is not None
    assert (torch.sign(-moving.grad) == torch.tensor([-1.0, 1.0])).all()


def test_batch_norm_counts_earlier_batches_by_the_share_of_memory() -> None:
    past = [(torch.tensor([0.0]), torch.tensor([1.0]))]
    now = [(torch.tensor([10.0]), torch.tensor([1.0]))]
    target = [(torch.tensor([0.0]), torch.tensor([1.0]))]
    seen = value("batch_norm", batch=now, remembered=past, running=target, memory=0.9)
    assert seen == pytest.approx(1.0, rel=1e-5)
    assert value("batch_norm", batch=now, remembered=past, running=target, memory=0.0) == pytest.approx(10.0)


Statistics = list[tuple[Tensor, Tensor]]


def statistics_of(layers: int, seed: int) -> Statistics:
    random = random_from(seed)
    sizes = range(5, 5 + layers)
    return [(torch.randn(size, generator=random), torch.rand(size, generator=random)) for size in sizes]


def distance_and_slopes(
    compute: Callable[[Scene], Tensor], batch: Statistics, running: Statistics, remembered: Statistics | None
) -> list[Tensor]:
    """The term, and ten times its derivative by each of the batch's statistics."""
    moving = [(mean.clone().requires_grad_(True), variance.clone().requires_grad_(True)) for mean, variance in batch]
    found = compute(scene(batch=moving, running=running, remembered=remembered))
    return [found, *torch.autograd.grad(10.0 * found, [each for pair in moving for each in pair])]


@pytest.mark.parametrize("remembers", [False, True])
def test_batch_norm_is_to_the_last_bit_what_layer_by_layer_comes_to(remembers: bool) -> None:
    def layer_by_layer(seen: Scene) -> Tensor:
        total = torch.zeros(())
        for now, past, running in zip(seen.batch, seen.remembered or seen.batch, seen.running, strict=True):
            for which in (1, 0):
                blended = torch.lerp(now[which], past[which], seen.memory) if remembers else now[which]
                total = total + torch.linalg.vector_norm(running[which] - blended)
        return total

    batch, running, past = (statistics_of(12, seed) for seed in range(3))
    batch[4] = running[4]  # apart by nothing, where a distance has no slope
    found, wanted = (
        distance_and_slopes(compute, batch, running, past if remembers else None)
        for compute in (TERMS["batch_norm"].compute, layer_by_layer)
    )
    assert all(map(torch.equal, found, wanted))


def test_batch_norm_starts_few_operations_however_many_layers() -> None:
    """One by one, those on statistics would be half of what an inversion step starts, which a GPU waits for."""

    def started(layers: int) -> int:
        batch, running = statistics_of(layers, 0), statistics_of(layers, 1)
        with _Operations() as counter:
            distance_and_slopes(TERMS["batch_norm"].compute, batch, running, None)
        return counter.started

    for_clones_and_sums = 2 * 2 * 10  # of two statistics in each of ten layers
    assert started(12) - started(2) <= for_clones_and_sums


def test_adversarial_is_minus_kl_where_both_agree_and_ignores_the_rest() -> None:
    teacher = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    student = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 9.0]])  # agrees on the first alone
    p, q = torch.softmax(teacher[0], dim=0), torch.softmax(student[0], dim=0)
    by_hand = -(p * (p / q).log()).sum().item() / 2
    assert value("adversarial", teacher_logits=teacher, student_logits=student) == pytest.approx(by_hand)
    direction = pull("adversarial", "student_logits", student, teacher_logits=teacher)
    assert direction[1].abs().max() == 0
    assert direction[0].abs().max() > 0
    assert direction[0, 0] < 0, "it should search where the student is less sure than the teacher"


def test_adversarial_terms_reward_disagreement() -> None:
    teacher = torch.tensor([[3.0, 0.0, 0.0]])
    near, far = torch.tensor([[2.5, 0.0, 0.0]]), torch.tensor([[0.5, 0.0, 0.0]])
    for name in ("adversarial", "adversarial_js", "adversarial_l1"):
        same, closer, farther = (value(name, teacher_logits=teacher, student_logits=s) for s in (teacher, near, far))
        assert same == pytest.approx(0.0, abs=1e-6), name
        assert farther < closer < same + 1e-6, name


def test_adversarial_js_is_symmetric_and_bounded() -> None:
    a, b = torch.tensor([[99.0, 0.0, 0.0]]), torch.tensor([[0.0, 99.0, 0.0]])
    apart = value("adversarial_js", teacher_logits=a, student_logits=b)
    assert apart == pytest.approx(value("adversarial_js", teacher_logits=b, student_logits=a))
    assert apart == pytest.approx(-math.log(2), abs=1e-4)


def test_adversarial_l1_is_the_mean_difference_of_the_logits() -> None:
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]])
    assert value("adversarial_l1", teacher_logits=a, student_logits=b) == pytest.approx(-1.5)


def test_balance_is_lowest_where_every_class_is_predicted_equally_often() -> None:
    each = 50 * F.one_hot(torch.tensor([0, 1, 2]), 3).float()
    uneven = 50 * F.one_hot(torch.tensor([0, 0, 2]), 3).float()
    collapsed = 50 * F.one_hot(torch.tensor([1, 1, 1]), 3).float()
    assert value("balance", teacher_logits=each) == pytest.approx(-math.log(3), rel=1e-4)
    assert value("balance", teacher_logits=collapsed) == pytest.approx(0.0, abs=1e-4)
    assert -math.log(3) < value("balance", teacher_logits=uneven) < 0


def test_activation_rewards_large_features_and_is_zero_without_them() -> None:
    assert value("activation", features=None) == 0.0
    assert value("activation", features=torch.tensor([[1.0, -3.0]])) == pytest.approx(-2.0)


def test_total_variation_is_zero_on_flat_images_and_counts_both_directions() -> None:
    assert value("total_variation", images=torch.full((2, 3, 4, 5), 0.7)) == 0.0
    rows = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).view(1, 1, 2, 2)
    assert value("total_variation", images=rows) == pytest.approx(1.0)
    assert value("total_variation", images=rows.mT) == pytest.approx(1.0)


def test_l2_is_zero_at_mid_grey_and_draws_toward_it() -> None:
    assert value("l2", images=torch.full((2, 1, 2, 2), 0.5)) == 0.0
    images = torch.tensor([0.1, 0.9]).view(1, 1, 1, 2)
    assert value("l2", images=images) == pytest.approx(0.16)
    assert torch.sign(pull("l2", "images", images)).flatten().tolist() == [1.0, -1.0]


# -- the observer ---------------------------------------------------------------------------------------


def matched_to(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Let every batch-norm layer's running statistics be those of `inputs` as they reach it."""

    def learn(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen = arguments[0]
        axes = [d for d in range(seen.dim()) if d != 1]
        layer.running_mean.copy_(seen.mean(dim=axes))
        layer.running_var.copy_(seen.var(dim=axes, correction=0))

    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    handles = [layer.register_forward_pre_hook(learn) for layer in layers]
    with torch.no_grad():
        model.eval()(inputs)
    for handle in handles:
        handle.remove()
    return model


def batch_norm_distance(model: nn.Module, inputs: Tensor) -> float:
    observer = Observer(model.eval())
    with torch.no_grad():
        observer.observe(inputs, statistics=True, features=False)
    return value("batch_norm", batch=observer.batch, running=observer.running)


class OutOfOrder(nn.Module):
    """Layers are registered in one order and used in the other, and one is not used at all."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.unused, self.first = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.mix, self.linear = nn.Conv2d(3, 3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.second(self.mix(self.first(x))).mean(dim=(2, 3)))


BATCH_NORM_FAMILIES = ["convnet", "lenet5_bn", "mobilenet_v2", "resnet20", "resnet18", "vgg8", "wrn16_1"]


def test_pixels_is_lowest_where_the_normalised_batch_has_mean_0_and_variance_1() -> None:
    normalised = torch.tensor([-1.0, 1.0]).repeat(32).view(2, 1, 4, 8)
    assert value("pixels", inputs=normalised) == pytest.approx(0.0, abs=1e-6)
    assert value("pixels", inputs=normalised + 0.5) == pytest.approx(0.5, abs=1e-6)
    assert value("pixels", inputs=normalised * 2.0) == pytest.approx(3.0, abs=1e-5)


@pytest.mark.parametrize("name", BATCH_NORM_FAMILIES)
def test_images_with_the_teachers_own_statistics_have_no_batch_norm_distance(name: str) -> None:
    assert name in available_models()
    size = 32 if name not in ("convnet",) else 8
    model = seeded_model(name, in_channels=3, image_size=size)
    inputs = torch.randn(8, 3, size, size, generator=random_from(0))
    before = batch_norm_distance(model, inputs)
    after = batch_norm_distance(matched_to(model, inputs), inputs)
    assert before > 0.1
    assert after < 1e-3 * before


def test_statistics_are_matched_layer_by_layer_in_whatever_order_they_are_used() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OutOfOrder()
    inputs = 3 + 2 * torch.randn(16, 3, 6, 6, generator=random_from(1))
    assert batch_norm_distance(matched_to(model, inputs), inputs) < 1e-3


class Frozen(nn.Module):
    """Batch norm as detectors freeze it: all of it in buffers, and no kind of PyTorch's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, maps: Tensor) -> Tensor:
        return (maps - self.running_mean.view(1, -1, 1, 1)) * self.running_var.view(1, -1, 1, 1).rsqrt()


def test_batch_norm_of_other_makers_counts_and_what_goes_by_single_images_does_not() -> None:
    inputs = torch.randn(4, 3, 6, 6, generator=random_from(0))
    frozen = nn.Sequential(Frozen(3), nn.Flatten(), nn.Linear(108, 2))
    assert 0.0 < batch_norm_distance(frozen, inputs) < batch_norm_distance(frozen, inputs + 1.0)
    alone = nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True), nn.BatchNorm2d(3, track_running_stats=False))
    assert not Observer(alone).has_batch_norm


def test_features_are_what_the_last_linear_layer_reads(teacher: nn.Module) -> None:
    observer = Observer(teacher)
    inputs = torch.randn(5, 1, 8, 8, generator=random_from(0))
    logits = observer.observe(inputs, statistics=False, features=True)
    assert observer.features is not None
    assert torch.allclose(teacher.linear(observer.features), logits, atol=1e-5)
    assert torch.equal(logits, teacher(inputs))


class HeadFirst(nn.Module):
    """Defines the layer that answers before the one that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.hidden = nn.Linear(7, 2), nn.Linear(12, 7)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(images.flatten(1)))
        return logits


def test_the_last_linear_layer_is_the_one_that_is_called_last_wherever_it_is_defined() -> None:
    network = HeadFirst().eval()
    observer, inputs = Observer(network), torch.randn(4, 3, 2, 2, generator=random_from(0))
    logits = observer.observe(inputs, statistics=False, features=True)
    assert observer.features is not None
    torch.testing.assert_close(network.head(observer.features), logits, rtol=0, atol=0)


class ByName(nn.Module):
    """Calls a layer by the name of its argument."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, maps: Tensor) -> Tensor:
        result: Tensor = self.layer(input=maps)
        return result


def test_layers_that_are_called_by_name_are_observed_too() -> None:
    inputs = torch.randn(4, 3, 6, 6, generator=random_from(0))
    norm, linear = nn.BatchNorm2d(3), nn.Linear(108, 2)
    plain, named = (
        Observer(nn.Sequential(kind(norm), nn.Flatten(), kind(linear)).eval()) for kind in (nn.Sequential, ByName)
    )
    for observer in (plain, named):
        observer.observe(inputs, statistics=True, features=True)
    assert plain.features is not None
    torch.testing.assert_close((named.batch, named.features), (plain.batch, plain.features), rtol=0, atol=0)


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_compiled_of_a_teacher_is_observed_too(teacher: nn.Module, whole: bool) -> None:
    inputs = torch.randn(4, 1, 8, 8, generator=random_from(0))
    plain = Observer(teacher)
    logits = plain.observe(inputs, statistics=True, features=True)
    compiled = copy.deepcopy(teacher)
    if whole:
        compiled = torch.compile(compiled, backend="eager", fullgraph=True)  # type: ignore[assignment]
    else:
        compiled.compile(backend="eager")
    compiled(inputs)  # so that there is a graph without hooks
    observer = Observer(nn.DataParallel(compiled))
    assert torch.allclose(observer.observe(inputs, statistics=True, features=True), logits)
    assert len(observer.batch) == len(plain.batch) > 0
    assert observer.features is not None
    torch.testing.assert_close(observer.batch, plain.batch)
    assert count_work(compiled, (1, 8, 8)) == count_work(teacher, (1, 8, 8))


def test_a_teacher_that_was_observed_carries_nothing_of_it_on(teacher: nn.Module) -> None:
    observer, inputs = Observer(teacher), torch.randn(4, 1, 8, 8, generator=random_from(0))
    observer.observe(inputs, statistics=True, features=True)
    assert observer.batch
    observer.observe(inputs, statistics=False, features=False)
    assert observer.batch == []
    assert observer.features is None


# -- generators -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (3, 17, 30), (2, 5, 5)])
def test_a_generator_makes_pixels_of_the_asked_size(shape: tuple[int, int, int]) -> None:
    generator = ConvGenerator(6, shape, num_classes=4, width=4, conditional=True)
    images = generator(torch.randn(3, 6, generator=random_from(0)), torch.tensor([0, 1, 2]))
    assert images.shape == (3, *shape)
    assert images.min() >= 0
    assert images.max() <= 1


@pytest.mark.parametrize("conditional", [True, False])
def test_only_a_conditional_generator_heeds_the_target(conditional: bool) -> None:
    generator = ConvGenerator(6, (1, 8, 8), num_classes=4, width=4, conditional=conditional).eval()
    latents = torch.randn(2, 6, generator=random_from(0))
    a, b = generator(latents, torch.tensor([0, 0])), generator(latents, torch.tensor([3, 3]))
    assert torch.equal(a, b) != conditional


@pytest.mark.parametrize(
    ("size", "start"),
    [((8, 8), (4, 4)), ((16, 16), (8, 8)), ((32, 32), (8, 8)), ((17, 30), (5, 8)), ((33, 9), (5, 2))],
)
def test_a_generator_starts_from_a_map_of_at_most_8_pixels(size: tuple[int, int], start: tuple[int, int]) -> None:
    generator = ConvGenerator(6, (1, *size), num_classes=4, width=4)
    assert generator.start == (8, *start)
    assert generator(torch.randn(2, 6), torch.zeros(2, dtype=torch.int64)).shape == (2, 1, *size)


@pytest.mark.parametrize("size", [8, 28])
@pytest.mark.parametrize("subpixel", [True, False])
def test_no_convolution_runs_at_full_size_where_the_last_doubling_is_a_shuffle(size: int, subpixel: bool) -> None:
    widths: list[int] = []
    generator = ConvGenerator(6, (3, size, size), num_classes=4, width=4, subpixel=subpixel)
    for layer in generator.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda layer, seen, made: widths.append(made.shape[-1]))
    images = generator(torch.randn(2, 6), torch.zeros(2, dtype=torch.int64))
    assert images.shape == (2, 3, size, size)
    assert max(widths) == (size // 2 if subpixel else size)
    assert widths.count(size) == (0 if subpixel else 2)
    assert len(widths) >= 2, "a generator of one doubling has a convolution beside the last too"


def test_a_normalised_generator_makes_batches_of_the_statistics_that_it_is_told() -> None:
    mean, std = torch.tensor([0.6, 0.3]).view(1, 2, 1, 1), torch.tensor([0.02, 0.05]).view(1, 2, 1, 1)
    generator = ConvGenerator(6, (2, 12, 12), num_classes=4, width=4, pixels=(mean, std))
    images = generator(torch.randn(32, 6, generator=random_from(0)), torch.zeros(32, dtype=torch.int64)).detach()
    assert images.mean(dim=(0, 2, 3)) == pytest.approx(mean.flatten(), abs=2e-3)
    assert images.std(dim=(0, 2, 3)) == pytest.approx(std.flatten(), rel=0.05)
    assert not [name for name in generator.state_dict() if name.startswith("pixel_")], "they are the task's"


def test_no_pixel_is_lost_for_good_by_clipping() -> None:
    pixels = torch.tensor([-0.5, 0.0, 0.3, 1.0, 1.7], requires_grad=True)
    clipped = _Clip.apply(pixels)
    assert clipped.tolist() == pytest.approx([0.0, 0.0, 0.3, 1.0, 1.0])
    (2.0 * clipped).sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.tolist() == pytest.approx([0.2, 2.0, 2.0, 2.0, 0.2])


def test_bytes_are_the_nearest_to_the_pixels() -> None:
    images = torch.tensor([0.0, 1.0, 0.5, 0.4999 / 255, 0.5001 / 255, 2.0]).view(1, 2, 1, 3)
    out = to_bytes(images)
    assert out.dtype == torch.uint8
    assert out.shape == (1, 1, 3, 2)
    assert out[0, 0, :, 0].tolist() == [0, 255, 128]
    assert out[0, 0, :, 1].tolist() == [0, 1, 255]


# -- the inverter ---------------------------------------------------------------------------------------

TERMS_FOR_DIGITS = {"batch_norm": 10.0, "one_hot": 0.5, "adversarial": 1.0}


def inverter(teacher: nn.Module, seed: int = 0, **changes: Any) -> Inverter:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        generator = ConvGenerator(16, (1, 8, 8), 10, width=8, conditional=True)
    settings = InverterSettings(
        steps=3,
        latent=16,
        generator_rate=3e-3,
        latent_rate=1.5e-2,
        meta_rate=3e-3,
        meta="fomaml",
        memory=0.9,
        terms=TERMS_FOR_DIGITS,
    )
    return Inverter(
        generator,
        Observer(teacher),
        MEAN,
        STD,
        replace(settings, **changes),
        random_from(seed),
        nullcontext(),
    )


TARGETS = torch.arange(32) % 10


def losses(made_by: Inverter, rounds: int) -> list[float]:
    return [made_by.invert(TARGETS, None, 0.0)[1]["loss"].item() for _ in range(rounds)]


@pytest.fixture(scope="module")
def forgetful(teacher: nn.Module) -> list[float]:
    """The losses of an inverter whose base generator stays as it is."""
    return losses(inverter(teacher, meta_rate=0.0, memory=0.0), 30)


@pytest.mark.parametrize("meta", ["fomaml", "reptile", "continue"])
def test_the_base_generator_learns_from_round_to_round(teacher: nn.Module, forgetful: list[float], meta: str) -> None:
    """Each round starts from fresh latents, so only what the base took over can lower the loss."""
    learned = losses(inverter(teacher, meta=meta, memory=0.0), 30)
    start, end = sum(learned[:3]) / 3, sum(learned[-5:]) / 5
    assert end < 0.8 * start
    assert end < 0.8 * sum(forgetful[-5:]) / 5


@pytest.mark.parametrize("shift", [0, 1])
def test_the_images_come_to_show_their_targets(teacher: nn.Module, shift: int) -> None:
    """Where the search looks at shifted images, the plain ones show them too."""
    made_by = inverter(teacher, terms={"one_hot": 1.0}, generator_rate=1e-2, meta_rate=1e-2, shift=shift)

    def hits() -> float:
        images, _ = made_by.invert(TARGETS, None, 0.0)
        inputs = (images.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD
        return (teacher(inputs).argmax(dim=1) == TARGETS).float().mean().item()

    before = hits()
    losses(made_by, 40)
    assert before < 0.5
    assert hits() > 0.8


def test_the_images_of_the_best_step_are_handed_over(teacher: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    script, seen = iter([3.0, 1.0, 2.0, 5.0]), []

    def scripted(scene: Scene) -> Tensor:
        seen.append(scene.images.detach().clone())
        moves = scene.images.sum() - scene.images.detach().sum()  # zero, but its gradient changes the images
        return moves + next(script)

    monkeypatch.setattr("ssdkd.inversion.terms.TERMS", TERMS)
    monkeypatch.setitem(TERMS, "scripted", TERMS["l2"])
    register_term("scripted")(scripted)
    made_by = inverter(teacher, steps=4, generator_rate=0.1, terms={"scripted": 1.0})
    images, values = made_by.invert(TARGETS, None, 0.0)
    assert values["loss"].item() == pytest.approx(1.0)
    assert torch.equal(images, to_bytes(seen[1]))
    assert not any(torch.equal(images, to_bytes(other)) for other in (seen[0], seen[2], seen[3]))


def looks(teacher: nn.Module, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[list[Scene], Tensor]:
    """What a search of four steps sees in each of them, and the images that come of it."""
    seen: list[Scene] = []

    def watching(scene: Scene) -> Tensor:
        seen.append(scene)
        return scene.inputs.square().mean()

    monkeypatch.setitem(TERMS, "watching", TERMS["l2"])
    register_term("watching")(watching)
    images, _ = inverter(teacher, steps=4, terms={"watching": 1.0}, **changes).invert(TARGETS, None, 0.0)
    return seen, images


def test_a_search_looks_at_each_image_moved_and_mirrored_by_chance_and_hands_over_the_plain_one(
    teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, images = looks(teacher, monkeypatch, shift=1, flip=True, border="black")
    every_view = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2), torch.arange(2))
    drawn = []
    for scene in seen:
        plain = scene.images.detach().permute(0, 2, 3, 1)
        for i, shown in enumerate(scene.inputs.detach()):
            views = (render(plain, torch.full((18,), i), every_view, "black") - MEAN) / STD
            drawn.append(int((views - shown).abs().amax(dim=(1, 2, 3)).argmin()))
            assert torch.allclose(views[drawn[-1]], shown, atol=1e-5), "no view of this image"
    assert set(drawn) == set(range(18)), "every image and every step has a view of its own"
    assert drawn[:32] != drawn[32:64]
    assert any(torch.equal(images, to_bytes(scene.images)) for scene in seen)


def test_a_search_without_augmentation_looks_at_the_images_themselves(
    teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, _ = looks(teacher, monkeypatch)
    for scene in seen:
        assert torch.allclose(scene.inputs, (scene.images - MEAN) / STD, atol=1e-6)


@pytest.mark.parametrize(("change", "moves"), [({"shift": 1}, True), ({"flip": True}, False)])
def test_a_search_may_move_without_mirroring_and_mirror_without_moving(
    change: dict[str, Any], moves: bool, teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, _ = looks(teacher, monkeypatch, **change)
    plain = torch.cat([(scene.images.detach() - MEAN) / STD for scene in seen])
    shown = torch.cat([scene.inputs.detach() for scene in seen])

    def are(views: Tensor) -> Tensor:
        return (shown - views).abs().amax(dim=(1, 2, 3)) < 1e-5

    mirrored = are(plain.flip(3))
    if moves:
        assert are(plain).float().mean() == pytest.approx(1 / 9, abs=0.1)
        assert not mirrored.any()
    else:
        assert (are(plain) ^ mirrored).all()
        assert mirrored.float().mean() == pytest.approx(0.5, abs=0.2)


def test_inversion_changes_neither_teacher_nor_student(teacher: nn.Module) -> None:
    student = seeded_model("convnet_small", seed=1)
    for parameter in student.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    held = {name: copy.deepcopy(m.state_dict()) for name, m in (("teacher", teacher), ("student", student))}
    made_by = inverter(teacher)
    for _ in range(3):
        made_by.invert(TARGETS, student, 1.0)
    for name, model in (("teacher", teacher), ("student", student)):
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, held[name][key]), (name, key)
    assert all((p.grad == 0.5).all() for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert not teacher.training
    assert not student.training


def test_adversarial_searches_where_the_student_differs_from_the_teacher(teacher: nn.Module) -> None:
    student = seeded_model("convnet_small", seed=1)

    def disagreement(strength: float) -> float:
        made_by = inverter(teacher, terms={"one_hot": 0.1, "adversarial_l1": 1.0})
        for _ in range(25):
            images, _ = made_by.invert(TARGETS, student, strength)
        inputs = (images.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD
        return (teacher(inputs) - student(inputs)).abs().mean().item()

    assert disagreement(2.0) > 1.3 * disagreement(0.0)


def test_a_student_that_no_term_asks_for_is_not_run(teacher: nn.Module) -> None:
    class Untouchable(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            raise AssertionError("the student was run")

    _, values = inverter(teacher, terms={"one_hot": 1.0, "adversarial": 0.0}).invert(TARGETS, Untouchable(), 1.0)
    assert set(values) == {"loss", "one_hot"}
    with pytest.raises(AssertionError, match="the student was run"):
        inverter(teacher, terms={"one_hot": 1.0, "adversarial": 1.0}).invert(TARGETS, Untouchable(), 1.0)


@pytest.mark.parametrize("term", ["activation", "batch_norm"])
def test_terms_that_say_nothing_of_a_teacher_are_refused(term: str) -> None:
    """It has no linear layer whose input could be seen, and does not use its batch norm."""
    teacher = nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())
    teacher[1].unused = nn.BatchNorm2d(3)
    with pytest.raises(ConfigError, match=r"inversion\.terms: none of them can be searched by"):
        inverter(teacher.eval(), terms={term: 1.0}).invert(TARGETS, None, 1.0)


def test_every_terms_last_value_is_reported(teacher: nn.Module) -> None:
    student = seeded_model("convnet_small")
    terms = {"batch_norm": 10.0, "one_hot": 0.5, "adversarial_l1": 0.25}
    _, values = inverter(teacher, steps=1, terms=terms).invert(TARGETS, student, 4.0)
    weights = terms | {"adversarial_l1": 1.0}
    assert set(values) == {"loss", *weights}
    assert values["adversarial_l1"] < -0.1, "else its weight would not show"
    total = sum(weight * values[name].item() for name, weight in weights.items())
    assert values["loss"].item() == pytest.approx(total, rel=1e-5)


def test_a_teacher_without_batch_norm_is_inverted_by_the_terms_that_remain() -> None:
    plain = seeded_model("convnet", seed=3, batch_norm=False).requires_grad_(False)
    made_by = inverter(plain, terms={"batch_norm": 10.0, "one_hot": 1.0, "activation": 0.1})
    images, values = made_by.invert(TARGETS, None, 0.0)
    assert not made_by.observer.has_batch_norm
    assert set(values) == {"loss", "one_hot", "activation"}
    assert images.shape == (32, 8, 8, 1)
    course = losses(made_by, 40)
    assert sum(course[-5:]) / 5 < values["loss"].item()


@pytest.mark.parametrize("memory", [0.9, 0.0])
def test_a_restored_inverter_goes_on_as_if_nothing_had_happened(teacher: nn.Module, memory: float) -> None:
    made_by = inverter(teacher, memory=memory)
    losses(made_by, 4)
    assert (made_by.remembered is None) == (memory == 0.0), "what is not looked at is not kept"
    state, random = copy.deepcopy(made_by.state_dict()), made_by.random.get_state()
    other = inverter(teacher, seed=9, memory=memory)
    other.load_state_dict(state)
    other.random.set_state(random)
    for _ in range(3):
        a, b = made_by.invert(TARGETS, None, 0.0), other.invert(TARGETS, None, 0.0)
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1]["loss"], b[1]["loss"])


def test_statistics_of_earlier_batches_are_kept_by_the_share_of_memory(teacher: nn.Module) -> None:
    made_by = inverter(teacher, memory=0.75)
    for level in (0.0, 4.0):
        made_by._remember([(torch.full((2,), level), torch.full((2,), 2.0 * level))])
    ((mean, variance),) = made_by.state_dict()["remembered"]
    assert mean.tolist() == [1.0, 1.0]
    assert variance.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("meta", ["fomaml", "reptile"])
def test_a_base_generator_takes_the_smaller_steps_that_it_is_told_to(teacher: nn.Module, meta: str) -> None:
    made_by = inverter(teacher, meta=meta)
    for pace in (1.0, 0.5):
        other = inverter(teacher, meta=meta)
        other.slow_down(pace)
        losses(other, 1)
        moved = [(a - b).abs().max() for a, b in zip(other.base.parameters(), made_by.base.parameters(), strict=True)]
        assert torch.stack(moved).max().item() == pytest.approx(pace * 3e-3, rel=0.01), "Adam's first step is its rate"


@pytest.mark.parametrize("pace", [1.0, 0.25])
def test_the_copy_that_adapts_takes_the_smaller_steps_too(teacher: nn.Module, pace: float) -> None:
    made_by = inverter(teacher, steps=1)
    before = [p.detach().clone() for p in made_by.base.parameters()]
    made_by.slow_down(pace)
    losses(made_by, 1)
    moved = [(a - b).abs().max() for a, b in zip(made_by.adapted.parameters(), before, strict=True)]
    assert torch.stack(moved).max().item() == pytest.approx(pace * 3e-3, rel=0.01), "Adam's first step is its rate"


def test_the_base_follows_the_summed_gradients_or_the_way_that_its_copy_went(teacher: nn.Module) -> None:
    """What FOMAML and Reptile are: the one goes where the copy's gradients point, the other to where the copy is."""
    for meta in ("fomaml", "reptile"):
        made_by = inverter(teacher, steps=1, meta=meta)
        before = [p.detach().clone() for p in made_by.base.parameters()]
        losses(made_by, 1)
        for begun, base, adapted in zip(before, made_by.base.parameters(), made_by.adapted.parameters(), strict=True):
            assert base.grad is not None
            assert torch.equal(base.grad, adapted.grad if meta == "fomaml" else begun - adapted)
    made_by = inverter(teacher, steps=2)
    losses(made_by, 1)
    pairs = zip(made_by.base.parameters(), made_by.adapted.parameters(), strict=True)
    assert not any(torch.equal(base.grad, adapted.grad) for base, adapted in pairs), "of all steps, not of the last"


@pytest.mark.parametrize("kind", [TextureInverter, PyramidInverter, Inverter])
def test_a_teacher_that_answers_nan_spoils_neither_generator_nor_images(kind: Any, teacher: nn.Module) -> None:
    class Speechless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = teacher

        def forward(self, images: Tensor) -> Tensor:
            answer: Tensor = self.teacher(images)
            return answer * math.nan

    made_by = inverter(Speechless(), terms={"one_hot": 1.0})
    if kind is Inverter:
        losses(made_by, 2)
        assert all(p.isfinite().all() for p in (*made_by.base.parameters(), *made_by.adapted.parameters()))
        return
    random, mean = random_from(0), torch.full((1, 1, 1, 1), 0.3)
    search = kind((1, 8, 8), made_by.observer, mean, STD, made_by.settings, random, random, nullcontext())
    again = random_from(0)
    assert torch.equal(
        search.invert(TARGETS, None, 0.0)[0], to_bytes(random_textures(32, (1, 8, 8), mean, STD, again, again))
    )


@pytest.mark.parametrize("kind", [TextureInverter, PyramidInverter])
def test_a_search_from_textures_takes_the_smaller_steps_that_it_is_told_to(kind: Any, teacher: nn.Module) -> None:
    def found(pace: float) -> Tensor:
        random = random_from(0)
        settings = replace(inverter(teacher).settings, steps=1, pixel_rate=0.2)
        search = kind((1, 8, 8), Observer(teacher), MEAN, STD, settings, random, random, nullcontext())
        search.slow_down(pace)
        images: Tensor = search.invert(TARGETS, None, 0.0)[0].float()
        return images

    texture, near, far = found(0.0), found(0.5), found(1.0)
    inside = (far > 0) & (far < 255) & (near > 0) & (near < 255)
    assert (far - texture)[inside].abs().mean() > 10
    assert torch.allclose((near - texture)[inside], 0.5 * (far - texture)[inside], atol=1.5), "but for rounding"


def from_textures(kind: Any, teacher: nn.Module, **changes: Any) -> Any:
    settings = replace(inverter(teacher).settings, **changes)
    random = random_from(0)
    return kind((1, 8, 8), Observer(teacher), MEAN, STD, settings, random, random, nullcontext())


def test_a_step_on_pixels_is_alike_for_every_image_and_spreads_over_its_pixels(
    teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steep(scene: Scene) -> Tensor:
        """Of one pixel only, and of each image a thousand times as much as of the one before."""
        return (scene.images[:, 0, 3, 3] * 10.0 ** torch.arange(-6, 6, 3)).sum()

    monkeypatch.setitem(TERMS, "steep", TERMS["l2"])
    register_term("steep")(steep)
    search = from_textures(TextureInverter, teacher, steps=1, pixel_rate=0.05, terms={"steep": 1.0})
    monkeypatch.setattr(search, "_textures", lambda count: torch.full((count, 1, 8, 8), 0.6))
    images, values = search.invert(torch.arange(4), None, 0.0)
    assert images[:, 3, 3, 0].tolist() == [round(255 * (0.6 - 2 * 0.05))] * 4, "twice the mean step, no further"
    assert (images != 153).sum() == 4
    assert values["loss"].item() == pytest.approx(values["steep"].item())


@pytest.mark.parametrize("kind", [TextureInverter, PyramidInverter])
def test_a_search_from_textures_remembers_the_statistics_of_its_batches(kind: Any, teacher: nn.Module) -> None:
    search = from_textures(kind, teacher)
    _, values = search.invert(TARGETS, None, 0.0)
    assert set(values) == {"loss", "batch_norm", "one_hot"}
    assert len(search.remembered) == len(search.observer.batch) > 0
    assert not any(mean.requires_grad or variance.requires_grad for mean, variance in search.remembered)


def test_a_search_on_a_pyramid_looks_up_to_two_pixels_past_its_images(
    teacher: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def watching(scene: Scene) -> Tensor:
        seen.append(scene.images.detach())
        return scene.inputs.square().mean()

    monkeypatch.setitem(TERMS, "watching", TERMS["l2"])
    register_term("watching")(watching)
    search = from_textures(PyramidInverter, teacher, steps=300, pixel_rate=0.0, terms={"watching": 1.0})
    monkeypatch.setattr(search, "_textures", lambda count: torch.arange(64.0).view(1, 1, 8, 8) / 64.0)
    search.invert(torch.arange(1), None, 0.0)
    corners = [divmod(int(images[0, 0, 4, 4] * 64.0), 8) for images in seen]
    assert {(4 - row, 4 - column) for row, column in corners} == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}


def test_a_search_on_pixels_looks_at_none_that_cannot_be(teacher: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    edges: list[tuple[float, float]] = []

    def watching(scene: Scene) -> Tensor:
        edges.append((scene.images.min().item(), scene.images.max().item()))
        return -scene.inputs.square().mean()

    monkeypatch.setitem(TERMS, "watching", TERMS["l2"])
    register_term("watching")(watching)
    settings = replace(inverter(teacher).settings, steps=3, pixel_rate=1.0, terms={"watching": 1.0})
    random = random_from(0)
    TextureInverter((1, 8, 8), Observer(teacher), MEAN, STD, settings, random, random, nullcontext()).invert(
        TARGETS, None, 0.0
    )
    assert edges[1:] == [(0.0, 1.0)] * 2, "steps this long reach black and white, and no further"


# -- textures ------------------------------------------------------------------------------------------


def test_textures_have_the_statistics_that_the_normalisation_knows() -> None:
    random = torch.Generator().manual_seed(0)
    mean, std = torch.tensor([0.5, 0.4]).view(1, 2, 1, 1), torch.tensor([0.1, 0.12]).view(1, 2, 1, 1)
    made = random_textures(64, (2, 28, 20), mean, std, random, random)
    assert made.shape == (64, 2, 28, 20)
    assert made.min() >= 0.0
    assert made.max() <= 1.0
    assert made.mean(dim=(0, 2, 3)) == pytest.approx(mean.flatten(), abs=0.03)
    assert made.std(dim=(0, 2, 3)) == pytest.approx(std.flatten(), rel=0.2)


def test_textures_differ_from_image_to_image_and_are_smooth() -> None:
    mean, std = torch.full((1, 1, 1, 1), 0.5), torch.full((1, 1, 1, 1), 0.2)
    random = torch.Generator().manual_seed(1)
    made = torch.cat([random_textures(32, (1, 32, 32), mean, std, random, random) for _ in range(8)]).flatten(1)
    between = (made[1:] - made[:-1]).square().mean()
    within = (made[:, 1:] - made[:, :-1]).square().mean()
    assert between > 3 * within


def test_seven_in_ten_textures_are_lines_where_their_field_crosses_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    def ramp(count: int, shape: tuple[int, int, int], scale: float, random: torch.Generator) -> Tensor:
        return torch.linspace(-3.0, 3.0, shape[2]).expand(count, *shape)  # 0 in the middle

    monkeypatch.setattr(textures, "_smooth_field", ramp)
    mean, std, random = torch.full((1, 1, 1, 1), 0.5), torch.full((1, 1, 1, 1), 0.05), random_from(0)
    made = torch.cat([random_textures(4, (1, 4, 17), mean, std, random, random) for _ in range(50)])
    brightest = made.mean(dim=(1, 2)).argmax(dim=1)
    assert set(brightest.tolist()) == {8, 16}, "a line, or the field itself"
    assert (brightest == 8).float().mean() == pytest.approx(0.7, abs=0.1)


def test_what_decides_how_large_a_tensor_is_never_comes_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    mean, std = torch.full((1, 1, 1, 1), 0.5), torch.full((1, 1, 1, 1), 0.2)

    def scales(random: torch.Generator, host_random: torch.Generator) -> list[float]:
        seen = []

        def noted(count: int, shape: tuple[int, int, int], scale: float, random: torch.Generator) -> Tensor:
            seen.append(scale)
            return _smooth_field(count, shape, scale, random)

        monkeypatch.setattr(textures, "_smooth_field", noted)
        random_textures(32, (1, 16, 16), mean, std, random, host_random)
        return seen

    assert scales(random_from(0), random_from(5)) == scales(random_from(1), random_from(5))
    assert scales(random_from(0), random_from(5)) != scales(random_from(0), random_from(6))


@pytest.mark.parametrize("scale", [0.7, 1.9, 2.0, 3.6, 7.9])
def test_a_smooth_field_is_as_lively_everywhere_and_as_smooth_as_it_is_wide(scale: float) -> None:
    """Its noise lies apart; a Gaussian this wide must not show it."""
    field = _smooth_field(4000, (1, 24, 17), scale, torch.Generator().manual_seed(0))[:, 0]
    assert field.shape == (4000, 24, 17)
    variance = field.square().mean(dim=0)
    assert variance.mean() == pytest.approx(1.0, abs=0.03)
    assert variance.std() < 0.03  # of 4,000 draws, 0.022 is chance
    for distance in (1, 4):
        alike = (field[:, :, distance:] * field[:, :, :-distance]).mean()
        assert alike == pytest.approx(math.exp(-(distance**2) / (4 * scale**2)), abs=0.04)


def test_steps_from_textures_bend_them_to_their_class(teacher: nn.Module) -> None:
    targets = torch.arange(40) % 10
    settings = InverterSettings(
        steps=6, latent=1, generator_rate=0.0, latent_rate=0.0, meta_rate=0.0, meta="fomaml", memory=0.0,
        terms={"one_hot": 1.0},
    )  # fmt: skip
    observer, mean, std = Observer(teacher), torch.full((1, 1, 1, 1), 0.3), torch.full((1, 1, 1, 1), 0.37)

    def share_right(steps: int) -> float:
        random = torch.Generator().manual_seed(0)
        chosen = replace(settings, steps=steps)
        search = TextureInverter((1, 8, 8), observer, mean, std, chosen, random, random, nullcontext())
        images, values = search.invert(targets, None, 0.0)
        assert "one_hot" in values
        shown = (images.permute(0, 3, 1, 2).float() / 255.0 - mean) / std
        return (teacher(shown).argmax(dim=1) == targets).float().mean().item()

    assert share_right(1) < 0.6
    assert share_right(8) > 0.8


def test_a_pyramid_meets_the_statistics_and_the_classes_sooner_than_pixels_do(teacher: nn.Module) -> None:
    targets = torch.arange(40) % 10
    settings = InverterSettings(
        steps=10, latent=1, generator_rate=0.0, latent_rate=0.0, meta_rate=0.0, meta="fomaml", memory=0.0,
        pixel_rate=0.05, terms={"one_hot": 1.0, "batch_norm": 1.0},
    )  # fmt: skip
    observer, mean, std = Observer(teacher), torch.full((1, 1, 1, 1), 0.3), torch.full((1, 1, 1, 1), 0.37)

    def ends_with(search: type[PyramidInverter], steps: int) -> tuple[Tensor, dict[str, Tensor]]:
        random = torch.Generator().manual_seed(0)
        inverter = search((1, 8, 8), observer, mean, std, replace(settings, steps=steps), random, random, nullcontext())
        return inverter.invert(targets, None, 0.0)

    class OfPixels(PyramidInverter):
        COARSEST = 8

    before = ends_with(PyramidInverter, 1)[1]
    images, after = ends_with(PyramidInverter, 10)
    assert images.shape == (40, 8, 8, 1)
    assert images.dtype == torch.uint8
    assert after["batch_norm"] < 0.5 * before["batch_norm"]
    assert after["loss"] < ends_with(OfPixels, 10)[1]["loss"]
    shown = (images.permute(0, 3, 1, 2).float() / 255.0 - mean) / std
    assert (teacher(shown).argmax(dim=1) == targets).float().mean() > 0.8


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 5, 7), (1, 14, 7), (1, 3, 3)])
def test_a_pyramid_adds_nothing_at_first_and_fits_any_size(teacher: nn.Module, shape: tuple[int, int, int]) -> None:
    settings = InverterSettings(
        steps=1, latent=1, generator_rate=0.0, latent_rate=0.0, meta_rate=0.0, meta="fomaml", memory=0.0
    )
    mean = torch.full((1, 1, 1, 1), 0.5)
    random = torch.Generator().manual_seed(0)
    pyramid = PyramidInverter(shape, Observer(teacher), mean, mean, settings, random, random, nullcontext())
    levels = pyramid._levels(6, torch.device("cpu"))
    assert min(min(level.shape[2:]) for level in levels[1:] or levels) >= min(4, *shape[1:])
    textures = torch.rand(6, *shape)
    assert torch.equal(pyramid._image(textures, levels), textures)
    levels = [torch.full_like(level, 0.05) for level in levels]
    assert torch.allclose(pyramid._image(textures, levels), (textures + 0.05 * len(levels)).clamp(max=1.1))
    for far, edge in ((9.0, 1.1), (-9.0, -0.1)):
        levels[0].fill_(far)
        assert (pyramid._image(textures, levels) == edge).all(), "no further past black and white"


@pytest.mark.parametrize("shape", [(8, 5, 6, 7), (16, 5), (3, 5, 2, 4, 4), (1, 5, 3, 3)])
def test_statistics_and_their_gradients_are_those_of_var_mean(shape: tuple[int, ...]) -> None:
    layer = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](5)
    observer = Observer(nn.Sequential(layer, nn.Flatten()).eval())
    seen = (3.0 * torch.randn(shape, generator=random_from(0)) + 2.0).requires_grad_(True)
    observer.observe(seen, statistics=True, features=False)
    ((mean, variance),) = observer.batch
    expected_variance, expected_mean = torch.var_mean(seen, [d for d in range(seen.dim()) if d != 1], correction=0)
    pull = torch.linspace(1.0, 2.0, 5)
    (gradient,) = torch.autograd.grad((pull * mean + variance).sum(), seen)
    (expected,) = torch.autograd.grad((pull * expected_mean + expected_variance).sum(), seen)
    for ours, theirs in ((mean, expected_mean), (variance, expected_variance), (gradient, expected)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_statistics_of_maps_in_float64_are_noted_too() -> None:
    observer = Observer(nn.Sequential(nn.BatchNorm2d(5), nn.Flatten()).double().eval())
    seen = torch.randn(4, 5, 3, 3, dtype=torch.float64, generator=random_from(0)).requires_grad_(True)
    observer.observe(seen, statistics=True, features=False)
    ((mean, variance),) = observer.batch
    torch.testing.assert_close(mean, seen.mean(dim=(0, 2, 3)))
    (gradient,) = torch.autograd.grad(variance.sum(), seen)
    assert gradient.dtype == torch.float64
