"""Sums under a shared key beside TenSEAL's CKKS at NVFlare's defaults, in one run.

    python benchmarks/homomorphic_shared.py [--repeats 7] [--blocks 24] [--model 25600000]

One JSON line per figure. The functions compared take turns, each on one thread, and medians of their processor time are
given, so that other load on the machine strikes both alike. ``ratio`` is ours over theirs for rates, theirs over ours
for bytes: above 1 is better. "encrypt" goes from a vector to a ciphertext object, "to_bytes" to what is sent; "add" and
"decrypt" start there. ``limit`` is what the sum's bits alone would take, log2(2 n bound + 1) / 8 bytes; ``expansion``
is bytes over that, beside 54/30 (one prime of 54 bits for 30 bits of plaintext) and beside log2 q / log2 t, which no
packing into that ring passes.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from math import log2
from typing import Any

import numpy as np
import tenseal as ts
import tenseal.sealapi as sealapi

from choral.protocols.homomorphic.shared import bfv, ckks
from choral.protocols.homomorphic.shared.seal import RingKey, SealRing
from choral.protocols.homomorphic.shared.secure_sum import SharedSession
from choral.protocols.interface import SumSpec

Row = dict[str, Any]
SIZES = ((20, 1000), (20, 100), (20, 10), (16, 1000), (16, 100), (16, 10), (8, 10))
LENGTH = 25_600_000
PEER = "TenSEAL CKKS, degree 8192, [60, 40, 40], scale 2^40"


class Peer:
    """TenSEAL's vectors as NVFlare uses them: public-key CKKS, one ciphertext for 4096 values, serialised whole."""

    def __init__(self, blocks: int) -> None:
        self.context = ts.context(
            ts.SCHEME_TYPE.CKKS, poly_modulus_degree=8192, coeff_mod_bit_sizes=[60, 40, 40], n_threads=1
        )
        self.context.global_scale = 2**40
        self.values = np.random.default_rng(1).uniform(-1, 1, (blocks, 4096))
        self.raw = self.to_bytes()
        self.sums = [ts.ckks_vector_from(self.context, raw) for raw in self.raw]
        self.bytes_per_value = len(self.raw[0]) / 4096

    def encrypt(self) -> list[object]:
        return [ts.ckks_vector(self.context, row) for row in self.values]

    def to_bytes(self) -> list[bytes]:
        return [bytes(ts.ckks_vector(self.context, row).serialize()) for row in self.values]

    def add(self) -> list[object]:
        return [one + ts.ckks_vector_from(self.context, raw) for one, raw in zip(self.sums, self.raw, strict=True)]

    def decrypt(self) -> list[list[float]]:
        return [ts.ckks_vector_from(self.context, raw).decrypt() for raw in self.raw]

    @property
    def error(self) -> float:
        return float(np.abs(np.array(self.decrypt()) - self.values).max())


class Ours:
    """One party's and the server's work on full blocks."""

    def __init__(self, plan: bfv.BfvPlan | ckks.CkksPlan, values: Any) -> None:
        self.plan: Any = plan
        self.ring = SealRing(plan.parameters)
        key = RingKey.from_seed(self.ring, bytes(range(32)))
        self.encryptor, self.decryptor = key.encryptor(), key.decryptor()
        self.values = values.reshape(-1, plan.block)
        self.plain = sealapi.Plaintext()
        self.bodies = self.to_bytes()
        self.sums = [self.ring.load_fresh(body) for body in self.bodies]
        self.sent = [self.ring.dump_sum(one) for one in self.sums]

    def encrypt(self) -> list[Any]:
        return [self.encryptor.encrypt_symmetric(self.plan.encode(self.ring, row)) for row in self.values]

    def to_bytes(self) -> list[bytes]:
        ring, plan = self.ring, self.plan
        return [ring.dump_fresh(self.encryptor.encrypt_symmetric(plan.encode(ring, row))) for row in self.values]

    def add(self) -> None:
        for total, body in zip(self.sums, self.bodies, strict=True):
            self.ring.evaluator.add_inplace(total, self.ring.load_fresh(body))

    def decrypt(self) -> list[Any]:
        out = []
        for body in self.sent:
            self.decryptor.decrypt(self.ring.load_sum(body), self.plain)
            out.append(self.plan.decode(self.ring, self.plain, self.plan.block))
        return out

    @property
    def error(self) -> float:
        return float(np.abs(np.array(self.decrypt()) - self.values).max())


