"""Evaluation sets: what each layout on disk gives, exactly, and what is refused with which sentence."""

import gzip
import io
import pickle
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssdkd import data
from ssdkd.data import (
    ImageSpec,
    LabelledImages,
    available_datasets,
    dataset_spec,
    load_dataset,
    register_dataset,
    require_same_task,
)
from ssdkd.errors import DataError

STANDARD = ("mnist", "fashion_mnist", "cifar10", "cifar100", "svhn", "digits")


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def assert_holds(loaded: LabelledImages, images: np.ndarray, labels: Any) -> None:
    assert loaded.images.dtype == torch.uint8
    assert loaded.labels.dtype == torch.int64
    assert loaded.images.is_contiguous()
    assert np.array_equal(loaded.images.numpy(), images)
    assert loaded.labels.tolist() == list(labels)
    assert tuple(loaded.images.shape[1:]) == loaded.spec.shape


def refusal(call: Callable[[], object]) -> str:
    """The one sentence with which `call` is refused."""
    with pytest.raises(DataError) as caught:
        call()
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


# Writers of tiny files in each layout


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder: Path, split: str, images: np.ndarray, labels: Any, *, zipped: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    prefix = {"train": "train", "test": "t10k"}[split]
    contents = {
        f"{prefix}-images-idx3-ubyte": idx_bytes(images),
        f"{prefix}-labels-idx1-ubyte": idx_bytes(np.array(labels, np.uint8)),
    }
    for name, content in contents.items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


