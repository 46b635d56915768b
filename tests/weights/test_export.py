"""The exported folder in a process that has transformers and torch and not this project."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pref_jax.data.segments import Layout
from pref_jax.errors import InputError, RunError
from pref_jax.models.bert import EncoderConfig
from pref_jax.weights import export, names
from pref_jax.weights.export import export_encoder

from .test_huggingface import encoder_shapes

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", "cat", "dog", "##s"]
CONFIG = {
    "bert": EncoderConfig("bert", len(VOCABULARY), 8, 2, 2, 12, 32, 2),
    "distilbert": EncoderConfig("distilbert", len(VOCABULARY), 8, 2, 2, 12, 32, 0),
}
BUDGET = {"single": (0.2, 0.4, 0.4), "parallel": (0.2, 0.8)}
LENGTHS = (9, 4, 17, 12, 5, 6, 7, 11)


def layout_of(name: str) -> Layout:
    return Layout(name, 32, BUDGET[name], reuse_unused=True, truncation="head")


def random_params(config: EncoderConfig, sides: int) -> dict[str, Any]:
    generator = np.random.default_rng(0)

    def leaf(path: names.Path, shape: tuple[int, ...]) -> np.ndarray:
        values = generator.normal(0, 0.5, shape).astype(np.float32)
        return values + 1 if path[-1] == "scale" else values

    shapes = names.flatten(encoder_shapes(config))
    return {
        "encoder": names.unflatten({path: leaf(path, shape) for path, shape in shapes.items()}),
        "head": {
            "kernel": leaf(("kernel",), (sides * config.hidden_size, 3)),
            "bias": leaf(("bias",), (3,)),
        },
    }


def made_up(sides: int) -> list[dict[str, Any]]:
    """Rows of several lengths: [CLS] prompt [SEP] response [SEP]."""
    generator = np.random.default_rng(1)
    rows = []
    for length in LENGTHS:
        ids, types = [], []
        for side in range(sides):
            words = generator.integers(5, len(VOCABULARY), length + 3 * side).tolist()
            ids.append([2, *words[:2], 3, *words[2:], 3])
            types.append([0, 0, 0, 0] + [1] * (len(words) - 1))
        rows.append(
            {
                "input_ids": ids if sides == 2 else ids[0],
                "token_type_ids": types if sides == 2 else types[0],
                "text_lengths": [length, length + 3],
                "probabilities": [0.5, 0.25, 0.25],
            }
        )
    return rows


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"do_lower_case": True, "name_or_path": "/home/someone/models/x"})
    )
    return folder


@pytest.fixture
def arguments(tokenizer_folder: Path) -> Callable[..., dict[str, Any]]:
    def make(family: str = "bert", layout: str = "single", **changes: Any) -> dict[str, Any]:
        sides = 2 if layout == "parallel" else 1
        return {
            "params": random_params(CONFIG[family], sides),
            "config": CONFIG[family],
            "layout": layout_of(layout),
            "tokenizer_folder": tokenizer_folder,
            "temperature": 1.25,
            "examples": made_up(sides),
            "dropout": 0.1,
        } | changes

    return make


def expected_logits(params: dict[str, Any], config: EncoderConfig, row: dict[str, Any]) -> Any:
    """A plain encoder over one unpadded row, in float64 and from the formulas."""
    from math import erf

    tree = {path: np.asarray(value, float) for path, value in names.flatten(params).items()}
    gelu = np.vectorize(lambda x: x * (1 + erf(x / 2**0.5)) / 2)

    def linear(x: Any, *path: str) -> Any:
        return x @ tree[(*path, "kernel")] + tree[(*path, "bias")]

    def norm(x: Any, *path: str) -> Any:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
        return x * tree[(*path, "scale")] + tree[(*path, "bias")]

    def first_state(ids: list[int], types: list[int]) -> Any:
        table = ("encoder", "embeddings")
        x = tree[(*table, "word", "embedding")][ids]
        x = x + tree[(*table, "position", "embedding")][: len(ids)]
        if config.family == "bert":
            x = x + tree[(*table, "token_type", "embedding")][types]
        x = norm(x, *table, "norm")
        for number in range(config.num_layers):
            layer = ("encoder", f"layer_{number}")
            heads = [
                linear(x, *layer, "attention", name).reshape(len(ids), config.num_heads, -1)
                for name in ("query", "key", "value")
            ]
            scores = np.einsum("qhd,khd->hqk", heads[0], heads[1]) / heads[0].shape[-1] ** 0.5
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            mixed = np.einsum("hqk,khd->qhd", weights, heads[2]).reshape(len(ids), -1)
            x = norm(x + linear(mixed, *layer, "attention", "output"), *layer, "attention_norm")
            hidden = gelu(linear(x, *layer, "intermediate"))
            x = norm(x + linear(hidden, *layer, "output"), *layer, "output_norm")
        return x[0]

    ids, types = row["input_ids"], row["token_type_ids"]
    sides = [(ids, types)] if isinstance(ids[0], int) else list(zip(ids, types, strict=True))
    return linear(np.concatenate([first_state(*side) for side in sides]), "head")


def run_plain(code: str, *arguments: object, **environment: str) -> Any:
    """Runs code where `import pref_jax` fails; returns the JSON it prints last."""
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    start = "import sys; sys.modules['pref_jax'] = None; sys.modules['jax'] = None\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", start + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment,
        cwd="/",
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


READ = """
import json, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
assert not model.training
described = json.load(open(folder + "/pref_jax.json"))
sides = 2 if described["input"]["layout"] == "parallel" else 1
rows = described["examples"]
def sequences(row, name):
    return row[name] if sides == 2 else [row[name]]
