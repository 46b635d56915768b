"""Plans of an epoch follow from what was compiled and what the packer does."""

import math

import numpy as np
import pytest
from rig import call
from support import make_samples, random_rows

from pref_jax.data.batches import BatchPlan, make_geometry, padding_fraction
from pref_jax.scale import Packing, measure_packing, plan_epoch

RESULT = {
    "topology": "v5e:16x16",
    "devices": "256 x TPU v5 lite",
    "batch_size": 1000,
    "max_length": 512,
    "roofline_seconds": 0.5,
    "checkpoint_bytes": 3_000_000_000,
}


@pytest.mark.parametrize(("batch_size", "shards"), [(64, 1), (64, 8), (400, 4)])
def test_updates_are_as_full_as_those_of_a_run(batch_size: int, shards: int) -> None:
    samples, geometry = make_samples(random_rows(2000, 2, 64)), make_geometry(64, 2, packing=True)
    found = measure_packing(samples.lengths.sum(axis=1), geometry, batch_size, shards, 2)
    plan = BatchPlan(
        samples, np.arange(2000), batch_size, 1, "none", geometry, shards, microbatch_size=2
    )
    updates = [plan.update(step) for step in range(2000 // batch_size)]
    assert found.fill == pytest.approx(1 - padding_fraction(updates), abs=0.03)
    assert found.tokens_per_row == pytest.approx(samples.lengths.sum() / 2000)
    real = found.fill * found.tokens_per_update / batch_size
    assert real == pytest.approx(found.tokens_per_row, rel=0.03)


def test_hours_and_money_of_an_epoch() -> None:
    packing = Packing(tokens_per_row=200.0, tokens_per_update=256_000.0, fill=0.78)
    plan = plan_epoch(RESULT, packing, sides=2, disk_rate=200e6)
    assert plan.tokens_per_second == 1000 * 2 * 512 / 0.5
    # An update of full rows takes half a second; this one computes a quarter of the tokens.
    assert plan.rows_per_second == pytest.approx(8000)
    assert plan.hours(28_800_000) == pytest.approx(1)
    assert plan.hours(28_800_000, share=0.4) == pytest.approx(2.5)
    assert plan.checkpoint_seconds == 15
    assert plan.price == pytest.approx(256 * 1.2)
    unknown = plan_epoch(RESULT | {"topology": "v5p:2x2x1"}, packing, sides=2, disk_rate=1.0)
    assert math.isnan(unknown.price)


def test_a_plan_without_rows_is_refused() -> None:
    outcome = call("compile_table", "--plans")
    assert outcome.code == 2 and "--data" in outcome.stderr
