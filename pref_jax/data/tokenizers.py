"""WordPiece tokenizers of the BERT family: two implementations, one vocabulary, equal ids.

The ids agree with those of `transformers.AutoTokenizer` with ``add_special_tokens=False`` and
``split_special_tokens=True``: user text never becomes a special token, however it is spelled.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pref_jax import cache
from pref_jax.errors import InputError
from pref_jax.files import read_json
from pref_jax.quiet import native_libraries_silenced

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

IMPLEMENTATIONS = ("auto", "tensorflow_text", "tokenizers")
_FILES = "tokenizer.json or vocab.txt"
# What a tokenizer may consist of, to be copied with it.
TOKENIZER_FILES = (
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


class Tokenizer(Protocol):
    """Turns text into ids.

    Attributes:
      vocab_size: largest id + 1: the least number of rows of a word embedding table.
      cls_id, sep_id, pad_id: an encoder's special tokens; `encode` never adds or makes them.
      bos_id: a decoder's begin-of-text, the same; None where it has none.
      digest: hash of the vocabulary and the normalisation, the same for every implementation.
    """

    vocab_size: int
    cls_id: int
    sep_id: int
    pad_id: int
    bos_id: int | None
    digest: str

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids (int32, one array per text) of texts without lone surrogates, nothing cut."""
        ...

    def decode(self, ids: np.ndarray) -> str:
        """Text to look at: pieces joined to words, words by spaces."""
        ...


@dataclass(frozen=True)
class WordPiece:
    """What a tokenizer folder says, apart from how it is computed."""

    vocab: dict[str, int]
    unknown: str
    special_ids: dict[str, int]  # "cls", "sep", "pad"
    lowercase: bool
    strip_accents: bool | None  # None: as lowercase
    split_chinese: bool
    clean_text: bool
    prefix: str = "##"
    max_word_characters: int = 100

    @property
    def digest(self) -> str:
        fields = {**self.__dict__, "strip_accents": self.strips_accents}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    @property
    def strips_accents(self) -> bool:
        return self.lowercase if self.strip_accents is None else self.strip_accents


def load_tokenizer(folder: Path, implementation: str = "auto") -> Tokenizer:
    """The tokenizer of a Hugging Face folder: BERT's WordPiece, or a decoder's byte pairs.

    Args:
      folder: holds `tokenizer.json` or `vocab.txt`, and `tokenizer_config.json` where needed.
      implementation: "tensorflow_text" (WordPiece only), "tokenizers" or "auto".

    Raises:
      InputError: files are missing, damaged, or describe another kind of tokenizer.
    """
    if implementation not in IMPLEMENTATIONS:
        raise InputError(
            "tokenizer",
            f"no implementation is called {implementation!r}",
            f"use one of {', '.join(IMPLEMENTATIONS)}",
        )
    from pref_jax.data.decoder_tokenizers import DecoderTokenizer, is_decoder_folder

    if is_decoder_folder(Path(folder)):
        if implementation == "tensorflow_text":
            raise InputError(
                "--config.input.tokenizer",
                "tensorflow_text is for WordPiece, and this is a decoder's tokenizer",
                "leave it at auto",
            )
        return DecoderTokenizer(Path(folder))
    wordpiece = read_wordpiece(Path(folder))
    if implementation == "tensorflow_text":
        return TensorFlowTextTokenizer(wordpiece)
    # Measured on 8,634 real rows, two cores: TF-Text reads and tokenises 4,400 rows/s after 8 s of
    # importing TensorFlow, in 1.1 GB; `tokenizers` 1,500 to 2,000 rows/s after 0.3 s, in 250 MB.
    # The ids are the same, so "auto" takes what is sooner ready up to some 20,000 rows and needs
    # no TensorFlow; a file is tokenised once, then cached.
    return HuggingFaceTokenizer(wordpiece)


