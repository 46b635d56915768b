"""Table and figure of a race."""

import io
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from pref_jax.errors import RunError

NAMES = {"ours": "ours", "trainer": "Trainer", "grouped": "Trainer, grouped by length"}
_PEERS = ("trainer", "grouped")


class Quantity(NamedTuple):
    """What is compared: its name, unit of the table, unit's size, and whether more is better."""

    name: str
    unit: float
    more: bool
    digits: int


QUANTITIES = {
    "training_rows_per_second": Quantity("training, rows/s", 1.0, True, 2),
    "prediction_rows_per_second": Quantity("prediction, rows/s", 1.0, True, 1),
    "tokenising_rows_per_second": Quantity("tokenising, rows/s", 1.0, True, 0),
    "first_update_seconds": Quantity("start to first update, s", 1.0, False, 1),
    "peak_memory_bytes": Quantity("peak memory in training, GB", 1e9, False, 2),
}


def compare(turns: list[dict[str, Any]], rounds: Iterable[int]) -> dict[str, Any]:
    """Median and range of every quantity, and ratios within each round.

    A ratio above 1 is in our favour: ours over theirs for rates, theirs over ours for seconds and
    bytes. Our first turn starts with empty caches; its start stands apart and in no ratio.

    Args:
      turns: as in the JSON.
      rounds: those in which every contestant had its turn.

    Returns:
      ``{quantity: {contestant: spread, "ratio": {peer: spread}}}``, spread being ``median``,
      ``least``, ``most``; ``cold_first_update_seconds``; ``largest_logit_difference``.
    """
    at = {(turn["round"], turn["contestant"]): turn for turn in turns}
    rounds = sorted(rounds)
    result: dict[str, Any] = {"rounds": len(rounds)}
    for key, quantity in QUANTITIES.items():
        used = rounds
        if key == "first_update_seconds":
            used = [number for number in rounds if not at[number, "ours"]["cold"]]
        values = {
            name: [at[number, name][key] for number in (used if name == "ours" else rounds)]
            for name in NAMES
        }
        ratios = {
            peer: [
                (at[number, "ours"][key] / at[number, peer][key]) ** (1 if quantity.more else -1)
                for number in used
            ]
            for peer in _PEERS
        }
        result[key] = {name: _spread(list_) for name, list_ in values.items()}
        result[key]["ratio"] = {peer: _spread(list_) for peer, list_ in ratios.items()}
    cold = [turn["first_update_seconds"] for turn in turns if turn["cold"]]
    result["cold_first_update_seconds"] = _spread(cold)
    logits = [np.array(at[rounds[0], name]["logits"]) for name in NAMES]
    result["largest_logit_difference"] = float(
        max(np.abs(logits[0] - other).max() for other in logits[1:])
    )
    return result


def refuse_other_work(
    turns: list[dict[str, Any]], comparison: dict[str, Any], precision: str
) -> None:
    """Refuses a race whose sides did not compute the same.

    Logits are without dropout. The first losses are of the same rows and differ by dropout, which
    moves the mean over an update by far less than half.

    Raises:
      RunError: logits or losses are too far apart.
    """
    largest = max(abs(value) for turn in turns for row in turn["logits"] for value in row)
    allowed = (1e-3 if precision == "float32" else 0.1) * max(1.0, largest)
    apart = comparison["largest_logit_difference"]
    first = {turn["contestant"]: turn["losses"][0] for turn in reversed(turns)}
    if apart > allowed:
        what = f"logits of the same rows are up to {apart:.2g} apart"
    elif not 0.5 < first["ours"] / first["trainer"] < 2.0:
        what = f"the first losses are {first['ours']:.3f} and {first['trainer']:.3f}"
    else:
        return
    raise RunError(
        "the two sides",
        what,
        "their work differs, so a ratio would say nothing; try another preset",
    )


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {
        "median": float(statistics.median(values)),
        "least": float(min(values)),
        "most": float(max(values)),
    }


def _show(spread: dict[str, float] | None, unit: float, digits: int) -> str:
    if spread is None:
        return "-"
    median, least, most = (
        f"{spread[name] / unit:,.{digits}f}" for name in ("median", "least", "most")
    )
    return median if least == most else f"{median} ({least} to {most})"


