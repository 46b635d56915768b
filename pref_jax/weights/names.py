"""How Hugging Face names the parameters of BERT and DistilBERT, and how this project does.

The tables are total: a key of a file is one parameter of the encoder, or is listed here as not
part of it (`is_ignored`), or is unknown, which the loader refuses. A parameter of ours is named
by its path below ``encoder`` in the classifier's tree, such as
``("layer_0", "attention", "query", "kernel")``.

Source: the state dicts of `transformers.BertModel` and `transformers.DistilBertModel`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Path = tuple[str, ...]

PREFIXES = {"bert": "bert.", "distilbert": "distilbert."}
"""What the key of an encoder's parameter starts with in a file that holds a head as well."""

_EMBEDDINGS = {
    "word": "word_embeddings",
    "position": "position_embeddings",
    "token_type": "token_type_embeddings",
}
_BERT_LINEARS = {
    ("attention", "query"): "attention.self.query",
    ("attention", "key"): "attention.self.key",
    ("attention", "value"): "attention.self.value",
    ("attention", "output"): "attention.output.dense",
    ("intermediate",): "intermediate.dense",
    ("output",): "output.dense",
}
_BERT_NORMS = {
    "attention_norm": "attention.output.LayerNorm",
    "output_norm": "output.LayerNorm",
}
_DISTILBERT_LINEARS = {
    ("attention", "query"): "attention.q_lin",
    ("attention", "key"): "attention.k_lin",
    ("attention", "value"): "attention.v_lin",
    ("attention", "output"): "attention.out_lin",
    ("intermediate",): "ffn.lin1",
    ("output",): "ffn.lin2",
}
_DISTILBERT_NORMS = {"attention_norm": "sa_layer_norm", "output_norm": "output_layer_norm"}

_LAYERS = {"bert": "encoder.layer", "distilbert": "transformer.layer"}
_LINEARS = {"bert": _BERT_LINEARS, "distilbert": _DISTILBERT_LINEARS}
_NORMS = {"bert": _BERT_NORMS, "distilbert": _DISTILBERT_NORMS}
_LINEAR_LEAVES = {"kernel": "weight", "bias": "bias"}
_NORM_LEAVES = {"scale": "weight", "bias": "bias"}

# Heads of other tasks and buffers that hold no weight. Matched from the start of the key, after
# the family's prefix is taken off.
_IGNORED = {
    "bert": (
        r"cls\.",  # masked words and next sentence
        r"pooler\.",
        r"classifier\.",
        r"qa_outputs\.",
        r"dropout\.",
        r"embeddings\.(position_ids|token_type_ids)$",
    ),
    "distilbert": (
        r"vocab_transform\.",
        r"vocab_layer_norm\.",
        r"vocab_projector\.",
        r"pre_classifier\.",
        r"classifier\.",
        r"qa_outputs\.",
        r"dropout\.",
        r"embeddings\.position_ids$",
    ),
}

# Files from before 2019 name a norm's weights after the TensorFlow variables.
_OLD_NORM_LEAVES = {"gamma": "weight", "beta": "bias"}


@dataclass(frozen=True)
class Entry:
    """One parameter in a Hugging Face file.

    Attributes:
      key: its name there, without the family's prefix, in today's spelling.
      transposed: whether the file holds [out, in] where our kernel is [in, out].
    """

    key: str
    transposed: bool


def entry_of(path: Path, family: str) -> Entry:
    """The entry that holds the parameter at `path` below ``encoder``.

    Raises:
      KeyError: no encoder of this family has such a parameter.
    """
    match path:
        case ("embeddings", "norm", leaf) if leaf in _NORM_LEAVES:
            return Entry(f"embeddings.LayerNorm.{_NORM_LEAVES[leaf]}", transposed=False)
        case ("embeddings", table, "embedding") if table in _EMBEDDINGS and not (
            family == "distilbert" and table == "token_type"
        ):
            return Entry(f"embeddings.{_EMBEDDINGS[table]}.weight", transposed=False)
        case (layer, *module, leaf) if re.fullmatch(r"layer_\d+", layer):
            start = f"{_LAYERS[family]}.{layer.removeprefix('layer_')}"
            linear = _LINEARS[family].get(tuple(module))
            if linear and leaf in _LINEAR_LEAVES:
                return Entry(f"{start}.{linear}.{_LINEAR_LEAVES[leaf]}", leaf == "kernel")
            norm = _NORMS[family].get(module[0]) if len(module) == 1 else None
            if norm and leaf in _NORM_LEAVES:
                return Entry(f"{start}.{norm}.{_NORM_LEAVES[leaf]}", transposed=False)
    raise KeyError(f"no parameter of {family} is called {'/'.join(path)}")


def head_key(path: Path) -> tuple[str, bool]:
    """An exported encoder's key for a parameter of its head, and whether it lies transposed."""
    *module, leaf = path
    return ".".join(("head", *module, _LINEAR_LEAVES[leaf])), leaf == "kernel"


def path_table(paths: Iterable[Path], family: str) -> dict[str, Path]:
    """The other direction: today's key, without prefix, to the path, for the given paths."""
    return {entry_of(path, family).key: path for path in paths}


def modern_key(key: str, family: str) -> str:
    """A file's key without the family's prefix and in today's spelling of norm weights."""
    key = key.removeprefix(PREFIXES[family])
    start, _, leaf = key.rpartition(".")
    if start.endswith("LayerNorm") and leaf in _OLD_NORM_LEAVES:
        return f"{start}.{_OLD_NORM_LEAVES[leaf]}"
    return key


def is_ignored(modern: str, family: str) -> bool:
    """Whether a key (as `modern_key` gives it) is known and not part of the encoder."""
    return any(re.match(pattern, modern) for pattern in _IGNORED[family])


def flatten(tree: Mapping[str, Any], above: Path = ()) -> dict[Path, Any]:
    """A nested dict as one dict from paths to leaves."""
    leaves: dict[Path, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flatten(value, (*above, name))
        else:
            leaves[*above, name] = value
    return leaves


def unflatten(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """The nested dict that `flatten` turns into `leaves`."""
    tree: dict[str, Any] = {}
    for (*above, name), value in leaves.items():
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[name] = value
    return tree