def write_batch(path: Path, images: np.ndarray, labels: Any, key: str = "labels", protocol: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    batch = {"data": images.reshape(len(images), -1), key: labels, "batch_label": "a test"}
    path.write_bytes(pickle.dumps(batch, protocol=protocol))


def write_picture(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def write_mat(path: Path, images: np.ndarray, labels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy_io = pytest.importorskip("scipy.io")
    content = {"X": images.transpose(2, 3, 1, 0), "y": np.array(labels, np.uint8)[:, None]}
    scipy_io.savemat(path, content, do_compression=True)


# What every set promises


def test_the_sets_are_known_by_name() -> None:
    assert set(STANDARD) | {"folder", "npz"} <= set(available_datasets())


@pytest.mark.parametrize("name", STANDARD)
def test_the_spec_of_a_standard_set_needs_no_file(name: str) -> None:
    spec = dataset_spec(name)
    assert len(spec.mean) == len(spec.std) == spec.channels
    assert len(set(spec.class_names)) == spec.num_classes


def test_digits_are_never_mirrored() -> None:
    assert {name: dataset_spec(name).flip for name in STANDARD} == {
        "mnist": False,
        "fashion_mnist": True,
        "cifar10": True,
        "cifar100": True,
        "svhn": False,
        "digits": False,
    }


def test_cifar100_names_are_in_label_order() -> None:
    names = dataset_spec("cifar100").class_names
    assert list(names) == sorted(names)
    assert (names[0], names[8], names[99]) == ("apple", "bicycle", "worm")


def test_a_new_set_is_one_function(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(data, "_DATASETS", dict(data._DATASETS))
    spec = ImageSpec(1, 1, 1, 2, (0.5,), (0.5,), False, ("off", "on"))

    @register_dataset("lamps", spec)
    def read_lamps(root: Path, split: str, spec: ImageSpec, limit: int | None) -> LabelledImages:
        return LabelledImages(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1), torch.arange(2), spec)

    assert "lamps" in available_datasets()
    assert load_dataset("lamps", tmp_path).labels.tolist() == [0, 1]


def test_a_limit_keeps_the_same_images_from_all_over_a_sorted_set(tmp_path: Path) -> None:
    images, labels = pixels(200, 28, 28), np.repeat(np.arange(10), 20)
    write_idx(tmp_path, "test", images, labels, zipped=False)
    first, again = (load_dataset("mnist", tmp_path, limit=60) for _ in range(2))
    assert len(first.labels) == 60
    assert torch.equal(first.images, again.images)
    assert set(first.labels.tolist()) == set(range(10))
    whole = {(image.tobytes(), label) for image, label in zip(images, labels, strict=True)}
    kept = {(image.numpy().tobytes(), int(y)) for image, y in zip(first.images, first.labels, strict=True)}
    assert len(kept) == 60
    assert kept <= whole
    assert len(load_dataset("mnist", tmp_path, limit=500).labels) == 200


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    assert "did you mean 'cifar10'?" in refusal(lambda: load_dataset("CIFAR-10", "."))
    assert "known are cifar10, " in refusal(lambda: dataset_spec("zzz"))


def test_a_wrong_request_is_refused(tmp_path: Path) -> None:
    assert "no split 'valid', only 'train' and 'test'" in refusal(lambda: load_dataset("mnist", tmp_path, "valid"))
    assert "a limit of 0" in refusal(lambda: load_dataset("mnist", tmp_path, limit=0))
    missing = tmp_path / "nowhere"
    assert f"{missing} does not exist" in refusal(lambda: load_dataset("mnist", missing))
    assert "say in which folder" in refusal(lambda: load_dataset("mnist", None))
    assert "say in which folder" in refusal(lambda: dataset_spec("folder"))


def test_missing_files_are_listed_with_where_they_were_looked_for(tmp_path: Path) -> None:
    sentence = refusal(lambda: load_dataset("mnist", tmp_path))
    for part in ("t10k-images-idx3-ubyte", "t10k-images-idx3-ubyte.gz", f"{tmp_path / 'MNIST' / 'raw'} or "):
        assert part in sentence
    sentence = refusal(lambda: load_dataset("cifar10", tmp_path, "train"))
    assert f"data_batch_1 in {tmp_path / 'cifar-10-batches-py'} or {tmp_path};" in sentence


def test_a_set_must_be_of_the_teachers_task() -> None:
    spec = dataset_spec("cifar10")
    require_same_task(spec, num_classes=10, channels=3)
    sentence = refusal(lambda: require_same_task(spec, num_classes=100, channels=1))
    assert "10 classes where the teacher has 100" in sentence
    assert "3 image channel(s) where the teacher takes 1" in sentence
    assert "channel" not in refusal(lambda: require_same_task(spec, 100, 3))
    assert sentence.endswith("or name the classes that it has no image of (class_names of an npz, empty folders)")
    assert "no image of" not in refusal(lambda: require_same_task(spec, 9, 3))


def test_a_normalisation_that_does_not_fit_the_channels_is_refused() -> None:
    spec = dataset_spec("cifar10")
    assert "3 channel(s)" in refusal(lambda: replace(spec, mean=(0.5,)))
    assert "above 0" in refusal(lambda: replace(spec, std=(0.5, 0.5, 0.0)))


# IDX


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", "MNIST/raw"), ("mnist", "."), ("fashion_mnist", "FashionMNIST/raw"), ("fashion_mnist", ".")],
)
def test_idx_round_trip(tmp_path: Path, name: str, folder: str, zipped: bool) -> None:
    for seed, split in enumerate(("train", "test")):
        write_idx(tmp_path / folder, split, pixels(3, 28, 28, seed=seed), [seed, 9, 4], zipped=zipped)
    for seed, split in enumerate(("train", "test")):
        assert_holds(load_dataset(name, tmp_path, split), pixels(3, 28, 28, seed=seed)[:, None], [seed, 9, 4])


def test_a_truncated_idx_says_how_many_it_should_hold(tmp_path: Path) -> None:
    write_idx(tmp_path, "test", pixels(5, 28, 28), range(5), zipped=False)
    path = tmp_path / "t10k-images-idx3-ubyte"
    whole = path.read_bytes()
    path.write_bytes(whole[: 16 + 3 * 784])
    sentence = refusal(lambda: load_dataset("mnist", tmp_path))
    assert f"{path} is damaged: its header says 5 items of 784 byte(s) but it holds 3 (2352 bytes)" in sentence
    path.write_bytes(whole + b"\0")
    assert "5 items of 784 byte(s) but it holds more" in refusal(lambda: load_dataset("mnist", tmp_path))


def test_a_header_that_promises_too_much_takes_no_memory(tmp_path: Path) -> None:
    write_idx(tmp_path, "test", pixels(1, 28, 28), [0], zipped=False)
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1))
    assert "above the bound of 4 GiB" in refusal(lambda: load_dataset("mnist", tmp_path))
    path.write_bytes(struct.pack(">HBB3I", 0, 8, 3, 2**20, 28, 28))
    assert "says 1048576 items of 784 byte(s) but it holds 0" in refusal(lambda: load_dataset("mnist", tmp_path))


