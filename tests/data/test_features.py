import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pytest

from pref_jax import cache, hosts
from pref_jax.data import features
from pref_jax.data.arena import read_comparisons
from pref_jax.data.features import make_features, make_tokens
from pref_jax.data.segments import Form, Layout, cut, kept_lengths
from pref_jax.data.tokenizers import load_tokenizer
from pref_jax.experiment import exchange_responses

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(50)), "."]
ROWS = 1300  # more than two record batches
LAYOUTS = [
    Layout("single", 60, (0.1, 0.45, 0.45), truncation="head"),
    Layout("single", 60, (0.1, 0.45, 0.45), True, "head_tail"),
    Layout("parallel", 40, (0.2, 0.8), truncation="tail"),
    Layout("parallel", 40, (0.2, 0.8), truncation="head_tail", marker="[...]"),
    Layout("response", 40, (0.2, 0.8)),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_data(folder, rows=ROWS):
    random = np.random.default_rng(3)

    def text():
        count = 0 if random.random() < 0.02 else int(random.integers(1, 70))
        return " ".join(f"w{random.integers(60)}" for _ in range(count))

    path = folder / "rows.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", "response_a", "response_b"])
        writer.writerows([i, *(json.dumps([text()]) for _ in range(3))] for i in range(rows))
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    return path


@pytest.fixture
def data(tmp_path):
    return read_comparisons(make_data(tmp_path)), load_tokenizer(tmp_path)


@pytest.mark.parametrize("part_rows", [512, features._PART_ROWS])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.name}-{layout.truncation}")
def test_every_sequence_is_the_slow_obvious_one(data, layout, part_rows, monkeypatch):
    monkeypatch.setattr(features, "_PART_ROWS", part_rows)
    comparisons, tokenizer = data
    found = make_features(comparisons, tokenizer, layout)
    tokens = make_tokens(comparisons, tokenizer)
    per_row = 2 if layout.name == "response" else 1
    assert (found.num_samples, found.sides) == (ROWS * per_row, layout.sides)
    assert len(found) == found.num_samples
    rows = comparisons.table.to_pylist()
    for index, row in enumerate(rows):
        prompt, a, b = tokenizer.encode([row["prompt"], row["response_a"], row["response_b"]])
        assert tokens.lengths[index].tolist() == [len(prompt), len(a), len(b)]
        texts = [[prompt, a, b]] if layout.name == "single" else [[prompt, a], [prompt, b]]
        for number, segments in enumerate(texts):
            lengths = np.array([[len(segment) for segment in segments]])
            kept = kept_lengths(lengths, layout)[0]
            parts = [
                cut(segment, int(count), layout.truncation, Form(layout, tokenizer).marker)
                for segment, count in zip(segments, kept, strict=True)
            ]
            ids, type_start = Form(layout, tokenizer).join(parts)
            place = (2 * index + number, 0) if layout.name == "response" else (index, number)
            assert found.sequence(*place).tolist() == ids.tolist()
            assert found.type_start(*place) == type_start
            assert found.lengths[place] == len(ids) <= layout.max_length
        if layout.name == "response":
            whole = [found.text_lengths(2 * index + side) for side in range(2)]
            assert whole == [(len(a), len(a)), (len(b), len(b))]
        else:
            assert found.text_lengths(index) == (len(a), len(b))


