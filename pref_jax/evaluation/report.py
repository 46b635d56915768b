"""Compares runs: a page that needs nothing but itself, its figures as PNG, a table as CSV."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from pref_jax.errors import InputError
from pref_jax.evaluation import figures, metrics
from pref_jax.evaluation.predictions import Predictions
from pref_jax.evaluation.runs import Run, read_runs
from pref_jax.evaluation.submission import quote_cell
from pref_jax.files import make_output_folder, refuse_foreign_files, write_durably

FIGURES = (
    "log_loss",
    "learning_curves",
    "calibration",
    "confusion",
    "slices_length",
    "slices_turns",
    "slices_source",
)
_TABLE_START = b"run,finished,steps,"
# With more runs than this, each is compared to the best one only.
_MOST_PAIRED = 5


@dataclass(frozen=True)
class Figure:
    """A PNG with its heading, one sentence on how to read it, and a text for who cannot see it."""

    name: str
    title: str
    caption: str
    alt: str
    png: bytes

    @property
    def source(self) -> str:
        """The picture as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


def make_report(
    runs: Sequence[str | Path], output: str | Path, truth: str | Path | None = None
) -> Path:
    """Writes ``index.html``, the figures and ``results.csv``.

    Args:
      runs: workdirs of ``launch/train.py``, finished or still going.
      output: the folder, made where it is missing; an earlier report in it is replaced, other
        files are left alone.
      truth: ``truth.json`` of a simulated arena, for the best loss any model could reach. Without
        it the one beside the runs' training data is taken, if they share it.

    Returns:
      The page's path.

    Raises:
      InputError: see `read_runs`; the output cannot be written, or holds files of a report's
        names that are not of one; or ``truth`` is not such a file.
    """
    read = read_runs(runs)
    bayes = _read_bayes(Path(truth), read) if truth is not None else _find_bayes(read)
    folder = make_output_folder(output)
    if not _is_table(folder / "results.csv"):
        pictures = (f"{name}.png" for name in FIGURES)
        refuse_foreign_files(folder, ("results.csv", "index.html", *pictures), "a report")
    references = _shared_references(read, bayes)
    drawn = _draw_figures(read, references)
    # First: it tells that the others are a report's, should the rest be cut short.
    write_durably(folder / "results.csv", _write_table(read, bayes).encode())
    for figure in drawn:
        write_durably(folder / f"{figure.name}.png", figure.png)
    for name in set(FIGURES) - {figure.name for figure in drawn}:
        (folder / f"{name}.png").unlink(missing_ok=True)  # of an earlier report here
    write_durably(folder / "index.html", _render(read, references, drawn).encode())
    return folder / "index.html"


def _is_table(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(_TABLE_START)) == _TABLE_START
    except OSError:
        return False


def compare_runs(first: Predictions, second: Predictions) -> dict[str, Any] | None:
    """`metrics.compare_row_losses` over the rows that both predicted; None without any.

    A row is the same where id, label, tie_allowed and word counts agree.
    """

    def index(rows: Predictions) -> dict[Any, int]:
        columns = zip(
            rows.ids, rows.labels, rows.tie_allowed, map(tuple, rows.words.tolist()), strict=True
        )
        return {key: row for row, key in enumerate(columns)}

    ours, theirs = index(first), index(second)
    shared = [key for key in ours if key in theirs]
    if not shared:
        return None
    return metrics.compare_row_losses(
        first.measure_row_losses()[[ours[key] for key in shared]],
        second.measure_row_losses()[[theirs[key] for key in shared]],
    )


def _compare_all(runs: Sequence[Run]) -> list[dict[str, Any]]:
    judged = [run for run in runs if run.predictions is not None]
    if len(judged) > _MOST_PAIRED:
        best = min(judged, key=lambda run: run.log_loss or math.inf)
        pairs = [(best, run) for run in judged if run is not best]
    else:
        pairs = list(combinations(judged, 2))
    compared = []
    for first, second in pairs:
        assert first.predictions is not None and second.predictions is not None
        outcome = compare_runs(first.predictions, second.predictions)
        if outcome is None:
            verdict = "no row in common"
        elif outcome["ci95"][0] > 0:
            verdict = f"{second.name} is better"
        elif outcome["ci95"][1] < 0:
            verdict = f"{first.name} is better"
        else:
            verdict = "no clear difference"
        compared.append({"first": first, "second": second, "verdict": verdict, **(outcome or {})})
    return compared


