"""Which dtype computes what, and dynamic loss scaling for float16."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from pref_jax.accelerators import BFLOAT16_FROM, TENSOR_CORES_FROM, compute_capability


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtypes of one run. Trained weights, softmax, norms, head and loss are always float32.

    Attributes:
      compute: of activations and of the operands of matrix products; the frozen base under
        adapters is kept in it too.
      loss_scaling: whether gradients would underflow without a loss scale (float16).
    """

    compute: jnp.dtype
    loss_scaling: bool


def choose_precision(name: str, device: jax.Device) -> Precision:
    """Turns `train.precision` into a policy.

    "auto" takes bfloat16 where the hardware multiplies it (TPU; NVIDIA from Ampere, compute
    capability 8; AMD), float16 on older cards with tensor cores (T4, V100), and float32 on those
    without and on CPU.

    Args:
      name: of the config.
      device: the weakest of the mesh.
    """
    if name == "auto":
        if device.platform == "tpu":
            name = "bfloat16"
        elif device.platform == "gpu":
            capability = compute_capability(device)
            if capability is None or capability >= BFLOAT16_FROM:
                name = "bfloat16"
            else:
                name = "float16" if capability >= TENSOR_CORES_FROM else "float32"
        else:
            name = "float32"
    dtype = jnp.dtype(name)
    return Precision(compute=dtype, loss_scaling=name == "float16")


# The values of torch.amp.GradScaler.
_INITIAL_SCALE = 2.0**16
_GROWTH_INTERVAL = 2000


class LossScale(struct.PyTreeNode):
    """Dynamic loss scale: halved by a non-finite gradient, doubled after a run of finite ones.

    `flax.training.dynamic_scale` does the same around one `value_and_grad`; here the gradient is a
    sum over microbatches inside a loop, so only the state and the rule are needed.

    Attributes:
      scale: float32 scalar, multiplies the loss.
      finite_steps: int32 scalar, finite updates since the scale changed.
    """

    scale: jax.Array
    finite_steps: jax.Array

    @classmethod
    def create(cls) -> "LossScale":
        return cls(jnp.float32(_INITIAL_SCALE), jnp.int32(0))

    def adjust(self, finite: jax.Array) -> "LossScale":
        """The scale of the next update, after gradients that were ``finite`` or not."""
        grow = self.finite_steps + 1 >= _GROWTH_INTERVAL
        grown = jnp.where(grow, self.scale * 2.0, self.scale)
        scale = jnp.where(finite, grown, jnp.maximum(self.scale * 0.5, 1.0))
        finite_steps = jnp.where(finite & ~grow, self.finite_steps + 1, 0)
        return LossScale(scale, finite_steps)
