"""Everything that determines a run's future, in one file that is there whole or not at all.

    save(folder, engine.state_dict(), round_index=123)      # -> folder/round-00000123.safetensors
    state, path, warnings = load_newest(folder)

A state is a tree of dicts (with text or whole numbers as keys), lists and tuples; its leaves are tensors,
numpy arrays and scalars, int, float, bool, str and None. What comes back is the same to the last bit, with
the order of dicts and the memory order of tensors (in another one, convolutions may round differently), but
plain: a subclass of dict is a dict, a parameter is a tensor, and every tensor is on the CPU, where random
generators want their states; who needs one elsewhere moves it.

The file is a safetensors file: the tensors by number, the tree as JSON in its metadata, and a SHA-256 of all
of it, so that a single flipped bit is noticed. Nothing is ever unpickled. How a test lets the writing fail,
or the process die in the middle of it (`SSDKD_FAULT`), stands in `ssdkd.files`.

In the tree, null, true, "text", 12, 0.5 and lists stand for themselves; everything else is an object with one
key:

| object | stands for |
| --- | --- |
| {"dict": [[key, value], ...]} | a dict; keys are texts or numbers in the same spelling |
| {"tuple": [...]} | a tuple |
| {"tensor": "7"} | tensor 7 of the file |
| {"tensor": ["7", [0, 2, 3, 1]]} | the same, whose dimensions lie in memory in that order |
| {"complex": ...} | the same, for a tensor whose last axis is the real and the imaginary part |
| {"array": ...}, {"scalar": ...} | the same as a numpy array, as a numpy scalar |
| {"int": "-0x..."} | a whole number beyond 2^53 |
| {"float": "7ff0000000000000"} | the eight bytes of an infinity or NaN |
| {"text": "..."} | a text that UTF-8 cannot spell, in hexadecimal |
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from ssdkd.errors import CheckpointError
from ssdkd.files import read_safetensors, temporary_files, write_safetensors

VERSION = "7"
_DEEPEST = 64
_NAME = re.compile(r"round-([0-9]{8,18})\.safetensors")


def save(folder: Path, state: Any, round_index: int, keep: int = 3) -> Path:
    """Write `state` as the newest checkpoint of `folder`, then remove the older ones beyond the last `keep`.

    A folder belongs to one run. Checkpoints of later rounds are removed too: they are of a future that this
    run, taken up from before them, has left.

    Args:
        folder: made if missing, but not its parent: a run whose folder was deleted is over.
        state: a tree as the head of this module describes it.
        round_index: names the file.
        keep: at least 1, this one included.

    Returns:
        The file.

    Raises:
        CheckpointError: the disk does not allow it or the state holds something else; the older checkpoints
            are still there, and nothing that is only a part of this one.
    """
    if round_index < 0 or keep < 1:
        raise ValueError(f"round {round_index} with {keep} checkpoints to keep cannot be saved")
    path = folder / f"round-{round_index:08d}.safetensors"
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_encoded(state, "state", tensors, 0), separators=(",", ":"), allow_nan=False)
    metadata = {"ssdkd.checkpoint": VERSION, "ssdkd.tree": tree}
    try:
        folder.mkdir(exist_ok=True)
        for leftover in temporary_files(folder, "round-*"):
            leftover.unlink(missing_ok=True)  # first, for they may be what fills the disk
        write_safetensors(path, tensors, metadata, seal=True)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be saved: {error.strerror or error}; any earlier ones are still there."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path} cannot be saved: {error}.") from error
    with contextlib.suppress(OSError):  # the new one is safe, that is what counts
        others = [(index, other) for index, other in _checkpoints_in(folder) if other != path]
        earlier = [other for index, other in others if index < round_index]
        for other in earlier[keep - 1 :] + [other for index, other in others if index > round_index]:
            other.unlink()
    return path


def load(path: Path) -> Any:
    """The state in one checkpoint, its tensors on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, or not a checkpoint.
    """
    try:
        is_file = path.is_file()
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror or error}.") from error
    if not is_file:
        raise CheckpointError(f"checkpoint {path} does not exist or is not a file: check the path.")
    tensors, metadata = read_safetensors(path, "checkpoint", sealed=True)
    version = metadata.get("ssdkd.checkpoint")
    if version != VERSION:
        raise CheckpointError(
            f"checkpoint {path} is of format {str(version)[:20]!r}, this ssdkd reads {VERSION!r}: use the "
            "ssdkd that wrote it."
        )
    try:
        tree = json.loads(metadata["ssdkd.tree"], parse_int=_small_int, parse_constant=_refuse)
        state = _decoded(tree, tensors, 0)
        if tensors:
            _refuse("tensors that belong nowhere")
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, struct.error) as error:
        raise CheckpointError(f"checkpoint {path} holds no readable state: use another one.") from error
    except MemoryError as error:
        raise CheckpointError(f"checkpoint {path} does not fit in memory: free some.") from error
    return state


def load_newest(folder: Path) -> tuple[Any, Path, list[str]]:
    """The newest checkpoint in `folder` that is whole: its state, its file, a sentence for each newer one.

    Raises:
        CheckpointError: there is none.
    """
    warnings: list[str] = []
    try:
        found = _checkpoints_in(folder)
    except OSError as error:
        raise CheckpointError(f"no checkpoint can be read in {folder}: {error.strerror or error}.") from error
    for _, path in found:
        try:
            return load(path), path, warnings
        except CheckpointError as error:
            warnings.append(f"skipped a checkpoint: {error}")
    if not found:
        raise CheckpointError(f"there is no checkpoint in {folder}: start the run anew.")
    raise CheckpointError(
        f"none of the {len(found)} checkpoints in {folder} can be used: start the run anew; the newest one: "
        + warnings[0].removeprefix("skipped a checkpoint: ")
    )


def _checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    """Rounds and files, the newest first."""
    names = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(((int(match[1]), path) for match, path in names if match), reverse=True)


# ----------------------------------------------------------------------------------------------------
# A state as JSON and tensors
# ----------------------------------------------------------------------------------------------------


def _encoded(value: Any, where: str, tensors: dict[str, Tensor], depth: int) -> Any:
    """JSON for `value`, its tensors laid into `tensors`; `where` is what an error calls it."""
    if depth > _DEEPEST:
        raise CheckpointError(f"{where[:60]}... cannot be saved: it is nested more than {_DEEPEST} deep.")
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is str:
        return _encoded_text(value)
    if kind is int:
        return value if abs(value) <= 2**53 else {"int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
    if isinstance(value, Tensor):
        return _encoded_tensor(value, where, tensors)
    if kind is np.ndarray or isinstance(value, np.generic):
        try:
            shared = torch.from_numpy(np.array(value))
        except (TypeError, ValueError) as error:  # strings, objects, foreign byte order
            raise CheckpointError(f"{where} cannot be saved: a numpy {value.dtype} is not a number here.") from error
        return {"array" if kind is np.ndarray else "scalar": _encoded_tensor(shared, where, tensors)}
    if kind in (list, tuple):
        items = [_encoded(item, f"{where}[{index}]", tensors, depth + 1) for index, item in enumerate(value)]
        return items if kind is list else {"tuple": items}
    if isinstance(value, dict):
        pairs = []
        for key, item in value.items():
            if type(key) not in (str, int):
                raise CheckpointError(f"{where} cannot be saved: its key {key!r} is neither text nor whole number.")
            inner = _encoded(item, f"{where}[{key!r}]", tensors, depth + 1)
            pairs.append([_encoded(key, where, tensors, 0), inner])
        return {"dict": pairs}
    raise CheckpointError(f"{where} cannot be saved: a {kind.__module__}.{kind.__qualname__} is not plain data.")


def _encoded_text(value: str) -> Any:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # lone surrogates: what Python makes of a file name that is not UTF-8
        return {"text": value.encode("utf-8", "surrogatepass").hex()}
    return value


def _encoded_tensor(value: Tensor, where: str, tensors: dict[str, Tensor]) -> Any:
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        raise CheckpointError(f"{where} cannot be saved: a tensor must be dense and hold its numbers.")
    value = value.detach()
    name, order = str(len(tensors)), _memory_order(value)
    stored = value.permute(order)
    tensors[name] = torch.view_as_real(stored.resolve_conj()) if value.is_complex() else stored
    spelling = name if order == list(range(value.ndim)) else [name, order]
    return {"complex" if value.is_complex() else "tensor": spelling}


def _memory_order(value: Tensor) -> list[int]:
    """The dimensions of a dense tensor from the slowest to the fastest; as they are where it is not dense."""
    as_it_is = list(range(value.ndim))
    if value.numel() == 0:
        return as_it_is
    channels_last = [0, *as_it_is[2:], 1] if value.ndim > 2 else as_it_is
    by_stride = sorted(as_it_is, key=lambda dimension: value.stride()[dimension], reverse=True)
    for order in (as_it_is, channels_last, by_stride):
        strides, step = [0] * value.ndim, 1
        for dimension in reversed(order):
            strides[dimension] = step
            step *= max(value.shape[dimension], 1)
        if strides == list(value.stride()):
            return order
    return by_stride if value.permute(by_stride).is_contiguous() else as_it_is  # axes of length 1 do not count


def _decoded(tree: Any, tensors: dict[str, Tensor], depth: int) -> Any:
    """The reverse of `_encoded`; takes every tensor that it uses out of `tensors`."""
    if depth > _DEEPEST + 2:  # the leaf of an array takes two more levels
        _refuse("a tree that is nested too deep")
    if isinstance(tree, list):
        return [_decoded(item, tensors, depth + 1) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) != 1:
        _refuse("an object with other than one key")
    ((kind, content),) = tree.items()
    return _DECODERS[kind](content, tensors, depth + 1)


def _decoded_dict(content: Any, tensors: dict[str, Tensor], depth: int) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    for key, value in content:
        name = _decoded(key, tensors, depth)
        if type(name) not in (str, int) or name in result:
            _refuse("a key that no dict has")
        result[name] = _decoded(value, tensors, depth)
    return result


def _decoded_tuple(content: Any, tensors: dict[str, Tensor], depth: int) -> tuple[Any, ...]:
    if not isinstance(content, list):
        _refuse("a tuple that is no list")
    return tuple(_decoded(item, tensors, depth) for item in content)


def _decoded_tensor(content: Any, tensors: dict[str, Tensor], depth: int) -> Tensor:
    if isinstance(content, str):
        return tensors.pop(content)
    name, order = content
    return tensors.pop(name).permute([order.index(dimension) for dimension in range(len(order))])


def _decoded_numpy(content: Any, tensors: dict[str, Tensor], depth: int) -> np.ndarray:
    value = _decoded(content, tensors, depth)
    if not isinstance(value, Tensor):
        _refuse("an array that is no tensor")
    array: np.ndarray = value.numpy()
    return array


def _decoded_complex(content: Any, tensors: dict[str, Tensor], depth: int) -> Tensor:
    name = content if isinstance(content, str) else content[0]
    tensors[name] = torch.view_as_complex(tensors[name])
    return _decoded_tensor(content, tensors, depth)


def _decoded_float(content: Any, tensors: dict[str, Tensor], depth: int) -> float:
    (value,) = struct.unpack(">d", bytes.fromhex(content))
    return float(value)


_DECODERS: dict[str, Callable[[Any, dict[str, Tensor], int], Any]] = {
    "dict": _decoded_dict,
    "tuple": _decoded_tuple,
    "tensor": _decoded_tensor,
    "array": _decoded_numpy,
    "scalar": lambda content, tensors, depth: _decoded_numpy(content, tensors, depth)[()],
    "complex": _decoded_complex,
    "int": lambda content, tensors, depth: int(content, 16),
    "float": _decoded_float,
    "text": lambda content, tensors, depth: bytes.fromhex(content).decode("utf-8", "surrogatepass"),
}


def _small_int(digits: str) -> int:
    if len(digits) > 20:
        _refuse("a long number that is not in hexadecimal")
    return int(digits)


def _refuse(what: str) -> NoReturn:
    raise ValueError(what)
