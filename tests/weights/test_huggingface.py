"""Loading is compared with torch's own tensors; damage is made with safetensors itself."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from pref_jax.errors import InputError
from pref_jax.models.bert import EncoderConfig
from pref_jax.weights import names
from pref_jax.weights.huggingface import load_encoder, read_encoder_config, weights_digest

MakeFolder = Callable[..., Path]


def encoder_shapes(config: EncoderConfig) -> dict[str, Any]:
    """The tree below ``encoder``, written down apart from the model."""
    width, inner = config.hidden_size, config.intermediate_size
    tables = {"word": config.vocab_size, "position": config.max_positions}
    if config.type_vocab_size:
        tables["token_type"] = config.type_vocab_size
    norm = {"scale": (width,), "bias": (width,)}

    def linear(rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {"kernel": (rows, columns), "bias": (columns,)}

    layer = {
        "attention": {name: linear(width, width) for name in ("query", "key", "value", "output")},
        "attention_norm": norm,
        "intermediate": linear(width, inner),
        "output": linear(inner, width),
        "output_norm": norm,
    }
    return {
        "embeddings": {
            **{name: {"embedding": (rows, width)} for name, rows in tables.items()},
            "norm": norm,
        },
        **{f"layer_{number}": layer for number in range(config.num_layers)},
    }


def abstract_encoder(
    folder: Path, dtype: Any = np.float32, devices: int = 1, **changes: int
) -> dict[str, Any]:
    """Matrices sharded over their last axis, everything else on every device."""
    mesh = jax.make_mesh(
        (devices,),
        ("tensor",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:devices],
    )
    config = read_encoder_config(folder)
    config = EncoderConfig(**(config.__dict__ | changes))

    def leaf(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        even = len(shape) == 2 and shape[-1] % devices == 0
        spec = PartitionSpec(None, "tensor") if even else PartitionSpec()
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    shapes = names.flatten(encoder_shapes(config))
    return names.unflatten({path: leaf(shape) for path, shape in shapes.items()})


def torch_tree(folder: Path) -> dict[names.Path, np.ndarray]:
    """The encoder's weights by way of transformers, placed by rules written anew."""
    import transformers

    model = transformers.AutoModel.from_pretrained(folder)
    tree: dict[names.Path, np.ndarray] = {}
    moves = [
        (r"(encoder|transformer)\.layer\.(\d+)\.", r"layer_\2/"),
        (r"embeddings\.(\w+)_embeddings\.weight", r"embeddings/\1/embedding"),
        (r"embeddings\.LayerNorm", "embeddings/norm"),
        (r"attention\.output\.LayerNorm|sa_layer_norm", "attention_norm"),
        (r"output\.LayerNorm|output_layer_norm", "output_norm"),
        (r"attention\.self\.", "attention/"),
        (r"attention\.output\.dense|attention\.out_lin", "attention/output"),
        (r"attention\.q_lin", "attention/query"),
        (r"attention\.k_lin", "attention/key"),
        (r"attention\.v_lin", "attention/value"),
        (r"intermediate\.dense|ffn\.lin1", "intermediate"),
        (r"output\.dense|ffn\.lin2", "output"),
    ]
    for key, tensor in model.state_dict().items():
        if key.startswith("pooler."):
            continue
        name = key
        for pattern, replacement in moves:
            name = re.sub(pattern, replacement, name)
        value = tensor.numpy()
        if name.endswith(".weight"):
            is_norm = "norm" in name
            name = name.removesuffix(".weight") + ("/scale" if is_norm else "/kernel")
            value = value if is_norm else value.T
        tree[tuple(name.replace(".", "/").split("/"))] = value
    return tree


