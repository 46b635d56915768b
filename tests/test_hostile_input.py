"""Whatever stands in a file or on a command line is read, or refused in one line.

PREF_JAX_FUZZ=20000 tries so many inputs for each kind instead of a few hundred.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rig import make_rows, write_csv
from safetensors.numpy import save

from pref_jax.annotation.properties import DEFAULT_FILE, load_properties
from pref_jax.annotation.ratings import read_ratings
from pref_jax.config import check, default_config, encoder_config, llama_config, rating_config
from pref_jax.config_file import _field_types, override
from pref_jax.data.arena import read_comparisons
from pref_jax.errors import InputError, RunError
from pref_jax.experiment import read_config
from pref_jax.weights.files import open_tensors
from pref_jax.weights.huggingface import read_architecture

fuzz = settings(
    max_examples=int(os.environ.get("PREF_JAX_FUZZ", "300")),
    derandomize="PREF_JAX_FUZZ" not in os.environ,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# What parsers trip over: signs, quotes, brackets, lone halves of characters, huge numbers.
WORDS = st.sampled_from(
    [
        *(b"", b"\x00", b'"', b'""', b"\\", b"[", b"]", b"{", b"}", b",", b"\n", b"\r", b"\xff"),
        *(b"null", b"true", b"-1", b"1e999", b"NaN", b"[[", b'\\ud800"', b"\xef\xbb\xbf", b"0"),
        *(b"9" * 30, b"[" * 3000, b'{"a":' * 3000, b"\xff" * 8, b"\x00" * 8),
    ]
)


@st.composite
def damage(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with up to four parts of it replaced."""
    damaged = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(damaged) - 1)))
        length = draw(st.integers(0, 20))
        damaged[at : at + length] = draw(st.one_of(WORDS, st.binary(max_size=6)))
    return bytes(damaged)


def refuse_or_read(path: Path, content: bytes, read: Callable[[Path], object]) -> None:
    path.write_bytes(content)
    try:
        read(path)
    except (InputError, RunError) as error:
        assert "\n" not in str(error) and str(error).count("; ") >= 1


@pytest.fixture(autouse=True)
def cache_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREF_JAX_CACHE", str(tmp_path / "cache"))


def csv_bytes(folder: Path) -> bytes:
    return write_csv(folder / "whole.csv", make_rows(), labels=True).read_bytes()


@fuzz
@given(data=st.data())
def test_comparisons(tmp_path: Path, data: st.DataObject) -> None:
    content = data.draw(damage(csv_bytes(tmp_path)))
    labelled = data.draw(st.sampled_from([True, False, None]))
    refuse_or_read(
        tmp_path / "rows.csv", content, lambda path: read_comparisons(path, labelled=labelled)
    )


@fuzz
@given(data=st.data())
def test_parquet(tmp_path: Path, data: st.DataObject) -> None:
    whole = tmp_path / "whole.parquet"
    if not whole.exists():
        rows = [{name: str(cell) for name, cell in row.items()} for row in make_rows()]
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), whole)
    content = data.draw(damage(whole.read_bytes()))
    refuse_or_read(tmp_path / "rows.parquet", content, read_comparisons)


@fuzz
@given(data=st.data())
def test_ratings(tmp_path: Path, data: st.DataObject) -> None:
    lines = [{"id": str(n), "side": "a", "ratings": {"polite": n % 4}} for n in range(4)]
    content = data.draw(damage("\n".join(map(json.dumps, lines)).encode()))
    refuse_or_read(
        tmp_path / "A.jsonl", content, lambda path: read_ratings(path, load_properties())
    )


@fuzz
@given(data=st.data())
def test_properties(tmp_path: Path, data: st.DataObject) -> None:
    refuse_or_read(
        tmp_path / "p.toml", data.draw(damage(DEFAULT_FILE.read_bytes())), load_properties
    )


@fuzz
@given(data=st.data())
def test_safetensors(tmp_path: Path, data: st.DataObject) -> None:
    def read(path: Path) -> None:
        with open_tensors(path.parent) as tensors:
            for tensor in tensors.values():
                if tensor.dtype in ("F32", "F16", "BF16", "F64"):
                    tensor.slices[tuple(slice(None) for _ in tensor.shape)]

    whole = save({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)})
    refuse_or_read(tmp_path / "model.safetensors", data.draw(damage(whole)), read)


MODEL = {
    "model_type": "llama",
    "vocab_size": 9,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
}
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**30),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@fuzz
@given(data=st.data())
def test_model_configs(tmp_path: Path, data: st.DataObject) -> None:
    content: dict[str, Any] = dict(MODEL)
    content["model_type"] = data.draw(st.sampled_from(["llama", "bert", "distilbert", "x"]))
    for name in data.draw(st.lists(st.sampled_from(sorted(content)), min_size=1, max_size=3)):
        content[name] = data.draw(VALUES)
    refuse_or_read(
        tmp_path / "config.json",
        json.dumps(content).encode(),
        lambda path: read_architecture(path.parent),
    )


@fuzz
@given(data=st.data())
def test_configs_of_runs(tmp_path: Path, data: st.DataObject) -> None:
    whole = json.dumps(default_config().to_dict()).encode()
    refuse_or_read(
        tmp_path / "config.json",
        data.draw(damage(whole)),
        lambda path: check(read_config(path.parent)),
    )


@fuzz
@given(data=st.data())
def test_fields_on_the_command_line(data: st.DataObject) -> None:
    config = data.draw(
        st.sampled_from(
            [
                lambda: encoder_config(None, layout="single"),
                lambda: encoder_config("minilm,annotated", layout="parallel"),
                lambda: rating_config("distilbert"),
                lambda: llama_config("tiny", quantization="nf4"),
            ]
        )
    )()
    texts = st.one_of(
        st.text(max_size=12),
        st.integers().map(str),
        st.floats().map(str),
        st.sampled_from(["none", "true", "(0.1,0.9)", "((((", "1e400", "0x10", "[1]*99", "１", ""]),
    )
    try:
        for name in data.draw(
            st.lists(
                st.sampled_from(sorted(_field_types(default_config()))), min_size=1, max_size=3
            )
        ):
            override(config, name, data.draw(texts))
        check(config)
    except InputError as error:
        assert "\n" not in str(error) and str(error).startswith("--config")