def test_a_gzip_bomb_is_read_no_further_than_its_header_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_idx(tmp_path, "test", pixels(1, 28, 28), [0], zipped=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx_bytes(pixels(1, 28, 28)) + bytes(2**26)))
    taken = []
    read_up_to = data._read_up_to

    def counted(stream: Any, size: int) -> bytearray:
        held = read_up_to(stream, size)
        taken.append(len(held))
        return held

    monkeypatch.setattr(data, "_read_up_to", counted)
    assert "1 items of 784 byte(s) but it holds more" in refusal(lambda: load_dataset("mnist", tmp_path))
    assert sum(taken) == 16 + 784 + 1


def test_damaged_idx_files_are_refused(tmp_path: Path) -> None:
    write_idx(tmp_path, "test", pixels(2, 28, 28), [0, 1], zipped=True)
    images, labels = (tmp_path / f"t10k-{s}-ubyte.gz" for s in ("images-idx3", "labels-idx1"))
    good = images.read_bytes()
    images.write_bytes(good[:-200])
    assert "is a damaged gzip file" in refusal(lambda: load_dataset("mnist", tmp_path))
    images.write_bytes(b"not gzip at all")
    assert "is a damaged gzip file" in refusal(lambda: load_dataset("mnist", tmp_path))
    images.write_bytes(labels.read_bytes())
    assert "is not an IDX file of images: its first bytes are 00 00 08 01" in refusal(
        lambda: load_dataset("mnist", tmp_path)
    )
    images.write_bytes(gzip.compress(idx_bytes(pixels(3, 28, 28))))
    assert "holds 3 images but 2 labels" in refusal(lambda: load_dataset("mnist", tmp_path))
    images.write_bytes(gzip.compress(idx_bytes(pixels(2, 14, 14))))
    assert "expected (1, 28, 28)" in refusal(lambda: load_dataset("mnist", tmp_path))
    write_idx(tmp_path, "test", pixels(2, 28, 28), [3, 10], zipped=True)
    assert "gives image 1 the label 10, outside 0..9" in refusal(lambda: load_dataset("mnist", tmp_path))
    write_idx(tmp_path, "test", pixels(0, 28, 28), [], zipped=True)
    assert "holds no image" in refusal(lambda: load_dataset("mnist", tmp_path))


def test_a_directory_in_place_of_a_file_is_not_taken_for_it(tmp_path: Path) -> None:
    (tmp_path / "t10k-images-idx3-ubyte").mkdir()
    assert "found no file t10k-images-idx3-ubyte" in refusal(lambda: load_dataset("mnist", tmp_path))


# CIFAR


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("folder", ["cifar-10-batches-py", "."])
def test_cifar10_round_trip_in_every_pickle_protocol(tmp_path: Path, folder: str, protocol: int) -> None:
    images = pixels(4, 3, 32, 32)
    write_batch(tmp_path / folder / "test_batch", images, [9, 0, 3, 3], protocol=protocol)
    assert_holds(load_dataset("cifar10", tmp_path), images, [9, 0, 3, 3])


