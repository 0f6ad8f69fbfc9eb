"""Which device, which arithmetic on it, and how."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssdkd.errors import ConfigError

LARGE = 5_000_000  # multiply-adds of an image from which reduced precision gains more than its casts cost


def choose_device(name: str) -> torch.device:
    """`auto` takes a GPU where there is one; a device that is not there is refused by name."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: {name!r} is not a device; use auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: {name!r} is not supported; use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ConfigError(f"device: {name!r} is not here ({count} CUDA devices are seen); use auto or cpu.")
    return device


def seed_torch(seed: int, device: torch.device) -> None:
    """PyTorch's own random numbers, of the CPU and of that device: `torch.manual_seed` would seed every GPU's."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def keep_freed_memory(largest: int = 2**28, kept: int = 2**29) -> bool:
    """Have the C library keep freed memory for this process, in bytes; whether it could (glibc alone can).

    Left alone, it may give the maps of each training step back to the system and fetch them again, page by page,
    which by chance of the addresses costs nothing or a tenth and more of all that is done on a CPU.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    mmap_threshold, trim_threshold = -3, -1  # their numbers in malloc.h
    return bool(mallopt(mmap_threshold, largest) and mallopt(trim_threshold, kept))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory, on a GPU or in the machine; PyTorch says so in several ways."""
    said = str(error).lower()
    words = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in said for word in words))


def autocast_for(precision: str, device: torch.device, work: int) -> AbstractContextManager[Any]:
    """bfloat16 where it was asked for, or where `auto` finds hardware for it and networks large enough to gain.

    `work` is the multiply-adds of the network on one image.
    """
    if precision == "auto":
        precision = "bfloat16" if work > LARGE and has_fast_bfloat16(device) else "float32"
    if precision == "float32":
        return nullcontext()
    # without a cache: inside of another autocast it would outlive the step, and a student go on with its old weights
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


@contextmanager
def apart_from_caller() -> Iterator[None]:
    """With gradients, in the arithmetic and on the device that are configured, whatever the caller's modes are."""
    # what names no device here lies on the CPU; where that is so anyway, nothing is put in the way of every call
    on_cpu = torch.device("cpu") if torch.empty(0).device.type != "cpu" else nullcontext()
    plain_cpu, plain_cuda = (torch.autocast(kind, enabled=False) for kind in ("cpu", "cuda"))
    numbers = torch.get_default_dtype()
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_default_dtype(torch.float32)
    if strict:  # then a GPU refuses the sums by which is drawn: where there is no such algorithm, it is to warn
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with on_cpu, torch.inference_mode(False), plain_cpu, plain_cuda:
            yield
    finally:
        torch.set_default_dtype(numbers)
        if strict:
            torch.use_deterministic_algorithms(True)


@contextmanager
def threads_given_back() -> Iterator[None]:
    """Whatever number of threads is set inside, afterwards it is the caller's again."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    asked: list[Callable[[], bool]] = [
        getattr(torch.cpu, name, lambda: False) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    ]
    return any(supported() for supported in asked)


def layout_for(layout: str) -> torch.memory_format:
    """Channels last unless it is switched off: what the kernels of a CPU and of a GPU's tensor cores want."""
    return torch.contiguous_format if layout == "contiguous" else torch.channels_last


def lay_out(network: nn.Module, layout: torch.memory_format) -> nn.Module:
    """`network`, its filters in that layout, unless it has some of volumes, for which there is no such layout."""
    if any(tensor.dim() == 5 for tensor in chain(network.parameters(), network.buffers())):
        return network
    return network.to(memory_format=layout)  # type: ignore[call-overload,no-any-return]


def laid_out(maps: Tensor, layout: torch.memory_format) -> Tensor:
    """`maps` (B, c, H, W) in that layout, their strides too: by those kernels choose, even where c = 1 fits both."""
    laid = maps.contiguous(memory_format=layout)
    return laid.flatten().view(maps.shape) if layout is torch.contiguous_format else laid


def looked_at_once(device: torch.device, pixels: int) -> int:
    """How many images of so many pixels a network looks at fastest, when it is not trained by them.

    On a CPU, the activations of few enough stay in its cache: measured, 128 of 32x32 and 28x28 pixels and 256 of 8x8.
    """
    if device.type != "cpu":
        return 256
    fit = max(128 * 32**2 // pixels, 1)
    return min(max(2 ** (fit.bit_length() - 1), 16), 256)  # a power of two


def uncompiled() -> AbstractContextManager[Any]:
    """Within it, a network runs as it is written, whatever was compiled of it: so hooks see it, and counters."""
    compiler_in_use = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if compiler_in_use else nullcontext()


def compiles(switch: str, device: torch.device, long_run: bool) -> bool:
    """Whether the student's step is compiled: as `switch` says; `auto`: on a GPU, where a long run earns back the wait.

    Where `auto` would and cannot, a warning says so.
    On a CPU, steps that are a fifth faster pay for half a minute of compilation after some 2,600 (docs/results.md).
    """
    wanted = switch == "on" or (switch == "auto" and long_run and device.type == "cuda")
    if not wanted or has_compiler(device):
        return wanted
    if switch == "on":
        raise ConfigError(
            "compile: on needs a C++ compiler for the CPU, Triton, a C compiler and Python's headers for a GPU, and "
            "does not find them; leave it out."
        )
    missing = "Triton, a C compiler or Python's headers are missing"
    warnings.warn(f"the student learns without being compiled ({missing})", stacklevel=2)
    return False


def is_of_compiling(error: BaseException) -> bool:
    """Whether torch.compile failed, which it notices when what it made is first called, or first goes backward."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "triton"))


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile finds what it hands its code to."""
    if device.type == "cuda":  # Triton compiles against Python's headers, by gcc or clang unless CC names another
        headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
        by = (os.environ.get("CC", ""), "gcc", "clang")
        return headers and importlib.util.find_spec("triton") is not None and any(map(shutil.which, by))
    return any(map(shutil.which, ("g++", "clang++", "cl")))
