"""Shows what is in a file of comparisons and how much of it a model would see.

Examples:
  python launch/describe.py --data=train.csv
  python launch/describe.py --data=train.csv --config=configs/parallel_bert.py --row=12
  python launch/describe.py --data=test.csv --output=description.json

Without a config tokens are those of MiniLM where that is installed (./launch/weights.sh minilm),
else of a vocabulary learned from the file.
"""

from absl import flags

from pref_jax import command

flags.DEFINE_string("data", None, "CSV, CSV.gz or Parquet, with or without labels.", required=True)
flags.DEFINE_string("output", None, "JSON file to write.")
flags.DEFINE_integer("row", None, "Row to draw, counted from 1; else the first that is cut.")


def main(options, config):
    from pathlib import Path

    from pref_jax.files import check_output_file, write_json

    if options.output is not None:
        check_output_file(options.output, inputs=(options.data,))
    from pref_jax.data.arena import read_comparisons
    from pref_jax.data.describe import compare_layouts, default_tokenizer, describe, render
    from pref_jax.data.tokenizers import load_tokenizer

    comparisons = read_comparisons(options.data)
    if config is None:
        layouts, tokenizer = compare_layouts(), default_tokenizer(comparisons)
    else:
        from pref_jax.experiment import find_backbone, make_layout

        layouts = compare_layouts(make_layout(config))
        folder = find_backbone(config, comparisons).tokenizer_folder
        tokenizer = load_tokenizer(folder, config.input.tokenizer)
    found = describe(comparisons, tokenizer, layouts, row=options.row)
    print(render(found))
    if options.output is not None:
        write_json(Path(options.output), found)


if __name__ == "__main__":
    command.run(main, doc=__doc__, config="optional")
