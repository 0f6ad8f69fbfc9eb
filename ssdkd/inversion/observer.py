"""Watch a frozen teacher think: batch statistics at its batch-norm layers, features before its last layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Observer:
    """Runs a teacher and keeps what the inversion terms read; without `observe` it costs nothing.

    `running` holds (mean, variance) of each batch-norm layer as the teacher learned them from its data;
    after `observe`, `batch` holds those of the last batch, (features,) each, and `features` (B, F).
    """

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher
        self._learned: dict[nn.Module, tuple[Tensor, Tensor]] = {
            m: (m.running_mean, m.running_var)
            for m in teacher.modules()
            if isinstance(m, _BATCH_NORM) and m.running_mean is not None and m.running_var is not None
        }
        self.running: list[tuple[Tensor, Tensor]] = []
        self._classifier = next((m for m in reversed(list(teacher.modules())) if isinstance(m, nn.Linear)), None)
        self.batch: list[tuple[Tensor, Tensor]] = []
        self.features: Tensor | None = None

    @property
    def has_batch_norm(self) -> bool:
        return bool(self._learned)

    def observe(self, inputs: Tensor, statistics: bool, features: bool) -> Tensor:
        """The teacher's logits (B, C) for inputs (B, c, H, W), noting statistics and features on the way."""
        self.batch, self.running, self.features = [], [], None
        handles = []
        if statistics:
            handles += [m.register_forward_pre_hook(self._note_statistics) for m in self._learned]
        if features and self._classifier is not None:
            handles.append(self._classifier.register_forward_pre_hook(self._note_features))
        try:
            logits: Tensor = self.teacher(inputs)
        finally:
            for handle in handles:
                handle.remove()
        return logits.float()

    def _note_statistics(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen: Tensor = arguments[0]
        axes = [d for d in range(seen.dim()) if d != 1]
        # in float32: sums in bf16 would drown small variances
        variance, mean = torch.var_mean(seen.float(), dim=axes, correction=0)
        self.batch.append((mean, variance))
        self.running.append(self._learned[module])

    def _note_features(self, _module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.features = arguments[0].float()
