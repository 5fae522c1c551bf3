"""Differential privacy for Hugging Face's Trainer (extra `choral[huggingface]`).

    trainer = PrivateTrainer(model=model, args=args, train_dataset=records, privacy=Privacy(epsilon=3.0, delta=1e-5))
    trainer.train()

The promise is that of :class:`choral.privacy.Privacy`: the same loader, step, ledger and checks. The loss is not the
model's own: that is a mean over the labelled tokens of the *batch*, so that one record changes the weight of others.
Here it is the mean over records of each record's mean. What the trainer logs (`loss`) is not protected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from choral.errors import ConfigError
from choral.privacy.dpsgd.engine import Privacy
from choral.privacy.dpsgd.private_optimizer import PrivateOptimizer
from choral.privacy.errors import UnsupportedModelError
from choral.privacy.ledgers.spent import Spent
from choral.privacy.per_sample.model import PerSampleModel, unwrap

RecordLosses = Callable[[Any, torch.Tensor], torch.Tensor]  # of a model's outputs and the labels, shape (records,)


class PrivateTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose `train` is private, with the arguments of Trainer, and two more.

    Args:
        privacy: the promise; training stops after `privacy.epochs` passes.
        record_losses: from the model's outputs and the labels to one loss for each record, shape (records,). By default
            cross entropy for language models (causal and masked), token and sequence classification, squared error
            for one label of floats, binary cross entropy for several; the labels -100 are left out.

    Refused by name: gradient accumulation, `max_grad_norm` other than 0 (`Privacy` clips), lower precision, several
    devices or processes, label smoothing, an own `compute_loss_func`, activation checkpointing, compiling, NEFTune,
    `auto_find_batch_size`, samplers that group by length, and resuming from a checkpoint.
    Raises: ConfigError, and `train` what `Privacy.wrap` raises.
    """

    def __init__(
        self, *args: Any, privacy: Privacy, record_losses: RecordLosses | None = None, **settings: Any
    ) -> None:
        if not isinstance(privacy, Privacy):
            raise ConfigError(f"privacy is a {type(privacy).__name__}, expected a choral.Privacy")
        super().__init__(*args, **settings)
        _refuse(self, privacy)
        self.privacy = privacy
        self.record_losses = record_losses or _record_losses(self.model)
        self._private: PerSampleModel | None = None
        self._plain_optimizer: torch.optim.Optimizer | None = None
        self.add_callback(_Passes(self))

    def spent(self) -> Spent:
        """Return what the data has spent so far, in all runs that its ledger knows."""
        return self.privacy.spent()

    def train(self, resume_from_checkpoint: str | bool | None = None, **settings: Any) -> Any:
        """Train, privately. Afterwards the model is plain again; the noise is in its weights."""
        if resume_from_checkpoint:
            raise ConfigError("resume_from_checkpoint: cannot be had with differential privacy here")
        _refuse(self, self.privacy)
        result = super().train(**settings)
        if self._private is not None:
            unwrap(self._private)
            self._private = None
        return result

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the private loader, which is made together with the private model and optimizer."""
        if self._plain_optimizer is not None:
            self.optimizer = self._plain_optimizer
        self.create_optimizer()
        self._plain_optimizer = self.optimizer
        self._private, self.optimizer, loader = self.privacy.wrap(self.model, self.optimizer, self._plain_loader())
        return loader

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean of the records' losses; `num_items_in_batch` depends on the batch and is not used."""
        del num_items_in_batch
        labels = inputs.get("labels")
        if labels is None:
            raise ConfigError("the batch has no `labels`", hint="Let the data collator give them under this name.")
        private = self._private if model.training and self._private is not None else model
        outputs = private(**{name: value for name, value in inputs.items() if name != "labels"})
        losses = self.record_losses(outputs, labels)
        if losses.shape != (len(labels),):
            raise ConfigError(f"record_losses gave shape {tuple(losses.shape)}, expected ({len(labels)},)")
        loss = losses.mean()
        return (loss, outputs) if return_outputs else loss

    def _plain_loader(self) -> DataLoader[Any]:
        if self.train_dataset is None:
            raise ConfigError("train_dataset is missing")
        args, dataset, collate = self.args, self.train_dataset, self.data_collator
        if hasattr(dataset, "column_names") and hasattr(dataset, "set_format"):  # of the library `datasets`
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="training")
        return DataLoader(
            dataset,
            batch_size=self._train_batch_size,
            shuffle=True,
            collate_fn=collate,
            drop_last=args.dataloader_drop_last,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )


