"""Layer norm and GELU against torch: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pref_jax.models.layers import LayerNorm, gelu

ROUNDING = {"float32": 2e-6, "bfloat16": 2**-8}  # of one rounding, relative


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32) * 3.0


@pytest.mark.parametrize("dtype", ROUNDING)
def test_gelu_rounds_once(dtype: str) -> None:
    """Value and slope are computed in float32 whatever the input, so only the result is rounded."""
    x = jnp.asarray(draw(2, 50, 40)).astype(dtype)
    theirs = torch.tensor(np.asarray(x, np.float32), dtype=torch.float64, requires_grad=True)
    exact = torch.nn.functional.gelu(theirs)
    exact.sum().backward()
    y, backward = jax.vjp(gelu, x)
    (slope,) = backward(jnp.ones_like(y))
    assert (y.dtype, slope.dtype) == (x.dtype, x.dtype)
    for ours, wanted in ((y, exact), (slope, theirs.grad)):
        np.testing.assert_allclose(
            np.asarray(ours, np.float64), wanted.detach(), rtol=ROUNDING[dtype], atol=1e-6
        )


def test_gelu_keeps_only_its_input() -> None:
    x = jnp.asarray(draw(8, 64)).astype(jnp.bfloat16)
    kept = jax.tree.leaves(jax.vjp(gelu, x)[1])
    assert [(array.dtype, array.shape) for array in kept] == [(x.dtype, x.shape)]


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("shape", [(3, 7, 16), (5, 16), (1, 512, 16)])
def test_layer_norm_equals_torch(shape: tuple[int, ...], joined: bool) -> None:
    x, d_y = draw(*shape), draw(*shape)[::-1].copy()
    scale, bias = draw(shape[-1]), draw(shape[-1])[::-1].copy()
    theirs = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x, scale, bias)]
    wanted = torch.nn.functional.layer_norm(theirs[0], shape[-1:], theirs[1], theirs[2], 1e-12)
    (wanted * torch.tensor(d_y)).sum().backward()
    module = LayerNorm(1e-12, joined=joined)

    def apply(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        return module.apply({"params": {"scale": scale, "bias": bias}}, x)

    y, backward = jax.vjp(apply, *map(jnp.asarray, (x, scale, bias)))
    np.testing.assert_allclose(y, wanted.detach(), atol=1e-5)
    for ours, leaf in zip(backward(jnp.asarray(d_y)), theirs, strict=True):
        np.testing.assert_allclose(ours, leaf.grad, rtol=1e-4, atol=1e-4)
