"""Speed of the primitives of secure sums, each beside a peer or a limit measured in the same run.

    python benchmarks/primitives.py [--only stream] [--repeats 15] [--length 1000000]

One JSON line per figure. The functions compared take turns, ``--repeats`` times, and medians are given, so that other
load on the machine strikes both alike. ``ratio`` is seconds of the peer over seconds of ours: above 1 we are faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from Crypto.Cipher import AES
from Crypto.Protocol.SecretSharing import Shamir as PeerShamir

from choral.protocols.crypto import keys, shamir
from choral.protocols.crypto import mask_stream as stream
from choral.protocols.crypto import modular_integers as integers

SEED = os.urandom(32)
Line = dict[str, Any]


def interleaved(repeats: int, functions: dict[str, Callable[[], object]], inner: int = 1) -> dict[str, float]:
    """Median seconds per call of each, taking turns, after one call each to warm up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(inner):
                function()
            times[name].append((time.perf_counter() - start) / inner)
    return {name: statistics.median(values) for name, values in times.items()}


def compared(what: str, ours: float, peer: float, against: str, **facts: Any) -> Line:
    return {"what": what, "seconds": ours, "against": against, "peer_seconds": peer, "ratio": peer / ours, **facts}


def raw_aes(size: int) -> dict[str, Callable[[], object]]:
    """AES-128 over a buffer in cache, nothing generated and nothing added: what no expand-and-add can beat."""
    chunk = stream.CHUNK_BYTES
    source, out = bytes(chunk), bytearray(chunk + 16)
    pieces = [min(chunk, size - start) for start in range(0, size, chunk)]
    ecb = AES.new(SEED[:16], AES.MODE_ECB)
    found: dict[str, Callable[[], object]] = {
        "pycryptodome": lambda: [ecb.encrypt(memoryview(source)[:n], output=memoryview(out)[:n]) for n in pieces]
    }
    if "openssl" in stream.BACKENDS:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        ctr = Cipher(algorithms.AES(SEED[:16]), modes.CTR(SEED[16:])).encryptor()
        found["openssl"] = lambda: [ctr.update_into(memoryview(source)[:n], out) for n in pieces]
    return found


def masks(repeats: int, length: int) -> Iterator[Line]:
    for dtype in (np.uint32, np.uint64):
        accumulator = np.zeros(length - length % 4, dtype)
        other = np.ones_like(accumulator)
        size = accumulator.nbytes

        def add(backend: stream.Keystream, accumulator: Any = accumulator) -> None:
            stream._keystream = backend
            stream.add_mask(accumulator, SEED)

        def plain_add(accumulator: Any = accumulator, other: Any = other) -> None:
            np.add(accumulator, other, out=accumulator)

        functions: dict[str, Callable[[], object]] = {"add": plain_add}
        for name, cipher in raw_aes(size).items():
            functions[f"raw {name}"] = cipher
            functions[f"mask {name}"] = lambda backend=stream.BACKENDS[name], add=add: add(backend)  # type: ignore[misc]
        seconds = interleaved(repeats, functions)
        for name in stream.BACKENDS:
            ours = seconds[f"mask {name}"]
            facts = {
                "values": accumulator.size,
                "bits": 8 * accumulator.itemsize,
                "gigabytes_per_second": size / ours / 1e9,
            }
            yield compared(f"expand and add, {name}", ours, seconds[f"raw {name}"], f"raw AES-128, {name}", **facts)
            yield compared(f"expand and add, {name}", ours, seconds["add"], "numpy add of a ready mask", **facts)


