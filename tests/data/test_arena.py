"""Files as they arrive: every form is read alike, and every wrong one is refused with its row."""

import csv
import gzip
import io
import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from pref_jax import cache
from pref_jax.data import arena
from pref_jax.data.arena import LABELS, TEXTS, normalise_prompt, parse_turns, read_comparisons
from pref_jax.errors import InputError

COLUMNS = ["id", *TEXTS]
QUESTIONS = [
    "Name a river.",
    "Add 2 and 3.",
    "Write a haiku about rain.",
    "Why is the sky blue?",
    "Translate 'good night' to French.",
    "List three birds.",
]
ANSWERS_A = ["The Danube.", "5", "Grey roof, / tea cools.", "Short waves.", "Bonne nuit.", "Wren."]
ANSWERS_B = ["Water that flows.", "2 + 3 = 6", "Rain.", "Because, " * 40, "Good night.", "Birds."]
WINNERS = [(1, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0), (0, 0, 1)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any) -> None:
    monkeypatch.setenv("PREF_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def make_rows(**changes: dict[str, Any]) -> list[dict[str, Any]]:
    """Six rows, ids 101 to 106; ``make_rows(r3={"id": "x"})`` changes cells of row index 3."""
    texts = zip(QUESTIONS, ANSWERS_A, ANSWERS_B, strict=True)
    rows = [
        {"id": 101 + i, **{c: json.dumps([t]) for c, t in zip(TEXTS, row, strict=True)}}
        | dict(zip(LABELS, WINNERS[i], strict=True))
        for i, row in enumerate(texts)
    ]
    for name, cells in changes.items():
        rows[int(name[1:])].update(cells)
    return rows


def to_csv(rows: list[dict[str, Any]], columns: list[str], end: str = "\n") -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator=end, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def put(path: Path, content: str | bytes, encoding: str = "utf-8") -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def read_text(path: Path, **options: Any) -> list[dict[str, Any]]:
    return read_comparisons(path, **options).table.to_pylist()


@pytest.fixture
def base(tmp_path: Path) -> list[dict[str, Any]]:
    return read_text(put(tmp_path / "base.csv", to_csv(make_rows(), [*COLUMNS, *LABELS])))


def test_columns_and_labels(tmp_path: Path) -> None:
    path = put(tmp_path / "base.csv", to_csv(make_rows(), [*COLUMNS, *LABELS]))
    rows = read_comparisons(path)
    assert len(rows) == 6
    assert rows.ids == ["101", "102", "103", "104", "105", "106"]
    assert rows.labels.tolist() == [0, 0, 1, 2, 0, 2]
    assert rows.labels.dtype == np.int8
    assert rows.tie_allowed.all()
    assert rows.turns.tolist() == [1] * 6
    assert rows.groups.dtype == np.uint64
    assert rows.sources == [None] * 6
    assert rows.table.column("prompt").to_pylist() == QUESTIONS
    assert rows.labelled


def test_labels_are_ignored_or_required_as_asked(tmp_path: Path) -> None:
    without = put(tmp_path / "test.csv", to_csv(make_rows(), COLUMNS))
    assert read_comparisons(without).labels.tolist() == [-1] * 6
    for _ in range(2):  # also from the cache
        with pytest.raises(InputError, match="winner_model_a, winner_model_b, winner_tie missing"):
            read_comparisons(without, labelled=True)
    wrong = make_rows(r1={"winner_tie": "maybe"})
    labelled = put(tmp_path / "train.csv", to_csv(wrong, [*COLUMNS, *LABELS]))
    assert read_comparisons(labelled, labelled=False).labels.tolist() == [-1] * 6
    with pytest.raises(InputError, match=r"train.csv:2: winner_tie is 'maybe'"):
        read_comparisons(labelled)
    assert not read_comparisons(labelled, labelled=False).labelled


@pytest.mark.parametrize("form", ["bom", "crlf", "members", "utf16", "gzip", "gzip-plain-name"])
def test_every_form_of_the_file_reads_alike(
    tmp_path: Path, base: list[dict[str, Any]], form: str
) -> None:
    text = to_csv(make_rows(), [*COLUMNS, *LABELS])
    data = text.encode()
    half = len(data) // 2
    if form == "bom":
        path = put(tmp_path / "x.csv", text, "utf-8-sig")
    elif form == "crlf":
        path = put(tmp_path / "x.csv", to_csv(make_rows(), [*COLUMNS, *LABELS], "\r\n"))
    elif form == "members":  # cut inside a row
        members = gzip.compress(data[:half]) + gzip.compress(data[half:])
        path = put(tmp_path / "two.csv.gz", members)
    elif form == "utf16":
        path = put(tmp_path / "x.csv", text, "utf-16")
    elif form == "gzip":
        path = put(tmp_path / "x.CSV.GZ", gzip.compress(data))
    else:
        path = put(tmp_path / "x.csv", gzip.compress(data))
    assert read_text(path) == base


def test_line_breaks_inside_cells_over_a_mebibyte(tmp_path: Path) -> None:
    rows = make_rows()
    spread, compact = [], []
    for index in range(200):
        row = rows[5 * (index % 2)] | {"id": index}
        turns = [*json.loads(row["prompt"]), "filler " * 1600]
        compact.append(row | {"prompt": json.dumps(turns)})
        spread.append(row | {"prompt": json.dumps(turns, indent=1).replace("\n", "\r\n")})
    first = put(tmp_path / "spread.csv", to_csv(spread, COLUMNS))
    assert first.stat().st_size > 1 << 20
    second = put(tmp_path / "compact.csv", to_csv(compact, COLUMNS))
    assert len(read_comparisons(first)) == 200
    assert read_text(first) == read_text(second)


def test_a_cell_of_several_mebibytes(tmp_path: Path) -> None:
    rows = make_rows(r3={"response_b": json.dumps(["word " * 800_000])})
    path = put(tmp_path / "x.csv", to_csv(rows, COLUMNS))
    assert len(read_text(path)[3]["response_b"]) == 4_000_000


def test_reading_does_not_depend_on_the_locale(tmp_path: Path) -> None:
    rows = make_rows(r0={"prompt": '["caf\u00e9"]'})
    path = put(tmp_path / "x.csv", to_csv(rows, COLUMNS))
    program = (
        "import sys; from pref_jax.data.arena import read_comparisons;"
        "print(ascii(read_comparisons(sys.argv[1]).table.column('prompt')[0].as_py()))"
    )
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == ascii("caf\u00e9")


def test_nothing_is_written_beside_the_data(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    path = put(folder / "x.csv", to_csv(make_rows(), COLUMNS))
    folder.chmod(0o555)
    try:
        read_comparisons(path)
        assert [p.name for p in folder.iterdir()] == ["x.csv"]
    finally:
        folder.chmod(0o755)


def test_parquet_holds_json_or_lists(tmp_path: Path, base: list[dict[str, Any]]) -> None:
    rows = make_rows()
    table = pa.table({name: [row[name] for row in rows] for name in [*COLUMNS, *LABELS]})
    parquet.write_table(table, tmp_path / "json.parquet")
    assert read_text(tmp_path / "json.parquet") == base
    columns: dict[str, Any] = {name: [json.loads(row[name]) for row in rows] for name in TEXTS}
    columns["prompt"][2] = [None, "x"]
    columns["response_a"][3] = None
    lists = pa.table({"id": [row["id"] for row in rows], **columns, "extra": [{"a": 1}] * 6})
    parquet.write_table(lists, tmp_path / "lists.parquet")
    read = read_text(tmp_path / "lists.parquet")
    assert read[0]["response_a"] == base[0]["response_a"]
    assert read[2]["prompt"] == "null\n\nx"
    assert read[3]["response_a"] == "null"
    put(tmp_path / "cut.parquet", (tmp_path / "json.parquet").read_bytes()[:900])
    with pytest.raises(InputError, match="damaged Parquet"):
        read_comparisons(tmp_path / "cut.parquet")


def test_labels_written_by_other_programs(tmp_path: Path) -> None:
    spellings = [(1.0, 0.0, 0.0), ("true", "False", "false"), ("0", " 1", "0")]
    rows = [
        row | dict(zip(LABELS, flags, strict=True))
        for row, flags in zip(make_rows()[:3], spellings, strict=True)
    ]
    path = put(tmp_path / "x.csv", to_csv(rows, [*COLUMNS, *LABELS]))
    assert read_comparisons(path).labels.tolist() == [0, 0, 1]


def test_ids_stay_as_typed(tmp_path: Path) -> None:
    typed = ["007", " 8", "1e5\r\n", 'é,"x', "2.0", "-1"]
    rows = [row | {"id": name} for row, name in zip(make_rows(), typed, strict=True)]
    path = put(tmp_path / "x.csv", to_csv(rows, COLUMNS))
    assert read_comparisons(path).ids == typed


def test_second_read_comes_from_the_cache(tmp_path: Path, monkeypatch: Any) -> None:
    path = put(tmp_path / "x.csv", to_csv(make_rows(), COLUMNS))
    first = read_comparisons(path)
    moved = path.rename(tmp_path / "y.csv")

    def refuse(*_: Any) -> None:
        raise AssertionError("the file was parsed again")

    monkeypatch.setattr(arena, "_write_rows", refuse)
    second = read_comparisons(moved)
    assert second.table.equals(first.table)
    assert (second.digest, second.path) == (first.digest, str(moved))
    with pytest.raises(AssertionError):
        read_comparisons(put(tmp_path / "x.csv", to_csv(make_rows()[:5], COLUMNS)))


def test_a_refused_file_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    path = put(tmp_path / "x.csv", to_csv(make_rows(r5={"prompt": "no"}), COLUMNS))
    for _ in range(2):
        with pytest.raises(InputError, match=r"x\.csv:6"):
            read_comparisons(path)
    left = [p for p in cache.cache_dir().rglob("*") if p.is_file() and p.name != "CACHEDIR.TAG"]
    assert left == []


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    path = put(tmp_path / "x.csv", to_csv(make_rows(), COLUMNS))
    write_rows = arena._write_rows

    def write_slowly(*arguments: Any) -> Any:
        notes = write_rows(*arguments)
        put(path, to_csv(make_rows()[:5], COLUMNS))
        return notes

    with monkeypatch.context() as patch:
        patch.setattr(arena, "_write_rows", write_slowly)
        with pytest.raises(InputError, match="the file changed while it was read"):
            read_comparisons(path)
    assert len(read_comparisons(path)) == 5


# Turns


@pytest.mark.parametrize(
    ("cell", "turns"),
    [
        ("[null]", ["null"]),
        ('["null"]', ["null"]),
        ("[]", ["null"]),
        ("[ ]", ["null"]),
        ("null", ["null"]),
        ("", ["null"]),
        (None, ["null"]),
        ('[""]', [""]),
        ('[" "]', [" "]),
        ('["",""]', ["", ""]),
        ('["NA"]', ["NA"]),
        ('["nan"]', ["nan"]),
        ('["None"]', ["None"]),
        ('["5", null]', ["5", "null"]),
        (r'["\ud83d"]', ["?"]),
        (r'["\ud83d\ud83d \ude00"]', ["?? ?"]),
        (r'["\ud83d\ude00 \ud83d"]', ["\U0001f600 ?"]),
        (r'["a\u0000b"]', ["a\0b"]),
        ('["[SEP] <|endoftext|> \u00e9 \u4f60"]', ["[SEP] <|endoftext|> \u00e9 \u4f60"]),
        (["x", None, "\ud83d"], ["x", "null", "?"]),
        (' \r\n["x"]\n', ["x"]),
    ],
)
def test_turns(cell: Any, turns: list[str]) -> None:
    assert parse_turns(cell) == turns


@pytest.mark.parametrize(
    "cell",
    [
        "[true]",
        "[5]",
        "[NaN]",
        '{"a":1}',
        "NA",
        "nan",
        "None",
        "word",
        '"one text"',
        "5",
        "['single quotes']",
        '["open',
        '["x"] trailing',
        '["x",]',
        '[["x"]]',
        '["a\0b"]',
        '["raw\nbreak"]',
        "[" * 100_000,
        f"[{'1' * 5000}]",
    ],
)
def test_other_cells_are_refused_with_their_row(tmp_path: Path, cell: str) -> None:
    with pytest.raises(ValueError):
        parse_turns(cell)
    path = put(tmp_path / "x.csv", to_csv(make_rows(r0={"response_a": cell}), COLUMNS))
    with pytest.raises(InputError, match=r"x\.csv:1: response_a is .*; write a JSON list"):
        read_comparisons(path)


def test_empty_cells_are_read_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = make_rows(r1={"response_a": ""}, r2={"response_b": "null"})
    path = put(tmp_path / "x.csv", to_csv(rows, COLUMNS))
    logging.getLogger("pref_jax").propagate = True
    for _ in range(2):  # also from the cache
        caplog.clear()
        read = read_text(path)
        assert (read[1]["response_a"], read[2]["response_b"]) == ("null", "null")
        assert "x.csv:2: empty cell or bare null read as [null] (2 such" in caplog.text


def test_uneven_turns_keep_every_turn(tmp_path: Path) -> None:
    uneven = {"prompt": '["p1", "p2"]', "response_a": '["a1", "a2"]', "response_b": '["b1"]'}
    path = put(tmp_path / "x.csv", to_csv(make_rows(r0=uneven), COLUMNS))
    rows = read_comparisons(path)
    first = rows.table.slice(0, 1).to_pylist()[0]
    assert [first[name] for name in TEXTS] == ["p1\n\np2", "a1\n\na2", "b1"]
    assert [first[f"{name}_ends"] for name in TEXTS] == [[2], [2], []]
    assert rows.turns[0] == 2


def test_groups_join_prompts_that_are_the_same_to_a_reader(tmp_path: Path) -> None:
    same = ["Straße  \uff11?", "STRASSE 1?", " strasse\t1?\n"]
    assert len({normalise_prompt([prompt]) for prompt in same}) == 1
    prompts = [*same, "Strasse 2?"]
    changes = {f"r{i}": {"prompt": json.dumps([p])} for i, p in enumerate(prompts)}
    groups = read_comparisons(
        put(tmp_path / "x.csv", to_csv(make_rows(**changes), COLUMNS))
    ).groups.tolist()
    assert groups[0] == groups[1] == groups[2] != groups[3]


def test_ties_that_could_not_be_called(tmp_path: Path) -> None:
    rows = [
        row | {"tie_allowed": cell, "source": source}
        for row, cell, source in zip(
            make_rows(), [0, 1, "", "", "0", ""], ["x", "", "y", "y", "", ""], strict=True
        )
    ]
    columns = [*COLUMNS, *LABELS, "tie_allowed", "source"]
    read = read_comparisons(put(tmp_path / "x.csv", to_csv(rows, columns)))
    assert read.tie_allowed.tolist() == [False, True, True, True, False, True]
    assert read.sources == ["x", None, "y", "y", None, None]
    rows[3]["tie_allowed"] = 0
    with pytest.raises(InputError, match=r"x\.csv:4: a tie in a row with tie_allowed=0"):
        read_comparisons(put(tmp_path / "x.csv", to_csv(rows, columns)))
    rows[3]["tie_allowed"] = "no"
    with pytest.raises(InputError, match=r"x\.csv:4: tie_allowed is 'no'"):
        read_comparisons(put(tmp_path / "x.csv", to_csv(rows, columns)))


# Wrong files

_GOOD = to_csv(make_rows(), [*COLUMNS, *LABELS])


def _changed(**changes: dict[str, Any]) -> str:
    return to_csv(make_rows(**changes), [*COLUMNS, *LABELS])


_WRONG: dict[str, tuple[str, str | bytes, str]] = {
    "empty": ("x.csv", "", r"x\.csv: the file is empty"),
    "empty gzip": ("x.csv.gz", gzip.compress(b""), r"x\.csv\.gz: the file is empty"),
    "only a mark": ("x.csv", b"\xef\xbb\xbf", r"x\.csv: the file is empty|columns id"),
    "header only": ("x.csv", _GOOD.splitlines()[0] + "\n", r"x\.csv: there is a header but no row"),
    "no header": ("x.csv", "1,a,b,c\n", r"columns id, prompt.* missing \(found: 1, a, b, c\)"),
    "semicolons": ("x.csv", _GOOD.replace(",", ";"), r"x\.csv: columns id"),
    "no response_b": ("x.csv", to_csv(make_rows(), COLUMNS[:3]), "column response_b missing"),
    "no id": ("x.csv", to_csv(make_rows(), COLUMNS[1:]), "column id missing"),
    "some labels": ("x.csv", to_csv(make_rows(), [*COLUMNS, *LABELS[:2]]), "winner_tie missing"),
    "column twice": ("x.csv", "id,prompt,prompt,response_a,response_b\n", "prompt is there twice"),
    "two winners": ("x.csv", _changed(r2={"winner_tie": 1}), r"x\.csv:3: .*exactly one must be 1"),
    "no winner": ("x.csv", _changed(r2={"winner_model_b": 0}), r"x\.csv:3: .*exactly one"),
    "half a winner": ("x.csv", _changed(r2={"winner_model_b": 0.5}), r"x\.csv:3: .*'0\.5', not"),
    "blank label": ("x.csv", _changed(r2={"winner_model_a": ""}), r"x\.csv:3: .* '', not 0 or 1"),
    "id twice": ("x.csv", _changed(r4={"id": 102}), r"x\.csv:5: id '102' is already .* row 2"),
    "no id in a row": ("x.csv", _changed(r4={"id": " "}), r"x\.csv:5: the id is empty"),
    "short row": ("x.csv", _GOOD + "9,x\n", r"x\.csv:7: 2 cells where the header names 7"),
    "long row": ("x.csv", _GOOD + "9" + ",1" * 8, r"x\.csv:7: 9 cells"),
    "open quote": ("x.csv", _GOOD[:-60], r"x\.csv:\d: "),
    "ends in a cell": ("x.csv", _GOOD + '9,"[""x', r"x\.csv:7: the file ends inside a quoted"),
    "text after a quote": ("x.csv", _GOOD + '9,"a"b,c\n', r"x\.csv:7: broken CSV"),
    "latin-1": (
        "x.csv",
        _changed(r3={"prompt": '["é"]'}).encode("latin-1"),
        r"x\.csv:4: not UTF-8",
    ),
    "binary": ("x.csv", random.Random(0).randbytes(5000), r"x\.csv"),
    "image": ("x.csv", b"\x89PNG\r\n\x1a\n" + bytes(100), r"x\.csv: not UTF-8"),
    "half a gzip": ("x.csv.gz", gzip.compress(_GOOD.encode())[:-30], "gzip"),
    "junk after gzip": ("x.csv.gz", gzip.compress(_GOOD.encode()) + b"junk", "damaged gzip"),
    "odd utf-16": ("x.csv", _GOOD.encode("utf-16")[:-1], r"x\.csv: not UTF-16"),
    "zip": ("x.csv", b"PK\x03\x04" + bytes(50), "zip archive"),
    "zip by name": ("x.csv.zip", b"PK\x03\x04", "unpack it"),
    "json": ("x.json", "[]", "unknown kind of file; use one that ends in .csv"),
    "not parquet": ("x.parquet", _GOOD, "not a Parquet file"),
    "parquet as csv": ("x.csv", b"PAR1" + bytes(50), "a Parquet file under another name"),
    "damaged parquet": ("x.parquet", b"PAR1" + bytes(50) + b"PAR1", "damaged Parquet"),
}


@pytest.mark.parametrize("name", _WRONG)
def test_wrong_files_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    file, content, expected = _WRONG[name]
    path = put(tmp_path / file, content)
    with pytest.raises(InputError, match=expected) as caught:
        read_comparisons(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "; " in message
    assert message.isascii() and "\n" not in message and len(message) < 400 + len(str(path))


def test_no_file_and_no_permission(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_comparisons(tmp_path / "none.csv")
    with pytest.raises(InputError, match="is a folder"):
        read_comparisons(tmp_path)
    for odd in ("", "a\0b.csv"):
        with pytest.raises(InputError):
            read_comparisons(odd)
    if os.geteuid():
        path = put(tmp_path / "x.csv", _GOOD)
        path.chmod(0)
        with pytest.raises(InputError, match="cannot be opened"):
            read_comparisons(path)


def _many_rows(count: int) -> Iterator[str]:
    yield "id,prompt,response_a,response_b\n"
    for index in range(count):
        yield f'{index},"[""p {index}""]","[""{"a" * 2000}""]","[""{"b" * 2000}""]"\n'


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Peak memory of a fresh process, beyond the mapped file, for 2,000 and 20,000 rows."""
    program = (
        "import resource, sys; from pref_jax.data.arena import read_comparisons;"
        "read_comparisons(sys.argv[1]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for count in (2_000, 20_000):
        path = tmp_path / f"{count}.csv"
        with open(path, "w") as file:
            file.writelines(_many_rows(count))
        done = subprocess.run(
            [sys.executable, "-c", program, str(path)],
            cwd=Path(__file__).resolve().parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 25, f"MiB at 2,000 and 20,000 rows: {peaks}"  # file: 80 MiB


def test_the_real_rows(shared_data: Path) -> None:
    rows = read_comparisons(shared_data / "human_preferences.csv.gz")
    assert len(rows) == 8634
    assert np.bincount(rows.labels).tolist() == [4004, 3907, 723]
    with gzip.open(
        shared_data / "human_preferences.csv.gz", "rt", encoding="utf-8", newline=""
    ) as file:
        expected = list(csv.DictReader(file))
    assert rows.ids == [row["id"] for row in expected]
    for name in TEXTS:
        texts = rows.table.column(name).to_pylist()
        for text, row in zip(texts, expected, strict=True):
            turns = [turn if turn is not None else "null" for turn in json.loads(row[name])]
            joined = "\n\n".join(turns or ["null"])
            assert text == "".join("?" if "\ud800" <= c <= "\udfff" else c for c in joined)


@pytest.mark.parametrize("name", ["rows.arrow", "notes.json"])
def test_a_damaged_cache_entry_is_made_again(tmp_path, monkeypatch, name: str) -> None:
    monkeypatch.setenv("PREF_JAX_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.csv"
    path.write_text('id,prompt,response_a,response_b\n1,"[""p""]","[""a""]","[""b""]"\n')
    read_comparisons(path)
    (damaged,) = (tmp_path / "cache" / "comparisons").glob(f"*/{name}")
    damaged.write_bytes(damaged.read_bytes()[:20])
    assert read_comparisons(path).ids == ["1"]