def write_table(result: dict[str, Any]) -> str:
    """The race as Markdown: table, proof that the work was the same, machine and versions."""
    comparison, work, environment = (result[name] for name in ("comparison", "work", "environment"))
    header = [*NAMES.values(), "ours against Trainer", "against grouped"]
    lines = [
        "| median (least to most) | " + " | ".join(header) + " |",
        "|---" + "|---:" * len(header) + "|",
    ]
    for key, quantity in QUANTITIES.items():
        entry = comparison[key]
        cells = [_show(entry[name], quantity.unit, quantity.digits) for name in NAMES]
        cells += [_show(entry["ratio"][peer], 1.0, 2) for peer in _PEERS]
        lines.append(f"| {quantity.name} | {' | '.join(cells)} |")
        if key == "first_update_seconds":
            cold = _show(comparison["cold_first_update_seconds"], 1.0, 1)
            lines.append(f"| the same with empty caches, s | {cold} |  |  |  |  |")
    section = result["settings"]["config"]
    versions = environment["versions"]
    named = ("python", "jax", "torch", "transformers", "accelerate", "peft", "tokenizers")
    cpu = environment["cpu"]
    devices = ", ".join(f"{entry['count']} x {entry['kind']}" for entry in environment["devices"])
    lines += [
        "",
        "Ratios above 1 are in our favour: of rates ours over theirs, of seconds and bytes theirs "
        "over ours, within a round.",
        "",
        f"- Work: {section['input']['layout']}, {section['input']['max_length']} tokens "
        f"({work['tokens_per_row']:.0f} a row on average), {work['rows']} rows, updates of "
        f"{work['batch_size']}, {work['precision']}, "
        f"{work['parameters']['total'] / 1e6:.1f} M parameters "
        f"({work['parameters']['trainable'] / 1e6:.1f} M trained), "
        f"{comparison['rounds']} rounds; Trainer in batches of "
        f"{result['settings']['peer_batch_size']}.",
        f"- Initial weights: {section['model']['pretrained'] or 'random'}. Largest difference "
        f"between two logits of the same row: {comparison['largest_logit_difference']:.1e}.",
    ]
    for name in NAMES:
        first = next(turn for turn in result["turns"] if turn["contestant"] == name)
        losses = ", ".join(f"{loss:.3f}" for loss in first["losses"][:5])
        lines.append(
            f"- Losses of the first updates, {NAMES[name]}: {losses} "
            f"(attention {first['attention']}, {first['device']})."
        )
    lines += [
        f"- Machine: {cpu['model']}, {cpu['cores']} cores; JAX on {devices}.",
        "- Versions: " + ", ".join(f"{n} {versions[n]}" for n in named if n in versions) + ".",
    ]
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any]) -> bytes:
    """A bar with its range per contestant, a panel per quantity, as PNG."""
    from matplotlib.figure import Figure

    from pref_jax.evaluation.figures import COLORS

    comparison = result["comparison"]
    figure = Figure(figsize=(9.0, 5.2), layout="constrained")
    panels = figure.subplots(2, 3).flat
    for axes, (key, quantity) in zip(panels, QUANTITIES.items(), strict=False):
        for place, (name, label) in enumerate(NAMES.items()):
            spread = comparison[key][name]
            if spread is None:
                continue
            median, least, most = (
                spread[part] / quantity.unit for part in ("median", "least", "most")
            )
            axes.bar(place, median, color=COLORS[place], label=label, width=0.7)
            axes.errorbar(
                place, median, [[median - least], [most - median]], color="#1f2937", capsize=4
            )
            axes.annotate(
                f"{median:,.{quantity.digits}f}",
                (place, most),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
            )
        arrow = "more is better" if quantity.more else "less is better"
        axes.set_title(f"{quantity.name}\n({arrow})", fontsize=10)
        axes.set_xticks([])
        axes.margins(y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    rest = list(panels)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    legend = rest[0] if rest else figure.axes[-1]
    legend.legend(handles, labels, loc="center", frameon=False)
    legend.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