def _find_bayes(runs: Sequence[Run]) -> float | None:
    sources = {str((run.config.get("data") or {}).get("train") or "") for run in runs}
    source = sources.pop() if len(sources) == 1 else ""
    path = Path(source).parent / "truth.json"
    return _read_bayes(path, runs) if source and path.is_file() else None


def _read_bayes(path: Path, runs: Sequence[Run]) -> float:
    """Held-out rows are part of the training file unless the runs had a file for them."""
    own_valid = all((run.config.get("data") or {}).get("valid") for run in runs)
    try:
        losses = json.loads(path.read_text(encoding="utf-8"))["bayes_log_loss"]
        return float(losses["test" if own_valid else "train"])
    except OSError as error:
        what = error.strerror or "cannot be read"
        raise InputError(str(path), what, "name the truth.json of launch/simulate.py") from error
    except (ValueError, KeyError, TypeError) as error:
        what = "does not hold bayes_log_loss"
        raise InputError(str(path), what, "name the truth.json of launch/simulate.py") from error


def _shared_references(runs: Sequence[Run], bayes: float | None) -> dict[str, float]:
    """Baselines of the run with the lowest loss, or of the first that has any; and Bayes."""
    known = [run for run in runs if run.baseline_losses]
    best = min(known, key=lambda run: run.log_loss or math.inf, default=None)
    references = {} if best is None else dict(best.baseline_losses)
    return references if bayes is None else {**references, "bayes": bayes}


def _draw_figures(runs: Sequence[Run], references: Mapping[str, float]) -> list[Figure]:
    drawn = []
    losses = {
        run.name: (run.log_loss, (run.scores or {}).get("log_loss_ci95"))
        for run in runs
        if run.log_loss is not None
    }
    if losses:
        said = ", ".join(f"{name} {loss:.4f}" for name, (loss, _) in losses.items())
        drawn.append(
            Figure(
                "log_loss",
                "Log loss, side by side",
                "Each mark is a run's mean log loss on its held-out rows, the band its 95 % "
                "bootstrap interval, the lines what needs no model at all.",
                f"Log loss per run: {said}.",
                figures.draw_log_loss(losses, references),
            )
        )
    drawn.append(
        Figure(
            "learning_curves",
            "Learning curves",
            "Thin lines are the training loss (running mean), marks the loss on held-out rows: "
            "where the two part, the run has begun to learn rows by heart.",
            "Training and held-out loss of each run by update.",
            figures.draw_learning_curves({run.name: run.curves for run in runs}, references),
        )
    )
    judged = [run for run in runs if run.predictions is not None and run.scores is not None]
    if not judged:
        return drawn
    bins, confusions = {}, {}
    for run in judged:
        assert run.predictions is not None and run.scores is not None
        rows = run.predictions
        bins[run.name] = metrics.bin_reliability(rows.probabilities, rows.labels, rows.tie_allowed)
        confusions[run.name] = run.scores["confusion"]
    drawn.append(
        Figure(
            "calibration",
            "Can the probabilities be trusted?",
            "On the diagonal, what was said with 70 % came true in 70 % of the rows; below it the "
            "model is too sure of itself. Larger points hold more rows.",
            "Reliability diagram of each run.",
            figures.draw_calibration(bins),
        )
    )
    drawn.append(
        Figure(
            "confusion",
            "What is taken for what",
            "Each line shows where the rows with that verdict went, as a share of the line and as "
            "a count; ties are the hard part.",
            "Confusion matrix of each run, judged against predicted.",
            figures.draw_confusion(confusions),
        )
    )
    return drawn + _draw_slices(judged)


def _draw_slices(runs: Sequence[Run]) -> list[Figure]:
    titles = {
        "length": ("By length", "words of both responses together"),
        "turns": ("By turns", "how many turns the conversation has"),
        "source": ("By source", "where the rows come from"),
    }
    drawn = []
    with_baseline = next((run for run in runs if run.baselines is not None), None)
    base = {} if with_baseline is None else _slice_baseline(with_baseline)
    for kind, (title, what) in titles.items():
        slices = {run.name: (run.scores or {})["slices"].get(kind) for run in runs}
        present = {name: parts for name, parts in slices.items() if parts}
        if not present:
            continue
        number = len({part for parts in present.values() for part in parts})
        caption = f"Log loss on the held-out rows, by {what}; few rows make a shaky mean."
        if number > figures.MOST_SLICES:
            caption += f" Drawn are the {figures.MOST_SLICES} with the most rows, of {number}."
        drawn.append(
            Figure(
                f"slices_{kind}",
                title,
                caption,
                f"Log loss of each run by {what}.",
                figures.draw_slices(present, base.get(kind)),
            )
        )
    return drawn