def read_wordpiece(folder: Path) -> WordPiece:
    """Reads and checks the tokenizer files of a folder; see `load_tokenizer`."""
    if not folder.is_dir():
        raise InputError(str(folder), "no such folder", f"give a folder with {_FILES}")
    settings = _read_json(folder / "tokenizer_config.json")
    settings = {**_read_json(folder / "special_tokens_map.json"), **settings}
    path = folder / "tokenizer.json"
    if path.is_file():
        vocab, found = _from_tokenizer_json(path)
    elif (path := folder / "vocab.txt").is_file():
        vocab, found = _from_vocab_txt(path), {}
    else:
        raise InputError(str(folder), f"neither {_FILES} is there", "give a tokenizer's folder")

    special_ids = {}
    for name in ("cls", "sep", "pad", "unk"):
        token = settings.get(f"{name}_token") or f"[{name.upper()}]"
        token = str(token["content"] if isinstance(token, dict) and "content" in token else token)
        if token not in vocab:
            raise InputError(
                str(path),
                f"the vocabulary lacks {token}",
                "use the files of a tokenizer of the BERT family",
            )
        special_ids[name] = vocab[token]
        if name == "unk":
            unknown = token
    del special_ids["unk"]
    # As in transformers, the settings win over what `tokenizer.json` says.
    strip_accents = settings.get("strip_accents", found.get("strip_accents"))
    return WordPiece(
        vocab=vocab,
        unknown=unknown,
        special_ids=special_ids,
        lowercase=bool(settings.get("do_lower_case", found.get("lowercase", True))),
        strip_accents=None if strip_accents is None else bool(strip_accents),
        split_chinese=bool(
            settings.get("tokenize_chinese_chars", found.get("handle_chinese_chars", True))
        ),
        clean_text=bool(found.get("clean_text", True)),
        prefix=found.get("prefix", "##"),
        max_word_characters=found.get("max_word_characters", 100),
    )


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, "fetch the file anew") if path.is_file() else {}


def _from_tokenizer_json(path: Path) -> tuple[dict[str, int], dict[str, Any]]:
    content = _read_json(path)
    model, normalizer, splitter = (
        part if isinstance(part, dict) else {}
        for part in (content.get(name) for name in ("model", "normalizer", "pre_tokenizer"))
    )
    expected = (
        ("WordPiece", model),
        ("BertNormalizer", normalizer),
        ("BertPreTokenizer", splitter),
    )
    for kind, part in expected:
        if part.get("type") != kind:
            raise InputError(
                str(path),
                f"{part.get('type')!r} stands where BERT's tokenizer has {kind!r}",
                "use the tokenizer files of a model of the BERT family",
            )
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab or not _are_ids(list(vocab.values())):
        raise InputError(str(path), "its vocabulary is damaged", "fetch the file anew")
    for token in content.get("added_tokens") or []:
        if token.get("content") in vocab or token.get("special"):
            vocab.setdefault(token["content"], token["id"])
        else:
            raise InputError(
                str(path),
                f"the added token {token.get('content')!r} is outside the WordPiece vocabulary",
                "use a tokenizer without added words",
            )
    return vocab, {
        **normalizer,
        "prefix": model.get("continuing_subword_prefix", "##"),
        "max_word_characters": model.get("max_input_chars_per_word", 100),
    }


