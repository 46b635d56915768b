"""Matrix products whose backward pass multiplies in the precision of the forward pass."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

# Name of results for policies of `jax.checkpoint`, which see no product inside a `custom_vjp`.
PRODUCT = "product"


def contract(
    x: jax.Array, axes: Sequence[int], y: jax.Array, axis: Sequence[int], out: jnp.dtype
) -> jax.Array:
    """Sums over ``axes`` of ``x`` and ``axis`` of ``y``; the result is in ``out``."""

    product = functools.partial(
        lax.dot_general, dimension_numbers=((tuple(axes), tuple(axis)), ((), ()))
    )
    direct = functools.partial(product, preferred_element_type=out)
    if jnp.dtype(out).itemsize >= 4:
        return direct(x, y)
    # XLA's CPU compiler has no product with a 16-bit result: it would multiply as float32, at a
    # fraction of the speed. Elsewhere it rounds the sums as it writes them.
    return lax.platform_dependent(
        x,
        y,
        cpu=lambda x, y: product(x, y, preferred_element_type=jnp.float32).astype(out),
        default=direct,
    )


def matmul(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype, out: jnp.dtype) -> jax.Array:
    """``x @ kernel`` and its gradients with operands in ``dtype``.

    What JAX derives for 16-bit operands either rounds the gradient of a float32 kernel to 16 bits
    (with a 16-bit ``out``) or multiplies both gradients as float32, at a half to a sixteenth of the
    speed (with a float32 ``out``).

    Args:
      x: ``[..., in]``.
      kernel: ``[in, out]``.
      dtype: of operands.
      out: of the result; its gradient is rounded to ``dtype``.

    Returns:
      ``[..., out]``. The gradients have the dtypes of ``x`` and ``kernel``, that of the kernel is
      summed in float32.
    """
    if {x.dtype, kernel.dtype, jnp.dtype(out), jnp.dtype(dtype)} == {jnp.dtype(jnp.float32)}:
        return contract(x, [x.ndim - 1], kernel, [0], out)  # nothing is rounded
    return checkpoint_name(_rounded(x, kernel, dtype, out), PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _rounded(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype, out: jnp.dtype) -> jax.Array:
    return contract(x.astype(dtype), [x.ndim - 1], kernel.astype(dtype), [0], out)


def _forward(
    x: jax.Array, kernel: jax.Array, dtype: jnp.dtype, out: jnp.dtype
) -> tuple[jax.Array, Any]:
    return _rounded(x, kernel, dtype, out), (x, kernel)


def _backward(
    dtype: jnp.dtype, out: jnp.dtype, saved: Any, d_out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    del out
    x, kernel = saved
    rows, d_out = range(x.ndim - 1), d_out.astype(dtype)
    d_x = contract(d_out, [x.ndim - 1], kernel.astype(dtype), [1], dtype)
    d_kernel = contract(x.astype(dtype), rows, d_out, rows, jnp.float32)
    return d_x.astype(x.dtype), d_kernel.astype(kernel.dtype)


_rounded.defvjp(_forward, _backward)
