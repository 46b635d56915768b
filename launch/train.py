"""Trains a preference model, evaluates it, keeps the best; the same command again resumes.

Examples:
  python launch/train.py --config=configs/quickstart.py
  python launch/train.py --config=configs/single_bert.py:minilm --config.data.train=train.csv
  python launch/train.py --config=configs/parallel_bert.py --config.data.train=train.csv \
      --workdir=runs/mine --config.train.max_hours=8.5
  python launch/train.py --clear_cache

Several hosts train one run together: the same command on each, a --workdir that all of them see
(a shared disk, or gs://BUCKET/PATH),
and who is who; the first address is host 0's.
  python launch/train.py --config=configs/quickstart.py --workdir=/shared/mine \
      --coordinator=10.0.0.1:8476 --num_hosts=2 --host=0   # and --host=1 on the second one
  python launch/train.py --config=configs/quickstart.py --workdir=/shared/mine --num_hosts=auto
"""

import time

STARTED = time.monotonic()

from absl import flags  # noqa: E402

from pref_jax import command, hosts  # noqa: E402

flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run, also gs://BUCKET/PATH; by default runs/ and the config's name.",
)
flags.DEFINE_bool("clear_cache", False, "Empty the cache of features and compiled programs.")
hosts.define_flags()


def main(options, config):
    from pref_jax import cache
    from pref_jax.config import run_name, training_data
    from pref_jax.training.progress import StopSignals
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
    path = options.workdir or f"runs/{run_name(options.config)}"
    with (
        StopSignals(at_once=not command.is_called()) as signals,
        hosts.joined(options),
        Workdir(path) as workdir,
    ):
        hosts.start_jax()
        from pref_jax.compilation import keep_compiled_programs
        from pref_jax.training.report import print_result
        from pref_jax.training.run import train

        keep_compiled_programs()
        result = train(config, workdir, STARTED, signals)
        if hosts.is_leader():
            print_result(workdir.name, result)


if __name__ == "__main__":
    command.run(main, doc=__doc__, config="optional")
