"""The replay buffer: a small set of synthetic images with the teacher's answers, resident on the device."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

RENDERED_AT_MOST = 256 * 2**20  # bytes that all views of a buffer may take as images
RENDERED_AT_ONCE = 256  # views; more of them leave the processor's cache


@dataclass(frozen=True)
class Samples:
    """Synthetic images with what the teacher says of them; M samples, V views, C classes.

    A view is a way of showing an image: (vertical shift, horizontal shift, mirrored). View 0 is the image itself.
    """

    images: Tensor  # (M, H, W, channels) uint8
    views: Tensor  # (M, V, 3) int16
    logits: Tensor  # (M, V, C) the teacher's logits for each view
    classes: Tensor  # (M,) int64, the class the teacher predicts for view 0
    confidence: Tensor  # (M,) the teacher's confidence in it

    def __len__(self) -> int:
        return len(self.images)

    def usable(self) -> Tensor:
        """Whether the teacher's answer is finite for every view of a sample: (M,) bool."""
        return self.logits.flatten(1).isfinite().all(dim=1)

    def __getitem__(self, rows: Tensor | slice) -> Samples:
        return Samples(*(getattr(self, name)[rows] for name in OF_SAMPLES))


OF_SAMPLES = tuple(entry.name for entry in fields(Samples))


def joined(parts: Sequence[Samples]) -> Samples:
    """All of their samples, in that order."""
    return Samples(*(torch.cat([getattr(part, name) for part in parts]) for name in OF_SAMPLES))


