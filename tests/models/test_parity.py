"""The same mathematics as torch and transformers: logits, gradients, optimizer, loss curves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from support import (
    VOCABULARY,
    Rows,
    Trainer,
    make_params,
    make_samples,
    pack_all,
    random_rows,
    tiny_config,
)

from pref_jax.data.batches import Samples, make_geometry
from pref_jax.models.bert import EncoderConfig
from pref_jax.models.classifiers import PreferenceClassifier
from pref_jax.training.step import make_gradient, make_predict_step
from pref_jax.weights import names

torch = pytest.importorskip("torch", reason="the oracle is torch")
transformers = pytest.importorskip("transformers")

LENGTHS = {
    "single": [[1], [2], [3], [17], [64], [200], [511], [512], [90], [5]],
    "parallel": [[1, 2], [512, 3], [40, 512], [512, 512], [7, 9], [120, 30], [64, 64], [2, 1]],
}


class Oracle(torch.nn.Module):
    """The classifier of the paper in torch, over the encoders of transformers."""

    def __init__(self, config: EncoderConfig, sides: int) -> None:
        super().__init__()
        shared = {"vocab_size": config.vocab_size, "max_position_embeddings": config.max_positions}
        if config.family == "bert":
            self.encoder = transformers.BertModel(
                transformers.BertConfig(
                    **shared,
                    hidden_size=config.hidden_size,
                    num_hidden_layers=config.num_layers,
                    num_attention_heads=config.num_heads,
                    intermediate_size=config.intermediate_size,
                    type_vocab_size=config.type_vocab_size,
                    hidden_dropout_prob=0.0,
                    attention_probs_dropout_prob=0.0,
                ),
                add_pooling_layer=False,
            )
        else:
            self.encoder = transformers.DistilBertModel(
                transformers.DistilBertConfig(
                    **shared,
                    dim=config.hidden_size,
                    n_layers=config.num_layers,
                    n_heads=config.num_heads,
                    hidden_dim=config.intermediate_size,
                    dropout=0.0,
                    attention_dropout=0.0,
                )
            )
        self.family = config.family
        self.head = torch.nn.Linear(sides * config.hidden_size, 3)

    def load(self, params: dict) -> None:
        """Takes the project's parameters, through the key tables that exports use."""
        own = dict(self.encoder.named_parameters())
        for path, value in traverse_util.flatten_dict(params["encoder"], sep="/").items():
            key = names.entry_of(tuple(path.split("/")), self.family).key
            array = np.asarray(value).T if path.endswith("kernel") else np.asarray(value)
            own[key].data = torch.tensor(array)
        self.head.weight.data = torch.tensor(np.asarray(params["head"]["kernel"]).T.copy())
        self.head.bias.data = torch.tensor(np.asarray(params["head"]["bias"]))

    def parameter(self, path: str) -> torch.Tensor:
        if path.startswith("head/"):
            return self.head.weight if path.endswith("kernel") else self.head.bias
        own = dict(self.encoder.named_parameters())
        return own[names.entry_of(tuple(path.removeprefix("encoder/").split("/")), self.family).key]

    def forward(self, rows: Rows, numbers: list[int]) -> torch.Tensor:
        """Logits of rows, padded to the longest: padding is part of what is compared."""
        states = []
        for side in range(rows.sides):
            longest = max(len(rows.ids[n][side]) for n in numbers)
            ids = torch.zeros((len(numbers), longest), dtype=torch.long)
            types, mask = torch.zeros_like(ids), torch.zeros_like(ids)
            for at, number in enumerate(numbers):
                length = len(rows.ids[number][side])
                ids[at, :length] = torch.tensor(rows.ids[number][side])
                types[at, rows.starts[number][side] : length] = 1
                mask[at, :length] = 1
            extra = {"token_type_ids": types} if self.family == "bert" else {}
            output = self.encoder(input_ids=ids, attention_mask=mask, **extra)
            states.append(output.last_hidden_state[:, 0])
        return self.head(torch.cat(states, dim=-1))


def _case(family: str, layout: str) -> tuple[EncoderConfig, Rows, PreferenceClassifier, dict]:
    config = tiny_config(family)
    rows = Rows(LENGTHS[layout])
    model = PreferenceClassifier(config)
    return config, rows, model, make_params(model, rows.sides)


def _relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-12))


