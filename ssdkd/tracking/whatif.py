"""What-if: how likely a sample is kept, and replayed, as a function of each of its features alone.

Both functions are log-linear in the features, so a curve follows from the coefficients alone; the other features
stay as they are in the median sample of the buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ssdkd.coefficients import RANGES, Coefficients, Range
from ssdkd.selection import EPSILON
from ssdkd.tracking.charts import BLUE, GREY, ORANGE, Chart, Line

Curve = Callable[[np.ndarray, Mapping[str, float]], np.ndarray]


def formula_at(entry: Range, progress: float) -> float:
    """The SSD-KD formula's value of a coefficient, straight in action space from its start to its end."""
    start, end = (entry.to_unit(value) for value in entry.formula)
    return entry.from_unit(start + (end - start) * progress)


def what_if(statistics: Mapping[str, float], coefficients: Mapping[str, float]) -> list[Chart]:
    """What is kept by class size, confidence and visits; P by KL, class size and confidence; the loss weight by KL.

    `statistics` are those of a round. Grey: neutral coefficients; orange: the SSD-KD formula. The shaded range holds
    80 % of the buffer's samples.
    """
    p_low, p_middle, p_high = (statistics[f"confidence_q{q}"] for q in (10, 50, 90))
    d_low, d_middle, d_high = (max(statistics[f"delta_q{q}"], 1e-5) for q in (10, 50, 90))
    crowding = np.geomspace(0.25, 4.0, 25)
    confidence = np.concatenate([np.linspace(0.02, 0.9, 23), 1.0 - np.geomspace(0.09, 0.005, 12)])
    v_low, v_middle, v_high = (statistics[f"visits_q{q}"] for q in (10, 50, 90))
    visits = np.geomspace(1.0, max(4.0 * v_high, 10.0), 25)
    delta = np.geomspace(min(d_low, d_middle / 4.0) / 2.0, max(d_high, d_middle * 4.0) * 2.0, 25)

    def phi_by_class(x: np.ndarray, c: Mapping[str, float]) -> np.ndarray:
        return x ** -c["w_div"]

    def phi_by_confidence(x: np.ndarray, c: Mapping[str, float]) -> np.ndarray:
        return ((1.0 - x + EPSILON) / (1.0 - p_middle + EPSILON)) ** c["gamma"]

    def kept_by_visits(x: np.ndarray, c: Mapping[str, float]) -> np.ndarray:
        return ((1.0 + x) / (1.0 + v_middle)) ** -c["wear"]

    def replay_by_delta(x: np.ndarray, c: Mapping[str, float]) -> np.ndarray:
        return ((x + EPSILON) / (d_middle + EPSILON)) ** c["alpha"]

    def weight_by_delta(x: np.ndarray, c: Mapping[str, float]) -> np.ndarray:
        return replay_by_delta(x, c) ** -c["beta"]

    def replay_by_class(x: np.ndarray, c: Mapping[str, float]) -> np.ndarray:
        return phi_by_class(x, c) ** c["eta"]

    def replay_by_confidence(x: np.ndarray, c: Mapping[str, float]) -> np.ndarray:
        return phi_by_confidence(x, c) ** c["eta"]

    neutral = Coefficients().as_dict()
    formula = {entry.name: formula_at(entry, statistics["progress"]) for entry in RANGES}

    def chart(title: str, label: str, x: np.ndarray, curve: Curve, shade: tuple[float, float] | None) -> Chart:
        shown = ((GREY, "neutral", neutral), (ORANGE, "ssdkd", formula), (BLUE, "now", coefficients))
        lines = [
            Line(
                name,
                x.tolist(),
                curve(x, c).tolist(),
                colour,
                dashed=name != "now",
                width=2.4 if name == "now" else 1.6,
            )
            for colour, name, c in shown
        ]
        heights = np.concatenate([np.asarray(line.y) for line in lines])
        low, high = min(float(heights.min()), 0.5) / 1.2, max(float(heights.max()), 2.0) * 1.2
        is_log = x is not confidence
        return Chart(title, label, lines, log_x=is_log, log_y=True, y_range=(low, high), shade=shade)

    kept, replayed = "Kept: phi", "Replayed: P"  # two charts of a kind follow each other
    by_class, by_confidence, by_delta = (
        "samples of its class, times the mean",
        "teacher's confidence",
        "KL last seen (nats)",
    )
    return [
        chart(f"{kept} by class size", by_class, crowding, phi_by_class, None),
        chart(f"{kept} by confidence", by_confidence, confidence, phi_by_confidence, (p_low, p_high)),
        chart("Kept by times replayed", "times replayed", visits, kept_by_visits, (max(v_low, 1.0), max(v_high, 1.0))),
        chart(f"{replayed} by KL", by_delta, delta, replay_by_delta, (d_low, d_high)),
        chart("Weight in the loss by KL", by_delta, delta, weight_by_delta, (d_low, d_high)),
        chart(f"{replayed} by class size", by_class, crowding, replay_by_class, None),
        chart(f"{replayed} by confidence", by_confidence, confidence, replay_by_confidence, (p_low, p_high)),
    ]
