"""A race compares the same work, says so, and refuses what could not be compared."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

import pytest
from rig import TINY, call, make_rows, start, wait_for, write_csv

from pref_jax.errors import RunError
from pref_jax.race import report
from pref_jax.race.run import CONTESTANTS

SMALL = (*TINY, "--config.train.batch_size=2", "--rows=4", "--peer_batch_size=2", "--rounds=1")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "rows.csv", make_rows(), labels=True)


def test_both_sides_do_the_same_work(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch", "transformers", "accelerate"):
        pytest.importorskip(name, reason="the other side is torch")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    output = tmp_path / "race.json"
    arguments = (
        *SMALL,
        f"--config.data.train={data}",
        "--config.model.config.hidden_dropout=0",
        "--config.model.config.attention_dropout=0",
        "--config.model.head_dropout=0",
        f"--output={output}",
    )
    outcome = call("race", *arguments)
    assert outcome.code == 0, outcome
    result = json.loads(output.read_text())
    comparison = result["comparison"]
    # Random logits of this model are apart by more than that: rows in another order are seen.
    assert comparison["largest_logit_difference"] < 1e-5
    assert comparison["rounds"] == 1 and len(result["turns"]) == 3
    assert {turn["contestant"] for turn in result["turns"]} == set(CONTESTANTS)
    first = {turn["contestant"]: turn["losses"] for turn in result["turns"] if turn["round"] == 0}
    assert {len(losses) for losses in first.values()} == {3}  # one to warm up, two of the epoch
    # The same rows in the same updates.
    assert first["ours"][0] == pytest.approx(first["trainer"][0], abs=1e-4)
    assert (tmp_path / "race.md").read_text().strip() in outcome.stdout
    assert (tmp_path / "race.png").read_bytes().startswith(b"\x89PNG")

    # Cut off behind its second turn, it goes on from there.
    cut = result | {"turns": result["turns"][:2]}
    output.write_text(json.dumps(cut))
    outcome = call("race", *arguments)
    assert outcome.code == 0, outcome
    again = json.loads(output.read_text())["turns"]
    assert again[:2] == cut["turns"] and len(again) == 3

    before = output.read_bytes()
    outcome = call("race", *arguments, "--config.train.learning_rate=1e-3")
    assert outcome.code == 2 and "another file" in outcome.stderr
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--config.model.symmetric=true", "--config.model.symmetric=false"),
        ("--config.train.ema=0.9", "--config.train.ema=0.0"),
        ("--config.train.head_learning_rate=0.5", "one rate"),
        ("--peer_batch_size=3", "does not divide"),
        ("--output=nowhere/race.json", "does not exist"),
    ],
)
def test_what_cannot_be_compared_is_one_line(data: Path, argument: str, said: str) -> None:
    outcome = call("race", *TINY, f"--config.data.train={data}", argument)
    assert outcome.code == 2 and outcome.stderr.count("\n") == 1, outcome
    assert said in outcome.stderr


def test_the_table_does_not_take_the_place_of_the_turns(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "race.md"
    done = call("race", *TINY, f"--config.data.train={data}", f"--output={output}")
    assert done.code == 2 and "race.md: does not end in .json" in done.stderr, done
    assert not output.exists()


def test_a_race_that_is_terminated_leaves_nothing_behind(data: Path, tmp_path: Path) -> None:
    for name in ("torch", "transformers", "accelerate"):
        pytest.importorskip(name, reason="the other side is torch")
    place, log = tmp_path / "tmp", tmp_path / "log"
    place.mkdir()
    arguments = (*SMALL, f"--config.data.train={data}", f"--output={tmp_path}/race.json")
    process = start(log, "race", *arguments, variables={"TMPDIR": str(place)})
    turns = []

    def prepares() -> bool:
        turns[:] = [
            int(folder.name)
            for folder in Path("/proc").glob("[0-9]*")
            if str(place) in _read(folder / "cmdline")
        ]
        return bool(turns)

    wait_for(prepares, process, log)
    process.terminate()
    process.join(60)
    assert process.exitcode == 130, log.read_text()
    assert not list(place.iterdir()) and not (tmp_path / "race.json").exists()
    deadline = time.monotonic() + 30
    while any(str(place) in _read(Path(f"/proc/{turn}/cmdline")) for turn in turns):
        assert time.monotonic() < deadline, "a turn goes on without its race"
        time.sleep(0.1)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def test_without_the_other_side_it_says_what_to_install(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else find(name)
    )
    outcome = call("race", *TINY, f"--config.data.train={data}")
    assert outcome.code == 1 and outcome.stderr.count("\n") == 1, outcome
    assert "pip install -e '.[race]'" in outcome.stderr


def test_ratios_are_within_rounds_and_a_cold_start_is_in_none() -> None:
    def turn(contestant: str, number: int, value: float, *, cold: bool = False) -> dict:
        quantities = dict.fromkeys(report.QUANTITIES, value)
        shared = {"logits": [[0.0, 0.0, value]], "cold": cold, "contestant": contestant}
        return quantities | shared | {"round": number}

    turns = [
        *(turn("ours", 0, 6.0, cold=True), turn("trainer", 0, 2.0), turn("grouped", 0, 3.0)),
        *(turn("ours", 1, 8.0), turn("trainer", 1, 4.0), turn("grouped", 1, 4.0)),
    ]
    comparison = report.compare(turns, [0, 1])
    training = comparison["training_rows_per_second"]
    assert training["ours"] == {"median": 7.0, "least": 6.0, "most": 8.0}
    assert training["ratio"]["trainer"] == {"median": 2.5, "least": 2.0, "most": 3.0}
    start = comparison["first_update_seconds"]
    assert start["ours"]["median"] == 8.0 and start["ratio"]["trainer"]["median"] == 0.5
    assert comparison["cold_first_update_seconds"]["median"] == 6.0
    assert comparison["largest_logit_difference"] == 4.0


@pytest.mark.parametrize(("logit", "loss"), [(0.1, 1.1), (0.0, 4.4)])
def test_a_race_of_different_work_is_refused(logit: float, loss: float) -> None:
    def turn(contestant: str, logit: float, loss: float) -> dict:
        return {"contestant": contestant, "logits": [[0.5, logit]], "losses": [loss]}

    turns = [turn("ours", 0.0, 1.1), turn("trainer", logit, loss)]
    comparison = {"largest_logit_difference": logit}
    report.refuse_other_work(
        [turns[0], turns[0] | {"contestant": "trainer"}],
        {"largest_logit_difference": 1e-6},
        "float32",
    )
    with pytest.raises(RunError, match="the two sides"):
        report.refuse_other_work(turns, comparison, "float32")
