"""Small charts, described once and drawn twice: as SVG for the report, as pixels for TensorBoard and `render()`.

Drawing takes milliseconds, where a plotting library takes a tenth of a second, so that it can happen in a run.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFont

BLUE, ORANGE, GREY, GREEN, RED, PURPLE = "#2f6db5", "#e07b1f", "#8a8f98", "#2e9e62", "#c8423b", "#8452a8"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, "#b08d14", "#1798a6", "#6b5b4b", "#d162a4", "#5b6bd6", GREY)
INK, GRID, FONT = "#22262b", "#dfe2e6", 12
LEGEND_ROW = 16  # pixels

Point = tuple[float, float]
Anchor = Literal["start", "middle", "end"]


@dataclass(frozen=True)
class Line:
    """A curve; gaps where y is not finite."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = BLUE
    dashed: bool = False
    width: float = 1.8


@dataclass(frozen=True)
class Band:
    """The area between two curves."""

    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    colour: str = BLUE


@dataclass(frozen=True)
class Chart:
    """What is drawn, without its size."""

    title: str
    x_label: str
    lines: Sequence[Line] = ()
    bands: Sequence[Band] = ()
    bars: Sequence[float] = ()  # one bar at 0, 1, 2, ...
    log_x: bool = False
    log_y: bool = False
    y_range: tuple[float, float] | None = None
    shade: tuple[float, float] | None = None  # a range of x that is marked
    whole_x: bool = False  # ticks of x at whole numbers only
    names: Sequence[str] = ()  # what stands at 0, 1, 2, ... of x instead of numbers
    caption: str = ""  # stands under it in the report


class Canvas(Protocol):
    """Where a chart is drawn; y points down."""

    def polyline(self, points: Sequence[Point], colour: str, width: float, dashed: bool) -> None: ...

    def area(self, points: Sequence[Point], colour: str, opacity: float) -> None: ...

    def text(self, at: Point, words: str, anchor: Anchor, size: float, bold: bool) -> None: ...

    def rule(self, start: Point, end: Point) -> None: ...


def draw(chart: Chart, canvas: Canvas, left: float, top: float, width: float, height: float) -> None:
    """Draw `chart` into the rectangle given."""
    legend = _legend(chart, width - 10)
    x0, x1 = left + 52, left + width - 14
    y0, y1 = top + 28 + LEGEND_ROW * len(legend), top + height - 36
    x_low, x_high = _x_limits(chart)
    y_low, y_high = _y_limits(chart)

    def at_x(value: float) -> float:
        return x0 + (x1 - x0) * _share(value, x_low, x_high, chart.log_x)

    def at_y(value: float) -> float:
        return y1 - (y1 - y0) * min(max(_share(value, y_low, y_high, chart.log_y), 0.0), 1.0)

    canvas.text((left + 8, top + 17), chart.title, "start", FONT + 1, True)
    if chart.shade is not None:
        low, high = (at_x(min(max(edge, x_low), x_high)) for edge in chart.shade)
        canvas.area([(low, y0), (high, y0), (high, y1), (low, y1)], GREY, 0.18)
    for tick in ticks(y_low, y_high, chart.log_y, 5):
        canvas.rule((x0, at_y(tick)), (x1, at_y(tick)))
        canvas.text((x0 - 6, at_y(tick) + 4), brief(tick), "end", FONT - 1, False)
    for tick in [] if chart.names else ticks(x_low, x_high, chart.log_x, 6 if width > 300 else 4):
        if chart.whole_x and tick != round(tick):
            continue
        canvas.text((at_x(tick), y1 + 16), brief(tick), "middle", FONT - 1, False)
    for place, name in enumerate(chart.names):  # every other one lower, so that long names do not touch
        canvas.text((at_x(place), y1 + (15 if place % 2 == 0 else 28)), name, "middle", FONT - 1, False)
    canvas.text(((x0 + x1) / 2, y1 + 31), chart.x_label, "middle", FONT - 1, False)
    for position, bar in enumerate(chart.bars):
        x_left, x_right = at_x(position - 0.4), at_x(position + 0.4)
        canvas.area([(x_left, y1), (x_left, at_y(bar)), (x_right, at_y(bar)), (x_right, y1)], BLUE, 0.85)
    for band in chart.bands:
        up = [(at_x(x), at_y(y)) for x, y in zip(band.x, band.high, strict=True) if _drawable(y, chart.log_y)]
        down = [(at_x(x), at_y(y)) for x, y in zip(band.x, band.low, strict=True) if _drawable(y, chart.log_y)]
        if len(up) > 1 and len(down) > 1:
            canvas.area([*up, *reversed(down)], band.colour, 0.2)
    for line in chart.lines:
        for piece in _pieces(line, chart.log_y):
            points = [(at_x(x), at_y(y)) for x, y in piece]
            if len(points) == 1:
                points.append((points[0][0] + 2, points[0][1]))
            canvas.polyline(points, line.colour, line.width, line.dashed)
    for row, entries in enumerate(legend):
        for offset, line in entries:
            x, y = left + 10 + offset, top + 34 + LEGEND_ROW * row
            canvas.polyline([(x, y - 4), (x + 16, y - 4)], line.colour, max(line.width, 1.8), line.dashed)
            canvas.text((x + 20, y), line.label, "start", FONT - 1, False)


