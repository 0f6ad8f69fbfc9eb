"""Promises of the switches that change speed alone: layout, compile, rendered teach the same student, to rounding."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.compilers import nop

from benchmarks import switches
from ssdkd import devices
from ssdkd.coefficients import Coefficients
from ssdkd.devices import compiles, has_compiler
from ssdkd.errors import ConfigError
from tests.test_engine import changed, tiny_engine

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def taught(rounds: int, **options: Any) -> tuple[nn.Module, list[bool]]:
    """The student after some rounds, and whether each map that its last convolution read had its channels last."""
    # of textures alone: in a search differences grow with every step, until a pixel of an image is another
    engine = tiny_engine(changed(inversion={"textures": 1.0}, **options))
    lay: list[bool] = []
    last = [module for module in engine.student.modules() if isinstance(module, nn.Conv2d)][-1]

    def look(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
        lay.append(given[0].is_contiguous(memory_format=torch.channels_last))

    if options.get("compile") != "on":
        last.register_forward_pre_hook(look)
    loop = engine.loop()
    next(loop)
    for _ in range(rounds):
        loop.send(Coefficients(alpha=0.6))
    return engine.student, lay


def assert_alike(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=3e-3)  # batch norm amplifies rounding


def test_the_layout_changes_how_maps_lie_and_not_what_is_learned() -> None:
    automatic, last = taught(1)
    contiguous, not_last = taught(1, layout="contiguous")
    assert all(last)
    assert not any(not_last)
    assert_alike(automatic, contiguous)


def test_rendered_views_teach_the_very_same_student() -> None:
    students = [taught(3, buffer={"rendered": rendered, "views": 3, "shift": 1})[0] for rendered in (True, False)]
    for a, b in zip(*(student.parameters() for student in students), strict=True):
        assert torch.equal(a, b)
    assert tiny_engine(changed(buffer={"views": 3})).buffer.rendered is not None
    assert tiny_engine(changed(buffer={"views": 0})).buffer.rendered is None, "nobody would look at it"


@pytest.mark.parametrize(
    ("broken", "by"),
    [
        ("fw_compiler", "torch._inductor.exc"),
        ("bw_compiler", "torch._inductor.exc"),
        ("bw_compiler", "triton.compiler.errors"),
    ],
)
def test_a_student_that_cannot_be_compiled_learns_as_it_is(
    broken: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failed(RuntimeError):
        __module__ = by

    def breaks(*_: object) -> None:
        raise Failed("ptxas is missing")

    parts = {"fw_compiler": nop, "bw_compiler": nop, broken: breaks}
    by_torch = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **options: by_torch(network, backend=aot_autograd(**parts)))
    monkeypatch.setattr(devices, "has_compiler", lambda device: True)
    with pytest.warns(UserWarning, match="without being compiled") as warned:
        students = [taught(2, compile="on")[0], taught(2)[0]]
    told = [warning for warning in warned if "without being compiled" in str(warning.message)]
    assert len(told) == 1, "it is said once, and not tried again"
    for a, b in zip(*(student.parameters() for student in students), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(CPU), reason="no C++ compiler")
def test_a_compiled_step_teaches_the_same() -> None:
    assert_alike(taught(1)[0], taught(1, compile="on")[0])


def test_what_is_compared_to_the_automatic_choice_differs_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def compared(device: torch.device, compiler: bool) -> list[str]:
        for module in (devices, switches):
            monkeypatch.setattr(module, "has_compiler", lambda device: compiler)
        return [name for name in switches.switches_on(device) if name.startswith("compile")]

    assert compared(CPU, True) == ["compile on"]
    assert compared(GPU, True) == ["compile off"]
    assert compared(CPU, False) == compared(GPU, False) == []


FAULTS = """
import resource, sys
import torch
from ssdkd.devices import keep_freed_memory
if "kept" in sys.argv and not keep_freed_memory():
    sys.exit(3)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        maps = [torch.ones(1_000_000) for _ in range(4)]  # 4 MB each
        del maps
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def test_memory_that_a_step_frees_serves_the_next_one() -> None:
    """Page by page from the system, it would cost more than the step itself."""
    pytest.importorskip("resource")
    unlucky = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}  # as by chance of the addresses, but always

    def faults(*words: str) -> int:
        command = [sys.executable, "-c", FAULTS, *words]
        done = subprocess.run(command, env=unlucky, capture_output=True, text=True, check=False, timeout=120)
        if done.returncode == 3:
            pytest.skip("this C library cannot be told")
        return int(done.stdout)

    kept, given_back = faults("kept"), faults()
    if given_back < 1_000:
        pytest.skip("this C library keeps what is freed anyway")
    assert kept < given_back / 10


