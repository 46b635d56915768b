"""Measures the real training step, prediction, or all that comes before them, on real rows.

Examples:
  python launch/benchmark.py --config=configs/single_bert.py:minilm --config.data.train=train.csv
  python launch/benchmark.py --config=configs/parallel_bert.py:minilm --mode=predict \
      --config.data.train=train.csv --output=speed.json
  python launch/benchmark.py --config=configs/parallel_bert.py:minilm --mode=data \
      --simulated_rows=1000000

Steps are timed warm. --mode=data reads, splits, tokenises, plans and serves one epoch to a step
that does nothing, in a new cache: seconds, rows/s and memory of each stage.
"""

from pathlib import Path

from absl import flags

from pref_jax import command

flags.DEFINE_enum("mode", "train", ["train", "predict", "data"], "What to measure.")
flags.DEFINE_integer("steps", 8, "Updates, or calls of the compiled prediction.", lower_bound=1)
flags.DEFINE_integer("rows", None, "Rows of the file to use; all by default.", lower_bound=1)
flags.DEFINE_integer(
    "simulated_rows", None, "Of --mode=data: so many rows of short texts, no file.", lower_bound=1
)
flags.DEFINE_string("output", None, "JSON file to write.")


def main(options, config):
    import json

    from pref_jax.files import check_output_file, write_json

    if options.output is not None:
        check_output_file(
            options.output,
            inputs=(config.data.train, config.data.valid),
            outside=config.model.init_from,
        )
    if options.mode == "data":
        from pref_jax.data_benchmark import benchmark_data

        result = benchmark_data(config, rows=options.rows, simulated_rows=options.simulated_rows)
    else:
        from pref_jax.benchmark import benchmark

        result = benchmark(config, mode=options.mode, steps=options.steps, rows=options.rows)
    print(json.dumps(result, indent=2))
    if options.output is not None:
        write_json(Path(options.output), result)


if __name__ == "__main__":
    command.run(main, doc=__doc__, config=True)
