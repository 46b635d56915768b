"""Preference classifier of pref_jax for plain transformers (5 or newer) and PyTorch.

    from transformers import AutoModelForSequenceClassification
    model = AutoModelForSequenceClassification.from_pretrained(FOLDER, trust_remote_code=True)
    probabilities = model(input_ids, attention_mask, token_type_ids).logits.softmax(-1)

Columns: winner_model_a, winner_model_b, winner_tie. How token ids are laid out, and rows to check
an implementation against, are in pref_jax.json beside this file.
"""

import math

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

LABELS = ("winner_model_a", "winner_model_b", "winner_tie")


class PrefJaxConfig(PretrainedConfig):
    """Configuration of `PrefJaxForSequenceClassification`.

    Its own model type, so that no stock class takes this folder for a plain BERT and answers with
    a head of random numbers.

    Args:
      family: "bert" or "distilbert".
      layout: "single" ([CLS] prompt [SEP] response_a [SEP] response_b [SEP]) or "parallel" (two
        sequences [CLS] prompt [SEP] response [SEP], the first for response_a).
      encoder: the arguments of `BertConfig` or `DistilBertConfig`.
      head_dropout: dropout rate in front of the head.
      head: "linear": one linear layer on the states of a row's sequences; "scores": a score of each
        response by one shared layer, and a tie from what does not change when A and B do;
        "orders": a row is two sequences, A before B and B before A, and its logits are the mean of
        one linear layer over both, the second's turned back.
      pooling: state of a sequence: "cls", the "mean" of its tokens, or "cls_mean", both.
      length_features: whether the head is told the responses' lengths.
      sep_token_id: id of [SEP].
      pad_token_id: id of [PAD].
    """

    model_type = "pref_jax"

    def __init__(
        self,
        family="bert",
        layout="single",
        encoder=None,
        head_dropout=0.1,
        head="linear",
        pooling="cls",
        length_features=False,
        sep_token_id=None,
        pad_token_id=0,
        **kwargs,
    ):
        kwargs.setdefault("id2label", dict(enumerate(LABELS)))
        super().__init__(pad_token_id=pad_token_id, **kwargs)
        self.family = family
        self.layout = layout
        self.encoder = dict(encoder or {})
        self.head_dropout = head_dropout
        self.head = head
        self.pooling = pooling
        self.length_features = length_features
        self.sep_token_id = sep_token_id

    @property
    def vocab_size(self):
        return self.encoder["vocab_size"]

    @property
    def hidden_size(self):
        return self.encoder["hidden_size" if self.family == "bert" else "dim"]

    @property
    def max_position_embeddings(self):
        return self.encoder["max_position_embeddings"]


