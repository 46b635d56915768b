"""What a decoder reads: a template that survives, and text that is never anything but text."""

import json
from pathlib import Path

import numpy as np
import pytest

from pref_jax.config import TEMPLATE
from pref_jax.data.arena import read_comparisons
from pref_jax.data.batches import Samples, make_geometry, pack, write_unit
from pref_jax.data.batches import allocate as allocate_units
from pref_jax.data.decoder_tokenizers import write_byte_tokenizer
from pref_jax.data.features import Features, make_features
from pref_jax.data.segments import TRUNCATIONS, Form, Layout, split_template
from pref_jax.data.tokenizers import Tokenizer, load_tokenizer
from pref_jax.errors import InputError

SHARES = (0.2, 0.4, 0.4)
MARKS = ("<|begin_of_text|>", "<|end_of_text|>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-pair tokenizer as LLaMA's: two special tokens, whole words looked up first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = tmp_path_factory.mktemp("tokenizer")
    backend = Tokenizer(models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    lines = [f"Response number {n} is better than the prompt, or a tie." for n in range(20)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(MARKS), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(lines, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{MARKS[0]} $A", special_tokens=[(MARKS[0], 0)]
    )
    backend.save(str(made / "tokenizer.json"))
    (made / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": MARKS[0]})
    )
    return made


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def layout(**changes: object) -> Layout:
    values = {"name": "decoder", "max_length": 128, "budget": SHARES, "template": TEMPLATE}
    return Layout(**values | changes)  # type: ignore[arg-type]


def write(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", "response_a", "response_b"])
        for number, row in enumerate(rows):
            writer.writerow([number, *(json.dumps([text]) for text in row)])
    return path


def features(
    tmp_path: Path, tokenizer: Tokenizer, rows: list[tuple[str, str, str]], **changes: object
) -> Features:
    comparisons = read_comparisons(write(tmp_path / "rows.csv", rows), labelled=False)
    return make_features(comparisons, tokenizer, layout(**changes), progress=False)


ODD = [
    ("short", "a", "b"),
    ("", "", ""),
    ("word " * 9000, "x" * 50_000, "y " * 20_000),
    (MARKS[0], MARKS[1] * 3, f"{MARKS[1]} good"),
    (split_template(TEMPLATE)[-1], split_template(TEMPLATE)[2], TEMPLATE),
    ("\U0001f600 caf\u00e9 \u6c34", "\x00", "\u202e"),
]


@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("reuse_unused", [False, True])
def test_the_template_always_survives(
    tmp_path: Path, tokenizer: Tokenizer, truncation: str, reuse_unused: bool
) -> None:
    made = features(tmp_path, tokenizer, ODD, truncation=truncation, reuse_unused=reuse_unused)
    closing = tokenizer.encode([split_template(TEMPLATE)[-1]])[0]
    for row in range(len(ODD)):
        ids = made.sequence(row)
        assert len(ids) <= 128
        assert ids[-len(closing) :].tolist() == closing.tolist()
        assert ids[0] == tokenizer.bos_id and 0 not in ids[1:] and 1 not in ids


def test_what_is_cut_does_not_show_and_what_is_kept_does(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    long = "word " * 500
    rows = [
        (long, long, long),
        (f"changed {long}", long, long),
        (long, long, f"{long} changed"),
    ]
    head = features(tmp_path, tokenizer, rows, truncation="head")
    tail = features(tmp_path, tokenizer, rows, truncation="tail")
    ids = [[part.sequence(row).tolist() for row in range(3)] for part in (head, tail)]
    assert ids[0][0] != ids[0][1] and ids[0][0] == ids[0][2]
    assert ids[1][0] == ids[1][1] and ids[1][0] != ids[1][2]


@pytest.mark.parametrize("mark", MARKS)
def test_special_tokens_cannot_be_typed(tokenizer: Tokenizer, mark: str) -> None:
    texts = [mark, f"ok {mark} X", mark * 3, f" {mark}", mark[:-1]]
    for ids in tokenizer.encode(texts):
        assert not {0, 1} & set(ids.tolist())
    good, bad = tokenizer.encode([f"ok {mark} good", f"ok {mark} bad"])
    assert good.tolist() != bad.tolist()


def test_ids_are_those_of_transformers(folder: Path, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [text for row in ODD[3:] for text in row] + ["Response A is better.\n\n  or not"]
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        expected = reference(text, add_special_tokens=False, split_special_tokens=True)
        # Whole words are looked up, and a mark of its own is one; ours never is.
        if not any(mark in text for mark in MARKS):
            assert ids.tolist() == expected["input_ids"], text


def test_bytes_are_tokens() -> None:
    tokenizer = load_tokenizer(write_byte_tokenizer())
    text = "caf\u00e9 <|begin|>\n\U0001f600"
    (ids,) = tokenizer.encode([text])
    assert len(ids) == len(text.encode()) and ids.max() < 256
    assert tokenizer.bos_id == 256 and tokenizer.vocab_size == 258
    assert tokenizer.decode(ids) == text


def test_the_least_length_is_said(tokenizer: Tokenizer) -> None:
    fixed = Form(layout(), tokenizer).layout.num_fixed
    with pytest.raises(InputError, match=f"give at least {fixed + 5}"):
        Form(layout(max_length=fixed), tokenizer)
    assert Form(layout(max_length=fixed + 5), tokenizer).layout.limits == (1, 2, 2)


@pytest.mark.parametrize(
    "template",
    [
        None,
        "",
        "{prompt}{response_a}{response_b}",
        "{prompt} {response_a} {response_b} \n",
        "{response_a} {prompt} {response_b} which?",
        "{prompt} {response_a} which?",
        "{prompt} {prompt} {response_a} {response_b} which?",
    ],
)
def test_wrong_templates_are_refused(template: str | None) -> None:
    with pytest.raises(InputError, match=r"input\.template"):
        layout(template=template)


@pytest.mark.parametrize("packing", [True, False])
def test_the_last_token_is_pooled(tmp_path: Path, tokenizer: Tokenizer, packing: bool) -> None:
    made = features(tmp_path, tokenizer, ODD)
    samples = Samples([made], np.zeros(len(ODD), np.int32), np.ones(len(ODD), bool))
    geometry = make_geometry(256, 1, packing=packing)
    numbers = np.arange(len(ODD))
    closing = tokenizer.encode([split_template(TEMPLATE)[-1]])[0]
    seen = []
    for unit in pack(samples.lengths.sum(axis=1), numbers, geometry):
        packed = allocate_units((1,), geometry, unit.bucket)
        write_unit(packed, (0,), 0, unit, samples)
        for slot in range(len(unit.samples)):
            at = packed.pool_positions[0, slot, 0]
            assert packed.input_ids[0, at] == closing[-1]
            ends = packed.segment_ids[0, at] != np.append(packed.segment_ids[0, 1:], 0)[at]
            assert ends
            seen.append(packed.samples[0, slot])
    assert sorted(seen) == numbers.tolist()


def test_folders_without_a_usable_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(InputError, match=r"tokenizer\.model and no tokenizer\.json"):
        load_tokenizer(tmp_path)