def test_a_look_takes_fewer_images_the_larger_they_are() -> None:
    sizes = [devices.looked_at_once(torch.device("cpu"), side**2) for side in (8, 28, 32, 64, 224, 1000)]
    assert sizes == [256, 128, 128, 32, 16, 16]


def test_the_gpu_that_is_asked_and_seeded_is_the_runs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    current, seeded = [0], []

    @contextmanager
    def made_current(device: torch.device) -> Iterator[None]:
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", made_current)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ((7, 5), (9, 0))[device.index])
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: seeded.append((current[-1], seed)))
    assert [devices.has_fast_bfloat16(torch.device("cuda", number)) for number in (0, 1)] == [False, True]
    with torch.random.fork_rng(devices=[]):
        devices.seed_torch(7, torch.device("cuda", 1))
    assert seeded == [(1, 7)]


@pytest.mark.parametrize("able", [(), ("_is_amx_tile_supported",), ("_is_avx512_bf16_supported",)])
def test_bfloat16_is_automatic_where_a_processor_multiplies_it_faster_and_networks_are_large(
    monkeypatch: pytest.MonkeyPatch, able: tuple[str, ...]
) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in able, raising=False)

    def reduced(precision: str, work: int) -> bool:
        return not isinstance(devices.autocast_for(precision, CPU, work), nullcontext)

    assert reduced("auto", 2 * devices.LARGE) == bool(able)
    assert not reduced("auto", devices.LARGE // 2)
    assert not reduced("float32", 2 * devices.LARGE)
    assert reduced("bfloat16", devices.LARGE // 2)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)  # as in an older PyTorch
    assert reduced("auto", 2 * devices.LARGE) == ("_is_amx_tile_supported" in able)


def test_compiling_is_automatic_only_where_a_long_run_on_a_gpu_earns_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "has_compiler", lambda device: True)
    assert compiles("auto", GPU, long_run=True)
    assert not compiles("auto", GPU, long_run=False)
    assert not compiles("auto", CPU, long_run=True)
    assert compiles("on", CPU, long_run=False)
    assert not compiles("off", GPU, long_run=True)


@pytest.mark.parametrize(
    ("there", "named", "found"),
    [
        ({"gcc"}, None, True),
        ({"clang"}, None, True),
        ({"cc"}, None, False),
        ({"icx"}, "icx", True),
        (set(), "icx", False),
    ],
)
def test_a_gpus_compiler_is_one_that_triton_takes(
    there: set[str], named: str | None, found: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(devices.sysconfig, "get_path", lambda name: tmp_path)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(devices.shutil, "which", lambda name: name if name in there else None)
    monkeypatch.delenv("CC", raising=False)
    if named is not None:
        monkeypatch.setenv("CC", named)
    assert has_compiler(GPU) == found


def test_compiling_without_a_compiler_is_refused_when_asked_for_and_never_automatic(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    assert not compiles("auto", GPU, long_run=False)
    assert not compiles("auto", CPU, long_run=True)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="without being compiled .*a C compiler"):
        assert not compiles("auto", GPU, long_run=True)
    with pytest.raises(ConfigError, match=r"compile: on needs a C\+\+ compiler"):
        tiny_engine(changed(compile="on"))


def test_the_timing_of_switches_has_each_beside_the_automatic_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "switches.json"
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)  # compiling takes half a minute
    threads = torch.get_num_threads()
    try:
        switches.run(["--tasks", "digits", "--steps", "2", "--turns", "1", "--json", str(file)])
    finally:
        torch.set_num_threads(threads)
    rows = {row["switch"]: row for row in json.loads(file.read_text())["switches"]}
    assert set(rows) == {"automatic", "precision float32", "precision bfloat16", "layout contiguous", "rendered anew"}
    for row in rows.values():
        for kind in ("student", "inversion"):
            assert row[kind]["ratio"] == pytest.approx(row[kind]["seconds"] / rows["automatic"][kind]["seconds"])
    assert "compile was not timed" in capsys.readouterr().out
