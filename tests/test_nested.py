"""One table of nested batches goes through every door alike."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import types
from collections import OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from transformers import BatchEncoding
from transformers.modeling_outputs import SequenceClassifierOutput

from choral import nested
from choral.privacy.record_independence import batch_rows
from choral.privacy.record_independence.forward_probes import watched
from choral.trainers.task import device_batches

ROWS = 4


class Pair(NamedTuple):
    features: Any
    labels: Any


class LongerPair(Pair):
    """Torch's pytree takes this for a leaf."""


class Listed(list[Any]):
    pass


@dataclasses.dataclass(frozen=True)
class Sample:
    features: Any
    name: str = "a"
    labels: Any = None


def x(start: float = 0.0) -> torch.Tensor:
    return start + torch.arange(3.0 * ROWS).reshape(ROWS, 3)


SHAPES: dict[str, Callable[[Any, Any], Any]] = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, b],
    "a list's kind": lambda a, b: Listed([a, b]),
    "dict": lambda a, b: {"b": a, "a": b},
    "ordered": lambda a, b: OrderedDict(z=a, y=b),
    "default": lambda a, b: defaultdict(list, z=a, y=b),
    "deque": lambda a, b: deque([a, b], maxlen=2),
    "named": lambda a, b: Pair(a, b),
    "a named tuple's kind": lambda a, b: LongerPair(a, b),
    "dataclass": lambda a, b: Sample(a, labels=b),
    "user's dict": lambda a, b: UserDict(z=a, y=b),
    "read-only": lambda a, b: types.MappingProxyType({"z": a, "y": b}),
    "hugging face batch": lambda a, b: BatchEncoding({"input_ids": a, "labels": b}),
    "hugging face output": lambda a, b: SequenceClassifierOutput(loss=a, logits=b),
    "structseq": lambda a, b: torch.return_types.max((a, b)),
    "all of them": lambda a, b: [{"k": (Sample(Pair(a, [None, "text", 3])), UserDict(z={"deep": Listed([b])}))}],
}


@pytest.fixture(params=SHAPES)
def make(request: pytest.FixtureRequest) -> Callable[[Any, Any], Any]:
    return SHAPES[request.param]


def same(found: Any, expected: list[torch.Tensor]) -> bool:
    found = list(found)
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_every_door_sees_the_same_tensors(make: Callable[[Any, Any], Any]) -> None:
    batch, both = make(x(), x(7.0)), [x(), x(7.0)]
    assert same(nested.tensors(batch), both)
    assert same(batch_rows.tensors(batch), both)
    assert same(device_batches.tensors_of(batch), both)
    seen: list[torch.Tensor] = []
    layer = nn.Identity()
    with watched({"layer": layer}, ROWS, lambda _, t: seen.append(t)):
        layer(batch)
    assert same(seen, both * 2)  # in and out


def test_every_door_changes_the_same_tensors(make: Callable[[Any, Any], Any]) -> None:
    batch, doubled = make(x(), x(7.0)), [2 * x(), 2 * x(7.0)]
    take = torch.tensor([3, 3, 0, 1])
    for changed in (
        nested.map_tensors(batch, lambda t: 2 * t),
        batch_rows.changed(batch, lambda t: 2 * t),
        device_batches.mapped(batch, lambda t: 2 * t),
    ):
        assert same(nested.tensors(changed), doubled)
        assert type(changed) is (dict if isinstance(batch, types.MappingProxyType) else type(batch))
    assert same(nested.tensors(batch_rows.taken(batch, take, ROWS)), [x()[take], x(7.0)[take]])
    assert same(nested.tensors(batch), [x(), x(7.0)])  # the batch itself is as it was


def test_what_is_not_a_tensor_is_passed_on() -> None:
    class Own:
        held = x()

    own = Own()
    assert nested.leaves([own, "text", None, 3]) == [own, "text", None, 3]
    assert nested.mapped((own, b"bytes"), lambda leaf: leaf) == (own, b"bytes")
    assert same(nested.tensors([own]), [])


def test_entries_and_attributes_of_an_output_stay_together() -> None:
    output = nested.map_tensors(SequenceClassifierOutput(logits=x()), lambda t: t + 1)
    assert torch.equal(output.logits, x() + 1)
    assert torch.equal(output["logits"], x() + 1)


def test_a_deque_keeps_its_length_and_a_default_dict_its_default() -> None:
    assert nested.map_tensors(deque([x()], maxlen=3), torch.neg).maxlen == 3
    assert nested.map_tensors(defaultdict(list, a=x()), torch.neg)["new"] == []


def test_packed_sequences_move_and_are_no_rows() -> None:
    packed = pack_sequence([torch.ones(2, 3), torch.ones(5, 3)], enforce_sorted=False)
    assert list(batch_rows.tensors([packed])) == []
    assert batch_rows.changed([packed], torch.neg)[0] is packed
    moved = device_batches.mapped([packed], lambda t: t + 1)[0]
    assert type(moved) is PackedSequence
    assert torch.equal(moved.batch_sizes, packed.batch_sizes)
    assert torch.equal(moved.data, packed.data + 1)
    assert torch.equal(moved.sorted_indices, packed.sorted_indices + 1)
    plain = pack_sequence([torch.ones(5, 3), torch.ones(2, 3)])
    assert device_batches.mapped(plain, torch.neg).sorted_indices is None


def test_torch_is_imported_when_a_batch_is_walked() -> None:
    program = "import sys; from choral import nested; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
