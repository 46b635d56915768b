"""Compiles every preset for the TPU slices it is meant for and prints a Markdown table.

Examples:
  python launch/compile_table.py
  python launch/compile_table.py --only=qlora

A row takes about a minute; each is what launch/compile_check.py says of the same config.
"""

import re

from absl import flags

from pref_jax import command

flags.DEFINE_string("only", None, "Regular expression: only rows whose text it is found in.")

_LLAMA = "configs/llama_lora.py"
_QLORA = "configs/llama_qlora.py"
_BERTS = (("single", 256, 32), ("parallel", 32, 8))
# Preset, slice, rows per update, sequences per device and microbatch, tokens, further fields. An
# update is one microbatch.
ROWS = [
    *[
        (preset, "v5e:2x4", *size, {})
        for preset in (_LLAMA, _QLORA)
        for size in ((8, 1, 1024), (32, 4, 1024), (8, 1, 4096))
    ],
    *[(preset, "v3:2x2", 8, 1, 1024, {}) for preset in (_LLAMA, _QLORA)],
    *[
        (preset, "v6e:2x4", *size, {})
        for preset in (_LLAMA, _QLORA)
        for size in ((32, 4, 1024), (8, 1, 4096))
    ],
    *[
        (preset, "v5e:16x16", *size, {"data": 4, "fsdp": 64})
        for preset in (_LLAMA, _QLORA)
        for size in ((256, 1, 1024), (1024, 4, 1024))
    ],
    *[
        (f"configs/{layout}_bert.py{size}", topology, rows, sequences, 512, {})
        for layout, rows, sequences in _BERTS
        for size in ("", ":distilbert")
        for topology in ("v5e:2x4", "v3:2x2")
    ],
]
_MIB = 2**20


def main(options):
    from pref_jax.compile_check import check
    from pref_jax.config_file import load
    from pref_jax.hardware import parse_topology

    print(
        "| preset | slice | rows x tokens | attention | weights and state | temporaries | total | "
        "roofline | rows/s | tokens/s | compile |\n" + "|---" * 2 + "|---:" * 9 + "|"
    )
    for preset, topology, rows, sequences, tokens, sizes in ROWS:
        title = f"{preset} {topology} {rows}x{tokens}"
        if options.only and not re.search(options.only, title):
            continue
        config = load(
            preset,
            [
                *((f"mesh.{name}", str(size)) for name, size in sizes.items()),
                ("train.batch_size", str(rows)),
                ("train.microbatch_size", str(sequences)),
                ("input.max_length", str(tokens)),
            ],
            script=__file__,
        )
        result = check(config, parse_topology(topology))
        size, sides = result["bytes_per_chip"], 2 if "parallel" in preset else 1
        seconds = result["roofline_seconds"]
        name = preset.removeprefix("configs/").replace(".py", "")
        cells = [
            f"{name} | {topology} | {rows} x {tokens}",
            result["attention"],
            f"{size['arguments'] / _MIB:,.0f} MiB",
            f"{size['temporaries'] / _MIB:,.0f} MiB",
            f"{size['total'] / _MIB:,.0f} MiB" + ("" if result["fits"] else ", too much"),
            f"{seconds * 1e3:,.0f} ms",
            f"{rows / seconds:,.0f}",
            f"{rows * sides * tokens / seconds:,.0f}",
            f"{result['compile_seconds']:.0f} s",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    command.run(main, doc=__doc__)
