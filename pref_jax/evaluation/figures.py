"""The report's figures as PNG bytes. Colours are Okabe and Ito's, told apart by every eye."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pref_jax.evaluation import metrics

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MOST_SLICES = 12
_GREY, _INK, _FAINT = "#6b7280", "#1f2937", "#e5e7eb"
_WIDTH = 5.2  # inches; narrow, so that the text stays readable on a telephone
_REFERENCES: dict[str, tuple[str, Any]] = {
    "uniform": ("uniform", ":"),
    "prior": ("prior", "--"),
    "length": ("length only", "-."),
    "bayes": ("best possible", "-"),
    "goal": ("the paper's goal", (0, (6, 2))),
}
_STYLE: Any = {
    "font.size": 11.5,
    "axes.edgecolor": _GREY,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "text.color": _INK,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "text.parse_math": False,  # a $ in a run's name is a dollar
}


def draw_log_loss(
    scores: Mapping[str, tuple[float, Sequence[float] | None]], references: Mapping[str, float]
) -> bytes:
    """Name -> (log loss, its interval), against references ``uniform, prior, length, bayes``."""
    height = 1.5 + 0.5 * max(len(scores), 2) + 0.25 * math.ceil(len(references) / 2)
    figure, (axes,) = _start(height)
    for place, (loss, interval) in enumerate(scores.values()):
        if interval is not None:
            axes.plot(interval, [place, place], color=_color(place), lw=5, alpha=0.3)
        axes.plot(loss, place, _marker(place), color=_color(place), ms=9)
        axes.annotate(
            f"{loss:.4f}",
            (loss, place),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            fontsize=10.5,
        )
    _draw_references(axes.axvline, references)
    axes.set_yticks(range(len(scores)), [_shorten(name) for name in scores])
    axes.set_ylim(len(scores) - 0.5, -0.8)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("log loss (lower is better)")
    axes.margins(x=0.08)
    _add_legend(figure, axes)
    return _finish(figure)


def draw_bars(values: Mapping[str, float], *, label: str, digits: int) -> bytes:
    """Name -> a number, as bars from zero."""
    figure, (axes,) = _start(1.2 + 0.36 * max(len(values), 2))
    for place, value in enumerate(values.values()):
        axes.barh(place, value, color=_color(place), alpha=0.85, height=0.66)
        axes.annotate(
            f"{value:.{digits}f}",
            (value, place),
            xytext=(5 if value >= 0 else -5, 0),
            textcoords="offset points",
            ha="left" if value >= 0 else "right",
            va="center",
            fontsize=10.5,
        )
    axes.axvline(0, color=_GREY, lw=1)
    axes.set_yticks(range(len(values)), [_shorten(name) for name in values])
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(label)
    axes.margins(x=0.24)
    return _finish(figure)


def draw_learning_curves(
    curves: Mapping[str, Mapping[str, tuple[Sequence[int], Sequence[float]]]],
    references: Mapping[str, float],
) -> bytes:
    """Name -> ``train`` (thin, smoothed) and ``valid`` (marked) losses by step."""
    figure, (axes,) = _start(3.5 + 0.22 * (len(curves) + len(references)) / 2)
    for place, (name, splits) in enumerate(curves.items()):
        steps, losses = splits["train"]
        color = _color(place)
        axes.plot(steps, smooth(losses), color=color, lw=1.2, alpha=0.55)
        steps, losses = splits["valid"]
        style = f"-{_marker(place)}"
        axes.plot(steps, losses, style, color=color, lw=2, ms=5, label=_shorten(name))
    _draw_references(axes.axhline, references)
    # The first updates of a fresh head may be far off; they must not flatten the rest.
    shown = [loss for splits in curves.values() for _, y in splits.values() for loss in smooth(y)]
    shown += references.values()
    low, high = min(shown), float(np.quantile(shown, 0.98))
    high = max([high, *references.values()])
    room = 0.06 * max(high - low, 0.01)
    axes.set_ylim(low - room, high + room)
    axes.set_xlabel("update")
    axes.set_ylabel("loss (nats)")
    _add_legend(figure, axes)
    return _finish(figure)


def draw_calibration(bins: Mapping[str, Sequence[Mapping[str, float]]]) -> bytes:
    """Name -> `metrics.bin_reliability`; the size of a point follows its share of the rows."""
    figure, (axes,) = _start(4.6 + 0.11 * len(bins))
    axes.plot([0, 1], [0, 1], color=_GREY, lw=1, ls="--")
    for place, (name, parts) in enumerate(bins.items()):
        rows = sum(part["rows"] for part in parts)
        x = [part["confidence"] for part in parts]
        y = [part["accuracy"] for part in parts]
        size = [12 + 400 * part["rows"] / rows for part in parts]
        error = metrics.measure_calibration_error(parts)
        label = f"{_shorten(name)} (error {error:.3f})"
        axes.plot(x, y, color=_color(place), lw=1.2, alpha=0.6)
        axes.scatter(
            x, y, size, color=_color(place), marker=_marker(place), alpha=0.75, label=label
        )
    axes.set_xlim(0.3, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("probability given to the predicted class")
    axes.set_ylabel("share that was right")
    _add_legend(figure, axes, columns=1, marker_size=40)
    return _finish(figure)


def draw_confusion(confusions: Mapping[str, Sequence[Sequence[int]]]) -> bytes:
    """Name -> counts [3, 3], rows the truth; shades are shares of a row."""
    columns = min(2, len(confusions))
    lines = math.ceil(len(confusions) / columns)
    figure, axes = _start(2.8 * lines if columns == 2 else 4.2, lines, columns)
    for axis, (name, counts) in zip(axes, confusions.items(), strict=False):
        table = np.array(counts, float)
        share = table / np.maximum(table.sum(1, keepdims=True), 1)
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for truth in range(3):
            for guess in range(3):
                axis.text(
                    guess,
                    truth,
                    f"{share[truth, guess]:.0%}\n{int(table[truth, guess])}",
                    ha="center",
                    va="center",
                    fontsize=10.5,
                    color="white" if share[truth, guess] > 0.66 else _INK,
                )
        axis.set_xticks(range(3), ["A", "B", "tie"])
        axis.set_yticks(range(3), ["A", "B", "tie"])
        axis.grid(visible=False)
        axis.set_title(_shorten(name), fontsize=11)
        axis.set_xlabel("predicted")
        axis.set_ylabel("judged")
    for axis in axes[len(confusions) :]:
        axis.remove()
    return _finish(figure)


def draw_slices(
    slices: Mapping[str, Mapping[str, Mapping[str, Any]]],
    baseline: Mapping[str, Mapping[str, Any]] | None,
) -> bytes:
    """Run name -> slice -> ``rows, log_loss``; ``baseline``: the same of the length baseline.

    Of more than `MOST_SLICES` slices, those with the most rows are drawn.
    """
    rows: dict[str, int] = {}
    for parts in slices.values():
        for name, part in parts.items():
            rows[name] = max(rows.get(name, 0), part["rows"])
    largest = sorted(rows, key=lambda name: -rows[name])[:MOST_SLICES]
    shown = [name for name in rows if name in largest]
    figure, (axes,) = _start(1.4 + (0.42 + 0.1 * len(slices)) * len(shown) + 0.11 * len(slices))
    for place, (run, parts) in enumerate(slices.items()):
        offset = (place - (len(slices) - 1) / 2) * 0.6 / max(len(slices), 2)
        points = [(parts[s]["log_loss"], i + offset) for i, s in enumerate(shown) if s in parts]
        style = {"color": _color(place), "ms": 8, "ls": "", "label": _shorten(run)}
        axes.plot(*zip(*points, strict=True), marker=_marker(place), **style)
    if baseline is not None:
        points = [(baseline[s]["log_loss"], i) for i, s in enumerate(shown) if s in baseline]
        style = {"color": _GREY, "ms": 22, "mew": 2, "ls": "", "label": "length only"}
        axes.plot(*zip(*points, strict=True), marker="|", **style)
    axes.set_yticks(range(len(shown)), [f"{_shorten(s, 22)}\n{rows[s]:,} rows" for s in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel("log loss (lower is better)")
    axes.margins(x=0.08)
    _add_legend(figure, axes, marker_size=8)
    return _finish(figure)


def smooth(values: Sequence[float], points: int = 20) -> list[float]:
    """Running mean over the last 1 / ``points`` of the curve, itself as long as the curve."""
    window = max(1, len(values) // points)
    total = np.cumsum([0.0, *values])
    return [
        float((total[i] - total[max(0, i - window)]) / min(i, window)) for i in range(1, len(total))
    ]


def _start(height: float, lines: int = 1, columns: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: its global state and its choice of a window system are of no use here.
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        return figure, list(np.ravel(figure.subplots(lines, columns)))


def _finish(figure: Any) -> bytes:
    import warnings

    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # names in any script
        figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": ""})
    return buffer.getvalue()


def _draw_references(draw: Any, references: Mapping[str, float]) -> None:
    for key, (label, style) in _REFERENCES.items():
        if key in references:
            text = f"{label} {references[key]:.3f}"
            draw(references[key], color=_GREY, lw=1.3, ls=style, label=text, zorder=1)


def _add_legend(figure: Any, axes: Any, columns: int = 2, marker_size: float | None = None) -> None:
    from matplotlib import rc_context

    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    with rc_context(_STYLE):
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    for handle in legend.legend_handles if marker_size is not None else ():
        if hasattr(handle, "set_sizes"):
            handle.set_sizes([marker_size])
        else:
            handle.set_markersize(marker_size)


def _color(place: int) -> str:
    return COLORS[place % len(COLORS)]


def _marker(place: int) -> str:
    return MARKERS[(place + place // len(COLORS)) % len(MARKERS)]


def _shorten(name: str, length: int = 26) -> str:
    """One line, its end kept (runs differ there), and no underscore first: those are not drawn."""
    line = " ".join(name.split())
    line = line if len(line) <= length else "…" + line[1 - length :]
    return f" {line}" if line.startswith("_") else line