def _slice_baseline(run: Run) -> dict[str, dict[str, dict[str, Any]]]:
    assert run.predictions is not None and run.baselines is not None
    rows = run.predictions
    answers = run.baselines.predict("length", rows.words)
    losses = metrics.measure_row_losses(answers, rows.labels, rows.tie_allowed)
    words = rows.words[:, 1:].sum(1)
    return metrics.slice_losses(losses, words=words, turns=rows.turns, sources=rows.sources)


def _summarise(run: Run) -> dict[str, Any]:
    """One line of the tables; None where a run does not tell."""
    scores = run.scores or run.result.get("valid") or {}
    loss, length = run.log_loss, run.baseline_losses.get("length")
    interval = scores.get("log_loss_ci95") or [None, None]
    return {
        "run": run.name,
        "finished": run.finished,
        "steps": run.result.get("steps", run.last_step),
        "best_step": run.result.get("best_step"),
        "rows": scores.get("rows"),
        "log_loss": loss,
        "ci_low": interval[0],
        "ci_high": interval[1],
        "against_length": None if loss is None or length is None else loss - length,
        "accuracy": scores.get("accuracy"),
        "f1_macro": (scores.get("f1") or {}).get("macro"),
        "calibration_error": scores.get("calibration_error"),
        **{name: run.baseline_losses.get(name) for name in ("uniform", "prior", "length")},
        "rows_per_second": run.result.get("rows_per_second"),
        "train_seconds": run.result.get("train_seconds"),
    }


def _write_table(runs: Sequence[Run], bayes: float | None) -> str:
    lines = [{**_summarise(run), "bayes": bayes, "path": str(run.path)} for run in runs]

    def cell(value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, bool):
            return str(int(value))
        return f"{value:.6g}" if isinstance(value, float) else quote_cell(str(value))

    rows = [list(lines[0]), *([cell(value) for value in line.values()] for line in lines)]
    return "".join(",".join(row) + "\n" for row in rows)


def render(package: str, template: str, **values: Any) -> str:
    """A page from a template of ``package``, with the style that all pages share."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    # Names, paths and sources come from data: everything is escaped, whatever the file's suffix.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        number=_format_number, signed=_format_signed, duration=_format_duration
    )
    text = resources.files(package).joinpath(template).read_text(encoding="utf-8")
    style = resources.files("pref_jax.evaluation").joinpath("report.css")
    return environment.from_string(text).render(
        style=Markup(style.read_text(encoding="utf-8")), **values
    )


def _render(runs: Sequence[Run], references: Mapping[str, float], drawn: list[Figure]) -> str:
    lines = [_summarise(run) for run in runs]
    known = [line for line in lines if line["log_loss"] is not None]
    best = min(known, key=lambda line: line["log_loss"], default=None)
    rows = {frozenset(run.predictions.ids) for run in runs if run.predictions is not None}
    return render(
        "pref_jax.evaluation",
        "report.html.jinja",
        runs=runs,
        lines=lines,
        best=best,
        references=references,
        closed=None if best is None else _share_closed(best["log_loss"], references),
        same_rows=len(rows) <= 1,
        figures={figure.name: figure for figure in drawn},
        pairs=_compare_all(runs),
        settings=_list_settings(runs),
        configs={run.name: json.dumps(run.config, indent=2, default=str) for run in runs},
        places={run.name: _describe_place(run.environment) for run in runs},
    )


def _share_closed(loss: float, references: Mapping[str, float]) -> float | None:
    """How much of the way from the length baseline to the best possible loss was gone."""
    if not {"length", "bayes"} <= set(references):
        return None
    way = references["length"] - references["bayes"]
    return (references["length"] - loss) / way if way > 0 else None


def _list_settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Config fields in which the runs differ, with each run's value."""
    flat = [_flatten(run.config) for run in runs]
    names = dict.fromkeys(name for fields in flat for name in fields)
    rows = [(name, [fields.get(name, "") for fields in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    fields: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            fields.update(_flatten(value, f"{prefix}{name}."))
        else:
            fields[prefix + name] = "none" if value is None else str(value)
    return fields


def _describe_place(environment: Mapping[str, Any]) -> str:
    parts = [f"{name}: {value}" for name, value in _flatten(environment).items()]
    return "\n".join(parts)


def _format_number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None or not np.isfinite(value) else f"{value:,.{digits}f}"


def _format_signed(value: float | None, digits: int = 4) -> str:
    if value is None or not np.isfinite(value):
        return "–"
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _format_duration(seconds: float | None) -> str:
    if seconds is None or not np.isfinite(seconds):
        return "–"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{seconds:.1f} s"