def test_cifar10_train_is_its_five_batches_in_order(tmp_path: Path) -> None:
    parts = [pixels(2, 3, 32, 32, seed=i) for i in range(5)]
    for i, part in enumerate(parts):
        write_batch(tmp_path / "cifar-10-batches-py" / f"data_batch_{i + 1}", part, [i, i + 5])
    assert_holds(load_dataset("cifar10", tmp_path, "train"), np.concatenate(parts), [0, 5, 1, 6, 2, 7, 3, 8, 4, 9])


def test_cifar_batches_written_by_python_2_are_read(tmp_path: Path) -> None:
    images = pixels(1, 3, 32, 32)
    content = images.tobytes()
    # protocol 2 as Python 2 spelt it: strings without an encoding, the module names of numpy 1
    batch = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        b"K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
        b"K\x00tb\x89T" + struct.pack("<i", len(content)) + content + b"tbU\x06labels]K\x07au."
    )
    (tmp_path / "test_batch").write_bytes(batch)
    assert_holds(load_dataset("cifar10", tmp_path), images, [7])


def test_cifar_arrays_in_other_memory_orders_are_read(tmp_path: Path) -> None:
    images = pixels(3, 3, 32, 32)
    batch = {"data": np.asfortranarray(images.reshape(3, -1)), "labels": np.array([1, 2, 3], ">i8")}
    for protocol in (2, 5):
        (tmp_path / "test_batch").write_bytes(pickle.dumps(batch, protocol=protocol))
        assert_holds(load_dataset("cifar10", tmp_path), images, [1, 2, 3])


@pytest.mark.parametrize("folder", ["cifar-100-python", "."])
def test_cifar100_round_trip(tmp_path: Path, folder: str) -> None:
    for seed, split in enumerate(("train", "test")):
        images = pixels(2, 3, 32, 32, seed=seed)
        write_batch(tmp_path / folder / split, images, [99, seed], key="fine_labels")
        assert_holds(load_dataset("cifar100", tmp_path, split), images, [99, seed])


class RunsCode:
    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.target),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path, protocol: int) -> None:
    target = tmp_path / "was-run"
    bomb = pickle.dumps({"data": RunsCode(target), "labels": [0]}, protocol=protocol)
    pickle.loads(bomb)
    assert target.exists()  # the pickle does do harm to an ordinary reader
    target.unlink()
    (tmp_path / "test_batch").write_bytes(bomb)
    sentence = refusal(lambda: load_dataset("cifar10", tmp_path))
    assert f"{tmp_path / 'test_batch'} is refused: reading it would run " in sentence
    assert not target.exists()


def test_a_pickle_cannot_reach_builtins_by_dotted_names(tmp_path: Path) -> None:
    for code in (
        b"cbuiltins\neval\n(V1+1\ntR.",
        b"(V1+1\nibuiltins\neval\n.",
        b"cnumpy\nndarray.fromfile\n(V/\ntR.",
    ):
        (tmp_path / "test_batch").write_bytes(code)
        assert "is refused: reading it would run " in refusal(lambda: load_dataset("cifar10", tmp_path))


def test_what_numpy_would_do_for_a_pickle_is_not_done(tmp_path: Path) -> None:
    """An array of 2**62 bytes, or of Python objects, is a record that fails its check and takes no memory."""
    reconstruct = b"cnumpy.core.multiarray\n_reconstruct\n"
    huge = b"}(Vdata\n" + reconstruct + b"(cnumpy\nndarray\n(I4611686018427387904\ntS'b'\ntRVlabels\n(lu."
    (tmp_path / "test_batch").write_bytes(huge)
    assert "its arrays cannot be read" in refusal(lambda: load_dataset("cifar10", tmp_path))
    objects = {"data": np.array([[None]], object), "labels": [0]}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(objects, protocol=2))
    assert "its arrays cannot be read" in refusal(lambda: load_dataset("cifar10", tmp_path))
    array = b"(NNNtR(I1\n(I1\ntcnumpy\ndtype\n(Vu1\ntR(I3\nV|\ntbI00\nI9\ntb"
    number_for_bytes = b"}(Vdata\n" + reconstruct + array + b"Vlabels\n(lu."
    (tmp_path / "test_batch").write_bytes(number_for_bytes)
    assert "an array without bytes" in refusal(lambda: load_dataset("cifar10", tmp_path))
    memo_bomb = b"\x80\x02}r" + struct.pack("<I", 2**31 - 1) + b"."
    (tmp_path / "test_batch").write_bytes(memo_bomb)
    assert "not a readable python batch" in refusal(lambda: load_dataset("cifar10", tmp_path))


