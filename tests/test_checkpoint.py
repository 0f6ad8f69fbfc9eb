"""Promises of `ssdkd.checkpoint`: the same state to the last bit, whole or not at all, damage is noticed."""

import hashlib
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ssdkd.checkpoint import VERSION, load, load_newest, save
from ssdkd.errors import CheckpointError
from ssdkd.files import atomic_write_bytes, atomic_write_text, read_safetensors, write_safetensors

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn),
    *(torch.complex64, torch.complex128),
]


def message_of(error: pytest.ExceptionInfo[BaseException]) -> str:
    """The message, which must be one line that ends like a sentence."""
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def load_error(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load(path)
    text = message_of(error)
    assert str(path) in text
    return text


def raw(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def order_of(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """The memory order, as far as one can tell it apart: an axis of length 1 has no stride."""
    return [stride for size, stride in zip(shape, strides, strict=True) if size > 1 and 0 not in shape]


def exactly(value: Any) -> Any:
    """A description that is equal for two states only if they are the same in type, order and every bit."""
    if isinstance(value, torch.Tensor):
        return ("tensor", value.dtype, value.shape, order_of(value.shape, value.stride()), raw(value))
    if isinstance(value, np.ndarray):
        return ("array", value.dtype, value.shape, order_of(value.shape, value.strides), value.tobytes())
    if isinstance(value, np.generic):
        return (type(value), value.tobytes())
    if isinstance(value, dict):
        return ("dict", [(type(key), key, exactly(item)) for key, item in value.items()])
    if isinstance(value, list | tuple):
        return (type(value), [exactly(item) for item in value])
    return (type(value), struct.pack("d", value) if isinstance(value, float) else value)


def round_trip(state: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return load(save(Path(folder), state, 0))


def small_state(number: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)
    return {
        "weights": torch.randn(4, 3, generator=generator),
        "images": torch.randint(0, 256, (5, 2, 3), dtype=torch.uint8, generator=generator),
        "nothing": torch.empty(0, 7),
        "inner": {0: (1, 2.5, None), "list": [True, "text"]},
        "number": number,
    }


def checkpoints(folder: Path) -> list[str]:
    """Every name in the folder, the hidden ones too."""
    return sorted(path.name for path in folder.iterdir())


# ---- the same state to the last bit ----


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=5))
    dtype = draw(st.sampled_from(DTYPES))
    size = int(np.prod(shape, dtype=int)) * torch.empty((), dtype=dtype).element_size()
    content = draw(st.binary(min_size=size, max_size=size))
    if dtype == torch.bool:
        content = bytes(byte & 1 for byte in content)
    made = torch.frombuffer(bytearray(content), dtype=dtype) if size else torch.empty(0, dtype=dtype)
    return made.reshape(shape).permute(draw(st.permutations(range(len(shape)))))


arrays = tensors().filter(lambda t: t.dtype not in (torch.bfloat16, torch.float8_e4m3fn)).map(lambda t: t.numpy())
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**128), 2**128),
    st.floats(),
    st.text(st.characters(codec=None), max_size=5),  # lone surrogates as well
    st.floats(width=32).map(np.float32),
    st.floats().map(np.float64),
    st.booleans().map(np.bool_),
)
states = st.recursive(
    scalars | tensors() | arrays,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(states)
def test_any_state_comes_back_the_same(state: Any) -> None:
    assert exactly(round_trip(state)) == exactly(state)


def test_memory_order_survives() -> None:
    weight = torch.randn(8, 3, 3, 3).contiguous(memory_format=torch.channels_last)
    gray = torch.randn(8, 1, 5, 5).contiguous(memory_format=torch.channels_last)
    video = torch.randn(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    state = {"weight": weight, "gray": gray, "video": video, "turned": torch.randn(3, 4).T}
    loaded = round_trip(state)
    assert {name: value.stride() for name, value in loaded.items()} == {
        name: value.stride() for name, value in state.items()
    }
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_views_are_saved_without_what_they_are_views_of(tmp_path: Path) -> None:
    many = torch.arange(10**6)
    path = save(tmp_path, {"few": many[10:20], "strided": many[::1000], "same": many[:1].expand(9)}, 0)
    assert path.stat().st_size < 20_000
    loaded = load(path)
    assert torch.equal(loaded["few"], many[10:20])
    assert torch.equal(loaded["strided"], many[::1000])
    assert torch.equal(loaded["same"], torch.zeros(9, dtype=torch.int64))


def test_loaded_tensors_share_no_memory() -> None:
    loaded = round_trip([torch.zeros(3), torch.zeros(3)])
    loaded[0] += 1
    assert torch.equal(loaded[1], torch.zeros(3))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_an_optimizer_goes_on_as_if_it_had_never_stopped(kind: Callable[..., Any]) -> None:
    def make() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2))
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        extra = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        return model, kind(model.parameters(), lr=0.1, **extra)

    def train(model: nn.Module, optimizer: Any, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(8, 3, 5, 5)).square().mean().backward()
            optimizer.step()

    model, optimizer = make()
    train(model, optimizer, 3)
    kept = round_trip(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "torch": torch.get_rng_state(),
            "numpy": np.random.PCG64(7).state,
        }
    )
    train(model, optimizer, 3)

    again, again_optimizer = make()
    again.load_state_dict(kept["model"])
    again_optimizer.load_state_dict(kept["optimizer"])
    torch.set_rng_state(kept["torch"])
    train(again, again_optimizer, 3)
    assert exactly(dict(again.state_dict())) == exactly(dict(model.state_dict()))
    assert exactly(again_optimizer.state_dict()) == exactly(optimizer.state_dict())
    generator = np.random.PCG64()
    generator.state = kept["numpy"]
    assert generator.random_raw() == np.random.PCG64(7).random_raw()


