"""Compiles every preset for the TPU slices it is meant for and prints a Markdown table.

Examples:
  python launch/compile_table.py
  python launch/compile_table.py --only=qlora
  python launch/compile_table.py --plans --data=arena/train.csv --results=plans.json

A row takes one to fifteen minutes; each is what launch/compile_check.py says of the same config.
--plans prints docs/scale.md's tables instead: what an epoch takes on a slice. Rows of --data say
how long rows are, in the tokens of minilm and smollm2 (./launch/weights.sh minilm smollm2).
"""

import re
from pathlib import Path

from absl import flags

from pref_jax import command
from pref_jax.errors import InputError

flags.DEFINE_string("only", None, "Regular expression: only rows whose text it is found in.")
flags.DEFINE_boolean("plans", False, "Print what an epoch takes on a slice.")
flags.DEFINE_string("data", None, "Of --plans: a file with rows as long as those to train on.")
flags.DEFINE_float("disk_rate", 200.0, "Of --plans: MB/s at which checkpoints are written.")
flags.DEFINE_string("results", None, "JSON file that keeps what was compiled, for the next call.")

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
# The same of --plans: as many rows an update as keep all chips busy once they are packed.
_BERT = "configs/parallel_bert.py"
PLANS = [
    (_LLAMA, "v5e:2x4", 64, 1, 1024, {}),
    (_LLAMA, "v5e:16x16", 1792, 1, 1024, {"data": 16, "fsdp": 16}),
    (_LLAMA, "v6e:16x16", 1792, 4, 1024, {"data": 16, "fsdp": 16}),
    (_BERT, "v5e:2x4", 256, 8, 512, {}),
    (_BERT, "v5e:16x16", 4096, 4, 512, {}),
    (_BERT, "v6e:16x16", 4096, 4, 512, {}),
]
# Whose tokenizer stands for that of a preset.
_SIBLINGS = {_LLAMA: "smollm2", _BERT: "minilm"}
_EPOCHS = (57_477, 1_000_000, 100_000_000)
_SHARE = 0.4
_MIB = 2**20


def main(options):
    if options.plans and options.data is None:
        raise InputError("--plans", "--data is missing", "name a file of rows")
    show = _show_plans if options.plans else _show_checks
    show(options)


def _select(options, table):
    """Title and fields of each row that is asked for."""
    for preset, topology, rows, sequences, tokens, sizes in table:
        title = f"{preset} {topology} {rows}x{tokens}"
        if options.only and not re.search(options.only, title):
            continue
        yield (
            preset,
            topology,
            [
                *((f"mesh.{name}", str(size)) for name, size in sizes.items()),
                ("train.batch_size", str(rows)),
                ("train.microbatch_size", str(sequences)),
                ("input.max_length", str(tokens)),
            ],
        )


def _check(options, preset, topology, fields):
    """What the compiler says, from --results where it was asked before."""
    from pref_jax.compile_check import check
    from pref_jax.config_file import load
    from pref_jax.files import read_json, write_json
    from pref_jax.hardware import parse_topology

    path = Path(options.results) if options.results else None
    known = read_json(path, "remove it") if path is not None and path.exists() else {}
    title = " ".join([preset, topology, *(f"{name}={value}" for name, value in fields)])
    if title not in known:
        config = load(preset, fields, script=__file__)
        known[title] = check(config, parse_topology(topology))
        if path is not None:
            write_json(path, known)
    return known[title]


def _bytes(result):
    size = result["bytes_per_chip"]["total"] / _MIB
    return f"{size:,.0f} MiB" + ("" if result["fits"] else ", too much")


