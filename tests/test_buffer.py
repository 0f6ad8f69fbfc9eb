"""Promises of the replay buffer: how an image is shown, and what stays true of the slots."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest
import torch

from ssdkd.buffer import ReplayBuffer, Samples, random_views, render
from ssdkd.selection import class_counts, exchange

CLASSES = 5
CPU = torch.device("cpu")
FACTS = ("images", "views", "logits", "classes", "confidence", "delta", "entered", "visits")


def random_from(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int, height: int = 5, width: int = 7, channels: int = 3, seed: int = 0) -> torch.Tensor:
    shape = (n, height, width, channels)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=random_from(seed))


def samples(n: int, seed: int, views: int = 2) -> Samples:
    generator = random_from(seed)
    return Samples(
        images=pictures(n, seed=seed),
        views=random_views(n, views, 1, True, generator),
        logits=torch.randn(n, views, CLASSES, generator=generator),
        classes=torch.randint(0, CLASSES, (n,), generator=generator),
        confidence=torch.rand(n, generator=generator),
    )


@pytest.fixture
def buffer() -> ReplayBuffer:
    return ReplayBuffer(12, (3, 5, 7), CLASSES, views=2, device=CPU)


def facts(buffer: ReplayBuffer) -> dict[str, torch.Tensor]:
    return {name: getattr(buffer, name).clone() for name in FACTS}


# -- showing images -------------------------------------------------------------------------------------


def shown(image: torch.Tensor, view: tuple[int, int, int], border: str = "mirrored") -> np.ndarray:
    """One image (H, W, c) under one view -> (H, W, c)."""
    out = render(image[None], torch.tensor([0]), torch.tensor([view], dtype=torch.int16), border)
    return out[0].permute(1, 2, 0).numpy()


def test_the_plain_view_is_the_image_itself() -> None:
    images = pictures(4)
    out = render(images, torch.arange(4), torch.zeros(4, 3, dtype=torch.int16))
    assert torch.equal(out, images.permute(0, 3, 1, 2))


def test_what_is_shown_is_bytes_with_channels_last_in_memory() -> None:
    out = render(pictures(4), torch.tensor([2, 2, 0]), torch.zeros(3, 3, dtype=torch.int16))
    assert out.shape == (3, 3, 5, 7)
    assert out.dtype == torch.uint8
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("border", "padding"), [("mirrored", "reflect"), ("black", "constant")])
@pytest.mark.parametrize("view", [(1, 0, 0), (-1, 0, 0), (0, 2, 0), (0, -2, 0), (4, -6, 0), (-4, 6, 0)])
def test_a_shift_moves_the_image_and_fills_in_at_the_border(
    view: tuple[int, int, int], border: str, padding: Literal["reflect", "constant"]
) -> None:
    image = pictures(1)[0]
    dy, dx, _ = view
    padded = np.pad(image.numpy(), ((abs(dy), abs(dy)), (abs(dx), abs(dx)), (0, 0)), mode=padding)
    top, left = abs(dy) + dy, abs(dx) + dx
    assert np.array_equal(shown(image, view, border), padded[top : top + 5, left : left + 7])


def test_a_mirrored_view_swaps_left_and_right() -> None:
    image = pictures(1)[0]
    assert np.array_equal(shown(image, (0, 0, 1)), image.numpy()[:, ::-1])


@pytest.mark.parametrize("border", ["mirrored", "black"])
def test_a_mirrored_shift_is_the_mirror_image_of_that_shift(border: str) -> None:
    image = pictures(1)[0]
    assert np.array_equal(shown(image, (1, -2, 1), border), shown(image, (1, -2, 0), border)[:, ::-1])


@pytest.mark.parametrize(("border", "first", "second"), [("mirrored", 0.0, 2.0), ("black", 0.0, 1.0)])
def test_a_pixel_has_as_much_gradient_as_it_is_shown(border: str, first: float, second: float) -> None:
    """Moved up by a row: the first is out of sight, and the last but one is mirrored below the last."""
    image = pictures(1).float().requires_grad_(True)
    render(image, torch.tensor([0]), torch.tensor([[1, 0, 0]]), border).sum().backward()
    assert image.grad is not None
    assert image.grad[0, :, 0, 0].tolist() == [first, 1.0, 1.0, second, 1.0]


def test_every_row_of_a_batch_gets_its_own_image_and_view() -> None:
    images = pictures(6)
    rows = torch.tensor([5, 0, 3, 3])
    views = torch.tensor([[1, 1, 0], [0, 0, 1], [0, -1, 0], [-1, 0, 1]], dtype=torch.int16)
    together = render(images, rows, views)
    for i, (row, view) in enumerate(zip(rows.tolist(), views.tolist(), strict=True)):
        assert np.array_equal(together[i].permute(1, 2, 0).numpy(), shown(images[row], tuple(view)))


def test_the_first_view_is_plain_and_the_others_stay_within_what_was_asked() -> None:
    views = random_views(500, 4, 2, True, random_from(0))
    assert (views[:, 0] == 0).all()
    assert set(views[:, 1:, :2].unique().tolist()) == {-2, -1, 0, 1, 2}
    assert views[:, 1:, 2].float().mean().item() == pytest.approx(0.5, abs=0.05)
    still = random_views(50, 3, 0, False, random_from(0))
    assert (still == 0).all(), "neither shifts nor mirror images were asked for"


# -- slots ----------------------------------------------------------------------------------------------


def test_samples_go_into_free_slots_until_there_are_none(buffer: ReplayBuffer) -> None:
    first, second = samples(8, 1), samples(8, 2)
    assert buffer.append(first, delta=1.0, round_index=0) == 8
    assert buffer.append(second, delta=1.0, round_index=3) == 4
    assert buffer.append(samples(3, 3), delta=1.0, round_index=4) == 0
    held = buffer.filled()
    assert len(held) == buffer.size == 12
    for name in ("images", "views", "logits", "classes", "confidence"):
        expected = torch.cat([getattr(first, name), getattr(second, name)[:4]])
        assert torch.equal(getattr(held, name), expected), name
    assert buffer.entered.tolist() == [0] * 8 + [3] * 4


def test_a_new_sample_enters_unvisited_with_the_largest_delta_seen(buffer: ReplayBuffer) -> None:
    buffer.append(samples(4, 1), delta=0.5, round_index=0)
    assert buffer.delta[:4].tolist() == [0.5] * 4
    buffer.note_replay(torch.tensor([1, 3]), torch.tensor([7.0, 0.1]))
    buffer.append(samples(2, 2), delta=0.5, round_index=1)
    assert buffer.delta[4:6].tolist() == [7.0, 7.0]
    buffer.note_visits(torch.tensor([0, 0, 2]))
    buffer.replace(torch.tensor([0]), samples(1, 3), torch.tensor([True]), round_index=9)
    assert (buffer.delta[0].item(), buffer.visits[0].item(), buffer.entered[0].item()) == (7.0, 0, 9)


def test_replace_takes_the_accepted_and_leaves_every_other_slot_alone(buffer: ReplayBuffer) -> None:
    buffer.append(samples(12, 1), delta=1.0, round_index=0)
    buffer.note_replay(torch.arange(12), torch.linspace(0.1, 2.0, 12))
    buffer.note_visits(torch.arange(12))
    before, new = facts(buffer), samples(4, 2)
    slots, accepted = torch.tensor([7, 2, 9, 0]), torch.tensor([True, False, True, False])
    buffer.replace(slots, new, accepted, round_index=5)
    changed = {7: 0, 9: 2}
    for slot in range(12):
        for name in FACTS:
            now = getattr(buffer, name)[slot]
            if slot not in changed:
                assert torch.equal(now, before[name][slot]), (slot, name)
            elif hasattr(new, name):
                assert torch.equal(now, getattr(new, name)[changed[slot]]), (slot, name)
    assert buffer.entered[[7, 9]].tolist() == [5, 5]
    assert buffer.visits[[7, 9]].tolist() == [0, 0]
    assert buffer.delta[[7, 9]].tolist() == pytest.approx([2.0, 2.0])


def test_of_a_row_that_stands_twice_in_a_batch_the_larger_delta_counts(buffer: ReplayBuffer) -> None:
    buffer.append(samples(6, 1), delta=9.0, round_index=0)
    buffer.note_replay(torch.tensor([2, 4, 2, 2]), torch.tensor([0.5, 0.3, 0.8, 0.1]))
    assert buffer.delta[:6].tolist() == pytest.approx([9.0, 9.0, 0.8, 9.0, 0.3, 9.0])


def test_visits_count_every_draw(buffer: ReplayBuffer) -> None:
    buffer.append(samples(5, 1), delta=1.0, round_index=0)
    buffer.note_visits(torch.tensor([1, 1, 4]))
    buffer.note_visits(torch.tensor([4]))
    assert buffer.visits[:5].tolist() == [0, 2, 0, 0, 2]


@pytest.mark.parametrize("seed", range(3))
def test_over_many_exchanges_no_sample_is_doubled_and_the_counts_are_right(buffer: ReplayBuffer, seed: int) -> None:
    """Every image carries its own number in its first pixels; nothing may come in twice or half."""
    generator, made, told = random_from(seed), 0, {}

    def next_samples(n: int) -> Samples:
        nonlocal made
        fresh = samples(n, seed=1000 * seed + made)
        for i in range(n):
            fresh.images[i, 0, 0, 0] = made
            told[made] = int(fresh.classes[i])
            made += 1
        return fresh

    buffer.append(next_samples(12), delta=1.0, round_index=0)
    for round_index in range(1, 15):
        fresh = next_samples(6)
        slots, winners, accepted = exchange(
            torch.rand(12, generator=generator), torch.rand(6, generator=generator), limit=4
        )
        buffer.replace(slots, fresh[winners], accepted, round_index)
        names = buffer.images[:, 0, 0, 0].tolist()
        assert len(set(names)) == 12
        assert [told[name] for name in names] == buffer.classes.tolist()
        counted = class_counts(buffer.filled().classes, CLASSES).tolist()
        assert counted == [sum(told[n] == c for n in names) for c in range(CLASSES)]
    assert buffer.entered.max() > 5, "nothing was exchanged"


def test_a_buffer_restored_from_its_state_holds_the_same(buffer: ReplayBuffer) -> None:
    buffer.append(samples(9, 1), delta=1.0, round_index=2)
    buffer.note_replay(torch.tensor([3]), torch.tensor([0.25]))
    buffer.note_visits(torch.tensor([3]))
    other = ReplayBuffer(12, (3, 5, 7), CLASSES, views=2, device=CPU)
    other.load_state_dict(buffer.state_dict())
    assert other.size == 9
    for name, held in facts(buffer).items():
        assert torch.equal(getattr(other, name), held), name
    buffer.note_replay(torch.tensor([3]), torch.tensor([5.0]))
    assert other.delta[3] == 0.25, "the restored buffer must own its memory"


@pytest.mark.parametrize("border", ["mirrored", "black"])
def test_rendered_views_show_what_would_be_worked_out_anew(border: str) -> None:
    kept, anew = (
        ReplayBuffer(12, (3, 5, 7), CLASSES, views=3, device=CPU, border=border, rendered=rendered)
        for rendered in (True, False)
    )
    rows, view = torch.arange(12).repeat_interleave(3), torch.arange(3).repeat(12)
    told = torch.tensor([True, False, True])
    for buffer in (kept, anew):
        buffer.append(samples(8, 1, views=3), delta=1.0, round_index=0)
        buffer.append(samples(9, 2, views=3), delta=1.0, round_index=1)
        buffer.replace(torch.tensor([10, 2, 5]), samples(3, 4, views=3), told, 2)
    restored = ReplayBuffer(12, (3, 5, 7), CLASSES, views=3, device=CPU, border=border, rendered=True)
    restored.load_state_dict(anew.state_dict())
    assert not torch.equal(anew.show(rows, view), anew.show(rows, torch.zeros_like(view))), "all views are plain"
    for buffer in (kept, restored):
        assert torch.equal(buffer.show(rows, view), anew.show(rows, view))
        assert "rendered" not in buffer.state_dict(), "what can be worked out need not be saved"
    assert kept.bytes_per_sample() == anew.bytes_per_sample() + 3 * 3 * 5 * 7


def test_views_are_rendered_by_themselves_only_where_they_take_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssdkd.buffer.RENDERED_AT_MOST", 12 * 2 * 3 * 5 * 7)

    def made(capacity: int) -> ReplayBuffer:
        return ReplayBuffer(capacity, (3, 5, 7), CLASSES, views=2, device=CPU, rendered=None)

    assert made(12).rendered is not None
    assert made(13).rendered is None


@pytest.mark.parametrize("make", [lambda: ReplayBuffer(50, (3, 32, 32), 10, views=4, device=CPU)])
def test_the_memory_of_a_sample_is_what_the_buffer_reserves_for_it(make: Callable[[], ReplayBuffer]) -> None:
    buffer = make()
    reserved = sum(t.numel() * t.element_size() for t in facts(buffer).values())
    assert buffer.bytes_per_sample() * 50 == reserved
    pixels, view, logit = 3 * 32 * 32, 4 * 3 * 2, 4 * 10 * 4
    assert buffer.bytes_per_sample() >= pixels + view + logit
    assert buffer.bytes_per_sample() < pixels + view + logit + 64, "facts should be small beside the image"