def test_subclasses_come_back_plain() -> None:
    loaded = round_trip({"ordered": OrderedDict(a=1), "parameter": nn.Parameter(torch.ones(2))})
    assert type(loaded["ordered"]) is dict
    assert type(loaded["parameter"]) is torch.Tensor


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"a": [1, object()]}, "state['a'][1]"),
        ({"a": {1.5: 0}}, "state['a']"),
        ({"a": {True: 0}}, "state['a']"),
        ({"a": b"bytes"}, "state['a']"),
        ({"a": {1, 2}}, "state['a']"),
        ({"a": np.array(["text"])}, "state['a']"),
        ({"a": np.array([object()])}, "state['a']"),
        ({"a": np.ma.masked_array([1, 2], [True, False])}, "state['a']"),
        ({"a": torch.eye(3).to_sparse()}, "state['a']"),
        ({"a": torch.empty(3, device="meta")}, "state['a']"),
        ({"a": os.stat_result(range(10))}, "state['a']"),
    ],
)
def test_what_cannot_be_saved_is_named_and_nothing_is_written(state: Any, where: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        save(tmp_path, state, 0)
    assert message_of(error).startswith(f"{where} cannot be saved: ")
    assert checkpoints(tmp_path) == []


def test_endless_nesting_is_refused(tmp_path: Path) -> None:
    state: list[Any] = []
    state.append(state)
    with pytest.raises(CheckpointError, match="deep"):
        save(tmp_path, state, 0)


def test_the_safetensors_library_reads_the_file_too(tmp_path: Path) -> None:
    path = save(tmp_path, [torch.arange(3, dtype=torch.uint8), torch.arange(5.0), torch.empty(0)], 0)
    theirs = safetensors.torch.load_file(path)
    assert {name: value.tolist() for name, value in theirs.items()} == {
        "0": [0, 1, 2],
        "1": [0.0, 1.0, 2.0, 3.0, 4.0],
        "2": [],
    }


# ---- damage ----


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, small_state(), 0)
    whole = path.read_bytes()
    for length in {*range(0, 64), *range(64, len(whole), 7), len(whole) - 1}:
        path.write_bytes(whole[:length])
        load_error(path)
    path.write_bytes(whole + b"\0")
    load_error(path)


def test_a_bit_flipped_anywhere_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path, small_state(), 0)
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        load_error(path)


