"""Labelled image sets: read from disk, checked, and handed over whole as uint8 tensors.

They measure a student and train teachers; no student ever learns from them. Nothing is downloaded, and
nothing in a file is executed: a pickle is read as a record of what it asks for. Every size that a file states
is checked before memory is taken for it.

| name | files under ROOT | splits |
| --- | --- | --- |
| mnist, fashion_mnist | MNIST/raw, FashionMNIST/raw or ROOT itself: IDX files, .gz or not | train, test |
| cifar10, cifar100 | cifar-10-batches-py, cifar-100-python or ROOT itself: the python batches | train, test |
| svhn | SVHN or ROOT itself: train_32x32.mat, test_32x32.mat | train, test |
| folder | train/CLASS/*.png; test/, val/ or ROOT itself with CLASS/*.png (or jpg, jpeg, bmp) | train, test |
| npz | ROOT is the file; images + labels, or x_test + y_test, x_train + y_train | train, test |
| digits | none: it comes with the package | test |

A new set is one function under `@register_dataset(name, spec)`.
"""

from __future__ import annotations

import gzip
import importlib
import io
import math
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from ssdkd.errors import DataError, in_short
from ssdkd.files import expanded

MAX_BYTES = 4 * 2**30  # the most that one array read here may take in memory
MAX_PIXELS = 2**26  # the largest single picture worth decoding
MAX_EXPANSION = 200  # how far a compressed archive may grow ...
SMALL_BYTES = 64 * 2**20  # ... once it grows beyond what no machine minds
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
OTHER_SUFFIXES = (".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jfif", ".heic", ".avif")  # of pictures, too


