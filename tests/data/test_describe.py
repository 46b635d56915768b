import csv
import json

import pytest

from pref_jax import cache
from pref_jax.data.arena import read_comparisons
from pref_jax.data.describe import compare_layouts, default_tokenizer, describe, raw_quirks, render
from pref_jax.data.segments import Layout
from pref_jax.data.tokenizers import load_tokenizer
from pref_jax.errors import InputError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[", "]", *(f"w{i}" for i in range(30))]


def words(count):
    return " ".join(f"w{i % 30}" for i in range(count))


# prompt, response_a, response_b, label
ROWS = [
    (["w1"], ["w2 w3"], ["w4"], 0),
    (["w1"], [None], [None], 2),
    (["w1", None], ["w2", "w3"], ["w5"], 1),
    (["[SEP] w1"], ["w2"], ["w2"], 0),
    (["w7 \ud83d"], ["\u0000w2"], [" "], 1),
    ([words(30)], [words(200)], [words(5)], 1),
    (["w1"], ["w2 w3"], ["w4"], 0),
    ([], ["w2"], ["w3"], 2),
]


@pytest.fixture
def found(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    write(tmp_path / "rows.csv")
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    layouts = [Layout("single", 104, (0.1, 0.45, 0.45)), Layout("parallel", 103, (0.1, 0.9))]
    return describe(read_comparisons(tmp_path / "rows.csv"), load_tokenizer(tmp_path), layouts)


def write(path, rows=ROWS, labels=True):
    names = ["winner_model_a", "winner_model_b", "winner_tie"] if labels else []
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", "response_a", "response_b", *names])
        for number, (*texts, label) in enumerate(rows):
            flags = [int(label == i) for i in range(3)] if labels else []
            writer.writerow([number, *map(json.dumps, texts), *flags])
    return path


@pytest.mark.parametrize(
    ("cell", "quirks"),
    [
        ('["fine", "\\ud83d\\ude00"]', set()),
        ("[null]", {"null turn"}),
        ('["a", null]', {"null turn"}),
        ("[]", {"no turn"}),
        ('[""]', {"empty text"}),
        ('["", " \\n"]', {"empty text"}),
        ("", {"empty cell or bare null"}),
        ("null", {"empty cell or bare null"}),
        (None, {"empty cell or bare null"}),
        ('["\\ud83d"]', {"lone surrogate"}),
        ('["a\\u0000"]', {"control character"}),
        ('["<|endoftext|>"]', {"text like a special token"}),
        ('["a [MASK]"]', {"text like a special token"}),
        (["a", None], {"null turn"}),
    ],
)
def test_quirks_of_a_cell(cell, quirks):
    assert raw_quirks(cell) == quirks


def test_rows_are_counted(found):
    assert found["rows"] == 8
    assert {name: found["labels"][name]["rows"] for name in list(found["labels"])[1:4]} == {
        "winner_model_a": 3,
        "winner_model_b": 3,
        "winner_tie": 2,
    }
    # Of the five decided rows with responses of two lengths, rows 1 and 7.
    assert found["labels"]["longer_response_wins"] == pytest.approx(2 / 5)
    assert found["turns"] == {"1": 7, "2": 1}
    assert found["prompts"] == {
        "distinct": 6,
        "rows_with_a_repeated_prompt": 3,
        "most_rows_of_one_prompt": 3,
    }
    assert found["quirks"] == {
        "null turn": 2,
        "no turn": 1,
        "empty text": 1,
        "empty cell or bare null": 0,
        "lone surrogate": 1,
        "control character": 1,
        "text like a special token": 1,
        "several turns": 1,
        "uneven turns": 1,
        "identical responses": 2,
        "identical responses with a winner": 1,
        "same texts as an earlier row": 1,
    }


def test_what_is_cut_is_counted(found):
    single, parallel = found["layouts"]["single"], found["layouts"]["parallel"]
    assert single["limits"] == {"prompt": 10, "response_a": 45, "response_b": 45}
    assert found["tokens"]["response_a"]["max"] == 200
    assert single["rows_cut"] == parallel["rows_cut"] == 1 / 8
    tokens = sum(found["tokens"][name]["mean"] * 8 for name in found["tokens"])
    assert single["tokens_cut"] == pytest.approx((20 + 155) / tokens)
    assert parallel["tokens_cut"] == pytest.approx((20 + 110) / tokens)
    assert single["segments"]["response_b"] == {"tokens_cut": 0.0, "rows_cut": 0.0}


def test_the_example_shows_what_is_seen_and_what_is_cut(found):
    example = found["example"]
    assert (example["row"], example["id"], example["layout"]) == (6, "5", "single")
    prompt, a, b = example["sequences"][0]
    assert (prompt["tokens"], prompt["kept"]) == (30, 10)
    assert [piece["seen"] for piece in prompt["pieces"]] == [True, False]
    assert prompt["pieces"][0]["text"] == words(10)
    assert " ".join(piece["text"] for piece in prompt["pieces"]) == words(30)
    assert (a["kept"], b["kept"]) == (45, 5)
    assert [piece["seen"] for piece in b["pieces"]] == [True]


@pytest.mark.parametrize(
    ("truncation", "pieces"),
    [("tail", [-155, 45]), ("head_tail", [23, -155, 22]), ("head", [45, -155])],
)
def test_the_example_follows_the_truncation(tmp_path, found, truncation, pieces):
    layout = Layout("single", 104, (0.1, 0.45, 0.45), truncation=truncation)
    again = describe(
        read_comparisons(tmp_path / "rows.csv"), load_tokenizer(tmp_path), [layout], row=6
    )
    part = again["example"]["sequences"][0][1]
    counts = [(piece["seen"], len(piece["text"].split())) for piece in part["pieces"]]
    assert [count if seen else -count for seen, count in counts] == pieces


def test_description_is_json_and_text(found):
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    text = render(found)
    assert "identical responses with a winner" in text
    assert "prompt: 10 of 30 tokens" in text
    assert text.isprintable() or all(c.isprintable() or c == "\n" for c in text)


def test_a_file_without_labels_and_a_row_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    comparisons = read_comparisons(write(tmp_path / "rows.csv", labels=False))
    tokenizer = default_tokenizer(comparisons)
    found = describe(comparisons, tokenizer, compare_layouts())
    assert found["labels"] == {"labelled": False}
    assert found["quirks"]["identical responses with a winner"] == 0
    assert "none" in render(found)
    with pytest.raises(InputError, match="give 1 to 8"):
        describe(comparisons, tokenizer, compare_layouts(), row=9)


def test_command_prints_and_writes(tmp_path, run_command):
    path = write(tmp_path / "rows.csv")
    output = tmp_path / "found.json"
    result = run_command(
        "launch/describe.py",
        f"--data={path}",
        f"--output={output}",
        env={cache.VARIABLE: str(tmp_path / "cache")},
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "quirks (rows)" in result.stdout
    assert set(json.loads(output.read_text())["layouts"]) == {"single", "parallel", "response"}


def test_the_data_is_not_written_over(tmp_path, run_command):
    path = write(tmp_path / "rows.csv")
    before = path.read_bytes()
    result = run_command("launch/describe.py", f"--data={path}", f"--output={path}")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == (
        f"error: {path}: is the data itself; name another file with --output\n"
    )
    assert path.read_bytes() == before
