"""What an epoch takes on a slice that is not there: hours, money and bytes of a checkpoint.

The compiler says what fits, the roofline how fast the slice could be at most, and the packer how
many of the tokens computed belong to real rows.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from pref_jax.data.batches import Geometry, pack, update_shapes

# US dollars per chip and hour, Google's list price on demand in the cheapest region of the United
# States, as of September 2026 (cloud.google.com/tpu/pricing). Reserved and spot chips cost less.
PRICES = {"v5e": 1.20, "v6e": 2.70}
# Updates that are packed to see how full they are.
_UPDATES = 16


class Packing(NamedTuple):
    """What rows become once they are packed.

    Attributes:
      tokens_per_row: real tokens of a row, cut and with what the layout adds.
      tokens_per_update: tokens computed in an update, padding and empty units included.
      fill: share of these that is real.
    """

    tokens_per_row: float
    tokens_per_update: float
    fill: float


def measure_packing(
    totals: np.ndarray, geometry: Geometry, batch_size: int, shards: int, microbatch_size: int
) -> Packing:
    """Packs a few updates of rows drawn from a sample, as the batch plan does.

    Args:
      totals: tokens of each row of the sample over all its sequences ``[n]``.
      geometry, shards, microbatch_size: as of `pref_jax.data.batches.BatchPlan`.
      batch_size: rows of an update; may be more than there are in the sample.
    """
    generator = np.random.default_rng(0)
    shapes = update_shapes(geometry, batch_size, shards, microbatch_size)
    computed = real = 0
    for _ in range(_UPDATES):
        drawn = totals[generator.integers(0, len(totals), batch_size)]
        used = [0] * len(shapes)
        for unit in pack(drawn, np.arange(batch_size), geometry):
            used[unit.bucket] += 1
        for count, (_, units), length in zip(used, shapes, geometry.unit_lengths, strict=True):
            computed += math.ceil(count / units) * units * length
        real += int(drawn.sum())
    return Packing(float(totals.mean()), computed / _UPDATES, real / computed)


class EpochPlan(NamedTuple):
    """A preset on a slice.

    Attributes:
      tokens_per_second: computed, by roofline.
      rows_per_second: of rows as long as those of the sample, by roofline.
      checkpoint_seconds: to write the trained state at the disk's rate.
      price: US dollars per hour of the whole slice; NaN where no price is known.
    """

    tokens_per_second: float
    rows_per_second: float
    checkpoint_seconds: float
    price: float

    def hours(self, rows: int, share: float = 1.0) -> float:
        """Hours of an epoch where the step reaches this share of the roofline."""
        return rows / (self.rows_per_second * share) / 3600.0


def plan_epoch(
    result: Mapping[str, Any], packing: Packing, *, sides: int, disk_rate: float
) -> EpochPlan:
    """Puts together what the compiler says and what the packer measures.

    Args:
      result: of `pref_jax.compile_check.check`.
      packing: of `measure_packing`, with the same rows, mesh and microbatch.
      sides: sequences per row.
      disk_rate: bytes/s at which a checkpoint is written.
    """
    tokens = result["batch_size"] * sides * result["max_length"]
    per_second = tokens / result["roofline_seconds"]
    chips = int(result["devices"].split(" ")[0])
    price = PRICES.get(result["topology"].split(":")[0], math.nan)
    return EpochPlan(
        tokens_per_second=per_second,
        rows_per_second=result["batch_size"] * per_second / packing.tokens_per_update,
        checkpoint_seconds=result["checkpoint_bytes"] / disk_rate,
        price=chips * price,
    )
