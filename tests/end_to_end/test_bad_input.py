"""Wrong inputs, one row each: one line that says where and what to do, exit code 2, no harm done.

The scripts run inside this process, each as a user would type it, in a folder that holds good and
broken files; the last test starts a few in processes of their own.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pref_jax import command

TRAIN = "train --config=quickstart.py --workdir=new"
TINY = (
    "--config.model.pretrained=none --config.model.config.num_layers=1"
    " --config.model.config.hidden_size=8 --config.model.config.num_heads=2"
    " --config.model.config.intermediate_size=8 --config.input.max_length=32"
)
GOOD = f"{TRAIN} --config.data.train=good.csv {TINY}"
NOWHERE = "/proc/pref_jax"  # a folder in which nobody can make anything
PREDICT = "predict --workdir=run --output=out.csv --data="
EVALUATE = "evaluate --workdir=run --output=out.json --data="

# (command line, what the line on standard error has to hold)
TABLE = [
    # Flags.
    ("train", "--config: it is missing"),
    ("train --config=absent.py", "absent.py"),
    ("train --config=run", "run"),
    ("train --config=syntax.py", "syntax.py:2"),
    ("train --config=quickstart.py:fast", "unknown argument 'fast'"),
    ("train --config=single_bert.py:roberta", "known: bert-base, distilbert, minilm"),
    ("train --config=single_bert.py:minilm,annotated --config.data.train=good.csv", "no run in"),
    ("train --config=multitask_bert.py:annotated", "unknown argument 'annotated'"),
    ("train --config=multitask_bert.py --config.data.train=good.csv", "no ratings are named"),
    (f"{GOOD} --config.data.annotations=a.jsonl", "learns preferences"),
    (f"{GOOD} --config.data.properties=a.toml", "learns preferences"),
    ("train --config=multitask_bert.py --config.data.swap=both", "reads one"),
    ("train --config=multitask_bert.py --config.eval.calibrate=true", "calibrate"),
    (f"{GOOD} --workdirs=x", "--workdirs: unknown flag; did you mean --workdir?"),
    (f"{GOOD} good.csv", "unexpected argument 'good.csv'"),
    (f"{GOOD} --debug=perhaps", "--debug"),
    ("evaluate --data=good.csv", "--workdir"),
    ("evaluate --workdir=run", "--data"),
    ("predict --workdir=run --data=test.csv", "--output"),
    ("predict --workdir=run --output=out.csv", "--data"),
    ("describe", "--data"),
    ("report", "RUN"),
    ("export --workdir=run", "--output"),
    ("benchmark", "--config"),
    ("benchmark --config=quickstart.py --mode=fast", "--mode: unknown value 'fast'"),
    ("benchmark --config=quickstart.py --steps=few", "--steps: 'few'"),
    ("benchmark --config=quickstart.py --steps=0", "--steps"),
    ("simulate --rows=-1 --output=new", "--rows"),
    ("simulate --rows=many --output=new", "--rows: 'many'"),
    ("simulate --rows=10 --test_rows=-1 --output=new", "--test_rows"),
    ("simulate --rows=10 --output=good.csv", "good.csv"),
    # Fields.
    (f"{GOOD} --config.train.lerning_rate=1", "did you mean learning_rate?"),
    (f"{GOOD} --config.model.adapter.rank=4", "unknown field 'adapter'"),
    (f"{GOOD} --config.model.lora.rank=4", "adapters are for decoders"),
    (f"{GOOD} --config.train=3", "--config.train: it is a section"),
    (f"{GOOD} --config.train.batch_size=0.5", "'0.5' is not a whole number"),
    (f"{GOOD} --config.train.batch_size=0", "--config.train.batch_size: 0"),
    (f"{GOOD} --config.train.microbatch_size=0", "--config.train.microbatch_size"),
    (f"{GOOD} --config.train.epochs=-1", "--config.train.epochs"),
    (f"{GOOD} --config.train.learning_rate=nan", "--config.train.learning_rate"),
    (f"{GOOD} --config.train.precision=fp8", "known: auto, float32, bfloat16, float16"),
    (f"{GOOD} --config.train.remat=everything", "known: none, dots, full"),
    (f"{GOOD} --config.input.budget=(0.1,0.45,0.45)", "3 shares, but layout parallel has 2"),
    (f"{GOOD} --config.input.budget=(0.9,0.9)", "add up to 1.8"),
    (f"{GOOD} --config.input.budget=half", "--config.input.budget"),
    (f"{GOOD} --config.input.max_length=3", "--config.input.max_length"),
    (f"{GOOD} --config.input.max_length=1000", "--config.input.max_length"),
    (f"{GOOD} --config.input.layout=double", "known: single, parallel, response"),
    (f"{GOOD} --config.input.tokenizer=spacy", "--config.input.tokenizer"),
    (f"{GOOD} --config.data.fold=9", "--config.data.fold"),
    (f"{GOOD} --config.data.valid_fraction=1.5", "--config.data.valid_fraction"),
    (f"{GOOD} --config.mesh.data=3", "--config.mesh"),
    (f"{GOOD} --config.mesh.data=-1 --config.mesh.fsdp=-1", "both -1"),
    (f"{GOOD} --config.mesh.tensor=64", "--config.mesh"),
    (f"{GOOD} --config.model.frozen_layers=7", "--config.model.frozen_layers"),
    (f"{GOOD} --config.model.config.num_heads=3", "--config.model.config.num_heads"),
    (f"{GOOD} --config.model.family=roberta", "known: bert, distilbert"),
    (f"{GOOD} --config.model.init_from=absent", "absent"),
    # Where it writes.
    (f"{GOOD} --workdir=good.csv", "good.csv"),
    (f"{GOOD} --workdir=good.csv/run", "good.csv"),
    (f"{GOOD} --workdir=run --config.seed=77", "seed"),
    ("predict --workdir=run --data=test.csv --output=run", "run"),
    ("predict --workdir=run --data=test.csv --output=absent/out.csv", "absent"),
    (f"{GOOD} --config.model.config.vocab_size=8", "--config.model.config.vocab_size: 8 is less"),
    ("benchmark --config=quickstart.py --config.data.train=good.csv --output=good.csv", "itself"),
    ("evaluate --workdir=run --data=good.csv --output=run", "run"),
    ("export --workdir=run --output=good.csv", "good.csv"),
    ("export --workdir=run --output=run", "run"),
    ("report run --output=good.csv", "good.csv"),
    # Data.
    (f"{TRAIN} {TINY} --config.data.train=absent.csv", "absent.csv"),
    (f"{TRAIN} {TINY} --config.data.train=test.csv", "winner_model_a"),
    (f"{TRAIN} {TINY} --config.data.train=header.csv", "header.csv"),
    (f"{TRAIN} {TINY} --config.data.train=good.csv --config.data.valid=absent.csv", "absent.csv"),
    (f"{TRAIN} {TINY} --config.data.train=one.csv", "one.csv"),
    *(
        (f"{start}{file}", expected)
        for file, expected in [
            ("no_prompt.csv", "prompt"),
            ("no_id.csv", "id"),
            ("broken_json.csv", "broken_json.csv:3"),
            ("not_a_list.csv", "not_a_list.csv:2"),
            ("literals.csv", "literals.csv:4"),
            ("empty.csv", "empty.csv"),
            ("binary.csv", "binary.csv"),
            ("folder.csv", "folder.csv"),
            ("cut.csv.gz", "cut.csv.gz"),
            ("plain.csv.gz", "plain.csv.gz"),
            ("wrong.parquet", "wrong.parquet"),
            ("notes.txt", "notes.txt"),
            ("repeated_id.csv", "repeated_id.csv:5"),
            ("empty_id.csv", "empty_id.csv:1"),
            ("open_quote.csv", "open_quote.csv"),
            ("long_row.csv", "long_row.csv:2"),
        ]
        for start in (PREDICT, f"{TRAIN} {TINY} --config.data.train=", "describe --data=")
    ),
    *(
        (f"{EVALUATE}{file}", expected)
        for file, expected in [
            ("test.csv", "winner_model_a"),
            ("two_winners.csv", "two_winners.csv:2"),
            ("no_winner.csv", "no_winner.csv:2"),
            ("word_label.csv", "word_label.csv:2"),
            ("impossible_tie.csv", "impossible_tie.csv:4"),
            ("wrong_tie_allowed.csv", "wrong_tie_allowed.csv:1"),
        ]
    ),
    # Runs.
    ("predict --workdir=absent --data=test.csv --output=out.csv", "absent"),
    ("predict --workdir=folder.csv --data=test.csv --output=out.csv", "folder.csv"),
    ("predict --workdir=unfinished --data=test.csv --output=out.csv", "unfinished"),
    ("evaluate --workdir=broken_run --data=good.csv --output=out.json", "broken_run"),
    ("export --workdir=absent --output=new", "absent"),
    ("export --workdir=folder.csv --output=new", "folder.csv"),
    ("report absent --output=new", "absent"),
    ("report folder.csv --output=new", "folder.csv"),
    ("report run run --output=new", "run"),
    ("report broken_run --output=new", "broken_run"),
    # Weights.
    *(
        (f"{GOOD} --config.model.pretrained={source}", expected)
        for source, expected in [
            ("./absent", "absent"),
            ("no-such-owner/no-such-model", "no-such-owner/no-such-model"),
            ("package:no_such_package/model", "no_such_package"),
            ("package:pref_jax/absent", "absent"),
            ("roberta", "roberta"),
            ("half", "half"),
            ("no_weights", "no_weights"),
            ("pickled", "safetensors"),
            ("no_vocabulary", "no_vocabulary"),
            ("broken_config", "config.json"),
            ("missing_tensor", "missing"),
            ("extra_tensor", "encoder.layer.7"),
            ("wrong_shape", "shape"),
            ("small_table", "small_table"),
            ("not_finite", "not finite"),
        ]
    ),
    (f"{GOOD} --config.model.pretrained=bert --config.model.family=distilbert", "distilbert"),
    (f"{GOOD} --config.model.pretrained=bert --config.model.frozen_layers=5", "frozen_layers"),
    (f"{GOOD} --config.model.pretrained=bert --config.input.max_length=65", "max_length"),
    (f"{GOOD} --config.model.pretrained=bert --config.model.extend_positions=63", "is less than"),
    (f"{GOOD} --config.model.extend_positions=900", "no pretrained table to repeat"),
    # Places that cannot be written are found before the work.
    (f"predict --workdir=run --data=good.csv --output={NOWHERE}.csv", "cannot be written"),
    (f"export --workdir=run --output={NOWHERE}", "it cannot be written there"),
    ("export --workdir=run --output=gs://b/x", "written to a bucket"),
    ("predict --workdir=run --data=good.csv --output=o.csv --base=run", "leave it out"),
]


def _shorten(line: str) -> str:
    return line.replace(GOOD, "GOOD").replace(TRAIN, "TRAIN").replace(TINY, "TINY")


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) == len({line for line, _ in TABLE}) >= 60


@pytest.mark.parametrize(("line", "expected"), TABLE, ids=[_shorten(line) for line, _ in TABLE])
def test_wrong_input_is_one_line_and_harms_nothing(
    line: str, expected: str, world: Path, monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    name, *arguments = line.split()
    script = repository / "launch" / f"{name}.py"
    if not script.exists():
        pytest.skip(f"there is no {script.name} yet")
    if any(a in ("run", "--workdir=run") for a in arguments) and not (world / "run").exists():
        pytest.skip("needs a trained run")
    monkeypatch.chdir(world)
    before = _snapshot(world)
    outcome = command.call(script, arguments)
    assert outcome.stderr.startswith("error: ") and outcome.stderr.count("\n") == 1, outcome
    assert outcome.code == 2, outcome
    where, _, rest = outcome.stderr.removeprefix("error: ").partition(": ")
    assert where and ";" in rest, "WHERE: what is wrong; what to do"
    assert expected in outcome.stderr
    assert _snapshot(world) == before


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("simulate --rows=-1 --output=new", "--rows"),
        ("report absent --output=new", "absent"),
        ("train --config=syntax.py", "syntax.py:2"),
        (f"{TRAIN} {TINY} --config.data.train=broken_json.csv", "broken_json.csv:3"),
    ],
)
def test_the_same_in_a_process_of_its_own(line: str, expected: str, world, run_command) -> None:
    name, *arguments = line.split()
    if not (_repository() / f"launch/{name}.py").exists():
        pytest.skip(f"there is no {name}.py yet")
    before = _snapshot(world)
    done = run_command(f"launch/{name}.py", *arguments, cwd=world)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert expected in done.stderr
    assert _snapshot(world) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_a_place_without_permission(world: Path, monkeypatch, repository: Path) -> None:
    monkeypatch.chdir(world)
    locked = world / "locked"
    locked.mkdir(mode=0o500)
    try:
        for line in (f"{GOOD} --workdir=locked/run", "simulate --rows=10 --output=locked/arena"):
            name, *arguments = line.split()
            outcome = command.call(repository / f"launch/{name}.py", arguments)
            assert outcome.code == 2 and "locked" in outcome.stderr
            assert outcome.stderr.count("\n") == 1
    finally:
        locked.rmdir()


def _repository() -> Path:
    return Path(__file__).resolve().parents[2]


def _snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Every path below a folder with the time and hash of its content, but for locks."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.name != ".lock"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path.relative_to(folder))] = (path.stat().st_mtime_ns, digest)
    return found


TEXTS = ["id", "prompt", "response_a", "response_b"]
LABELS = ["winner_model_a", "winner_model_b", "winner_tie"]


def _rows(**changes: dict[str, object]) -> list[dict[str, object]]:
    """Twelve good rows; ``row3={"id": "x"}`` changes cells of the third."""
    rows: list[dict[str, object]] = []
    for i in range(12):
        winner = [int(i % 3 == j) for j in range(3)]
        texts = (f"Question {i}?", f"Answer {i}.", f"No idea, {'really ' * i}.")
        cells = [100 + i, *(json.dumps([text]) for text in texts), *winner]
        rows.append(dict(zip(TEXTS + LABELS, cells, strict=True)))
    for name, cells in changes.items():
        rows[int(name.removeprefix("row")) - 1] |= cells
    return rows


def _csv(rows: list[dict[str, object]], columns: list[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@pytest.fixture
def world(made_world: Path, tmp_path: Path) -> Path:
    """A fresh copy for each row, so that one that does harm does not disturb the next."""
    return Path(shutil.copytree(made_world, tmp_path / "world"))


@pytest.fixture(scope="module")
def made_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with good and broken data files, runs, weights and configs."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREF_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        _write_data(folder)
        _write_weights(folder)
        for name in ("quickstart.py", "single_bert.py", "multitask_bert.py"):
            shutil.copy(_repository() / "configs" / name, folder / name)
        (folder / "syntax.py").write_text("def get_config(arguments):\n    return (\n")
        _write_runs(folder)
        yield folder


def _write_data(folder: Path) -> None:
    every = TEXTS + LABELS
    files: dict[str, str] = {
        "good.csv": _csv(_rows(), every),
        "test.csv": _csv(_rows(), TEXTS),
        "one.csv": _csv(_rows()[:1], every),
        "header.csv": _csv([], every),
        "no_prompt.csv": _csv(_rows(), [c for c in every if c != "prompt"]),
        "no_id.csv": _csv(_rows(), every[1:]),
        "broken_json.csv": _csv(_rows(row3={"response_a": '["cut'}), every),
        "not_a_list.csv": _csv(_rows(row2={"response_b": '{"a": 1}'}), every),
        "literals.csv": _csv(_rows(row4={"prompt": "['single', None]"}), every),
        "empty.csv": "",
        "plain.csv.gz": "this is no gzip file",
        "wrong.parquet": "this is no parquet file",
        "notes.txt": "some notes",
        "repeated_id.csv": _csv(_rows(row5={"id": 100}), every),
        "empty_id.csv": _csv(_rows(row1={"id": ""}), every),
        "open_quote.csv": _csv(_rows(), every) + '999,"[""never closed""]',
        "two_winners.csv": _csv(_rows(row2={"winner_model_a": 1}), every),
        "no_winner.csv": _csv(_rows(row2={"winner_model_b": 0}), every),
        "word_label.csv": _csv(_rows(row2={"winner_model_a": "yes"}), every),
        "impossible_tie.csv": _csv(
            _rows(row4={"winner_model_a": 0, "winner_tie": 1, "tie_allowed": 0}),
            [*every, "tie_allowed"],
        ),
        "wrong_tie_allowed.csv": _csv(_rows(row1={"tie_allowed": 7}), [*every, "tie_allowed"]),
    }
    lines = files["good.csv"].splitlines()
    files["long_row.csv"] = "\n".join([*lines[:2], lines[2] + ",1,2", *lines[3:], ""])
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "binary.csv").write_bytes(bytes(range(256)) * 4)
    (folder / "cut.csv.gz").write_bytes(gzip.compress(files["good.csv"].encode())[:-40])
    (folder / "folder.csv").mkdir()


def _write_runs(folder: Path) -> None:
    for name, text in (("unfinished", "{}"), ("broken_run", '{"seed": ')):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(text)
    train = _repository() / "launch" / "train.py"
    if not train.exists():
        return
    line = (
        f"--config={folder}/quickstart.py --workdir={folder}/run"
        f" --config.data.train={folder}/good.csv --config.data.valid={folder}/good.csv {TINY}"
        " --config.train.max_steps=1 --config.logging.tensorboard=false"
    )
    outcome = command.call(train, line.split())
    assert outcome.code == 0, outcome


VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##a", "##b", ".", "?"]


def _write_weights(folder: Path) -> None:
    """A BERT of one layer and 8 units, whole as ``bert`` and broken in every other folder."""
    from safetensors.numpy import save_file

    config: dict[str, object] = {
        "model_type": "bert",
        "vocab_size": len(VOCABULARY),
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
    }
    tensors = _bert_tensors()

    def write(name: str, *, weights: dict[str, np.ndarray] | None = tensors, **fields: object):
        place = folder / name
        place.mkdir()
        (place / "config.json").write_text(json.dumps(config | fields))
        (place / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
        if weights is not None:
            save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
        return place

    write("bert")
    write("roberta", model_type="roberta")
    half = write("half") / "model.safetensors"
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    write("no_weights", weights=None)
    (write("pickled", weights=None) / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    (write("no_vocabulary") / "vocab.txt").unlink()
    (write("broken_config") / "config.json").write_text('{"model_type": ')
    gone = "encoder.layer.0.attention.self.query.weight"
    write("missing_tensor", weights={k: v for k, v in tensors.items() if k != gone})
    write("extra_tensor", weights=tensors | {"encoder.layer.7.output.dense.bias": np.zeros(8)})
    write("wrong_shape", weights=tensors | {gone: np.zeros((8, 4), np.float32)})
    write("not_finite", weights=tensors | {gone: np.full((8, 8), np.nan, np.float32)})
    table = "embeddings.word_embeddings.weight"
    write("small_table", weights=tensors | {table: tensors[table][:6]}, vocab_size=6)


def _bert_tensors() -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (len(VOCABULARY), 8),
        "embeddings.position_embeddings.weight": (64, 8),
        "embeddings.token_type_embeddings.weight": (2, 8),
    }
    for name in ("embeddings", *(f"encoder.layer.0.{p}output" for p in ("attention.", ""))):
        shapes |= {f"{name}.LayerNorm.{part}": (8,) for part in ("weight", "bias")}
    for name in ("self.query", "self.key", "self.value", "output.dense"):
        shapes |= {f"encoder.layer.0.attention.{name}.weight": (8, 8)}
        shapes |= {f"encoder.layer.0.attention.{name}.bias": (8,)}
    for name in ("intermediate.dense", "output.dense"):
        shapes |= {f"encoder.layer.0.{name}.weight": (8, 8), f"encoder.layer.0.{name}.bias": (8,)}
    random = np.random.default_rng(0)
    return {k: random.normal(0, 0.02, s).astype(np.float32) for k, s in shapes.items()}
