"""LLaMA models in one `.gguf` file (llama.cpp): architecture, weights and tokenizer.

Tensors appear under today's Hugging Face names and in Hugging Face's order of channels, dequantised
to float32 one at a time.
"""

import hashlib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pref_jax import cache
from pref_jax.errors import InputError
from pref_jax.files import write_json
from pref_jax.weights.files import Tensor
from pref_jax.weights.gguf_header import Header, HeaderError, TensorInfo, read_header

if TYPE_CHECKING:
    import numpy as np

    from pref_jax.models.llama import LlamaConfig

_FETCH = "fetch the file again"
_OTHER = "use a file of another quantisation, or the model's safetensors"
_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_OF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE = "rope_freqs.weight"
_MOST = 1e9  # of any number in an architecture
_WIDEST_HEAD = 1024  # channels
_CONTROL = 3  # llama.cpp's token type of special tokens

# How text is cut into words before pairs are merged, by the name that llama.cpp gives it. These
# expressions are part of the published tokenizers.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRETOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}],
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    ],
    "llama-bpe": [
        {
            "type": "Split",
            "pattern": {"Regex": _LLAMA3_WORDS},
            "behavior": "Isolated",
            "invert": False,
        },
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ],
}
_WHOLE_WORDS = ("llama-bpe",)  # take a word that is in the vocabulary before merging pairs


def _read(path: Path) -> tuple[Header, list["_Stored"]]:
    """The fields and tensors of a whole file.

    Raises:
      InputError: it is no GGUF file, or cut, or a tensor is of a type that cannot be read.
    """
    try:
        header = read_header(path)
    except OSError as error:
        raise InputError(str(path), f"it cannot be read ({error.strerror})", "check it") from None
    except HeaderError as error:
        raise InputError(str(path), f"no whole GGUF file: {error}", _FETCH) from None
    if not header.tensors:
        raise InputError(str(path), "no whole GGUF file: it holds no tensor", _FETCH)
    return header, [_Stored(path, info) for info in header.tensors]


def _field(path: Path, header: Header, name: str, default: Any = None) -> Any:
    value = header.fields.get(name, default)
    if value is None:
        what = "cannot be read" if name in header.fields else "is missing"
        raise InputError(str(path), f"its field {name} {what}", _FETCH)
    try:
        if isinstance(value, list):
            return [part.decode() if isinstance(part, bytes) else part for part in value]
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise InputError(str(path), f"its field {name} is no UTF-8", _FETCH) from error


def _list(
    path: Path, header: Header, name: str, kind: type, default: list[Any] | None = None
) -> list[Any]:
    value = _field(path, header, name, default)
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, list) or not all(isinstance(part, kind) for part in value):
        raise InputError(str(path), f"its field {name} is no list of {kind.__name__}", _FETCH)
    return value


def read_gguf_config(path: Path) -> "LlamaConfig":
    """Architecture of a GGUF file.

    Raises:
      InputError: another architecture, a missing field, or a scaling of positions that the file
        holds only as numbers and that is not LLaMA 3.1's.
    """
    return _make_config(path, *_read(path))


