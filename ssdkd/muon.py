"""Muon: momentum whose steps move the weights of a layer in all directions alike.

The gradient of a layer's weights, seen as a matrix, has few large singular values: a step of SGD goes along those and
leaves the rest for later. Muon (Jordan, 2024) takes the step whose singular values are all about 1 instead. It learns
faster early in a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ssdkd.models.counting import called_in

ITERATIONS = 5
POLYNOMIAL = (3.4445, -4.7750, 2.0315)  # of Newton and Schulz's iteration: odd, steep at 0, near 1 for 0.7 to 1.2


def orthogonal(matrices: list[Tensor]) -> list[Tensor]:
    """Matrices (r, c) with the same singular vectors, and singular values of about 1, or of sqrt(r / c) where r > c."""
    # Newton and Schulz multiply X by a polynomial of X X', again and again. Those square matrices, X' X where it is the
    # smaller, are multiplied with each other, all of one size together; X itself once at the end.
    stacks = [(places, torch.stack([matrices[place] for place in places])) for _, places in alike(matrices)]
    norms = [torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) for _, x in stacks]
    scales = torch._foreach_reciprocal(torch._foreach_clamp_min(norms, 1e-12))
    grams = [torch.bmm(x.mT, x) if is_tall(x) else torch.bmm(x, x.mT) for _, x in stacks]
    squares = [n * gram for n, gram in zip(torch._foreach_pow(scales, 2), grams, strict=True)]
    factors = list(squares)
    for _, places in alike([square[0] for square in squares]):
        parts = iterated(torch.cat([squares[place] for place in places]))
        for place, factor in zip(places, parts.split([len(squares[place]) for place in places]), strict=True):
            factors[place] = factor
    found = list(matrices)
    for (places, x), n, factor in zip(stacks, scales, factors, strict=True):
        tall = is_tall(x)
        turned = torch.bmm(x, n * (x.shape[1] / x.shape[2]) ** 0.5 * factor) if tall else torch.bmm(n * factor, x)
        for place, matrix in zip(places, turned, strict=True):
            found[place] = matrix
    return found


def is_tall(matrices: Tensor) -> bool:
    """Whether these (N, r, c) have more rows than columns."""
    return matrices.shape[1] > matrices.shape[2]


def alike(matrices: list[Tensor]) -> list[tuple[tuple[int, int], list[int]]]:
    """Each shape among them, and where it is."""
    places: dict[tuple[int, int], list[int]] = {}
    for place, matrix in enumerate(matrices):
        places.setdefault((matrix.shape[0], matrix.shape[1]), []).append(place)
    return list(places.items())


def iterated(squares: Tensor) -> Tensor:
    """What X is multiplied by in all, where these are X X': (N, r, r) -> (N, r, r)."""
    a, b, c = POLYNOMIAL
    product = squares
    for iteration in range(ITERATIONS):
        factor = torch.baddbmm(squares, squares, squares, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = torch.bmm(factor, product) if iteration else factor
        if iteration < ITERATIONS - 1:
            squares = torch.bmm(torch.bmm(factor, squares), factor)
    return product


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 matrices are not rounded to TF32 on a GPU, though the process, or its container, allows that.

    The iteration is for eigenvalues from 0 to 1: those that rounding brings below 0 grow twelvefold in each turn.
    """
    switches: Any = torch.backends.cuda.matmul
    newer = hasattr(switches, "fp32_precision")  # of a later PyTorch, where the older one, put back, is not what it was
    allowed = switches.fp32_precision if newer else torch.get_float32_matmul_precision()
    if allowed not in ("tf32", "high", "medium"):
        yield
        return
    put: Any = partial(setattr, switches, "fp32_precision") if newer else torch.set_float32_matmul_precision
    put("ieee" if newer else "highest")
    try:
        yield
    finally:
        put(allowed)


def layers_of(student: nn.Module) -> list[Any]:
    """Its linear and convolutional layers, as it defines them."""
    return [m for m in student.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))]


def head_of(student: nn.Module, shape: tuple[int, int, int]) -> nn.Module | None:
    """The layer that images of that shape go through last, wherever it is defined; None where not all are called."""
    layers = layers_of(student)
    called = called_in(student, layers, shape, "the student")
    return called[-1] if called and set(called) == set(layers) else None


class Muon(torch.optim.Optimizer):
    """Muon for the weights of hidden layers; SGD with momentum for all others, at the same learning rate.

    Hidden layers are the linear and convolutional ones, but for the head, by default the last that the student has, and
    for those with one input an output (depthwise convolutions, and grey images' first).
    """

    grad_scale: Tensor | None = None  # by which gradients are divided, as in PyTorch's fused optimisers

    def __init__(
        self,
        student: nn.Module,
        lr: float,
        momentum: float,
        weight_decay: float,
        nesterov: bool,
        head: nn.Module | None = None,
    ) -> None:
        layers = layers_of(student)
        head = head or (layers[-1] if layers else None)
        of_hidden = {id(layer.weight) for layer in layers if layer is not head and layer.weight.shape[1] > 1}
        groups: list[dict[str, Any]] = [{"params": [], "turned": turned} for turned in (True, False)]
        for weight in student.parameters():
            if weight.requires_grad:
                groups[id(weight) not in of_hidden]["params"].append(weight)
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov})

    @torch.no_grad()
    @full_precision()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            steps = self._steps(weights, group["momentum"], group["nesterov"])
            torch._foreach_mul_(weights, 1.0 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, turned(steps) if group["turned"] else steps, alpha=-group["lr"])

    def _steps(self, weights: list[Tensor], momentum: float, nesterov: bool) -> list[Tensor]:
        """Those of SGD with momentum."""
        gradients = [p.grad for p in weights if p.grad is not None]
        if self.grad_scale is not None:
            torch._foreach_div_(gradients, self.grad_scale)
        for p in weights:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        moving = [self.state[p]["momentum_buffer"] for p in weights]
        torch._foreach_mul_(moving, momentum)
        torch._foreach_add_(moving, gradients)
        return list(torch._foreach_add(gradients, moving, alpha=momentum)) if nesterov else moving


def turned(steps: list[Tensor]) -> list[Tensor]:
    """Steps (outputs, inputs, ...) made orthogonal; longer where there are more outputs than inputs."""
    lying = [step.movedim(1, -1) for step in steps]  # as channels last lie anyway
    flat = orthogonal([step.flatten(1) for step in lying])
    return [matrix.view(step.shape).movedim(-1, 1) for matrix, step in zip(flat, lying, strict=True)]
