"""The batch plan: which rows make update number `step`, and how they are packed.

A batch is a function of (seed, step), computed and never iterated, so a resumed run needs no more
than the step, and every host sees the same global batch.

Rows of one update are chosen at random and blind to length. Within the update their sequences are
packed into *units* of a few fixed lengths, first-fit decreasing. A unit holds whole rows (both
sequences of a `parallel` row), and attention stays inside each sequence by segment ids; so the
gradient is the same sum as without packing, with next to no padding and one shape.

Units, not devices or microbatches, carry the random numbers of dropout, and units are numbered
inside the update before they are dealt out to devices: a result does not depend on the machine.
"""

import dataclasses
from collections.abc import Container, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np


class SequenceSource(Protocol):
    """What packing needs of `pref_jax.data.features.Features`."""

    sides: int
    pools_last: bool
    lengths: np.ndarray

    def sequence(self, sample: int, side: int) -> np.ndarray: ...

    def type_start(self, sample: int, side: int) -> int: ...

    def text_lengths(self, sample: int) -> tuple[int, int]: ...


class Samples:
    """Rows to train or score on: features, labels and weights.

    With a second set of features (the same rows with A and B exchanged) sample ``i + n`` is row
    ``i`` in the other order, its label exchanged too; or, paired, a sample is a row in both orders,
    which stand in a unit one behind the other.
    """

    def __init__(
        self,
        features: Sequence[SequenceSource],
        labels: np.ndarray,
        tie_allowed: np.ndarray,
        *,
        teachers: np.ndarray | None = None,
        paired: bool = False,
    ) -> None:
        """Collects the parts.

        Args:
          features: of one or both orders.
          labels: 0, 1, 2 or -1 ``[n]``; with one order also several ratings of a row ``[n, H]``,
            -1 where there is none.
          tie_allowed: bool ``[n]``.
          teachers: soft labels of the first order, float32 ``[n, 3]``; zeros in rows that have
            none, None where no row has.
          paired: whether both orders are the sequences of one sample.
        """
        self._features = tuple(features)
        self._paired = paired
        self.num_rows = len(labels)
        first = self._features[0]
        self.sides = len(self._features) if paired else first.sides
        self.pools_last = first.pools_last
        self.lengths = first.lengths
        if len(self._features) > 1:
            lengths = [feature.lengths for feature in self._features]
            self.lengths = np.concatenate(lengths, axis=1 if paired else 0)
        self.labels, self.tie_allowed, self._teachers = labels, tie_allowed, teachers
        if len(self._features) > 1 and not paired:
            exchanged = np.array([1, 0, 2, -1], labels.dtype)[labels]
            self.labels = np.concatenate([labels, exchanged])
            self.tie_allowed = np.tile(tie_allowed, 2)

    def _place(self, sample: int, side: int) -> tuple[SequenceSource, int, int]:
        if self._paired:
            return self._features[side], sample, 0
        order, row = divmod(sample, self.num_rows)
        return self._features[order], row, side

    def sequence(self, sample: int, side: int) -> np.ndarray:
        features, row, side = self._place(sample, side)
        return features.sequence(row, side)

    def type_start(self, sample: int, side: int) -> int:
        features, row, side = self._place(sample, side)
        return features.type_start(row, side)

    def text_lengths(self, sample: int) -> tuple[int, int]:
        """Tokens of A and of B before cutting."""
        features, row, _ = self._place(sample, 0)
        return features.text_lengths(row)

    def teacher(self, sample: int) -> np.ndarray | None:
        """Soft labels ``[3]`` in the sample's order; None where nobody has any."""
        if self._teachers is None:
            return None
        order, row = divmod(sample, self.num_rows)
        return self._teachers[row][[1, 0, 2]] if order else self._teachers[row]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Shapes of packed units.

    Attributes:
      unit_lengths: lengths of units in tokens, ascending; the longest holds any row.
      rows_per_unit: the most rows a unit of each length may hold.
      sides: sequences per row.
      label_shape: of one row's labels: () for a class, (H,) for H ratings.
    """

    unit_lengths: tuple[int, ...]
    rows_per_unit: tuple[int, ...]
    sides: int
    label_shape: tuple[int, ...] = ()


# Tokens of room per row slot of a unit. Shorter rows are rare; they fill the slots first.
_TOKENS_PER_ROW_SLOT = 16


def make_geometry(
    max_length: int, sides: int, *, packing: bool, label_shape: tuple[int, ...] = ()
) -> Geometry:
    """Chooses unit lengths for a layout.

    Packed `single` rows go into units of ``max_length``. A `parallel` row may need twice that, but
    most need less: two unit lengths waste less padding and attend over shorter units (5.0 % against
    6.7 % padding with 1,926 real rows at 512 tokens, batches of 32).

    Without packing each row has a unit to itself, in one of a few bucket lengths.
    """
    longest = max_length * sides
    if packing:
        lengths = (max_length, longest) if sides > 1 else (longest,)
        rows = tuple(max(1, length // (_TOKENS_PER_ROW_SLOT * sides)) for length in lengths)
        return Geometry(lengths, rows, sides, label_shape)
    buckets = sorted({longest, *(-(-longest // parts) for parts in (2, 4))})
    return Geometry(tuple(buckets), (1,) * len(buckets), sides, label_shape)


class Unit(NamedTuple):
    """Rows that share one unit; ``bucket`` is the number of its length in the geometry."""

    bucket: int
    samples: list[int]


def pack(totals: np.ndarray, samples: np.ndarray, geometry: Geometry) -> list[Unit]:
    """Packs rows into units, longest row first, each into the fullest unit with room.

    Args:
      totals: tokens of each row over all its sequences ``[n]``.
      samples: the rows' numbers ``[n]``.
      geometry: lengths and row limits.

    Returns:
      Units in a fixed order; every sample in exactly one.
    """
    longest = geometry.unit_lengths[-1]
    # open_units[room] are the units with exactly that much room left: best fit without a search
    # through all units, which is what keeps packing a whole file linear.
    open_units: list[list[int]] = [[] for _ in range(longest + 1)]
    rooms = 0  # bit r: whether open_units[r] has any; finds the fullest without looking at all
    units: list[Unit] = []
    for at in np.lexsort((samples, -totals)):
        total = int(totals[at])
        fitting = rooms >> total
        if not fitting:
            bucket = int(np.searchsorted(geometry.unit_lengths, total))
            room = geometry.unit_lengths[bucket]
            number = len(units)
            units.append(Unit(bucket, []))
        else:
            room = total + (fitting & -fitting).bit_length() - 1
            number = open_units[room].pop()
            if not open_units[room]:
                rooms ^= 1 << room
        unit = units[number]
        unit.samples.append(int(samples[at]))
        if len(unit.samples) < geometry.rows_per_unit[unit.bucket]:
            open_units[room - total].append(number)
            rooms |= 1 << (room - total)
    return units


# Arrays on the host, on devices, traced, or abstract: packed units are a pytree.
Array = TypeVar("Array")


class Packed(NamedTuple, Generic[Array]):
    """Packed units as arrays; leading axes ``[K, B]`` (microbatch, unit) or ``[B]``.

    Attributes:
      input_ids, token_types, positions, segment_ids: int32 ``[..., T]``. Segment 0 is padding.
      pool_positions: int32 ``[..., R, S]``, the token that each of a row's sequences is judged by.
      text_lengths: int32 ``[..., R, 2]``, tokens of A and B before cutting.
      unit_ids: int32 ``[...]``, number of the unit inside the update.
      samples: int32 ``[..., R]``, sample numbers, -1 in empty slots.
      labels: int32 ``[..., R]``, or ``[..., R, H]`` with H ratings a row.
      teachers: float32 ``[..., R, 3]``, soft labels; zeros where there are none.
      weights: float32 ``[..., R]``, 0 in empty slots.
      tie_allowed: bool ``[..., R]``.
    """

    input_ids: Array
    token_types: Array
    positions: Array
    segment_ids: Array
    pool_positions: Array
    text_lengths: Array
    unit_ids: Array
    samples: Array
    labels: Array
    teachers: Array
    weights: Array
    tie_allowed: Array


def allocate(shape: tuple[int, ...], geometry: Geometry, bucket: int) -> Packed[np.ndarray]:
    """Units of padding, of the geometry's length number ``bucket``."""
    length, rows = geometry.unit_lengths[bucket], geometry.rows_per_unit[bucket]

    def tokens() -> np.ndarray:
        return np.zeros((*shape, length), np.int32)

    return Packed(
        input_ids=tokens(),
        token_types=tokens(),
        positions=tokens(),
        segment_ids=tokens(),
        pool_positions=np.zeros((*shape, rows, geometry.sides), np.int32),
        text_lengths=np.zeros((*shape, rows, 2), np.int32),
        unit_ids=np.zeros(shape, np.int32),
        samples=np.full((*shape, rows), -1, np.int32),
        labels=np.zeros((*shape, rows, *geometry.label_shape), np.int32),
        teachers=np.zeros((*shape, rows, 3), np.float32),
        weights=np.zeros((*shape, rows), np.float32),
        tie_allowed=np.ones((*shape, rows), np.bool_),
    )


