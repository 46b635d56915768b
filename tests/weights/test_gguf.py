"""GGUF files, against the library that defines the format."""

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pref_jax.errors import InputError
from pref_jax.weights.gguf import open_gguf, read_gguf_config
from pref_jax.weights.gguf_header import HeaderError, read_header

gguf = pytest.importorskip("gguf")

HEADS = 2
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


def write(path: Path, quantization: str = "F32") -> dict[str, np.ndarray]:
    """A file with one layer's value projection; returns the tensors as they were quantised."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "é", "<s>"])
    writer.add_token_types([1, 1, 3])
    writer.add_bool("some.truth", True)
    writer.add_array("some.numbers", [0.5, 1.5])
    generator, tensors = np.random.default_rng(0), {}
    kind = gguf.GGMLQuantizationType[quantization]
    for name, shape in (("token_embd.weight", (3, 32)), ("blk.0.attn_v.weight", (32, 64))):
        data = gguf.quantize(generator.normal(size=shape).astype(np.float32), kind)
        tensors[name] = gguf.dequantize(data, kind).reshape(shape)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list):
        return [plain(part) for part in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("quantization", TYPES)
def test_fields_and_tensors_are_the_librarys(tmp_path: Path, quantization: str) -> None:
    path = tmp_path / "some.gguf"
    tensors = write(path, quantization)
    header, theirs = read_header(path), gguf.GGUFReader(path)
    expected = {n: f.contents() for n, f in theirs.fields.items() if not n.startswith("GGUF.")}
    assert {name: plain(value) for name, value in header.fields.items()} == expected
    assert len(expected) > 9 and expected["some.truth"] is True
    with open_gguf(path) as found:
        assert {tensor.key for tensor in found.values()} == set(tensors)
        for tensor in found.values():
            values = tensor.slices[tuple(slice(None) for _ in tensor.shape)]
            np.testing.assert_array_equal(values, tensors[tensor.key])
            np.testing.assert_array_equal(
                tensor.slices[(slice(1, 3), slice(2, 5))], tensors[tensor.key][1:3, 2:5]
            )


@pytest.mark.parametrize("size", range(0, 900, 37))
def test_a_cut_file_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "some.gguf"
    write(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r"no whole GGUF file: it (ends|does not begin)"):
        read_gguf_config(path)


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def test_many_empty_strings_take_little_memory(tmp_path: Path) -> None:
    """The library makes two arrays of each: 1.6 kB for 8 bytes."""
    path, count = tmp_path / "bomb.gguf", 100_000
    array = text(b"x") + struct.pack("<IIQ", 9, 8, count) + bytes(8 * count)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + array)
    tracemalloc.start()
    try:
        assert len(read_header(path).fields["x"]) == count
        assert tracemalloc.get_traced_memory()[1] < 3 * path.stat().st_size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("what", ["field", "tensor"])
def test_what_is_there_twice_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "twice.gguf"
    field = text(b"x") + struct.pack("<IB", 0, 1)
    tensor = text(b"t") + struct.pack("<IQIQ", 1, 1, 0, 0)
    counts, content = ((0, 2), field * 2) if what == "field" else ((2, 0), tensor * 2)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + content)
    with pytest.raises(HeaderError, match="is there twice"):
        read_header(path)


def test_a_type_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "some.gguf"
    write(path)
    content = path.read_bytes()
    at = content.index(b"blk.0.attn_v.weight") + len(b"blk.0.attn_v.weight") + 4 + 16
    for kind, name in ((26, "the type I32"), (99, "the type 99")):
        path.write_bytes(content[:at] + struct.pack("<I", kind) + content[at + 4 :])
        with pytest.raises(InputError, match=name):
            read_gguf_config(path)
