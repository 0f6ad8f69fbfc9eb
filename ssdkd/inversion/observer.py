"""Watch a frozen teacher think: batch statistics at its batch-norm layers, features before its last layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssdkd.devices import uncompiled
from ssdkd.models import unwrapped
from ssdkd.models.counting import called_in


def is_batch_norm(layer: nn.Module) -> bool:
    """Whether it knows mean and variance of each channel of its training data, as frozen batch norms of others do."""
    known = [getattr(layer, name, None) for name in ("running_mean", "running_var")]
    per_image = isinstance(layer, nn.modules.instancenorm._InstanceNorm)
    return not per_image and all(isinstance(values, Tensor) and values.dim() == 1 for values in known)


class Observer:
    """Runs a teacher and keeps what the inversion terms read; without `observe` it costs nothing.

    `running` holds (mean, variance) of each batch-norm layer as the teacher learned them from its data;
    after `observe`, `batch` holds those of the last batch, (features,) each, and `features` (B, F).
    """

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = unwrapped(teacher)  # copies in DataParallel would be other layers
        self._learned: dict[nn.Module, tuple[Tensor, Tensor]] = {
            m: (m.running_mean, m.running_var)  # type: ignore[misc]
            for m in teacher.modules()
            if is_batch_norm(m)
        }
        self.running: list[tuple[Tensor, Tensor]] = []
        self._linear = [m for m in teacher.modules() if isinstance(m, nn.Linear)]
        self.batch: list[tuple[Tensor, Tensor]] = []
        self.features: Tensor | None = None
        self.unseen = False

    @property
    def has_batch_norm(self) -> bool:
        """Whether there is any to go by."""
        return bool(self._learned) and not self.unseen

    def look_for_batch_norm(self, shape: tuple[int, int, int]) -> None:
        """Find out by one image whether all of it is `unseen`."""
        called = called_in(self.teacher, list(self._learned), shape, "the teacher")
        self.unseen = bool(self._learned) and not called

    def observe(self, inputs: Tensor, statistics: bool, features: bool) -> Tensor:
        """The teacher's logits (B, C) for inputs (B, c, H, W), noting statistics and features on the way."""
        self.batch, self.running, self.features = [], [], None
        handles = []
        if statistics:
            handles += [m.register_forward_pre_hook(self._note_statistics, with_kwargs=True) for m in self._learned]
        if features:
            handles += [m.register_forward_pre_hook(self._note_features, with_kwargs=True) for m in self._linear]
        try:
            with uncompiled():
                logits: Tensor = self.teacher(inputs)
        finally:
            for handle in handles:
                handle.remove()
        self.features = self.features.float() if self.features is not None else None
        return logits.float()

    def _note_statistics(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        mean, variance = _Moments.apply(_first(arguments, named))
        self.batch.append((mean, variance))
        self.running.append(self._learned[module])

    def _note_features(self, _module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.features = _first(arguments, named)  # the layer that is called last has the last word


def _first(arguments: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """What a layer is called on, be it as `layer(x)` or as `layer(input=x)`."""
    of_layer: Tensor = next(iter((*arguments, *named.values())))
    return of_layer


class _Moments(torch.autograd.Function):
    """Mean and variance of each channel, (B, F, ...) -> (F,), (F,): sums in bf16 would drown small ones, so in float32.

    The same as `torch.var_mean`, which on a CPU takes twenty times as long for channels-last maps as the kernel
    of batch norm does, and more again in its backward pass: a third of an inversion step of a Wide-ResNet.
    """

    @staticmethod
    def forward(ctx: Any, seen: Tensor) -> tuple[Tensor, Tensor]:
        if seen.device.type == "cpu":
            nothing = torch.zeros(seen.shape[1], dtype=torch.promote_types(seen.dtype, torch.float32))  # of the sums
            mean, variance = torch.batch_norm_update_stats(seen, nothing, nothing.clone(), 0.0)
        else:
            variance, mean = torch.var_mean(seen.float(), [d for d in range(seen.dim()) if d != 1], correction=0)
        ctx.save_for_backward(seen, mean)
        return mean, variance

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, of_mean: Tensor, of_variance: Tensor) -> Tensor:
        seen, mean = ctx.saved_tensors
        shape = (1, -1, *[1] * (seen.dim() - 2))
        count = seen.numel() // seen.shape[1]
        slope = (2.0 / count) * of_variance
        offset = of_mean / count - slope * mean
        # in the type of the map: a mixed sum would take eight times as long
        return torch.addcmul(offset.view(shape).to(seen.dtype), seen, slope.view(shape).to(seen.dtype))
