"""The exported folder, used by a program that knows transformers and not this project."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rig import TINY, call, finish, predict, read_csv, start, write_csv

pytest.importorskip("torch")
pytest.importorskip("transformers")

ROWS = 64
# Arguments: folder, CSV; prints the probabilities as JSON. Everything it knows of the input's form
# is what pref_jax.json and the interface say.
PROGRAM = """
import csv, json, math, sys
from fractions import Fraction

for name in ("pref_jax", "jax", "jaxlib", "flax", "tensorflow"):
    sys.modules[name] = None  # importing it fails, as where it is not installed
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder, data = sys.argv[1:]
form = json.load(open(folder + "/pref_jax.json"))["input"]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True).eval()
cls, sep, pad = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id

def encode(cell):
    turns = ["null" if turn is None else turn for turn in json.loads(cell)]
    return tokenizer.encode("\\n\\n".join(turns), add_special_tokens=False)

def sequence(segments):
    room = form["max_length"] - 1 - len(segments)
    ids, types = [cls], [0]
    for number, (segment, share) in enumerate(zip(segments, form["budget"], strict=True)):
        part = segment[: math.floor(room * Fraction(str(share)))]
        ids += [*part, sep]
        types += [int(number > 0)] * (len(part) + 1)
    return ids, types

def score(row):
    prompt, a, b = (encode(row[name]) for name in ("prompt", "response_a", "response_b"))
    if form["layout"] == "single":
        sides = [sequence([prompt, a, b])]
    else:
        sides = [sequence([prompt, a]), sequence([prompt, b])]
    longest = max(len(ids) for ids, _ in sides)
    inputs = []
    for filler, pick in ((pad, 0), (0, 1), (0, None)):
        parts = [side[pick] if pick is not None else [1] * len(side[0]) for side in sides]
        inputs.append(torch.tensor([part + [filler] * (longest - len(part)) for part in parts]))
    ids, types, mask = (part if len(sides) == 1 else part[None] for part in inputs)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, token_type_ids=types).logits
    return logits.softmax(-1)[0].tolist()

csv.field_size_limit(1 << 30)
assert form["truncation"] == "head" and not form["reuse_unused"]
with open(data, encoding="utf-8", newline="") as file:
    print(json.dumps([score(row) for row in csv.DictReader(file)]))
"""


@pytest.fixture(scope="module")
def real_rows(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 rows of the real arena, spread over the file."""
    import gzip

    folder = tmp_path_factory.mktemp("real")
    whole = folder / "whole.csv"
    whole.write_bytes(gzip.decompress((shared_data / "human_preferences.csv.gz").read_bytes()))
    rows = read_csv(whole)
    return write_csv(folder / "rows.csv", rows[:: len(rows) // ROWS][:ROWS])


@pytest.fixture(scope="module")
def distilbert(arena: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The other family and the other layout, exported."""
    folder = tmp_path_factory.mktemp("distilbert")
    flags = (
        *("--config.model.family=distilbert", "--config.input.layout=single"),
        *("--config.train.max_steps=2", f"--config.data.train={arena}/train.csv"),
        # Large steps: a head that is still near zero would hide a wrong encoder.
        *("--config.train.learning_rate=0.03", "--config.train.warmup_steps=0"),
    )
    log = folder / "log"
    finish(start(log, "train", *TINY, f"--workdir={folder}/run", *flags), log)
    outcome = call("export", f"--workdir={folder}/run", f"--output={folder}/exported")
    assert outcome.code == 0, outcome
    return folder / "exported"


@pytest.fixture(scope="module")
def long(arena: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's encoder, trained further on sequences longer than its table of positions."""
    folder = tmp_path_factory.mktemp("long")
    flags = (
        *(f"--config.model.init_from={run}", f"--config.data.train={arena}/train.csv"),
        *("--config.model.extend_positions=700", "--config.input.max_length=640"),
        *("--config.train.max_steps=1", "--config.train.microbatch_size=1"),
    )
    outcome = call("train", *TINY, f"--workdir={folder}/run", *flags)
    assert outcome.code == 0, outcome
    outcome = call("export", f"--workdir={folder}/run", f"--output={folder}/exported")
    assert outcome.code == 0, outcome
    return folder / "exported"


@pytest.mark.parametrize("case", ["bert, parallel", "distilbert, single", "bert, parallel, long"])
def test_plain_transformers_agree(
    request: pytest.FixtureRequest, real_rows: Path, case: str
) -> None:
    if case == "bert, parallel":
        run, folder = request.getfixturevalue("run"), request.getfixturevalue("exported")
    else:
        folder = request.getfixturevalue("long" if "long" in case else "distilbert")
        run = folder.parent / "run"
    form = json.loads((folder / "pref_jax.json").read_text())["input"]
    family = json.loads((folder / "config.json").read_text())["family"]
    assert case.startswith(f"{family}, {form['layout']}")
    outcome = subprocess.run(
        [sys.executable, "-I", "-c", PROGRAM, str(folder), str(real_rows)],
        capture_output=True,
        text=True,
        cwd=folder.parent,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    theirs = np.array(json.loads(outcome.stdout.splitlines()[-1]))
    ours = np.array([row[1:] for row in predict(run, real_rows)], float)
    assert ours.shape == (ROWS, 3)
    assert ours.std(axis=0).min() > 1e-4  # the rows do differ
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    # Tighter than asked for: in float32 both compute the same.
    np.testing.assert_allclose(theirs, ours, atol=2e-6)
