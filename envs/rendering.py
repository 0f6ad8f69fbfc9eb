"""What `render()` shows: the buffer's images, its classes, its difficulty, and the coefficients in force."""

from __future__ import annotations

import math

import numpy as np

from envs.spaces import Memory
from ssdkd.coefficients import RANGES, Coefficients
from ssdkd.engine import Engine
from ssdkd.tracking.charts import BLUE, GREY, Chart, Line, to_pixels
from ssdkd.tracking.pictures import replay_grid
from ssdkd.tracking.tensorboard import class_chart

HEIGHT, LEFT, RIGHT = 600, 560, 400  # the size never changes, so that frames make a film


def as_picture(engine: Engine, memory: Memory) -> np.ndarray:
    """The episode now, for `render_mode="rgb_array"`: -> (600, 960, 3) uint8."""
    frame = np.full((HEIGHT, LEFT + RIGHT, 3), 255, dtype=np.uint8)
    grid = _fitted(replay_grid(engine.buffer, engine.spec.num_classes, classes=10, tile=44), HEIGHT, LEFT)
    frame[: grid.shape[0], : grid.shape[1]] = grid
    panels = [class_chart(engine), difficulty_chart(engine), coefficient_chart(memory)]
    frame[:, LEFT:] = to_pixels(panels, columns=1, width=RIGHT, height=HEIGHT // len(panels))
    return frame


def as_text(engine: Engine, memory: Memory) -> str:
    """The episode now in three lines, for `render_mode="human"`."""
    now = memory.now
    coefficients = ", ".join(f"{name} {value:.3g}" for name, value in memory.coefficients.as_dict().items())
    return (
        f"round {engine.round}, {100 * engine.progress:.0f} % of the budget, reward {memory.reward:+.4f}\n"
        f"  probe: KL {now['probe_kl']:.4f}, agreement {100 * now['probe_agreement']:.1f} %; "
        f"buffer: {engine.buffer.size} images, class balance {abs(now['class_entropy']):.3f}, "
        f"confidence {now['confidence_q50']:.2f}\n"
        f"  {coefficients}"
    )


def difficulty_chart(engine: Engine) -> Chart:
    """How many images the teacher finds how hard."""
    confidence = engine.buffer.filled().confidence.cpu().numpy()
    counts, _ = np.histogram(1.0 - confidence, bins=10, range=(0.0, 1.0))
    return Chart("Images by difficulty", "1 - teacher's confidence, in tenths", bars=counts.tolist(), whole_x=True)


def coefficient_chart(memory: Memory) -> Chart:
    """Each coefficient in its range, from the lowest to the highest value, beside what is neutral."""
    lines = [
        _steps("now", memory.coefficients.to_unit(), 0.3, BLUE, 3.0),
        _steps("neutral", Coefficients().to_unit(), 0.4, GREY, 1.6),
    ]
    names = [r.name for r in RANGES]
    return Chart("Coefficients in their ranges", "", lines, y_range=(-1.05, 1.05), names=names)


def _steps(label: str, values: list[float], reach: float, colour: str, width: float) -> Line:
    """A level stretch for each value, around 0, 1, 2, ..., and a gap after it."""
    x = [x for place in range(len(values)) for x in (place - reach, place + reach, place)]
    y = [y for value in values for y in (value, value, math.nan)]
    return Line(label, x, y, colour, width=width)


def _fitted(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Made smaller, if it must be, to fit."""
    from PIL import Image

    factor = min(1.0, height / picture.shape[0], width / picture.shape[1])
    if factor == 1.0:
        return picture
    size = (max(1, int(picture.shape[1] * factor)), max(1, int(picture.shape[0] * factor)))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))
