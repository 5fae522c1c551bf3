"""LEAF's JSON files (Caldas et al. 2018, arXiv 1812.01097): a user is a party."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.utils.data import TensorDataset

from choral.errors import DataError

# LEAF's own alphabet of 80 (models/utils/language_utils.py), for its Shakespeare files.
ALPHABET = "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"


class _LeafRecords(msgspec.Struct):
    x: list[Any]
    y: list[Any]


class _Leaf(msgspec.Struct):
    users: list[str]
    user_data: dict[str, _LeafRecords]
    num_samples: list[int] | None = None


def read_leaf(path: str | Path, *, alphabet: str = ALPHABET) -> dict[str, TensorDataset]:
    """The parties of one LEAF file, or of all ``*.json`` in a folder.

    Records are numbers, float32, shape (n, ...), with whole labels, int64, shape (n,); or texts of one length and the
    text's next character, both as places in ``alphabet``, int64. Users without records are left out.

    Raises: DataError naming file and user: missing or malformed file, a user twice or without data, counts that do not
    agree, records of different shapes, values that are not finite, characters beyond the alphabet.
    """
    path = Path(path)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"no *.json in {path}", hint="give LEAF's data/train folder")
    parties: dict[str, TensorDataset] = {}
    for file in files:
        try:
            content = msgspec.json.decode(file.read_bytes(), type=_Leaf)
        except OSError as error:
            raise DataError(f"cannot read {file}: {error}", hint="give a LEAF json file or their folder") from None
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise DataError(f"{file} is not in LEAF's format: {error}", hint="users, num_samples, user_data") from None
        counts = content.num_samples
        if counts is not None and len(counts) != len(content.users):
            raise DataError(f"{file} has {len(content.users)} users and {len(counts)} entries in num_samples")
        for position, user in enumerate(content.users):
            where = f"{file}, user {user!r}"
            if user in parties or user not in content.user_data:
                raise DataError(f"{where}: {'named twice' if user in parties else 'no entry in user_data'}")
            records = content.user_data[user]
            if len(records.x) != len(records.y) or (counts is not None and counts[position] != len(records.y)):
                raise DataError(f"{where}: {len(records.x)} records, {len(records.y)} labels, which do not agree")
            if records.y:
                parties[user] = _dataset(records, alphabet, where)
    if not parties:
        raise DataError(f"{path} has no user with records")
    return parties


def _dataset(records: _LeafRecords, alphabet: str, where: str) -> TensorDataset:
    if all(isinstance(text, str) for text in records.x):
        if any(not isinstance(label, str) or len(label) != 1 for label in records.y):
            raise DataError(f"{where}: the label of a text must be one character")
        if len({len(text) for text in records.x}) != 1:
            raise DataError(f"{where}: texts of different lengths")
        return TensorDataset(
            torch.tensor([_codes(text, alphabet, where) for text in records.x]),
            torch.tensor(_codes("".join(records.y), alphabet, where)),
        )
    try:
        features = torch.tensor(records.x, dtype=torch.float32)
        labels = torch.tensor(records.y, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise DataError(f"{where}: records must be numbers in lists of one shape, labels numbers") from None
    if labels.ndim != 1 or not torch.isfinite(features).all() or not bool((labels == labels.round()).all()):
        raise DataError(f"{where}: records must be finite numbers, labels whole ones")
    if not torch.isfinite(labels).all():
        raise DataError(f"{where}: a label is not finite")
    return TensorDataset(features, labels.long())


def _codes(text: str, alphabet: str, where: str) -> list[int]:
    codes = [alphabet.find(character) for character in text]
    if min(codes, default=0) < 0:
        raise DataError(f"{where}: a character is not in the alphabet of {len(alphabet)}", hint="give alphabet=...")
    return codes
