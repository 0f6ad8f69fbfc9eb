"""The size and the cost of a model: parameters, multiply-adds and operations."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ssdkd.devices import uncompiled
from ssdkd.errors import ConfigError, in_one_line
from ssdkd.models.loading import unwrapped


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, frozen ones included, shared ones once, buffers not."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_multiply_adds(model: nn.Module, input_shape: tuple[int, int, int]) -> int:
    """Multiply-adds for one image of shape `(C, H, W)`.

    Exact for convolutions, linear layers and products of matrices; what costs next to nothing beside them
    (normalisation, activation, pooling, bias) is not counted.
    """
    return count_work(model, input_shape)[0]


def count_work(model: nn.Module, input_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Multiply-adds for one image, and the operations that PyTorch starts for a forward pass of however many images.

    A view of a tensor is no operation.
    """
    counter, operations = FlopCounterMode(display=False), _Operations()
    dry_run(model, input_shape, watched_by=(counter, operations))
    return counter.get_total_flops() // 2, operations.started  # a multiply-add is two floating-point operations


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.started = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = [result.alias_info for result in func._schema.returns]
        self.started += not any(alias is not None and not alias.is_write for alias in aliases)
        return func(*args, **(kwargs or {}))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it the model is in evaluation mode; afterwards each of its layers is in the mode that it was in."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training


def dry_run(
    model: nn.Module,
    input_shape: tuple[int, int, int],
    name: str = "the model",
    watched_by: Sequence[AbstractContextManager[Any]] = (),
) -> Any:
    """What the model returns for one image of zeros of shape `(C, H, W)`, leaving the model as it was.

    The model runs in evaluation mode, so no running statistic moves, and the random state is put back.

    Raises:
        ConfigError: the model cannot take such images.
    """
    example = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), torch.empty(0))
    image = torch.zeros(1, *input_shape, device=example.device, dtype=example.dtype)
    try:
        with (
            evaluating(model),
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            uncompiled(),
            ExitStack() as watching,
        ):
            for counter in watched_by:
                watching.enter_context(counter)
            return unwrapped(model)(image)
    except Exception as error:  # the model may be anyone's code
        raise ConfigError(
            f"{name} cannot take images of shape {tuple(input_shape)} (channels, height, width): {in_one_line(error)}."
        ) from error


def called_in(
    model: nn.Module, layers: Sequence[nn.Module], input_shape: tuple[int, int, int], name: str
) -> list[nn.Module]:
    """Those of `layers` that an image goes through, in order; only what is called as a layer, layer(x), is seen."""
    called: list[nn.Module] = []
    handles = [layer.register_forward_pre_hook(lambda layer, _: called.append(layer)) for layer in layers]
    try:
        dry_run(model, input_shape, name)
    finally:
        for handle in handles:
            handle.remove()
    return called