def padded(rows, name, left=False):
    length = max(len(s) for r in rows for s in sequences(r, "input_ids")) + 2
    out = []
    for r in rows:
        for s in sequences(r, "input_ids" if name == "attention_mask" else name):
            s = [1] * len(s) if name == "attention_mask" else s
            fill = [0] * (length - len(s))
            out.append(fill + s if left else s + fill)
    out = torch.tensor(out)
    return out.reshape(len(rows), 2, -1) if sides == 2 else out
def run(rows, left=False, types=True):
    names = ["input_ids", "attention_mask"] + ["token_type_ids"] * types
    with torch.no_grad():
        return model(**{n: padded(rows, n, left) for n in names}).logits
right = run(rows)
answers = {
    "right": right.tolist(),
    "left": run(rows, left=True).tolist(),
    "no_types": run(rows, types=False).tolist(),
    "labels": [model.config.id2label[i] for i in range(3)],
    "dropout": [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)],
}
if sides == 1:
    ids, types = (torch.tensor([rows[0][n]]) for n in ("input_ids", "token_type_ids"))
    answers["alone"] = model(ids, token_type_ids=types).logits.tolist()
labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
inputs = {n: padded(rows, n) for n in ("input_ids", "attention_mask", "token_type_ids")}
answers["loss"] = model(**inputs, labels=labels).loss.item()
answers["own_loss"] = torch.nn.functional.cross_entropy(right, labels).item()
refused = []
for wrong in (inputs["input_ids"][0], inputs["input_ids"].repeat(*([1] * sides), 9)):
    try:
        model(wrong)
    except ValueError as error:
        refused.append(str(error))
answers["refused"] = refused
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
answers["tokens"] = tokenizer("Cats [dog", "a")["input_ids"]
answers["max_length"] = tokenizer.model_max_length
model.train()
model(**inputs, labels=labels).loss.backward()
answers["without_gradient"] = [n for n, p in model.named_parameters() if p.grad is None]
model.eval().save_pretrained(folder + "/again")
load = AutoModelForSequenceClassification.from_pretrained
again = load(folder + "/again", trust_remote_code=True)
with torch.no_grad():
    answers["again"] = again(**inputs).logits.tolist()
print(json.dumps(answers))
"""


@pytest.mark.parametrize("layout", ["single", "parallel"])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_plain_transformers_computes_the_same(
    arguments: Callable[..., dict[str, Any]], tmp_path: Path, family: str, layout: str
) -> None:
    given = arguments(family, layout)
    folder = tmp_path / "exported"
    export_encoder(folder, **given)
    answers = run_plain(READ, folder, HF_MODULES_CACHE=str(tmp_path / "modules"))
    expected = [expected_logits(given["params"], given["config"], r) for r in given["examples"]]
    for name in ("right", "left", "no_types", "again"):
        np.testing.assert_allclose(answers[name], expected, atol=1e-5, err_msg=name)
    if "alone" in answers:
        np.testing.assert_allclose(answers["alone"], expected[:1], atol=1e-5)
    assert answers["labels"] == ["winner_model_a", "winner_model_b", "winner_tie"]
    assert set(answers["dropout"]) == {0.1}
    assert answers["loss"] == pytest.approx(answers["own_loss"], abs=1e-6)
    assert "shape" in answers["refused"][0] and "32 positions" in answers["refused"][1]
    words = [VOCABULARY.index(word) for word in ("cat", "##s", "[UNK]", "dog", "a")]
    assert answers["tokens"] == [2, *words[:4], 3, words[4], 3]
    assert answers["max_length"] == 32
    assert answers["without_gradient"] == []


FORGETFUL = """
import json, io, logging, contextlib
import transformers
from transformers import logging as noise
folder, name = sys.argv[1:]
stream = io.StringIO()
handler = logging.StreamHandler(stream)
noise.add_handler(handler)
try:
    getattr(transformers, name).from_pretrained(folder)
    outcome = "loaded"
