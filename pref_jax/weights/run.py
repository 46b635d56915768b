"""Exports the best checkpoint of a run."""

import copy
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pref_jax.errors import InputError
from pref_jax.weights.examples import describe_rows, write_rows
from pref_jax.weights.export import check_output, export_encoder

if TYPE_CHECKING:
    from pref_jax.experiment import Run
    from pref_jax.models.llama import LlamaConfig

logger = logging.getLogger(__name__)


def export_run(
    workdir: str | Path, output: Path, *, merge: bool = False, base: str | None = None
) -> Path:
    """Writes the best checkpoint of `workdir` for other programs; returns the folder written.

    Args:
      workdir: the run.
      output: the folder to write.
      merge: of a decoder, write the whole model instead of the adapters.
      base: where the frozen weights of the run are now, if they moved.

    Raises:
      InputError: the workdir holds no trained run, or the output folder holds something else.
      RunError: writing failed.
    """
    from pref_jax.experiment import load_run

    check_output(output)  # before the work of loading a run
    return export_loaded(load_run(workdir, base=base), output, merge=merge)


def export_loaded(run: "Run", output: Path, *, merge: bool = False) -> Path:
    """`export_run` of a run that is loaded already."""
    import jax
    import numpy as np

    from pref_jax.models.llama import LlamaConfig

    experiment = run.experiment
    if experiment.properties is not None:
        raise InputError(
            str(run.workdir),
            "is a multi-task run, which knows no preferences",
            "export a run that started from it (--config.model.init_from)",
        )
    architecture = experiment.backbone.architecture
    if isinstance(architecture, LlamaConfig):
        _export_decoder(run, architecture, output, merge=merge)
        return output
    if merge:
        raise InputError(
            "--merge", "only a decoder has adapters to merge", "leave it away for an encoder"
        )
    export_encoder(
        output,
        params=jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), run.params),
        config=architecture,
        layout=experiment.layout,
        tokenizer_folder=experiment.backbone.tokenizer_folder,
        temperature=run.temperature,
        examples=made_up_rows(run),
        dropout=float(experiment.config.model.head_dropout),
        head=experiment.head,
        pooling=experiment.config.model.pooling,
        length_features=experiment.config.model.length_features,
    )
    return output


def _export_decoder(run: "Run", architecture: "LlamaConfig", output: Path, *, merge: bool) -> None:
    from pref_jax.weights.adapters import export_adapter, export_merged

    experiment = run.experiment
    common: dict[str, Any] = {
        "params": run.params,
        "lora": experiment.model.lora,
        "layout": experiment.layout,
        "tokenizer_folder": experiment.backbone.tokenizer_folder,
        "temperature": run.temperature,
        "examples": made_up_rows(run),
        "head": experiment.head,
    }
    if merge or experiment.model.lora is None:
        export_merged(
            output,
            config=architecture,
            dtype=str(experiment.precision.compute),
            **common,
        )
    else:
        quantization = experiment.config.model.quantization
        base = experiment.backbone.base
        export_adapter(output, base=base["source"], quantization=quantization, **common)
        if quantization != "none":
            logger.warning(
                "the adapters were trained on an %s base, as the examples say: on the full weights "
                "probabilities differ in the third digit; --merge writes what the run computes",
                quantization,
            )
        if base["kind"] == "random":
            logger.warning("the base is random and in no folder; --merge writes the whole model")


def made_up_rows(run: "Run") -> list[dict[str, Any]]:
    """The export's examples, with the probabilities that `predict` gives (temperature applied).

    An encoder's are computed in float32 whatever the run's precision, as a check by other programs
    has to be; a decoder may be too large for that.
    """
    import jax
    import numpy as np

    from pref_jax.data.arena import read_comparisons
    from pref_jax.evaluation.predict import to_probabilities
    from pref_jax.experiment import Experiment

    experiment, params = run.experiment, run.params
    if not experiment.is_decoder:
        config = copy.deepcopy(experiment.config)
        config.train.precision = "float32"
        experiment = Experiment(config, experiment.backbone)
        params = jax.tree.map(
            lambda leaf, like: jax.device_put(np.asarray(leaf, like.dtype), like.sharding),
            run.params,
            experiment.abstract_params,
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        write_rows(path)
        comparisons = read_comparisons(path, labelled=False)
        samples = experiment.make_samples(comparisons)
        logits = experiment.make_predictor().logits(params, samples, np.arange(len(comparisons)))
    return describe_rows(samples, to_probabilities(logits, temperature=run.temperature))