def sharing(repeats: int) -> Iterator[Line]:
    threshold, holders = 51, 100
    secret = os.urandom(32)
    indices = range(1, holders + 1)
    (shares,) = shamir.split([secret], threshold=threshold, indices=indices, randomness=os.urandom)
    combiner = shamir.Combiner(indices[:threshold], threshold)
    checking = shamir.Combiner(indices, threshold)
    peer = PeerShamir.split(threshold, holders, secret[:16])
    seconds = interleaved(
        max(3, repeats // 3),
        {
            "split": lambda: shamir.split([secret], threshold=threshold, indices=indices, randomness=os.urandom),
            "weights": lambda: shamir.Combiner(indices[:threshold], threshold),
            "combine": lambda: combiner.combine(shares[:threshold]),
            "check": lambda: checking.combine(shares),
            # the peer's secrets have 16 bytes: two of them carry one of ours
            "peer split": lambda: [PeerShamir.split(threshold, holders, part) for part in (secret[:16], secret[16:])],
            "peer combine": lambda: [PeerShamir.combine(peer[:threshold]) for _ in range(2)],
        },
    )
    facts = {"threshold": threshold, "holders": holders}
    against = "pycryptodome's Shamir, two 16-byte halves"
    yield compared("share one 32-byte secret", seconds["split"], seconds["peer split"], against, **facts)
    yield compared("combine, weights reused", seconds["combine"], seconds["peer combine"], against, **facts)
    once = seconds["weights"] + seconds["combine"]
    yield compared("combine, weights computed", once, seconds["peer combine"], against, **facts)
    yield compared("combine 100 shares, all checked", seconds["check"], seconds["peer combine"], against, **facts)


def curves(repeats: int) -> Iterator[Line]:
    private, message, nonce = os.urandom(32), os.urandom(100), bytes(12)
    public, identity = keys.x25519_public(private), keys.ed25519_public(private)
    signature, sealed = keys.ed25519_sign(private, message), keys.seal(private, nonce, message, b"")
    work: dict[str, Callable[[], object]] = {
        "X25519 shared": lambda: keys.x25519_shared(private, public),
        "Ed25519 sign": lambda: keys.ed25519_sign(private, message),
        "Ed25519 verify": lambda: keys.ed25519_verify(identity, message, signature),
        "seal 100 bytes": lambda: keys.seal(private, nonce, message, b""),
        "unseal 100 bytes": lambda: keys.unseal(private, nonce, sealed, b""),
    }

    def using(backend: keys.Backend, function: Callable[[], object]) -> Callable[[], object]:
        def call() -> object:
            keys._backend = backend
            return function()

        return call

    for what, function in work.items():
        functions = {name: using(backend, function) for name, backend in keys.BACKENDS.items()}
        seconds = interleaved(repeats, functions, inner=20)
        for name, ours in seconds.items():
            yield compared(f"{what}, {name}", ours, seconds["pycryptodome"], "pycryptodome")


def packing(repeats: int, length: int) -> Iterator[Line]:
    for bits in (8, 16, 20, 23, 31, 32, 40, 64):
        values = np.frombuffer(os.urandom(8 * length), np.uint64).astype(integers.accumulator_dtype(bits))
        packed = integers.pack(values, bits)
        seconds = interleaved(
            repeats,
            {
                "pack": lambda values=values, bits=bits: integers.pack(values, bits),  # type: ignore[misc]
                "unpack": lambda packed=packed, bits=bits: integers.unpack(packed, length, bits),  # type: ignore[misc]
                "copy": lambda values=values: values.copy(),  # type: ignore[misc]
            },
        )
        for what in ("pack", "unpack"):
            rate = values.nbytes / seconds[what] / 1e9
            facts = {"values": length, "bits": bits, "gigabytes_per_second": rate}
            yield compared(what, seconds[what], seconds["copy"], "numpy copy of the unpacked vector", **facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["stream", "shamir", "keys", "integers"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--length", type=int, default=1_000_000, help="coordinates of a vector")
    options = parser.parse_args()
    parts: dict[str, Callable[[], Iterator[Line]]] = {
        "stream": lambda: masks(options.repeats, options.length),
        "shamir": lambda: sharing(options.repeats),
        "keys": lambda: curves(options.repeats),
        "integers": lambda: packing(options.repeats, options.length),
    }
    for name, part in parts.items():
        if options.only in (None, name):
            for line in part():
                print(json.dumps({"part": name, **line}), flush=True)


if __name__ == "__main__":
    main()
