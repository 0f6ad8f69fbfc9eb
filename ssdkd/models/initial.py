"""First weights for networks that start from nothing."""

from typing import Literal

from torch import nn


def he_initialise(model: nn.Module, keeps: Literal["fan_in", "fan_out"] = "fan_out") -> None:
    """Draw convolution weights so that ReLU keeps the variance of gradients; by fan-in, of values (He et al. 2015)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=keeps, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
