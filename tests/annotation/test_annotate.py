"""``launch/annotate.py`` against a judge on this machine, well-behaved and not."""

from __future__ import annotations

import csv
import datetime
import email.utils
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tenacity
from annotation.judge import Judge, _send, all_twos, find_template, rate, read_texts
from rig import REPOSITORY, call, make_rows, write_csv

from pref_jax.annotation.client import Client, _read_retry_after
from pref_jax.annotation.properties import load_properties
from pref_jax.annotation.ratings import read_ratings
from pref_jax.command import Outcome

Lines = list[dict[str, Any]]
KILLS = int(os.environ.get("PREF_JAX_KILLS", "5"))
SECRET = "sk-test-0123456789abcdef"


def arguments(judge: Judge | str, data: Path, output: Path, *more: object) -> list[str]:
    url = judge if isinstance(judge, str) else judge.url
    start = [f"--data={data}", f"--output={output}", f"--base_url={url}", "--model=judge-1"]
    return [*start, *map(str, more)]


def annotate(judge: Judge | str, data: Path, output: Path, *more: object) -> Outcome:
    return call("annotate", *arguments(judge, data, output, *more))


def lines(path: Path) -> Lines:
    return [json.loads(line) for line in path.read_text().splitlines()]


def failures(path: Path) -> Lines:
    return lines(path.with_name(f"{path.name}.failures"))


def places(entries: Lines) -> list[tuple[str, str]]:
    return [(entry["id"], entry["side"]) for entry in entries]


def results(path: Path) -> list[Any]:
    rated = [
        (entry["id"], entry["side"], entry["ratings"], entry["query"]) for entry in lines(path)
    ]
    return [*rated, *((entry["id"], entry["side"], entry["reason"]) for entry in failures(path))]


def input_places(data: Path) -> list[tuple[str, str]]:
    with data.open(encoding="utf-8", newline="") as file:
        return [(row["id"], side) for row in csv.DictReader(file) for side in "ab"]


