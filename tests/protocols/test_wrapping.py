"""Sums that may wrap: the total is the exact sum modulo 2^bits, only where everybody agreed to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from choral.protocols import Homomorphic, Masked, Plain, SumSpec
from choral.protocols.crypto.modular_integers import packed_bytes
from choral.protocols.errors import InputError, PolicyError, SpecError
from choral.protocols.masking import messages
from choral.protocols.masking.party import join

PARTIES = ("a", "b", "c", "d", "e")


def reduced(total: np.ndarray, bits: int) -> np.ndarray:
    half = 1 << (bits - 1)
    return (total + half) % (2 * half) - half


@pytest.mark.parametrize("kind", [Plain(), Masked(), Homomorphic()], ids=lambda kind: kind.name)
@pytest.mark.parametrize(("bits", "bound"), [(1, 5), (8, 200), (20, 2**22), (33, 2**40)])
def test_the_total_is_the_sum_modulo_two_to_the_bits(kind: Any, bits: int, bound: int) -> None:
    vectors = np.random.default_rng(bits).integers(-bound, bound + 1, (5, 60))
    vectors[:, 0], vectors[:, 1] = bound, -bound
    summing = kind.open(SumSpec(parties=PARTIES, length=60, bound=bound, bits=bits)).begin()
    for number, party in enumerate(PARTIES[:4]):
        vector = vectors[number]
        summing.submit(party, torch.from_numpy(vector) if number % 2 else vector)
    result = summing.finish()
    exact = vectors[:4].sum(0)
    assert result.survivors == PARTIES[:4]
    # What cannot wrap may give the exact sum; modulo 2^bits all are the same.
    assert np.array_equal(reduced(result.total, bits), reduced(exact, bits))
    if kind.name != "homomorphic":
        assert np.array_equal(result.total, reduced(exact, bits))
    assert (reduced(exact, bits) != exact).any(), "the test has nothing that wraps"


@pytest.mark.parametrize("kind", [Plain(), Masked()], ids=lambda kind: kind.name)
def test_fewer_bits_are_fewer_bytes_and_the_bound_still_counts(kind: Any) -> None:
    wide, narrow = (SumSpec(parties=PARTIES, length=999, bound=2**20, bits=bits) for bits in (None, 10))
    sent = []
    for spec in (wide, narrow):
        summing = kind.open(spec).begin()
        with pytest.raises(InputError, match="every \\|value\\|"):
            summing.submit("a", np.full(999, 2**20 + 1))
        for party in PARTIES:
            summing.submit(party, np.full(999, 2**20))
        sent.append(max(summing.finish().bytes_up.values()))
    assert sent[0] - sent[1] == packed_bytes(999, wide.modulus_bits) - packed_bytes(999, 10)


def test_more_bits_than_the_exact_sum_needs_are_not_used() -> None:
    spec = SumSpec(parties=PARTIES, length=1, bound=100, bits=40)
    assert spec.modulus_bits == spec.exact_bits == 10
    assert spec.wraps_at is None
    assert SumSpec(parties=PARTIES, length=1, bound=100, bits=9).wraps_at == 9


@pytest.mark.parametrize("bits", [0, 65, -1])
def test_bits_out_of_range(bits: int) -> None:
    with pytest.raises(SpecError, match="<= bits <= 64"):
        SumSpec(parties=PARTIES, length=1, bound=100, bits=bits)


def test_a_party_that_did_not_agree_to_wrapping_refuses(network: Callable[..., Any]) -> None:
    """The server may not make the sum wrap behind the parties' backs, nor at another modulus than was agreed on."""
    net = network(4, corrupt=1)
    short = replace(net.setup, modulus_bits=8)

    def joined(policy: Any) -> Any:
        raw = messages.encode(short)
        return join(raw, name="p0", identity=net.identities["p0"], policy=policy, randomness=net.random["p0"])

    from dataclasses import replace as changed

    for agreed in (None, 7, 9):
        with pytest.raises(PolicyError, match="can wrap"):
            joined(changed(net.policy, wraps_at=agreed))
    joined(changed(net.policy, wraps_at=8))
