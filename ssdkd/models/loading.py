"""Weights in and out of models, for files that nobody vouches for.

A file either fits the model completely or the model is left untouched, and no file gets to run code or to
claim more memory than its size justifies.
"""

import hashlib
import os
import pickle
import re
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssdkd.errors import CheckpointError, in_one_line
from ssdkd.files import read_safetensors, write_safetensors

_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
_WRAPPING_KEYS = ("state_dict", "model_state_dict", "model", "net")  # of tools, of PyTorch's tutorial, of scripts
_WRAPPERS = {"module", "_orig_mod"}  # of DataParallel and of torch.compile
_MOST_EXPANSION = 20
_NAMES_SHOWN = 3
_HOW_TO_RESAVE = (
    "re-save only the weights, where you trust the file: "
    "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Copy the weights of a file into `model`: names and shapes must agree exactly.

    Args:
        model: keeps its device and its number types; untouched if anything is wrong.
        path: `.safetensors`, or `.pth` / `.pt` / `.bin` / `.ckpt` / `.tar` as `torch.save` writes it: a state
            dict, or one under `state_dict`, `model_state_dict`, `model` or `net`, with or without a prefix that all
            names have, as `module.` of DataParallel or `model.` of a network inside another.

    Raises:
        CheckpointError: the file is missing, damaged, not finite, of another model, or needs to run code.
    """
    path = Path(path)
    read = _reader(path)
    try:
        found: Mapping[str, torch.Tensor] = read(path)
    except OSError as error:
        raise CheckpointError(f"weights file {path} cannot be read: {error.strerror or error}.") from error

    target = unwrapped(model)
    expected = {name: value for name, value in target.state_dict().items() if isinstance(value, torch.Tensor)}
    found = _without_prefix(found, expected)
    _refuse_mismatch(path, found, expected)
    # Counters that checkpoints before PyTorch 0.4.1 lack keep the model's value; evaluation never reads them.
    checked = {
        name: _fitting(path, name, found[name], value) if name in found else value for name, value in expected.items()
    }
    target.load_state_dict(checked, strict=False)  # names were compared above; only extra state may be absent


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the weights of `model` as safetensors: the file appears whole or not at all.

    Args:
        model: on any device; tensors that share memory are written once per name.
        path: must end in `.safetensors`; an existing file is replaced, missing folders are made.

    Raises:
        CheckpointError: the name or the disk does not allow it.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"weights cannot be saved as {path}: let the name end in .safetensors.")
    state = {name: value for name, value in unwrapped(model).state_dict().items() if isinstance(value, torch.Tensor)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(path, state, {"format": "pt"})
    except OSError as error:
        raise CheckpointError(f"weights cannot be saved as {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise CheckpointError(f"weights cannot be saved as {path}: {error}.") from error


def save_trained(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write weights that took long to come by: where `path` does not allow it, into a temporary folder.

    Raises:
        CheckpointError: as of `save_weights`; says where they are nevertheless, if anywhere.
    """
    try:
        save_weights(model, path)
    except CheckpointError as error:
        try:
            elsewhere = Path(tempfile.mkdtemp(prefix="ssdkd-")) / Path(path).name
            save_weights(model, elsewhere)
        except (OSError, CheckpointError):
            raise error from None
        raise CheckpointError(f"{str(error).rstrip('.')}; they were put into {elsewhere} instead.") from error


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """A digest of names and numbers, on whatever device and in whatever order these lie in memory."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _reader(path: Path) -> Callable[[Path], dict[str, torch.Tensor]]:
    if not path.exists():
        raise CheckpointError(f"weights file {path} does not exist: check the path.")
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file: give the path of a .safetensors or .pth file.")
    if path.stat().st_size == 0:
        raise CheckpointError(f"weights file {path} is empty: copy or download it again.")
    if path.suffix == ".safetensors":
        return _read_safetensors
    if path.suffix in _TORCH_SUFFIXES:
        return _read_torch
    raise CheckpointError(
        f"weights file {path} is of an unknown kind: give a .safetensors file, or a .pth or .pt file of torch.save."
    )


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    return read_safetensors(path, "weights file")[0]


def _read_torch(path: Path) -> dict[str, torch.Tensor]:
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04":
        _check_zip(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols and archives that are refused below anyway
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if start[:1] not in (b"P", b"\x80"):  # neither of the two formats of torch.save
            raise _unreadable(path) from error  # in whose words one had better run it nevertheless
        blamed = re.search(r"GLOBAL ([\w.]+)", str(error))
        wanted = f" ({blamed[1]})" if blamed else ""
        raise CheckpointError(
            f"weights file {path} was refused and nothing in it was run: it holds Python objects{wanted} "
            f"that only running code could rebuild; {_HOW_TO_RESAVE}."
        ) from error
    except OSError:
        raise
    except Exception as error:  # damage surfaces as RuntimeError, EOFError, KeyError, IndexError, ...
        raise _unreadable(path, error) from error
    return _state_dict_in(path, loaded)


def _unreadable(path: Path, error: BaseException | None = None) -> CheckpointError:
    why = f" ({in_one_line(error)})" if error is not None else ""
    return CheckpointError(
        f"weights file {path} is not of torch.save, or damaged or cut short{why}: copy or download it again."
    )


def _check_zip(path: Path) -> None:
    """`torch.save` does not compress, so an archive that unpacks to many times its size is a trap."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, struct.error) as error:
        raise _unreadable(path, error) from error
    size = path.stat().st_size
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > _MOST_EXPANSION * size:
        raise CheckpointError(
            f"weights file {path} was refused: its {size} bytes would unpack to {unpacked}, which torch.save "
            f"never does; {_HOW_TO_RESAVE}."
        )
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise CheckpointError(
            f"weights file {path} was refused and nothing in it was run: it is a TorchScript program, not "
            f"weights; {_HOW_TO_RESAVE}."
        )


def _state_dict_in(path: Path, loaded: Any) -> dict[str, torch.Tensor]:
    """The tensors by name, wherever in a checkpoint they are; anything else is refused."""
    if isinstance(loaded, Mapping):
        for key in _WRAPPING_KEYS:
            if isinstance(loaded.get(key), Mapping):
                return _state_dict_in(path, loaded[key])
    if not isinstance(loaded, Mapping) or not loaded:
        kind = "nothing" if isinstance(loaded, Mapping) else f"a {type(loaded).__name__}"
        raise CheckpointError(
            f"weights file {path} holds {kind}, not tensors by name: save model.state_dict() instead."
        )
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"weights file {path} has the entry {name!r}, a {type(value).__name__}, where only tensors "
                "by name belong: save model.state_dict() alone, or under 'state_dict'."
            )
    return {name: value for name, value in loaded.items() if not name.endswith("_extra_state")}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile and (Distributed)DataParallel, whose names carry no prefix."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _without_prefix(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """By the names of the model, where all in the file are within something: `module.`, `model.`, `net.backbone.`."""
    first = next(iter(found), "")
    parts = first.split(".")[:-1]
    prefixes = ["".join(f"{part}." for part in parts[:depth]) for depth in range(len(parts) + 1)]
    shared = [prefix for prefix in prefixes if all(name.startswith(prefix) for name in found)]
    wrapping = next(prefix for prefix in reversed(shared) if _WRAPPERS.issuperset(prefix.split(".")[:-1]))
    prefix = next((prefix for prefix in shared if first.removeprefix(prefix) in expected), wrapping)
    return {name.removeprefix(prefix): value for name, value in found.items()}


def _refuse_mismatch(path: Path, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    missing = [name for name in expected if name not in found and not name.endswith(".num_batches_tracked")]
    unexpected = [name for name in found if name not in expected]
    differing = [name for name in expected if name in found and found[name].shape != expected[name].shape]
    if not missing and not unexpected and not differing:
        return

    if not missing and not unexpected:
        classes = _differing_classes(differing, found, expected)
        if classes is not None:
            raise CheckpointError(
                f"weights file {path} is of a model with {classes[0]} classes, but the model here has "
                f"{classes[1]} (only {' and '.join(differing)} differ): set the number of "
                f"classes to {classes[0]}, or give the weights of a model with {classes[1]}."
            )
    shapes = [f"{name} {_shape(found[name])} instead of {_shape(expected[name])}" for name in differing]
    parts = [
        f"{len(items)} {what} ({_first_few(items)})"
        for what, items in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if items
    ]
    raise CheckpointError(
        f"weights file {path} is of another model, with {len(expected)} tensors expected: {', '.join(parts)}"
        "; check the model's name and its arguments."
    )


def _differing_classes(
    differing: Sequence[str], found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> tuple[int, int] | None:
    """(classes in the file, classes in the model) if nothing differs but the outputs of the last layer."""
    last_layer = next(name for name in reversed(list(expected)) if expected[name].ndim > 0).rpartition(".")[0]
    pairs = {
        (found[name].shape[:1], expected[name].shape[:1])
        if found[name].shape[1:] == expected[name].shape[1:] and name.rpartition(".")[0] == last_layer
        else None
        for name in differing
    }
    pair = pairs.pop()
    if pairs or pair is None or not pair[0] or not pair[1]:
        return None
    return pair[0][0], pair[1][0]


def _fitting(path: Path, name: str, found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The tensor with the number type of the model, if it holds plain finite numbers, or infinities as the model's."""
    plain = type(found) in (torch.Tensor, nn.Parameter) and found.layout == torch.strided
    if not plain or found.device.type != "cpu" or found.is_quantized or found.is_complex() != expected.is_complex():
        raise CheckpointError(
            f"weights file {path} holds {name} in a form that cannot be used ({found.dtype}, {found.layout}, "
            f"on {found.device.type}): save it as a dense tensor of the model's type."
        )
    converted = found.detach().to(expected.dtype)
    if not (converted.isfinite() | (converted == expected.to(converted.device))).all():  # as a mask may be
        raise CheckpointError(
            f"weights file {path} holds NaN or infinite numbers in {name}: training had diverged when it was "
            "saved, or it is damaged; give an earlier one."
        )
    return converted


def _first_few(items: Sequence[str]) -> str:
    shown = ", ".join(item[:120] for item in items[:_NAMES_SHOWN])
    return shown + (", ..." if len(items) > _NAMES_SHOWN else "")


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
