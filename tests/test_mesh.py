"""Sharding rules refuse what they cannot place."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from support import make_params, tiny_config

from pref_jax import mesh as meshes
from pref_jax.errors import InputError
from pref_jax.models.classifiers import PreferenceClassifier


def _abstract(mesh, **changes):
    model = PreferenceClassifier(tiny_config(**changes))
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    pool = jax.ShapeDtypeStruct((1, 1, 1), jnp.int32)
    boxed = jax.eval_shape(model.init, jax.random.key(0), *[tokens] * 4, pool)["params"]
    return meshes.abstract_parameters(boxed, mesh)


def test_matrices_are_cut_and_norms_are_not() -> None:
    layer = _abstract(meshes.make_mesh(2, 2, 2))["encoder"]["layer_0"]
    assert layer["intermediate"]["kernel"].sharding.spec == PartitionSpec("fsdp", "tensor")
    assert layer["output"]["kernel"].sharding.spec == PartitionSpec("tensor", "fsdp")
    assert layer["attention"]["query"]["kernel"].sharding.spec == PartitionSpec("fsdp", "tensor")
    assert layer["output_norm"]["scale"].sharding.spec == PartitionSpec(None)


def test_a_mesh_axis_used_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="share a mesh axis"):
        meshes.partition_spec(("heads", "mlp"))


def test_an_axis_that_no_rule_knows_is_an_error() -> None:
    with pytest.raises(ValueError, match="headz"):
        meshes.partition_spec(("embed", "headz"))


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (4, 4, 1)])
def test_meshes_that_do_not_fit_the_devices_are_refused(sizes) -> None:
    with pytest.raises(InputError, match=r"--config\.mesh"):
        meshes.make_mesh(*sizes)


def test_a_size_that_does_not_divide_is_refused_with_the_parameter() -> None:
    with pytest.raises(InputError, match=r"mesh\.tensor: 8 does not divide the 12 of .*layer_0"):
        _abstract(meshes.make_mesh(1, 1, 8), intermediate_size=12)


def test_the_parameter_tree_is_the_documented_one() -> None:
    params = make_params(PreferenceClassifier(tiny_config()), 1)
    layer = {
        "attention": {key: ["bias", "kernel"] for key in ("query", "key", "value", "output")},
        "attention_norm": ["bias", "scale"],
        "intermediate": ["bias", "kernel"],
        "output": ["bias", "kernel"],
        "output_norm": ["bias", "scale"],
    }
    expected = {
        "encoder": {
            "embeddings": {
                "word": ["embedding"],
                "position": ["embedding"],
                "token_type": ["embedding"],
                "norm": ["bias", "scale"],
            },
            "layer_0": layer,
            "layer_1": layer,
        },
        "head": ["bias", "kernel"],
    }

    def names(tree):
        if all(hasattr(leaf, "shape") for leaf in tree.values()):
            return sorted(tree)
        return {name: names(part) for name, part in tree.items()}

    assert names(params) == expected