def test_damaged_cifar_batches_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "test_batch"
    write_batch(path, pixels(2, 3, 32, 32), [0, 1])
    whole = path.read_bytes()
    for damaged in (b"", b"hello", whole[:100], whole[:-10]):
        path.write_bytes(damaged)
        assert f"{path} is not a readable python batch" in refusal(lambda: load_dataset("cifar10", tmp_path))
    path.write_bytes(pickle.dumps([1, 2]))
    assert "it holds a list, not a dictionary" in refusal(lambda: load_dataset("cifar10", tmp_path))
    write_batch(path, pixels(2, 3, 32, 32), [0, 1], key="fine_labels")
    assert "it has no 'labels'" in refusal(lambda: load_dataset("cifar10", tmp_path))
    write_batch(path, pixels(2, 3, 16, 16), [0, 1])
    assert "uint8 of shape (2, 768), expected uint8 of shape (N, 3072)" in refusal(
        lambda: load_dataset("cifar10", tmp_path)
    )
    write_batch(path, pixels(2, 3, 32, 32), [0, 10])
    assert "the label 10, outside 0..9" in refusal(lambda: load_dataset("cifar10", tmp_path))
    write_batch(path, pixels(2, 3, 32, 32), [0, -1])
    assert "the label -1, outside 0..9" in refusal(lambda: load_dataset("cifar10", tmp_path))
    write_batch(path, pixels(2, 3, 32, 32), [0, 1.5])
    assert "neither an array nor a list of integers" in refusal(lambda: load_dataset("cifar10", tmp_path))


# SVHN


@pytest.mark.parametrize("folder", ["SVHN", "."])
def test_svhn_round_trip_calls_ten_zero(tmp_path: Path, folder: str) -> None:
    images = pixels(3, 3, 32, 32)
    write_mat(tmp_path / folder / "test_32x32.mat", images, [10, 1, 9])
    assert_holds(load_dataset("svhn", tmp_path), images, [0, 1, 9])


def test_damaged_svhn_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "test_32x32.mat"
    write_mat(path, pixels(3, 3, 32, 32), [10, 11, 1])
    assert "gives image 1 the label 11, outside 0..9" in refusal(lambda: load_dataset("svhn", tmp_path))
    path.write_bytes(path.read_bytes()[:-500])
    assert f"{path} is not a readable SVHN file" in refusal(lambda: load_dataset("svhn", tmp_path))
    path.write_bytes(b"")
    assert f"{path} is not a readable SVHN file" in refusal(lambda: load_dataset("svhn", tmp_path))
    write_mat(path, pixels(3, 3, 16, 16), [1, 2, 3])
    assert "expected (3, 32, 32)" in refusal(lambda: load_dataset("svhn", tmp_path))


@pytest.mark.parametrize(
    ("name", "module", "file"),
    [("svhn", "scipy.io", "test_32x32.mat"), ("folder", "PIL.Image", "test/cat/1.png")],
)
def test_a_missing_reader_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, file: str
) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    sentence = refusal(lambda: load_dataset(name, tmp_path))
    assert f"needs {module}: pip install 'ssdkd[data]'" in sentence


# Folders of pictures


