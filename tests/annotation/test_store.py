"""What was written stays, whatever stops the process; one line per response at the end."""

import asyncio
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from pref_jax.annotation.ratings import read_lines
from pref_jax.annotation.store import Store, refuse_paid_ratings
from pref_jax.errors import InputError, RunError

WANTED = {(identity, side): frozenset([f"{identity}{side}"]) for identity in "231" for side in "ab"}


def entry(place: str, **more: Any) -> dict[str, Any]:
    return {"id": place[0], "side": place[1], "key": place, "ratings": {}, **more}


def save(path: Path, *places: str, failures: bool = False) -> None:
    with Store(path, WANTED) as store:
        asyncio.run(store.save([entry(place) for place in places], failures=failures))


def places(path: Path) -> list[str]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["id"] + line["side"] for line in lines]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "A.jsonl"


@pytest.fixture
def failures(path: Path) -> Path:
    return path.with_name("A.jsonl.failures")


def test_both_files_follow_the_input_and_others_stand_behind(path: Path, failures: Path) -> None:
    path.write_text(json.dumps(entry("9b")) + "\n" + json.dumps(entry("9a")) + "\n")
    save(path, "1b", "2b", "3a")
    save(path, "3b", "1a", "9b", failures=True)
    assert places(path) == ["2b", "3a", "1b", "9b", "9a"]
    assert places(failures) == ["3b", "1a", "9b"]


def test_a_rated_response_is_no_failure(path: Path, failures: Path) -> None:
    save(path, "2a", "2b", failures=True)
    save(path, "2a")
    assert places(path) == ["2a"] and places(failures) == ["2b"]
    assert sorted(p.name for p in path.parent.iterdir()) == ["A.jsonl", "A.jsonl.failures"]


@pytest.mark.parametrize("torn", ['{"id": "1", "si', '{"id"', "\x00\x00\x00", "{"])
def test_a_torn_line_is_cut_and_the_others_stay(path: Path, torn: str) -> None:
    save(path, "1b", "2a")
    with path.open("a") as file:
        file.write(torn)
    with Store(path, WANTED):
        assert path.read_bytes().endswith(b"}\n")  # what is appended next is a line of its own
    save(path, "3a")
    assert places(path) == ["2a", "3a", "1b"]


def test_a_whole_last_line_without_its_end_stays(path: Path) -> None:
    path.write_text(json.dumps(entry("1b")))
    save(path, "2a")
    assert places(path) == ["2a", "1b"]


def test_something_else_is_not_touched(path: Path) -> None:
    path.write_text("id,prompt\n1,x\n")
    with pytest.raises(InputError, match=r"A\.jsonl:1: is not JSON"):
        Store(path, WANTED)
    assert path.read_text() == "id,prompt\n1,x\n"
    assert not path.with_name("A.jsonl.lock").exists()


@pytest.mark.parametrize(
    "content", ["just one line", '{\n  "a": 1\n}', '{"a": 1}\n{"b', '{"id": "1"}', "[1]\n"]
)
def test_a_file_of_somebody_else_is_left_as_it_is(path: Path, content: str) -> None:
    path.write_text(content)
    with pytest.raises(InputError, match=r"A\.jsonl"):
        Store(path, WANTED)
    assert path.read_text() == content


@pytest.mark.parametrize(
    "changes",
    [
        {"ratings": None},
        {"ratings": {"polite": "x"}},
        {"ratings": {"polite": -2}},
        {"query": 7},
        {"tokens": None},
        {"tokens": {"prompt": "1"}},
        {"attempts": "1"},
        {"cost": float("inf")},
    ],
)
def test_a_line_that_was_spoilt_is_named(path: Path, changes: dict[str, Any]) -> None:
    spoilt = json.dumps(entry("1a") | changes)
    for file in (path, path.with_name("A.jsonl.failures")):
        file.write_text(f"{json.dumps(entry('2a'))}\n{spoilt}\n")
        with pytest.raises(InputError, match=rf"{file.name}:2: its {next(iter(changes))}"):
            Store(path, WANTED)
        file.unlink()
    path.with_name("A.jsonl.replaced").write_text(spoilt + "\n")  # is left out
    with Store(path, WANTED) as store:
        assert store.find(["1a"]) is None