def _legend(chart: Chart, width: float) -> list[list[tuple[float, Line]]]:
    """The named lines, where there are several, in as many rows as they need: each with its distance from the left."""
    named = [line for line in chart.lines if line.label]
    if len(named) < 2:
        return []
    wanted = [34 + 6.3 * len(line.label) for line in named]
    fits = width / sum(wanted)
    tighter = fits if 0.85 <= fits < 1.0 else 1.0  # what one row cannot take stands in rows with room enough
    rows: list[list[tuple[float, Line]]] = [[]]
    offset = 0.0
    for line, room in zip(named, wanted, strict=True):
        if rows[-1] and offset + tighter * room > width + 8:
            rows.append([])
            offset = 0.0
        rows[-1].append((offset, line))
        offset += tighter * room
    return rows


def _x_limits(chart: Chart) -> tuple[float, float]:
    if chart.bars:
        return -0.6, len(chart.bars) - 0.4
    values = [x for line in chart.lines for x in line.x] + [x for band in chart.bands for x in band.x]
    return _widened([v for v in values if _drawable(v, chart.log_x)], chart.log_x)


def _y_limits(chart: Chart) -> tuple[float, float]:
    if chart.y_range is not None:
        return chart.y_range
    if chart.bars:
        return 0.0, max(*chart.bars, 1e-9) * 1.08
    values = [y for line in chart.lines for y in line.y]
    values += [y for band in chart.bands for edge in (band.low, band.high) for y in edge]
    low, high = _widened([v for v in values if _drawable(v, chart.log_y)], chart.log_y)
    if chart.log_y:
        margin = (high / low) ** 0.06
        return low / margin, high * margin
    margin = 0.06 * (high - low)
    return (0.0 if 0.0 <= low < 0.5 * high else low - margin), high + margin


def _widened(values: Sequence[float], log: bool) -> tuple[float, float]:
    if not values:
        return (0.1, 10.0) if log else (0.0, 1.0)
    low, high = min(values), max(values)
    if log and high < 1.5 * low:
        return low / 2.0, high * 2.0
    if not log and high - low < 1e-9 * max(abs(high), 1.0):
        return low - 0.5, high + 0.5
    return low, high


def _drawable(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0.0 or not log)


def _share(value: float, low: float, high: float, log: bool) -> float:
    if log:
        return math.log(max(value, 1e-300) / low) / math.log(high / low)
    return (value - low) / (high - low)


