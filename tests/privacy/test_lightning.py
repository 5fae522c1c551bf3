"""Lightning modules with automatic optimization, made private by a callback: gradients, budget, what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

L = pytest.importorskip("lightning", reason="the extra lightning is not installed")

from choral.errors import ConfigError  # noqa: E402
from choral.privacy import (  # noqa: E402
    BudgetExceededError,
    Privacy,
    PrivacyError,
    UnsupportedLoaderError,
    UnsupportedModelError,
)
from choral.privacy.lightning import PrivacyCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
]
RECORDS = torch.rand(96, 12, generator=torch.Generator().manual_seed(0)).round()


class AutoEncoder(L.LightningModule):
    """The tutorial's: the training step calls the parts, not the module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
        self.decoder = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 12))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (x,) = batch
        loss = F.mse_loss(self.decoder(self.encoder(x)), x)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(module: Any, privacy: Privacy, *others: Any, batch_size: int = 16, loader: Any = None, **settings: Any) -> Any:
    callback = PrivacyCallback(privacy)
    settings = {"max_epochs": privacy.epochs, "accelerator": "cpu", "logger": False, "enable_checkpointing": False} | {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **settings,
    }
    trainer = L.Trainer(callbacks=[callback, *others], **settings)
    loader = loader or DataLoader(TensorDataset(RECORDS), batch_size=batch_size, shuffle=True)
    trainer.fit(module, loader)
    return trainer


class Silent(L.Callback):
    """No noise; and each step's per-sample gradients held to a loop over its records."""

    def __init__(self) -> None:
        self.steps = self.compared = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.privacy = next(c for c in trainer.callbacks if isinstance(c, PrivacyCallback))
        self.privacy._optimizer._source = lambda count: b"\xff" * count

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batch = batch

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.steps += 1
        if self.steps > 3:
            return
        for i in range(len(self.batch[0])):
            pl_module.eval()
            loss = F.mse_loss(pl_module.decoder(pl_module.encoder(self.batch[0][i])), self.batch[0][i])
            alone = torch.autograd.grad(loss, list(pl_module.parameters()))
            pl_module.train()
            for p, g in zip(pl_module.parameters(), alone, strict=True):
                torch.testing.assert_close(self.privacy._model.per_sample(p)[i], g, rtol=1e-3, atol=1e-6)
                self.compared += 1


def error(module: Any) -> float:
    with torch.no_grad():
        return float(F.mse_loss(module.decoder(module.encoder(RECORDS)), RECORDS))


def test_autoencoder_learns_and_is_accounted_for() -> None:
    module, silent, privacy = AutoEncoder(), Silent(), Privacy(epsilon=3.0, delta=1e-3, epochs=15)
    before = error(module)
    trainer = fit(module, privacy, silent)
    assert error(module) < 0.75 * before
    assert silent.steps == 15 * 6
    assert silent.compared > 100
    assert privacy.spent().steps == 15 * 6
    assert 2.9 < privacy.spent().epsilon <= 3.0
    assert privacy.spent().sample_rate == 16 / 96
    assert trainer.callback_metrics["train_loss"] > 0  # logged by real steps alone, once each
    assert not any(m._forward_hooks for m in module.modules())  # unwrapped
    with pytest.raises(BudgetExceededError):
        fit(module, privacy)


def test_noise_is_added() -> None:
    weights = []
    for _ in range(2):
        module = AutoEncoder()
        fit(module, Privacy(epsilon=3.0, delta=1e-3))
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert not torch.equal(*weights)


class Moves(L.Callback):
    """How each step moves the weights, flat; of SGD at rate 1 without momentum, less the gradient that was released."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.before = nn.utils.parameters_to_vector(pl_module.parameters()).detach().clone()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        now = nn.utils.parameters_to_vector(pl_module.parameters()).detach().clone()
        self.seen.append(now - self.before)
        self.before = now


@pytest.mark.parametrize("share", [1.0, 0.93], ids=["the noise", "seven per cent less"])
def test_the_noise_that_was_paid_for_reaches_the_module(share: float) -> None:
    """By chi-square over 8 steps of 4,020 weights, at most 2e-7 of false alarms; 7 % less would be noticed."""

    class Still(AutoEncoder):
        """Next to no gradient: what moves the weights is noise."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(12, 160), nn.Linear(160, 12)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return 1e-9 * super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=share)

    moves, privacy = Moves(), Privacy(epsilon=3.0, delta=1e-3, max_grad_norm=0.7, epochs=2)
    fit(Still(), privacy, moves, batch_size=24)
    moved = torch.stack(moves.seen).double()
    assert moved.shape == (8, 12 * 160 + 160 + 160 * 12 + 12)
    planned = privacy.spent().noise_multiplier * 0.7 / 24  # type: ignore[operator]
    low, high = (stats.chi2.ppf(p, moved.numel()) for p in (1e-7, 1 - 1e-7))
    ratio = float(moved.square().sum()) / planned**2
    assert (low < ratio < high * (1 + 2**-10) ** 2) == (share == 1.0), (ratio / moved.numel()) ** 0.5


