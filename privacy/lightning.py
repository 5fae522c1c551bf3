"""Differential privacy for a Lightning module with automatic optimization: one callback (extra `choral[lightning]`).

    trainer = Trainer(max_epochs=10, callbacks=[PrivacyCallback(Privacy(epsilon=3.0, delta=1e-5, epochs=10))])
    trainer.fit(module, loader)

The promise is that of :class:`choral.privacy.Privacy`: the same loader, step, ledger and checks. A training step that
computes its loss out of the module's parts is held to more than a model in a loop is, see
:meth:`choral.privacy.per_sample.model.PerSampleModel.check_step`. What the module logs of training data is not
protected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from choral.errors import ConfigError
from choral.privacy.dpsgd.engine import Privacy
from choral.privacy.dpsgd.poisson_loader import PrivateLoader
from choral.privacy.dpsgd.private_optimizer import PrivateOptimizer
from choral.privacy.errors import PrivacyError, UnsupportedLoaderError
from choral.privacy.ledgers.spent import Spent
from choral.privacy.per_sample.model import PerSampleModel, unwrap


class PrivacyCallback(Callback):  # type: ignore[misc]
    """Make `Trainer.fit` private: its loader, optimizer and training step.

    After `privacy.epochs` passes training stops, as it does after `max_epochs`. Refused by name: several optimizers or
    loaders, manual optimization, gradient accumulation, gradient clipping by the trainer, lower precision, several
    processes, `overfit_batches`, `min_epochs` beyond the budget, resuming from a checkpoint, and an own
    `optimizer_step` or `backward`. Raises: ConfigError, and what `Privacy.wrap` raises.
    """

    def __init__(self, privacy: Privacy) -> None:
        if not isinstance(privacy, Privacy):
            raise ConfigError(f"privacy is a {type(privacy).__name__}, expected a choral.Privacy")
        self.privacy = privacy
        self._model: PerSampleModel | None = None
        self._optimizer: PrivateOptimizer | None = None
        self._passes = 0

    def spent(self) -> Spent:
        """Return what the data has spent so far, in all runs that its ledger knows."""
        return self.privacy.spent()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be kept private, before anything is made."""
        if stage == "fit":
            _refuse(trainer, pl_module, self.privacy)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the private loader and optimizer in place of the module's own."""
        optimizers = trainer.optimizers
        if len(optimizers) != 1:
            raise ConfigError(f"configure_optimizers gave {len(optimizers)} optimizers, expected one")
        source = trainer.fit_loop._data_source
        loader = source.dataloader()
        if isinstance(loader, CombinedLoader) or not isinstance(loader, DataLoader):
            raise UnsupportedLoaderError(
                f"the training loader is a {type(loader).__name__}, expected one torch.utils.data.DataLoader"
            )
        self._model, self._optimizer, private_loader = self.privacy.wrap(pl_module, optimizers[0], loader)
        self._optimizer.step = _after_closure(self._optimizer)  # type: ignore[method-assign]
        trainer.optimizers = [self._optimizer]
        source.instance = private_loader
        self._passes = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to train if the trainer has put another loader in place of the private one."""
        if not isinstance(trainer.train_dataloader, PrivateLoader):
            raise UnsupportedLoaderError(
                f"the trainer draws from a {type(trainer.train_dataloader).__name__} instead of the private loader",
                hint="Leave out use_distributed_sampler, overfit_batches and whatever else replaces loaders.",
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look whether the training step treats the records one by one, until that was seen."""
        model = self._model
        if model is None:
            return
        with _quiet(pl_module):
            model.check_step(lambda part: _loss(pl_module.training_step(part, batch_idx)), batch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look back at a pass; stop after the last one that is paid for."""
        if self._optimizer is not None:
            self._optimizer.end_pass()
            self._passes += 1
            if self._passes >= self.privacy.epochs:
                trainer.should_stop = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the plain module back; the noise is in its weights."""
        if self._model is not None:
            unwrap(self._model)
        self._model = self._optimizer = None


def _after_closure(optimizer: PrivateOptimizer) -> Callable[..., Any]:
    """Return a step that runs Lightning's closure (forward, zero_grad, backward) first and once."""
    step = optimizer.step

    def stepped(closure: Callable[[], Any] | None = None) -> Any:
        result = closure() if closure is not None else None
        step()
        return result

    return stepped


class _quiet:
    """No logging from a training step that is only tried."""

    def __init__(self, module: LightningModule) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.module.log = self.module.log_dict = lambda *_, **__: None

    def __exit__(self, *_: Any) -> None:
        del self.module.log, self.module.log_dict


def _loss(output: Any) -> Any:
    found = output.get("loss") if isinstance(output, dict) else output
    if found is None:
        raise PrivacyError("training_step returned no loss: a batch without a step tells something about it")
    return found.mean()


def _refuse(trainer: Trainer, module: LightningModule, privacy: Privacy) -> None:
    """Raise ConfigError, naming the setting that cannot be had with privacy."""
    overridden = [
        name
        for name in ("optimizer_step", "backward", "configure_gradient_clipping", "optimizer_zero_grad")
        if getattr(type(module), name) is not getattr(LightningModule, name)
    ]
    found = {
        "automatic_optimization=False": not module.automatic_optimization,
        f"accumulate_grad_batches={trainer.accumulate_grad_batches}": trainer.accumulate_grad_batches != 1,
        "gradient_clip_val": bool(trainer.gradient_clip_val),
        f"precision={trainer.precision}": trainer.precision not in ("32-true", "64-true"),
        f"{trainer.world_size} processes": trainer.world_size != 1,
        "overfit_batches": trainer.overfit_batches > 0,
        "detect_anomaly": trainer._detect_anomaly,  # would end training for the NaN of a single record
        f"min_epochs={trainer.min_epochs}": (trainer.min_epochs or 0) > privacy.epochs,
        # A pass would show more batches than the loader's length, where the trainer stops.
        "Privacy.max_physical_batch_size": privacy.max_physical_batch_size is not None,
        "min_steps": bool(trainer.min_steps),
        "ckpt_path": trainer.ckpt_path is not None,
        "reload_dataloaders_every_n_epochs": bool(trainer.reload_dataloaders_every_n_epochs),
        **{f"an own {name}": True for name in overridden},
    }
    hints = {
        "accum": "Raise the loader's batch size.",
        "gradi": "Privacy(max_grad_norm=...) clips each record's gradient.",
        "min_e": "Set Privacy(epochs=...) to the passes that are made.",
        "preci": "Train in 32 bits.",
    }
    for name, bad in found.items():
        if bad:
            raise ConfigError(
                f"{name}: cannot be had with differential privacy here",
                hint=next((hint for start, hint in hints.items() if name.startswith(start)), "Leave it out."),
            )
