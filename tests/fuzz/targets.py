"""What reads files, settings and answers that somebody else made: a function of bytes each.

A target returns, or raises `InputError` or `RunError` in one line; whatever else it raises is a
defect, and so are 10 seconds of processor time or 2 GB for an input of a few kilobytes.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rig import make_rows, write_csv

from pref_jax.annotation.answer import BadAnswerError, parse
from pref_jax.annotation.client import RefusedError, TransientError, _read_response
from pref_jax.annotation.prompt import Prompt, Question
from pref_jax.annotation.properties import DEFAULT_FILE, load_properties
from pref_jax.annotation.ratings import read_ratings
from pref_jax.annotation.store import Store, refuse_paid_ratings
from pref_jax.config import (
    BUDGETS,
    check,
    default_config,
    encoder_config,
    llama_config,
    parse_arguments,
    rating_config,
    resolve,
)
from pref_jax.config_file import override, take_overrides
from pref_jax.data.arena import normalise_prompt, parse_turns, read_comparisons
from pref_jax.data.segments import TRUNCATIONS, cut, kept_lengths
from pref_jax.errors import InputError, RunError
from pref_jax.evaluation import baselines, predictions
from pref_jax.evaluation.baselines import Baselines, Logit
from pref_jax.evaluation.predictions import Predictions
from pref_jax.evaluation.runs import read_runs
from pref_jax.evaluation.submission import read_submission
from pref_jax.experiment import _read_temperature, make_layout, read_config
from pref_jax.training.checkpoints import _Damage, _read_manifest
from pref_jax.weights.files import open_tensors
from pref_jax.weights.gguf import open_gguf, read_gguf_config, tokenizer_folder
from pref_jax.weights.huggingface import read_architecture

# What parsers trip over: signs, quotes, brackets, lone halves of characters, huge numbers.
WORDS = (
    *(b"\x00", b'"', b'""', b"\\", b"[", b"]", b"{", b"}", b",", b"\n", b"\r", b"\xff", b"0"),
    *(b"null", b"true", b"-1", b"1e999", b"NaN", b"-Infinity", b"[[", b'\\ud800"', b"\xef\xbb\xbf"),
    *(
        b"9" * 30,
        b"1e19",
        b"0x10",
        b"(0.1,0.9)",
        b"\xff" * 8,
        b"\x00" * 8,
        b"\xd9\xa3",
        b"\xc2\xb2",
    ),
)
_NESTED = (b"[" * 3000, b'{"a":' * 3000, b"9" * 5000)
CORPUS = Path(__file__).resolve().parent / "corpus"
MOST_SECONDS = 10.0  # of processor time
MOST_BYTES = 2 * 10**9


class Target(NamedTuple):
    """Something that is fuzzed.

    Attributes:
      read: takes a folder of its own, empty but for its cache, and the input.
      seeds: inputs that are read without an error, from which others are made.
    """

    read: Callable[[Path, bytes], object]
    seeds: Callable[[], list[bytes]]


def beginnings(name: str) -> list[bytes]:
    """Inputs to start from: what is read, what is known to be hard, and what once failed."""
    folder = CORPUS / name
    failed = [path.read_bytes() for path in sorted(folder.iterdir())] if folder.is_dir() else []
    return [*TARGETS[name].seeds(), b"", *_NESTED, *failed]


def run(name: str, content: bytes) -> str | None:
    """Gives an input to a target; returns the line with which it was refused, None if it was read.

    Raises:
      AssertionError: it took too long or too much memory, or its error is not one line.
    """
    with tempfile.TemporaryDirectory(dir=_MEMORY) as folder:
        former = os.environ.get("PREF_JAX_CACHE")
        os.environ["PREF_JAX_CACHE"] = f"{folder}/.cache"
        started, before = time.process_time(), _peak_bytes()
        line: str | None = None
        try:
            TARGETS[name].read(Path(folder), content)
        except (InputError, RunError) as error:
            line = str(error)
        finally:
            shutil.rmtree(f"{folder}/.cache", ignore_errors=True)
            if former is None:
                del os.environ["PREF_JAX_CACHE"]
            else:
                os.environ["PREF_JAX_CACHE"] = former
        seconds, taken = time.process_time() - started, _peak_bytes() - before
    assert seconds < MOST_SECONDS, f"{seconds:.0f} s"
    assert taken < MOST_BYTES, f"{taken / 1e9:.1f} GB"
    if line is not None:
        assert "\n" not in line and ": " in line and "; " in line, line
    return line


_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # no disk is worn by millions


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


# Comparisons


def _comparisons(name: str) -> Callable[[Path, bytes], object]:
    def read(folder: Path, content: bytes) -> None:
        path = _written(folder, name, content)
        labelled = (None, True, False)[len(content) % 3]
        rows = read_comparisons(path, labelled=labelled)
        assert len(rows) == len(rows.ids) == len(set(rows.ids)) > 0
        if labelled:
            assert set(rows.labels.tolist()) <= {0, 1, 2}

    return read


def _csv_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        rows = make_rows(r2={"tie_allowed": "0", "source": "x"}, r5={"tie_allowed": 1})
        plain = write_csv(path, rows[:3], labels=True).read_bytes()
        more = write_csv(
            path, rows, labels=True, more=["tie_allowed", "source"], encoding="utf-16"
        ).read_bytes()
        unlabelled = write_csv(path, rows[:2], eol="\r\n", encoding="utf-8-sig").read_bytes()
    return [plain, more, unlabelled]


def _parquet_seeds() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    seeds = []
    for lists in (False, True):
        rows: list[dict[str, Any]] = [
            {name: str(cell) for name, cell in row.items()} for row in make_rows()[:3]
        ]
        if lists:
            for row in rows:
                row |= {name: json.loads(row[name]) for name in ("prompt", "response_a")}
        sink = io.BytesIO()
        parquet.write_table(
            pa.Table.from_pylist(rows), sink, compression="snappy" if lists else "none"
        )
        seeds.append(sink.getvalue())
    return seeds


def _turns(folder: Path, content: bytes) -> None:
    try:
        turns = parse_turns(content.decode("utf-8", "surrogateescape"))
    except ValueError as error:  # as it says
        assert "\n" not in str(error) and type(error) is ValueError
        return
    assert turns and all(isinstance(turn, str) for turn in turns)
    "\n\n".join(turns).encode()  # has a UTF-8 form
    normalise_prompt(turns)


# Settings


def _budget(folder: Path, content: bytes) -> None:
    """Lines: layout, length, shares, truncation, re-use, lengths of texts; the rest a template."""
    parts = content.decode("utf-8", "replace").split("\n", 6)
    layout, length, shares, truncation, reuse, lengths, template = parts + [""] * (7 - len(parts))
    config = default_config()
    fields = {"layout": layout, "max_length": length, "truncation": truncation}
    fields |= {"reuse_unused": reuse, "template": template, "budget": shares}
    for name, text in fields.items():
        if text:
            override(config, f"input.{name}", text)
    resolve(config)
    check(config)
    form = make_layout(config)
    numbers = [int(word) for word in lengths.split(",")[:3] if word.isdecimal() and len(word) < 9]
    columns = len(form.budget)
    table = np.array([*numbers, 0, 0, 0][:columns])[None]
    kept = kept_lengths(table, form)
    assert (kept <= table).all() and (kept >= 0).all() and kept.sum() <= form.room
    for given, some in zip(table[0], kept[0], strict=True):
        ids = np.arange(min(given, 10_000))
        seen = cut(ids, int(some), form.truncation, ends=numbers)
        assert len(seen) == min(len(ids), some) == len(set(seen.tolist()))


def _budget_seeds() -> list[bytes]:
    template = default_config().input.template or "{prompt}{response_a}{response_b}."
    return [
        "\n".join(
            [name, "256", str(BUDGETS[name]), truncation, "true", "90,200,1000", template]
        ).encode()
        for name, truncation in zip(BUDGETS, TRUNCATIONS * 2, strict=False)
    ]


_PRESETS: tuple[Callable[[], Any], ...] = (
    lambda: encoder_config(None, layout="single"),
    lambda: encoder_config("minilm,annotated", layout="parallel"),
    lambda: rating_config("distilbert"),
    lambda: llama_config("tiny", quantization="nf4"),
)


def _config(folder: Path, content: bytes) -> None:
    """A line per argument of a command; the first chooses the preset, or names its arguments."""
    first, *lines = content.decode("utf-8", "surrogateescape").split("\n")
    if first.isdecimal() and len(first) < 3:
        config = _PRESETS[int(first) % len(_PRESETS)]()
    else:
        config = llama_config(first, quantization="none")
        parse_arguments(first, model=("tiny", "smollm2"), kind=("x",))
    _, overrides = take_overrides(["launch/train.py", *lines])
    for name, value in overrides:
        override(config, name, value)
    resolve(config)
    check(config)
    make_layout(config)


def _config_seeds() -> list[bytes]:
    lines = [
        "--config.input.max_length=64",
        *("--config.train.epochs=0.5", "--noconfig.input.reuse_unused", "--config.seed", "3"),
        *("--config.train.max_steps=none", "--config.model.lora.targets=q_proj,v_proj"),
        *("--config.mesh.data=-1", "--config.data.swap=none", "--config.train.precision=auto"),
    ]
    seeds = [[str(number), *lines] for number in range(4)]
    seeds.append(["tiny", "--config.input.budget=(0.2,0.4,0.4)", "--config.data.swap=both"])
    return ["\n".join(seed).encode() for seed in seeds]


def _run_config_seeds() -> list[bytes]:
    return [_json(default_config().to_dict()), _json(_PRESETS[3]().to_dict())]


def _architecture_seeds() -> list[bytes]:
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    llama = {"model_type": "llama", "num_key_value_heads": 1, "intermediate_size": 8, **sizes}
    llama |= {"max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
    bert = {"model_type": "bert", "intermediate_size": 8, "max_position_embeddings": 64, **sizes}
    bert |= {"type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
    distilbert = {"model_type": "distilbert", "vocab_size": 9, "dim": 8, "n_heads": 2}
    distilbert |= {"n_layers": 2, "hidden_dim": 8, "max_position_embeddings": 64}
    linear = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    return [_json(c) for c in (llama | linear, llama | {"rope_scaling": rope}, bert, distilbert)]


# Weights


def _safetensors(folder: Path, content: bytes) -> None:
    _written(folder, "model.safetensors", content)
    with open_tensors(folder) as tensors:
        for tensor in tensors.values():
            if tensor.dtype in ("F32", "F16", "BF16", "F64"):
                values = tensor.slices[tuple(slice(None) for _ in tensor.shape)]
                assert values.size == int(np.prod(tensor.shape, dtype=object))


def _safetensors_seeds() -> list[bytes]:
    from safetensors.numpy import save

    some = {"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}
    return [save(some), save({"c": np.ones((), np.float64)}, metadata={"format": "pt"})]


def _gguf(folder: Path, content: bytes) -> None:
    path = _written(folder, "model.gguf", content)
    read_gguf_config(path)
    with open_gguf(path) as tensors:
        for tensor in tensors.values():
            tensor.slices[tuple(slice(None) for _ in tensor.shape)]
    tokenizer_folder(path)


def _gguf_seeds() -> list[bytes]:
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "whole.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(64)
        writer.add_embedding_length(8)
        writer.add_block_count(1)
        writer.add_feed_forward_length(16)
        writer.add_head_count(2)
        writer.add_head_count_kv(1)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(["a", "b", "<s>", "ab"])
        writer.add_token_types([1, 1, 3, 1])
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(2)
        writer.add_eos_token_id(2)
        writer.add_tensor("token_embd.weight", np.zeros((4, 8), np.float32))
        writer.add_tensor("output_norm.weight", np.zeros(8, np.float32))
        writer.add_tensor("blk.0.attn_q.weight", np.zeros((8, 8), np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return [path.read_bytes()]


# The judge


_PROPERTIES = load_properties()
_PROMPTS = (
    Prompt(_PROPERTIES),
    Prompt(_PROPERTIES, inline=False),
    Prompt(_PROPERTIES, both=True),
)


def _answer(folder: Path, content: bytes) -> None:
    text = content.decode("utf-8", "surrogatepass" if content.isascii() else "replace")
    for prompt in _PROMPTS:
        try:
            rated = parse(text, prompt)
        except BadAnswerError as error:
            assert len(str(error)) < 200
            continue
        assert len(rated) == prompt.sides
        for one in rated:
            assert set(one.ratings) == set(prompt.properties.rating_names)
            assert all(0 <= n < len(prompt.properties.scale) for n in one.ratings.values())
            assert set(one.query.values()) <= {0, 1}


def _answer_seeds() -> list[bytes]:
    from annotation.judge import all_twos

    question = Question("Why?", ("Because.",))
    both = Question("Why?", ("Because.", "So."))
    answers = [
        json.dumps(all_twos({"messages": prompt.messages(both if prompt.both else question)}))
        for prompt in _PROMPTS
    ]
    name = _PROPERTIES.rating_names[0]
    thought = f"<reasoning>\n{name}: a draft\n</reasoning>\n```json\n{answers[1]}\n```"
    return [text.encode() for text in (*answers, thought)]


def _reply(folder: Path, content: bytes) -> None:
    """Its first line is the status, the second the header that says when to ask again."""
    status, after, body = (*content.split(b"\n", 2), b"", b"")[:3]
    code = int(status) if status.isdigit() and len(status) == 3 else 200
    headers = {"Retry-After": after.decode("latin-1")}
    try:
        _read_response(code, headers, body)
    except (RefusedError, TransientError) as error:
        assert len(str(error)) < 2000


# Files that are read back


def _annotations(folder: Path, content: bytes) -> None:
    path = _written(folder, "A.jsonl", content)
    with contextlib.suppress(InputError):
        refuse_paid_ratings(path)
    wanted = {("1", "a"): frozenset(["k"]), ("1", "b"): frozenset(["k2"])}
    with Store(path, wanted) as store:
        for place in wanted:
            store.rated(place)
            store.failed(place)
        store.find(["k"])
    read_ratings(path, _PROPERTIES)


def _annotation_seeds() -> list[bytes]:
    name = _PROPERTIES.rating_names[0]
    entry = {"id": "1", "side": "a", "key": "k", "ratings": {name: 2}, "query": {}, "cost": 0.1}
    entry |= {"tokens": {"prompt": 3}, "attempts": 1, "model": "m"}
    lines = [entry, entry | {"side": "b"}, entry | {"id": 2, "ratings": {name: None}}]
    torn = _json(entry)[:30]
    return [b"\n".join(map(_json, lines)) + b"\n" + torn, _json(entry)]


def _predictions(folder: Path, content: bytes) -> None:
    rows = Predictions.read(_written(folder, predictions.FILE, content))
    rows.evaluate()
    rows.measure_row_losses()


def _prediction_seeds() -> list[bytes]:
    rows = Predictions(
        ids=["1", "2", "x,y"],
        probabilities=np.array([[0.2, 0.3, 0.5], [0.5, 0.5, 0.0], [0.9, 0.05, 0.05]]),
        labels=np.array([0, 1, 2]),
        tie_allowed=np.array([True, False, True]),
        words=np.array([[3, 5, 9], [1, 1, 1], [0, 400, 2]]),
        turns=np.array([1, 2, 1]),
        sources=[None, "s", "t"],
    )
    with tempfile.TemporaryDirectory() as folder:
        rows.write(Path(folder) / "p.csv")
        return [(Path(folder) / "p.csv").read_bytes()]


def _run_file(name: str) -> Callable[[Path, bytes], object]:
    """Reads a run's folder in which one file is the input."""

    def read(folder: Path, content: bytes) -> None:
        run = folder / "run"
        run.mkdir()
        _written(run, "config.json", _json(default_config().to_dict()))
        _written(run, "metrics.jsonl", _CURVES)
        _written(run, name, content)
        if name == "calibration.json":
            assert _read_temperature(run) > 0
            return
        (one,) = read_runs([run])
        _ = one.finished, one.last_step, one.log_loss, one.baseline_losses

    return read