except Exception as error:
    outcome = type(error).__name__ + ": " + str(error)
print("\\n" + json.dumps([outcome, stream.getvalue()]))
"""


@pytest.mark.parametrize(
    "name", ["AutoModelForSequenceClassification", "AutoModel", "BertForSequenceClassification"]
)
def test_who_forgets_to_trust_the_code_gets_no_random_head(
    arguments: Callable[..., dict[str, Any]], tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "exported"
    export_encoder(folder, **arguments())
    # Commands called earlier in this process have told the libraries to be quiet.
    outcome, said = run_plain(FORGETFUL, folder, name, TRANSFORMERS_VERBOSITY="warning")
    if name.startswith("Auto"):
        assert "trust_remote_code" in outcome
    else:  # loads anything: no weight of ours may pass for one of its own, and it must say so
        assert "model of type `pref_jax` to instantiate a model of type `bert`" in said
        assert re.search(r"bert.embeddings.word_embeddings.weight +\| MISSING", said)
        assert re.search(r"classifier.weight +\| MISSING", said)


def test_description_is_complete_and_holds_no_path(
    arguments: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "exported"
    export_encoder(folder, **arguments("bert", "parallel"))
    described = json.loads((folder / "pref_jax.json").read_text())
    assert described["input"] == {
        "layout": "parallel",
        "max_length": 32,
        "budget": [0.2, 0.8],
        "template": None,
        "reuse_unused": True,
        "truncation": "head",
        "marker": None,
        "both_orders": False,
    }
    assert described["labels"] == ["winner_model_a", "winner_model_b", "winner_tie"]
    assert described["temperature"] == 1.25
    assert described["examples"] == made_up(2)
    for path in folder.iterdir():
        content = path.read_bytes()
        assert str(tmp_path).encode() not in content and b"/home/" not in content, path


def test_a_sentence_encoders_cut_is_not_exported(
    arguments: Callable[..., dict[str, Any]], tmp_path: Path, minilm_folder: Path
) -> None:
    config = EncoderConfig("bert", 30522, 8, 1, 2, 12, 512, 2)
    given = arguments(tokenizer_folder=minilm_folder, config=config)
    export_encoder(tmp_path / "out", **(given | {"params": random_params(config, 1)}))
    assert json.loads((minilm_folder / "tokenizer.json").read_text())["truncation"] is not None
    written = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert written["truncation"] is None and written["padding"] is None


def test_an_earlier_export_is_replaced_whole(
    arguments: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "exported"
    folder.mkdir()
    export_encoder(folder, **arguments())
    (folder / "special_tokens_map.json").write_text("{}")
    export_encoder(folder, **arguments("distilbert"))
    assert json.loads((folder / "config.json").read_text())["family"] == "distilbert"
    assert not (folder / "special_tokens_map.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "tokenizer"]


def test_other_peoples_folders_are_left_alone(
    arguments: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match=r"--output=.*mine: it already holds 'thesis.txt'"):
        export_encoder(folder, **arguments())
    with pytest.raises(InputError, match="it is not a folder"):
        export_encoder(folder / "thesis.txt", **arguments())
    assert (folder / "thesis.txt").read_text() == "precious"
    assert len(list(folder.iterdir())) == 1


def test_a_failed_write_leaves_the_earlier_export(
    arguments: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "exported"
    export_encoder(folder, **arguments())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "sync_tree", fail)
    with pytest.raises(RunError, match="No space left"):
        export_encoder(folder, **arguments("distilbert"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "tokenizer"]


def test_everyone_may_read_what_is_written(
    arguments: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "exported"
    export_encoder(folder, **arguments())
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


@pytest.mark.parametrize("place", ["file/inside", "n" * 300])
def test_a_place_that_cannot_be_is_refused(
    arguments: Callable[..., dict[str, Any]], tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--output=.*: it cannot be written there"):
        export_encoder(tmp_path / place, **arguments())


def test_weights_that_are_not_finite_are_refused(
    arguments: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    given = arguments()
    given["params"]["encoder"]["layer_1"]["output"]["bias"][3] = np.inf
    with pytest.raises(InputError, match=r"encoder.layer.1.output.dense.bias is not finite"):
        export_encoder(tmp_path / "exported", **given)
    assert not (tmp_path / "exported").exists()


def test_a_tokenizer_that_is_gone_is_named(
    arguments: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"neither vocab.txt nor tokenizer.json"):
        export_encoder(tmp_path / "out", **arguments(tokenizer_folder=tmp_path / "gone"))
