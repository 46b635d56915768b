"""The other side's turn of a race: Hugging Face's Trainer, with PEFT where we train adapters.

Set up as a careful user would: sdpa attention, fused AdamW, the precision of the device, no
column looked at twice, losses logged without a filter, nothing saved.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_pt_utils import get_length_grouped_indices

from pref_jax.errors import InputError
from pref_jax.memory import resident_peak
from pref_jax.race import turn

# Trainer sorts by length within groups of 50 updates, and within a quarter of a file that is
# shorter than four groups. A race has few rows; it sorts them as in a long file.
_UPDATES_PER_GROUP = 50


class Rows(torch.utils.data.Dataset):
    """Rows as dictionaries; ``input_ids`` is the longest sequence, by which Trainer groups."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as arrays:
            sides = int(arrays["sides"])
            ends = np.cumsum(arrays["lengths"])
            sequences = np.split(arrays["ids"].astype(np.int64), ends[:-1])
            starts, labels = arrays["type_starts"], arrays["labels"]
            self.samples = arrays["samples"]
        self.items = [
            {
                "input_ids": max(sequences[row * sides : (row + 1) * sides], key=len),
                "sequences": sequences[row * sides : (row + 1) * sides],
                "type_starts": starts[row * sides : (row + 1) * sides],
                "labels": int(label),
            }
            for row, label in enumerate(labels)
        ]
        self.lengths = [len(item["input_ids"]) for item in self.items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.items[number]


class Collator:
    """Pads rows to the longest of them: ``[batch, length]``, pairs ``[batch, 2, length]``."""

    def __init__(self, pad_id: int, token_types: bool) -> None:
        self._pad_id, self._token_types = pad_id, token_types

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sides = len(items[0]["sequences"])
        shape = (len(items), sides, max(len(item["input_ids"]) for item in items))
        ids = np.full(shape, self._pad_id, np.int64)
        mask, types = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for row, item in enumerate(items):
            for side, sequence in enumerate(item["sequences"]):
                ids[row, side, : len(sequence)] = sequence
                mask[row, side, : len(sequence)] = 1
                types[row, side, item["type_starts"][side] : len(sequence)] = 1
        batch = {"input_ids": ids, "attention_mask": mask}
        if self._token_types:
            batch["token_type_ids"] = types
        tensors = {
            name: torch.from_numpy(array[:, 0] if sides == 1 else array)
            for name, array in batch.items()
        }
        return tensors | {"labels": torch.tensor([item["labels"] for item in items])}


class Clock(TrainerCallback):
    """When an epoch began and its last update was done, with the device's work done too."""

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.time()

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.begun = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ended = self._now()


class GroupingTrainer(Trainer):
    """Trainer whose grouping by length is that of a long file."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return get_length_grouped_indices(
            dataset.lengths,
            batch,
            _UPDATES_PER_GROUP,
            torch.Generator().manual_seed(self.args.seed),
        )


def load_model(folder: Path, job: dict[str, Any]) -> torch.nn.Module:
    """The model our run starts from, with new adapters where it has them."""
    if not job["decoder"]:
        from pref_jax.weights.modeling_pref_jax import PrefJaxForSequenceClassification

        return PrefJaxForSequenceClassification.from_pretrained(
            folder / turn.MODEL, dtype=torch.float32
        )
    lora = job["lora"]
    model = AutoModelForSequenceClassification.from_pretrained(
        folder / turn.MODEL, dtype=getattr(torch, job["precision"]) if lora else torch.float32
    )
    model.config.use_cache = False
    if lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model, LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], bias="none", **lora)
    )


def run(folder: Path, job: dict[str, Any], started: float) -> dict[str, Any]:
    """Trains one update and then a whole epoch, predicts every row, tokenises the texts."""
    on_gpu = job["platform"] in ("gpu", "cuda", "rocm")
    if on_gpu and not torch.cuda.is_available():
        raise InputError(
            "torch", "it finds no GPU, and JAX does", "install a torch build for this GPU"
        )
    grouped = job["contestant"] == "grouped"
    rows = Rows(folder / turn.SEQUENCES)
    model = load_model(folder, job)
    token_types = not job["decoder"]
    collate = Collator(model.config.pad_token_id, token_types)
    batch, small = job["batch_size"], job["peer_batch_size"]

    def make_trainer(model: torch.nn.Module, strategy: str, **limit: Any) -> tuple[Trainer, Clock]:
        arguments = TrainingArguments(
            output_dir=str(folder / "trainer"),
            per_device_train_batch_size=small,
            gradient_accumulation_steps=batch // small,
            per_device_eval_batch_size=small,
            learning_rate=job["learning_rate"],
            weight_decay=job["weight_decay"],
            warmup_steps=job["warmup_steps"],
            lr_scheduler_type=job["schedule"],
            max_grad_norm=job["clip_norm"],
            bf16=job["precision"] == "bfloat16",
            fp16=job["precision"] == "float16",
            use_cpu=not on_gpu,
            gradient_checkpointing=job["remat"],
            train_sampling_strategy=strategy,
            seed=job["seed"] % 2**32,
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=on_gpu,
            remove_unused_columns=False,
            label_names=["labels"],
            **limit,
        )
        clock = Clock()
        trainer = GroupingTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=collate,
            callbacks=[clock],
        )
        # Else it leaves the mean over accumulated batches to the model, and the classifiers of
        # transformers do not take it: loss and gradient would be that many times too large.
        trainer.model_accepts_loss_kwargs = False
        return trainer, clock

    # Ungrouped: our updates in our order, so that both sides' losses are of the same rows.
    strategy = "group_by_length" if grouped else "sequential"
    trainer, clock = make_trainer(model, strategy, max_steps=1)
    trainer.train()
    first_update_seconds = clock.ended - started
    losses = _losses(trainer)
    trainer, clock = make_trainer(model, strategy, num_train_epochs=1)
    trainer.train()
    training_seconds = clock.ended - clock.begun
    losses += _losses(trainer)
    memory = torch.cuda.max_memory_allocated() if on_gpu else resident_peak()

    del trainer, model
    model = load_model(folder, job)
    # A strategy of training also shuffles what `predict` reads, and nothing tells the order back.
    trainer, _ = make_trainer(model, "sequential", max_steps=1)
    attention = getattr(model, "encoder", model).config._attn_implementation
    order = np.argsort(rows.samples)  # as in the file
    if grouped:
        order = np.argsort(-np.array(rows.lengths), kind="stable")
    trainer.predict(torch.utils.data.Subset(rows, order[:1].tolist()))
    mark = time.perf_counter()
    output = trainer.predict(torch.utils.data.Subset(rows, order.tolist())).predictions
    prediction_seconds = time.perf_counter() - mark
    logits = np.empty((len(rows), 3), np.float32)
    logits[rows.samples[order]] = output[0] if isinstance(output, tuple) else output

    tokenizer = AutoTokenizer.from_pretrained(folder / turn.MODEL)
    texts = json.loads((folder / turn.TEXTS).read_text(encoding="utf-8"))
    tokenizer(["warm"])
    mark = time.perf_counter()
    for column in texts.values():
        tokenizer(column, add_special_tokens=False, return_attention_mask=False)
    tokenising_seconds = time.perf_counter() - mark
    return {
        "first_update_seconds": first_update_seconds,
        "training_rows_per_second": len(rows) / training_seconds,
        "prediction_rows_per_second": len(rows) / prediction_seconds,
        "tokenising_rows_per_second": len(next(iter(texts.values()))) / tokenising_seconds,
        "peak_memory_bytes": memory,
        "losses": losses,
        "logits": logits.tolist(),
        "device": torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads",
        "attention": attention,
    }


def _losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    turn.serve(run)
