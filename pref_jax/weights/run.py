"""Exports the best checkpoint of a run."""

from pathlib import Path

from pref_jax.weights.export import check_output, export_encoder


def export_run(workdir: Path, output: Path) -> Path:
    """Writes the best checkpoint of `workdir` for other programs; returns the folder written.

    Raises:
      InputError: the workdir holds no finished run, or the output folder holds something else.
    """
    from pref_jax.experiment import load_run

    check_output(output)  # before the work of loading a run
    run = load_run(workdir)
    export_encoder(output, **run.export_arguments())
    return output
