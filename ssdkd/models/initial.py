"""First weights for networks that start from nothing."""

from torch import nn


def he_initialise(model: nn.Module) -> None:
    """Draw convolution weights so that the variance of gradients survives ReLU (He et al. 2015, fan-out)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