@pytest.mark.parametrize("place", ["test", "val", "."])
def test_folder_round_trip(tmp_path: Path, place: str) -> None:
    images = pixels(3, 6, 5, 3)
    write_picture(tmp_path / place / "dog" / "a.png", images[2])
    write_picture(tmp_path / place / "cat" / "b.BMP", images[1])
    write_picture(tmp_path / place / "cat" / "a.png", images[0])
    (tmp_path / place / "cat" / "notes.txt").write_text("not a picture")
    (tmp_path / place / ".cache").mkdir()
    loaded = load_dataset("folder", tmp_path)
    assert_holds(loaded, images.transpose(0, 3, 1, 2), [0, 0, 1])
    assert loaded.spec == dataset_spec("folder", tmp_path)
    assert loaded.spec.class_names == ("cat", "dog")
    assert (loaded.spec.height, loaded.spec.width) == (6, 5)
    assert (loaded.spec.mean, loaded.spec.std) == ((0.5,) * 3, (0.25,) * 3)


def test_both_splits_of_a_folder_share_labels_and_shape(tmp_path: Path) -> None:
    write_picture(tmp_path / "train" / "cat" / "1.png", pixels(9, 9))
    write_picture(tmp_path / "train" / "ant" / "1.png", pixels(9, 9))
    write_picture(tmp_path / "test" / "cat" / "1.png", pixels(4, 4))
    train, test = (load_dataset("folder", tmp_path, split) for split in ("train", "test"))
    assert train.spec == test.spec
    assert test.labels.tolist() == [1]  # "cat", though "ant" has no test image
    assert train.images.shape == (2, 1, 4, 4)


def test_classes_may_be_called_like_splits(tmp_path: Path) -> None:
    for name in ("train", "bus"):
        write_picture(tmp_path / name / "1.png", pixels(4, 4))
    loaded = load_dataset("folder", tmp_path)
    assert (loaded.labels.tolist(), loaded.spec.class_names) == ([0, 1], ("bus", "train"))


def test_splits_whose_pictures_are_in_no_class_are_not_taken_for_classes(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write_picture(tmp_path / name / "1.png", pixels(4, 4))
    assert "put the images of each class in a folder of its own" in refusal(lambda: load_dataset("folder", tmp_path))


def test_pictures_of_other_sizes_and_colours_become_like_the_first(tmp_path: Path) -> None:
    write_picture(tmp_path / "a" / "1.png", np.full((8, 8, 3), 7, np.uint8))
    write_picture(tmp_path / "a" / "2.png", np.full((16, 32), 200, np.uint8))
    striped = np.zeros((8, 24, 3), np.uint8)
    striped[:, 8:16] = 255
    write_picture(tmp_path / "a" / "3.png", striped)
    loaded = load_dataset("folder", tmp_path)
    assert loaded.images.shape == (3, 3, 8, 8)
    assert loaded.images[1].unique().tolist() == [200]
    assert loaded.images[2].unique().tolist() == [255]  # the centre is kept


def test_a_limit_on_a_folder_decodes_no_other_picture(tmp_path: Path) -> None:
    for i in range(10):
        write_picture(tmp_path / "a" / f"{i}.png", np.full((2, 2), i, np.uint8))
    kept = load_dataset("folder", tmp_path, limit=4).images[:, 0, 0, 0].tolist()
    assert len(kept) == 4
    for i in set(range(1, 10)) - set(kept):
        (tmp_path / "a" / f"{i}.png").write_bytes(b"damaged")
    assert load_dataset("folder", tmp_path, limit=4).images[:, 0, 0, 0].tolist() == kept
    assert "is not a readable png, jpg or bmp" in refusal(lambda: load_dataset("folder", tmp_path))


def test_symbolic_links_in_a_folder_are_followed(tmp_path: Path) -> None:
    write_picture(tmp_path / "elsewhere" / "1.png", pixels(3, 3))
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / "1.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    assert_holds(load_dataset("folder", tmp_path / "set"), pixels(1, 1, 3, 3), [0])


def test_folders_without_classes_or_images_are_refused(tmp_path: Path) -> None:
    sentence = refusal(lambda: load_dataset("folder", tmp_path))
    assert f"found no class folders in {tmp_path / 'test'}, {tmp_path / 'val'}" in sentence
    (tmp_path / "train" / "a").mkdir(parents=True)
    assert "hold no .png, .jpg" in refusal(lambda: load_dataset("folder", tmp_path, "train"))
    write_picture(tmp_path / "train" / "a" / "1.png", pixels(3, 3))
    sentence = refusal(lambda: load_dataset("folder", tmp_path))
    assert f"no class folders for split 'test' in {tmp_path / 'test'} or {tmp_path / 'val'}" in sentence


@pytest.mark.parametrize("name", ["2.webp", "2.TIFF"])
def test_pictures_of_a_kind_that_is_not_read_are_not_passed_over(tmp_path: Path, name: str) -> None:
    write_picture(tmp_path / "a" / "1.png", pixels(3, 3))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / name).write_bytes(b"a picture")
    assert f"{tmp_path / 'b' / name} is a picture of a kind" in refusal(lambda: load_dataset("folder", tmp_path))


