"""A damaged or hostile GGUF file is one line, and no more memory than the file."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pref_jax.errors import InputError
from pref_jax.weights.gguf import open_gguf, read_gguf_config, tokenizer_folder

_LARGE = [struct.pack("<Q", value) for value in (2**64 - 1, 2**40, 2**31, 0)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A model of one layer, of which only the word table and a norm are there."""
    path = tmp_path_factory.mktemp("gguf") / "whole.gguf"
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
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def read(path: Path) -> None:
    read_gguf_config(path)
    with open_gguf(path):
        pass
    tokenizer_folder(path)


def test_the_file_is_whole(whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREF_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "whole.gguf").write_bytes(whole)
    read(tmp_path / "whole.gguf")


@settings(
    max_examples=int(os.environ.get("PREF_JAX_FUZZ", "1500")),
    derandomize="PREF_JAX_FUZZ" not in os.environ,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_damage_is_one_line_and_takes_no_memory(
    whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    monkeypatch.setenv("PREF_JAX_CACHE", str(tmp_path / "cache"))
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        what = data.draw(
            st.one_of(st.binary(min_size=1, max_size=1), st.sampled_from([*_LARGE, b""]))
        )
        damaged[at : at + (len(what) or data.draw(st.integers(1, 40)))] = what
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    tracemalloc.start()
    try:
        read(path)
    except InputError as error:
        assert str(path) in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 20e6