def test_a_flipped_bit_is_found_and_an_own_line_needs_no_sum(path: Path) -> None:
    asyncio.run(_save_rated(path))
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"polite": 2', b'"polite": 3'))
    with pytest.raises(InputError, match=r"A\.jsonl:1: was changed since it was written"):
        Store(path, WANTED)
    with pytest.raises(InputError, match=r"A\.jsonl:1: was changed"):
        list(read_lines(path))
    line = json.loads(path.read_bytes())
    del line["check"]  # who means the change says so
    path.write_text(json.dumps(line) + "\n")
    with Store(path, WANTED) as store:
        assert store.rated(("1", "a")) == line


async def _save_rated(path: Path) -> None:
    with Store(path, WANTED) as store:
        await store.save([entry("1a", ratings={"polite": 2})])


def test_paid_ratings_are_not_replaced_by_predictions(path: Path) -> None:
    refuse_paid_ratings(path)
    path.write_text(json.dumps(entry("1a", model="run@7", cost=0.0, tokens={"prompt": 0})) + "\n")
    refuse_paid_ratings(path)
    for paid in ({"cost": 0.1, "tokens": {}}, {"cost": 0.0, "tokens": {"prompt": 9}}):
        path.write_text(json.dumps(entry("1a", model="judge", **paid)) + "\nhalf")
        with pytest.raises(InputError, match="by the judge 'judge'"):
            refuse_paid_ratings(path)


def test_a_second_process_is_refused(path: Path) -> None:
    with Store(path, WANTED), pytest.raises(InputError, match=f"in use by process {os.getpid()} "):
        Store(path, WANTED)
    save(path, "1a")
    assert places(path) == ["1a"]


def test_ratings_of_another_prompt_are_kept_apart(path: Path) -> None:
    path.write_text(json.dumps(entry("1a", key="old")) + "\n")
    with Store(path, WANTED) as store:
        assert store.outdated == 1 and store.rated(("1", "a")) is None
    assert json.loads(path.read_text())["key"] == "old"  # better than none
    save(path, "1a")
    assert json.loads(path.read_text())["key"] == "1a"
    replaced = path.with_name("A.jsonl.replaced")
    assert json.loads(replaced.read_text())["key"] == "old"
    with Store(path, {("1", "a"): frozenset(["old"])}) as store:  # and found again
        found = store.find(["old"])
    assert found is not None and found["key"] == "old"


def test_lines_are_synced_before_they_count(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    write, fsync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda *a: (events.append("write"), write(*a))[1])
    monkeypatch.setattr(os, "fsync", lambda *a: (events.append("sync"), fsync(*a))[1])

    async def run() -> None:
        with Store(path, WANTED) as store:
            events.clear()
            await store.save([entry("1a"), entry("1b")])
            assert events[0] == "write" and "sync" in events and events.count("write") == 1
            events.clear()
            await asyncio.gather(*(store.save([entry(p)]) for p in ("2a", "2b", "3a")))
            # A line each; those that end together share a sync of the two files.
            assert events == ["write"] * 3 + ["sync"] * 2

    asyncio.run(run())


@pytest.mark.parametrize("half", [False, True])
def test_a_full_disk_loses_nothing(path: Path, monkeypatch: pytest.MonkeyPatch, half: bool) -> None:
    save(path, "3a", "2a")
    write = os.write

    def full(file: int, data: bytes) -> int:
        if half:
            return write(file, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Store(path, WANTED) as store:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(RunError, match="No space left"):
            asyncio.run(store.save([entry("1a")]))
        assert path.read_bytes().endswith(b"\n") and places(path) == ["2a", "3a"]
        monkeypatch.undo()  # somebody made room
    assert places(path) == ["2a", "3a", "1a"]


def test_leftovers_of_a_kill_are_removed_and_no_other_file(path: Path) -> None:
    ours = (".A.jsonl.unfinished", ".A.jsonl.failures.unfinished", ".A.jsonl.replaced.unfinished")
    for name in (*ours, ".B.jsonl.unfinished"):
        (path.parent / name).write_text("half")
    save(path, "1a")
    left = sorted(p.name for p in path.parent.iterdir())
    assert left == [".B.jsonl.unfinished", "A.jsonl", "A.jsonl.failures"]
