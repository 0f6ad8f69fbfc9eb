"""Train the digits teachers of the family of tasks that policies learn on: strong, weak and one-sided ones.

Beside them go `validation.npz`, 480 of the digits that teachers are trained on: what policies are trained by, and
`validation16.npz` and `validation28.npz`, the same digits enlarged to 16x16 and 28x28 pixels; and `test16.npz`, the 360
digits that ship for evaluation, enlarged: what policies are judged by.

    python -m benchmarks.make_family --out teachers/digits      # about a minute on two cores

Needs scikit-learn (`pip install -e '.[bench]'`); the split is that of `benchmarks.make_digits`. Each teacher is a
`convnet`; `configs/family.yaml` knows them by file name and builds them with the arguments below.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.processes import pool
from benchmarks.arguments import require_at_least
from benchmarks.make_digits import as_set, enlarged, share_right, split
from ssdkd.errors import Parser, run_command
from ssdkd.files import expanded, require_writable
from ssdkd.models import create_model, save_weights
from ssdkd.teacher import TeacherTraining, train


@dataclass(frozen=True)
class Recipe:
    """One teacher: its network, and the images it is shown."""

    widths: tuple[int, ...]
    seed: int
    depth: int = 1
    batch_norm: bool = True
    images: int | None = None  # none: all 1,437
    skew: float = 1.0  # images of class c in proportion to skew^c
    epochs: int = 40
    size: int = 8  # pixels across; the digits are enlarged to that


TEACHERS: dict[str, Recipe] = {
    "wide": Recipe((48, 96, 128), seed=0),
    "narrow": Recipe((24, 48, 64), seed=1),
    "plain": Recipe((48, 96, 128), seed=3, batch_norm=False),
    "plain_narrow": Recipe((24, 48, 64), seed=4, batch_norm=False),
    "weak": Recipe((32, 64, 96), seed=5, images=100),
    "plain_weak": Recipe((32, 64, 96), seed=6, batch_norm=False, images=150),
    "skewed": Recipe((32, 64, 96), seed=7, skew=0.65),
    "large": Recipe((12, 24, 32), seed=11, size=16, epochs=20),
    "large_plain": Recipe((12, 24, 32), seed=12, size=16, batch_norm=False, epochs=30),
    "larger_plain": Recipe((12, 24, 32, 48), seed=13, size=28, batch_norm=False),
    # held out: for judging policies, not for training them
    "other": Recipe((40, 80, 112), seed=8, depth=2),
    "other_plain": Recipe((40, 80, 112), seed=9, batch_norm=False, images=400),
    "other_skewed": Recipe((40, 80, 112), seed=10, skew=1.5),
    "other_large": Recipe((16, 32, 48), seed=14, depth=2, size=16, epochs=20),
    "other_weak": Recipe((56, 72), seed=15, images=200),
    "other_plain_skewed": Recipe((32, 64, 96), seed=16, depth=2, batch_norm=False, skew=0.75),
}


def chosen(labels: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Rows of the images that a teacher is shown."""
    random = np.random.default_rng(recipe.seed)
    share = recipe.skew ** np.arange(10)
    share = share / share.max()
    rows = np.concatenate(
        [
            random.permutation(np.flatnonzero(labels == c))[: max(4, round(share[c] * (labels == c).sum()))]
            for c in range(10)
        ]
    )
    return random.permutation(rows)[: recipe.images]


def make(name: str, out: Path) -> str:
    recipe = TEACHERS[name]
    torch.set_num_threads(1)
    torch.manual_seed(recipe.seed)
    train_images, test_images, train_labels, test_labels = split()
    rows = chosen(train_labels, recipe)
    arguments: dict[str, Any] = {"widths": list(recipe.widths), "depth": recipe.depth, "batch_norm": recipe.batch_norm}
    teacher = create_model("convnet", arguments, num_classes=10, in_channels=1, image_size=recipe.size)
    rate = 0.1 if recipe.batch_norm else 0.03
    epochs = recipe.epochs * (1 if len(rows) > 500 else 3)
    shift = recipe.size // 8
    options = TeacherTraining(epochs=epochs, batch=64, learning_rate=rate, shift=shift, seed=recipe.seed)
    train(teacher, as_set(train_images[rows], train_labels[rows], recipe.size), options, torch.device("cpu"))
    right = share_right(teacher, as_set(test_images, test_labels, recipe.size))
    save_weights(teacher, out / f"{name}.safetensors")
    return f"{name}: {len(rows)} images, {right:.2f} % of {len(test_labels)} test digits"


def save_images(out: Path, how_many: int = 480) -> None:
    """Images and labels to measure accuracy on: a policy's training on the first, in which no test digit is."""
    train_images, test_images, train_labels, test_labels = split()
    validation, test = (train_images[:how_many], train_labels[:how_many]), (test_images, test_labels)
    for name, size, (images, labels) in (
        ("validation", 8, validation),
        ("validation16", 16, validation),
        ("validation28", 28, validation),
        ("test16", 16, test),
    ):
        np.savez(out / f"{name}.npz", images=enlarged(images, size).permute(0, 2, 3, 1).numpy(), labels=labels)


def run(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="python -m benchmarks.make_family", description="Train the digits teachers of configs/family.yaml."
    )
    parser.add_argument("--out", type=expanded, required=True, help="folder for weights and images")
    parser.add_argument("--processes", type=int, default=2, help="teachers trained at once")
    given = parser.parse_args(argv)
    require_at_least(given, processes=1)
    require_writable(given.out / "validation.npz", "--out")
    save_images(given.out)
    with pool(given.processes) as workers:
        for line in workers.map(make, TEACHERS, [given.out] * len(TEACHERS)):
            print(line, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(run, None))
