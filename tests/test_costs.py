"""What a budget counts: multiply-adds, and what it takes to start an operation."""

import pytest
import torch
from torch import nn

from ssdkd import costs
from ssdkd.costs import Costs, Work
from ssdkd.models import count_work, create_model


class TwoOfThem(nn.Module):
    """A sum and a ReLU; what shows part of the outcome is no operation."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        flat: torch.Tensor = torch.relu(images + 1.0).flatten(1)
        return flat[:, :10]


def test_views_are_no_operations_and_the_number_of_images_does_not_matter() -> None:
    assert count_work(TwoOfThem(), (3, 8, 8))[1] == 2
    deep, shallow = (create_model("convnet", {"widths": [8] * n}, num_classes=10, in_channels=1) for n in (3, 1))
    assert count_work(deep, (1, 8, 8))[1] > 2 * count_work(shallow, (1, 8, 8))[1]


def test_counting_leaves_model_and_random_state_alone() -> None:
    model, state = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(3), nn.Flatten()).train(), torch.get_rng_state()
    count_work(model, (3, 8, 8))
    assert model.training
    assert all(part.training for part in model)
    assert torch.equal(model[1].running_mean, torch.zeros(3))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_traced_model_is_counted_too() -> None:
    model = create_model("convnet", {"widths": [8, 8]}, num_classes=10, in_channels=1).eval()
    traced = torch.jit.trace(model, torch.zeros(2, 1, 8, 8))
    assert count_work(traced, (1, 8, 8))[1] >= count_work(model, (1, 8, 8))[1] // 2


def test_work_is_what_its_images_take_and_what_its_batches_take_to_start() -> None:
    work = Work(multiply_adds=100, operations=7)
    assert work.on(3) == 300 + 7 * costs.STARTED
    assert work.on(8, batches=4) == 800 + 28 * costs.STARTED
    assert work.on(0) == 0


def test_a_backward_pass_costs_two_forward_ones_or_one_for_the_input_alone() -> None:
    teacher, student, generator = Work(10, 0), Work(3, 0), Work(2, 0)
    found = Costs(teacher, student, generator)
    assert found.learning(batch=5) == 5 * 3 * 3
    assert found.searching(images=5, steps=2) == 2 * 5 * (3 * 2 + 2 * 10 + 2 * 3)
    assert found.labelling(images=5, views=4) == 5 * (4 * 10 + 3)
    starts = Costs(Work(0, 7), Work(0, 2), Work())
    assert starts.labelling(images=5, views=4) == (4 * 7 + 2) * costs.STARTED, "each view is a batch of its own"


def test_small_batches_of_small_networks_are_not_nearly_free() -> None:
    """A policy that cuts the same multiply-adds into more steps must pay for it, as a processor does."""
    found = Costs(Work(300_000, 20), Work(25_000, 20), Work())
    assert found.learning(8) > 0.8 * found.learning(32), "most of it is starting operations"
    large = Costs(Work(100_000_000, 65), Work(27_000_000, 64), Work())
    assert large.learning(64) == pytest.approx(8 * large.learning(8), rel=0.25), "hardly any of it"


def test_the_share_of_starting_falls_with_the_batch() -> None:
    found = Costs(Work(), Work(costs.STARTED // 10, 20), Work())
    assert found.starting(200) == pytest.approx(0.5)
    assert found.starting(20) > 0.9 > 0.1 > found.starting(2000)
    assert found.starting(0) == 0


def test_a_student_without_work_still_has_a_unit() -> None:
    empty = Costs(Work(1, 1), Work(), Work())
    assert empty.learning(8) > 0
    assert empty.starting(8) == 0