def test_training_ends_with_the_budget() -> None:
    privacy = Privacy(epsilon=3.0, delta=1e-3, epochs=2)
    trainer = fit(AutoEncoder(), privacy, max_epochs=50)
    assert trainer.current_epoch == 2
    assert privacy.spent().steps == 2 * 6
    assert privacy.spent().epsilon <= 3.0


def test_fewer_epochs_than_planned_cost_less() -> None:
    privacy = Privacy(epsilon=3.0, delta=1e-3, epochs=4)
    fit(AutoEncoder(), privacy, max_epochs=2)
    assert privacy.spent().steps == 2 * 6


def test_empty_batches_are_steps_nobody_sees() -> None:
    privacy = Privacy(epsilon=3.0, delta=1e-3, epochs=2)
    shown = Silent()
    fit(AutoEncoder(), privacy, shown, batch_size=1)
    assert privacy.spent().steps == 2 * 96
    assert 90 < shown.steps < 160  # 121 expected


def test_evaluation_checkpoints_and_schedules_work(tmp_path: Any) -> None:
    class Complete(AutoEncoder):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("error", F.mse_loss(self.decoder(self.encoder(batch[0])), batch[0]))

        def train_dataloader(self) -> Any:
            return DataLoader(TensorDataset(RECORDS), batch_size=16, shuffle=True)

        def val_dataloader(self) -> Any:
            return DataLoader(TensorDataset(RECORDS), batch_size=96)

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    module, privacy = Complete(), PrivacyCallback(Privacy(epsilon=3.0, delta=1e-3, epochs=2))
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        callbacks=[privacy, L.pytorch.callbacks.ModelCheckpoint(tmp_path)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    assert trainer.callback_metrics["error"] == pytest.approx(error(module))
    (saved,) = tmp_path.glob("*.ckpt")
    again = Complete.load_from_checkpoint(saved, map_location="cpu")
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), module.parameters(), strict=True))
    assert privacy.spent().steps == 12


class Leaking(L.Callback):
    """Changes a buffer in a way that torch does not count, from the third batch on."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx >= 2:
            pl_module.seen.data.add_(1.0)


def test_buffers_are_looked_at_at_the_end_of_a_pass() -> None:
    module = AutoEncoder()
    module.register_buffer("seen", torch.zeros(1))
    with pytest.raises(UnsupportedModelError, match="buffer seen"):
        fit(module, Privacy(epsilon=3.0, delta=1e-3), Leaking())


def test_another_loader_in_place_of_the_private_one_is_refused() -> None:
    class Other(L.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.fit_loop._data_source.instance = DataLoader(TensorDataset(RECORDS), batch_size=16)

    with pytest.raises(UnsupportedLoaderError, match="draws from a DataLoader"):
        fit(AutoEncoder(), Privacy(epsilon=3.0, delta=1e-3), Other())


def test_steps_that_are_only_tried_log_nothing() -> None:
    class Counting(AutoEncoder):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            calls.append(self._current_fx_name)
            self.log("count", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
            return super().training_step(batch, batch_idx)

    calls: list[Any] = []
    trainer = fit(Counting(), Privacy(epsilon=3.0, delta=1e-3))
    assert trainer.callback_metrics["count"] == calls.count("training_step") == 6
    assert len(calls) > 6
    assert not any("on_train_batch_start" in key for key in trainer.fit_loop.epoch_loop._results)


class Summing(AutoEncoder):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (x,) = batch
        return {"loss": F.mse_loss(self.decoder(self.encoder(x)), x, reduction="sum")}


class Weighting(AutoEncoder):
    """As `cross_entropy(weight=...)` and `ignore_index` do."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (x,) = batch
        weights = x[:, 0] + 0.5
        return ((self.decoder(self.encoder(x)) - x).square().mean(1) * weights).sum() / weights.sum()


