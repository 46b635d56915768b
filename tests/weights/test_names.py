import pytest

from pref_jax.weights import names


def test_flatten_and_unflatten_are_inverse() -> None:
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    flat = names.flatten(tree)
    assert flat == {("a", "b"): 1, ("a", "c", "d"): 2, ("e",): 3}
    assert names.unflatten(flat) == tree


@pytest.mark.parametrize(
    ("family", "path", "key", "transposed"),
    [
        (
            "bert",
            ("layer_11", "attention", "query", "kernel"),
            "encoder.layer.11.attention.self.query.weight",
            True,
        ),
        (
            "bert",
            ("layer_0", "attention", "output", "bias"),
            "encoder.layer.0.attention.output.dense.bias",
            False,
        ),
        (
            "bert",
            ("layer_0", "output_norm", "scale"),
            "encoder.layer.0.output.LayerNorm.weight",
            False,
        ),
        (
            "distilbert",
            ("layer_5", "attention", "value", "kernel"),
            "transformer.layer.5.attention.v_lin.weight",
            True,
        ),
        (
            "distilbert",
            ("layer_5", "attention_norm", "bias"),
            "transformer.layer.5.sa_layer_norm.bias",
            False,
        ),
        ("distilbert", ("embeddings", "norm", "scale"), "embeddings.LayerNorm.weight", False),
    ],
)
def test_entries(family: str, path: names.Path, key: str, transposed: bool) -> None:
    assert names.entry_of(path, family) == names.Entry(key, transposed)
    assert names.path_table([path], family) == {key: path}


@pytest.mark.parametrize(
    ("family", "path"),
    [
        ("distilbert", ("embeddings", "token_type", "embedding")),
        ("bert", ("layer_0", "attention", "query", "scale")),
        ("bert", ("layer_0", "attention", "kernel")),
        ("bert", ("layer_x", "output", "kernel")),
        ("bert", ("pooler", "kernel")),
    ],
)
def test_paths_that_no_encoder_has_are_no_entries(family: str, path: names.Path) -> None:
    with pytest.raises(KeyError, match="/".join(path)):
        names.entry_of(path, family)


def test_old_spelling_and_prefix_are_taken_off() -> None:
    assert (
        names.modern_key("bert.encoder.layer.0.output.LayerNorm.gamma", "bert")
        == "encoder.layer.0.output.LayerNorm.weight"
    )
    assert names.modern_key("embeddings.LayerNorm.beta", "bert") == "embeddings.LayerNorm.bias"
    assert names.modern_key("cls.predictions.bias", "bert") == "cls.predictions.bias"


def test_only_listed_keys_are_ignored() -> None:
    assert names.is_ignored("pooler.dense.weight", "bert")
    assert names.is_ignored("vocab_projector.bias", "distilbert")
    assert not names.is_ignored("pooler.dense.weight", "distilbert")
    assert not names.is_ignored("encoder.layer.0.adapter.weight", "bert")
    assert not names.is_ignored("embeddings.position_ids_table", "bert")
