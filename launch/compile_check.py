"""Compiles the real training step for a TPU that is not there: does it fit, what does it take?

Examples:
  python launch/compile_check.py --config=configs/llama_lora.py --topology=v5e:2x4
  python launch/compile_check.py --config=configs/llama_qlora.py --topology=v3-8 \
      --config.train.batch_size=32 --config.train.microbatch_size=4 --output=v3.json

Needs libtpu, which runs on any Linux machine: pip install -e '.[compile-check]'. No weights and no
data are read, except the config.json of weights that are on this machine.
"""

from pathlib import Path

from absl import flags

from pref_jax import command

flags.DEFINE_string(
    "topology",
    None,
    "The slice, by layout or size: v5e:2x4, v5e-8, v5litepod-8, v3:2x2, v6e:2x4, v5p:2x2x2 ...",
    required=True,
)
flags.DEFINE_string("output", None, "JSON file to write.")
flags.DEFINE_string("hlo", None, "Text file to write: the compiled program, where it fits.")


def main(options, config):
    import json

    from pref_jax.files import check_output_file, write_json
    from pref_jax.hardware import parse_topology

    topology = parse_topology(options.topology)
    for path in (options.output, options.hlo):
        if path is not None:
            check_output_file(path, outside=config.model.init_from)
    from pref_jax.compile_check import check

    result = check(config, topology, hlo=options.hlo)
    print(json.dumps(result, indent=2))
    if options.output is not None:
        write_json(Path(options.output), result)


if __name__ == "__main__":
    command.run(main, doc=__doc__, config=True)
