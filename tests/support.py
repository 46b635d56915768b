"""Small rows and models that several tests build their cases from."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from pref_jax import mesh as meshes
from pref_jax.data.batches import (
    BatchPlan,
    Geometry,
    Samples,
    Update,
    allocate,
    make_geometry,
    pack,
    write_unit,
)
from pref_jax.experiment import one_tree
from pref_jax.models.bert import EncoderConfig
from pref_jax.models.classifiers import PreferenceClassifier
from pref_jax.training.optimizer import make_optimizer, make_schedule
from pref_jax.training.state import abstract_state, make_create_state, split_parameters
from pref_jax.training.step import make_train_step

VOCABULARY = 97


def tiny_config(family: str = "bert", **changes: Any) -> EncoderConfig:
    values: dict[str, Any] = {
        "family": family,
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 48,
        "max_positions": 512,
        "type_vocab_size": 2 if family == "bert" else 0,
    }
    return EncoderConfig(**(values | changes))


class Rows:
    """Sequences of given lengths, filled with random token numbers; a `SequenceSource`."""

    def __init__(
        self, lengths: Sequence[Sequence[int]], seed: int = 0, *, pools_last: bool = False
    ) -> None:
        self.pools_last = pools_last
        self.lengths = np.array(lengths, np.int32)
        self.sides = self.lengths.shape[1]
        generator = np.random.default_rng(seed)
        self.ids = [
            [generator.integers(1, VOCABULARY, length).astype(np.int32) for length in row]
            for row in self.lengths
        ]
        self.texts = np.repeat(self.lengths, 3 - self.sides, axis=1)
        self.starts = [[max(1, length // 4) for length in row] for row in self.lengths]

    def sequence(self, sample: int, side: int) -> np.ndarray:
        return self.ids[sample][side]

    def type_start(self, sample: int, side: int) -> int:
        return self.starts[sample][side]

    def text_lengths(self, sample: int) -> tuple[int, int]:
        return self.texts[sample][0], self.texts[sample][1]


def make_samples(rows: Rows, seed: int = 0) -> Samples:
    generator = np.random.default_rng(seed + 100)
    labels = generator.integers(0, 3, len(rows.lengths))
    return Samples([rows], labels, np.ones(len(labels), bool))


def random_rows(
    count: int, sides: int, longest: int, seed: int = 0, *, pools_last: bool = False
) -> Rows:
    """Rows with the skewed lengths of real text, a few of them at the limit."""
    generator = np.random.default_rng(seed)
    lengths = np.clip(generator.lognormal(np.log(longest / 4), 0.8, (count, sides)), 3, longest)
    lengths[generator.integers(0, count, max(1, count // 10))] = longest
    return Rows(lengths.astype(int), seed, pools_last=pools_last)


def pack_all(samples: Samples, geometry: Geometry) -> Update:
    """All rows as one update, each unit a microbatch of its own."""
    numbers = np.arange(samples.num_rows)
    units = pack(samples.lengths[numbers].sum(axis=1), numbers, geometry)
    buckets, counts = [], []
    for bucket in range(len(geometry.unit_lengths)):
        mine = [(at, unit) for at, unit in enumerate(units) if unit.bucket == bucket]
        packed = allocate((max(1, len(mine)), 1), geometry, bucket)
        for place, (at, unit) in enumerate(mine):
            write_unit(packed, (place, 0), at, unit, samples)
        buckets.append(packed)
        counts.append(len(mine))
    return Update(
        tuple(buckets), np.array(counts, np.int32), np.float32(len(numbers)), np.uint32(0)
    )


def abstract_tree(model: nn.Module, sides: int, mesh: Mesh) -> Any:
    """Shapes and shardings of all parameters, adapters among them."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    pool = jax.ShapeDtypeStruct((1, 1, sides), jnp.int32)
    lengths = jax.ShapeDtypeStruct((1, 1, 2), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), *[tokens] * 4, pool, lengths)
    return meshes.abstract_parameters(one_tree(variables), mesh)


def make_params(model: PreferenceClassifier, sides: int, seed: int = 0, spread: float = 0.1) -> Any:
    """Random parameters as plain nested numpy arrays; biases and norms are random too."""
    abstract = abstract_tree(model, sides, meshes.make_mesh(devices=jax.devices()[:1]))
    generator = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        center = 1.0 if path[-1].key == "scale" else 0.0
        return (center + spread * generator.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract)


class Trainer:
    """The project's own step over a plan, on a mesh of the first devices."""

    def __init__(
        self,
        model: PreferenceClassifier,
        samples: Samples,
        *,
        longest: int,
        devices: int = 1,
        mesh: tuple[int, int, int] | None = None,
        order: Sequence[int] = range(8),
        microbatch_size: int = 2,
        batch_size: int = 8,
        packing: bool = True,
        learning_rate: float = 1e-3,
        warmup_steps: int = 0,
        total_steps: int = 20,
        seed: int = 3,
        weight_decay: float = 0.01,
        loss_scaling: bool = False,
        average_decay: float = 0.0,
        is_trainable: Callable[[str], bool] = lambda path: True,
    ) -> None:
        sizes = mesh or (devices, 1, 1)
        available = [jax.devices()[number] for number in order[: int(np.prod(sizes))]]
        self.mesh = meshes.make_mesh(*sizes, devices=available)
        geometry = make_geometry(longest, samples.sides, packing=packing)
        self.plan = BatchPlan(
            samples=samples,
            rows=np.arange(samples.num_rows),
            batch_size=batch_size,
            seed=seed,
            swap="none",
            geometry=geometry,
            shards=meshes.batch_shards(self.mesh),
            microbatch_size=microbatch_size,
        )
        schedule = make_schedule("linear", learning_rate, warmup_steps, total_steps)
        self.optimizer = make_optimizer(schedule, weight_decay=weight_decay)
        self.abstract_params = abstract_tree(model, samples.sides, self.mesh)
        self.is_trainable = is_trainable
        self.frozen: Any = {}
        trainable, _ = split_parameters(self.abstract_params, is_trainable)
        self.abstract = abstract_state(
            trainable,
            self.optimizer,
            loss_scaling=loss_scaling,
            averaging=average_decay > 0,
            scalar_sharding=meshes.replicated(self.mesh),
        )
        self.traces = 0
        step = make_train_step(
            model, self.optimizer, schedule, clip_norm=1.0, average_decay=average_decay
        )

        def counted(*arguments: Any) -> Any:
            self.traces += 1
            return step(*arguments)

        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        self.step = jax.jit(counted, donate_argnums=0, out_shardings=(shardings, None))

    def start(self, params: Any) -> Any:
        placed = jax.tree.map(
            lambda leaf, like: meshes.place(np.asarray(leaf), like.sharding),
            params,
            self.abstract_params,
        )
        trainable, self.frozen = split_parameters(placed, self.is_trainable)
        return make_create_state(self.optimizer, self.abstract)(trainable)

    def place(self, update: Update) -> Update:
        from pref_jax.evaluation.predict import place_update

        return place_update(update, self.mesh)

    def losses(self, params: Any, steps: int) -> tuple[list[float], Any]:
        state = self.start(params)
        losses = []
        for number in range(steps):
            state, metrics = self.step(state, self.frozen, self.place(self.plan.update(number)))
            losses.append(float(metrics["loss"]))
        return losses, state