def _make_config(path: Path, header: Header, stored: list["_Stored"]) -> "LlamaConfig":
    import numpy as np

    from pref_jax.models.llama import LlamaConfig
    from pref_jax.models.rope import RopeConfig, inverse_frequencies

    family = _field(path, header, "general.architecture")
    if family != "llama":
        raise InputError(str(path), f"its architecture is {family!r}", "llama can be loaded")

    def number(name: str, default: float | None = None) -> Any:
        value = _field(path, header, f"llama.{name}", default)
        if not isinstance(value, int | float) or not 0 < value < _MOST:
            shown = value if isinstance(value, int | float | str) else "a list"
            raise InputError(str(path), f"its field llama.{name} is {shown!r}", _FETCH)
        return value

    width, heads = (int(number(name)) for name in ("embedding_length", "attention.head_count"))
    if not width or not heads:  # a part of one
        raise InputError(str(path), f"it has {heads} heads in a width of {width}", _FETCH)
    positions = int(number("context_length"))
    head_dim = int(number("rope.dimension_count", width // heads))
    if head_dim % 2 or not 2 <= head_dim <= _WIDEST_HEAD:
        raise InputError(str(path), f"its heads have {head_dim} channels", _FETCH)
    kind = str(_field(path, header, "llama.rope.scaling.type", "none"))
    rope = RopeConfig(theta=float(number("rope.freq_base", 10_000.0)))
    if kind == "linear":
        rope = RopeConfig(rope.theta, "linear", float(number("rope.scaling.factor")), positions)
    elif kind != "none":
        raise InputError(
            str(path), f"its rope scaling is {kind!r}", "use the model's safetensors instead"
        )
    tensors = {tensor.name: tensor for tensor in stored}
    if _ROPE in tensors:
        stretched = RopeConfig(rope.theta, "llama3", 8.0, 8192)
        factors = tensors[_ROPE].read()
        plain = inverse_frequencies(rope, head_dim)
        if factors.shape != plain.shape or not factors.all():
            what = f"tensor {_ROPE} does not hold {len(plain)} factors"
            raise InputError(str(path), what, _FETCH)
        if not np.allclose(plain / factors, inverse_frequencies(stretched, head_dim), rtol=1e-4):
            raise InputError(
                str(path),
                "it stretches positions by numbers that are not LLaMA 3.1's",
                "use the model's safetensors instead",
            )
        rope = stretched
    words = tensors.get("token_embd.weight")
    if words is None or len(words.shape) != 2:
        raise InputError(str(path), "tensor token_embd.weight is missing or no matrix", _FETCH)
    return LlamaConfig(
        family="llama",
        vocab_size=words.shape[0],
        hidden_size=width,
        num_layers=int(number("block_count")),
        num_heads=heads,
        num_kv_heads=int(number("attention.head_count_kv", heads)),
        head_dim=head_dim,
        intermediate_size=int(number("feed_forward_length")),
        max_positions=positions,
        norm_epsilon=float(number("attention.layer_norm_rms_epsilon")),
        rope=rope,
    )


class _Stored:
    """One tensor of a file.

    Attributes:
      name, shape: as in its header.
    """

    def __init__(self, path: Path, info: TensorInfo) -> None:
        """Raises: InputError: it ends behind the file, or is of a type that cannot be read."""
        import gguf

        self.name, self.shape, self._path, self._start = info.name, info.shape, path, info.start
        kinds = {int(kind): kind for kind in gguf.GGMLQuantizationType}
        if info.kind not in kinds:
            what = f"tensor {info.name} is of the type {info.kind}, which is not known here"
            raise InputError(str(path), what, _OTHER)
        self._type = kinds[info.kind]
        block, size = gguf.GGML_QUANT_SIZES[self._type]
        if not info.shape or not math.prod(info.shape):
            raise InputError(str(path), f"tensor {info.name} holds nothing", _FETCH)
        width = info.shape[-1]
        if width % block:
            what = f"tensor {info.name} has rows of {width} elements, not of whole {block}s"
            raise InputError(str(path), what, _FETCH)
        self._stored_shape = (*info.shape[:-1], width // block * size)
        if info.start + math.prod(self._stored_shape) > path.stat().st_size:
            what = f"no whole GGUF file: it ends inside tensor {info.name}"
            raise InputError(str(path), what, _FETCH)
        try:
            self._dequantize(self._bytes().reshape(-1, self._stored_shape[-1])[:1])
        except NotImplementedError:
            raise InputError(
                str(path),
                f"tensor {info.name} is of the type {self._type.name}, which cannot be read",
                _OTHER,
            ) from None

    def _bytes(self) -> "np.ndarray":
        import numpy as np

        return np.memmap(self._path, np.uint8, "r", self._start, self._stored_shape)

    def _dequantize(self, rows: "np.ndarray") -> "np.ndarray":
        import gguf

        return gguf.dequantize(rows, self._type)

    def read(self) -> "np.ndarray":
        """Its values, float32 of its shape."""
        import numpy as np

        return np.asarray(self._dequantize(self._bytes()), np.float32).reshape(self.shape)


class _Slices:
    """Parts of one tensor, dequantised as a whole for the moment of reading."""

    def __init__(self, tensor: _Stored, heads: int | None) -> None:
        self._tensor, self._heads = tensor, heads

    def __getitem__(self, index: tuple[slice, ...]) -> "np.ndarray":
        import numpy as np

        values = self._tensor.read()
        if self._heads is not None:
            # llama.cpp turns neighbouring channels, transformers channels half a head apart, so
            # the rows of queries and keys are stored in another order.
            rows, columns = values.shape
            pairs = values.reshape(self._heads, rows // self._heads // 2, 2, columns)
            values = pairs.swapaxes(1, 2).reshape(rows, columns)
        return np.array(values[index])


@contextmanager
def open_gguf(path: Path) -> Iterator[dict[str, Tensor]]:
    """All tensors of a GGUF file, by today's Hugging Face keys.

    Raises:
      InputError: the file is damaged, or holds a tensor that no LLaMA has.
    """
    header, stored = _read(path)
    config = _make_config(path, header, stored)
    found: dict[str, Tensor] = {}
    for tensor in stored:
        if tensor.name == _ROPE:
            continue  # read with the configuration
        key = _WHOLE.get(tensor.name) or _key_of_layer(path, tensor.name)
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
        permuted = next((n for name, n in heads.items() if f".{name}." in key), None)
        shape = tensor.shape
        if permuted and (len(shape) != 2 or not shape[0] or shape[0] % (2 * permuted)):
            what = f"tensor {tensor.name} of shape {shape} does not hold {permuted} heads"
            raise InputError(str(path), what, _FETCH)
        found[key] = Tensor(tensor.name, path, shape, "F32", _Slices(tensor, permuted))
    yield found


def _key_of_layer(path: Path, name: str) -> str:
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in _OF_LAYER:
        raise InputError(
            str(path), f"tensor {name} is no part of a llama", "use the model's safetensors instead"
        )
    return f"model.layers.{match[1]}.{_OF_LAYER[match[2]]}.weight"


def tokenizer_folder(path: Path) -> Path:
    """A folder, in the cache, with the file's tokenizer in Hugging Face's form.

    Raises:
      InputError: it is no byte-pair tokenizer, or one whose way of cutting words is not known.
    """
    header, _ = _read(path)
    kind = _field(path, header, "tokenizer.ggml.model")
    if kind != "gpt2":
        raise InputError(
            str(path),
            f"its tokenizer is of the kind {kind!r}, not byte pairs",
            "use a Hugging Face folder of the model, with tokenizer.json",
        )
    cutting = str(_field(path, header, "tokenizer.ggml.pre", "?"))
    if cutting not in _PRETOKENIZERS:
        raise InputError(
            str(path),
            "it does not say how its tokenizer cuts words"
            if cutting == "?"
            else f"its tokenizer cuts words by {cutting!r}, which is not known here",
            f"use the model's Hugging Face folder; known: {', '.join(_PRETOKENIZERS)}",
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    tokens = _list(path, header, "tokenizer.ggml.tokens", str)
    types = _list(path, header, "tokenizer.ggml.token_type", int, [1] * len(tokens))
    merges = _list(path, header, "tokenizer.ggml.merges", str)
    if len(types) != len(tokens):
        raise InputError(
            str(path), f"it has {len(tokens)} tokens and types of {len(types)}", _FETCH
        )

    ends = {}
    for name in ("bos", "eos"):
        if (field := f"tokenizer.ggml.{name}_token_id") in header.fields:
            number = _field(path, header, field)
            if not isinstance(number, int) or not 0 <= number < len(tokens):
                raise InputError(str(path), f"its field {field} is {number!r}", _FETCH)
            ends[f"{name}_token"] = tokens[number]

    def make(folder: Path) -> None:
        folder.mkdir()
        special = [number for number, kind in enumerate(types) if int(kind) == _CONTROL]
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        pretokenizers = [dict(part) for part in _PRETOKENIZERS[cutting]]
        for part in pretokenizers:
            if part["type"] == "ByteLevel":  # the library's form has all fields
                part["trim_offsets"] = True
        content = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": number, "content": tokens[number], **plain, "special": True}
                for number in special
            ],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": pretokenizers},
            "post_processor": None,
            "decoder": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": cutting in _WHOLE_WORDS,
                "vocab": {token: number for number, token in enumerate(tokens)},
                "merges": [merge.split(" ", 1) for merge in merges],
            },
        }
        write_json(folder / "tokenizer.json", content)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **ends}
        write_json(folder / "tokenizer_config.json", settings)

    return cache.entry("vocabularies", f"gguf-1-{digest}", make)