def _print(*cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def _short(preset):
    return preset.removeprefix("configs/").replace(".py", "")


def _show_checks(options):
    print(
        "| preset | slice | rows x tokens | attention | weights and state | temporaries | total | "
        "roofline | rows/s | tokens/s | compile |\n" + "|---" * 2 + "|---:" * 9 + "|"
    )
    for preset, topology, fields in _select(options, ROWS):
        result = _check(options, preset, topology, fields)
        rows, tokens = result["batch_size"], result["max_length"]
        size, sides = result["bytes_per_chip"], 2 if "parallel" in preset else 1
        seconds = result["roofline_seconds"]
        _print(
            _short(preset),
            topology,
            f"{rows} x {tokens}",
            result["attention"],
            f"{size['arguments'] / _MIB:,.0f} MiB",
            f"{size['temporaries'] / _MIB:,.0f} MiB",
            _bytes(result),
            f"{seconds * 1e3:,.0f} ms",
            f"{rows / seconds:,.0f}",
            f"{rows * sides * tokens / seconds:,.0f}",
            f"{result['compile_seconds']:.0f} s",
        )


def _show_plans(options):
    from pref_jax.scale import plan_epoch

    made = []
    print(
        "| preset | slice | update | bytes of a chip | tokens/s at most | tokens of a row | "
        "real tokens | rows/s at most | checkpoint |\n" + "|---" * 3 + "|---:" * 6 + "|"
    )
    for preset, topology, fields in _select(options, PLANS):
        result = _check(options, preset, topology, fields)
        packing, sides = _pack(options.data, preset, fields, result)
        plan = plan_epoch(result, packing, sides=sides, disk_rate=options.disk_rate * 1e6)
        made.append((preset, topology, plan))
        _print(
            _short(preset),
            topology,
            f"{result['batch_size']} rows, {result['microbatch_size']} x {result['max_length']}",
            _bytes(result),
            f"{plan.tokens_per_second:,.0f}",
            f"{packing.tokens_per_row:.0f}",
            f"{packing.fill:.0%}",
            f"{plan.rows_per_second:,.0f}",
            f"{result['checkpoint_bytes'] / 1e6:,.0f} MB, {plan.checkpoint_seconds:.1f} s",
        )
    titles = [f"{rows:,} rows: at most; at {_SHARE:.0%} of that speed" for rows in _EPOCHS]
    print("\n| preset | slice | " + " | ".join(titles) + " |\n" + "|---" * 2 + "|---:" * 3 + "|")
    for preset, topology, plan in made:
        cells = (
            "; ".join(_cost(plan.hours(rows, share), plan.price) for share in (1.0, _SHARE))
            for rows in _EPOCHS
        )
        _print(_short(preset), topology, *cells)


def _cost(hours, price):
    units = (("h", 1), ("min", 60), ("s", 3600))
    unit, size = next(unit for unit in units if hours * unit[1] >= 2 or unit == units[-1])
    number, dollars = hours * size, hours * price
    digits = 0 if number >= 10 else 1
    return f"{number:,.{digits}f} {unit}, ${dollars:,.{0 if dollars >= 10 else 2}f}"


def _pack(data, preset, fields, result):
    """How full the updates of a plan are with the rows of a file, and sequences per row."""
    from pref_jax.config_file import load
    from pref_jax.data.arena import read_comparisons
    from pref_jax.data.batches import make_geometry
    from pref_jax.data.features import make_features
    from pref_jax.data.tokenizers import load_tokenizer
    from pref_jax.experiment import find_backbone, make_layout
    from pref_jax.scale import measure_packing

    config = load(f"{preset}:{_SIBLINGS[preset]}", fields, script=__file__)
    comparisons = read_comparisons(data)
    layout = make_layout(config)
    tokenizer = load_tokenizer(find_backbone(config, comparisons).tokenizer_folder)
    totals = make_features(comparisons, tokenizer, layout).lengths.sum(axis=1)
    packing = measure_packing(
        totals,
        make_geometry(layout.max_length, layout.sides, packing=True),
        result["batch_size"],
        result["mesh"]["data"] * result["mesh"]["fsdp"],
        result["microbatch_size"],
    )
    return packing, layout.sides


if __name__ == "__main__":
    command.run(main, doc=__doc__)
