"""Make what the default run ships: a teacher for 8x8 digits, and the digits it is measured on.

    python -m benchmarks.make_digits --out FOLDER       # ssdkd/assets, where what ships lies, is overwritten if named

Needs scikit-learn (`pip install -e '.[bench]'`), whose copy of the UCI handwritten digits is split here into
1,437 images for the teacher and 360, of every class its share, that it never saw.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.arguments import require_installed
from ssdkd.data import LabelledImages, dataset_spec
from ssdkd.errors import Parser, run_command
from ssdkd.evaluation import accuracy, predictions
from ssdkd.files import expanded, require_writable
from ssdkd.models import create_model, save_weights
from ssdkd.teacher import TeacherTraining, train

TEACHER, DIGITS = "digits_teacher.safetensors", "digits.npz"


def split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Train and test images (N, 8, 8) uint8 and labels; the 0..16 of the set are spread over 0..255."""
    require_installed("sklearn", "scikit-learn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images * (255.0 / 16.0)).astype(np.uint8)
    parts = train_test_split(images, digits.target, test_size=360, random_state=0, stratify=digits.target)
    return tuple(parts)  # type: ignore[return-value]


def enlarged(images: np.ndarray, size: int) -> Tensor:
    """(N, 8, 8) uint8 -> (N, 1, size, size) uint8, smoothly."""
    pixels = torch.from_numpy(images)[:, None]
    if size == 8:
        return pixels
    return F.interpolate(pixels.float(), size=size, mode="bicubic").round().clamp(0, 255).to(torch.uint8)


def as_set(images: np.ndarray, labels: np.ndarray, size: int = 8) -> LabelledImages:
    """Digits (N, 8, 8) uint8 with their labels (N,), `size` pixels across."""
    return LabelledImages(enlarged(images, size), torch.from_numpy(labels).long(), dataset_spec("digits"))


def share_right(teacher: nn.Module, test: LabelledImages) -> float:
    """Its accuracy in percent."""
    mean, std = test.spec.normalisation()
    return accuracy(predictions(teacher, test.images, mean, std, nullcontext()), test.labels)


def run(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m benchmarks.make_digits", description=__doc__)
    what = "where to; files of before are overwritten"
    parser.add_argument("--out", type=expanded, required=True, metavar="FOLDER", help=what)
    out = parser.parse_args(argv).out
    for name in (TEACHER, DIGITS):
        require_writable(out / name, "--out")
    train_images, test_images, train_labels, test_labels = split()
    torch.set_num_threads(1)  # the sums, and so the weights, depend on it
    torch.manual_seed(0)
    teacher = create_model("convnet", {"widths": [48, 96, 128]}, num_classes=10, in_channels=1, image_size=8)
    options = TeacherTraining(epochs=60, batch=64, learning_rate=0.1, shift=1)
    train(teacher, as_set(train_images, train_labels), options, torch.device("cpu"))
    teacher.half().float()  # measured as it is stored
    right = share_right(teacher, as_set(test_images, test_labels))
    save_weights(teacher.half(), out / TEACHER)  # half the size; read back as float32
    np.savez_compressed(out / DIGITS, test_images=test_images, test_labels=test_labels.astype(np.int64))
    print(f"teacher: {right:.2f} % of {len(test_labels)} test digits")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; a user's mistake is one sentence and exit code 2."""
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
