"""Training programs of many kinds, written as people write them, through `Privacy.wrap`.

For each: the per-sample gradients of every parameter are those of a loop over single records with autograd, the
loss falls when the noise is left out, and the budget spent is that of an accountant fed by hand. On scikit-learn's
digits and a text in this file; on Fashion-MNIST and tiny Shakespeare, too, where these are.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from choral.privacy import Privacy, UnsupportedModelError, replace_layers, unwrap
from choral.privacy.per_sample.model import with_per_sample_gradients

torch.set_num_threads(1)
POEM = """Tyger Tyger, burning bright, in the forests of the night; what immortal hand or eye, could frame thy fearful
symmetry? In what distant deeps or skies, burnt the fire of thine eyes? On what wings dare he aspire? What the hand,
dare seize the fire? And what shoulder, and what art, could twist the sinews of thy heart? And when thy heart began to
beat, what dread hand, and what dread feet? What the hammer, what the chain, in what furnace was thy brain?"""


@dataclass(frozen=True)
class Images:
    x: torch.Tensor  # (records, 1, side, side) in [0, 1]
    y: torch.Tensor


@dataclass(frozen=True)
class Text:
    codes: torch.Tensor  # (characters,)
    symbols: int

    def windows(self, size: int) -> torch.Tensor:
        """Shape (records, size)."""
        return self.codes[: len(self.codes) // size * size].view(-1, size)


@pytest.fixture(autouse=True)
def same_weights() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["digits", "fashion"])
def images(request: pytest.FixtureRequest) -> Images:
    if request.param == "digits":
        x, y = load_digits(return_X_y=True)
        return Images(torch.from_numpy(x[:256]).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(y[:256]))
    folder: Path = request.getfixturevalue("data") / "fashion-mnist"
    with gzip.open(folder / "train-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(16 + 256 * 784)[16:], dtype=np.uint8)
    with gzip.open(folder / "train-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(8 + 256)[8:], dtype=np.uint8)
    x = torch.from_numpy(pixels.astype(np.float32) / 255).view(-1, 1, 28, 28)
    return Images(x[:, :, ::2, ::2], torch.from_numpy(labels.astype(np.int64)))


@pytest.fixture(params=["poem", "shakespeare"])
def text(request: pytest.FixtureRequest) -> Text:
    text = 4 * POEM
    if request.param == "shakespeare":
        with gzip.open(request.getfixturevalue("data") / "tinyshakespeare" / "input.txt.gz", "rt") as file:
            text = file.read(4096)
    symbols = sorted(set(text))
    return Text(torch.tensor([symbols.index(c) for c in text]), len(symbols))


@dataclass(frozen=True)
class Program:
    model: nn.Module
    dataset: Dataset[Any]
    loss: Callable[[nn.Module, Any], torch.Tensor]  # of a model and a batch: the mean over its records
    lr: float = 3e-3
    epochs: int = 6
    max_grad_norm: float = 1.0
    parts: bool = False  # the loss is of the model's parts, not of `model(...)`

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.parameters(), lr=self.lr)


def hold(program: Program) -> None:
    """Check gradients, learning without noise, and the budget."""
    hold_to_autograd(program)
    hold_to_budget(program)


def hold_to_budget(program: Program) -> None:
    n, batch_size = len(program.dataset), 32  # type: ignore[arg-type]
    loader = DataLoader(program.dataset, batch_size=batch_size, shuffle=True)
    every = next(iter(DataLoader(program.dataset, batch_size=n)))
    privacy = Privacy(epsilon=4.0, delta=1e-4, max_grad_norm=program.max_grad_norm, epochs=program.epochs)
    model, optimizer, loader = privacy.wrap(program.model, program.optimizer(), loader)
    optimizer._source = lambda count: b"\xff" * count  # noise 0
    before = evaluated(program, every)
    for _ in range(program.epochs):
        for batch in loader:
            optimizer.zero_grad()
            if program.parts:
                model.check_step(lambda part: program.loss(model, part), batch)
            program.loss(model, batch).backward()
            optimizer.step()
    after = evaluated(program, every)
    assert after < 0.85 * before, (before, after)
    spent = privacy.spent()
    steps = math.ceil(n / batch_size)
    assert spent.steps == program.epochs * steps
    event = dp_accounting.PoissonSampledDpEvent(
        batch_size / n, dp_accounting.GaussianDpEvent(optimizer.noise_multiplier)
    )
    by_hand = PLDAccountant(value_discretization_interval=1e-3)
    by_hand.compose(dp_accounting.SelfComposedDpEvent(event, program.epochs * steps))
    assert spent.epsilon == pytest.approx(by_hand.get_epsilon(1e-4), rel=0.01)
    assert 3.9 < spent.epsilon <= 4.0


def evaluated(program: Program, batch: Any) -> float:
    plain = program.model
    plain.eval()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        value = float(program.loss(plain, batch))
    plain.train()
    return value


def hold_to_autograd(program: Program) -> None:
    """Each record by itself through the plain model, without dropout, which draws by batch."""
    plain = program.model
    rates = {m: m.p for m in plain.modules() if isinstance(m, nn.Dropout)}
    for m in rates:
        m.p = 0.0
    parameters = dict(plain.named_parameters())
    records = [program.dataset[i] for i in range(5)]
    want = []
    for record in records:
        (batch,) = DataLoader([record], batch_size=1)
        want.append(torch.autograd.grad(program.loss(plain, batch), list(parameters.values())))
    privacy = Privacy(epsilon=4.0, delta=1e-2)
    model, optimizer, loader = privacy.wrap(plain, program.optimizer(), DataLoader(records, batch_size=5))
    optimizer.original_optimizer.param_groups[0]["lr"] = 0.0
    for batch in loader:  # the only one, of all records
        if program.parts:
            model.check_step(lambda part: program.loss(model, part), batch)
        program.loss(model, batch).backward()
        for place, (name, p) in enumerate(parameters.items()):
            rows = torch.stack([gradients[place] for gradients in want])
            found = model.per_sample(p)
            torch.testing.assert_close(found, rows, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        optimizer.step()  # the first-batch check agrees
    for m, p in rates.items():
        m.p = p
    assert unwrap(model) is plain


class Net(nn.Module):
    """The network of torch's MNIST example, smaller."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, 1), nn.Conv2d(8, 12, 3, 1)
        self.dropout1, self.dropout2 = nn.Dropout(0.25), nn.Dropout(0.5)
        self.fc1, self.fc2 = nn.Linear(12 * ((side - 4) // 2) ** 2, 32), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = self.dropout1(F.max_pool2d(x, 2))
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        return F.log_softmax(self.fc2(self.dropout2(x)), dim=1)


def test_convolutional_network(images: Images) -> None:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        data, target = batch
        return F.nll_loss(model(data), target)

    hold(Program(Net(images.x.shape[-1]), TensorDataset(images.x, images.y), loss, lr=5e-3))


class VAE(nn.Module):
    """The variational autoencoder of torch's examples, smaller."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.fc1, self.fc21, self.fc22 = nn.Linear(size, 40), nn.Linear(40, 4), nn.Linear(40, 4)
        self.fc3, self.fc4 = nn.Linear(4, 40), nn.Linear(40, size)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h1 = F.relu(self.fc1(x))
        return self.fc21(h1), self.fc22(h1)

    def reparameterize(self, mu: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
        std = torch.exp(0.5 * logvar)
        return mu + torch.randn_like(std) * std

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z))))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mu, logvar = self.encode(x.view(-1, self.size))
        return self.decode(self.reparameterize(mu, logvar)), mu, logvar


def test_variational_autoencoder(images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's loss is a sum over the batch, which is not protected (docs/privacy.md): here, the mean."""

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        (data,) = batch
        recon, mu, logvar = model(data)
        bce = F.binary_cross_entropy(recon, data.view(len(data), -1), reduction="sum")
        kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        return (bce + kld) / len(data)

    size = images.x[0].numel()
    with monkeypatch.context() as patched:  # to a single record the same noise as within the batch
        patched.setattr(torch, "randn_like", lambda t: torch.sin(9 * t.detach()))
        hold_to_autograd(Program(VAE(size), TensorDataset(images.x), loss))
    hold_to_budget(Program(VAE(size), TensorDataset(images.x), loss, max_grad_norm=50.0))


def test_lightning_autoencoder(images: Images) -> None:
    """Lightning's tutorial, whose training step calls the module's parts; in its own trainer in test_lightning."""
    lightning = pytest.importorskip("lightning", reason="the extra lightning is not installed")
    size = images.x[0].numel()

    class LitAutoEncoder(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(size, 64), nn.ReLU(), nn.Linear(64, 8))
            self.decoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, size))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x, _ = batch
            x = x.view(x.size(0), -1)
            return F.mse_loss(self.decoder(self.encoder(x)), x)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return model.training_step(batch, 0)

    hold(Program(LitAutoEncoder(), TensorDataset(images.x, images.y), loss, parts=True))


