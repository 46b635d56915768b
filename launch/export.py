"""Writes the best checkpoint of a run as a folder that plain transformers loads.

    python launch/export.py --workdir=runs/quickstart --output=exported

Then, in any program, without this project:

    AutoModelForSequenceClassification.from_pretrained("exported", trust_remote_code=True)
"""

from pathlib import Path

from absl import flags

from pref_jax import command

flags.DEFINE_string("workdir", None, "Folder of a finished run.", required=True)
flags.DEFINE_string("output", None, "Folder to write: new, or an earlier export.", required=True)
flags.DEFINE_bool("merge", False, "LLaMA: the whole model, adapters added to it.")
flags.DEFINE_string("base", None, "Where the frozen weights of the run are now, if they moved.")


def main(flag_values: flags.FlagValues) -> None:
    from pref_jax.weights.run import export_run

    folder = export_run(
        flag_values.workdir,
        Path(flag_values.output),
        merge=flag_values.merge,
        base=flag_values.base,
    )
    print(f"exported to {folder}")


if __name__ == "__main__":
    command.run(main, doc=__doc__)