class PrefJaxForSequenceClassification(PreTrainedModel):
    """BERT or DistilBERT without pooler, and a head on the pooled states."""

    config_class = PrefJaxConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        if config.layout not in ("single", "parallel"):
            raise ValueError(f"layout must be single or parallel, not {config.layout!r}")
        if config.family == "bert":
            self.encoder = BertModel(BertConfig(**config.encoder), add_pooling_layer=False)
        elif config.family == "distilbert":
            self.encoder = DistilBertModel(DistilBertConfig(**config.encoder))
        else:
            raise ValueError(f"family must be bert or distilbert, not {config.family!r}")
        self.sides = 2 if config.layout == "parallel" or config.head == "orders" else 1
        self.dropout = nn.Dropout(config.head_dropout)
        width = config.hidden_size * (2 if config.pooling == "cls_mean" else 1)
        if config.head == "scores":
            width += config.length_features
            self.head = nn.ModuleDict(
                {
                    "score": nn.Linear(width, 1),
                    "tie": nn.Linear(2 * width + 1, 1),
                }
            )
        else:
            joined = self.sides if config.head == "linear" else 1
            width = joined * width + 3 * config.length_features
            self.head = nn.Linear(width, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        labels=None,
        return_dict=None,
        text_lengths=None,
    ):
        """Logits [batch, 3], and the mean cross-entropy where labels are given.

        Args:
          input_ids: [batch, length] for "single", [batch, 2, length] for "parallel" and for the
            head "orders".
          attention_mask: same shape, 1 for tokens and 0 for padding on either side. Without it
            every id counts as a token, padding too.
          token_type_ids: same shape; 0 up to the first [SEP] (the prompt), 1 after it. Without
            it, just that is computed. DistilBERT has no token types and does not look at it.
          text_lengths: [batch, 2], tokens of response_a and response_b before anything was cut,
            without special tokens; needed where the configuration has length_features.
          labels: [batch] class indices (0 a wins, 1 b wins, 2 tie) or [batch, 3] probabilities.
        """
        if input_ids.dim() != self.sides + 1 or (self.sides == 2 and input_ids.shape[1] != 2):
            wanted = "[batch, 2, length]" if self.sides == 2 else "[batch, length]"
            raise ValueError(
                f"a {self.config.layout} model takes input_ids of shape {wanted}, "
                f"not {list(input_ids.shape)}"
            )
        for name, value in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if value is not None and value.shape != input_ids.shape:
                raise ValueError(
                    f"{name} must have the shape of input_ids, {list(input_ids.shape)}, "
                    f"not {list(value.shape)}"
                )
        length = input_ids.shape[-1]
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"{length} tokens are more than the {self.config.max_position_embeddings} "
                "positions of this model"
            )
        batch = input_ids.shape[0]
        ids = input_ids.reshape(-1, length)  # the sides of a row follow each other
        if attention_mask is None:
            mask = torch.ones_like(ids)
        else:
            mask = attention_mask.reshape(-1, length).long()
        # Positions count tokens, so that padding on the left gives what padding on the right does.
        arguments = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        if self.config.family == "bert":
            if token_type_ids is not None:
                types = token_type_ids.reshape(-1, length)
            else:
                is_end = (ids == self.config.sep_token_id).long()
                types = ((is_end.cumsum(-1) - is_end) > 0).long()
            arguments["token_type_ids"] = types
        states = self.encoder(input_ids=ids, attention_mask=mask, **arguments).last_hidden_state
        # Each side's dropout is its own, as the mask is per element.
        pooled = self.dropout(self._pool(states, mask)).reshape(batch, self.sides, -1)
        logits = self._judge(pooled, self._read_lengths(text_lengths, pooled))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.float(), labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _pool(self, states, mask):
        """[sequences, length, hidden] to [sequences, width]."""
        parts = []
        if self.config.pooling != "mean":
            first = mask.argmax(-1)  # [CLS]
            parts.append(states[torch.arange(len(states), device=states.device), first])
        if self.config.pooling != "cls":
            weights = mask.to(states.dtype)[..., None]
            parts.append((states * weights).sum(1) / weights.sum(1).clamp(min=1))
        return torch.cat(parts, -1)

    def _read_lengths(self, text_lengths, pooled):
        """[batch, 2] logarithms, centred at 128 tokens; None where the head is not told."""
        if not self.config.length_features:
            return None
        if text_lengths is None or text_lengths.shape != (len(pooled), 2):
            raise ValueError(f"this model needs text_lengths of shape [{len(pooled)}, 2]")
        return torch.log1p(text_lengths.to(pooled.dtype)) - math.log1p(128)

    def _judge(self, pooled, lengths):
        """[batch, sides, width] to logits [batch, 3]."""
        if self.config.head == "scores":
            if lengths is not None:
                pooled = torch.cat([pooled, lengths[..., None]], -1)
            scores = self.head["score"](pooled)[..., 0]
            first, second = pooled[:, 0], pooled[:, 1]
            gap = (scores[:, :1] - scores[:, 1:]).abs()
            evidence = torch.cat([(first - second).abs(), first + second, gap], -1)
            return torch.cat([scores, self.head["tie"](evidence)], -1)
        if self.config.head == "linear":
            return self.head(self._append(pooled.flatten(1), lengths))
        if lengths is not None:
            lengths = torch.stack([lengths, lengths.flip(-1)], 1)
        logits = self.head(self._append(pooled, lengths))
        return (logits[:, 0] + logits[:, 1, [1, 0, 2]]) / 2

    @staticmethod
    def _append(states, lengths):
        if lengths is None:
            return states
        difference = lengths[..., :1] - lengths[..., 1:]
        return torch.cat([states, lengths, difference], -1)
