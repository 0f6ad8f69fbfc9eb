"""ssdkd: make a small neural network out of a big one without the big one's training data.

result = ssdkd.distill(teacher, student, dataset="mnist", rounds=200)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssdkd.run import Result, distill

__version__ = "0.1.0"
__all__ = ["Result", "__version__", "distill"]


def __getattr__(name: str) -> Any:
    # Only when asked for: `import ssdkd` and `ssdkd --help` need no PyTorch.
    if name in ("Result", "distill"):
        from ssdkd import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