def test_each_turn_is_cut_where_it_ends_in_the_file(tmp_path):
    """Turns may hold blank lines, be empty, and be more in one text than in another."""
    rows = [
        [["w1 w2 w3\n\nw4", "w5 w6 w7 w8 w9"], ["w1 " * 40, "", "w2 w3"], ["w4", "w5 " * 30]],
        [["w1"], ["w2 " * 50], ["w3", None, "w4 " * 3]],
        [["w1 " * 9, "w2"], ["w2 " * 20, "w3 " * 9, "w4 " * 30], ["w5"]],
    ]
    path = make_data(tmp_path, rows=0)
    with path.open("a", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([i, *map(json.dumps, row)] for i, row in enumerate(rows))
    comparisons, tokenizer = read_comparisons(path), load_tokenizer(tmp_path)
    layout = Layout("parallel", 23, (0.3, 0.7), truncation="turns", marker="[...]")
    found = make_features(comparisons, tokenizer, layout)
    form = Form(layout, tokenizer)

    def look(turns, room):
        parts = tokenizer.encode(["null" if turn is None else turn for turn in turns])
        ends = np.cumsum([len(part) for part in parts])
        return cut(np.concatenate(parts), room, "turns", form.marker, ends[:-1])

    for index, (prompt, *responses) in enumerate(rows):
        for side, response in enumerate(responses):
            ids, _ = form.join([look(prompt, 6), look(response, 14)])
            assert found.sequence(index, side).tolist() == ids.tolist()
    assert found.lengths.max() == 23
    exchanged = make_features(exchange_responses(comparisons), tokenizer, layout)
    for index in range(len(rows)):
        for side in range(2):
            other = exchanged.sequence(index, 1 - side)
            assert found.sequence(index, side).tolist() == other.tolist()


def test_sequences_are_views_into_the_file(data):
    found = make_features(*data, LAYOUTS[0])
    ids = found.sequence(ROWS - 1)
    assert ids.dtype == np.int32
    assert not ids.flags.owndata
    assert not ids.flags.writeable
    before = pa.total_allocated_bytes()
    for sample in range(ROWS):
        found.sequence(sample)
    assert pa.total_allocated_bytes() == before


class Counting:
    def __init__(self, tokenizer):
        self._tokenizer, self.texts = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def encode(self, texts):
        self.texts += len(texts)
        return self._tokenizer.encode(texts)


def test_each_text_is_tokenised_once_for_all_layouts(data):
    comparisons, tokenizer = data
    counting = Counting(tokenizer)
    digests = {make_features(comparisons, counting, layout).digest for layout in LAYOUTS}
    assert counting.texts == 3 * ROWS + 1  # and the marker
    assert len(digests) == len(LAYOUTS)
    assert make_features(comparisons, counting, LAYOUTS[0]).digest in digests
    assert counting.texts == 3 * ROWS + 1  # and the marker


def test_other_data_or_tokenizer_is_another_entry(data, tmp_path):
    comparisons, tokenizer = data
    digest = make_features(comparisons, tokenizer, LAYOUTS[0]).digest
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    cased = load_tokenizer(tmp_path)
    assert make_features(comparisons, cased, LAYOUTS[0]).digest != digest
    path = tmp_path / "rows.csv"
    path.write_text(path.read_text().replace("w1 ", "w2 ", 1))
    assert make_features(read_comparisons(path), tokenizer, LAYOUTS[0]).digest != digest


def test_a_damaged_file_in_the_cache_is_made_again(data, own_cache):
    expected = make_features(*data, LAYOUTS[0]).sequence(7).tolist()
    for kind in ("tokens", "features"):
        for path in (own_cache / kind).iterdir():
            if path.name != "CACHEDIR.TAG":
                path.write_bytes(path.read_bytes()[:-50])
    assert make_features(*data, LAYOUTS[0]).sequence(7).tolist() == expected


MAKE = """
import sys, time
from pathlib import Path
from pref_jax.data.arena import read_comparisons
from pref_jax.data.features import make_features
from pref_jax.data.segments import Layout
from pref_jax.data.tokenizers import load_tokenizer
folder = Path(sys.argv[1])
comparisons, tokenizer = read_comparisons(folder / "rows.csv"), load_tokenizer(folder)
print("ready", flush=True)
found = make_features(comparisons, tokenizer, Layout("single", 60, (0.1, 0.45, 0.45)))
print(sum(int(found.sequence(i).sum()) for i in range(len(found))))
"""


def test_kills_and_a_second_process_harm_nothing(tmp_path, own_cache):
    make_data(tmp_path, 3000)
    command = [sys.executable, "-c", MAKE, str(tmp_path)]
    for delay in (0.0, 0.02, 0.05, 0.1):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = {process.communicate()[0] for process in both}
    assert all(process.returncode == 0 for process in both)
    assert len(answers) == 1
    cache.clear()
    assert {subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout} == answers
    names = [path.name for kind in ("tokens", "features") for path in (own_cache / kind).iterdir()]
    assert not [name for name in names if name.endswith((".tmp", ".lock"))]


def test_progress_is_a_bar_on_a_terminal_only(data, monkeypatch, capsys):
    make_tokens(*data)
    assert capsys.readouterr().err == ""
    cache.clear()
    monkeypatch.setattr(features.sys.stderr, "isatty", lambda: True, raising=False)
    make_tokens(*data)
    assert "tokenising" in capsys.readouterr().err


def test_memory_is_flat_in_the_number_of_rows(tmp_path):
    """Ten times the rows, about the same peak: what is mapped is not counted, what is held is."""
    program = MAKE.replace(
        'print("ready", flush=True)', "import resource; pa = __import__('pyarrow')"
    ).replace("print(sum", "held = pa.default_memory_pool().max_memory(); print(held) #")
    peaks = []
    for rows in (3000, 15000):
        folder = tmp_path / str(rows)
        folder.mkdir()
        make_data(folder, rows)
        result = subprocess.run(
            [sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, check=True
        )
        peaks.append(int(result.stdout))
    assert peaks[1] < peaks[0] * 1.3 + 1e6


def test_parts_that_another_process_makes_are_left_to_it(data, monkeypatch):
    """The rest is made meanwhile, and the result is that of one process."""
    comparisons, tokenizer = data
    expected = make_tokens(comparisons, tokenizer)
    cache.clear()
    monkeypatch.setattr(features, "_PART_ROWS", 512)
    key = features._tokens_key(comparisons, tokenizer)
    counting, found = Counting(tokenizer), []
    folder = cache.folder("tokens")
    ours = threading.Thread(target=lambda: found.append(make_tokens(comparisons, counting)))
    with cache.locked(folder / f".{key}-512.lock"):
        ours.start()
        deadline = time.monotonic() + 30
        while counting.texts < 3 * (ROWS - 512) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert counting.texts == 3 * (ROWS - 512)
        assert not found and not (folder / f"{key}-512").exists()
    ours.join()  # the other one was killed: its part is made here in the end
    assert counting.texts == 3 * ROWS
    for row in range(ROWS):
        for ids, wanted in zip(found[0][row], expected[row], strict=True):
            np.testing.assert_array_equal(ids, wanted)


def test_hosts_start_at_different_parts(data, monkeypatch):
    comparisons, tokenizer = data
    monkeypatch.setattr(features, "_PART_ROWS", 256)
    orders = []
    for host in range(3):
        monkeypatch.setattr(hosts, "index", lambda host=host: host)
        monkeypatch.setattr(hosts, "count", lambda: 3)
        made = []

        def make(rows, path, made=made):
            made.append(rows.start)
            features._write(
                path,
                features._encode(comparisons, tokenizer, rows, features._Progress("", 0, False)),
                features._token_schema(),
            )

        features._load_parts("tokens", f"host{host}", ROWS, make)
        orders.append(made)
    parts = list(range(0, ROWS, 256))
    assert [order[0] for order in orders] == [parts[0], parts[2], parts[4]]
    assert all(sorted(order) == parts for order in orders)
