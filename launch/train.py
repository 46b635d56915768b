"""Trains a preference model, evaluates it, keeps the best; the same command again resumes.

Examples:
  python launch/train.py --config=configs/quickstart.py
  python launch/train.py --config=configs/single_bert.py:minilm --config.data.train=train.csv
  python launch/train.py --config=configs/parallel_bert.py --config.data.train=train.csv \
      --workdir=runs/mine --config.train.max_hours=8.5
  python launch/train.py --clear_cache
"""

import time

STARTED = time.monotonic()

from absl import flags  # noqa: E402

from pref_jax import command  # noqa: E402

flags.DEFINE_string("workdir", None, "Folder of the run; by default runs/ and the config's name.")
flags.DEFINE_bool("clear_cache", False, "Empty the cache of features and compiled programs.")


def main(options, config):
    from pref_jax import cache
    from pref_jax.config import run_name, training_data
    from pref_jax.training.workdir import Workdir

    if config is not None:
        training_data(config)
    elif not options.clear_cache:
        raise command.missing("--config", __doc__)
    if options.clear_cache:
        removed = cache.clear()
        print("\n".join(f"removed {folder}" for folder in removed) or "the cache was empty")
    if config is None:
        return
    # The folder is taken before anything heavy is imported: a second run is refused at once.
    with Workdir(options.workdir or f"runs/{run_name(options.config)}") as workdir:
        from pref_jax.compilation import keep_compiled_programs
        from pref_jax.training.report import print_result
        from pref_jax.training.run import train

        keep_compiled_programs()
        print_result(workdir.path, train(config, workdir, STARTED))


if __name__ == "__main__":
    command.run(main, doc=__doc__, config="optional")