def assert_loaded(folder: Path, source: Path, **options: Any) -> None:
    loaded = names.flatten(load_encoder(folder, abstract_encoder(folder, **options)))
    expected = torch_tree(source)
    assert set(loaded) == set(expected)
    for path, value in expected.items():
        np.testing.assert_array_equal(np.asarray(loaded[path]), value, err_msg="/".join(path))


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """Changes the tensors of a single-file folder."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("shards", ["1GB", "1KB"])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_every_parameter_equals_torchs(make_folder: MakeFolder, family: str, shards: str) -> None:
    folder = make_folder(family, max_shard_size=shards)
    assert (folder / "model.safetensors.index.json").exists() == (shards == "1KB")
    assert_loaded(folder, folder)


def test_parts_land_on_eight_devices(make_folder: MakeFolder) -> None:
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    folder = make_folder("bert")
    assert_loaded(folder, folder, devices=8)
    abstract = abstract_encoder(folder, devices=8)
    kernel = load_encoder(folder, abstract)["layer_0"]["attention"]["query"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(8, 1)}


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_a_longer_table_of_positions_repeats_the_files(
    make_folder: MakeFolder, family: str
) -> None:
    folder = make_folder(family)
    rows = read_encoder_config(folder).max_positions
    longer = abstract_encoder(folder, devices=8, max_positions=2 * rows + 3)
    loaded = names.flatten(load_encoder(folder, longer))
    place = ("embeddings", "position", "embedding")
    expected = torch_tree(folder)
    table = expected.pop(place)
    np.testing.assert_array_equal(
        np.asarray(loaded.pop(place)), np.concatenate([table, table, table[:3]])
    )
    for path, value in expected.items():
        np.testing.assert_array_equal(np.asarray(loaded[path]), value)
    with pytest.raises(InputError, match="position"):
        load_encoder(folder, abstract_encoder(folder, max_positions=rows - 1))


def test_real_weights_equal_torchs(minilm_folder: Path) -> None:
    pytest.importorskip("transformers")
    assert_loaded(minilm_folder, minilm_folder)


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_old_names_and_both_prefixes(make_folder: MakeFolder, prefix: str) -> None:
    folder, source = make_folder("bert"), make_folder("bert")

    def age(tensors: dict[str, np.ndarray]) -> None:
        for key in list(tensors):
            value = tensors.pop(key)
            if key.startswith("bert."):
                key = prefix + key.removeprefix("bert.")
            key = key.replace("LayerNorm.weight", "LayerNorm.gamma")
            tensors[key.replace("LayerNorm.bias", "LayerNorm.beta")] = value
        tensors[f"{prefix}embeddings.position_ids"] = np.arange(16)[None]
        tensors[f"{prefix}pooler.dense.weight"] = np.zeros((8, 8), np.float32)

    rewrite(folder, age)
    assert_loaded(folder, source)


def test_links_as_in_a_hub_cache(make_folder: MakeFolder, tmp_path: Path) -> None:
    source = make_folder("distilbert", max_shard_size="1KB")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for number, path in enumerate(source.iterdir()):
        blob = tmp_path / f"blob{number}"
        path.rename(blob)
        (folder / path.name).symlink_to(Path("..") / blob.name)
    assert_loaded(folder, folder)


def test_a_stray_file_changes_nothing(make_folder: MakeFolder) -> None:
    folder = make_folder("bert", max_shard_size="1KB")
    before = weights_digest(folder)
    tensors = {"bert.embeddings.word_embeddings.weight": np.zeros((40, 8), np.float32)}
    save_file(tensors, folder / "consolidated.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"not looked at")
    assert_loaded(folder, folder)
    assert weights_digest(folder) == before


def test_weights_are_cast(make_folder: MakeFolder) -> None:
    folder = make_folder("bert")
    exact = names.flatten(load_encoder(folder, abstract_encoder(folder)))
    cast = names.flatten(load_encoder(folder, abstract_encoder(folder, dtype=jax.numpy.bfloat16)))
    for path, value in exact.items():
        assert cast[path].dtype == jax.numpy.bfloat16
        np.testing.assert_array_equal(cast[path], value.astype(jax.numpy.bfloat16))


def test_half_precision_files_load(make_folder: MakeFolder) -> None:
    folder = make_folder("bert")
    rewrite(folder, lambda tensors: tensors.update({k: v.astype("f2") for k, v in tensors.items()}))
    loaded = load_encoder(folder, abstract_encoder(folder))
    stored = load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(
        loaded["layer_1"]["output"]["kernel"],
        stored["bert.encoder.layer.1.output.dense.weight"].T.astype("f4"),
    )


def test_digest_follows_the_weights_alone(make_folder: MakeFolder) -> None:
    folder = make_folder("bert")
    before = weights_digest(folder)
    (folder / "config.json").write_text("{}")
    assert weights_digest(folder) == before
    rewrite(folder, lambda tensors: tensors["bert.embeddings.LayerNorm.bias"].fill(1e-3))
    assert weights_digest(folder) != before


WORD = "bert.embeddings.word_embeddings.weight"
QUERY = "bert.encoder.layer.1.attention.self.query.weight"
BIAS = "bert.encoder.layer.1.attention.self.query.bias"  # not alone in its shard
DAMAGES: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], str]] = {
    "missing": (lambda t: t.pop(QUERY), r"encoder.layer.1.attention.self.query.weight is missing"),
    "one too many": (
        lambda t: t.update({"bert.encoder.layer.1.adapter.weight": np.zeros(3, "f4")}),
        r"tensor bert.encoder.layer.1.adapter.weight is no part of a bert of 3 layers",
    ),
    "a layer too many": (
        lambda t: t.update({QUERY.replace("layer.1", "layer.3"): t[QUERY]}),
        r"tensor bert.encoder.layer.3.attention.self.query.weight is no part",
    ),
    "other prefix": (
        lambda t: t.update({"model." + WORD: t.pop(WORD)}),
        r"tensor model.bert.embeddings.word_embeddings.weight is no part",
    ),
    "twice": (
        lambda t: t.update({WORD.removeprefix("bert."): t[WORD]}),
        r"bert.embeddings.word_embeddings.weight.* the same parameter",
    ),
    "misshapen": (
        lambda t: t.update({WORD: t[WORD][:-1].copy()}),
        r"word_embeddings.weight has shape \[39, 8\], not \[40, 8\]",
    ),
    "not transposed": (
        lambda t: t.update(
            {
                "bert.encoder.layer.0.output.dense.weight": np.zeros((12, 8), "f4"),
            }
        ),
        r"output.dense.weight has shape \[12, 8\], not \[8, 12\]",
    ),
    "integers": (lambda t: t.update({QUERY: t[QUERY].astype("i1")}), r"is of type I8"),
    "not a number": (lambda t: t[QUERY].fill(np.nan), r"query.weight holds values that are not"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors_are_refused_by_name(make_folder: MakeFolder, damage: str) -> None:
    folder = make_folder("bert")
    change, message = DAMAGES[damage]
    rewrite(folder, change)
    with pytest.raises(InputError, match=message):
        load_encoder(folder, abstract_encoder(folder))


def test_values_beyond_half_precision_are_refused(make_folder: MakeFolder) -> None:
    folder = make_folder("bert")
    rewrite(folder, lambda tensors: tensors[QUERY].fill(1e6))
    load_encoder(folder, abstract_encoder(folder))
    with pytest.raises(InputError, match=f"{QUERY} holds values that are not finite in float16"):
        load_encoder(folder, abstract_encoder(folder, dtype=np.float16))


@pytest.mark.parametrize("size", [0, 5, 60, -100])
def test_a_cut_file_is_refused_by_name(make_folder: MakeFolder, size: int) -> None:
    folder = make_folder("distilbert", max_shard_size="1KB")
    shard = sorted(folder.glob("*.safetensors"))[2]
    content = shard.read_bytes()
    shard.write_bytes(content[:size])
    with pytest.raises(InputError, match=rf"{shard.name}: not a whole safetensors file"):
        load_encoder(folder, abstract_encoder(folder))


def edit_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content["weight_map"])
    path.write_text(json.dumps(content))


def test_a_missing_shard_is_refused_by_name(make_folder: MakeFolder) -> None:
    folder = make_folder("bert", max_shard_size="1KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    for read in (
        lambda: load_encoder(folder, abstract_encoder(folder)),
        lambda: weights_digest(folder),
    ):
        with pytest.raises(InputError, match=rf"{shard.name}: there is no such file"):
            read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.update({BIAS: next(name for name in m.values() if name != m[BIAS])}),
            rf"tensor {BIAS} is here, but the index puts it into",
        ),
        (lambda m: m.pop(BIAS), rf"tensor {BIAS} is here, but the index does not list it"),
        (
            lambda m: m.update({"bert.extra": m[WORD]}),
            r"tensor bert.extra is not here, but the index says so",
        ),
        (lambda m: m.update({WORD: "../secret"}), r"is in '../secret', no file of this folder"),
        (lambda m: m.update({WORD: 3}), r"is in 3, no file of this folder"),
        (lambda m: m.clear(), r"weight_map is missing or empty"),
    ],
    ids=["wrong shard", "unlisted", "listed only", "outside", "number", "empty"],
)
def test_an_index_that_disagrees_is_refused(
    make_folder: MakeFolder, change: Callable[[dict[str, str]], Any], message: str
) -> None:
    folder = make_folder("bert", max_shard_size="1KB")
    edit_index(folder, change)
    with pytest.raises(InputError, match=message):
        load_encoder(folder, abstract_encoder(folder))


def test_a_tensor_in_two_shards_is_refused(make_folder: MakeFolder) -> None:
    folder = make_folder("bert", max_shard_size="1KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    other = folder / next(name for name in index.values() if name != index[WORD])
    save_file(load_file(other) | {WORD: np.zeros((40, 8), "f4")}, other)
    with pytest.raises(InputError, match=rf"{other.name}: tensor {WORD} is here, but the index"):
        load_encoder(folder, abstract_encoder(folder))


def test_a_twice_said_name_in_the_index_is_refused(make_folder: MakeFolder) -> None:
    folder = make_folder("bert", max_shard_size="1KB")
    path = folder / "model.safetensors.index.json"
    path.write_text('{"weight_map": {"a": "x", "a": "y"}}')
    with pytest.raises(InputError, match="duplicate key: a"):
        load_encoder(folder, abstract_encoder(folder))


def test_only_safetensors_are_read(make_folder: MakeFolder) -> None:
    folder = make_folder("bert")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model.bin: only weights in the safetensors"):
        weights_digest(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"neither model.safetensors nor"):
        weights_digest(folder)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_config_is_read(make_folder: MakeFolder, family: str) -> None:
    config = read_encoder_config(make_folder(family))
    assert config == EncoderConfig(
        family=family,
        vocab_size=40,
        hidden_size=8,
        num_layers=3,
        num_heads=2,
        intermediate_size=12,
        max_positions=16,
        type_vocab_size=2 if family == "bert" else 0,
    )


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "roberta": ({"model_type": "roberta"}, "its model_type is 'roberta'"),
    "none": ({"model_type": None}, "its model_type is None"),
    "export": ({"model_type": "pref_jax"}, "init_from"),
    "relative positions": ({"position_embedding_type": "relative_key"}, "'relative_key'"),
    "decoder": ({"is_decoder": True}, "is_decoder is True"),
    "activation": ({"hidden_act": "silu"}, "hidden_act is 'silu', not one of gelu"),
    "heads": ({"num_attention_heads": 3}, "3 heads do not divide the width 8"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    "text": ({"hidden_size": "8"}, "hidden_size is '8'"),
    "dropout": ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob is 1.5"),
    "one type": ({"type_vocab_size": 1}, "type_vocab_size is 1"),
    "quantised": ({"quantization_config": {"bits": 8}}, "quantization_config is"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_configs_of_other_models_are_refused(make_folder: MakeFolder, case: str) -> None:
    path = make_folder("bert") / "config.json"
    changes, message = BAD_CONFIGS[case]
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read_encoder_config(path.parent)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("is_", "asked"), [("roberta", "bert"), ("bert", "distilbert"), ("distilbert", "bert")]
)
def test_a_family_that_is_not_the_folders_is_refused_with_both_named(
    make_folder: MakeFolder, is_: str, asked: str
) -> None:
    folder = make_folder("distilbert" if is_ == "distilbert" else "bert")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": is_}))
    with pytest.raises(InputError, match=rf"'{is_}', but .* '{asked}'"):
        read_encoder_config(folder, family=asked)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1, "a": 2}', "\x00", "[" * 100_000])
def test_a_broken_config_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config.json: ") as caught:
        read_encoder_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config.json: is missing"):
        read_encoder_config(tmp_path)
