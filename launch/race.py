"""Ours against Hugging Face's Trainer (and PEFT) on the same rows, token ids and weights, in turn.

Examples:
  python launch/race.py --config=configs/single_bert.py:minilm --config.data.train=train.csv \
      --config.input.max_length=256 --output=race.json
  python launch/race.py --config=configs/llama_lora.py:smollm2 --config.data.train=train.csv \
      --config.input.max_length=256 --rows=64 --rounds=2 --peer_batch_size=2

--output=race.json also writes race.md and race.png; the same command goes on with a race that was
cut off. Let nothing else run meanwhile. Needs torch and transformers: pip install -e '.[race]'.
"""

import signal
from pathlib import Path

from absl import flags

from pref_jax import command

flags.DEFINE_integer("rows", 256, "Rows of a turn, whole updates of them.", lower_bound=1)
flags.DEFINE_integer("rounds", 3, "Turns of each contestant.", lower_bound=1)
flags.DEFINE_float("seconds", 3600.0, "No turn goes on beyond this time.", lower_bound=1.0)
flags.DEFINE_integer(
    "peer_batch_size",
    None,
    "Rows of Trainer's forward pass, which divide the update; about 16 by default.",
    lower_bound=1,
)
flags.DEFINE_string("output", None, "JSON file to write; table and figure come beside it.")


def main(options, config):
    from pref_jax.errors import InputError
    from pref_jax.files import check_output_file

    output = None if options.output is None else Path(options.output)
    if output is not None:
        if output.suffix != ".json":
            raise InputError(
                str(output), "does not end in .json", "table and figure take the other endings"
            )
        for suffix in (output.suffix, ".md", ".png"):
            check_output_file(
                output.with_suffix(suffix),
                inputs=(config.data.train, config.data.valid),
                outside=config.model.init_from,
            )
    from pref_jax.race.run import finish, race

    # As Ctrl-C: the turn's process ends, and the temporary folder goes.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result = race(
            config,
            rows=options.rows,
            rounds=options.rounds,
            seconds=options.seconds,
            peer_batch_size=options.peer_batch_size,
            output=output,
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    print(finish(result, output))


if __name__ == "__main__":
    command.run(main, doc=__doc__, config=True)
