import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pref_jax import cache
from pref_jax.data.arena import read_comparisons
from pref_jax.data.tokenizers import load_tokenizer, train_wordpiece
from pref_jax.errors import InputError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abdehlmpst[]?!", "##a", "##sk", "##ep"]
# Characters on which normalisers differ: controls, marks of several classes and ages, private
# use, scripts, CJK with its extensions and compatibility forms, emoji of several ages.
STRANGE = (
    "aZ 'é\u0301\u0323\u302e\U0001d165\U0001e4ec\u0898\u1ab0\u0f71\u0f72\u034f\ufffd\0\x1c\x1f\x7f"
    "\x85\xa0\u200b\u200d\u2028\t\n\r\u3000\ue000\U000f0000אܐ؀\u06dd۝İΣςßẞ[]#가ﷺ゛\u3099がｶﾞΩ\u212b"
    "中\ufa0e豈𠀀\U0002b820\U0002b740😀🫠👩\u200d🚀\u202eabc\u202c्नी\u166d\U000111c9\u2e5d\u061d"
)
LONG = [
    part
    for letter in ("a", "é", "中", "𐐀", "\u0301")
    for count in (99, 100, 101, 102, 399, 400, 401, 402)
    for part in (letter * count, f"b {letter * count} c")
]


@pytest.fixture(scope="module")
def oracle(minilm_folder):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder)

    def encode(texts):
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return tokenizer(texts, **options)["input_ids"]

    return encode


@pytest.fixture(scope="module", params=["tokenizers", "tensorflow_text"])
def tokenizer(request, minilm_folder):
    if request.param == "tensorflow_text":
        pytest.importorskip("tensorflow_text")
    return load_tokenizer(minilm_folder, request.param)


def assert_same(texts, found, expected):
    different = [
        text for text, a, b in zip(texts, found, expected, strict=True) if a.tolist() != list(b)
    ]
    assert not different, ascii(different[:3])


def test_ids_of_all_real_rows_are_the_references(shared_data, minilm_folder, oracle):
    pytest.importorskip("tensorflow_text")
    both = [load_tokenizer(minilm_folder, name) for name in ("tokenizers", "tensorflow_text")]
    table = read_comparisons(shared_data / "human_preferences.csv.gz").table
    assert len(table) == 8634
    for batch in table.select(["prompt", "response_a", "response_b"]).to_batches(1024):
        texts = [text for column in batch.columns for text in column.to_pylist()]
        expected = oracle(texts)
        for tokenizer in both:
            assert_same(texts, tokenizer.encode(texts), expected)


def test_ids_of_strange_and_long_words_are_the_references(tokenizer, oracle):
    texts = [*STRANGE, *(f"a{c}b {c}c{c}" for c in STRANGE), STRANGE, *LONG, "", " ", "a" * 100_000]
    assert_same(texts, tokenizer.encode(texts), oracle(texts))


def test_ids_of_every_character_are_the_references(tokenizer, oracle):
    """Not one by one: a few hundred to a text, which takes seconds."""
    points = [point for point in range(0x30000) if not 0xD800 <= point < 0xE000]
    points += [*range(0xE0000, 0xE0200), *range(0xF0000, 0xF0010), 0x10FFFF]
    texts = [
        " ".join(f"a{chr(point)}b" for point in points[start : start + 400])
        for start in range(0, len(points), 400)
    ]
    assert_same(texts, tokenizer.encode(texts), oracle(texts))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.text(st.one_of(st.sampled_from(STRANGE), st.characters(exclude_categories=["Cs"]))),
        max_size=8,
    )
)
def test_ids_of_any_text_are_the_references(tokenizer, oracle, texts):
    # An empty list is no input to the oracle.
    assert_same(texts, tokenizer.encode(texts), oracle(texts) if texts else [])


def test_special_tokens_cannot_be_typed(tokenizer):
    typed, spelled = tokenizer.encode(
        [
            "alpha [SEP] beta [MASK] [CLS] [PAD] [UNK]",
            "alpha [ sep ] beta [ mask ] [ cls ] [ pad ] [ unk ]",
        ]
    )
    assert typed.tolist() == spelled.tolist()
    assert not {tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id} & set(typed.tolist())


def test_nothing_is_added_or_cut(tokenizer):
    """MiniLM's own tokenizer.json cuts and pads to 128."""
    short, long = tokenizer.encode(["word", "word " * 2000])
    assert (len(short), len(long)) == (1, 2000)
    assert short.dtype == np.int32
    assert tokenizer.decode(tokenizer.encode(["Unbelievably good!"])[0]) == "unbelievably good !"


def test_implementations_share_a_digest(minilm_folder, tokenizer):
    other = load_tokenizer(minilm_folder)
    assert tokenizer.digest == other.digest
    assert (tokenizer.vocab_size, tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id) == (
        30522,
        101,
        102,
        0,
    )


