"""One update is the same mathematics on any shape of machine, packed or not."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util
from support import (
    Rows,
    Trainer,
    make_params,
    make_samples,
    pack_all,
    random_rows,
    tiny_config,
)

from pref_jax.data.batches import make_geometry
from pref_jax.models.classifiers import PreferenceClassifier
from pref_jax.training.state import split_parameters, trainable_above
from pref_jax.training.step import make_gradient, make_predict_step

STEPS = 20
ROWS = {sides: random_rows(40, sides, 32) for sides in (1, 2)}


@pytest.fixture(scope="module")
def reference() -> dict[int, list[float]]:
    """Losses of one device with microbatches of two sequences, dropout on."""
    return {sides: _losses(sides, microbatch_size=2) for sides in (1, 2)}


def _losses(sides: int, **changes) -> list[float]:
    model = PreferenceClassifier(tiny_config())
    trainer = Trainer(model, make_samples(ROWS[sides]), longest=32, **changes)
    losses, _ = trainer.losses(make_params(model, sides), STEPS)
    assert trainer.traces == 1  # updates of all sizes run one program
    return losses


@pytest.mark.parametrize(
    ("sides", "mesh", "microbatch_size"),
    [
        (1, (1, 1, 1), 1),
        (1, (1, 1, 1), 4),
        (1, (1, 1, 1), 16),
        (1, (8, 1, 1), 1),
        (1, (2, 4, 1), 4),
        (1, (2, 2, 2), 2),
        (2, (8, 1, 1), 1),
        (2, (2, 2, 2), 16),
    ],
)
def test_losses_do_not_depend_on_the_machine(reference, sides, mesh, microbatch_size) -> None:
    losses = _losses(sides, mesh=mesh, microbatch_size=microbatch_size)
    np.testing.assert_allclose(losses, reference[sides], atol=1e-5)


def test_dropout_is_on_in_training_and_changes_with_the_seed(reference) -> None:
    other = _losses(1, seed=4)
    assert np.abs(np.array(other) - reference[1]).max() > 1e-3
    model = PreferenceClassifier(
        tiny_config(hidden_dropout=0.0, attention_dropout=0.0), head_dropout=0.0
    )
    trainer = Trainer(model, make_samples(ROWS[1]), longest=32)
    without, _ = trainer.losses(make_params(model, 1), 1)
    assert abs(without[0] - reference[1][0]) > 1e-4


@pytest.mark.parametrize("sides", [1, 2])
def test_packing_changes_nothing(sides: int) -> None:
    model = PreferenceClassifier(
        tiny_config(hidden_dropout=0.0, attention_dropout=0.0), head_dropout=0.0
    )
    lengths = [[1] * sides, [2] * sides, [31] * sides, [32] * sides, [9, 30][:sides]]
    rows = Rows(lengths + [[5 + n % 13] * sides for n in range(20)])
    samples = make_samples(rows)
    params = make_params(model, sides)
    results = []
    for packing in (True, False):
        update = pack_all(samples, make_geometry(32, sides, packing=packing))
        gradients, sums = jax.jit(make_gradient(model))(
            params, {}, update, np.int32(0), np.float32(1)
        )
        logits = np.zeros((samples.num_rows, 3))
        outputs = jax.jit(make_predict_step(model))(params, update)
        for packed, part in zip(update.buckets, outputs, strict=True):
            filled = packed.samples >= 0
            logits[packed.samples[filled]] = np.asarray(part)[filled]
        results.append((gradients, float(sums["loss"]), logits))
    (packed_gradients, packed_loss, packed_logits), (gradients, loss, logits) = results
    assert abs(packed_loss - loss) < 1e-5
    np.testing.assert_allclose(packed_logits, logits, atol=1e-5)
    for path, leaf in traverse_util.flatten_dict(gradients, sep="/").items():
        ours = traverse_util.flatten_dict(packed_gradients, sep="/")[path]
        np.testing.assert_allclose(ours, leaf, atol=1e-5, err_msg=path)


def test_neighbours_in_a_unit_do_not_show() -> None:
    model = PreferenceClassifier(tiny_config())
    params = make_params(model, 1)
    predict = jax.jit(make_predict_step(model))
    logits = []
    for seed in (1, 2):
        rows = Rows([[7], [9], [12]], seed=seed)
        rows.ids[0][0][:] = np.arange(7) + 1  # the same first row among other neighbours
        update = pack_all(make_samples(rows), make_geometry(32, 1, packing=True))
        packed = update.buckets[0]
        slot = tuple(np.argwhere(packed.samples == 0)[0])
        logits.append(np.asarray(predict(params, update)[0])[slot])
    # Masked scores give exactly zero weights, so not even rounding tells of neighbours.
    np.testing.assert_array_equal(logits[0], logits[1])


def test_short_groups_count_by_their_rows() -> None:
    """37 rows in batches of 32: the loss of the last update is the mean over its five rows."""
    model = PreferenceClassifier(
        tiny_config(hidden_dropout=0.0, attention_dropout=0.0), head_dropout=0.0
    )
    samples = make_samples(random_rows(37, 1, 32))
    params = make_params(model, 1)
    trainer = Trainer(model, samples, longest=32, batch_size=32, microbatch_size=4)
    assert trainer.plan.steps_per_epoch == 2
    state = trainer.start(params)
    _, metrics = trainer.step(state, {}, trainer.place(trainer.plan.update(1)))
    numbers = trainer.plan.sample_numbers(1)
    assert len(numbers) == 5
    update = pack_all(samples, make_geometry(32, 1, packing=False))
    losses = np.zeros(37)
    outputs = jax.jit(make_predict_step(model))(params, update)
    for packed, part in zip(update.buckets, outputs, strict=True):
        for at in np.argwhere(packed.samples >= 0):
            row = np.asarray(part)[tuple(at)].astype(np.float64)
            label = packed.labels[tuple(at)]
            losses[packed.samples[tuple(at)]] = np.log(np.exp(row).sum()) - row[label]
    assert abs(float(metrics["loss"]) - losses[numbers].mean()) < 1e-5


def test_float16_scale_skips_overflow_and_recovers() -> None:
    import jax.numpy as jnp

    model = PreferenceClassifier(tiny_config(), dtype=jnp.float16)
    trainer = Trainer(model, make_samples(ROWS[1]), longest=32, loss_scaling=True)
    state = trainer.start(make_params(model, 1))
    scale = state.loss_scale
    state = state.replace(loss_scale=scale.replace(scale=jnp.float32(2.0**40)))
    before = jax.device_get(state.params)
    scales = []
    for number in range(30):
        state, metrics = trainer.step(state, {}, trainer.place(trainer.plan.update(number % 5)))
        scales.append(float(metrics["loss_scale"]))
        if number == 0:
            for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True):
                np.testing.assert_array_equal(a, b)  # an overflow changes nothing but the scale
    assert scales[1] == scales[0] / 2
    assert np.isfinite(float(metrics["loss"])) and np.isfinite(float(metrics["gradient_norm"]))
    assert scales[-1] == scales[-2]  # the search has ended


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_recomputes_and_changes_nothing(reference, remat: str) -> None:
    model = PreferenceClassifier(tiny_config(), remat=remat)
    samples = make_samples(ROWS[1])
    params = make_params(model, 1)
    losses, _ = Trainer(model, samples, longest=32).losses(params, 3)
    np.testing.assert_allclose(losses, reference[1][:3], atol=1e-5)

    update = pack_all(samples, make_geometry(32, 1, packing=True))
    arguments = (params, {}, update, np.int32(0), np.float32(1))

    def exponentials(model: PreferenceClassifier) -> int:
        """Softmax is in the forward pass alone, so another one is a layer computed again."""
        return str(jax.make_jaxpr(make_gradient(model))(*arguments)).count(" exp ")

    assert exponentials(model) > exponentials(PreferenceClassifier(tiny_config()))


def test_attention_by_segment_follows_the_plain_one(reference) -> None:
    for sides in (1, 2):
        model = PreferenceClassifier(tiny_config(), attention="segments", longest=32)
        trainer = Trainer(model, make_samples(ROWS[sides]), longest=32)
        losses, _ = trainer.losses(make_params(model, sides), STEPS)
        np.testing.assert_allclose(losses, reference[sides], atol=1e-5)


@pytest.mark.parametrize(
    ("pooling", "frozen_layers", "remat"),
    [("cls", 0, "none"), ("cls_mean", 1, "none"), ("cls", 3, "full")],
)
def test_layers_in_a_scan_have_the_gradients_of_single_ones(
    pooling: str, frozen_layers: int, remat: str
) -> None:
    """One CPU device scans the layers; others compute them one by one."""
    config = tiny_config(num_layers=3)
    update = pack_all(make_samples(ROWS[1]), make_geometry(32, 1, packing=True))

    def gradient(attention: str, **changes: Any) -> tuple[Any, int]:
        model = PreferenceClassifier(
            config,
            pooling=pooling,
            attention=attention,
            longest=32,
            frozen_layers=frozen_layers,
            **changes,
        )
        trainable, frozen = split_parameters(make_params(model, 1), trainable_above(frozen_layers))
        function = make_gradient(model)
        arguments = (trainable, frozen, update, np.int32(3), np.float32(1))
        jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
        return jax.jit(function)(*arguments)[0], _count_products(jaxpr)

    plain, products = gradient("xla")
    scanned, scanned_products = gradient("segments", remat=remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), plain, scanned)
    if remat == "none":
        # Segments compute their scores again, once a layer; of frozen layers no gradient is taken.
        layers = 2 if pooling == "cls" else 3
        assert scanned_products == products + layers * len(update.buckets)


def _count_products(jaxpr: Any) -> int:
    """Matrix products that a program computes, those of a scan in each turn."""
    count = 0
    for equation in jaxpr.eqns:
        inner = 0
        for value in jax.tree.leaves(list(equation.params.values())):
            inside = getattr(value, "jaxpr", value)
            if hasattr(inside, "eqns"):
                inner += _count_products(inside)
        turns = equation.params["length"] if equation.primitive.name == "scan" else 1
        count += (equation.primitive.name == "dot_general") + turns * inner
    return count


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("attention", ["xla", "segments"])
def test_low_precision_stays_near_float32(dtype: str, attention: str) -> None:
    samples = make_samples(ROWS[2])
    update = pack_all(samples, make_geometry(32, 2, packing=True))
    exact = PreferenceClassifier(tiny_config())
    low = PreferenceClassifier(
        tiny_config(), dtype=np.dtype(dtype), attention=attention, longest=32
    )
    params = make_params(exact, 2)
    outputs = [jax.jit(make_predict_step(model))(params, update) for model in (exact, low)]
    for packed, a, b in zip(update.buckets, *outputs, strict=True):
        filled = packed.samples >= 0
        difference = np.abs(np.asarray(a)[filled] - np.asarray(b)[filled])
        assert difference.max() < (0.06 if dtype == "bfloat16" else 0.01)
        assert difference.max() > 0  # it really computes in another precision


def test_another_seed_runs_the_program_that_is_there() -> None:
    model = PreferenceClassifier(tiny_config())
    trainer = Trainer(model, make_samples(ROWS[1]), longest=32)
    params = make_params(model, 1)
    update = trainer.plan.update(0)
    losses = []
    for seed in (3, 4, 3):
        placed = trainer.place(update._replace(seed=np.uint32(seed)))
        _, metrics = trainer.step(trainer.start(params), trainer.frozen, placed)
        losses.append(float(metrics["loss"]))
    assert losses[0] == losses[2] != losses[1]
    assert trainer.traces == 1


def test_the_average_follows_the_weights_and_is_what_is_judged() -> None:
    model = PreferenceClassifier(tiny_config())
    decay = 0.3  # more than the first updates' (1 + n) / (10 + n), less than the later ones'
    trainer = Trainer(model, make_samples(ROWS[1]), longest=32, average_decay=decay)
    state = trainer.start(make_params(model, 1))
    expected = {
        path: np.asarray(leaf, np.float64)
        for path, leaf in traverse_util.flatten_dict(state.params, sep="/").items()
    }
    for number in range(6):
        state, _ = trainer.step(state, {}, trainer.place(trainer.plan.update(number % 5)))
        rate = min(decay, (1 + number) / (10 + number))
        for path, leaf in traverse_util.flatten_dict(state.params, sep="/").items():
            expected[path] = rate * expected[path] + (1 - rate) * np.asarray(leaf, np.float64)
    judged = traverse_util.flatten_dict(state.judged, sep="/")
    assert state.judged is state.average and set(judged) == set(expected)
    for path, leaf in judged.items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-6, err_msg=path)
    moved = max(
        np.abs(np.asarray(a) - b).max()
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(state.average), strict=True)
    )
    assert moved > 1e-4