@pytest.mark.parametrize("layout", ["single", "parallel"])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_logits_and_gradients_equal_torch(family: str, layout: str) -> None:
    config, rows, model, params = _case(family, layout)
    samples = make_samples(rows)
    update = pack_all(samples, make_geometry(512, rows.sides, packing=True))
    oracle = Oracle(config, rows.sides)
    oracle.load(params)
    logits = oracle(rows, list(range(len(rows.ids))))

    outputs = jax.jit(make_predict_step(model))(params, update)
    for packed, ours in zip(update.buckets, outputs, strict=True):
        filled = packed.samples >= 0
        theirs = logits.detach().numpy()[packed.samples[filled]]
        np.testing.assert_allclose(np.asarray(ours)[filled], theirs, atol=1e-4)

    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(samples.labels))
    loss.backward()
    no_dropout = PreferenceClassifier(
        tiny_config(family, hidden_dropout=0.0, attention_dropout=0.0), head_dropout=0.0
    )
    gradients, sums = jax.jit(make_gradient(no_dropout))(
        params, {}, update, jnp.int32(0), jnp.float32(1.0)
    )
    assert abs(float(sums["loss"]) - float(loss)) < 1e-5
    for path, ours in traverse_util.flatten_dict(gradients, sep="/").items():
        theirs = oracle.parameter(path).grad
        theirs = np.zeros_like(ours) if theirs is None else theirs.numpy()
        theirs = theirs.T if path.endswith("kernel") else theirs
        if path.endswith("key/bias"):
            # Softmax does not see a shift of all keys: the true gradient is zero, rest is rounding.
            assert np.abs(ours).max() < 1e-6
            continue
        assert _relative(np.asarray(ours), theirs) < 1e-3, path


@pytest.mark.parametrize("layout", ["single", "parallel"])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_five_optimizer_steps_equal_torch(family: str, layout: str) -> None:
    config = tiny_config(family, hidden_dropout=0.0, attention_dropout=0.0)
    rows = random_rows(40, 1 if layout == "single" else 2, 48)
    samples = make_samples(rows)
    model = PreferenceClassifier(config, head_dropout=0.0)
    params = make_params(model, rows.sides)
    ours = Trainer(model, samples, longest=48, total_steps=100)
    _, state = ours.losses(params, 5)
    oracle = _train_torch(config, rows, samples, params, ours, 5)[1]
    for path, leaf in traverse_util.flatten_dict(state.params, sep="/").items():
        theirs = oracle.parameter(path).detach().numpy()
        theirs = theirs.T if path.endswith("kernel") else theirs
        if path.endswith("key/bias"):
            continue  # Adam turns the rounding around its zero gradient into full steps
        assert _relative(np.asarray(leaf), theirs) < 1e-3, path


def _train_torch(
    config: EncoderConfig,
    rows: Rows,
    samples: Samples,
    params: dict,
    trainer: Trainer,
    steps: int,
    rate: float = 1e-3,
) -> tuple[list[float], Oracle]:
    oracle = Oracle(config, rows.sides)
    oracle.load(params)
    decayed, others = [], []
    for name, parameter in oracle.named_parameters():
        plain = "bias" in name or "norm" in name.lower()
        (others if plain else decayed).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        lr=rate,
    )
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, 100)
    losses = []
    for number in range(steps):
        numbers = list(trainer.plan.sample_numbers(number))
        logits = oracle(rows, numbers)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(samples.labels[numbers]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(oracle.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss))
    return losses, oracle


def test_minilm_follows_torch_for_fifty_steps(minilm_folder) -> None:
    from pref_jax.weights.huggingface import load_encoder, read_encoder_config

    config = read_encoder_config(minilm_folder)
    config = tiny_config(**{**vars(config), "hidden_dropout": 0.0, "attention_dropout": 0.0})
    rows = random_rows(64, 1, 24)
    for row in rows.ids:
        for ids in row:
            ids *= 300  # spread over the real vocabulary
    assert max(ids.max() for row in rows.ids for ids in row) < VOCABULARY * 300
    samples = make_samples(rows)
    model = PreferenceClassifier(config, head_dropout=0.0)
    trainer = Trainer(
        model,
        samples,
        longest=24,
        batch_size=8,
        total_steps=100,
        microbatch_size=8,
        learning_rate=5e-5,
    )
    params = {
        "encoder": jax.device_get(load_encoder(minilm_folder, trainer.abstract_params["encoder"])),
        "head": make_params(model, 1, spread=0.02)["head"],
    }
    ours, _ = trainer.losses(params, 50)
    theirs, _ = _train_torch(config, rows, samples, params, trainer, 50, rate=5e-5)
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