def random_views(samples: int, views: int, max_shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Views for each sample, the first of them plain: -> (samples, views, 3) int16."""
    shape = (samples, views)
    device = generator.device
    shifts = torch.randint(-max_shift, max_shift + 1, (*shape, 2), generator=generator, device=device)
    mirrored = torch.randint(0, 2 if flip else 1, (*shape, 1), generator=generator, device=device)
    drawn = torch.cat([shifts, mirrored], dim=2).to(torch.int16)
    drawn[:, 0] = 0
    return drawn


@functools.cache
def _read_from(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which row (or column) each output position reads, and whether it lies inside: both (2 (2 length - 1), length).

    First by shift, from 1 - length on, mirrored at the border; then the same of a mirrored image. Of length 3:

        shift      -2     -1      0      1      2
        reads   2 1 0  1 0 1  0 1 2  1 2 1  2 1 0
    """
    shifts = torch.arange(1 - length, length, dtype=torch.int32, device=device)
    position = torch.arange(length, dtype=torch.int32, device=device) + shifts[:, None]
    position = torch.cat([position, position.flip(1)])
    reflected = (length - 1) - ((length - 1) - position.abs()).abs()
    return reflected, reflected == position


def render(images: Tensor, rows: Tensor, views: Tensor, border: str = "mirrored") -> Tensor:
    """Show image `rows[i]` under `views[i]`: (N, H, W, c), (B,), (B, 3) -> (B, c, H, W) of its type, channels last.

    What a shift brings in from outside is the image `mirrored`, or `black`. Images in float pass gradients on.
    """
    height, width, channels = images.shape[1:]
    read_rows, rows_inside = _read_from(height, rows.device)
    read_columns, columns_inside = _read_from(width, rows.device)
    below, beside, mirrored = views.int().unbind(1)
    below, beside = below + (height - 1), beside + (width - 1) + mirrored * (2 * width - 1)
    # whole images first: their pixels are then near, and counted in 32 bits
    start = torch.arange(0, len(rows) * height * width, height * width, dtype=torch.int32, device=rows.device)
    y = (read_rows * width).index_select(0, below).add_(start[:, None])
    pixel = y[:, :, None] + read_columns.index_select(0, beside)[:, None, :]
    near = images.index_select(0, rows)
    flat = near.view(-1, channels) if channels > 1 else near.view(-1)  # single bytes have a faster way
    shown = flat.index_select(0, pixel.view(-1)).view(len(rows), height, width, channels)
    if border == "black":
        inside = rows_inside[below][:, :, None] & columns_inside[beside][:, None, :]
        shown = shown * inside[..., None]
    return shown.permute(0, 3, 1, 2)


class ReplayBuffer:
    """N slots of images, views, logits and the facts that selection reads; every array has the slot first."""

    _TENSORS = (*OF_SAMPLES, "delta", "entered", "visits")

    def __init__(
        self,
        capacity: int,
        image_shape: tuple[int, int, int],
        num_classes: int,
        views: int,
        device: torch.device,
        border: str = "mirrored",
        rendered: bool | None = False,
    ) -> None:
        """Reserve room for `capacity` images of shape (channels, H, W) with `views` stored views each.

        Views are `rendered` once, when an image enters, or each time that one is shown; None: once where they fit.
        """
        channels, height, width = image_shape
        self.capacity = capacity
        self.size = 0
        self.border = border  # what a shift brings in
        self.images = torch.zeros((capacity, height, width, channels), dtype=torch.uint8, device=device)
        self.views = torch.zeros((capacity, views, 3), dtype=torch.int16, device=device)
        self.logits = torch.zeros((capacity, views, num_classes), device=device)
        self.classes = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.confidence = torch.zeros(capacity, device=device)
        self.delta = torch.zeros(capacity, device=device)  # last seen KL(teacher, student)
        self.entered = torch.zeros(capacity, dtype=torch.int64, device=device)  # the round it came in
        self.visits = torch.zeros(capacity, dtype=torch.int64, device=device)  # times it was replayed
        if rendered is None:
            rendered = self.images.numel() * views <= RENDERED_AT_MOST
        self.rendered = self.images.new_zeros((capacity, views, height, width, channels)) if rendered else None

    def filled(self) -> Samples:
        """The samples held now, as views into the buffer."""
        return Samples(*(getattr(self, name)[: self.size] for name in OF_SAMPLES))

    def append(self, samples: Samples, delta: float, round_index: int) -> int:
        """Put as many samples into free slots as there are; returns how many went in."""
        count = min(len(samples), self.capacity - self.size)
        slots = slice(self.size, self.size + count)
        for name in OF_SAMPLES:
            getattr(self, name)[slots] = getattr(samples, name)[:count]
        self.delta[slots] = self.delta[: self.size].max() if self.size else delta
        self.entered[slots] = round_index
        self.visits[slots] = 0
        self._render(torch.arange(self.size, self.size + count, device=self.images.device))
        self.size += count
        return count

    def replace(self, slots: Tensor, samples: Samples, accepted: Tensor, round_index: int) -> None:
        """Sample i takes slot i where accepted[i]; all (K,). It enters with the largest delta seen.

        The shape does not depend on how many are accepted, so nothing waits for the device.
        """
        for name in OF_SAMPLES:
            held, new = getattr(self, name), getattr(samples, name)
            take = accepted.view(-1, *([1] * (new.dim() - 1)))
            held[slots] = torch.where(take, new, held[slots])
        largest = self.delta[: self.size].max()
        self.delta[slots] = torch.where(accepted, largest, self.delta[slots])
        self.entered[slots] = torch.where(accepted, round_index, self.entered[slots])
        self.visits[slots] = torch.where(accepted, 0, self.visits[slots])
        self._render(slots)

    def _render(self, slots: Tensor) -> None:
        """Keep what each view of these slots (K,) shows, where that is kept."""
        if self.rendered is None:
            return
        for some in slots.split(max(1, RENDERED_AT_ONCE // self.views.shape[1])):
            views = self.views[some]
            rows = some.repeat_interleave(views.shape[1])
            shown = render(self.images, rows, views.view(-1, 3), self.border).permute(0, 2, 3, 1)
            self.rendered[some] = shown.view(*views.shape[:2], *shown.shape[1:])

    def show(self, rows: Tensor, view: Tensor) -> Tensor:
        """What view `view[i]` of sample `rows[i]` shows: (B,), (B,) -> (B, c, H, W) uint8, channels last."""
        if self.rendered is None:
            return render(self.images, rows, self.views[rows, view], self.border)
        return self.rendered.flatten(0, 1).index_select(0, rows * self.views.shape[1] + view).permute(0, 3, 1, 2)

    def note_replay(self, rows: Tensor, delta: Tensor) -> None:
        """Remember what the student still had to learn from the rows just replayed: (B,), (B,).

        A row that stands twice in the batch takes the larger value, so that the outcome has one order only.
        """
        self.delta.scatter_reduce_(0, rows, delta, reduce="amax", include_self=False)

    def note_visits(self, rows: Tensor) -> None:
        """Count the draws of a round: (draws,)."""
        self.visits.scatter_add_(0, rows, torch.ones_like(rows))

    def bytes_per_sample(self) -> int:
        held = [getattr(self, name) for name in self._TENSORS] + ([] if self.rendered is None else [self.rendered])
        return sum(t[0].numel() * t.element_size() for t in held)

    def state_dict(self) -> dict[str, Tensor | int]:
        return {"size": self.size, **{name: getattr(self, name) for name in self._TENSORS}}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        self.size = int(state["size"])
        for name in self._TENSORS:
            getattr(self, name).copy_(state[name])
        self._render(torch.arange(self.size, device=self.images.device))