class _Passes(TrainerCallback):  # type: ignore[misc]
    """Looks back at each pass, and stops after the last one that is paid for."""

    def __init__(self, trainer: PrivateTrainer) -> None:
        self.trainer, self.passes = trainer, 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.passes = 0

    def on_epoch_end(self, args: Any, state: Any, control: Any, **__: Any) -> None:  # noqa: ARG002
        _private(self.trainer.optimizer).end_pass()
        self.passes += 1
        if self.passes >= self.trainer.privacy.epochs:
            control.should_training_stop = True


def _private(optimizer: Any) -> PrivateOptimizer:
    """Return the private optimizer out of accelerate's wrapper."""
    found = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(found, PrivateOptimizer):
        raise UnsupportedModelError(f"the trainer steps a {type(found).__name__} instead of the private optimizer")
    return found


def _record_losses(model: Any) -> RecordLosses:
    """Return the loss of each record for the kinds of models that are known."""
    kind = getattr(model, "loss_type", None)
    if kind is None and type(model).__name__.endswith("LMHeadModel"):
        kind = "ForCausalLM"
    if kind == "ForCausalLM":
        return lambda outputs, labels: _by_token(outputs.logits[:, :-1], labels[:, 1:])
    if kind in ("ForMaskedLM", "ForTokenClassification"):
        return lambda outputs, labels: _by_token(outputs.logits, labels)
    if kind in ("ForSequenceClassification", "ForImageClassification"):
        return lambda outputs, labels: _by_record(outputs.logits, labels)
    raise ConfigError(
        f"the loss of a {type(model).__name__} is not known record by record",
        hint="Pass record_losses, from outputs and labels to one loss for each record.",
    )


def _by_token(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return each record's mean over its labelled tokens; 0 for a record without any."""
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return losses.sum(1) / (labels != -100).sum(1).clamp(min=1)


def _by_record(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if not labels.is_floating_point():
        return F.cross_entropy(logits, labels.view(-1), reduction="none", ignore_index=-100)
    if logits.shape[1] == 1:
        return F.mse_loss(logits.view(-1), labels.view(-1), reduction="none")
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)


def _refuse(trainer: Any, privacy: Privacy) -> None:
    """Raise ConfigError, naming the argument that cannot be had with privacy."""
    args = trainer.args
    found = {
        f"gradient_accumulation_steps={args.gradient_accumulation_steps}": args.gradient_accumulation_steps != 1,
        f"max_grad_norm={args.max_grad_norm}": bool(args.max_grad_norm),
        "fp16": args.fp16,
        "bf16": args.bf16,
        "label_smoothing_factor": bool(args.label_smoothing_factor),
        "activation_checkpointing": getattr(args, "activation_checkpointing", False) or args.gradient_checkpointing,
        "torch_compile": args.torch_compile,
        "neftune_noise_alpha": args.neftune_noise_alpha is not None,
        "auto_find_batch_size": args.auto_find_batch_size,
        f"train_sampling_strategy={args.train_sampling_strategy}": args.train_sampling_strategy != "random",
        "deepspeed": bool(args.deepspeed),
        "fsdp": bool(args.fsdp),
        f"{args.world_size} processes": args.world_size != 1,
        f"{args.n_gpu} devices": args.n_gpu > 1,
        # A pass would show more batches than the loader's length, where the trainer stops.
        "Privacy.max_physical_batch_size": privacy.max_physical_batch_size is not None,
        "compute_loss_func": trainer.compute_loss_func is not None,
    }
    hints = {
        "gradient_acc": "Raise per_device_train_batch_size.",
        "max_grad": "Set max_grad_norm=0; Privacy(max_grad_norm=...) clips each record's gradient.",
        "compute": "Pass record_losses, from outputs and labels to one loss for each record.",
    }
    for name, bad in found.items():
        if bad:
            raise ConfigError(
                f"{name}: cannot be had with differential privacy here",
                hint=next((hint for start, hint in hints.items() if name.startswith(start)), "Leave it out."),
            )