def _pieces(line: Line, log: bool) -> list[list[Point]]:
    pieces: list[list[Point]] = [[]]
    for x, y in zip(line.x, line.y, strict=True):
        if _drawable(y, log):
            pieces[-1].append((x, y))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def ticks(low: float, high: float, log: bool, at_most: int) -> list[float]:
    """Round numbers between `low` and `high`."""
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        steps = next((s for s in ((1, 2, 5), (1, 3), (1,)) if len(s) * (last - first) <= at_most + 2), (1,))
        found = [m * 10.0**e for e in range(first, last + 1) for m in steps]
        inside = [t for t in found if low * 0.999 <= t <= high * 1.001]
        return inside[:: max(1, -(-len(inside) // at_most))]
    rough = (high - low) / at_most
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(m * scale for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * scale >= rough * 0.999)
    start = math.ceil(low / step - 1e-9)
    return [i * step for i in range(start, math.floor(high / step + 1e-9) + 1)]


def brief(value: float) -> str:
    """A number as short as it can be read: 12000 -> 12k, 0.00012 -> 1.2e-4."""
    size = abs(value)
    if size < 1e-12:
        return "0"
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"


# -- SVG ----------------------------------------------------------------------------------------------------


class _Svg:
    """Text and rules take the page's colours, so that one drawing fits light and dark."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def polyline(self, points: Sequence[Point], colour: str, width: float, dashed: bool) -> None:
        where = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<polyline points="{where}" fill="none" stroke="{colour}" stroke-width="{width:g}"'
            f' stroke-linejoin="round"{dash}/>'
        )

    def area(self, points: Sequence[Point], colour: str, opacity: float) -> None:
        where = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polygon points="{where}" fill="{colour}" fill-opacity="{opacity:g}"/>')

    def text(self, at: Point, words: str, anchor: Anchor, size: float, bold: bool) -> None:
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{at[0]:.1f}" y="{at[1]:.1f}" text-anchor="{anchor}" font-size="{size:g}"{weight}>'
            f"{html.escape(words)}</text>"
        )

    def rule(self, start: Point, end: Point) -> None:
        (x1, y1), (x2, y2) = start, end
        self.parts.append(f'<line class="rule" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')


def to_svg(chart: Chart, width: int = 420, height: int = 250) -> str:
    """The chart as an SVG element that grows with the page."""
    canvas = _Svg()
    draw(chart, canvas, 0, 0, width, height)
    label = html.escape(chart.title, quote=True)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(canvas.parts)}</svg>'


# -- pixels -------------------------------------------------------------------------------------------------

_FINE = 2  # drawn this many times larger, then averaged, for smooth edges


class _Pixels:
    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width * _FINE, height * _FINE), "white")
        self.pen = ImageDraw.Draw(self.image)

    def polyline(self, points: Sequence[Point], colour: str, width: float, dashed: bool) -> None:
        fine = [(x * _FINE, y * _FINE) for x, y in points]
        for piece in _dashes(fine, 5.0 * _FINE, 4.0 * _FINE) if dashed else [fine]:
            self.pen.line(piece, fill=colour, width=round(width * _FINE), joint="curve")

    def area(self, points: Sequence[Point], colour: str, opacity: float) -> None:
        mixed = tuple(round(255 + (int(colour[i : i + 2], 16) - 255) * opacity) for i in (1, 3, 5))
        self.pen.polygon([(x * _FINE, y * _FINE) for x, y in points], fill=mixed)

    def text(self, at: Point, words: str, anchor: Anchor, size: float, bold: bool) -> None:
        where = {"start": "ls", "middle": "ms", "end": "rs"}[anchor]
        place = (at[0] * _FINE, at[1] * _FINE)
        stroke = 1 if bold else 0
        self.pen.text(place, words, fill=INK, font=font(size * _FINE), anchor=where, stroke_width=stroke)

    def rule(self, start: Point, end: Point) -> None:
        self.pen.line([(x * _FINE, y * _FINE) for x, y in (start, end)], fill=GRID, width=_FINE)

    def array(self) -> np.ndarray:
        return np.asarray(self.image.reduce(_FINE))


def to_pixels(charts: Sequence[Chart], columns: int, width: int = 330, height: int = 230) -> np.ndarray:
    """The charts side by side, `columns` in a row: -> (H, W, 3) uint8."""
    rows = -(-len(charts) // columns)
    canvas = _Pixels(columns * width, rows * height)
    for place, chart in enumerate(charts):
        row, column = divmod(place, columns)
        draw(chart, canvas, column * width, row * height, width, height)
    return canvas.array()


@lru_cache(maxsize=16)
def font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A plain typeface that comes with Pillow."""
    return ImageFont.load_default(size)


def _dashes(points: Sequence[Point], on: float, off: float) -> list[list[Point]]:
    """Cut a line into dashes."""
    dashes: list[list[Point]] = [[points[0]]]
    drawing, left = True, on
    for (x1, y1), (x2, y2) in itertools.pairwise(points):
        length, done = math.hypot(x2 - x1, y2 - y1), 0.0
        while length - done > left:
            done += left
            corner = (x1 + (x2 - x1) * done / length, y1 + (y2 - y1) * done / length)
            if drawing:
                dashes[-1].append(corner)
            else:
                dashes.append([corner])
            drawing = not drawing
            left = on if drawing else off
        left -= length - done
        if drawing:
            dashes[-1].append((x2, y2))
    return [dash for dash in dashes if len(dash) > 1]