_CURVES = b"".join(
    _json({"step": step, "split": split, "loss": 1.0}) + b"\n"
    for step in (1, 2)
    for split in ("train", "valid")
)


def _baseline_seeds() -> list[bytes]:
    logit = Logit([0.0] * 5, [1.0] * 5, [0.1] * 5, 0.2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / baselines.FILE
        Baselines(rows=9, prior=(0.3, 0.4, 0.3), tie=logit, first=logit).save(path)
        return [path.read_bytes()]


def _baselines(folder: Path, content: bytes) -> None:
    path = _written(folder, baselines.FILE, content)
    words = np.array([[3, 5, 9], [0, 0, 0]])
    for values in Baselines.load(path).predict_all(words).values():
        assert values.shape == (2, 3) and np.isfinite(values).all()


def _manifest(folder: Path, content: bytes) -> None:
    """A manifest whose hash is right says what the file says, so it is not asked for here."""
    _written(folder, "manifest.json", content)
    try:
        _read_manifest(folder)
    except _Damage as error:
        assert "\n" not in str(error)


_RESULT = {"steps": 2, "valid": {"log_loss": 1.0}, "baselines": {"uniform": 1.1, "prior": 1.0}}
TARGETS = {
    "answer": Target(_answer, _answer_seeds),
    "annotations": Target(_annotations, _annotation_seeds),
    "architecture": Target(
        lambda folder, content: read_architecture(_written(folder, "config.json", content).parent),
        _architecture_seeds,
    ),
    "baselines": Target(_baselines, _baseline_seeds),
    "budget": Target(_budget, _budget_seeds),
    "calibration": Target(_run_file("calibration.json"), lambda: [b'{"temperature": 1.25}']),
    "config": Target(_config, _config_seeds),
    "csv": Target(_comparisons("rows.csv"), _csv_seeds),
    "csv_gz": Target(
        _comparisons("rows.csv.gz"), lambda: [gzip.compress(s, mtime=0) for s in _csv_seeds()]
    ),
    "gguf": Target(_gguf, _gguf_seeds),
    "manifest": Target(_manifest, lambda: [b'{"step": 1, "sha256": ""}']),
    "metrics": Target(_run_file("metrics.jsonl"), lambda: [_CURVES]),
    "parquet": Target(_comparisons("rows.parquet"), _parquet_seeds),
    "predictions": Target(_predictions, _prediction_seeds),
    "properties": Target(
        lambda folder, content: load_properties(_written(folder, "p.toml", content)),
        lambda: [DEFAULT_FILE.read_bytes()],
    ),
    "reply": Target(
        _reply,
        lambda: [
            b'200\n\n{"choices":[{"message":{"content":"x"},"finish_reason":"stop"}],'
            b'"usage":{"prompt_tokens":1,"completion_tokens":2}}',
            b'429\n3\n{"error":{"message":"m","code":"insufficient_quota"}}',
        ],
    ),
    "result": Target(_run_file("result.json"), lambda: [_json(_RESULT)]),
    "run_config": Target(
        lambda folder, content: check(read_config(_written(folder, "config.json", content).parent)),
        _run_config_seeds,
    ),
    "safetensors": Target(_safetensors, _safetensors_seeds),
    "submission": Target(
        lambda folder, content: read_submission(_written(folder, "s.csv", content)),
        lambda: [b"id,winner_model_a,winner_model_b,winner_tie\n1,0.2,0.3,0.5\n2,1,0,0\n"],
    ),
    "turns": Target(
        _turns, lambda: [b'["one", null, "\\ud83d\\ude00 \\ud800"]', b"null", b'["\xc3\xa9"]']
    ),
}
