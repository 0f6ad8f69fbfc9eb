"""Promises of Muon: hidden layers move in all directions alike, all else as SGD moves it."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssdkd import muon
from ssdkd.models.counting import _Operations
from ssdkd.muon import Muon, orthogonal


def random_from(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(grey: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1 if grey else 3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 24, 1),
        nn.Flatten(),
        nn.LazyLinear(5),
    )


def moved(model: nn.Module, lr: float = 0.1, momentum: float = 0.9, decay: float = 0.0, steps: int = 1) -> Muon:
    """After so many steps by random gradients, the same whatever the layout."""
    optimizer = Muon(model, lr, momentum, decay, nesterov=True)
    for step in range(steps):
        for number, weight in enumerate(model.parameters()):
            weight.grad = torch.empty_like(weight).copy_(
                torch.randn(weight.shape, generator=random_from(9 * step + number))
            )
        optimizer.step()
    return optimizer


def trained(grey: bool = False) -> tuple[nn.Sequential, dict[str, Tensor]]:
    model = network(grey)
    model(torch.zeros(1, 1 if grey else 3, 5, 5))  # which makes the lazy layer
    return model, {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("shape", [(4, 20), (20, 4), (16, 16), (64, 300)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_singular_values_become_about_one_and_directions_stay(shape: tuple[int, int], scale: float) -> None:
    left, sizes, right = torch.linalg.svd(torch.randn(shape, generator=random_from(0)), full_matrices=False)
    sizes = torch.linspace(1.0, 0.1, len(sizes))
    (found,) = orthogonal([scale * left @ torch.diag(sizes) @ right])
    sizes_now = torch.diag(left.T @ found @ right.T) / max(1.0, shape[0] / shape[1]) ** 0.5
    assert ((sizes_now > 0.6) & (sizes_now < 1.25)).all()
    longer = max(1.0, shape[0] / shape[1]) ** 0.5
    assert torch.allclose(longer * left @ torch.diag(sizes_now) @ right, found, atol=1e-3)


def test_matrices_of_several_sizes_are_each_as_if_alone() -> None:
    shapes = [(4, 20), (20, 4), (4, 9), (6, 6)]
    matrices = [torch.randn(shape, generator=random_from(n)) for n, shape in enumerate(shapes)]
    for matrix, found in zip(matrices, orthogonal(matrices), strict=True):
        assert torch.allclose(found, orthogonal([matrix])[0], atol=1e-5)


def test_a_step_starts_few_operations_for_each_shape() -> None:
    """On a GPU starting them is what a step of a small student takes."""

    def started(shapes: list[tuple[int, int]]) -> int:
        matrices = [torch.ones(shape) for shape in shapes]
        with _Operations() as counter:
            orthogonal(matrices)
        return counter.started

    shapes = [(8, inputs) for inputs in range(10, 20)]
    each = 6  # to stack, the length, the square and its scale, the factor's scale and what it is multiplied by
    assert started(shapes) - started(shapes[:1]) <= 9 * each


def test_nothing_becomes_nothing() -> None:
    (found,) = orthogonal([torch.zeros(3, 5)])
    assert torch.equal(found, torch.zeros(3, 5))


def test_hidden_layers_move_alike_in_all_directions_and_the_rest_as_by_sgd() -> None:
    model, before = trained()
    moved(model, lr=0.1)
    steps = {name: (before[name] - weight.detach()) / 0.1 for name, weight in model.named_parameters()}
    by_sgd, _ = trained()
    optimizer = torch.optim.SGD(by_sgd.parameters(), 0.1, 0.9, nesterov=True)
    for weight, like in zip(by_sgd.parameters(), model.parameters(), strict=True):
        weight.grad = like.grad
    optimizer.step()
    as_sgd = {
        name
        for name, weight in by_sgd.named_parameters()
        if torch.allclose(before[name] - weight, 0.1 * steps[name], atol=1e-5)
    }
    assert set(steps) - as_sgd == {"0.weight", "3.weight"}, "not the depthwise layer, the head, biases and norms"
    for name, longer in (("0.weight", 1.0), ("3.weight", 3.0**0.5)):  # the second has three times as many outputs
        sizes = torch.linalg.svdvals(steps[name].flatten(1)) / longer
        assert 0.6 < sizes.min() < sizes.max() < 1.25


def test_a_grey_images_first_layer_moves_as_by_sgd() -> None:
    model, before = trained(grey=True)
    moved(model, lr=0.1)
    gradient = next(model.parameters()).grad
    assert gradient is not None
    assert torch.allclose(before["0.weight"] - 0.1 * 1.9 * gradient, model[0].weight, atol=1e-5)


def test_layouts_move_alike() -> None:
    plain, last = trained()[0], trained()[0].to(memory_format=torch.channels_last)
    for model in (plain, last):
        moved(model, steps=3)
    for one, other in zip(plain.parameters(), last.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_weights_decay_by_the_rate_and_apart_from_the_gradient() -> None:
    model, before = trained()
    optimizer = Muon(model, 0.1, 0.9, 0.5, nesterov=True)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.allclose(model[3].weight, 0.95 * before["3.weight"])


def test_its_state_goes_on_where_it_was() -> None:
    whole, cut = trained()[0], trained()[0]
    moved(whole, steps=4)
    state = moved(cut, steps=2).state_dict()
    optimizer = Muon(cut, 0.1, 0.9, 0.0, nesterov=True)
    optimizer.load_state_dict(state)
    for step in (2, 3):
        for number, weight in enumerate(cut.parameters()):
            weight.grad = torch.randn(weight.shape, generator=random_from(9 * step + number))
        optimizer.step()
    for one, other in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_copy_goes_on_like_its_original() -> None:
    model = trained()[0]
    optimizer = moved(model)
    twin, of_twin = copy.deepcopy((model, optimizer))
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.grad = one.grad
    optimizer.step()
    of_twin.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_is_frozen_or_has_no_gradient_stays_and_the_last_layer_is_the_head_though_frozen() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4), nn.LayerNorm((2, 2)))
    model[2].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    optimizer = Muon(model, 0.1, 0.0, 0.0, nesterov=False)
    model[1].weight.grad = torch.randn(6, 6, generator=random_from(0))
    optimizer.step()
    sizes = torch.linalg.svdvals(before["1.weight"] - model[1].weight.detach()) / 0.1
    assert 0.6 < sizes.min() < sizes.max() < 1.25, "the last but the head"
    assert torch.equal(model[0].weight, before["0.weight"])
    norms = [p for group in optimizer.param_groups if not group["turned"] for p in group["params"]]
    assert any(p is model[3].weight for p in norms), "no layer, though of two dimensions"
    assert not any(p is model[2].weight for group in optimizer.param_groups for p in group["params"])


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d])
def test_convolutions_of_other_dimensions_are_turned_too(kind: type[nn.Conv1d] | type[nn.Conv3d]) -> None:
    model = nn.Sequential(kind(3, 5, 2), nn.Flatten(), nn.Linear(5, 2))
    before = model[0].weight.detach().clone()
    moved(model, lr=0.1)
    sizes = torch.linalg.svdvals((before - model[0].weight.detach()).flatten(1)) / 0.1
    assert 0.6 < sizes.min() < sizes.max() < 1.25


MATMUL: Any = torch.backends.cuda.matmul
NEWER = hasattr(MATMUL, "fp32_precision")


def told_of_precision() -> list[Any]:
    """What the process says of it, by each of PyTorch's switches; those that another one has put out of use say why."""
    told: list[Any] = []
    for switch in (lambda: MATMUL.allow_tf32, torch.get_float32_matmul_precision, lambda: MATMUL.fp32_precision):
        try:
            told.append(switch())
        except (RuntimeError, AttributeError) as error:
            told.append(str(error))
    return told


@pytest.mark.parametrize(
    "allow",
    [
        *(partial(torch.set_float32_matmul_precision, name) for name in ("highest", "high", "medium")),
        partial(setattr, MATMUL, "allow_tf32", True),
        pytest.param(
            partial(setattr, MATMUL, "fp32_precision", "tf32"),
            marks=pytest.mark.skipif(not NEWER, reason="of a later PyTorch"),
        ),
    ],
)
def test_steps_are_not_rounded_to_tf32_where_the_process_allows_it_and_it_still_does_afterwards(
    allow: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = trained()[0], []

    def watched(matrices: list[Tensor]) -> list[Tensor]:
        seen.append(MATMUL.fp32_precision == "tf32" if NEWER else MATMUL.allow_tf32)
        return orthogonal(matrices)

    monkeypatch.setattr(muon, "orthogonal", watched)
    try:
        allow()
        before = told_of_precision()
        moved(model)
        assert seen == [False]
        assert told_of_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")