def one_line(outcome: Outcome, code: int, *words: str) -> None:
    assert outcome.code == code, outcome
    assert outcome.stderr.startswith("error: ") and outcome.stderr.count("\n") == 1, outcome.stderr
    for word in words:
        assert word in outcome.stderr


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands inside this process wait less before they try again."""
    monkeypatch.setattr("pref_jax.annotation.judge._backoff", tenacity.wait_fixed(0.05))


@pytest.fixture
def six(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "six.csv", make_rows())


def test_five_hundred_responses_of_a_bad_server(arena: Path, tmp_path: Path) -> None:
    output = tmp_path / "A.jsonl"
    more = ("--rows=250", "--concurrency=64", "--timeout=3", "--attempts=3")
    with Judge(faults=0.05, hang=0.9) as judge:
        outcome = annotate(judge, arena / "train.csv", output, *more)
        assert outcome.code == 0, outcome
        rated, failed = lines(output), failures(output)
        expected = input_places(arena / "train.csv")[:500]
        assert sorted(places(rated) + places(failed)) == sorted(expected)
        assert places(rated) == [place for place in expected if place in set(places(rated))]
        assert failed and all(entry["reason"] for entry in failed)
        assert f"{len(rated)} of 500 responses rated, {len(failed)} failed" in outcome.stdout
        assert max(judge.good.values()) == 1  # never asked again once it had answered well
        for entry in rated:
            if entry["tokens"]["prompt"]:
                assert entry["tokens"]["prompt"] >= 1000 and len(entry["ratings"]) == 20
        # What is rated is not asked for again; failures are.
        before = {texts: len(bodies) for texts, bodies in judge.asked.items()}
        assert annotate(judge, arena / "train.csv", output, *more).code == 0
        again = {texts for texts, bodies in judge.asked.items() if len(bodies) > before[texts]}
        assert 0 < len(again) <= len(failed)
        assert max(judge.good.values()) == 1
        assert len(lines(output)) > len(rated)


def test_the_ratings_are_those_of_the_judge(arena: Path, tmp_path: Path) -> None:
    output = tmp_path / "A.jsonl"
    with Judge() as judge:
        assert annotate(judge, arena / "test.csv", output, "--price_prompt=2").code == 0
        good = {texts: rate(bodies[0]) for texts, bodies in judge.asked.items()}
    with (arena / "test.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    for entry in lines(output):
        text = json.loads(rows[entry["id"]][f"response_{entry['side']}"])[0]
        (answer,) = [good for texts, good in good.items() if text in texts]
        assert entry["query"] == answer["query"]
        for name, value in answer["ratings"].items():
            assert entry["ratings"][name] == value["rating"]
            assert entry["reasons"][name] == value["reason"]
        assert entry["model"] == "judge-1" and entry["attempts"] == 1
        assert entry["tokens"] == {"prompt": 1000, "completion": 200}
        assert entry["cost"] == pytest.approx(0.002)
    found = read_ratings(output, load_properties())
    assert len(found) == 24 and found.values.min() >= 0


def start(judge: Judge, data: Path, output: Path, *more: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            str(REPOSITORY / "launch" / "annotate.py"),
            *arguments(judge, data, output, *more),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )


def wait_for(judge: Judge, requests: int, process: subprocess.Popen[str]) -> None:
    """Returns once the judge was asked so often; fails where the process ends before."""
    while judge.requests < requests:
        if process.poll() is not None:
            assert judge.requests >= requests, process.communicate()
        time.sleep(0.001)


def test_killed_at_any_moment_it_ends_the_same(arena: Path, tmp_path: Path) -> None:
    more = ("--rows=60", "--concurrency=8", "--attempts=2")
    straight, killed = tmp_path / "straight.jsonl", tmp_path / "killed.jsonl"

    def is_hopeless(texts: str) -> bool:
        return texts[2] in "789"  # of the fence, a hash

    def answer(body: dict[str, Any], times: int) -> str:
        return "no" if is_hopeless(read_texts(body)) else json.dumps(rate(body))

    with Judge(answer) as judge:
        assert annotate(judge, arena / "train.csv", straight, *more).code == 0
    generator = random.Random(0)
    with Judge(answer, seconds=0.01) as judge:
        for _ in range(KILLS):
            process = start(judge, arena / "train.csv", killed, *more)
            wait_for(judge, judge.requests + 1 + generator.randrange(200 // KILLS), process)
            time.sleep(generator.random() * 0.05)
            process.kill()
            process.communicate()
        for _ in range(2):
            assert annotate(judge, arena / "train.csv", killed, *more).code == 0
        # An answer that was on its way when the process died may be asked for again; not twice.
        good = [count for texts, count in judge.good.items() if not is_hopeless(texts)]
        assert len(good) > 60 and sum(good) - len(good) <= 8 * KILLS
    assert failures(straight) and results(killed) == results(straight)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}.jsonl{ending}" for name in ("straight", "killed") for ending in ("", ".failures")
    )


def test_a_signal_ends_it_in_order(arena: Path, tmp_path: Path) -> None:
    output = tmp_path / "A.jsonl"
    with Judge(seconds=0.1) as judge:
        process = start(judge, arena / "train.csv", output, "--concurrency=4")
        wait_for(judge, 12, process)
        process.send_signal(signal.SIGTERM)
        said, error = process.communicate(timeout=60)
        assert process.returncode == 1
        assert error.startswith("error: SIGTERM: stopped as asked") and error.count("\n") == 1
        assert "type the same command again" in error and "responses rated" in said
        # All that were answered are there, in order.
        assert len(lines(output)) >= sum(judge.good.values()) > 0
        expected = input_places(arena / "train.csv")
        assert places(lines(output)) == [p for p in expected if p in set(places(lines(output)))]
        done = set(judge.good)
        outcome = annotate(judge, arena / "train.csv", output, "--rows=20", "--concurrency=4")
        assert outcome.code == 0 and all(judge.good[texts] == 1 for texts in done)


def test_a_second_process_is_refused(arena: Path, tmp_path: Path) -> None:
    output = tmp_path / "A.jsonl"
    with Judge(seconds=0.2) as judge:
        process = start(judge, arena / "test.csv", output, "--concurrency=4")
        wait_for(judge, 2, process)
        outcome = annotate(judge, arena / "test.csv", output)
        process.communicate(timeout=60)
    one_line(outcome, 2, str(output), f"is in use by process {process.pid} on ")
    assert process.returncode == 0 and len(lines(output)) == 24


def test_a_limit_of_money_holds_but_for_calls_on_their_way(arena: Path, tmp_path: Path) -> None:
    output = tmp_path / "A.jsonl"
    prices = ("--price_prompt=10", "--price_completion=50")  # 0.02 per call
    more = ("--rows=40", "--concurrency=8", *prices)
    with Judge(faults=0.02, hang=0) as judge:
        outcome = annotate(judge, arena / "train.csv", output, "--max_cost=1", *more)
        one_line(outcome, 1, "--max_cost", "left", "type the same command again")
        spent = sum(entry["cost"] for entry in lines(output) + failures(output))
        assert 0.8 <= spent <= 1 + 8 * 0.02
        answered = sum(judge.good.values())
        assert answered * 0.02 <= 1 + 8 * 0.02
        rated = places(lines(output))
        assert annotate(judge, arena / "train.csv", output, *more).code == 0
        assert set(rated) < set(places(lines(output)))


def test_a_limit_of_requests_is_exact(arena: Path, tmp_path: Path) -> None:
    with Judge() as judge:
        for more, expected in [("--max_requests=7", 7), ("--max_requests=0", 7)]:
            outcome = annotate(judge, arena / "train.csv", tmp_path / "A.jsonl", more)
            one_line(outcome, 1, "--max_requests: it is reached")
            assert judge.requests == expected
        assert len(lines(tmp_path / "A.jsonl")) == 7


def test_a_limit_of_money_without_prices_assumes_some(six: Path, tmp_path: Path) -> None:
    with Judge() as judge:
        outcome = annotate(judge, six, tmp_path / "A.jsonl", "--max_cost=0.014", "--concurrency=1")
        one_line(outcome, 1, "--max_cost")
        assert 0 < judge.requests < 12


def test_every_attempt_is_paid(six: Path, tmp_path: Path) -> None:
    def second_time(body: dict[str, Any], times: int) -> str:
        return json.dumps(rate(body)) if times == 1 else "no"

    output = tmp_path / "A.jsonl"
    more = ("--price_prompt=1", "--price_completion=1", "--structured=json_schema")
    with Judge(second_time) as judge:
        assert annotate(judge, six, output, *more).code == 0
        assert {(e["attempts"], e["tokens"]["prompt"], e["cost"]) for e in lines(output)} == {
            (2, 2000, 0.0024)
        }
        # A bad answer is not asked for in the same way again.
        for first, second in judge.asked.values():
            assert first["seed"] != second["seed"]
            assert first["temperature"] < second["temperature"]


def test_failures_add_to_what_their_responses_cost(six: Path, tmp_path: Path) -> None:
    output = tmp_path / "A.jsonl"
    more = ("--price_prompt=1", "--attempts=1", "--rows=1", "--structured=none")
    with Judge(lambda body, times: json.dumps(rate(body)) if times else "no") as judge:
        assert annotate(judge, six, output, *more).code == 0
        assert [entry["reason"] for entry in failures(output)] == ["no JSON object"] * 2
        assert [entry["raw"] for entry in failures(output)] == ["no"] * 2
        assert annotate(judge, six, output, *more).code == 0
    assert [(e["attempts"], e["cost"]) for e in lines(output)] == [(2, 0.002)] * 2
    assert failures(output) == []


def test_tokens_are_estimated_where_the_server_does_not_count(six: Path, tmp_path: Path) -> None:
    with Judge(usage=False) as judge:
        assert annotate(judge, six, tmp_path / "A.jsonl", "--price_prompt=1").code == 0
    for entry in lines(tmp_path / "A.jsonl"):
        assert 1000 < entry["tokens"]["prompt"] < 5000 and entry["cost"] > 0
        assert 100 < entry["tokens"]["completion"] < 1000


@pytest.mark.parametrize("mode", ["json_schema", "json_object with schema", "json_object", "none"])
def test_the_form_is_found_out_by_asking_once(six: Path, tmp_path: Path, mode: str) -> None:
    with Judge(modes=(mode,)) as judge:
        assert annotate(judge, six, tmp_path / "A.jsonl").code == 0
        refused = judge.requests - 12
        assert refused == ["json_schema", "json_object with schema", "json_object", "none"].index(
            mode
        )
        assert max(judge.good.values()) == 1
        assert annotate(judge, six, tmp_path / "A.jsonl").code == 0
        assert judge.requests == 12 + refused  # the second call has nothing to find out
    assert len(lines(tmp_path / "A.jsonl")) == 12


def test_a_server_that_ignores_forms_is_asked_in_free_text(six: Path, tmp_path: Path) -> None:
    def answer(body: dict[str, Any], times: int) -> str:
        return "Hm." if "response_format" in body else f"Hm.\n{json.dumps(rate(body))}"

    with Judge(answer) as judge:
        assert annotate(judge, six, tmp_path / "A.jsonl").code == 0
        assert judge.requests == 12 + 3
    assert {entry["attempts"] for entry in lines(tmp_path / "A.jsonl")} == {1, 4}


def test_both_responses_in_one_request(six: Path, tmp_path: Path) -> None:
    output = tmp_path / "A.jsonl"
    with Judge() as judge:
        assert annotate(judge, six, output, "--both", "--price_prompt=1").code == 0
        assert judge.requests == 6
        good = {texts: rate(bodies[0]) for texts, bodies in judge.asked.items()}
    found = lines(output)
    assert len(found) == 12 and sum(entry["cost"] for entry in found) == pytest.approx(0.006)
    for number, row in enumerate(make_rows()):
        prompt = json.loads(row["prompt"])[0]
        (answer,) = [answer for texts, answer in good.items() if prompt in texts]
        for entry in found[2 * number : 2 * number + 2]:
            wanted = answer[f"ratings_{entry['side']}"]
            assert entry["ratings"] == {name: value["rating"] for name, value in wanted.items()}


def test_equal_texts_are_asked_for_once(tmp_path: Path) -> None:
    rows = make_rows()
    double = [*rows, {**rows[0], "id": "007"}, {**rows[1], "id": "8", "response_b": '["5"]'}]
    data, output = write_csv(tmp_path / "double.csv", double), tmp_path / "A.jsonl"
    with Judge() as judge:
        assert annotate(judge, data, output, "--price_prompt=1").code == 0
        assert judge.requests == 12
        found = {(e["id"], e["side"]): e for e in lines(output)}
        assert len(found) == 16 and found["007", "a"]["ratings"] == found["101", "a"]["ratings"]
        assert found["8", "a"]["ratings"] == found["8", "b"]["ratings"]
        assert sum(entry["cost"] for entry in found.values()) == pytest.approx(0.012)
        # Also under another id in another call.
        other = write_csv(tmp_path / "other.csv", [{**rows[2], "id": "new"}])
        assert annotate(judge, other, output).code == 0
        assert judge.requests == 12
    assert places(lines(output))[:3] == [("new", "a"), ("new", "b"), ("101", "a")]


def test_rate_limits_hold_for_all(six: Path, tmp_path: Path) -> None:
    with Judge(faults=0.3, hang=0) as judge:
        judge.fault = lambda texts, times: "limited_after" if times < 3 else ""  # type: ignore
        assert annotate(judge, six, tmp_path / "A.jsonl", "--attempts=2").code == 0
    found = lines(tmp_path / "A.jsonl")
    # Being turned away is no attempt.
    assert len(found) == 12 and {entry["attempts"] for entry in found} == {1}


def test_what_the_server_asks_for_is_waited(
    six: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    pause = Client.pause
    monkeypatch.setattr(Client, "pause", lambda *a: (pauses.append(a[1]), pause(*a))[1])
    with Judge(faults=1) as judge:
        judge.fault = lambda texts, times: "" if times else "limited_after"  # type: ignore
        assert annotate(judge, six, tmp_path / "A.jsonl").code == 0
    assert pauses == [0.02] * 12


def test_a_limit_that_never_ends_does(six: Path, tmp_path: Path) -> None:
    with Judge(faults=1) as judge:
        judge.fault = lambda texts, times: "limited"  # type: ignore
        outcome = annotate(judge, six, tmp_path / "A.jsonl", "--attempts=2")
        one_line(outcome, 1, "answers nothing (HTTP 429)")
        assert {len(bodies) for bodies in judge.asked.values()} == {4}


def test_no_answer_is_waited_for_too_long(six: Path, tmp_path: Path) -> None:
    with Judge(seconds=2) as judge:
        options = ("--timeout=0.2", "--attempts=1", "--rows=1")
        one_line(annotate(judge, six, tmp_path / "A.jsonl", *options), 1, "time-out")


def test_an_answer_without_end_is_not_read_to_its_end(six: Path, tmp_path: Path) -> None:
    with Judge(lambda body, times: "x" * 9_000_000) as judge:
        outcome = annotate(judge, six, tmp_path / "A.jsonl", "--attempts=1", "--rows=1")
        one_line(outcome, 1, "broken response: too long")


def test_retry_after_is_seconds_or_a_date() -> None:
    soon = email.utils.format_datetime(
        datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=100), usegmt=True
    )
    assert 90 < (_read_retry_after(soon) or 0) <= 100
    assert [_read_retry_after(value) for value in ("3", "0.5")] == [3, 0.5]
    past, never = "Wed, 21 Oct 2015 07:28:00 GMT", "Fri, 31 Dec 99999 23:59:59 GMT"
    for value in (None, "soon", "nan", "inf", "0", "-1", past, never):
        assert _read_retry_after(value) is None


def test_a_long_wait_is_said_and_a_day_is_not_waited(six: Path, tmp_path: Path) -> None:
    with Judge(faults=1, retry_after="86400") as judge:
        judge.fault = lambda texts, times: "limited_after"  # type: ignore
        outcome = annotate(judge, six, tmp_path / "A.jsonl")
        one_line(outcome, 1, "asks to wait 24.0 hours", "type the same command again")
        judge.retry_after = "30"
        process = start(judge, six, tmp_path / "A.jsonl")
        wait_for(judge, 2, process)
        time.sleep(0.5)  # until its answer has been read
        process.send_signal(signal.SIGTERM)
        said = "".join(process.communicate(timeout=60))
    assert "asks to wait 30 seconds" in said


def test_a_server_that_is_always_busy_is_given_up(arena: Path, tmp_path: Path) -> None:
    with Judge() as judge:
        judge.refuse = lambda texts: (503, {}) if judge.requests > 5 else None
        outcome = annotate(judge, arena / "train.csv", tmp_path / "A.jsonl", "--attempts=1")
        one_line(outcome, 1, "has stopped answering (HTTP 503)", "type the same command again")
        assert judge.requests < 100


def test_texts_that_a_server_will_not_read_are_listed(six: Path, tmp_path: Path) -> None:
    output, bad = tmp_path / "A.jsonl", ("haiku", "French")
    errors = {"message": "flagged"}
    with Judge() as judge:
        judge.refuse = lambda texts: (
            (403, {"error": errors}) if any(word in texts for word in bad) else None
        )
        assert annotate(judge, six, output).code == 0
        assert len(lines(output)) == 8
        assert {entry["reason"] for entry in failures(output)} == {"HTTP 403: flagged"}
        # The next call asks what is new first.
        more = write_csv(tmp_path / "more.csv", make_rows(r0={"prompt": '["Who was Ada?"]'}))
        more.write_text(six.read_text() + more.read_text().split("\n", 1)[1].replace("10", "99"))
        assert annotate(judge, more, output).code == 0
        assert len(lines(output)) == 16


def test_first_rows_that_are_refused_do_not_stand_for_all(arena: Path, tmp_path: Path) -> None:
    with (arena / "train.csv").open(encoding="utf-8", newline="") as file:
        prompts = [json.loads(row["prompt"])[0] for row in csv.DictReader(file)][:3]
    with Judge() as judge:
        judge.refuse = lambda texts: (
            (400, {"error": {"message": "too long"}}) if any(p in texts for p in prompts) else None
        )
        outcome = annotate(judge, arena / "train.csv", tmp_path / "A.jsonl", "--rows=20")
        assert outcome.code == 0, outcome
    assert len(failures(tmp_path / "A.jsonl")) >= 6
    assert len(lines(tmp_path / "A.jsonl")) + len(failures(tmp_path / "A.jsonl")) == 40


def test_an_error_that_comes_as_an_answer_is_named(six: Path, tmp_path: Path) -> None:
    for error, word in (
        ({"message": "no credits", "code": 402}, "no credits"),
        ({"message": "overheated"}, "error: overheated"),
    ):
        with Judge() as judge:
            judge.refuse = lambda texts, error=error: (200, {"error": error})  # type: ignore
            outcome = annotate(judge, six, tmp_path / "A.jsonl", "--attempts=1")
            assert outcome.code != 0 and word in outcome.stderr


@pytest.mark.parametrize("count", [10**400, -1, "many", None, 1e300])
def test_counts_that_cannot_be_are_not_believed(six: Path, tmp_path: Path, count: object) -> None:
    usage = {"prompt_tokens": count, "completion_tokens": 5, "cost": count}
    with Judge(usage=usage) as judge:
        outcome = annotate(judge, six, tmp_path / "A.jsonl", "--price_prompt=1", "--max_cost=9")
        assert outcome.code == 0, outcome
    assert all(0 < entry["cost"] < 1 for entry in lines(tmp_path / "A.jsonl"))


def test_what_the_server_charges_is_set_aside_from_then_on(arena: Path, tmp_path: Path) -> None:
    usage = {"prompt_tokens": 1000, "completion_tokens": 200, "cost": 0.5}
    with Judge(usage=usage) as judge:
        more = ("--max_cost=2", "--concurrency=16")
        one_line(annotate(judge, arena / "train.csv", tmp_path / "A.jsonl", *more), 1, "--max_cost")
    assert sum(entry["cost"] for entry in lines(tmp_path / "A.jsonl")) == 2.0


def test_a_set_of_few_properties_may_be_rated_as_the_examples_are(
    six: Path, tmp_path: Path
) -> None:
    properties = tmp_path / "one.toml"
    properties.write_text(
        'name = "one"\nscale = ["0", "1", "2", "3"]\n'
        '[[ratings]]\nname = "polite"\ndefinition = "It is polite."\n'
    )
    with Judge(lambda body, times: json.dumps({"ratings": {"polite": times % 4}})) as judge:
        for number in range(4):
            options = (f"--properties={properties}", "--structured=none", "--rows=1")
            output = tmp_path / f"{number}.jsonl"
            assert annotate(judge, six, output, *options).code == 0
            assert [e["ratings"]["polite"] for e in lines(output)] == [number] * 2


def test_two_names_of_a_file_are_one_output(arena: Path, tmp_path: Path) -> None:
    (tmp_path / "A.jsonl").touch()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "A.jsonl")
    with Judge(seconds=0.2) as judge:
        process = start(judge, arena / "test.csv", tmp_path / "A.jsonl", "--concurrency=4")
        wait_for(judge, 2, process)
        outcome = annotate(judge, arena / "test.csv", tmp_path / "link.jsonl")
        process.communicate(timeout=60)
        one_line(outcome, 2, f"is in use by process {process.pid} on ")
        assert annotate(judge, arena / "test.csv", tmp_path / "link.jsonl").code == 0
    assert (tmp_path / "link.jsonl").is_symlink() and len(lines(tmp_path / "A.jsonl")) == 24


def test_models_may_change_back_and_forth(six: Path, tmp_path: Path) -> None:
    output = tmp_path / "A.jsonl"
    prices = ("--price_prompt=1",)
    with Judge() as judge:
        assert annotate(judge, six, output, *prices).code == 0
        first = lines(output)
        for _ in range(2):
            for model in ("--model=other", "--model=judge-1"):
                assert annotate(judge, six, output, *prices, model).code == 0
        assert judge.requests == 24 and lines(output) == first
        assert len(output.with_name("A.jsonl.replaced").read_text().splitlines()) == 24
        assert annotate(judge, six, output, "--model=other").code == 0
        outcome = annotate(judge, six, output, "--model=judge-1", "--dry_run")
        assert outcome.stdout.splitlines()[-1].startswith("0 requests for 12")


def test_parameters_that_a_server_does_not_know_are_left_out(six: Path, tmp_path: Path) -> None:
    with Judge() as judge:
        respond = judge._respond

        def refuse(handler: Any, body: dict[str, Any], texts: str, times: int) -> None:
            for name in ("max_tokens", "temperature"):
                if name in body:
                    message = f"Unsupported parameter: '{name}' is not supported with this model."
                    return _send(handler, 400, {"error": {"message": message}})
            return respond(handler, body, texts, times)

        judge._respond = refuse  # type: ignore
        assert annotate(judge, six, tmp_path / "A.jsonl").code == 0
        assert judge.requests == 12 + 2
        assert all(b["max_completion_tokens"] == 2024 for b in list(judge.bodies())[2:])
    assert len(lines(tmp_path / "A.jsonl")) == 12


def test_a_form_that_was_settled_stays(six: Path, tmp_path: Path) -> None:
    with Judge(modes=("none",)) as judge:
        assert annotate(judge, six, tmp_path / "A.jsonl", "--rows=2").code == 0
    with Judge() as judge:
        assert annotate(judge, six, tmp_path / "A.jsonl").code == 0
        assert judge.requests == 8
        assert not any("response_format" in body for body in judge.bodies())


def test_more_room_once_for_an_answer_that_was_cut(six: Path, tmp_path: Path) -> None:
    with Judge() as judge:
        respond = judge._respond

        def cut(handler: Any, body: dict[str, Any], texts: str, times: int) -> None:
            if body["max_tokens"] > 3000:
                return respond(handler, body, texts, times)
            reply = {"choices": [{"message": {"content": "{"}, "finish_reason": "length"}]}
            return _send(handler, 200, reply)

        judge._respond = cut  # type: ignore
        assert annotate(judge, six, tmp_path / "A.jsonl", "--structured=json_schema").code == 0
        rooms = {tuple(body["max_tokens"] for body in b) for b in judge.asked.values()}
    assert rooms == {(2024, 4048)} and len(lines(tmp_path / "A.jsonl")) == 12


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (401, 2, ("OPENAI_API_KEY", "HTTP 401")),
        (403, 2, ("OPENAI_API_KEY", "HTTP 403")),
        (404, 2, ("'judge-1'", "--base_url", "HTTP 404")),
        (400, 1, ("answers nothing", "HTTP 400")),
    ],
)
def test_a_server_that_refuses_ends_the_run(
    six: Path, tmp_path: Path, status: int, code: int, words: tuple[str, ...]
) -> None:
    with Judge(status=status) as judge:
        one_line(annotate(judge, six, tmp_path / "A.jsonl"), code, *words)
        assert judge.requests <= 20
    assert lines(tmp_path / "A.jsonl") == []


def test_no_server(six: Path, tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/v1"
    outcome = annotate(url, six, tmp_path / "A.jsonl", "--attempts=2")
    one_line(outcome, 1, "--base_url", "no server answers there")


def test_a_server_that_goes_away_ends_the_run(arena: Path, tmp_path: Path) -> None:
    output = tmp_path / "A.jsonl"
    with Judge(seconds=0.02) as judge:
        process = start(judge, arena / "train.csv", output, "--attempts=2", "--concurrency=4")
        wait_for(judge, 10, process)
        judge.seconds = 30
        judge._server.shutdown()
        judge._server.socket.close()
        process.kill()
        process.communicate()
        before = len(lines(output))
        outcome = annotate(judge, arena / "train.csv", output, "--attempts=2")
        judge._server.socket = __import__("socket").socket()
    one_line(outcome, 1, "no server answers there", "type the same command again")
    assert len(lines(output)) == before > 0 and failures(output) == []


def test_the_key_is_never_seen(six: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leak(body: dict[str, Any], times: int) -> str:
        answer = rate(body)
        next(iter(answer["ratings"].values()))["reason"] = f"key {SECRET}"
        return f"{SECRET} is no answer" if times == 0 else json.dumps(answer)

    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    said = ""
    with Judge(leak) as judge:
        for more in ("--attempts=1", "--attempts=2"):
            options = ("--debug", "--structured=json_schema", more)
            outcome = annotate(judge, six, tmp_path / "A.jsonl", *options)
            assert outcome.code == 0, outcome
            said += outcome.stdout + outcome.stderr
            said += "".join(path.read_text() for path in tmp_path.iterdir())
        assert judge.keys == {f"Bearer {SECRET}"}
    for status in (401, 500):
        with Judge(status=status, error=f"wrong key {SECRET}") as judge:
            options = ("--debug", "--attempts=1", "--seed=3")
            outcome = annotate(judge, six, tmp_path / f"{status}.jsonl", *options)
            assert outcome.code != 0 and "Traceback" in outcome.stderr
            said += outcome.stdout + outcome.stderr
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\u00e9")
    outcome = annotate("http://127.0.0.1:9/v1", six, tmp_path / "A.jsonl", "--debug")
    assert outcome.code == 2 and "OPENAI_API_KEY" in outcome.stderr
    said += outcome.stdout + outcome.stderr
    assert "[key] is no answer" in said and SECRET not in said


@pytest.mark.parametrize(
    "form",
    [
        lambda key: key.replace("/", "\\/"),
        lambda key: "".join(f"\\u{ord(character):04X}" for character in key),
        lambda key: json.dumps(key.replace("/", "\\/"))[1:-1],
        lambda key: key.replace("/", "%2f"),
        lambda key: key[:20],
    ],
)
def test_no_form_of_the_key_is_seen(
    six: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Callable[[str], str]
) -> None:
    key = "sk/test/0123456789abcdefghijklmnop"
    shown = form(key)

    def leak(handler: Any, body: dict[str, Any], texts: str, times: int) -> None:
        if "river" in texts:
            content = f'{{"error": {{"message": "wrong key {shown}"}}}}'
            return _send(handler, 500, content)
        answer = json.dumps(rate(body)).replace("draft of polite", f"draft {shown}")
        return _send(handler, 200, {"choices": [{"message": {"content": answer}}]})

    monkeypatch.setenv("OPENAI_API_KEY", key)
    with Judge() as judge:
        judge._respond = leak  # type: ignore
        outcome = annotate(judge, six, tmp_path / "A.jsonl", "--debug", "--attempts=1")
    said = outcome.stdout + outcome.stderr
    said += "".join(path.read_text() for path in tmp_path.iterdir())
    assert "[key]" in said
    for secret in (key, key[:20], shown, shown[:40]):
        assert secret not in said


def test_a_proxy_gets_no_password_of_other_programs(
    six: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("default login bob password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with Judge() as judge:
        monkeypatch.setenv("http_proxy", judge.url.removesuffix("/v1"))
        assert annotate("http://judge.invalid/v1", six, tmp_path / "A.jsonl").code == 0
        assert judge.keys == {None}


def test_dry_run_sends_nothing(arena: Path, tmp_path: Path) -> None:
    with Judge() as judge:
        more = ("--dry_run", "--price_prompt=1", "--price_completion=1")
        outcome = annotate(judge, arena / "test.csv", tmp_path / "A.jsonl", *more)
        assert outcome.code == 0 and judge.requests == 0 and not list(tmp_path.iterdir())
        assert "## Definitions" in outcome.stdout and "24 requests for 24" in outcome.stdout
        assert annotate(judge, arena / "test.csv", tmp_path / "A.jsonl", "--rows=5").code == 0
        outcome = annotate(judge, arena / "test.csv", tmp_path / "A.jsonl", *more)
        assert "14 requests for 24" in outcome.stdout and judge.requests == 10
    outcome = call("annotate", f"--data={arena / 'test.csv'}", "--dry_run")
    assert outcome.code == 0


def test_another_set_of_properties(six: Path, tmp_path: Path) -> None:
    properties = tmp_path / "mine.toml"
    properties.write_text(
        'name = "mine"\nscale = ["no", "yes"]\n'
        '[[ratings]]\nname = "short"\ndefinition = "It is short."\n'
    )
    output = tmp_path / "A.jsonl"
    with Judge(lambda body, times: json.dumps({"ratings": {"short": "1"}})) as judge:
        assert annotate(judge, six, output, f"--properties={properties}").code == 0
    assert {(tuple(e["ratings"].items()), len(e["query"])) for e in lines(output)} == {
        ((("short", 1),), 0)
    }


def test_two_judges_are_compared(six: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "A.jsonl", tmp_path / "B.jsonl"
    for path, shift in ((first, 0), (second, 1)):
        entries = []
        for number in range(8):
            ratings = {"polite": number % 3 + shift, "funny": number % 3, "friendly": 1}
            if number == 7:
                del ratings["funny"]
            entries.append({"id": str(number), "side": "a", "ratings": ratings})
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    outcome = call("annotate", f"--compare={second}", f"--output={first}")
    assert outcome.code == 0, outcome
    table = {line.split()[0]: line.split()[1:] for line in outcome.stdout.splitlines()[2:]}
    assert table["funny"] == ["7", "1.000", "1.000", "+0.00"]
    assert table["polite"][:2] == ["8", "0.000"] and table["polite"][3] == "+1.00"
    assert table["friendly"] == ["8", "1.000", "-", "+0.00"]
    assert table["novelty"] == ["0", "-", "-", "-"]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--output=A.jsonl"], "--data"),
        (["--data=six.csv", "--output=A.jsonl", "--model=m"], "--base_url"),
        (["--data=six.csv", "--output=A.jsonl", "--base_url=localhost:1", "--model=m"],
         "--base_url"),
        (["--data=six.csv", "--output=A.jsonl", "--base_url=http://u:pass@h/v1", "--model=m"],
         "--base_url: holds a password"),
        (["--data=six.csv", "--output=six.csv", "--base_url=http://h/v1", "--model=m"], "itself"),
        (["--data=absent.csv", "--output=A.jsonl", "--base_url=http://h/v1", "--model=m"],
         "absent.csv"),
        (["--data=six.csv", "--dry_run", "--rows=0"], "--rows"),
        (["--data=six.csv", "--dry_run", "--timeout=0"], "--timeout"),
        (["--data=six.csv", "--dry_run", "--max_cost=nan"], "--max_cost"),
        (["--data=six.csv", "--dry_run", "--attempts=0"], "--attempts"),
        (["--data=six.csv", "--dry_run", "--structured=xml"], "--structured: unknown value"),
        (["--data=six.csv", "--dry_run", "--properties=absent.toml"], "absent.toml"),
        (["--compare=absent.jsonl", "--output=six.csv"], "six.csv:1"),
    ],
)  # fmt: skip
def test_wrong_use_is_one_line(
    six: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], named: str
) -> None:
    monkeypatch.chdir(six.parent)
    before = {path: path.read_bytes() for path in six.parent.iterdir()}
    outcome = call("annotate", *more)
    one_line(outcome, 2, named)
    assert "pass" not in outcome.stderr.replace("password", "")
    assert {path: path.read_bytes() for path in six.parent.iterdir()} == before


# Answers as judges wrap them; a good one inside has every rating 2.


def in_fence(good: str, body: dict[str, Any]) -> str:
    return f"```json\n{good}\n```"


def after_a_python_fence(good: str, body: dict[str, Any]) -> str:
    return f"```python\nratings = {{}}\n```\nThe answer is:\n{good}"


def with_odd_reasons(good: str, body: dict[str, Any]) -> str:
    answer = json.loads(good)
    odd = ["}", "```", "#### 0", 'a "2"', "line\nbreak", "\U0001f642 {", "]}"]
    for rating, reason in zip(answer["ratings"].values(), odd, strict=False):
        if isinstance(rating, dict):
            rating["reason"] = reason
    return json.dumps(answer)


def after_a_draft(good: str, body: dict[str, Any]) -> str:
    return f"<reasoning>{good.replace('2', '0')}</reasoning>\n{good}"


def before_a_sentence(good: str, body: dict[str, Any]) -> str:
    return f"{good}\nAll {{twenty}} were {{rated}}, see {{}}."


def one_key_deeper(good: str, body: dict[str, Any]) -> str:
    return json.dumps({"response": json.loads(good)})


def as_texts(good: str, body: dict[str, Any]) -> str:
    return good.replace(" 2", ' "2"')


def with_a_trailing_comma(good: str, body: dict[str, Any]) -> str:
    return f"{good[:-2]},}}}}"


def in_single_quotes(good: str, body: dict[str, Any]) -> str:
    return good.replace('"', "'")


def closed_by_a_bracket(good: str, body: dict[str, Any]) -> str:
    return f"{good[:-2]}]}}"


def in_other_case(good: str, body: dict[str, Any]) -> str:
    return good.replace("clear_and_understandable", "Clear And Understandable")


def after_the_echo(good: str, body: dict[str, Any]) -> str:
    return "\n".join(message["content"] for message in body["messages"]) + f"\n{good}"


@pytest.mark.parametrize("structured", ["auto", "none"])
@pytest.mark.parametrize(
    ("wrap", "rated"),
    [
        (in_fence, True),
        (after_a_python_fence, True),
        (with_odd_reasons, True),
        (after_a_draft, True),
        (before_a_sentence, True),
        (one_key_deeper, True),
        (as_texts, True),
        (with_a_trailing_comma, False),
        (in_single_quotes, False),
        (closed_by_a_bracket, False),
        (in_other_case, False),
        (after_the_echo, True),
    ],
)
def test_wrapped_answers(
    tmp_path: Path,
    wrap: Callable[[str, dict[str, Any]], str],
    rated: bool,
    structured: str,
) -> None:
    rows = make_rows()[:5]
    data = write_csv(tmp_path / "rows.csv", rows)
    output = tmp_path / "A.jsonl"

    def answer(body: dict[str, Any], times: int) -> str:
        return wrap(json.dumps(all_twos(body)), body)

    with Judge(answer) as judge:
        assert annotate(judge, data, output, f"--structured={structured}").code == 0
        found, failed = lines(output), failures(output)
        assert len(found) == (10 if rated else 0) and len(found) + len(failed) == 10
        assert all(set(entry["ratings"].values()) == {2} for entry in found)
        assert all(set(entry["query"].values()) == {0} for entry in found)
        assert all(entry["raw"] and entry["reason"] for entry in failed)
        before = judge.requests
        judge.answer = lambda body, times: json.dumps(all_twos(body))
        assert annotate(judge, data, output, f"--structured={structured}").code == 0
        assert judge.requests - before == len(failed)  # a second call asks only for the failures
    assert len(lines(output)) == 10 and failures(output) == []


def test_find_template_reads_what_the_judge_reads() -> None:
    body = {"messages": [{"content": 'x\n{"query": {"a": "<0 or 1>"}}'}, {"content": ""}]}
    assert find_template(body) == {"query": {"a": "<0 or 1>"}}