def absurd_png(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its body does not have."""
    stream = io.BytesIO()
    Image.new("L", (1, 1)).save(stream, "PNG")
    content = bytearray(stream.getvalue())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


@pytest.mark.parametrize("side", [9_000, 11_000, 60_000])  # beyond our bound, Pillow's warning, Pillow's error
def test_a_picture_of_absurd_size_is_refused(tmp_path: Path, side: int) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(absurd_png(side, side))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sentence = refusal(lambda: load_dataset("folder", tmp_path))
    assert f"{tmp_path / 'a' / '1.png'} claims " in sentence
    assert "remove it or make it smaller" in sentence


def test_pictures_of_more_than_eight_bits_are_refused(tmp_path: Path) -> None:
    write_picture(tmp_path / "a" / "1.png", np.full((4, 4), 60_000, np.uint16))
    assert "more than 8 bits per channel" in refusal(lambda: load_dataset("folder", tmp_path))


# npz


@pytest.mark.parametrize("keys", [("images", "labels"), ("x_test", "y_test"), ("test_images", "test_labels")])
@pytest.mark.parametrize("zipped", [False, True])
def test_npz_round_trip(tmp_path: Path, keys: tuple[str, str], zipped: bool) -> None:
    images = pixels(3, 7, 6)
    save: Callable[..., None] = np.savez_compressed if zipped else np.savez
    save(tmp_path / "set.npz", **{keys[0]: images, keys[1]: np.array([2, 0, 1], np.uint8)})
    loaded = load_dataset("npz", tmp_path / "set.npz")
    assert_holds(loaded, images[:, None], [2, 0, 1])
    assert loaded.spec == dataset_spec("npz", tmp_path / "set.npz")
    assert loaded.spec.num_classes == 3


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_channels_may_be_first_or_last(tmp_path: Path, channels: int, order: Any) -> None:
    images = pixels(2, channels, 8, 6)
    for layout in (images, images.transpose(0, 2, 3, 1)):
        np.savez(tmp_path / "set.npz", images=np.asarray(layout, order=order), labels=np.array([0, 1]))
        assert_holds(load_dataset("npz", tmp_path / "set.npz"), images, [0, 1])


def test_npz_as_keras_stores_it_has_both_splits(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {
        "x_train": pixels(3, 8, 8, 3),
        "y_train": np.array([[0], [4], [1]]),
        "x_test": pixels(2, 8, 8, 3, seed=1),
        "y_test": np.array([[1], [2]]),
    }
    np.savez(tmp_path / "set.npz", **arrays)
    train, test = (load_dataset("npz", tmp_path / "set.npz", split) for split in ("train", "test"))
    assert_holds(train, arrays["x_train"].transpose(0, 3, 1, 2), [0, 4, 1])
    assert_holds(test, arrays["x_test"].transpose(0, 3, 1, 2), [1, 2])
    assert train.spec == test.spec
    assert test.spec.num_classes == 5


def test_npz_class_names_count_classes_without_an_image(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, images=pixels(1, 8, 8), labels=np.array([0]), class_names=np.array(["no", "yes", "perhaps"]))
    assert dataset_spec("npz", path).class_names == ("no", "yes", "perhaps")


def test_an_npz_of_one_set_is_never_also_a_train_split(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", images=pixels(1, 8, 8), labels=np.array([0]))
    sentence = refusal(lambda: load_dataset("npz", tmp_path / "set.npz", "train"))
    assert "no split 'train': add the arrays x_train + y_train" in sentence


def test_npz_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"

    def refused(**arrays: Any) -> str:
        np.savez(path, **arrays)
        return refusal(lambda: load_dataset("npz", path))

    labels = np.array([0, 1])
    assert "images is float32, expected uint8" in refused(images=np.zeros((2, 8, 8), np.float32), labels=labels)
    assert "images has shape (2, 8)" in refused(images=pixels(2, 8), labels=labels)
    assert "images has shape (2, 3, 8, 3)" in refused(images=pixels(2, 3, 8, 3), labels=labels)
    assert "labels is float64" in refused(images=pixels(2, 8, 8), labels=np.array([0.0, 1.0]))
    assert "holds 3 images but 2 labels" in refused(images=pixels(3, 8, 8), labels=labels)
    assert "the label -1, outside 0..1" in refused(images=pixels(2, 8, 8), labels=np.array([1, -1]))
    assert "holds Python objects" in refused(images=pixels(1, 8, 8), labels=np.array([None], object))
    assert "holds other: name its arrays as one of the pairs" in refused(other=labels)
    path.write_bytes(b"not a zip")
    assert f"{path} is not an npz file" in refusal(lambda: load_dataset("npz", path))
    assert "is not a file: give the .npz file itself" in refusal(lambda: load_dataset("npz", tmp_path))


def npz_with(path: Path, header: dict[str, Any], body: bytes) -> None:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, header)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", stream.getvalue() + body)
        labels = io.BytesIO()
        np.save(labels, np.array([0]))
        archive.writestr("labels.npy", labels.getvalue())


def test_npz_headers_are_checked_before_memory_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "set.npz"
    header = {"descr": "|u1", "fortran_order": False, "shape": (2**40, 8, 8)}
    npz_with(path, header, bytes(64))
    assert f"says shape {header['shape']}" in refusal(lambda: load_dataset("npz", path))
    npz_with(path, {**header, "shape": (-1, -8, 8)}, bytes(64))
    assert "says shape (-1, -8, 8)" in refusal(lambda: load_dataset("npz", path))
    monkeypatch.setattr(data, "_read_up_to", lambda *_: pytest.fail("read a bomb"))
    monkeypatch.setattr(data, "SMALL_BYTES", 2**16)
    npz_with(path, {**header, "shape": (2**14, 8, 8)}, bytes(2**20))
    assert "times its size, the bound is 200" in refusal(lambda: load_dataset("npz", path))
    monkeypatch.setattr(data, "MAX_BYTES", 2**19)
    assert "above the bound of" in refusal(lambda: load_dataset("npz", path))


def test_a_flipped_byte_in_an_npz_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, images=pixels(4, 8, 8), labels=np.arange(4))
    content = bytearray(path.read_bytes())
    content[content.index(pixels(4, 8, 8).tobytes()) + 5] ^= 1
    path.write_bytes(content)
    assert f"{path} is damaged" in refusal(lambda: load_dataset("npz", path))


# The digits in the package


def test_digits_come_without_a_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "digits.npz"
    monkeypatch.setitem(data._DATASETS, "digits", replace(data._DATASETS["digits"], home=home))
    assert "is missing from the installation" in refusal(lambda: load_dataset("digits", None))
    images = pixels(3, 8, 8)
    np.savez_compressed(home, test_images=images, test_labels=np.array([3, 1, 4]))
    assert_holds(load_dataset("digits", None), images[:, None], [3, 1, 4])
    assert load_dataset("digits", None).spec == dataset_spec("digits")
    assert "digits has no split 'train', only 'test'" in refusal(lambda: load_dataset("digits", None, "train"))
