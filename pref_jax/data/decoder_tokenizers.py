"""Tokenizers of decoders: a Hugging Face `tokenizer.json`, without a way to type special tokens.

The ids agree with those of `transformers.AutoTokenizer` with ``add_special_tokens=False`` and
``split_special_tokens=True``.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pref_jax import cache
from pref_jax.errors import InputError
from pref_jax.files import read_json, write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_BEGIN, _END = "<|begin|>", "<|end|>"


def is_decoder_folder(folder: Path) -> bool:
    """Whether a folder's tokenizer is a decoder's: byte pairs, or no WordPiece at all."""
    path = folder / "tokenizer.json"
    if path.is_file():
        model = read_json(path, "fetch the file anew").get("model")
        return isinstance(model, dict) and model.get("type") == "BPE"
    return not (folder / "vocab.txt").is_file() and (folder / "tokenizer.model").is_file()


class DecoderTokenizer:
    """Hugging Face's `tokenizers` with a byte-pair vocabulary; see `tokenizers.Tokenizer`."""

    def __init__(self, folder: Path) -> None:
        """Raises: InputError: files are missing, damaged, or of another kind of tokenizer."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            self._refuse_folder(folder)
        content = read_json(path, "fetch the file anew")
        model = content.get("model")
        if not isinstance(model, dict) or model.get("type") != "BPE":
            kind = model.get("type") if isinstance(model, dict) else None
            raise InputError(
                str(path),
                f"{kind!r} stands where a decoder's tokenizer has 'BPE'",
                "use the tokenizer files of a LLaMA model",
            )
        vocab, added = model.get("vocab"), content.get("added_tokens") or []
        if not isinstance(vocab, dict) or not vocab or not isinstance(added, list):
            raise InputError(str(path), "its vocabulary is damaged", "fetch the file anew")
        ids = {token["content"]: token["id"] for token in added} | vocab
        special = {token["content"]: token["id"] for token in added if token.get("special")}
        self.vocab_size = max(ids.values()) + 1
        self.bos_id = _find_begin(folder, ids)
        # Not used: padding has a segment of its own, and a decoder's segments no separators.
        self.cls_id = self.sep_id = self.pad_id = 0
        self._special = frozenset(special.values())
        # Without added tokens nothing is looked for in the text before it is cut into words; and
        # nothing is added to it without a post-processor.
        plain = {**content, "added_tokens": [], "post_processor": None}
        plain["truncation"] = plain["padding"] = None
        plain["model"] = {**model, "vocab": _without_special(model, special)}
        self._backend = _build(path, plain)
        self._decoder = _build(path, {**content, "post_processor": None})
        identity = [plain, self.bos_id, self.vocab_size]
        self.digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @staticmethod
    def _refuse_folder(folder: Path) -> None:
        if (folder / "tokenizer.model").is_file():
            raise InputError(
                str(folder),
                "it holds a sentencepiece tokenizer.model and no tokenizer.json",
                "load it with transformers' AutoTokenizer and save_pretrained it into the folder",
            )
        raise InputError(
            str(folder), "tokenizer.json is missing", "name a folder with a LLaMA model's tokenizer"
        )

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: np.ndarray) -> str:
        return self._decoder.decode([int(number) for number in ids], skip_special_tokens=False)


def _build(path: Path, content: dict[str, Any]) -> "Backend":
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises nothing more special
        remedy = "fetch the file anew"
        raise InputError(str(path), f"it cannot be used ({error})", remedy) from error


def _without_special(model: dict[str, Any], special: dict[str, int]) -> dict[str, int]:
    """The vocabulary, special tokens left out where whole words are looked up in it.

    Elsewhere they can stay: a token is made by merges, and none makes them.
    """
    vocab = model["vocab"]
    if not model.get("ignore_merges"):
        return vocab
    return {token: number for token, number in vocab.items() if token not in special}


def _find_begin(folder: Path, ids: dict[str, int]) -> int | None:
    """Begin-of-text: the settings' ``bos_token``, else the model config's ``bos_token_id``."""
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        token = read_json(settings, "fetch the file anew").get("bos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            if token not in ids:
                raise InputError(
                    str(settings),
                    f"its bos_token {token!r} is not in the vocabulary",
                    "use tokenizer files that belong together",
                )
            return ids[token]
    config = folder / "config.json"
    if config.is_file():
        number = read_json(config, "fetch the file anew").get("bos_token_id")
        if isinstance(number, int) and number in ids.values():
            return number
    return None


def write_byte_tokenizer() -> Path:
    """A folder, in the cache, with a tokenizer whose tokens are the 256 bytes and two marks."""

    def make(folder: Path) -> None:
        folder.mkdir()
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {character: number for number, character in enumerate(alphabet)}
        backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(mark, special=True) for mark in (_BEGIN, _END)])
        backend.save(str(folder / "tokenizer.json"))
        settings = {"bos_token": _BEGIN, "eos_token": _END, "pad_token": _END}
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_json(folder / "tokenizer_config.json", settings)

    return cache.entry("vocabularies", "bytes-1", make)