def _from_vocab_txt(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(str(path), "this is not UTF-8 text", "fetch the file anew") from error
    if lines[-1] == "":
        lines.pop()
    return {token: index for index, token in enumerate(lines)}


def _are_ids(values: list[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 2**31 for value in values) and len(
        set(values)
    ) == len(values)


class _Base:
    bos_id: int | None = None

    def __init__(self, wordpiece: WordPiece) -> None:
        self.vocab_size = max(wordpiece.vocab.values()) + 1
        self.cls_id = wordpiece.special_ids["cls"]
        self.sep_id = wordpiece.special_ids["sep"]
        self.pad_id = wordpiece.special_ids["pad"]
        self.digest = wordpiece.digest
        self._pieces = {index: piece for piece, index in wordpiece.vocab.items()}
        self._prefix = wordpiece.prefix

    def decode(self, ids: np.ndarray) -> str:
        pieces = [self._pieces.get(int(index), "?") for index in ids]
        return " ".join(pieces).replace(f" {self._prefix}", "")


class HuggingFaceTokenizer(_Base):
    """Hugging Face's `tokenizers`: Rust, all cores, ready in a tenth of a second."""

    def __init__(self, wordpiece: WordPiece) -> None:
        super().__init__(wordpiece)
        self._backend = _build_backend(wordpiece)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]


def _build_backend(wordpiece: WordPiece) -> "Backend":
    """A fresh `tokenizers.Tokenizer` knows no special tokens, so none can be typed."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    backend = Tokenizer(
        models.WordPiece(
            wordpiece.vocab,
            unk_token=wordpiece.unknown,
            max_input_chars_per_word=wordpiece.max_word_characters,
            continuing_subword_prefix=wordpiece.prefix,
        )
    )
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=wordpiece.clean_text,
        handle_chinese_chars=wordpiece.split_chinese,
        strip_accents=wordpiece.strip_accents,
        lowercase=wordpiece.lowercase,
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend


class TensorFlowTextTokenizer(_Base):
    """TF-Text's linear-time WordPiece.

    TF-Text's own normaliser differs from the one BERT's Hugging Face models are used with: it
    turns control characters into spaces where the other drops them, and follows newer Unicode
    tables. So text is normalised and cut into words here, character by character, and TF-Text
    does the WordPiece.
    """

    def __init__(self, wordpiece: WordPiece) -> None:
        super().__init__(wordpiece)
        try:
            self._tensorflow, tensorflow_text = _import_tensorflow_text()
        except ImportError as error:
            raise InputError(
                "tokenizer",
                f"tensorflow_text cannot be imported ({error})",
                "pip install tensorflow-text, or use the implementation 'tokenizers'",
            ) from error
        words = [f"[gap{index}]" for index in range(self.vocab_size)]  # cannot be typed: brackets
        for word, index in wordpiece.vocab.items():
            words[index] = word
        self._limit = wordpiece.max_word_characters
        options = {
            "vocab": words,
            "suffix_indicator": wordpiece.prefix,
            "token_out_type": self._tensorflow.int32,
            "unknown_token": wordpiece.unknown,
        }
        self._of_ascii = tensorflow_text.FastWordpieceTokenizer(
            **options, max_bytes_per_word=self._limit
        )
        # A character has up to four bytes, and the limit counts characters.
        self._of_words = tensorflow_text.FastWordpieceTokenizer(
            **options, max_bytes_per_word=4 * self._limit, no_pretokenization=True
        )
        self._overlong = "x" * (4 * self._limit + 1)
        self._characters = _Characters(wordpiece)
        # Plain English needs only characters changed or dropped, which is the fast path of
        # `str.translate`. Its punctuation is the same in every table, so TF-Text may split there.
        characters = {code: self._characters[code] for code in range(128)}
        self._ascii = {
            code: text.strip(" ") or text[:1] or None for code, text in characters.items()
        }

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        plain = [index for index, text in enumerate(texts) if text.isascii()]
        other = [index for index, text in enumerate(texts) if not text.isascii()]
        ids: list[np.ndarray] = [np.zeros(0, np.int32)] * len(texts)
        if plain:
            found = self._of_ascii.tokenize([texts[i].translate(self._ascii) for i in plain])
            _scatter(ids, plain, found)
        if other:
            words = self._tensorflow.strings.split([self._words(texts[i]) for i in other], " ")
            _scatter(ids, other, self._of_words.tokenize(words).merge_dims(1, 2))
        return ids

    def _words(self, text: str) -> str:
        """The words of a text, normalised, with one space between each two."""
        limit = self._limit
        words = self._characters.normalize(text).split(" ")
        return " ".join(word if len(word) <= limit else self._overlong for word in words if word)


def _import_tensorflow_text() -> tuple[Any, Any]:
    """Imports TensorFlow such that it leaves the accelerators and the terminal alone."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with native_libraries_silenced():
        import tensorflow
        import tensorflow_text

        tensorflow.config.set_visible_devices([], "GPU")
    return tensorflow, tensorflow_text


def _scatter(ids: list[np.ndarray], places: list[int], ragged: Any) -> None:
    values, splits = ragged.values.numpy(), ragged.row_splits.numpy()
    for place, start, stop in zip(places, splits[:-1], splits[1:], strict=True):
        ids[place] = values[start:stop]


class _Characters(dict[int, str]):
    """What becomes of each character: itself, another, nothing, or a word of its own.

    A table for `str.translate` that grows with the characters met. Each is looked up in the
    reference, which follows the Unicode tables of 2015 in some places, newer ones in others.
    """

    def __init__(self, wordpiece: WordPiece) -> None:
        super().__init__()
        backend = _build_backend(wordpiece)
        self._normalizer, self._splitter = backend.normalizer, backend.pre_tokenizer
        self._movable: set[str] = set()
        self._strips_accents = wordpiece.strips_accents

    def __missing__(self, code: int) -> str:
        normal = self._normalizer.normalize_str(chr(code))
        self[code] = "".join(map(self._separate, normal))
        if self._strips_accents and normal.strip() and self._moves(chr(code), normal):
            self._movable.add(chr(code))
        return self[code]

    def _separate(self, character: str) -> str:
        words = [word for word, _ in self._splitter.pre_tokenize_str(f"a{character}a")]
        if len(words) == 1:
            return character
        return f" {character} " if len(words) == 3 else " "

    def _moves(self, character: str, normal: str) -> bool:
        """Whether canonical ordering, part of stripping accents, may move what is left of it.

        Two marks that stay (classes 224 and 216) tell: one of any class but zero passes one.
        """
        normalize = self._normalizer.normalize_str
        return (
            normalize("\u302e" + character) != "\u302e" + normal
            or normalize(character + "\U0001d165") != normal + "\U0001d165"
        )

    def normalize(self, text: str) -> str:
        """The text's words with spaces between them."""
        normal = text.translate(self)
        if self._movable and not self._movable.isdisjoint(text):
            words = self._splitter.pre_tokenize_str(self._normalizer.normalize_str(text))
            return " ".join(word for word, _ in words)
        return normal


def train_wordpiece(
    texts: Callable[[], Iterable[str]], digest: str, vocab_size: int = 8000
) -> Path:
    """Trains an uncased WordPiece vocabulary, for models without pretrained weights.

    Args:
      texts: gives the training texts; called twice if they have to be read, so that they need not
        be held.
      digest: hash of the texts, under which the vocabulary is cached.
      vocab_size: number of pieces at most.

    Returns:
      A folder that `load_tokenizer` and `transformers.AutoTokenizer` read. The same texts give
      the same ids in every process.
    """
    key = hashlib.sha256(json.dumps([1, digest, vocab_size]).encode()).hexdigest()
    return cache.entry("vocabularies", key, lambda path: _train(path, texts, vocab_size))


_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def _train(folder: Path, texts: Callable[[], Iterable[str]], vocab_size: int) -> None:
    from tokenizers import trainers

    empty = WordPiece(
        vocab={token: index for index, token in enumerate(_SPECIAL)},
        unknown="[UNK]",
        special_ids={},
        lowercase=True,
        strip_accents=None,
        split_chinese=True,
        clean_text=True,
    )
    backend = _build_backend(empty)
    counts: Counter[str] = Counter()
    for text in texts():
        counts.update(text)
    letters: Counter[str] = Counter()
    for character, count in counts.items():
        for letter in backend.normalizer.normalize_str(character).strip():
            letters[letter] += count
    # The trainer numbers letters in the order of a hash map, which is another one in every
    # process, and breaks ties between pairs by those numbers. Named beforehand they are fixed.
    # At most an eighth of the vocabulary, for half as many letters with and without prefix.
    common = sorted(letters, key=lambda letter: (-letters[letter], letter))[: vocab_size // 8]
    alphabet = sorted(common)
    names = [*_SPECIAL, *alphabet, *(f"##{letter}" for letter in alphabet)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=max(vocab_size, len(names)),
        special_tokens=names,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    backend.train_from_iterator(texts(), trainer)
    vocab = json.loads(backend.to_str())["model"]["vocab"]
    folder.mkdir()
    words = sorted(vocab, key=lambda word: vocab[word])
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    settings = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": True,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
        "model_max_length": 512,
        **{f"{token[1:-1].lower()}_token": token for token in _SPECIAL},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    final = _build_backend(
        WordPiece(**{**empty.__dict__, "vocab": {word: i for i, word in enumerate(words)}})
    )
    final.add_special_tokens(list(_SPECIAL))
    final.save(str(folder / "tokenizer.json"))