def interleaved(repeats: int, functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median processor seconds per call of each, taking turns, after one call each to warm up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.process_time()
            function()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def compared(ours: Ours, peer: Peer, repeats: int) -> Row:
    steps = ("encrypt", "to_bytes", "add", "decrypt")
    functions = {f"{who} {step}": getattr(one, step) for step in steps for who, one in (("ours", ours), ("peer", peer))}
    seconds = interleaved(repeats, functions)
    row: Row = {
        "degree": ours.plan.parameters.degree,
        "modulus_bits": round(log2(ours.plan.parameters.modulus), 1),
        "bytes_per_value": round(ours.plan.bytes_per_value, 3),
        "against": PEER,
        "peer_bytes_per_value": round(peer.bytes_per_value, 1),
        "ratio_bytes": round(peer.bytes_per_value / ours.plan.bytes_per_value, 2),
    }
    for step in steps:
        rate = ours.values.size / seconds[f"ours {step}"] / 1e6
        other = peer.values.size / seconds[f"peer {step}"] / 1e6
        row |= {f"{step}_mvalues_per_s": round(rate, 2), f"peer_{step}": round(other, 2)}
        row[f"ratio_{step}"] = round(rate / other, 2)
    return row


def exact(peer: Peer, repeats: int, blocks: int) -> Iterator[Row]:
    """BFV for values of so many bits of so many parties."""
    for bits, parties in SIZES:
        bound = 2 ** (bits - 1) - 1
        plan = bfv.choose(parties, bound, LENGTH)
        values = np.random.default_rng(2).integers(-bound, bound + 1, blocks * plan.block)
        limit = log2(plan.radix) / 8  # no ciphertext of a value is shorter
        yield {
            "what": "BFV, shared key",
            "bits": bits,
            "parties": parties,
            "values_per_slot": plan.values_per_slot,
            "plain_bits": round(log2(plan.parameters.plain_modulus), 1),
            "margin_bits": plan.margin_bits,
            **compared(Ours(plan, values), peer, repeats),
            "limit": round(limit, 3),
            "expansion": round(plan.bytes_per_value / limit, 3),
            "expansion_54_30": 1.8,
            "expansion_of_ring": round(log2(plan.parameters.modulus) / log2(plan.parameters.plain_modulus), 3),
        }


def floats(peer: Peer, repeats: int, blocks: int) -> Iterator[Row]:
    """CKKS to the precision that the peer reaches with one vector, or better, for the sum of ten."""
    theirs = peer.error
    for precision in (1e-4, 10 ** round(log2(theirs) / log2(10))):
        plan = ckks.choose(10, 1.0, LENGTH, precision)
        ours = Ours(plan, np.random.default_rng(3).uniform(-1, 1, blocks * plan.block))
        row = compared(ours, peer, repeats)
        facts = {"parties": 10, "error_bound_of_sum": plan.error_bound, "error_of_one": ours.error}
        yield {"what": "CKKS, shared key", **facts, "peer_error_of_one": theirs, **row}


def model(length: int, parties: int = 10) -> Row:
    """A whole round in this process: all parties encrypt, the server adds, one decrypts and reports."""
    names = tuple(f"p{place}" for place in range(parties))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    session = SharedSession(SumSpec(parties=names, length=length, bound=2**19 - 1), min_survivors=2)
    vector = np.random.default_rng(4).integers(-(2**19) + 1, 2**19, length)
    one, start = session.begin(), time.perf_counter()
    for name in names:
        one.submit(name, vector)
    sent = time.perf_counter() - start
    result = one.finish()
    seconds = time.perf_counter() - start
    assert np.array_equal(result.total, parties * vector)
    return {
        "what": "a round end to end, shared key",
        "length": length,
        "parties": parties,
        "seconds": round(seconds, 1),
        "seconds_per_party_sent_and_added": round(sent / parties, 2),
        "seconds_to_open": round(seconds - sent, 1),
        "megabytes_up_per_party": round(result.bytes_up["p1"] / 1e6, 1),
        "bytes_per_value": round(result.bytes_up["p1"] / length, 3),
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "peak_megabytes_before": before // 1024,
        "megabytes_of_one_vector": vector.nbytes // 2**20,
    }


def rows(*, repeats: int = 7, blocks: int = 24, length: int = 0) -> Iterator[Row]:
    """Every figure; ``length`` of the model for the round end to end, 0 to leave it out."""
    peer = Peer(max(1, blocks // 2))
    yield from exact(peer, repeats, blocks)
    yield from floats(peer, repeats, blocks)
    if length:
        yield model(length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--blocks", type=int, default=24, help="ciphertexts of ours per turn")
    parser.add_argument("--model", type=int, default=0, help="length of a model to sum end to end for ten parties")
    options = parser.parse_args()
    for row in rows(repeats=options.repeats, blocks=options.blocks, length=options.model):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