def forged(header: Any, data: bytes = b"", length: int | None = None, seal: bool = True, tree: Any = None) -> bytes:
    """A file with any header, and with the right SHA-256 if `seal`."""
    if seal:
        texts = {"ssdkd.checkpoint": VERSION, "ssdkd.tree": tree if isinstance(tree, str) else json.dumps(tree)}
        header = {"__metadata__": {**texts, "ssdkd.sha256": "0" * 64}, **header}
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    start = struct.pack("<Q", len(text) if length is None else length) + text
    digest = hashlib.sha256(start + data).hexdigest()
    return start.replace(b'"ssdkd.sha256":"' + b"0" * 64, b'"ssdkd.sha256":"' + digest.encode()) + data


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_forged_file_loads_where_it_is_honest(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(forged({"0": entry([2], 0, 8)}, bytes(8), tree={"tensor": "0"}))
    assert torch.equal(load(tmp_path / "f"), torch.zeros(2))


LIES = {
    "header beyond the file": forged({}, length=10**6),
    "header beyond all files": forged({}, length=2**63),
    "largest header": forged({}, length=2**64 - 1),
    "huge shape": forged({"0": entry([10**12], 0, 4 * 10**12)}, bytes(8)),
    "huge shape on few bytes": forged({"0": entry([10**12], 0, 8)}, bytes(8)),
    "shape whose product overflows to the truth": forged({"0": entry([2**62, 2**62, 4], 0, 0)}),
    "shape beyond 64 bits": forged({"0": entry([2**64, 0], 0, 0)}),
    "no elements, yet too large": forged({"0": entry([0, 2**62, 2**62], 0, 0)}, tree={"tensor": "0"}),
    "number without end": forged(b'{"0":{"dtype":"F32","shape":[' + b"9" * 10**6 + b"]}}", seal=False),
    "negative shape": forged({"0": entry([-2, -1], 0, 8)}, bytes(8)),
    "fractional shape": forged({"0": entry([2.0], 0, 8)}, bytes(8)),
    "truth as shape": forged({"0": entry([True, 2], 0, 8)}, bytes(8)),
    "too many dimensions": forged({"0": entry([1] * 100, 0, 4)}, bytes(4)),
    "overlap": forged({"0": entry([2], 0, 8), "1": entry([2], 4, 12)}, bytes(12)),
    "same place twice": forged({"0": entry([2], 0, 8), "1": entry([2], 0, 8)}, bytes(8)),
    "gap": forged({"0": entry([1], 0, 4), "1": entry([1], 8, 12)}, bytes(12)),
    "backwards": forged({"0": entry([1], 4, 0)}, bytes(4)),
    "bytes left over": forged({"0": entry([1], 0, 4)}, bytes(8), tree={"tensor": "0"}),
    "unknown type": forged({"0": entry([1], 0, 4, "F31")}, bytes(4)),
    "type that is a list": forged({"0": entry([1], 0, 4, ["F32"])}, bytes(4)),
    "truth values of 2": forged({"0": entry([1], 0, 1, "BOOL")}, b"\x02", tree={"tensor": "0"}),
    "extra field": forged({"0": {**entry([1], 0, 4), "x": 1}}, bytes(4)),
    "no seal": forged({"__metadata__": {"ssdkd.checkpoint": VERSION, "ssdkd.tree": "1"}}, seal=False),
    "metadata of a list": forged({"__metadata__": []}, seal=False),
    "metadata of numbers": forged({"__metadata__": {"a": 1}}, seal=False),
    "header of a list": forged([], seal=False),
    "deep header": forged(b'{"a":' + b"[" * 10**6, seal=False),
    "header that is no text": forged(b"{\xff\xfe}", seal=False),
    "UTF-16": forged("{}".encode("utf-16"), seal=False),
    "NaN": forged(b'{"a":NaN}', seal=False),
    "deep tree": forged({}, tree="[" * 10**6 + "]" * 10**6),
    "fairly deep tree": forged({}, tree="[" * 90 + "]" * 90),
    "tree cut short": forged({}, tree='{"dict":[["a"'),
    "tree with NaN": forged({}, tree="NaN"),
    "tree with a long number": forged({}, tree="9" * 10**5),
    "tensor that is not there": forged({}, tree={"tensor": "0"}),
    "tensor that is a number": forged({}, tree={"tensor": 0}),
    "tensor used twice": forged({"0": entry([1], 0, 4)}, bytes(4), tree=[{"tensor": "0"}, {"tensor": "0"}]),
    "tensor never used": forged({"0": entry([1], 0, 4)}, bytes(4), tree=[]),
    "wrong order": forged({"0": entry([1], 0, 4)}, bytes(4), tree={"tensor": ["0", [3]]}),
    "order that is a number": forged({"0": entry([1], 0, 4)}, bytes(4), tree={"tensor": ["0", 3]}),
    "complex of three": forged({"0": entry([3], 0, 12)}, bytes(12), tree={"complex": "0"}),
    "complex of none": forged({}, tree={"complex": 1}),
    "array of bfloat16": forged({"0": entry([1], 0, 2, "BF16")}, bytes(2), tree={"array": {"tensor": "0"}}),
    "array of a list": forged({}, tree={"array": []}),
    "unknown object": forged({}, tree={"object": "os.system"}),
    "object of two keys": forged({}, tree={"int": "0x1", "float": "00"}),
    "short float": forged({}, tree={"float": "00"}),
    "int that is none": forged({}, tree={"int": "ten"}),
    "text that is none": forged({}, tree={"text": "zz"}),
    "dict of a number": forged({}, tree={"dict": 3}),
    "dict with a list as key": forged({}, tree={"dict": [[[], 1]]}),
    "dict with a key twice": forged({}, tree={"dict": [["a", 1], ["a", 2]]}),
    "tuple of a text": forged({}, tree={"tuple": "abc"}),
    "nothing": b"",
    "seven bytes": b"1234567",
    "a page": b"<!doctype html><html>404</html>",
    "a zip": b"PK\x03\x04" + bytes(100),
    "a pickle": b"\x80\x04cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
}


@pytest.mark.parametrize("name", LIES)
def test_a_file_that_lies_is_refused_without_taking_memory(name: str, tmp_path: Path) -> None:
    path = tmp_path / "round-00000001.safetensors"
    path.write_bytes(LIES[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = load_error(path)
    assert len(text) < 600
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # KiB; deep JSON takes some


def test_a_file_of_a_later_format_says_so(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "f", {}, {"ssdkd.checkpoint": str(int(VERSION) + 1), "ssdkd.tree": "1"}, seal=True)
    assert "use the ssdkd that wrote it" in load_error(tmp_path / "f")


def test_a_folder_a_missing_file_and_weights_are_no_checkpoints(tmp_path: Path) -> None:
    assert "does not exist or is not a file" in load_error(tmp_path)
    assert "does not exist" in load_error(tmp_path / "no.safetensors")
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    assert "of another program" in load_error(tmp_path / "w.safetensors")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_what_this_reader_takes_the_safetensors_library_takes_alike(data: st.DataObject) -> None:
    valid = safetensors.torch.save({"a": torch.arange(4.0), "b": torch.ones(3, dtype=torch.uint8)}, {"k": "v"})
    changed = bytearray(valid)
    for _ in range(data.draw(st.integers(0, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "w.safetensors")
        path.write_bytes(changed)
        try:
            ours, _ = read_safetensors(path, "weights file")
        except CheckpointError:
            return
    theirs = safetensors.torch.load(bytes(changed))
    assert {name: exactly(value) for name, value in ours.items()} == {
        name: exactly(value) for name, value in theirs.items()
    }


# ---- folders ----


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for number in (1, 2, 3, 9, 10):
        save(tmp_path, small_state(number), number, keep=2)
    assert checkpoints(tmp_path) == ["notes.txt", "round-00000009.safetensors", "round-00000010.safetensors"]
    state, path, warnings = load_newest(tmp_path)
    assert (state["number"], path.name, warnings) == (10, "round-00000010.safetensors", [])


def test_a_damaged_newest_one_is_skipped_with_a_sentence(tmp_path: Path) -> None:
    for number in range(4):
        save(tmp_path, small_state(number), number, keep=4)
    (tmp_path / "round-00000003.safetensors").write_bytes(b"")
    with (tmp_path / "round-00000002.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    state, path, warnings = load_newest(tmp_path)
    assert state["number"] == 1
    assert path.name == "round-00000001.safetensors"
    assert [f"round-0000000{n}" in text for n, text in zip((3, 2), warnings, strict=True)] == [True, True]
    assert all(text.endswith(".") and "\n" not in text for text in warnings)


def test_going_on_from_an_older_one_removes_the_future_that_was_left(tmp_path: Path) -> None:
    for number in (10, 20, 30):
        save(tmp_path, small_state(number), number)
    (tmp_path / "round-00000030.safetensors").write_bytes(b"damaged")
    save(tmp_path, small_state(21), 21, keep=1)
    assert checkpoints(tmp_path) == ["round-00000021.safetensors"]


def test_no_usable_checkpoint_is_an_error(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError) as error:
            load_newest(folder)
        assert str(folder) in message_of(error)
    (tmp_path / "round-00000001.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        load_newest(tmp_path)


# ---- writes that fail ----


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def set_fault(text: str) -> None:
        monkeypatch.setattr("ssdkd.files._operations", Counter())
        monkeypatch.setenv("SSDKD_FAULT", text)

    return set_fault


@pytest.mark.parametrize("text", ["write:1:error", "fsync:1:error", "replace:1:error"])
def test_a_full_disk_leaves_the_old_checkpoints_and_nothing_else(
    text: str, tmp_path: Path, fault: Callable[[str], None]
) -> None:
    for number in (1, 2):
        save(tmp_path, small_state(number), number, keep=2)
    before = {name: (tmp_path / name).read_bytes() for name in checkpoints(tmp_path)}
    fault(text)
    with pytest.raises(CheckpointError) as error:
        save(tmp_path, small_state(3), 3, keep=2)
    assert "No space left on device; any earlier ones are still there" in message_of(error)
    assert {name: (tmp_path / name).read_bytes() for name in checkpoints(tmp_path)} == before
    save(tmp_path, small_state(3), 3, keep=2)  # the fault has passed
    assert load_newest(tmp_path)[0]["number"] == 3


def test_a_real_full_disk_is_reported(tmp_path: Path) -> None:
    """A limit on file sizes stands in for the disk."""
    program = (
        "import resource, signal, sys, torch, pathlib\n"
        "from ssdkd.checkpoint import save\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "save(folder, torch.zeros(10), 1)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "save(folder, torch.zeros(1_000_000), 2)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert "CheckpointError" in done.stderr
    assert "File too large" in done.stderr
    assert checkpoints(tmp_path) == ["round-00000001.safetensors"]


def test_a_deleted_run_and_a_file_in_the_way_are_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "deleted run" / "checkpoints", tmp_path / "file"):
        with pytest.raises(CheckpointError) as error:
            save(folder, small_state(), 1)
        assert str(folder) in message_of(error)
    assert checkpoints(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_reported(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="Permission denied"):
        save(tmp_path, small_state(), 1)


def test_a_kill_at_any_point_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """One process with three checkpoints, killed in the middle of the second in every possible way."""
    program = (
        "import os, pathlib, sys\n"
        "import torch\n"
        "from ssdkd.checkpoint import save\n"
        "for arguments in sys.argv[1:]:\n"
        "    folder, fault = arguments.split('=')\n"
        "    if os.fork() == 0:\n"
        "        os.environ['SSDKD_FAULT'] = fault\n"
        "        for number in (1, 2, 3):\n"
        "            state = {'number': number, 'data': torch.full((1000,), number)}\n"
        "            save(pathlib.Path(folder), state, number)\n"
        "        os._exit(0)\n"
        "    print(os.WTERMSIG(os.wait()[1]))\n"
    )
    cases = {"write:2:kill": 1, "fsync:3:kill": 1, "replace:2:kill": 1, "fsync:4:kill": 2}
    folders = {fault: tmp_path / fault.replace(":", "-") for fault in cases}
    done = subprocess.run(
        [sys.executable, "-c", program, *(f"{folder}={fault}" for fault, folder in folders.items())],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(int(signal.SIGKILL))] * len(cases)
    for fault, newest in cases.items():
        folder = folders[fault]
        state, _, warnings = load_newest(folder)
        assert (state["number"], warnings) == (newest, []), fault
        assert torch.equal(state["data"], torch.full((1000,), newest))
        leftovers = [path for path in folder.iterdir() if path.suffix == ".tmp"]
        assert len(leftovers) == (newest == 1), fault  # what a kill cannot help ...
        if fault.startswith("write"):
            whole = (folder / "round-00000001.safetensors").stat().st_size
            assert leftovers[0].stat().st_size == whole // 2
        save(folder, small_state(), 4)
        assert not [path for path in folder.iterdir() if path.suffix == ".tmp"], fault  # ... the next save clears


def test_texts_and_bytes_are_replaced_whole(tmp_path: Path, fault: Callable[[str], None]) -> None:
    path = tmp_path / "summary.json"
    atomic_write_text(path, "größe\r\n")
    assert path.read_bytes() == "größe\r\n".encode()
    fault("replace:2:error")
    atomic_write_bytes(path, b"new")
    with pytest.raises(OSError, match="No space left"):
        atomic_write_bytes(path, b"newer")
    assert path.read_bytes() == b"new"
    assert checkpoints(tmp_path) == ["summary.json"]


def test_a_fault_may_be_of_some_files_only(tmp_path: Path, fault: Callable[[str], None]) -> None:
    fault("write:2:error:summary")
    for name in ("config.yaml", "summary.json", "config.yaml"):
        atomic_write_text(tmp_path / name, "first")
    with pytest.raises(OSError, match="No space left"):
        atomic_write_text(tmp_path / "summary.json", "second")
    assert (tmp_path / "summary.json").read_text() == "first"
