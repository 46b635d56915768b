"""Makes what both sides of a race start from: rows, token sequences, initial weights.

The other side reads the very token ids that our features hold, in the order of our updates, and
the very weights that our run starts with, head included.
"""

import csv
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from pref_jax.config import training_data
from pref_jax.data.arena import Comparisons, iterate_cells, read_comparisons
from pref_jax.data.features import TEXTS as TEXT_COLUMNS
from pref_jax.errors import InputError
from pref_jax.experiment import Experiment, find_backbone, read_config
from pref_jax.files import write_json
from pref_jax.models.llama import LlamaConfig
from pref_jax.race import turn
from pref_jax.training.run import make_plan
from pref_jax.training.workdir import describe_environment

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from pref_jax.data.batches import Samples

# Rows to tokenise: enough for seconds of work, whatever the file.
MOST_TEXTS = 4096


def texts_to_tokenise(config: "ConfigDict", source: str) -> Comparisons:
    """The first rows of the data file, with a digest of their own."""
    comparisons = read_comparisons(source, labelled=True)
    table = comparisons.table.slice(0, MOST_TEXTS)
    return dataclasses.replace(comparisons, table=table, digest=f"{comparisons.digest}-race")


def prepare(folder: Path, job: dict[str, Any], _: float) -> dict[str, Any]:
    """Fills ``folder``; returns what the turns need to know beside its files."""
    config = read_config(folder)
    source = training_data(config)
    comparisons = read_comparisons(source, labelled=True)
    batch = config.train.batch_size
    rows = choose_rows(comparisons, min(job["rows"], len(comparisons)), batch, config.seed)
    write_rows(source, rows, folder / turn.ROWS)
    config.data.train, config.data.valid = str(folder / turn.ROWS), None
    write_json(folder / "config.json", config.to_dict())

    chosen = read_comparisons(config.data.train, labelled=True)
    experiment = Experiment(config, find_backbone(config, chosen))
    samples = experiment.make_samples(chosen)
    plan = make_plan(experiment, samples, np.arange(len(chosen)))
    order = np.concatenate([plan.sample_numbers(step) for step in range(plan.steps_per_epoch)])
    write_sequences(samples, order, folder / turn.SEQUENCES)
    export_start(experiment, folder / turn.MODEL)
    table = texts_to_tokenise(config, source).table
    texts = {name: table.column(name).to_pylist() for name in TEXT_COLUMNS}
    (folder / turn.TEXTS).write_text(json.dumps(texts), encoding="utf-8")

    lora, train = config.model.lora, config.train
    lengths = samples.lengths.astype(float)
    return {
        "source": source,
        "rows": len(order),
        "decoder": experiment.is_decoder,
        "platform": experiment.mesh.devices.flat[0].platform,
        "precision": str(experiment.precision.compute),
        "tokens_per_row": float(lengths.sum(axis=1).mean()),
        "longest_row": int(lengths.max()),
        "parameters": experiment.count_parameters(),
        "lora": None
        if not lora.rank
        else {
            "r": lora.rank,
            "lora_alpha": float(lora.alpha),
            "lora_dropout": float(lora.dropout),
            "use_rslora": bool(lora.rank_stabilised),
            "target_modules": list(experiment.model.lora.targets),
        },
        "batch_size": batch,
        "learning_rate": train.learning_rate,
        "weight_decay": train.weight_decay,
        "warmup_steps": train.warmup_steps,
        "schedule": train.schedule,
        "clip_norm": train.clip_norm,
        "remat": train.remat != "none",
        "seed": config.seed,
        "environment": describe_environment(jax.devices()),
    }


def choose_rows(comparisons: Comparisons, wanted: int, batch: int, seed: int) -> np.ndarray:
    """Random rows in file order, whole updates of them; only those that may be called a tie,

    since the other side knows three classes and no mask.
    """
    able = np.flatnonzero(comparisons.tie_allowed)
    count = min(wanted, len(able))
    count -= count % batch
    if not count:
        raise InputError(
            comparisons.path,
            f"{min(wanted, len(able))} rows are less than an update of {batch}",
            "give more --rows, or a smaller --config.train.batch_size",
        )
    return np.sort(np.random.default_rng([seed, 1]).permutation(able)[:count])


def write_rows(source: str, rows: np.ndarray, path: Path) -> None:
    """Copies rows of a data file, so that nothing of the others is read or tokenised."""
    wanted = set(rows.tolist())

    def plain(cell: Any) -> Any:
        return json.dumps(cell) if isinstance(cell, list) else cell

    with path.open("w", encoding="utf-8", errors="surrogatepass", newline="") as file:
        writer = None
        for number, cells in enumerate(iterate_cells(source)):
            if writer is None:
                writer = csv.DictWriter(file, list(cells))
                writer.writeheader()
            if number in wanted:
                writer.writerow({name: plain(cell) for name, cell in cells.items()})


def write_sequences(samples: "Samples", order: np.ndarray, path: Path) -> None:
    """Token ids, labels and numbers of samples, in the order of an epoch's updates."""
    places = [(sample, side) for sample in order for side in range(samples.sides)]
    sequences = [samples.sequence(int(sample), side) for sample, side in places]
    np.savez(
        path,
        ids=np.concatenate(sequences),
        lengths=np.array([len(sequence) for sequence in sequences]),
        type_starts=np.array([samples.type_start(int(sample), side) for sample, side in places]),
        labels=samples.labels[order],
        samples=order,
        sides=samples.sides,
    )


def export_start(experiment: Experiment, output: Path) -> None:
    """The model as training finds it, as a folder for transformers.

    A decoder's adapters add nothing yet, so the folder holds base and head in the precision of the
    base.
    """
    params = experiment.initial_params()
    architecture = experiment.backbone.architecture
    common: dict[str, Any] = {
        "layout": experiment.layout,
        "tokenizer_folder": experiment.backbone.tokenizer_folder,
        "temperature": 1.0,
        "examples": [],
        "head": experiment.head,
    }
    if isinstance(architecture, LlamaConfig):
        from pref_jax.weights.adapters import export_merged

        base = experiment.precision.compute if experiment.model.lora else "float32"
        export_merged(
            output,
            params=params,
            config=architecture,
            lora=experiment.model.lora,
            dtype=str(base),
            **common,
        )
        return
    from pref_jax.weights.export import export_encoder

    export_encoder(
        output,
        params=jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params),
        config=architecture,
        dropout=float(experiment.config.model.head_dropout),
        pooling=experiment.config.model.pooling,
        **common,
    )


if __name__ == "__main__":
    turn.serve(prepare)
