"""Pictures of the buffer."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw

from ssdkd.buffer import ReplayBuffer, Samples
from ssdkd.tracking.charts import font


def buffer_grid(samples: Samples, num_classes: int, per_class: int = 10, classes: int = 20) -> np.ndarray:
    """The most confident images of each predicted class, a row a class: -> (height, width, 3) uint8.

    At most `classes` rows; small images are enlarged to be seen; a class with too few images leaves gaps.
    """
    _, height, width, channels = samples.images.shape
    named, confidence = samples.classes.cpu(), samples.confidence.cpu()
    rows = min(num_classes, classes)
    gap = 1
    grid = np.full((rows * (height + gap) + gap, per_class * (width + gap) + gap, channels), 40, dtype=np.uint8)
    for row in range(rows):
        members = torch.nonzero(named == row).flatten()
        best = members[confidence[members].argsort(descending=True)][:per_class]
        for column, image in enumerate(samples.images[best.to(samples.images.device)].cpu().numpy()):
            y, x = gap + row * (height + gap), gap + column * (width + gap)
            grid[y : y + height, x : x + width] = image
    scale = max(1, round(480 / max(grid.shape[0], 1)))
    return np.kron(in_colour(grid), np.ones((scale, scale, 1), dtype=np.uint8))


def replay_grid(
    buffer: ReplayBuffer, num_classes: int, per_class: int = 10, classes: int = 20, blocks: int = 1, tile: int = 36
) -> np.ndarray:
    """Images of each class from the most to the least replayed, the count under each: -> (H, W, 3) uint8.

    The frame of a tile grows from pale to dark with the count. At most `classes` classes, a row each, in `blocks`
    side by side; an empty class leaves a gap. Small images are enlarged to about `tile` pixels.
    """
    held = buffer.filled()
    named, visits = held.classes.cpu().numpy(), buffer.visits[: buffer.size].cpu().numpy()
    classes = min(num_classes, classes)
    rows = -(-classes // blocks)
    height, width = held.images.shape[1:3]
    scale = max(1, round(tile / max(height, width)))
    tile_h, tile_w, left, gap = height * scale, max(width * scale, 34), 36, 7
    step_y, step_x = tile_h + gap + 13, tile_w + gap
    across = left + per_class * step_x + gap
    sheet = np.full((rows * step_y + gap, blocks * across, 3), 255, dtype=np.uint8)
    places: list[tuple[int, int, int]] = []  # y, x, sample
    for each in range(classes):
        block, row = divmod(each, rows)
        members = np.flatnonzero(named == each)
        ranked = members[np.argsort(-visits[members], kind="stable")]
        even = np.linspace(0, len(ranked) - 1, min(per_class, len(ranked))).round().astype(int)
        y, x = gap + row * step_y, block * across + left
        places += [(y, x + column * step_x, int(ranked[i])) for column, i in enumerate(even)]
    chosen = torch.tensor([sample for _, _, sample in places], dtype=torch.int64, device=held.images.device)
    images = in_colour(held.images[chosen].cpu().numpy())
    least, most = (int(visits.min()), int(visits.max())) if len(visits) else (0, 0)
    for (y, x, sample), image in zip(places, images, strict=True):
        share = float(visits[sample] - least) / max(most - least, 1)
        sheet[y - 3 : y + tile_h + 3, x - 3 : x + width * scale + 3] = _shade(share)
        sheet[y : y + tile_h, x : x + width * scale] = np.repeat(np.repeat(image, scale, axis=0), scale, axis=1)
    picture = Image.fromarray(sheet)
    pen = ImageDraw.Draw(picture)
    for each in range(classes):
        block, row = divmod(each, rows)
        place = (block * across + left / 2, gap + row * step_y + tile_h / 2)
        pen.text(place, str(each), fill="#22262b", font=font(15), anchor="mm")
    for y, x, sample in places:
        below = (x + width * scale / 2, y + tile_h + 9)
        pen.text(below, f"{visits[sample]} x", fill="#22262b", font=font(10), anchor="mm")
    return np.asarray(picture)


def in_colour(images: np.ndarray) -> np.ndarray:
    """Images of any number of channels (..., c) as (..., 3): of other than three, the first in grey."""
    return images if images.shape[-1] == 3 else np.repeat(images[..., :1], 3, axis=-1)


def _shade(share: float) -> tuple[int, int, int]:
    """From pale grey-blue to dark orange."""
    pale, dark = np.array([222, 228, 236]), np.array([208, 84, 20])
    red, green, blue = (pale + (dark - pale) * share).astype(int).tolist()
    return red, green, blue