# Per bucket the columns of the unit axis that live on this host's devices; None: all.
Held = Sequence[Container[int]]


def write_unit(
    packed: Packed[np.ndarray],
    at: tuple[int, ...],
    unit_id: int,
    unit: Unit,
    samples: Samples,
    *,
    read: bool = True,
) -> None:
    """Writes one unit's rows into ``packed[at]``; without ``read`` all but their tokens."""
    input_ids, token_types, positions, segment_ids = (field[at] for field in packed[:4])
    packed.unit_ids[at] = unit_id
    start, segment = 0, 0
    for slot, sample in enumerate(unit.samples):
        packed.samples[at][slot] = sample
        packed.text_lengths[at][slot] = samples.text_lengths(sample)
        packed.labels[at][slot] = samples.labels[sample]
        if (teacher := samples.teacher(sample)) is not None:
            packed.teachers[at][slot] = teacher
        packed.weights[at][slot] = 1.0
        packed.tie_allowed[at][slot] = samples.tie_allowed[sample]
        if not read:
            continue
        for side in range(samples.sides):
            ids = samples.sequence(sample, side)
            stop = start + len(ids)
            segment += 1
            input_ids[start:stop] = ids
            token_types[start + samples.type_start(sample, side) : stop] = 1
            positions[start:stop] = np.arange(len(ids))
            segment_ids[start:stop] = segment
            packed.pool_positions[at][slot, side] = stop - 1 if samples.pools_last else start
            start = stop


