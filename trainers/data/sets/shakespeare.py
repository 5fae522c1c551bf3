"""The next character of Shakespeare's plays: a speaker is a party, as in LEAF (Caldas et al. 2018, arXiv 1812.01097).

The text is karpathy/char-rnn's 1,115,394 characters (public domain): 309 speakers, 65 symbols.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import ConcatDataset, TensorDataset

from choral.errors import ConfigError, DataError
from choral.trainers.data.sets.sources import Source, read
from choral.trainers.data.tables import classification
from choral.trainers.task.settings import Split, Training
from choral.trainers.task.task import Task

TEXT = Source(
    folder="tinyshakespeare",
    name="input.txt",
    url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    size=1115394,
    sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
SYMBOLS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
WINDOW = 80  # characters seen before the one to be told, as in LEAF


def read_speakers(data_dir: str | Path | None = None) -> dict[str, str]:
    """What each speaker says, in the order of the plays, speeches joined by a line's end. Raises: as sources.read."""
    speeches: dict[str, list[str]] = {}
    for block in re.split(r"\n\n+", read(TEXT, data_dir).decode("ascii").strip()):
        head, _, speech = block.partition("\n")
        speeches.setdefault(head.removesuffix(":"), []).append(speech)
    return {name: "\n".join(said) for name, said in speeches.items()}


def windows(text: str, symbols: str = SYMBOLS, window: int = WINDOW) -> TensorDataset:
    """Every run of ``window`` characters with the one that follows: int64, shapes (n, window) and (n,); views only.

    Raises: DataError for a text that is too short or has a character beyond ``symbols``.
    """
    if len(text) <= window:
        raise DataError(f"a text of {len(text)} characters has no window of {window}", hint="leave the party out")
    number = {symbol: index for index, symbol in enumerate(symbols)}
    try:
        codes = torch.tensor([number[character] for character in text])
    except KeyError as error:
        raise DataError(f"the text has a character U+{ord(error.args[0]):04X} that is no symbol") from None
    runs = codes.unfold(0, window + 1, 1)
    return TensorDataset(runs[:, :-1], runs[:, -1])


class NextCharacter(nn.Module):
    """Codes, shape (n, window), to logits over the symbols: an embedding of 8, an LSTM, a linear layer."""

    def __init__(self, symbols: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, 8)
        self.lstm = nn.LSTM(8, hidden, batch_first=True)
        self.out = nn.Linear(hidden, symbols)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(self.embedding(codes))
        logits: torch.Tensor = self.out(states[:, -1])
        return logits


def load(split: Split, training: Training, seed: int, data_dir: str | Path | None = None) -> Task:
    """One party per speaker with at least ``split.min_records`` windows; the end of what each says is held out.

    ``split.test_fraction`` is of each speaker's text, in its order; no window reaches across the cut.
    """
    del seed  # nothing here is drawn at random
    if split.kind != "key":
        raise ConfigError(f'shakespeare is split by speaker, not "{split.kind}"', hint='set split.kind = "key"')
    if split.reshuffle:
        raise ConfigError("shakespeare is told by speaker, and not dealt out again", hint="leave out reshuffle")
    if not training.hidden:
        raise ConfigError("shakespeare has no linear model", hint="set training.hidden, e.g. 128")
    parties, tests = {}, {}
    for name, text in sorted(read_speakers(data_dir).items()):
        cut = len(text) - round(split.test_fraction * len(text))
        if cut - WINDOW >= split.min_records:
            parties[name] = windows(text[:cut])
            if len(text) - cut > WINDOW:
                tests[name] = windows(text[cut:])
    if not parties or not tests:
        raise DataError(f"no speaker has {split.min_records} windows of {WINDOW} characters and some held out")
    return classification(
        lambda: NextCharacter(len(SYMBOLS), training.hidden),
        dict(parties),
        ConcatDataset(tests.values()),
        training,
        held_out=dict(tests),
    )
