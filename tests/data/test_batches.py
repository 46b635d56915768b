"""The plan loses no row, repeats none, and is a function of seed and step."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Rows, make_samples, random_rows

from pref_jax.data.batches import (
    BatchPlan,
    Samples,
    make_geometry,
    pack,
    padding_fraction,
    prediction_batches,
)


def _plan(rows: int = 37, sides: int = 1, **changes) -> BatchPlan:
    values = {
        "samples": make_samples(random_rows(rows, sides, 64)),
        "rows": np.arange(rows),
        "batch_size": 8,
        "seed": 1,
        "swap": "none",
        "geometry": make_geometry(64, sides, packing=True),
        "shards": 1,
        "microbatch_size": 2,
    }
    return BatchPlan(**(values | changes))


def _samples_of(update) -> list[int]:
    found = []
    for packed, count in zip(update.buckets, update.num_microbatches, strict=True):
        used = packed.samples[: int(count)]
        found += used[used >= 0].tolist()
        assert (packed.samples[int(count) :] == -1).all()
    return sorted(found)


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_holds_every_row_once(sides: int, packing: bool) -> None:
    plan = _plan(sides=sides, geometry=make_geometry(64, sides, packing=packing))
    for epoch in range(2):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        updates = [plan.update(step) for step in steps]
        assert sorted(sample for update in updates for sample in _samples_of(update)) == list(
            range(37)
        )
        assert [float(update.total_weight) for update in updates] == [8.0] * 4 + [5.0]


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    straight, resumed = _plan(), _plan()
    for step in range(12):
        straight.update(step)
    for step in (9, 11, 3):  # any order, no history
        ours, theirs = straight.update(step), resumed.update(step)
        for a, b in zip(ours.buckets, theirs.buckets, strict=True):
            for x, y in zip(a, b, strict=True):
                np.testing.assert_array_equal(x, y)
    assert _samples_of(_plan(seed=2).update(0)) != _samples_of(straight.update(0))


def test_machine_shape_changes_no_unit() -> None:
    one = _plan(rows=64, batch_size=32)
    for shards, microbatch in ((8, 1), (4, 4), (1, 16)):
        other = _plan(rows=64, batch_size=32, shards=shards, microbatch_size=microbatch)
        for a, b in zip(one.update(1).buckets, other.update(1).buckets, strict=True):
            units_a = {int(i): row for i, row in _units(a)}
            units_b = {int(i): row for i, row in _units(b)}
            assert units_a == units_b


def _units(packed):
    flat = packed.samples.reshape(-1, packed.samples.shape[-1])
    for number, row in zip(packed.unit_ids.ravel(), flat, strict=True):
        if (row >= 0).any():
            yield number, tuple(row)


def test_swap_both_doubles_and_augment_mixes() -> None:
    rows = random_rows(37, 1, 64)
    both_orders = Samples([rows, rows], np.zeros(37, int), np.ones(37, bool))
    both = _plan(samples=both_orders, swap="both")
    assert _samples_of(both.update(0)) == sorted(
        np.concatenate([both.sample_numbers(0)[:8], both.sample_numbers(0)[:8] + 37])
    )
    augment = _plan(samples=both_orders, swap="augment")
    numbers = np.concatenate([augment.sample_numbers(step) for step in range(5)])
    assert sorted(numbers % 37) == list(range(37))
    assert 5 < (numbers >= 37).sum() < 32
    assert set(both_orders.labels[:37]) == {0}
    assert set(both_orders.labels[37:]) == {1}  # A and B change places in the label too


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(1, 64)), min_size=1, max_size=60),
    st.booleans(),
)
def test_packed_units_hold_each_row_whole(lengths, packing) -> None:
    rows = Rows(lengths)
    samples = make_samples(rows)
    geometry = make_geometry(64, 2, packing=packing)
    units = pack(samples.lengths.sum(axis=1), np.arange(len(lengths)), geometry)
    assert sorted(sample for unit in units for sample in unit.samples) == list(range(len(lengths)))
    for unit in units:
        total = sum(sum(lengths[sample]) for sample in unit.samples)
        assert total <= geometry.unit_lengths[unit.bucket]
        assert len(unit.samples) <= geometry.rows_per_unit[unit.bucket]


def test_tokens_arrive_where_segments_and_pools_say() -> None:
    plan = _plan(sides=2)
    for packed in plan.update(0).buckets:
        for at in np.ndindex(packed.unit_ids.shape):
            for slot, sample in enumerate(packed.samples[at]):
                for side in range(2) if sample >= 0 else ():
                    start = packed.pool_positions[at][slot, side]
                    inside = packed.segment_ids[at] == packed.segment_ids[at][start]
                    assert inside[start] and packed.segment_ids[at][start] > 0
                    ids = plan.samples.sequence(int(sample), side)
                    np.testing.assert_array_equal(packed.input_ids[at][inside], ids)
                    np.testing.assert_array_equal(packed.positions[at][inside], range(len(ids)))
                    types = packed.token_types[at][inside]
                    assert types.argmax() == plan.samples.type_start(int(sample), side)


class _Recording(Rows):
    """Remembers whose tokens were read."""

    def __init__(self, lengths) -> None:
        super().__init__(lengths)
        self.read: list[int] = []

    def sequence(self, sample: int, side: int) -> np.ndarray:
        if side == 0:
            self.read.append(sample)
        return super().sequence(sample, side)


@pytest.mark.parametrize("packing", [True, False])
def test_hosts_read_only_the_rows_of_their_devices(packing: bool) -> None:
    rows = _Recording(random_rows(48, 2, 64).lengths)
    samples, geometry = make_samples(rows), make_geometry(64, 2, packing=packing)
    plan = _plan(48, samples=samples, geometry=geometry, shards=4, batch_size=24)
    shapes = plan.shapes()
    rows.read.clear()  # lengths are known for all rows alike

    def check(make) -> None:
        whole, read = make(None), []
        for odd in (0, 1):  # two hosts, every other device each
            rows.read.clear()
            held = [range(odd, units, 2) for _, units in shapes]
            for theirs, ours, columns in zip(whole.buckets, make(held).buckets, held, strict=True):
                for x, y in zip(theirs, ours, strict=True):
                    np.testing.assert_array_equal(x[:, columns], y[:, columns])
                np.testing.assert_array_equal(theirs.samples, ours.samples)
            read.append(sorted(rows.read))
        assert sorted(read[0] + read[1]) == sorted(
            int(n) for packed in whole.buckets for n in packed.samples[packed.samples >= 0]
        )
        assert all(read)

    check(lambda held: dataclasses.replace(plan, held=held).update(1))
    check(lambda held: next(prediction_batches(samples, np.arange(48), geometry, shapes, held)))


@pytest.mark.parametrize("rows", [1, 13, 257])
def test_prediction_batches_hold_every_row_once(rows: int) -> None:
    samples = make_samples(random_rows(rows, 2, 64))
    geometry = make_geometry(64, 2, packing=True)
    updates = list(prediction_batches(samples, np.arange(rows), geometry, ((3, 2), (2, 2))))
    assert sorted(sample for update in updates for sample in _samples_of(update)) == list(
        range(rows)
    )
    assert {update.buckets[0].input_ids.shape for update in updates} == {(3, 2, 64)}


def test_packing_leaves_little_padding() -> None:
    samples = make_samples(random_rows(320, 1, 256))
    packed, padded = (
        _plan(
            320,
            samples=samples,
            batch_size=32,
            microbatch_size=1,
            geometry=make_geometry(256, 1, packing=packing),
        )
        for packing in (True, False)
    )
    assert padding_fraction(packed.update(step) for step in range(10)) < 0.1
    assert padding_fraction(padded.update(step) for step in range(10)) > 0.25


def test_an_epoch_is_the_seeds_permutation_of_its_rows() -> None:
    """Runs started by older versions go on with the same updates."""
    rows = np.random.default_rng(0).permutation(500)[:300]
    before = rows.copy()
    plan = dataclasses.replace(_plan(500), rows=rows)
    for epoch in (1, 0):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        order = np.random.default_rng([plan.seed, epoch]).permutation(300)
        found = np.concatenate([plan.sample_numbers(step) for step in steps])
        np.testing.assert_array_equal(found, rows[order])
    np.testing.assert_array_equal(rows, before)


def test_each_row_goes_into_the_fullest_unit_that_has_room() -> None:
    random = np.random.default_rng(0)
    geometry = make_geometry(64, 2, packing=True)
    for _ in range(20):
        totals = random.integers(1, 129, int(random.integers(1, 80)))
        units: list[list[int]] = []
        buckets: list[int] = []
        room: list[int] = []
        unfilled: list[int] = []  # the last one changed comes last
        for row in np.argsort(-totals, kind="stable").tolist():
            fitting = [unit for unit in unfilled if room[unit] >= totals[row]]
            if fitting:
                unit = min(reversed(fitting), key=room.__getitem__)
                unfilled.remove(unit)
            else:
                unit = len(units)
                units.append([])
                buckets.append(int(totals[row] > 64))
                room.append(geometry.unit_lengths[buckets[unit]])
            units[unit].append(row)
            room[unit] -= int(totals[row])
            if len(units[unit]) < geometry.rows_per_unit[buckets[unit]]:
                unfilled.append(unit)
        found = pack(totals, np.arange(len(totals)), geometry)
        assert [unit.samples for unit in found] == units
        assert [unit.bucket for unit in found] == buckets


def test_a_plan_holds_a_few_bytes_a_row() -> None:
    """Of a million rows their order, eight bytes each, and no Python object."""
    rows = 200_000
    features = Rows([[20, 20]])
    features.lengths = np.full((rows, 2), 20, np.int32)
    numbers, labels, allowed = np.arange(rows), np.zeros(rows, np.int8), np.ones(rows, bool)
    tracemalloc.start()
    samples = Samples([features], labels, allowed)
    plan = dataclasses.replace(_plan(), samples=samples, rows=numbers)
    for step in (0, plan.steps_per_epoch):  # the second epoch takes the place of the first
        plan.sample_numbers(step)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 10 * rows
    assert peak < 18 * rows
