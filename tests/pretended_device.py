"""A device that is not there: it computes on the CPU, but will not mix with it, and what waits for it is counted.

What only a GPU would show (a tensor made on the wrong device, a number that the host asks for in the middle of a round)
is so seen without one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretended"
ASKED_FOR = {f"aten::{name}" for name in ("_local_scalar_dense", "equal", "masked_select", "nonzero")}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_"}  # by a mask it asks how many there are

MIXING = {"aten::cat", "aten::stack"}  # take no number of the host either
FUSED = {"aten::_fused_adam_": 4, "aten::_fused_adamw_": 4, "aten::_fused_sgd_": 3}  # lists that have to lie alike
PLAIN = {"aten::roll"}  # whose outcome on a GPU is contiguous, whatever it is of

waits: list[str] = []  # what made the host wait, in order


class OnDevice(Tensor):
    """A tensor that says it is on the device, and holds its numbers as one of the CPU."""

    numbers: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=torch.device(NAME, 0),
        )
        made.numbers = numbers
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return carried_out(op, args, kwargs or {})

    def tolist(self) -> Any:
        waits.append("tolist")
        return self.numbers.tolist()


class OfDevice(torch.Generator):
    """Random numbers for the device, or for the CPU."""

    def __new__(cls, device: Any = "cpu") -> OfDevice:
        made = super().__new__(cls)
        made.at = torch.device(NAME, 0) if is_device(device) else torch.device("cpu")
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.at


class Backend:
    """What PyTorch asks of a backend. It counts no devices, so that nobody asks for their random state."""

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def device_count(self) -> int:
        return 0

    current_device = _is_in_bad_fork = device_count

    def manual_seed_all(self, seed: int) -> None:
        pass


class Everywhere(TorchDispatchMode):
    """Sees every operation, those too that make a tensor out of nothing."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return carried_out(op, args, kwargs or {})


def is_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def carried_out(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do it on the CPU, if a device could do it at all; note if the host would wait."""
    name, device = op._schema.name, kwargs.get("device")
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    of_device = [tensor for tensor in given if isinstance(tensor, OnDevice)]
    if not of_device and not is_device(device):
        return op(*args, **kwargs)
    numbers_too = name in MIXING
    of_host = [tensor for tensor in given if not isinstance(tensor, OnDevice) and (numbers_too or tensor.dim() > 0)]
    masks = [index for index in args[1] if index is not None and index.dtype == torch.bool] if name in INDEXING else []
    copies = name in ("aten::_to_copy", "aten::copy_")
    to_host = copies and not (is_device(device) if device is not None else isinstance(args[0], OnDevice))
    if name in ASKED_FOR or masks:
        waits.append(name)
    if to_host or (copies and of_host):
        waits.append("copy to the host" if to_host else "copy to the device")
    elif of_host:
        raise RuntimeError(f"{op}: tensors of the device and of the host: {[tuple(t.shape) for t in of_host]}")

    if name in FUSED:
        require_alike(name, [tensors for tensors in args[: FUSED[name]] if tensors])

    def to_cpu(value: Any) -> Any:
        if isinstance(value, OnDevice):
            return value.numbers
        return torch.device("cpu") if isinstance(value, torch.device) else value

    done = op(*tree_map(to_cpu, args), **tree_map(to_cpu, kwargs))
    if name == "aten::_local_scalar_dense" or (to_host and name == "aten::_to_copy"):
        return done
    if to_host:
        return args[0]
    done = done.contiguous() if name in PLAIN else done
    result = tree_map(lambda value: OnDevice(value) if isinstance(value, Tensor) else value, done)
    return return_and_correct_aliasing(op, args, kwargs, result) if of_device else result


def require_alike(name: str, lists: list[list[Tensor]]) -> None:
    """Weights, gradients and moments that belong together lie alike in memory, or a GPU's fused optimiser refuses."""
    for group in zip(*lists, strict=True):
        strides = {tuple(s for s, size in zip(t.stride(), t.shape, strict=True) if size != 1) for t in group}
        if len(strides) > 1:
            raise RuntimeError(f"{name}: a weight of {tuple(group[0].shape)} and what belongs to it lie as {strides}")


@contextmanager
def pretended_device() -> Iterator[torch.device]:
    """There is such a device, and PyTorch knows of it: for the rest of the process, which should do nothing else."""
    with pytest.MonkeyPatch.context() as patch, Everywhere():
        if not hasattr(torch, NAME):
            backend_registration._setup_privateuseone_for_python_backend(NAME, Backend())
        tensor = torch.tensor  # which no mode sees

        def moved(data: Any, *, device: Any = None, **more: Any) -> Tensor:
            return tensor(data, **more).to(device or "cpu")

        patch.setattr(torch, "tensor", moved)
        patch.setattr(torch, "Generator", OfDevice)
        waits.clear()
        yield torch.device(NAME, 0)