class Mixing(AutoEncoder):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (x,) = batch
        h = self.encoder(x)
        return F.mse_loss(self.decoder(h - h.mean(0)), x)


class RandomlyMixing(AutoEncoder):
    """Whose loss is never the same twice: only the gradients tell."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (x,) = batch
        h = self.encoder(x) + torch.randn(len(x), 4)
        return F.mse_loss(self.decoder(h - h.mean(0)), x)


@pytest.mark.parametrize("kind", [Summing, Weighting, Mixing])
def test_losses_that_are_no_mean_over_records_are_refused(kind: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="not the mean over its records"):
        fit(kind(), Privacy(epsilon=3.0, delta=1e-3))


def test_mixing_is_seen_behind_random_losses() -> None:
    with pytest.raises(UnsupportedModelError, match="depends on the other records"):
        fit(RandomlyMixing(), Privacy(epsilon=3.0, delta=1e-3))


class Tokens(L.LightningModule):
    """Positions without a dimension for records, dropout, and a layer that Opacus' hooks look after."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe, self.drop = nn.Embedding(2, 8), nn.Embedding(12, 8), nn.Dropout(0.2)
        self.scale, self.head = nn.PReLU(), nn.Linear(8, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        t = batch[0].long()
        h = self.drop(self.wte(t) + self.wpe(torch.arange(t.shape[1])))
        return F.cross_entropy(self.head(self.scale(h)).flatten(0, 1), t.flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("batch_size", [12, 16, 2])
def test_positions_are_mended_in_training_steps_too(batch_size: int) -> None:
    fit(Tokens(), Privacy(epsilon=3.0, delta=1e-3), batch_size=batch_size)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches=2"),
        ({"gradient_clip_val": 1.0}, "gradient_clip_val"),
        ({"precision": "bf16-mixed"}, "precision=bf16-mixed"),
        ({"overfit_batches": 2}, "overfit_batches"),
        ({"detect_anomaly": True}, "detect_anomaly"),
        ({"min_epochs": 3, "max_epochs": 3}, "min_epochs=3"),
        ({"min_steps": 30, "max_epochs": 30}, "min_steps"),
        ({"reload_dataloaders_every_n_epochs": 1}, "reload_dataloaders"),
    ],
)
def test_settings_that_cannot_be_had_are_named(settings: dict[str, Any], name: str) -> None:
    privacy = Privacy(epsilon=3.0, delta=1e-3)
    with pytest.raises(ConfigError, match=name) as caught:
        fit(AutoEncoder(), privacy, **settings)
    assert caught.value.hint
    assert privacy.spent().steps == 0


class Manual(AutoEncoder):
    automatic_optimization = False


class OwnStep(AutoEncoder):
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)


class TwoOptimizers(AutoEncoder):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.encoder.parameters(), 0.1), torch.optim.SGD(self.decoder.parameters(), 0.1)


@pytest.mark.parametrize(("kind", "why"), [(Manual, "automatic_optimization"), (OwnStep, "own optimizer_step")])
def test_modules_that_step_by_themselves_are_refused(kind: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        fit(kind(), Privacy(epsilon=3.0, delta=1e-3))


def test_several_optimizers_loaders_and_skipped_steps_are_refused() -> None:
    privacy = Privacy(epsilon=3.0, delta=1e-3)
    with pytest.raises((ConfigError, RuntimeError), match="optimizers"):  # Lightning itself may be the first
        fit(TwoOptimizers(), privacy)
    with pytest.raises(UnsupportedLoaderError, match="expected one"):
        fit(AutoEncoder(), privacy, loader=[DataLoader(TensorDataset(RECORDS), batch_size=16)] * 2)

    class Skipping(AutoEncoder):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None

    assert privacy.spent().steps == 0
    with pytest.raises(PrivacyError, match="no loss"):
        fit(Skipping(), privacy)
    with pytest.raises(ConfigError, match=r"expected a choral\.Privacy"):
        PrivacyCallback(3.0)
    assert math.isfinite(privacy.spent().epsilon)
