"""The promise that a run folder contains no image of the evaluation set, in no file and in no form."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto import event_pb2
from test_agents import only_run, train_flags
from torch import Tensor

from agents import train
from ssdkd import checkpoint
from ssdkd.data import load_dataset
from ssdkd.run import main

OPTIONS = [
    *("--rounds", "6", "--device", "cpu", "--threads", "1", "--inversion.images", "32", "--inversion.warmup", "2"),
    *("--inversion.steps", "2", "--inversion.width", "8", "--probe.images", "16", "--distillation.steps", "3"),
    *("--checkpoint.rounds", "3", "--checkpoint.minutes", "0", "--tracking.evaluate-every", "2", "--quiet"),
]


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    """Every digit of the evaluation set, (N, 64) uint8."""
    images = np.asarray(load_dataset("digits", None, "test").images)
    return images.reshape(len(images), -1).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that measured the student on the evaluation set several times."""
    out = tmp_path_factory.mktemp("leak")
    assert main([*OPTIONS, "--out", str(out)]) == 0
    (made,) = out.iterdir()
    return made


def tensors_in(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensors_in(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from tensors_in(value)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file as it is, and the pictures in event files and in pages unpacked."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for path in folder.rglob("*"):
        if path.suffix == ".png":
            found[f"{path.name}, pixels"] = np.asarray(Image.open(path)).tobytes()
        if "tfevents" in path.name:
            for number, record in enumerate(RawEventFileLoader(str(path)).Load()):
                for value in event_pb2.Event.FromString(record).summary.value:
                    for text in value.tensor.string_val:
                        found[f"{value.tag}, {number}"] = unpacked(text)
    return found


def unpacked(data: bytes) -> bytes:
    """The pixels of a PNG, row for row; anything else as it is."""
    if not data.startswith(b"\x89PNG"):
        return data
    position, packed = 8, b""
    while position < len(data):
        length, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        packed += data[position + 8 : position + 8 + length] if kind == b"IDAT" else b""
        position += 12 + length
    return zlib.decompress(packed)


def require_no_image(whole: dict[str, bytes], digits: np.ndarray) -> None:
    images = {row.tobytes() for row in digits}
    for name, content in whole.items():
        assert not any(image in content for image in images), f"{name} holds an evaluation image"


def test_no_file_holds_the_bytes_of_an_evaluation_image(folder: Path, digits: np.ndarray) -> None:
    whole = contents(folder)
    assert {"student.safetensors", "buffer.png", "buffer.png, pixels", "replays.png", "report.html"} <= set(whole)
    assert any(name.startswith("checkpoints/") for name in whole)
    require_no_image(whole, digits)


def test_no_tensor_of_a_checkpoint_is_near_an_evaluation_image(folder: Path, digits: np.ndarray) -> None:
    """Buffer, probe and whatever else has their size, in bytes or normalised, must differ in more than rounding."""
    state, _, _ = checkpoint.load_newest(folder / "checkpoints")
    real = torch.from_numpy(digits).float()
    candidates = []
    for tensor in tensors_in(state):
        if tensor.dim() >= 3 and tensor[0].numel() == real.shape[1]:
            candidates.append(tensor.reshape(len(tensor), -1).float())
    assert sum(map(len, candidates)) >= 180 + 16, "buffer and probe are among them"

    def standardised(rows: Tensor) -> Tensor:
        centred = rows - rows.mean(dim=1, keepdim=True)
        return centred / centred.norm(dim=1, keepdim=True).clamp(min=1e-6)

    likeness = standardised(torch.cat(candidates)) @ standardised(real).T  # 1.0: the same but for brightness
    assert likeness.max() < 0.97
    noisy = (real[:50] + torch.randn(50, real.shape[1], generator=torch.Generator().manual_seed(0))).clamp(0, 255)
    assert (standardised(noisy) @ standardised(real).T).max(dim=1).values.min() > 0.97, "a copy would be noticed"


def test_a_training_that_was_judged_by_real_images_holds_none(tmp_path: Path, digits: np.ndarray) -> None:
    """Its checkpoints hold whole episodes."""
    flags = ["--steps", "16", "--reward", "validation", "--evaluate-seeds", "1"]
    assert train.main(train_flags(tmp_path, "ppo", *flags)) == 0
    whole = contents(only_run(tmp_path))
    assert any(name.startswith("checkpoints/") for name in whole)
    require_no_image(whole, digits)


def test_the_search_would_find_an_image_that_is_there(tmp_path: Path, digits: np.ndarray) -> None:
    Image.fromarray(digits[7].reshape(8, 8)).save(tmp_path / "leak.png")
    (tmp_path / "state.bin").write_bytes(b"before" + digits[3].tobytes() + b"after")
    found = contents(tmp_path)
    assert digits[7].tobytes() in found["leak.png, pixels"]
    assert digits[3].tobytes() in found["state.bin"]
