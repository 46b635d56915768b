"""Tiny random models as transformers writes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WIDTH, LAYERS, VOCABULARY, POSITIONS, INNER = 8, 3, 40, 16, 12


def torch_model(family: str, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    if family == "bert":
        sizes = {
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "intermediate_size": INNER,
        }
        config = transformers.BertConfig(
            vocab_size=VOCABULARY, max_position_embeddings=POSITIONS, **(sizes | changes)
        )
        return transformers.BertForMaskedLM(config)
    sizes = {"dim": WIDTH, "n_layers": LAYERS, "n_heads": 2, "hidden_dim": INNER}
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=POSITIONS, **(sizes | changes)
    )
    return transformers.DistilBertForMaskedLM(config)


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """``make_folder("bert", max_shard_size=..., **config)``: a saved random model."""

    def make(family: str, max_shard_size: str = "1GB", **changes: Any) -> Path:
        folder = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"
        torch_model(family, **changes).save_pretrained(folder, max_shard_size=max_shard_size)
        return folder

    return make