class Siamese(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(size, 32), nn.ReLU(inplace=True), nn.Linear(32, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class Pairs(Dataset[Any]):
    """A pair is one record."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images.x)

    def __getitem__(self, i: int) -> Any:
        x, y = self.images.x, self.images.y
        j = next(j for j in range(i + 1, i + 999) if (y[j % len(y)] == y[i]) == (i % 2 == 0)) % len(y)
        return (x[i], x[j]), float(y[i] == y[j])


def test_siamese_network(images: Images) -> None:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        (a, b), same = batch
        distance = F.pairwise_distance(model(a), model(b))
        return (same * distance.pow(2) + (1 - same) * F.relu(1 - distance).pow(2)).float().mean()

    hold(Program(Siamese(images.x[0].numel()), Pairs(images), loss))


class Block(nn.Module):
    """After nanoGPT: one matrix for queries, keys and values, a mask in a buffer."""

    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))
        self.attn_dropout = nn.Dropout(0.1)
        self.heads = heads
        self.register_buffer("bias", torch.tril(torch.ones(size, size)).view(1, 1, size, size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(self.ln_1(x)).split(C, dim=2)
        q, k, v = (t.view(B, T, self.heads, C // self.heads).transpose(1, 2) for t in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        y = self.attn_dropout(F.softmax(att, dim=-1)) @ v
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, symbols: int, size: int, width: int = 32) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(symbols, width), nn.Embedding(size, width)
        self.blocks = nn.ModuleList([Block(width, 2, size) for _ in range(2)])
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, symbols, bias=False)
        self.wte.weight = self.lm_head.weight
        self.drop = nn.Dropout(0.1)
        nn.init.normal_(self.wte.weight, std=0.1)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pos = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
        x = self.drop(self.wte(idx) + self.wpe(pos))
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))


def test_character_transformer_with_tied_weights_and_positions(text: Text) -> None:
    windows = text.windows(13)
    program = Program(
        GPT(text.symbols, 12),
        TensorDataset(windows[:, :-1].contiguous(), windows[:, 1:].contiguous()),
        lambda model, batch: model(*batch)[1],
    )
    hold(program)


class LanguageModel(nn.Module):
    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, 16)
        self.rnn = nn.LSTM(16, 32, num_layers=2, dropout=0.1, batch_first=True)
        self.head = nn.Linear(32, symbols)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        h, _ = self.rnn(self.embed(t))
        return self.head(h)


def test_recurrent_language_model(text: Text) -> None:
    """Teacher forcing: the text is input and, shifted by one, target. Refused first, by name and with the way out."""

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        (t,) = batch
        return F.cross_entropy(model(t[:, :-1]).transpose(1, 2), t[:, 1:])

    model = LanguageModel(text.symbols)
    with pytest.raises(UnsupportedModelError, match="layer rnn is a LSTM") as caught:
        with_per_sample_gradients(model)
    assert "replace_layers(model)" in caught.value.hint
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)  # made before: the parameters stay the same
    replace_layers(model)
    program = Program(model, TensorDataset(text.windows(10)), loss, lr=1e-2)
    hold(program)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}


def test_bert(text: Text) -> None:
    """Hugging Face's own, with the masked head tied to the embedding.

    `outputs.loss` is the mean over the masked characters *of the batch*, which is not protected: here, the mean over
    records of each one's own mean.
    """
    transformers = pytest.importorskip("transformers", reason="the extra huggingface is not installed")
    mask, size = text.symbols, 12
    config = transformers.BertConfig(
        vocab_size=text.symbols + 1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    plain = text.windows(size)
    hidden = torch.rand(plain.shape, generator=torch.Generator().manual_seed(0)) < 0.25
    hidden[:, 3] = True  # at least one
    dataset = TensorDataset(plain.masked_fill(hidden, mask), plain.masked_fill(~hidden, -100))

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        inputs, labels = batch
        logits = model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # 0 where not masked
        return (losses.sum(1) / (labels != -100).sum(1)).mean()

    hold(Program(transformers.BertForMaskedLM(config), dataset, loss, lr=1e-2))
