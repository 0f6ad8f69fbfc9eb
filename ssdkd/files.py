"""Files that appear whole or not at all, and tensors out of files that nobody vouches for.

Every file is written under a temporary name in its own folder, forced to the disk, and only then renamed; a
safetensors file is believed nothing that the number of its bytes does not bear out. What is no file (/dev/null, a pipe)
is written to as it stands, for another in its place would be something else.

For tests, the environment variable `SSDKD_FAULT` breaks one of the three operations that this is made of:
`OPERATION:N:HOW` (`write:3:error`) lets the N-th `write`, `fsync` or `replace` of this process fail as on a
full disk (`error`) or kill the process (`kill`); `OPERATION:N:HOW:PART` counts only files whose path contains
PART (`fsync:1:kill:checkpoints`). A file takes one `write`, one `replace` and two `fsync` (its own and, after
the `replace`, its folder's). A broken `write` gets half of the bytes out, a broken `fsync` or `replace` does
nothing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import signal
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NoReturn

import torch
from torch import Tensor

from ssdkd.errors import CheckpointError, ConfigError, in_short

MOST_HEADER_BYTES = 32 * 2**20  # parsed, a header takes up to thirty times its size
_MOST_DIMENSIONS = 64
_SEAL = '"ssdkd.sha256":"%s"'
_UNSEALED = "0" * 64

# The number types of the safetensors format, as far as this PyTorch has them.
_DTYPES: dict[str, torch.dtype] = {
    code: getattr(torch, name)
    for code, name in {
        **{"BOOL": "bool", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64"},
        **{"I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"},
        **{"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64"},
        **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
    }.items()
    if hasattr(torch, name)
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def expanded(path: str | os.PathLike[str]) -> Path:
    """`path` with ~ spelled out, which a shell leaves in --out=~/x; as it is where it names no user."""
    return Path(os.path.expanduser(path))


# ----------------------------------------------------------------------------------------------------
# Writing
# ----------------------------------------------------------------------------------------------------


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, line ends as they are; see `atomic_write_bytes`."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write or replace the file `path`: whatever happens, the old content or the new one is there, whole.

    Raises:
        OSError: the disk does not allow it; the old file is untouched.
    """
    _write_whole(Path(path), [data])


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, seal: bool = False
) -> None:
    """Write one safetensors file, whole or not at all.

    Args:
        path: an existing file is replaced.
        tensors: dense, on any device, of any number type that the format knows.
        metadata: names with texts, for the header.
        seal: add a SHA-256 of the whole file, which `read_safetensors` can check.

    Raises:
        OSError: the disk does not allow it; an old file is untouched.
        ValueError: a tensor or the size of the header does not fit the format.
    """
    entries: dict[str, object] = {"__metadata__": {**metadata, **({"ssdkd.sha256": _UNSEALED} if seal else {})}}
    chunks: list[memoryview] = []
    position = 0
    # Large elements first: then each tensor starts at a multiple of its element size.
    for name, value in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        if value.dtype not in _CODES or value.layout != torch.strided or value.is_quantized:
            raise ValueError(f"{name} is of a kind that safetensors cannot hold ({value.dtype}, {value.layout})")
        plain = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        chunks.append(_bytes_of(plain))
        end = position + chunks[-1].nbytes
        entries[name] = {"dtype": _CODES[value.dtype], "shape": list(value.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"))
    header = text.encode("ascii") + b" " * (-len(text) % 8)
    if len(header) > MOST_HEADER_BYTES:
        raise ValueError(f"its description takes {len(header)} bytes, the bound is {MOST_HEADER_BYTES}")
    start = struct.pack("<Q", len(header)) + header
    if seal:
        digest = hashlib.sha256(start)
        for chunk in chunks:
            digest.update(chunk)
        start = start.replace((_SEAL % _UNSEALED).encode(), (_SEAL % digest.hexdigest()).encode(), 1)
    _write_whole(path, [start, *chunks])


def require_writable(path: str | os.PathLike[str] | None, option: str) -> None:
    """Refuse what `write_result` could not write, before there is work to lose; its folder is made if need be.

    Raises:
        ConfigError: one sentence that begins with `option`, which named the file.
    """
    if path:
        with _refused_for(path, option) as file:
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not _stands(file):
                draft = _draft_of(file.resolve())
                draft.touch()
                draft.unlink()


def write_result(path: str | os.PathLike[str] | None, option: str, text: str) -> None:
    """Write the file that `option` names, whole or not at all; none where it names none.

    Raises:
        ConfigError: as of `require_writable`; an old file is untouched.
    """
    if path:
        with _refused_for(path, option) as file:
            atomic_write_text(file, text)


@contextlib.contextmanager
def _refused_for(path: str | os.PathLike[str], option: str) -> Iterator[Path]:
    try:
        yield expanded(path)
    except OSError as error:
        told = os.strerror(errno.ENOTDIR) if isinstance(error, FileExistsError) else error.strerror or error
        raise ConfigError(f"{option}: {path} cannot be written: {told}.") from error


def temporary_files(folder: Path, pattern: str) -> list[Path]:
    """What writes of files named like `pattern`, cut off before their end, left in `folder`."""
    return list(folder.glob(f".{pattern}.{8 * '[0-9a-f]'}.tmp"))  # else it is somebody else's


def _draft_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _stands(path: Path) -> bool:
    """Whether nothing may take its place: a device, a pipe, a folder."""
    return path.exists() and not path.is_file()


def _write_whole(path: Path, chunks: Sequence[bytes | memoryview]) -> None:
    """A file next to the target takes its name only when every byte is on the disk."""
    if _stands(path):
        with path.open("wb") as file:
            file.writelines(chunks)
        return
    path = path.resolve()  # a link goes on to be one
    temporary = _draft_of(path)
    try:
        with temporary.open("xb") as file:
            _write(file, path, chunks)
            file.flush()
            _fsync(file.fileno(), path)
        _replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if os.name == "posix":  # the new name must survive a power cut too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            _fsync(folder, path)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot, not one that fails
                raise
        finally:
            os.close(folder)


def _write(file: BinaryIO, target: Path, chunks: Sequence[bytes | memoryview]) -> None:
    fault = _fault_of("write", target)
    left = sum(memoryview(chunk).nbytes for chunk in chunks) // 2
    for chunk in chunks:
        if fault and len(chunk) >= left:
            file.write(chunk[:left])
            file.flush()
            _break(fault)
        left -= len(chunk)
        file.write(chunk)


def _fsync(descriptor: int, target: Path) -> None:
    _break(_fault_of("fsync", target))
    os.fsync(descriptor)


def _replace(source: Path, target: Path) -> None:
    _break(_fault_of("replace", target))
    os.replace(source, target)


_operations: Counter[str] = Counter()


def _fault_of(operation: str, target: Path) -> str:
    """How this operation is to be broken; empty where it is not."""
    wanted, number, how, part, *_ = [*os.environ.get("SSDKD_FAULT", "").split(":", 3), *4 * [""]]
    if part not in str(target):
        return ""
    _operations[operation] += 1
    meant = wanted == operation and number == str(_operations[operation])
    return how if meant and how in ("error", "kill") else ""


def _break(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "error":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ----------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------


def read_safetensors(path: Path, kind: str, *, sealed: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and the texts in its header.

    Memory is taken only for bytes that are there, and every tensor has memory of its own.

    Args:
        path: of any content.
        kind: what messages call the file, such as "weights file".
        sealed: refuse the file unless it carries the SHA-256 of its own bytes.

    Raises:
        CheckpointError: the file is missing, damaged, or not what its header says.
    """
    try:
        with path.open("rb") as file:
            return _read_open(path, file, os.fstat(file.fileno()).st_size, kind, sealed)
    except OSError as error:
        raise CheckpointError(f"{kind} {path} cannot be read: {error.strerror or error}.") from error
    except MemoryError as error:
        raise CheckpointError(f"{kind} {path} does not fit in memory: free some, or use another machine.") from error


def _read_open(
    path: Path, file: BinaryIO, size: int, kind: str, sealed: bool
) -> tuple[dict[str, Tensor], dict[str, str]]:
    damaged = f"{kind} {path} is damaged or cut short"
    prefix = file.read(8)
    if len(prefix) < 8:
        raise CheckpointError(f"{damaged}: it has {size} bytes, fewer than any safetensors file; copy it again.")
    (length,) = struct.unpack("<Q", prefix)
    if length > size - 8:
        raise CheckpointError(f"{damaged}: its header claims {length} bytes but {size - 8} are there; copy it again.")
    if length > MOST_HEADER_BYTES:
        raise CheckpointError(
            f"{kind} {path} was refused: its header of {length} bytes is above the bound of "
            f"{MOST_HEADER_BYTES}; save it again as fewer tensors."
        )
    raw = file.read(length)
    try:
        entries, metadata = _header_in(raw)
        ends = [entry.end for entry in entries.values()]
    except ValueError as error:
        raise CheckpointError(
            f"{kind} {path} is not a valid safetensors file ({in_short(error)}): copy or save it again."
        ) from error
    promised, held = max(ends, default=0), size - 8 - length
    if promised != held:
        raise CheckpointError(
            f"{damaged}: its header promises {promised} bytes of tensors but {held} are there; copy it again."
        )

    seal = metadata.get("ssdkd.sha256", "")
    if sealed and not re.fullmatch("[0-9a-f]{64}", seal):
        raise CheckpointError(f"{kind} {path} carries no SHA-256 of its content: it is of another program.")
    digest = hashlib.sha256(prefix)
    if sealed:
        digest.update(raw.replace((_SEAL % seal).encode(), (_SEAL % _UNSEALED).encode(), 1))
    tensors: dict[str, Tensor] = {}
    for name, entry in entries.items():
        try:
            value = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        except RuntimeError as error:
            if entry.end == entry.begin:  # a shape such as 0 x 2^62, too large though nothing is in it
                raise CheckpointError(f"{damaged}: its tensor {name[:80]!r} has an impossible shape.") from error
            raise MemoryError from error
        content = _bytes_of(value)
        if _fill(file, content) < content.nbytes:
            raise CheckpointError(f"{damaged}: it became shorter while it was read; copy it again.")
        if sealed:
            digest.update(content)
        if entry.dtype == torch.bool and (value.view(torch.uint8) > 1).any():
            raise CheckpointError(f"{damaged}: its tensor {name[:80]!r} holds truth values that are neither 0 nor 1.")
        tensors[name] = value
    if sealed and digest.hexdigest() != seal:
        raise CheckpointError(f"{kind} {path} is damaged: its content does not match its SHA-256; use another one.")
    return tensors, metadata


class _Entry:
    """Where a tensor lies in the file, once type, shape and place agree."""

    def __init__(self, name: str, stated: object) -> None:
        if not isinstance(stated, dict) or stated.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"no readable safetensors header: {name!r} is not described by type, shape and place")
        code, shape, place = stated["dtype"], stated["shape"], stated["data_offsets"]
        if not isinstance(code, str) or code not in _DTYPES:
            raise ValueError(f"{name!r} has the unknown type {str(code)[:20]!r}")
        if not _are_sizes(shape) or len(shape) > _MOST_DIMENSIONS or not _are_sizes(place) or len(place) != 2:
            raise ValueError(f"{name!r} has an impossible shape or place")
        self.dtype, self.shape = _DTYPES[code], tuple(shape)
        self.begin, self.end = place
        if math.prod(shape) * self.dtype.itemsize != self.end - self.begin:
            raise ValueError(f"{name!r} has a shape that does not fit its bytes")


def _header_in(raw: bytes) -> tuple[dict[str, _Entry], dict[str, str]]:
    """The tensors in the order of their bytes, which they share without gap or overlap, and the texts."""
    try:
        header = json.loads(raw.decode("utf-8"), parse_int=_size_in, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no readable safetensors header: {in_short(error)}") from error
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("no readable safetensors header: it is not a table of tensors and texts")
    entries = {name: _Entry(name[:80], stated) for name, stated in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    position = 0
    for name, entry in entries.items():
        if entry.begin != position:
            raise ValueError(f"{name[:80]!r} overlaps another tensor or leaves a gap")
        position = entry.end
    return entries, metadata


def _size_in(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError("a number in it is beyond all sizes")
    return int(digits)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no size")


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _bytes_of(value: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    if value.numel() == 0:
        return memoryview(bytearray())
    return value.reshape(-1).view(torch.uint8).numpy().data


def _fill(file: BinaryIO, content: memoryview) -> int:
    """Read until `content` is full or the file ends: -> the bytes read."""
    position = 0
    while position < content.nbytes:
        count = file.readinto(content[position:])  # type: ignore[attr-defined]
        if not count:
            break
        position += count
    return position