class Update(NamedTuple, Generic[Array]):
    """One optimizer update: per bucket length the packed microbatches ``[K, B, ...]``.

    ``num_microbatches`` ``[buckets]`` says how many of each bucket's K are in use,
    ``total_weight`` is the sum of all rows' weights. ``seed``, uint32, is what dropout is drawn
    from; as data and not part of the program, so that runs of several seeds compile once.
    """

    buckets: tuple[Packed[Array], ...]
    num_microbatches: Array
    total_weight: Array
    seed: Array


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """Which rows make which update, as a function of (seed, step).

    Attributes:
      samples: what to draw from.
      rows: numbers of the rows to train on.
      batch_size: rows per update over all devices.
      seed: the run's seed.
      swap: "none", "augment" (each row in a random order per epoch) or "both" (each row in both
        orders in one update); the last two need samples of both orders.
      geometry: shapes of units.
      shards: devices that share the batch axis.
      microbatch_size: sequences of ``max_length`` per device and forward pass.
      held: the units whose tokens this host reads. Where a unit goes follows from the lengths of
        all rows, so hosts agree without a word.
    """

    samples: Samples
    rows: np.ndarray
    batch_size: int
    seed: int
    swap: str
    geometry: Geometry
    shards: int
    microbatch_size: int
    held: Held | None = None

    @property
    def steps_per_epoch(self) -> int:
        """The last update of an epoch may be smaller; no row is dropped or repeated."""
        return -(-len(self.rows) // self.batch_size)

    @cached_property
    def _orders(self) -> dict[int, np.ndarray]:
        return {}

    def _epoch(self, epoch: int) -> np.ndarray:
        """Sample numbers of one epoch in order; "both" is added per update."""
        order = self._orders.get(epoch)
        if order is None:
            generator = np.random.default_rng([self.seed, epoch])
            order = self.rows.copy()  # eight bytes a row, shuffled in place
            generator.shuffle(order)
            if self.swap == "augment":
                order = order + self.samples.num_rows * generator.integers(0, 2, len(order))
            self._orders.clear()  # only the epoch at hand, whatever the number of rows
            self._orders[epoch] = order
        return order

    def sample_numbers(self, step: int) -> np.ndarray:
        """Samples of update ``step`` (from 0)."""
        epoch, part = divmod(step, self.steps_per_epoch)
        numbers = self._epoch(epoch)[part * self.batch_size : (part + 1) * self.batch_size]
        if self.swap == "both":
            numbers = np.concatenate([numbers, numbers + self.samples.num_rows])
        return numbers

    def shapes(self) -> tuple[tuple[int, int], ...]:
        """``(K, B)`` of each bucket, see `update_shapes`."""
        samples = self.batch_size * (2 if self.swap == "both" else 1)
        return update_shapes(self.geometry, samples, self.shards, self.microbatch_size)

    def update(self, step: int) -> Update[np.ndarray]:
        """Packs update ``step``."""
        numbers = self.sample_numbers(step)
        units = pack(self.samples.lengths[numbers].sum(axis=1), numbers, self.geometry)
        buckets = tuple(
            allocate(shape, self.geometry, bucket) for bucket, shape in enumerate(self.shapes())
        )
        used = [0] * len(buckets)
        for unit_id, unit in enumerate(units):
            packed = buckets[unit.bucket]
            at = divmod(used[unit.bucket], packed.unit_ids.shape[1])
            read = self.held is None or at[1] in self.held[unit.bucket]
            write_unit(packed, at, unit_id, unit, self.samples, read=read)
            used[unit.bucket] += 1
        counts = [
            -(-number // packed.unit_ids.shape[1])
            for number, packed in zip(used, buckets, strict=True)
        ]
        return Update(
            buckets,
            np.array(counts, np.int32),
            np.array(len(numbers), np.float32),
            np.array(self.seed, np.uint32),
        )


def update_shapes(
    geometry: Geometry, samples: int, shards: int, microbatch_size: int
) -> tuple[tuple[int, int], ...]:
    """Shapes ``(K, B)`` of an update's units: microbatches, and units in each over all devices.

    Args:
      geometry: unit lengths.
      samples: the most rows of an update; K has room for the worst case, each in its own unit.
      shards: devices that share the batch axis.
      microbatch_size: sequences of ``max_length`` per device and forward pass.
    """
    sequence = geometry.unit_lengths[-1] // geometry.sides
    units = [
        shards * max(1, microbatch_size * sequence // length) for length in geometry.unit_lengths
    ]
    return tuple((-(-samples // unit), unit) for unit in units)


def prediction_batches(
    samples: Samples,
    numbers: np.ndarray,
    geometry: Geometry,
    shapes: Sequence[tuple[int, int]],
    held: Held | None = None,
) -> Iterator[Update[np.ndarray]]:
    """Packs a whole file for prediction, ``shapes`` ``(K, B)`` units of each length at a time.

    Packing over thousands of rows at once leaves hardly any padding; a window of rows at a time
    keeps memory flat. Only the last batch has microbatches that are not full. With ``held`` the
    tokens of other units are not read.
    """
    waiting: list[list[Unit]] = [[] for _ in geometry.unit_lengths]

    def emit(counts: list[int]) -> Update[np.ndarray]:
        buckets = []
        for bucket, (shape, count) in enumerate(zip(shapes, counts, strict=True)):
            packed = allocate(shape, geometry, bucket)
            taken = waiting[bucket][: count * shape[1]]
            del waiting[bucket][: count * shape[1]]
            for number, unit in enumerate(taken):
                at = divmod(number, shape[1])
                read = held is None or at[1] in held[bucket]
                write_unit(packed, at, number, unit, samples, read=read)
            buckets.append(packed)
        return Update(
            tuple(buckets),
            np.array(counts, np.int32),
            np.array(1.0, np.float32),
            np.array(0, np.uint32),  # no dropout here
        )

    window = 4096
    for start in range(0, len(numbers), window):
        part = np.asarray(numbers[start : start + window])
        for unit in pack(samples.lengths[part].sum(axis=1), part, geometry):
            waiting[unit.bucket].append(unit)
        full = [len(units) // shape[1] for units, shape in zip(waiting, shapes, strict=True)]
        while any(count >= shape[0] for count, shape in zip(full, shapes, strict=True)):
            yield emit([min(count, shape[0]) for count, shape in zip(full, shapes, strict=True)])
            full = [len(units) // shape[1] for units, shape in zip(waiting, shapes, strict=True)]
    while any(waiting):
        yield emit(
            [
                min(-(-len(units) // shape[1]), shape[0])
                for units, shape in zip(waiting, shapes, strict=True)
            ]
        )


def padding_fraction(updates: Iterable[Update[np.ndarray]]) -> float:
    """Share of the tokens computed that are padding, empty units of used microbatches included."""
    computed = real = 0
    for update in updates:
        for packed, count in zip(update.buckets, update.num_microbatches, strict=True):
            segments = packed.segment_ids[: int(count)]
            computed += segments.size
            real += int(np.count_nonzero(segments))
    return 1.0 - real / max(computed, 1)
