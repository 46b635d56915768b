"""The comparison of runs: complete, self-contained, safe with any text, honest about errors."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from pref_jax.errors import InputError
from pref_jax.evaluation import figures, metrics
from pref_jax.evaluation.predictions import Predictions
from pref_jax.evaluation.report import FIGURES, compare_runs, make_report

from .conftest import MakeRun, make_rows

PNG = b"\x89PNG\r\n\x1a\n"


class _Page(HTMLParser):
    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attributes if k in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


def _table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_page_figures_and_table_are_there(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("weak", 0.3), make_run("strong", 0.9), make_run("going", finished=False)]
    (tmp_path / "truth.json").write_text('{"bayes_log_loss": {"train": 0.5, "test": 0.6}}')
    page = make_report(runs, tmp_path / "report")
    found = {path.name for path in page.parent.iterdir()}
    assert found == {"index.html", "results.csv", *(f"{name}.png" for name in FIGURES)}
    assert all((page.parent / f"{n}.png").read_bytes().startswith(PNG) for n in FIGURES)

    html = _Page(page)
    assert html.tags.count("img") == len(FIGURES)
    assert all(link.startswith("data:image/png;base64,") for link in html.links)
    assert not {"script", "link", "iframe"} & set(html.tags)
    assert not re.search(r"https?://|@import|url\(", page.read_text(encoding="utf-8"))
    assert "strong is better" in html.text and "still going" in html.text
    assert "Best possible" in html.text and "0.5000" in html.text

    table = _table(page.parent)
    assert [row["run"] for row in table] == ["weak", "strong", "going"]
    assert [row["finished"] for row in table] == ["1", "1", "0"]
    expected = json.loads((runs[1] / "result.json").read_text())["valid"]
    assert float(table[1]["log_loss"]) == pytest.approx(expected["log_loss"], abs=1e-5)
    assert float(table[1]["length"]) == pytest.approx(expected["baselines"]["length"], abs=1e-5)


def test_text_from_data_stays_text(make_run: MakeRun, tmp_path: Path) -> None:
    folder = make_run("<script>alert(1)<")
    rows = make_rows(60, 0.5)
    evil = '"><img src=x onerror=alert(1)>$\\frac{'
    Predictions(
        **{**vars(rows), "sources": [evil] * 60, "ids": [f"{evil}\n{i}" for i in range(60)]}
    ).write(folder / "valid_predictions.csv")
    (folder / "config.json").write_text(json.dumps({"note": "</pre><script>alert(1)</script>"}))
    other = make_run("_other $x^{")
    html = _Page(make_report([folder, other], tmp_path / "report"))
    assert "script" not in html.tags and html.tags.count("img") == len(FIGURES)
    assert "<script>alert(1)<" in html.text and "_other $x^{" in html.text


def test_a_run_with_only_measurements_is_shown(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("going", finished=False)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 201, "split": "tra')  # being written just now
    make_report([make_run("earlier")], tmp_path / "report")
    assert (tmp_path / "report" / "confusion.png").exists()
    (tmp_path / "report" / "mine.txt").write_text("kept")
    page = make_report([run], tmp_path / "report")
    found = {path.name for path in page.parent.iterdir()}
    assert found == {
        "index.html",
        "results.csv",
        "log_loss.png",
        "learning_curves.png",
        "mine.txt",
    }
    assert "200 so far" in _Page(page).text


def test_runs_of_the_same_name_are_told_apart(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("x/run"), make_run("y/run")]
    make_report(runs, tmp_path / "report")
    assert [row["run"] for row in _table(tmp_path / "report")] == ["x/run", "y/run"]


def test_pairing_is_by_row_not_by_position() -> None:
    first, second = make_rows(200, 0.9), make_rows(200, 0.3)
    order = np.random.default_rng(0).permutation(200)
    shuffled = Predictions(
        ids=[second.ids[i] for i in order],
        probabilities=second.probabilities[order],
        labels=second.labels[order],
        tie_allowed=second.tie_allowed[order],
        words=second.words[order],
        turns=second.turns[order],
        sources=[second.sources[i] for i in order],
    )
    expected = metrics.compare_row_losses(first.measure_row_losses(), second.measure_row_losses())
    assert compare_runs(first, shuffled) == expected
    assert expected["difference"] < 0
    # The same ids in another file are other rows.
    assert compare_runs(first, Predictions(**{**vars(second), "words": second.words + 1})) is None


def test_predictions_survive_a_round_trip(tmp_path: Path) -> None:
    rows = make_rows(50, 0.5)
    rows.ids[:4] = ["007", " x", 'a,"b"', "line\r\nbreak"]
    rows.write(tmp_path / "p.csv")
    read = Predictions.read(tmp_path / "p.csv")
    assert read.ids == rows.ids and read.sources == rows.sources
    for name in ("probabilities", "labels", "tie_allowed", "words", "turns"):
        assert (getattr(read, name) == getattr(rows, name)).all()
    assert read.evaluate() == rows.evaluate()


def _break(run: Path, part: str, text: str) -> None:
    (run / part).write_text(text)


@pytest.mark.parametrize(
    ("part", "text", "where"),
    [
        ("metrics.jsonl", "", "metrics.jsonl: there are no measurements"),
        ("metrics.jsonl", '{"step": 1}\n', "metrics.jsonl:1: "),
        ("metrics.jsonl", "not json\n", "metrics.jsonl:1: "),
        ("result.json", '{"steps": ', "result.json: is not JSON"),
        ("config.json", "[1]", "config.json: is not a JSON object"),
        ("baselines.json", "{}", "baselines.json: "),
        ("valid_predictions.csv", "id\n1\n", "valid_predictions.csv: "),
        ("valid_predictions.csv", "", "valid_predictions.csv: "),
    ],
)
def test_damaged_runs_are_named(
    make_run: MakeRun, tmp_path: Path, part: str, text: str, where: str
) -> None:
    run = make_run("run", rows=30)
    _break(run, part, text)
    with pytest.raises(InputError, match=re.escape(f"{run}/{where}")):
        make_report([run], tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_a_damaged_prediction_is_named_with_its_row(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("run", rows=30)
    lines = (run / "valid_predictions.csv").read_text().split("\n")
    lines[3] = lines[3].replace("0.", "9.", 1)
    _break(run, "valid_predictions.csv", "\n".join(lines))
    with pytest.raises(InputError, match=r"valid_predictions\.csv:3: "):
        make_report([run], tmp_path / "report")


def test_wrong_folders_are_refused(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("run", rows=30)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("kept")
    for runs, output, what in (
        ([], "report", "no run named"),
        ([tmp_path / "none"], "report", "does not exist"),
        ([tmp_path / "file"], "report", "is not a folder"),
        ([tmp_path / "empty"], "report", "is not a run"),
        ([run, tmp_path / "empty" / ".." / "run"], "report", "named twice"),
        ([run], "file", "is a file"),
        ([run], "file/report", "below a file"),
    ):
        with pytest.raises(InputError, match=what):
            make_report(runs, tmp_path / output)
    assert (tmp_path / "file").read_text() == "kept"
    assert not (tmp_path / "report").exists()
    with pytest.raises(InputError, match="does not hold bayes_log_loss"):
        make_report([run], tmp_path / "report", truth=run / "config.json")


def test_only_a_report_is_replaced(make_run: MakeRun, tmp_path: Path) -> None:
    run, site = make_run("run", rows=30), tmp_path / "site"
    site.mkdir()
    (site / "index.html").write_text("mine")
    with pytest.raises(InputError, match=r"index\.html: is there and not of a report"):
        make_report([run], site)
    assert [path.name for path in site.iterdir()] == ["index.html"]
    for _ in range(2):
        assert make_report([run], tmp_path / "report").is_file()


def test_many_runs_and_sources_and_steps_can_be_drawn() -> None:
    names = [f"run {i}" for i in range(16)]
    part = {f"source {i}": {"rows": i + 1, "log_loss": 1 + i / 50} for i in range(40)}
    assert figures.draw_slices(dict.fromkeys(names, part), part).startswith(PNG)
    curves = {name: {"train": ([1], [1.0]), "valid": ([], [])} for name in names}
    assert figures.draw_learning_curves(curves, {}).startswith(PNG)
    assert figures.draw_log_loss(dict.fromkeys(names, (1.0, None)), {}).startswith(PNG)


def test_smoothing_keeps_length_and_level() -> None:
    values = np.random.default_rng(0).normal(1, 0.1, 1000).tolist()
    assert len(figures.smooth(values)) == 1000
    assert np.std(figures.smooth(values)[100:]) < 0.03
    assert figures.smooth([3.0, 1.0]) == [3.0, 1.0] and figures.smooth([]) == []
