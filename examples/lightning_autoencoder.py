"""An autoencoder in Lightning, as its tutorial has it, made private by one callback.

pip install 'choral[lightning]'
python examples/lightning_autoencoder.py
"""

import logging

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from choral import Privacy
from choral.privacy.lightning import PrivacyCallback

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
pixels = torch.from_numpy(load_digits().data).float() / 16
train, test = pixels[:1500], pixels[1500:]


class LitAutoEncoder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        self.decoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid())

    def training_step(self, batch, batch_idx):
        (x,) = batch
        return F.mse_loss(self.decoder(self.encoder(x)), x)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def error(model):
    with torch.no_grad():
        return F.mse_loss(model.decoder(model.encoder(test)), test).item()


def main():
    L.seed_everything(0)
    model = LitAutoEncoder()
    before = error(model)
    privacy = PrivacyCallback(Privacy(epsilon=5.0, delta=1e-4, max_grad_norm=0.05, epochs=15))
    trainer = L.Trainer(
        max_epochs=15,
        accelerator="cpu",
        callbacks=[privacy],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(train), batch_size=64, shuffle=True))
    print(f"reconstruction error on held-out digits {before:.4f} before, {error(model):.4f} after")
    print(privacy.spent())


if __name__ == "__main__":
    main()
