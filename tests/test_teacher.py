"""Promises of `python -m ssdkd.teacher`: it learns, repeats itself, and writes weights that load."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssdkd import files, teacher
from ssdkd.data import LabelledImages, load_dataset
from ssdkd.models import create_model, load_weights
from ssdkd.teacher import TeacherTraining

TASK = {"num_classes": 10, "in_channels": 1, "image_size": 8}


@pytest.fixture(scope="module")
def digits() -> LabelledImages:
    return load_dataset("digits", None, "test")


@pytest.fixture(scope="module")
def digits_file(tmp_path_factory: pytest.TempPathFactory, digits: LabelledImages) -> Path:
    """Digits as a user would bring them: 260 to learn from, 100 to be measured on."""
    file = tmp_path_factory.mktemp("data") / "digits.npz"
    images, labels = digits.images.numpy(), digits.labels.numpy()
    np.savez(file, x_train=images[:260], y_train=labels[:260], x_test=images[260:], y_test=labels[260:])
    return file


def command(data: Path, out: Path, *more: str) -> list[str]:
    return [
        *("--model", "convnet_small", "--dataset", "npz", "--data-root", str(data), "--out", str(out)),
        *("--batch", "32", "--epochs", "12", "--device", "cpu", *more),
    ]


def fresh(seed: int = 0) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return create_model("convnet_small", **TASK)


def share_right(model: torch.nn.Module, data: LabelledImages) -> float:
    mean, std = data.spec.normalisation()
    with torch.no_grad():
        logits = model.eval()((data.images.float() / 255.0 - mean) / std)
    return (logits.argmax(dim=1) == data.labels).float().mean().item()


def test_training_teaches_and_hands_back_a_model_ready_to_be_used(digits: LabelledImages) -> None:
    heard: list[tuple[int, float]] = []
    options = TeacherTraining(epochs=12, batch=32, shift=1)
    model = teacher.train(
        fresh(), digits, options, torch.device("cpu"), lambda epoch, loss: heard.append((epoch, loss))
    )
    assert share_right(fresh(), digits) < 0.3
    assert not model.training
    assert share_right(model, digits) > 0.9
    assert [epoch for epoch, _ in heard] == list(range(1, 13))
    assert heard[-1][1] < 0.5 * heard[0][1]


@pytest.mark.parametrize("epochs", [1, 5])
def test_a_training_of_few_steps_is_one_too(digits: LabelledImages, epochs: int) -> None:
    options = TeacherTraining(epochs=epochs, batch=len(digits.labels))  # PyTorch's schedule cannot have five steps
    model = teacher.train(fresh(), digits, options, torch.device("cpu"))
    assert not torch.equal(model.linear.weight, fresh().linear.weight)


def test_a_teacher_that_convolves_volumes_learns_too(digits: LabelledImages) -> None:
    volumes = torch.nn.Sequential(
        torch.nn.Unflatten(1, (1, 1)), torch.nn.Conv3d(1, 4, (1, 3, 3)), torch.nn.Flatten(), torch.nn.Linear(144, 10)
    )
    model = teacher.train(
        volumes, digits, TeacherTraining(epochs=12, batch=32, learning_rate=0.02), torch.device("cpu")
    )
    assert share_right(model, digits) > 0.3


def test_the_seed_decides_the_order_of_the_images(digits: LabelledImages) -> None:
    weights = [
        teacher.train(
            fresh(), digits, TeacherTraining(epochs=1, batch=32, seed=seed), torch.device("cpu")
        ).linear.weight
        for seed in (0, 0, 1)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_command_writes_the_teacher_whose_accuracy_it_prints(
    digits_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.safetensors"
    assert teacher.main(command(digits_file, out)) == 0
    printed = capsys.readouterr().out
    assert printed.count("epoch ") == 12
    assert str(out) in printed
    told = float(printed.split("test accuracy ")[1].split(" %")[0])
    assert told > 70
    model = fresh(seed=5)
    load_weights(model, out)
    held_out = load_dataset("npz", digits_file, "test")
    assert 100 * share_right(model, held_out) == pytest.approx(told, abs=0.01)


def test_the_same_command_writes_the_same_file(digits_file: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for file, seed in zip(files, ("7", "7", "8"), strict=True):
        assert teacher.main(command(digits_file, file, "--seed", seed, "--epochs", "1", "--shift", "1")) == 0
    same, again, other = (file.read_bytes() for file in files)
    assert same == again
    assert same != other


def test_a_home_that_the_shell_left_to_the_program_is_found(
    digits_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `--out=~/t.safetensors`."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    words = command(digits_file, Path("~/t.safetensors"), "--limit", "20", "--epochs", "1")
    assert teacher.main(words) == 0
    assert (tmp_path / "home" / "t.safetensors").is_file()
    assert not (tmp_path / "~").exists()


def test_fewer_images_than_a_batch_are_enough(digits_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "a new folder" / "t.safetensors"
    assert teacher.main(command(digits_file, out, "--limit", "20", "--epochs", "1")) == 0
    assert out.is_file()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--out", f"{__file__}/t.safetensors"), "t.safetensors cannot be written"),
        (("--dataset", "mnits"), "mnist"),
        (("--model", "convnett"), "convnet"),
        (("--epochs", "0"), "epochs"),
        (("--epoch", "3"), "--epochs"),
        (("--device", "tpu"), "tpu"),
        (("--dataset", "digits"), "digits has no split 'train', only 'test'"),
        (("--data-root", "no/such/file.npz"), "no/such/file.npz"),
        (("--data-root", "~nobody.here/file.npz"), "~nobody.here/file.npz does not exist"),
        (("--precision", "half"), "bfloat16"),
        (("--shift", "8"), "out of sight"),
        (("--out", "teacher.pth"), ".safetensors"),
        (("--seed", str(10**23)), "seed"),
        (("--batch", "1", "--arguments", "{widths: [4, 4, 4, 4]}"), "batches are of one"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_two(
    digits_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    says: str,
) -> None:
    out = tmp_path / "t.safetensors"
    assert teacher.main(command(digits_file, out, *more)) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ")
    assert told.err.strip().count("\n") == 0
    assert says in told.err
    assert told.out == ""
    assert not out.exists()


def test_a_teacher_that_left_the_finite_numbers_is_not_saved(
    digits_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.safetensors"
    assert teacher.main(command(digits_file, out, "--epochs", "1", "--learning-rate", "1e30")) == 3
    assert "lower learning_rate" in capsys.readouterr().err
    assert not out.exists()


def test_a_teacher_is_not_lost_by_a_full_disk_or_a_failure_to_measure_it(
    digits_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*arguments: object) -> None:
        raise MemoryError

    out, elsewhere = tmp_path / "t.safetensors", tmp_path / "elsewhere"
    short = command(digits_file, out, "--epochs", "1", "--limit", "20")
    with monkeypatch.context() as patched:
        patched.setattr(teacher, "predictions", no_memory)
        assert teacher.main(short) == 3
    assert f"weights in {out}" in capsys.readouterr().out
    whole = out.read_bytes()

    def full_disk(path: Path, chunks: Any) -> None:
        if path == out:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, chunks)

    elsewhere.mkdir()
    write = files._write_whole
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    monkeypatch.setattr(files, "_write_whole", full_disk)
    assert teacher.main(short) == 2
    (saved,) = elsewhere.glob("*/t.safetensors")
    assert f"No space left on device; they were put into {saved} instead" in capsys.readouterr().err
    assert saved.read_bytes() == whole
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "not there"))
    assert teacher.main(short) == 2
    assert capsys.readouterr().err.endswith("No space left on device.\n"), "of nothing but what was asked for"


def test_running_out_of_memory_is_one_sentence(
    digits_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(teacher, "train", no_memory)
    out = tmp_path / "teacher.safetensors"
    assert teacher.main(command(digits_file, out)) == 3
    assert capsys.readouterr().err.startswith("error: out of memory: lower batch")
    assert not out.exists()