def write(folder, settings=None, words=WORDS, **model):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if model:
        content = {
            "model": {"type": "WordPiece", "vocab": {word: i for i, word in enumerate(words)}},
            "normalizer": {"type": "BertNormalizer", "lowercase": True, "strip_accents": None},
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "added_tokens": [],
            **model,
        }
        (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("implementation", ["tokenizers", "tensorflow_text"])
@pytest.mark.parametrize(
    "settings",
    [
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": False, "strip_accents": True},
        {"tokenize_chinese_chars": False},
    ],
)
def test_settings_of_the_folder_are_followed(tmp_path, minilm_folder, implementation, settings):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tensorflow_text")
    words = (minilm_folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    folder = write(tmp_path / "folder", settings | {"tokenizer_class": "BertTokenizer"}, words)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["Éa CAFÉ Ünder 中文字 words", "plain Words", STRANGE, *LONG]
    expected = oracle(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    found = load_tokenizer(folder, implementation)
    assert_same(texts, found.encode(texts), expected)
    assert found.digest != load_tokenizer(minilm_folder).digest


def test_gaps_and_doubles_in_the_vocabulary_keep_their_ids(tmp_path):
    pytest.importorskip("tensorflow_text")
    vocab = {"[PAD]": 0, "[UNK]": 7, "[CLS]": 3, "[SEP]": 9, "gap": 20, "5": 21, "[": 22, "]": 23}
    folder = write(tmp_path / "folder", model={"type": "WordPiece", "vocab": vocab})
    one, two = (load_tokenizer(folder, name) for name in ("tokenizers", "tensorflow_text"))
    texts = ["gap 5 [gap5] [SEP]", "[gap12]"]
    assert_same(texts, one.encode(texts), two.encode(texts))
    assert one.vocab_size == two.vocab_size == 24


def break_json(folder):
    (folder / "tokenizer.json").write_text('{"model": ')


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no such folder"),
        (empty, "neither tokenizer.json or vocab.txt"),
        (break_json, "not JSON"),
        (lambda f: (f / "tokenizer.json").write_text("[]"), "not a JSON object"),
        (lambda f: (f / "tokenizer.json").write_bytes(b"\xff\xfe\x00"), "not JSON"),
        (lambda f: write(f, model={"type": "Unigram", "vocab": []}), "'Unigram' stands"),
        (lambda f: write(f, model={"type": "BPE", "vocab": {}, "merges": []}), "damaged"),
        (lambda f: write(f, model={"type": "WordPiece", "vocab": {"a": "b"}}), "damaged"),
        (lambda f: write(f, model={"type": "WordPiece", "vocab": {"a": -1}}), "damaged"),
        (lambda f: write(f, normalizer=None), "None stands where"),
        (lambda f: write(f, normalizer={"type": "Lowercase"}), "'Lowercase' stands where"),
        (lambda f: write(f, added_tokens=[{"content": "new", "id": 30}]), "added token 'new'"),
        (lambda f: write(f, words=["a", "b"]), r"lacks \[CLS\]"),
        (lambda f: write(f, words=[w for w in WORDS if w != "[UNK]"]), r"lacks \[UNK\]"),
        (lambda f: write(f, {"sep_token": "</s>"}), "lacks </s>"),
        (lambda f: write(f, words=[]), r"lacks \[CLS\]"),
        (lambda f: (f / "vocab.txt").write_bytes(b"\xff\xfe\xfa"), "not UTF-8"),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), "not JSON"),
    ],
)
def test_damaged_folders_are_one_line(tmp_path, damage, message):
    folder = write(tmp_path / "folder")
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        load_tokenizer(folder)
    assert str(tmp_path) in caught.value.where


def test_unknown_implementation_is_named(tmp_path):
    with pytest.raises(InputError, match="tensorflow_text"):
        load_tokenizer(write(tmp_path / "folder"), "sentencepiece")


TEXTS = [f"The Quick brown fox number {i} jumps über 懒狗 {i % 7}" for i in range(200)]
TRAIN = """
import sys, json
from pref_jax.data.tokenizers import train_wordpiece
texts = json.loads(sys.stdin.read())
folder = train_wordpiece(lambda: iter(texts), "digest", 300)
print((folder / "vocab.txt").read_text(encoding="utf-8"), end="")
"""


def test_trained_vocabulary_is_the_same_in_every_process(tmp_path):
    """Its hash maps are seeded anew in each process: three would not agree by luck."""
    results = {
        subprocess.run(
            [sys.executable, "-c", TRAIN],
            input=json.dumps(TEXTS),
            env={cache.VARIABLE: str(tmp_path / str(number)), "PYTHONUTF8": "1"},
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=True,
        ).stdout
        for number in range(3)
    }
    assert len(results) == 1
    words = results.pop().splitlines()
    assert words[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert "quick" in words
    assert len(words) == len(set(words)) <= 300


def test_trained_vocabulary_is_cached_and_readable(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    folder = train_wordpiece(lambda: iter(TEXTS), "digest", 300)
    assert train_wordpiece(pytest.fail, "digest", 300) == folder  # not even looked at
    assert train_wordpiece(lambda: iter(TEXTS), "other", 300) != folder
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(["the quick FOX 懒 [SEP]"])[0]
    assert tokenizer.decode(ids).startswith("the quick fox 懒")
    assert tokenizer.vocab_size <= 300
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoTokenizer.from_pretrained(folder)
    expected = other(TEXTS[:20], add_special_tokens=False)["input_ids"]
    assert_same(TEXTS[:20], tokenizer.encode(TEXTS[:20]), expected)