@dataclass(frozen=True)
class ImageSpec:
    """What a network of this task takes and gives."""

    channels: int
    height: int
    width: int
    num_classes: int
    # normalisation of pixels in [0, 1], one number per channel
    mean: tuple[float, ...]
    std: tuple[float, ...]
    # mirror images keep their class (false for digits)
    flip: bool
    # one name per class, in label order
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != self.channels or len(self.std) != self.channels or min(self.std) <= 0:
            raise DataError(
                f"mean {self.mean} and std {self.std} do not normalise {self.channels} channel(s): "
                "give one number per channel, each std above 0"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.channels, self.height, self.width

    def normalisation(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Mean and std as tensors (1, C, 1, 1), which fit images (N, C, H, W)."""
        mean, std = (torch.tensor(of, device=device).view(1, -1, 1, 1) for of in (self.mean, self.std))
        return mean, std


def plain_spec(channels: int, height: int, width: int, class_names: tuple[str, ...]) -> ImageSpec:
    """Of images of which nothing more is known: normalised from grey, not to be mirrored."""
    mean, std = (0.5,) * channels, (0.25,) * channels
    return ImageSpec(channels, height, width, len(class_names), mean, std, False, class_names)


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """A whole set in memory: `images` (N, C, H, W) uint8, `labels` (N,) int64, and what they are."""

    images: Tensor
    labels: Tensor
    spec: ImageSpec


Reader = Callable[[Path, str, ImageSpec, "int | None"], LabelledImages]


@dataclass(frozen=True)
class _Dataset:
    read: Reader
    # a function of the root where only the files can tell
    spec: ImageSpec | Callable[[Path], ImageSpec]
    splits: tuple[str, ...]
    # where the files are when they come with the package
    home: Path | None


_DATASETS: dict[str, _Dataset] = {}


def register_dataset(
    name: str,
    spec: ImageSpec | Callable[[Path], ImageSpec],
    *,
    splits: tuple[str, ...] = ("train", "test"),
    home: Path | None = None,
) -> Callable[[Reader], Reader]:
    """Make `name` loadable: decorates `read(root, split, spec, limit) -> LabelledImages`.

    `spec` is a constant, or a function of the root where only the files can tell. `limit` is for readers that
    save work by it; `load_dataset` applies it to every set.
    """

    def register(read: Reader) -> Reader:
        _DATASETS[name] = _Dataset(read, spec, splits, home)
        return read

    return register


def available_datasets() -> list[str]:
    """The names that `load_dataset` knows, sorted."""
    return sorted(_DATASETS)


def dataset_spec(name: str, root: str | Path | None = None) -> ImageSpec:
    """What set `name` holds; `folder` and `npz` need their `root`, the standard sets read no file."""
    dataset = _known(name)
    if isinstance(dataset.spec, ImageSpec):
        return dataset.spec
    try:
        return dataset.spec(_existing_root(name, dataset, root))
    except OSError as error:
        raise _unreadable(name, error) from error


def says_normalisation(name: str) -> bool:
    """Whether the name of a set tells how its pixels are normalised; of `folder` and `npz` nobody knows."""
    return isinstance(_known(name).spec, ImageSpec)


def load_dataset(
    name: str, root: str | Path | None, split: str = "test", *, limit: int | None = None
) -> LabelledImages:
    """Read one split of set `name` whole.

    `root` is the folder that holds its files (for `npz` the file; for `digits` it is not used). `limit` keeps
    that many images, drawn from all over the set and always the same ones, in the order of the set: the first
    ones of a set sorted by class would be of one class.
    """
    dataset = _known(name)
    if split not in dataset.splits:
        raise DataError(f"{name} has no split '{split}', only {' and '.join(map(repr, dataset.splits))}")
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} leaves no image of {name}: use 1 or more, or no limit")
    place = _existing_root(name, dataset, root)
    try:
        spec = dataset.spec if isinstance(dataset.spec, ImageSpec) else dataset.spec(place)
        data = dataset.read(place, split, spec, limit)
    except OSError as error:
        raise _unreadable(name, error) from error
    except MemoryError as error:
        raise DataError(f"{name} in {place} does not fit in memory: use a limit") from error
    rows = _rows_within(len(data.labels), limit)
    if len(rows) == len(data.labels):
        return data
    return LabelledImages(data.images[rows], data.labels[rows], spec)


def require_same_task(data: ImageSpec, num_classes: int, channels: int) -> None:
    """Raise DataError where images of `data` cannot be put to a teacher of `num_classes` and `channels`."""
    differences = []
    if data.num_classes != num_classes:
        differences.append(f"{data.num_classes} classes where the teacher has {num_classes}")
    if data.channels != channels:
        differences.append(f"{data.channels} image channel(s) where the teacher takes {channels}")
    if differences:
        without_images = ""
        if data.num_classes < num_classes:
            without_images = ", or name the classes that it has no image of (class_names of an npz, empty folders)"
        raise DataError(
            f"the evaluation set does not fit the teacher, it has {' and '.join(differences)}: "
            f"choose the set the teacher was trained for{without_images}"
        )


# ----------------------------------------------------------------------------------------------------
# Shared by the readers
# ----------------------------------------------------------------------------------------------------


def _known(name: str) -> _Dataset:
    if name in _DATASETS:
        return _DATASETS[name]
    nearest = get_close_matches(name.lower(), available_datasets(), n=1, cutoff=0.5)
    guess = f"did you mean '{nearest[0]}'? " if nearest else ""
    raise DataError(f"there is no data set '{name}': {guess}known are {', '.join(available_datasets())}")


def _existing_root(name: str, dataset: _Dataset, root: str | Path | None) -> Path:
    if dataset.home is not None:
        return dataset.home
    if root is None:
        raise DataError(
            f"{name} is read from disk: say in which folder (for npz, which file) it is, by data_root or --data-root"
        )
    place = expanded(root)
    if not place.exists():
        raise DataError(f"{name}: {place} does not exist; nothing is downloaded, so give the place where the files are")
    return place


def _unreadable(name: str, error: OSError) -> DataError:
    return DataError(f"{name}: cannot read {error.filename or 'its files'}: {error.strerror or error}")


def _find_file(name: str, folders: Sequence[Path], file_names: Sequence[str]) -> Path:
    for folder in folders:
        for file_name in file_names:
            if (folder / file_name).is_file():
                return folder / file_name
    raise DataError(
        f"{name}: found no file {' or '.join(file_names)} in {' or '.join(map(str, folders))}; "
        "nothing is downloaded, so put it there or give the folder that has it"
    )


def _read_up_to(stream: IO[bytes] | gzip.GzipFile, size: int) -> bytearray:
    """At most `size` bytes; memory follows the bytes that are there, whatever a header claims."""
    held = bytearray()
    while len(held) < size and (piece := stream.read(min(2**20, size - len(held)))):
        held += piece
    return held


def _refuse_too_large(path: Path, size: int) -> None:
    if size > MAX_BYTES:
        raise DataError(
            f"{path} asks for {size / 2**30:,.1f} GiB, above the bound of {MAX_BYTES / 2**30:.0f} GiB: "
            "the file is damaged, or make a smaller set"
        )


def _rows_within(count: int, limit: int | None) -> np.ndarray:
    """Indices (min(count, limit),) of the images that a limit keeps, rising, the same at every call."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, limit, replace=False))


def _checked(where: Path, images: np.ndarray, labels: np.ndarray, spec: ImageSpec) -> LabelledImages:
    """Images (N, C, H, W) uint8 with labels (N,) of any integer type, once they fit each other and `spec`."""
    if len(images) != len(labels):
        raise DataError(f"{where} holds {len(images)} images but {len(labels)} labels: copy the set again")
    if len(labels) == 0:
        raise DataError(f"{where} holds no image: give a set with at least one")
    if images.shape[1:] != spec.shape:
        raise DataError(
            f"{where} holds images of shape {tuple(images.shape[1:])} (channels, height, width), expected "
            f"{spec.shape}: it is another data set"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= spec.num_classes))
    if len(wrong):
        raise DataError(
            f"{where} gives image {wrong[0]} the label {labels[wrong[0]]}, outside "
            f"0..{spec.num_classes - 1}: the labels are damaged or of another data set"
        )
    return LabelledImages(
        torch.from_numpy(np.require(images, np.uint8, ["C", "W"])),
        torch.from_numpy(np.require(labels, np.int64, ["C", "W"])),
        spec,
    )


def _optional(module: str, reads: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"reading {reads} needs {module}: pip install 'ssdkd[data]'") from error


# ----------------------------------------------------------------------------------------------------
# MNIST and Fashion-MNIST: IDX
# ----------------------------------------------------------------------------------------------------

_DIGIT_NAMES = tuple("0123456789")
_FASHION_NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file, gzipped or not.

        00 00 08 D | D sizes, 4 bytes each, big-endian | one byte per element

    `dimensions` is the D it must have: 3 for images (N, H, W), 1 for labels (N,).
    """
    header_size = 4 + 4 * dimensions
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            header = bytes(_read_up_to(stream, header_size))
            if len(header) < header_size or header[:4] != bytes((0, 0, 8, dimensions)):
                kind = "images" if dimensions == 3 else "labels"
                raise DataError(f"{path} is not an IDX file of {kind}: its first bytes are {header[:4].hex(' ')}")
            shape = struct.unpack(f">{dimensions}I", header[4:])
            promised = math.prod(shape)
            _refuse_too_large(path, promised)
            body = _read_up_to(stream, promised + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is a damaged gzip file ({in_short(error)}): copy it again") from error
    if len(body) != promised:
        one = max(1, math.prod(shape[1:]))
        held = "more" if len(body) > promised else f"{len(body) // one} ({len(body)} bytes)"
        raise DataError(
            f"{path} is damaged: its header says {shape[0]} items of {one} byte(s) but it holds {held}: copy it again"
        )
    return np.frombuffer(body, np.uint8).reshape(shape)


def _read_idx_pair(name: str, folder: str, root: Path, split: str, spec: ImageSpec) -> LabelledImages:
    folders = (root / folder / "raw", root)
    prefix = {"train": "train", "test": "t10k"}[split]

    def find(stem: str) -> Path:
        return _find_file(name, folders, (f"{prefix}-{stem}", f"{prefix}-{stem}.gz"))

    image_file, label_file = find("images-idx3-ubyte"), find("labels-idx1-ubyte")
    images, labels = _read_idx(image_file, 3), _read_idx(label_file, 1)
    return _checked(image_file, images[:, None], labels, spec)


@register_dataset("mnist", ImageSpec(1, 28, 28, 10, (0.1307,), (0.3081,), False, _DIGIT_NAMES))
def _read_mnist(root: Path, split: str, spec: ImageSpec, limit: int | None) -> LabelledImages:
    return _read_idx_pair("mnist", "MNIST", root, split, spec)


@register_dataset("fashion_mnist", ImageSpec(1, 28, 28, 10, (0.2860,), (0.3530,), True, _FASHION_NAMES))
def _read_fashion_mnist(root: Path, split: str, spec: ImageSpec, limit: int | None) -> LabelledImages:
    return _read_idx_pair("fashion_mnist", "FashionMNIST", root, split, spec)


# ----------------------------------------------------------------------------------------------------
# CIFAR: python batches
# ----------------------------------------------------------------------------------------------------

_CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR100_NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal
shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank
telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""

# What a pickled numpy array asks for, under the names of numpy 1 and 2, and how old protocols spell bytes.
_PICKLE_NAMES = {
    "numpy.core.multiarray._reconstruct": "reconstruct",
    "numpy._core.multiarray._reconstruct": "reconstruct",
    "numpy.core.numeric._frombuffer": "frombuffer",
    "numpy._core.numeric._frombuffer": "frombuffer",
    "numpy.ndarray": "ndarray",
    "numpy.dtype": "dtype",
    "_codecs.encode": "encode",
}


class _Record:
    """A call that a pickle asks for, written down instead of made."""

    def __init__(self, name: str, arguments: tuple[Any, ...] = ()) -> None:
        self.name = name
        self.arguments = arguments
        self.state: Any = None

    def __call__(self, *arguments: Any) -> _Record:
        return _Record(self.name, arguments)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _RecordingUnpickler(pickle.Unpickler):
    """Reads plain containers, numbers and strings; names become records, and no other name may appear."""

    def __init__(self, payload: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(payload), encoding="bytes")  # strings of Python 2 are bytes
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        known = _PICKLE_NAMES.get(f"{module}.{name}")
        if known is None:
            asked = ascii(f"{module}.{name}")[:80]
            raise DataError(
                f"{self.path} is refused: reading it would run {asked}, which no image batch needs: get "
                "the set from its original source (nothing in the file was run)"
            )
        return _Record(known)


def _read_batch(path: Path) -> dict[str, Any]:
    """The dictionary of a python batch, its arrays still records; nothing that the file names is run."""
    _refuse_too_large(path, path.stat().st_size)
    payload = path.read_bytes()
    try:
        for opcode, argument, _ in pickletools.genops(payload):
            # the unpickler takes memory for every slot up to the highest number it is told to remember
            if "PUT" in opcode.name and isinstance(argument, int) and argument > len(payload):
                raise ValueError("a memo number beyond the file")
        batch = _RecordingUnpickler(payload, path).load()
    except DataError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise DataError(f"{path} is not a readable python batch ({type(error).__name__}): copy it again") from error
    if not isinstance(batch, dict):
        raise DataError(f"{path} is not an image batch: it holds a {type(batch).__name__}, not a dictionary")
    return {_text(key): value for key, value in batch.items() if isinstance(key, str | bytes)}


def _text(value: str | bytes) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else value


def _array_of(value: Any) -> np.ndarray:
    """The integer array that a record, or a list of integers, stands for; ValueError for anything else."""
    if isinstance(value, list) and all(type(item) is int for item in value):
        return np.array(value, np.int64)
    if not isinstance(value, _Record):
        raise ValueError("neither an array nor a list of integers")
    if value.name == "frombuffer":  # protocol 5
        content, kind, shape, order = value.arguments
    elif value.name == "reconstruct":
        _, shape, kind, fortran, content = value.state
        order = "F" if fortran else "C"
    else:
        raise ValueError("not an array")
    if isinstance(content, _Record) and content.name == "encode":
        text, encoding = content.arguments
        if encoding not in ("latin1", b"latin1"):
            raise ValueError("bytes in an unknown encoding")
        content = _text(text).encode("latin1")
    if not isinstance(kind, _Record) or kind.name != "dtype":
        raise ValueError("an array without a type")
    if not isinstance(content, bytes | bytearray):
        raise ValueError("an array without bytes")
    code, byte_order = _text(kind.arguments[0]), _text(kind.state[1])
    if not re.fullmatch("[iu][1248]", code) or byte_order not in ("|", "<", ">"):
        raise ValueError("an array that is not of integers")
    return np.frombuffer(bytearray(content), np.dtype(byte_order + code)).reshape(
        shape, order="F" if _text(order) == "F" else "C"
    )


def _read_cifar(
    name: str, folder: str, file_names: Sequence[str], label_key: str, root: Path, spec: ImageSpec
) -> LabelledImages:
    pixels = math.prod(spec.shape)
    parts = []
    for file_name in file_names:
        path = _find_file(name, (root / folder, root), (file_name,))
        batch = _read_batch(path)
        missing = [key for key in ("data", label_key) if key not in batch]
        if missing:
            raise DataError(f"{path} is not a {name} batch: it has no {' and no '.join(map(repr, missing))}")
        try:
            images, labels = _array_of(batch["data"]), _array_of(batch[label_key])
        except Exception as error:  # records hold whatever the file put there
            raise DataError(
                f"{path} is damaged: its arrays cannot be read ({in_short(error)}): copy it again"
            ) from error
        if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != pixels or labels.ndim != 1:
            raise DataError(
                f"{path} is not a {name} batch: its data is {images.dtype} of shape {images.shape}, expected "
                f"uint8 of shape (N, {pixels})"
            )
        parts.append(_checked(path, images.reshape(-1, *spec.shape), labels, spec))
    if len(parts) == 1:
        return parts[0]
    return LabelledImages(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]), spec)


@register_dataset(
    "cifar10",
    ImageSpec(3, 32, 32, 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), True, _CIFAR10_NAMES),
)
def _read_cifar10(root: Path, split: str, spec: ImageSpec, limit: int | None) -> LabelledImages:
    file_names = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}[split]
    return _read_cifar("cifar10", "cifar-10-batches-py", file_names, "labels", root, spec)


@register_dataset(
    "cifar100",
    ImageSpec(3, 32, 32, 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), True, tuple(_CIFAR100_NAMES.split())),
)
def _read_cifar100(root: Path, split: str, spec: ImageSpec, limit: int | None) -> LabelledImages:
    return _read_cifar("cifar100", "cifar-100-python", [split], "fine_labels", root, spec)


# ----------------------------------------------------------------------------------------------------
# SVHN: MATLAB files
# ----------------------------------------------------------------------------------------------------


@register_dataset(
    "svhn",
    ImageSpec(3, 32, 32, 10, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), False, _DIGIT_NAMES),
)
def _read_svhn(root: Path, split: str, spec: ImageSpec, limit: int | None) -> LabelledImages:
    path = _find_file("svhn", (root / "SVHN", root), (f"{split}_32x32.mat",))
    matlab = _optional("scipy.io", f"{path.name} (a MATLAB file)")
    with path.open("rb") as stream:
        try:
            shapes = [shape for _, shape, _ in matlab.whosmat(stream)]
            _refuse_too_large(path, max(path.stat().st_size, *map(math.prod, shapes)))
            content = matlab.loadmat(stream, variable_names=("X", "y"))
            images, labels = content["X"], content["y"].reshape(-1)
        except (DataError, MemoryError):
            raise
        except Exception as error:  # a damaged file can fail in any way
            raise DataError(
                f"{path} is not a readable SVHN file with X and y ({type(error).__name__}): copy it again"
            ) from error
    if images.dtype != np.uint8 or images.ndim != 4 or labels.dtype.kind not in "iu":
        raise DataError(
            f"{path} is not an SVHN file: X is {images.dtype} of shape {images.shape}, y is {labels.dtype}, "
            "expected uint8 of shape (32, 32, 3, N) and integers"
        )
    labels = np.where(labels == 10, 0, labels)  # MATLAB counts from 1, so the file calls the digit 0 "10"
    return _checked(path, images.transpose(3, 2, 0, 1), labels, spec)


# ----------------------------------------------------------------------------------------------------
# A folder of pictures, one sub-folder per class
# ----------------------------------------------------------------------------------------------------

_SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val")}
_SPLITS = {"train", "test", "val", "valid", "validation"}  # pictures in these alone are in no class


def _class_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith((".", "__")))


def _image_files(folder: Path) -> list[Path]:
    files = sorted(f for f in folder.iterdir() if not f.name.startswith(".") and f.is_file())
    unread = next((f for f in files if f.suffix.lower() in OTHER_SUFFIXES), None)
    if unread is not None:  # without it, accuracy would be that of a part of the set
        raise DataError(f"{unread} is a picture of a kind that is not read: convert it to png or jpg, or remove it")
    return [f for f in files if f.suffix.lower() in IMAGE_SUFFIXES]


def _split_folder(root: Path, split: str) -> Path | None:
    """ROOT/train, or the first of ROOT/test, ROOT/val; ROOT itself is a test set if it has no splits."""
    split_folders = {
        name: next((root / f for f in names if _class_folders(root / f)), None)
        for name, names in _SPLIT_FOLDERS.items()
    }
    if not any(split_folders.values()) and split == "test" and not {f.name for f in _class_folders(root)} <= _SPLITS:
        return root
    return split_folders[split]


def _open_picture(path: Path, size: tuple[int, int] | None = None, channels: int | None = None) -> np.ndarray:
    """One picture as (C, H, W) uint8: as it is, or of `size` (width, height) and `channels`."""
    pil, fitting = _optional("PIL.Image", "image files"), _optional("PIL.ImageOps", "image files")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pil.DecompressionBombWarning)
            picture = pil.open(path, formats=("PNG", "JPEG", "BMP"))
        with picture:
            if math.prod(picture.size) > MAX_PIXELS:
                raise DataError(
                    f"{path} claims {picture.width} x {picture.height} pixels, above the bound of "
                    f"{MAX_PIXELS:,}: remove it or make it smaller"
                )
            if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
                raise DataError(f"{path} has more than 8 bits per channel: convert it to 8 bits")
            channels = channels or (1 if picture.mode in ("1", "L", "LA") else 3)
            picture = picture.convert({1: "L", 3: "RGB"}[channels])
            if size is not None and picture.size != size:
                picture = fitting.fit(picture, size, method=pil.Resampling.BILINEAR)
            pixels = np.asarray(picture)
    except DataError:
        raise
    except (pil.DecompressionBombWarning, pil.DecompressionBombError) as error:
        raise DataError(f"{path} claims an absurd size ({in_short(error)}): remove it or make it smaller") from error
    except Exception as error:  # a damaged picture can fail in any way
        raise DataError(
            f"{path} is not a readable png, jpg or bmp ({in_short(error)}): remove or replace it"
        ) from error
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _folder_spec(root: Path) -> ImageSpec:
    """Classes: the sub-folders of all splits, sorted by name. Channels and size: those of the first image."""
    present = [folder for split in ("test", "train") if (folder := _split_folder(root, split)) is not None]
    if not present:
        raise DataError(
            f"folder: found no class folders in {root / 'test'}, {root / 'val'}, {root / 'train'} or {root}: "
            "put the images of each class in a folder of its own there"
        )
    class_names = tuple(sorted({folder.name for place in present for folder in _class_folders(place)}))
    first = next((file for place in present for f in _class_folders(place) for file in _image_files(f)), None)
    if first is None:
        raise DataError(f"folder: the class folders in {present[0]} hold no {', '.join(IMAGE_SUFFIXES)} file")
    channels, height, width = _open_picture(first).shape
    return plain_spec(channels, height, width, class_names)


@register_dataset("folder", _folder_spec)
def _read_folder(root: Path, split: str, spec: ImageSpec, limit: int | None) -> LabelledImages:
    place = _split_folder(root, split)
    if place is None:
        looked = [str(root / folder) for folder in _SPLIT_FOLDERS[split]]
        raise DataError(f"folder: found no class folders for split '{split}' in {' or '.join(looked)}")
    number = {name: label for label, name in enumerate(spec.class_names)}
    files = [(file, number[folder.name]) for folder in _class_folders(place) for file in _image_files(folder)]
    chosen = [files[row] for row in _rows_within(len(files), limit)]
    shape = (len(chosen), *spec.shape)
    if math.prod(shape) > MAX_BYTES:
        raise DataError(
            f"{place} needs {math.prod(shape) / 2**30:,.1f} GiB as {spec.width} x {spec.height} images, "
            f"above the bound of {MAX_BYTES / 2**30:.0f} GiB: use a limit or make the images smaller"
        )
    images = np.empty(shape, np.uint8)
    for row, (file, _) in enumerate(chosen):
        images[row] = _open_picture(file, (spec.width, spec.height), spec.channels)
    return _checked(place, images, np.array([label for _, label in chosen], np.int64), spec)


# ----------------------------------------------------------------------------------------------------
# npz files, and the digits that come with the package
# ----------------------------------------------------------------------------------------------------

# The names of a split's images and labels. A file of one set is a test set: as both splits, it would
# let a teacher be tested on what it was trained on.
_NPZ_KEYS = {
    "train": (("x_train", "y_train"), ("train_images", "train_labels")),
    "test": (("images", "labels"), ("x_test", "y_test"), ("test_images", "test_labels")),
}


def _npz_names(path: Path) -> set[str]:
    if not path.is_file():
        raise DataError(f"npz: {path} is not a file: give the .npz file itself")
    try:
        with zipfile.ZipFile(path) as archive:
            return {name[: -len(".npy")] for name in archive.namelist() if name.endswith(".npy")}
    except OSError:
        raise
    except Exception as error:  # a damaged archive can fail in any way
        raise DataError(f"{path} is not an npz file ({in_short(error)}): write it with numpy.savez") from error


def _npz_arrays(path: Path, names: Sequence[str], *, values: bool = True) -> list[np.ndarray]:
    """The named arrays, once the sizes that the archive and each header state were found sane and equal.

    Without `values` only headers are read: the arrays have the right shape and type, and take no memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [archive.getinfo(f"{name}.npy") for name in names]
            total = sum(member.file_size for member in members)
            _refuse_too_large(path, total)
            packed = max(1, sum(member.compress_size for member in members))
            if total > SMALL_BYTES and total > MAX_EXPANSION * packed:
                raise DataError(
                    f"{path} would grow to {total // packed} times its size, the bound is {MAX_EXPANSION}: "
                    "get it from a source you trust, or write it uncompressed with numpy.savez"
                )
            arrays = []
            for member in members:
                with archive.open(member) as stream:
                    arrays.append(_read_npy(f"{path}: {member.filename}", stream, member.file_size, values))
            return arrays
    except (DataError, MemoryError):
        raise
    except Exception as error:  # a damaged archive can fail in any way
        raise DataError(f"{path} is damaged ({in_short(error)}): copy it again") from error


def _read_npy(where: str, stream: IO[bytes], size: int, values: bool) -> np.ndarray:
    """The array in an npy stream of `size` bytes, never by way of a pickle."""
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        shape, fortran, dtype = headers[np.lib.format.read_magic(stream)](stream)
    except (ValueError, KeyError) as error:
        raise DataError(f"{where} is not a plain array: write it with numpy.savez") from error
    if dtype.hasobject:
        raise DataError(f"{where} holds Python objects, which are refused: store numbers")
    promised, held = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if promised != held or min(shape, default=0) < 0:
        raise DataError(
            f"{where} is damaged, its header says shape {shape} ({promised} bytes) but it holds {held}: copy it again"
        )
    if not values:
        return np.broadcast_to(np.zeros((), dtype), shape)
    return np.frombuffer(_read_up_to(stream, promised), dtype).reshape(shape, order="F" if fortran else "C")


def _npz_labels(path: Path, key: str, labels: np.ndarray) -> np.ndarray:
    """Labels (N,); Keras stores (N, 1)."""
    if labels.dtype.kind not in "iu" or not (labels.ndim == 1 or (labels.ndim == 2 and labels.shape[1] == 1)):
        raise DataError(f"{path}: {key} is {labels.dtype} of shape {labels.shape}, expected integers of shape (N,)")
    return labels.reshape(-1)


def _channels_first(path: Path, key: str, images: np.ndarray) -> np.ndarray:
    """(N, H, W), (N, H, W, C) or (N, C, H, W) as (N, C, H, W); C is the axis of size 1 to 4."""
    if images.dtype != np.uint8:
        raise DataError(f"{path}: {key} is {images.dtype}, expected uint8 pixels in 0..255")
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4:
        first, last = 1 <= images.shape[1] <= 4, 1 <= images.shape[3] <= 4
        if first != last:
            return images if first else images.transpose(0, 3, 1, 2)
    raise DataError(
        f"{path}: {key} has shape {images.shape}, expected (N, H, W), (N, H, W, C) or (N, C, H, W) with C "
        "from 1 to 4 and the sides larger"
    )


def _npz_pair(path: Path, split: str) -> tuple[str, str] | None:
    names = _npz_names(path)
    return next((pair for pair in _NPZ_KEYS[split] if names.issuperset(pair)), None)


def _npz_spec(path: Path) -> ImageSpec:
    """Shape from the images; classes from `class_names` if the file has it, else from the largest label."""
    pairs = [pair for split in ("test", "train") if (pair := _npz_pair(path, split)) is not None]
    if not pairs:
        wanted = ", ".join(f"{images} + {labels}" for keys in _NPZ_KEYS.values() for images, labels in keys)
        present = ", ".join(sorted(_npz_names(path))) or "nothing"
        raise DataError(f"{path} holds {present}: name its arrays as one of the pairs {wanted}")
    key = pairs[0][0]
    (images,) = _npz_arrays(path, [key], values=False)
    _, channels, height, width = _channels_first(path, key, images).shape
    if "class_names" in _npz_names(path):
        (stored,) = _npz_arrays(path, ["class_names"])
        if stored.dtype.kind != "U" or stored.ndim != 1:
            raise DataError(f"{path}: class_names is {stored.dtype} of shape {stored.shape}, expected strings (C,)")
        try:
            class_names = tuple(map(str, stored))
        except (ValueError, SystemError) as error:  # code points that no character has
            raise DataError(f"{path}: class_names holds what is not text; write the names again.") from error
    else:
        label_keys = [key for _, key in pairs]
        arrays = _npz_arrays(path, label_keys)
        largest = max(int(_npz_labels(path, k, a).max(initial=0)) for k, a in zip(label_keys, arrays, strict=True))
        class_names = tuple(map(str, range(min(largest, 2**20) + 1)))
    return plain_spec(channels, height, width, class_names)


@register_dataset("npz", _npz_spec)
def _read_npz(path: Path, split: str, spec: ImageSpec, limit: int | None) -> LabelledImages:
    pair = _npz_pair(path, split)
    if pair is None:
        wanted = " or ".join(f"{images} + {labels}" for images, labels in _NPZ_KEYS[split])
        raise DataError(f"{path} has no split '{split}': add the arrays {wanted}")
    images, labels = _npz_arrays(path, pair)
    return _checked(path, _channels_first(path, pair[0], images), _npz_labels(path, pair[1], labels), spec)


@register_dataset(
    "digits",
    ImageSpec(1, 8, 8, 10, (0.3,), (0.37,), False, _DIGIT_NAMES),
    splits=("test",),
    home=Path(__file__).parent / "assets" / "digits.npz",
)
def _read_digits(path: Path, split: str, spec: ImageSpec, limit: int | None) -> LabelledImages:
    if not path.is_file():
        raise DataError(f"digits: {path} is missing from the installation: install ssdkd again")
    return _read_npz(path, split, spec, limit)
