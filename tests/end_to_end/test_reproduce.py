"""The study by one command: killed on the way, it ends in the same report, byte for byte."""

from __future__ import annotations

import csv
import html.parser
import json
from pathlib import Path

import pytest
from rig import call, finish, start, wait_for

SMALL = (
    "--scale=minilm",
    "--rows=120,40",
    "--set=*:model.pretrained=none",
    "--set=*:model.config.num_layers=3",
    "--set=*:model.config.hidden_size=16",
    "--set=*:model.config.num_heads=2",
    "--set=*:model.config.intermediate_size=32",
    "--set=*:input.max_length=32",
    "--set=*:input.tokenizer=tokenizers",
    "--set=*:train.max_steps=6",
    "--set=*:train.warmup_steps=1",
    "--set=*:train.batch_size=8",
    "--set=*:checkpoint.every_steps=2",
    "--set=*:eval.every_steps=3",
)


_PATIENCE = 600.0  # seconds: five models are compiled


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was killed in a multi-task run and in a model, then finished."""
    folder = tmp_path_factory.mktemp("study")
    study, log = folder / "killed", folder / "log"
    for place in ("seed0/multitask_minilm/checkpoints/2", "seed0/parallel_minilm/checkpoints/4"):
        process = start(log, "reproduce", *SMALL, f"--workdir={study}")
        manifest = study / place / "manifest.json"
        wait_for(manifest.exists, process, log, _PATIENCE)
        process.kill()
        process.join()
        assert not (study / "report").exists()
    process = start(log, "reproduce", *SMALL, f"--workdir={study}")
    said = finish(process, log, seconds=_PATIENCE)
    assert "resumed" in said
    return study


def test_the_report_does_not_tell_that_it_was_killed(killed: Path) -> None:
    straight, log = killed.parent / "straight", killed.parent / "straight.log"
    process = start(log, "reproduce", *SMALL, f"--workdir={straight}")
    finish(process, log, seconds=_PATIENCE)
    names = sorted(path.name for path in (killed / "report").iterdir())
    assert names == sorted(path.name for path in (straight / "report").iterdir())
    assert {"index.html", "study.json", "results.csv", "test_loss.png"} <= set(names)
    for name in names:
        ours, theirs = ((folder / "report" / name).read_bytes() for folder in (killed, straight))
        # Configs say where the files of each study lie.
        assert ours.replace(b"/killed/", b"/straight/") == theirs, name


def test_a_second_call_runs_nothing(killed: Path) -> None:
    before = {
        path: path.stat().st_mtime_ns
        for path in killed.rglob("*")
        if path.is_file() and "report" not in path.parts and path.name != ".lock"
    }
    outcome = call("reproduce", *SMALL, f"--workdir={killed}")
    assert outcome.code == 0 and "part " not in outcome.stdout, outcome
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert "Annotations make Single MiniLM better" in outcome.stdout


def test_annotated_models_start_from_the_studys_own_run(killed: Path) -> None:
    for name in ("single", "parallel"):
        model = json.loads((killed / f"seed0/{name}_minilm_annotated/model.json").read_text())
        assert model["base"]["source"] == str(killed / "seed0/multitask_minilm")
        config = json.loads((killed / f"seed0/{name}_minilm_annotated/config.json").read_text())
        assert config["model"]["frozen_layers"] == 3


def test_the_numbers_are_those_of_the_test_rows(killed: Path) -> None:
    content = json.loads((killed / "report/study.json").read_text())
    assert [line["model"] for line in content["models"]] == [
        "single_minilm",
        "parallel_minilm",
        "single_minilm_annotated",
        "parallel_minilm_annotated",
    ]
    for line in content["models"]:
        path = killed / "test/seed0" / line["model"] / "evaluation.json"
        evaluation = json.loads(path.read_text())
        assert line["log_loss"] == pytest.approx(evaluation["log_loss"], abs=1e-9)
        assert evaluation["rows"] == 40
        # The same as launch/evaluate.py says.
        output = killed.parent / "again.json"
        outcome = call(
            "evaluate",
            f"--workdir={killed}/seed0/{line['model']}",
            f"--data={killed}/data/test_labelled.csv",
            f"--output={output}",
        )
        assert outcome.code == 0, outcome
        again = json.loads(output.read_text())
        assert line["log_loss"] == pytest.approx(again["log_loss"], abs=1e-6)
    base = content["models"][0]
    for line in content["models"]:
        gain = 100 * (1 - line["log_loss"] / base["log_loss"])
        assert line["improvement_percent"] == pytest.approx(gain)
        product = line["efficiency"] * line["log_loss"] * line["parameters"]
        assert product == pytest.approx(1e6)
    with open(killed / "report/results.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["title"] for row in rows] == [line["title"] for line in content["models"]]
    assert {"length", "prior", "uniform", "bayes"} == set(content["references"])


class _Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_needs_nothing_but_itself(killed: Path) -> None:
    page = _Page()
    text = (killed / "report/index.html").read_text()
    page.feed(text)
    assert page.sources and all(source.startswith("data:image/png;") for source in page.sources)
    assert "undecided" in text and "<script" not in text


def test_wrong_studies_are_one_line(killed: Path, tmp_path: Path) -> None:
    for flags, named in (
        (("--scale=large",), "--scale"),
        (("--rows=3",), "--rows"),
        (("--data=absent.csv",), "--test: it is missing"),
        (("--scale=tiny", f"--workdir={killed}"), "scale minilm"),
        (("--set=nobody:train.epochs=1",), "fits no run"),
        (("--set=*:seed=1",), "give --seeds"),
        (("--set=*:data.train=x.csv",), "give --data"),
        (("--set=*annotated:model.init_from=runs/x",), "the study's own"),
        (("--properties=x.toml",), "--properties"),
        (("--seeds=0",), "--seeds"),
    ):
        outcome = call("reproduce", f"--workdir={tmp_path}/new", *flags)
        assert outcome.code == 2 and outcome.stderr.count("\n") == 1, outcome
        assert named in outcome.stderr
    assert not (tmp_path / "new").exists()


def test_what_was_damaged_is_named_with_its_remedy(killed: Path) -> None:
    tested = killed / "test/seed0/parallel_minilm"
    for name, spoil in (
        ("evaluation.json", lambda text: "{}"),
        ("evaluation.json", lambda text: text.replace('"total": ', '"total": null, "was": ')),
        ("predictions.csv", lambda text: text[:-30]),
        ("predictions.csv", lambda text: _exchange_labels(text)),
    ):
        path = tested / name
        before = path.read_text()
        path.write_text(spoil(before))
        assert path.read_text() != before
        outcome = call("reproduce", *SMALL, f"--workdir={killed}")
        path.write_text(before)
        assert outcome.code == 2 and outcome.stderr.count("\n") == 1, outcome
        assert f"remove {tested}" in outcome.stderr and str(path) in outcome.stderr
    assert call("reproduce", *SMALL, f"--workdir={killed}").code == 0


def _exchange_labels(text: str) -> str:
    rows = list(csv.DictReader(text.splitlines()))
    for row in rows:
        row["label"] = {"0": "1", "1": "0"}.get(row["label"], row["label"])
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    return "\n".join(lines) + "\n"


def test_the_plan_of_the_paper_runs_nothing(tmp_path: Path) -> None:
    outcome = call("reproduce", "--scale=paper", "--plan", f"--workdir={tmp_path}/new")
    assert outcome.code == 0 and not (tmp_path / "new").exists()
    assert outcome.stdout.count("seed0/") == 2 + 9 + 9 and "2 x T4" in outcome.stdout
