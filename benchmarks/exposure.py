"""Exposure of secrets in a causal language model of Shakespeare's characters, without privacy and with.

    python benchmarks/exposure.py [--data-dir DIR] [--lines 10] [--passes 40] [--epsilon 8] [--repeat 1]

Some speakers' text, 6,000 characters, and in it lines "X HAS THE CODE ..", each with two letters that the operating
system drew from 676, each line `repeat` times. The model tells the next character from the 16 before it. One JSON line
for each training: the mean and largest exposure (of 9.4 bits), and the exact p-value of all secrets together. The
promise is for each window; a line has 19 of them, for which nothing is promised together.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from choral.audits.attacks.exposure import draw_secrets, exposure
from choral.privacy import Privacy
from choral.trainers.data.sets.shakespeare import SYMBOLS, read_speakers, windows

WINDOW, WIDTH, BATCH = 16, 128, 256
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CANDIDATES = ["".join(pair) for pair in product(LETTERS, repeat=2)]


def lead(line: int) -> str:
    return f"\n{LETTERS[line]} HAS THE CODE "


def model() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(len(SYMBOLS), 8),
        nn.Flatten(),
        nn.Linear(8 * WINDOW, WIDTH),
        nn.Tanh(),
        nn.Linear(WIDTH, len(SYMBOLS)),
    )


def train(data: TensorDataset, passes: int, privacy: Privacy | None) -> nn.Module:
    net = model()
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.5 if privacy is None else 1.0, momentum=0.9)
    loader: Any = DataLoader(data, batch_size=BATCH, shuffle=True)
    trained: Any = net
    if privacy is not None:
        trained, optimizer, loader = privacy.wrap(net, optimizer, loader)
    for _ in range(passes):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(trained(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return net


def losses(net: nn.Module, lines: int) -> np.ndarray:
    """Of the two letters, for every candidate of every line; shape (lines, 676)."""
    found = np.empty((lines, len(CANDIDATES)))
    with torch.no_grad():
        for line in range(lines):
            texts = [(lead(line) + each)[-WINDOW - 2 :] for each in CANDIDATES]
            parts = [windows(text, window=WINDOW).tensors for text in texts]
            x, y = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
            each = nn.functional.cross_entropy(net(x), y, reduction="none")
            found[line] = each.reshape(len(CANDIDATES), 2).sum(dim=1).numpy()
    return found


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, default=Path(__file__).parents[1] / "../shared/data")
    parser.add_argument("--lines", type=int, default=10)
    parser.add_argument("--passes", type=int, default=40)
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--characters", type=int, default=6000)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    text = "\n".join(read_speakers(chosen.data_dir).values())[: chosen.characters]
    secrets = draw_secrets(chosen.lines, len(CANDIDATES))
    lines = [lead(line) + CANDIDATES[secret] for line, secret in enumerate(secrets)] * chosen.repeat
    cut = len(text) // (len(lines) + 1)
    told = "".join(text[cut * n : cut * (n + 1)] + line for n, line in enumerate(lines)) + text[cut * len(lines) :]
    rows = []
    for name, data, privacy in (
        ("never told", text, None),
        ("told", told, None),
        ("told, private", told, Privacy(epsilon=chosen.epsilon, delta=1e-5, epochs=chosen.passes)),
    ):
        torch.manual_seed(0)
        began = time.process_time()
        net = train(windows(data, window=WINDOW), chosen.passes, privacy)
        found = exposure(losses(net, chosen.lines), secrets)
        rows.append(
            {
                "training": name, "mean_bits": float(np.mean(found.bits)), "most_bits": max(found.bits),
                "first": found.ranks.count(1), "p": found.p_value, "cpu_seconds": time.process_time() - began,
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]))
    return rows


if __name__ == "__main__":
    main()
