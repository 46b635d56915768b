r"""Ratings of responses by a language model, over any server that speaks OpenAI's chat API.

Examples:
  python launch/annotate.py --data=train.csv --output=ratings.jsonl \
      --base_url=http://localhost:8000/v1 --model=my-judge
  python launch/annotate.py --data=train.csv --dry_run --price_prompt=0.6 --price_completion=0.6
  python launch/annotate.py --compare=other.jsonl --output=ratings.jsonl

The key of a hosted server is read from the variable OPENAI_API_KEY. The same command again goes on
where it stopped: answers that are there are not asked for again, failures are. docs/annotation.md
tells the rest.
"""

from absl import flags

from pref_jax import command

flags.DEFINE_string("data", None, "CSV, CSV.gz or Parquet of comparisons.")
flags.DEFINE_string("output", None, "JSON lines to write, one per response.")
flags.DEFINE_string("base_url", None, "Address of the server, such as http://localhost:8000/v1.")
flags.DEFINE_string("model", None, "Name of the model there.")
flags.DEFINE_string("properties", None, "TOML of what is rated; else the study's 20 ratings.")
flags.DEFINE_bool("both", False, "Rate both responses of a row in one request.")
flags.DEFINE_integer("rows", None, "Only so many first rows.")
flags.DEFINE_enum(
    "structured",
    "auto",
    ["auto", "json_schema", "json_object", "none"],
    "How the form of the answer is asked for; auto finds out what the server takes.",
)
flags.DEFINE_float("max_cost", None, "Ask no more once this call would cost more.")
flags.DEFINE_integer("max_requests", None, "Send at most so many requests in this call.")
flags.DEFINE_float("price_prompt", None, "Price of a million tokens of questions.")
flags.DEFINE_float("price_completion", None, "Price of a million tokens of answers.")
flags.DEFINE_integer("concurrency", 16, "Requests under way at a time.")
flags.DEFINE_integer("attempts", 4, "Requests per question before it counts as failed.")
flags.DEFINE_float("timeout", 120.0, "Seconds to wait for an answer.")
flags.DEFINE_float("temperature", 0.0, "Of the first attempt; further ones are warmer.")
flags.DEFINE_integer("seed", 0, "Of the first attempt; further ones add to it.")
flags.DEFINE_integer("max_characters", 12_000, "Longer texts are cut in the middle.")
flags.DEFINE_bool("dry_run", False, "Ask nobody: show one question, and what all would cost.")
flags.DEFINE_string("compare", None, "Another file of ratings: print how far --output agrees.")


def main(options):
    needed = ["data"] if options.dry_run else ["data", "output", "base_url", "model"]
    for name in ["output"] if options.compare else needed:
        if options[name].value is None:
            raise command.missing(f"--{name}", __doc__)
    if options.compare:
        from pref_jax.annotation.summary import compare

        compare(options.output, options.compare, options.properties)
        return
    import dataclasses

    if not options.dry_run:
        from pref_jax.annotation.store import refuse_busy

        refuse_busy(options.output)
    from pref_jax.annotation.run import Settings, annotate, estimate

    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: options[name].value for name in names})
    if options.dry_run:
        estimate(settings)
    else:
        annotate(settings)


if __name__ == "__main__":
    command.run(main, doc=__doc__)
