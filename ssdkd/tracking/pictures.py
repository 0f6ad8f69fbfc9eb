"""Pictures of the buffer."""

from __future__ import annotations

import numpy as np
import torch

from ssdkd.buffer import Samples


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
    if channels != 3:
        grid = np.repeat(grid[..., :1], 3, axis=2)
    scale = max(1, round(480 / max(grid.shape[0], 1)))
    return np.kron(grid, np.ones((scale, scale, 1), dtype=np.uint8))
