"""Heads that cannot prefer a side, poolings and lengths: ours, and torch's from the export."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util
from support import Rows, make_params, pack_all, tiny_config

from pref_jax.data.batches import Samples, make_geometry
from pref_jax.data.segments import Layout
from pref_jax.models.classifiers import PreferenceClassifier
from pref_jax.training.step import make_gradient, make_predict_step
from pref_jax.weights.export import export_encoder

LENGTHS = (40, 9), (12, 12), (5, 64), (33, 20), (64, 64), (7, 8), (21, 3)
TEXTS = (400, 9), (12, 12), (5, 90), (33, 0), (64, 2000), (7, 8), (21, 3)
BUDGETS = {"single": (0.2, 0.4, 0.4), "parallel": (0.2, 0.8)}


def exchange(rows: Rows) -> Rows:
    """The same rows with both sequences, and both responses, exchanged."""
    other = Rows(rows.lengths[:, ::-1])
    other.ids, other.starts = [row[::-1] for row in rows.ids], [row[::-1] for row in rows.starts]
    other.texts = rows.texts[:, ::-1]
    return other


def one_side(rows: Rows, side: int) -> Rows:
    """The sequences of one side as rows of one sequence."""
    other = Rows(rows.lengths[:, side : side + 1])
    other.ids = [row[side : side + 1] for row in rows.ids]
    other.starts = [row[side : side + 1] for row in rows.starts]
    other.texts = rows.texts[:, :: 1 if side == 0 else -1]
    return other


def make_rows() -> Rows:
    rows = Rows(LENGTHS)
    rows.texts = np.array(TEXTS, np.int32)
    return rows


def as_samples(rows: Rows, head: str) -> Samples:
    labels, allowed = np.arange(len(LENGTHS)) % 3, np.ones(len(LENGTHS), bool)
    if head == "orders":
        return Samples([one_side(rows, 0), one_side(rows, 1)], labels, allowed, paired=True)
    return Samples([rows], labels, allowed)


def logits_of(model: PreferenceClassifier, params: Any, samples: Samples) -> np.ndarray:
    update = pack_all(samples, make_geometry(64, samples.sides, packing=True))
    result = np.full((samples.num_rows, 3), np.nan)
    for packed, logits in zip(
        update.buckets, jax.jit(make_predict_step(model))(params, update), strict=True
    ):
        filled = packed.samples >= 0
        result[packed.samples[filled]] = np.asarray(logits)[filled]
    return result


CASES = [
    ("scores", "cls_mean", True, "segments"),
    ("scores", "cls", False, "xla"),
    ("orders", "mean", True, "xla"),
    ("orders", "cls", False, "segments"),
    ("linear", "cls_mean", True, "segments"),
]


@pytest.mark.parametrize(("head", "pooling", "lengths", "attention"), CASES)
def test_every_head_equals_its_export_and_symmetric_ones_exchange(
    tmp_path: Path, head: str, pooling: str, lengths: bool, attention: str
) -> None:
    model = PreferenceClassifier(
        tiny_config(),
        head=head,
        pooling=pooling,
        length_features=lengths,
        attention=attention,
        longest=64,
    )
    params = make_params(model, 2)
    rows = make_rows()
    ours = logits_of(model, params, as_samples(rows, head))
    assert ours.std(axis=0).min() > 1e-2

    exchanged = logits_of(model, params, as_samples(exchange(rows), head))[:, [1, 0, 2]]
    if head == "linear":
        assert np.abs(exchanged - ours).max() > 1e-2
    else:
        np.testing.assert_allclose(exchanged, ours, atol=2e-6)

    theirs = torch_logits(tmp_path, model, params, rows)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    if lengths:
        unequal = [row for row, texts in enumerate(TEXTS) if texts[0] != texts[1]]
        untold = make_rows()
        untold.texts = np.full_like(untold.texts, 128)
        moved = np.abs(logits_of(model, params, as_samples(untold, head)) - ours)[unequal]
        assert moved.max(axis=1).min() > 1e-3


def torch_logits(folder: Path, model: PreferenceClassifier, params: Any, rows: Rows) -> np.ndarray:
    """What the exported folder's own modelling file computes, a row at a time."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from safetensors.torch import load_file

    from pref_jax.weights.modeling_pref_jax import PrefJaxConfig, PrefJaxForSequenceClassification

    config = dataclasses.replace(model.config, max_positions=512)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [f"w{number}" for number in range(config.vocab_size - len(words))]
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join(words) + "\n")
    layout = "single" if model.head == "orders" else "parallel"
    export_encoder(
        folder / "exported",
        params=params,
        config=config,
        layout=Layout(layout, 64, BUDGETS[layout]),
        tokenizer_folder=folder / "tokenizer",
        temperature=1.0,
        examples=[],
        dropout=0.0,
        head=model.head,
        pooling=model.pooling,
        length_features=model.length_features,
    )
    settings = json.loads((folder / "exported" / "config.json").read_text())
    module = PrefJaxForSequenceClassification(PrefJaxConfig(**settings)).eval()
    module.load_state_dict(load_file(folder / "exported" / "model.safetensors"))
    logits = []
    for row, ids in enumerate(rows.ids):
        longest = max(map(len, ids))
        shape = (1, 2, longest)
        inputs, types, mask = (torch.zeros(shape, dtype=torch.long) for _ in range(3))
        for side in range(2):
            count = len(ids[side])
            inputs[0, side, :count] = torch.tensor(ids[side])
            types[0, side, rows.starts[row][side] : count] = 1
            mask[0, side, :count] = 1
        with torch.no_grad():
            told = torch.tensor(rows.texts[row : row + 1].copy())
            logits.append(module(inputs, mask, types, text_lengths=told).logits[0].numpy())
    return np.stack(logits)


@pytest.mark.parametrize("head", ["scores", "orders"])
def test_the_gradient_of_a_symmetric_model_does_not_see_the_order(head: str) -> None:
    config = tiny_config(hidden_dropout=0.0, attention_dropout=0.0)
    model = PreferenceClassifier(
        config, head=head, pooling="cls_mean", length_features=True, head_dropout=0.0
    )
    params = make_params(model, 2)
    rows = make_rows()
    gradients = []
    for ordered in (rows, exchange(rows)):
        samples = as_samples(ordered, head)
        if ordered is not rows:
            samples.labels = np.array([1, 0, 2])[samples.labels]
        update = pack_all(samples, make_geometry(64, samples.sides, packing=True))
        gradient, _ = jax.jit(make_gradient(model))(
            params, {}, update, np.int32(0), np.float32(1.0)
        )
        gradients.append(traverse_util.flatten_dict(gradient, sep="/"))
    scale = max(float(np.abs(leaf).max()) for leaf in gradients[0].values())
    for path, leaf in gradients[0].items():
        np.testing.assert_allclose(leaf, gradients[1][path], atol=1e-5 * scale, err_msg=path)
