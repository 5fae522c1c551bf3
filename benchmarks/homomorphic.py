"""Homomorphic sums beside TenSEAL's CKKS at NVFlare's defaults, beside the masked sum, and end to end.

    python benchmarks/homomorphic.py [--only speed|bytes|crossover|rounds|model] [--length 2000000] [--repeats 5]
    python benchmarks/homomorphic.py --only speed --device cuda        # the transform in torch on a GPU as well

One JSON line per figure, on one core, in seconds of processor time. The functions compared take turns and medians are
given. ``ratio`` is the peer's seconds (or bytes) over ours: above 1 we are better.

speed: bytes per value and values per second to encrypt (to the bytes that are sent) and to add (from them), split and
    shared key, for 20-bit and 16-bit values. ``limit``: the carry room alone, what no exact sum can go below.
bytes: what a party sends in a round of 50 with 100,000 values, and in one of ten with 2,410, split key over masked.
crossover: seconds of one party and of the server for a vector, split key beside masked, by the number of parties and
    dropouts. Component times are measured (encrypting, receiving and adding, one mask), the sums of them computed:
    what a masked party does grows with its neighbours, what its server does with dropouts times neighbours.
rounds: whole rounds of both protocols in this process, checked against the plain sum, to hold against the components.
model: a model of 25.6 million parameters, 10 parties, end to end in a process of its own: seconds, bytes, peak memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import secrets
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import homomorphic_shared as shared
import numpy as np
import torch
from homomorphic_shared import interleaved

from choral import Homomorphic, Masked
from choral.protocols import SumSpec
from choral.protocols.crypto import mask_stream as stream
from choral.protocols.crypto import modular_integers as integers
from choral.protocols.homomorphic.ring.arithmetic import ring
from choral.protocols.homomorphic.ring.gaussian import TAIL, sample
from choral.protocols.homomorphic.ring.kernels_torch import TorchKernels
from choral.protocols.homomorphic.split.parameters import BATCH, SplitParameters, choose
from choral.protocols.homomorphic.split.party_and_server import Collector, SplitRound, encrypt
from choral.protocols.masking import messages
from choral.protocols.masking.mask_addition import masked

Line = dict[str, Any]
MODEL = 25_600_000
"""Parameters of a ResNet-50."""


def names(n: int) -> tuple[str, ...]:
    return tuple(f"party {place}" for place in range(n))


def spec_of(n: int, bits: int, length: int) -> SumSpec:
    return SumSpec(parties=names(n), length=length, bound=2 ** (bits - 1))


def values_of(bits: int, length: int, seed: int = 0) -> Any:
    bound = 2 ** (bits - 1)
    return np.random.default_rng(seed).integers(-bound, bound, length, endpoint=True)


def split_round(parameters: SplitParameters) -> SplitRound:
    return SplitRound(parameters=parameters, session=secrets.token_bytes(32), number=1)


def encrypted(vector: Any, terms: SplitRound) -> list[bytes]:
    return list(encrypt(vector, terms, randomness=secrets.token_bytes).messages)


def collect(pieces: list[bytes], terms: SplitRound) -> None:
    collector = Collector(terms, ("party 0",))
    for raw in pieces:
        collector.receive("party 0", raw)
    collector.include("party 0")


def speed(repeats: int, length: int) -> Iterator[Line]:
    peer = shared.Peer(12)
    for n, bits in ((1000, 20), (1000, 16), (10, 16)):
        parameters = choose(spec_of(n, bits, length))
        terms, vector = split_round(parameters), values_of(bits, length)
        ours = encrypted(vector, terms)
        times = interleaved(
            repeats,
            {
                "encrypt": lambda vector=vector, terms=terms: encrypted(vector, terms),  # type: ignore[misc]
                "add": lambda ours=ours, terms=terms: collect(ours, terms),  # type: ignore[misc]
                "peer encrypt": peer.to_bytes,
                "peer add": peer.add,
            },
        )
        rate = {
            name: (peer.values.size if "peer" in name else length) / seconds / 1e6 for name, seconds in times.items()
        }
        size = sum(map(len, ours)) / length
        yield {
            "what": "BFV, split key",
            "parties": n,
            "bits": bits,
            "against": shared.PEER,
            "bytes_per_value": size,
            "limit": parameters.slot_bits / 8,
            "peer_bytes_per_value": peer.bytes_per_value,
            "ratio_bytes": peer.bytes_per_value / size,
            "to_bytes_mvalues_per_s": rate["encrypt"],
            "peer_to_bytes": rate["peer encrypt"],
            "ratio_to_bytes": rate["encrypt"] / rate["peer encrypt"],
            "add_mvalues_per_s": rate["add"],
            "peer_add": rate["peer add"],
            "ratio_add": rate["add"] / rate["peer add"],
            "degree": parameters.degree,
            "modulus_bits": parameters.modulus_bits,
            "values_per_coefficient": parameters.slots,
        }
    yield from shared.exact(peer, repeats, 24)
    yield from shared.floats(peer, repeats, 24)


def bytes_up() -> Iterator[Line]:
    """Of whole rounds in this process, checked against the plain sum."""
    for n, length, bits in ((50, 100_000, 16), (50, 100_000, 20), (50, 100_000, 22), (10, 2410, 16)):
        spec, vector, sent = spec_of(n, bits, length), values_of(bits, length), {}
        for name, config in (("split", Homomorphic()), ("masked", Masked())):
            summing = config.open(spec).begin()
            for party in spec.parties:
                summing.submit(party, vector)
            result = summing.finish()
            if not np.array_equal(result.total, n * vector):
                raise SystemExit(f"the {name} sum is not the plain one")
            sent[name] = max(result.bytes_up.values())
        line = {"what": "bytes up, split key over masked", "parties": n, "length": length, "bits": bits}
        yield {**line, **sent, "ratio": sent["split"] / sent["masked"]}


def transform(repeats: int, device: str) -> Line:
    """The product and transform alone, on a device, for the ring of 20-bit values and 1,000 parties."""
    parameters = choose(spec_of(1000, 20, 10**7))
    chosen, bulk = ring(parameters.degree, parameters.ring.primes), TorchKernels(device)
    lanes = BATCH if device == "cpu" else 32 * BATCH
    count = parameters.degree * lanes
    digits = torch.zeros((len(parameters.digits), count), dtype=torch.float64, device=device)
    errors = sample(secrets.token_bytes(32), count)
    public = np.zeros((parameters.prime_count, count), np.int32)
    scales = np.ones((parameters.prime_count, len(parameters.digits)))
    key = bulk.transform(chosen, errors[: parameters.degree].astype(np.float64))
    times = interleaved(
        repeats,
        {"ours": lambda: bulk.encrypt(chosen, digits, scales, errors, public, key, lanes=lanes)},
    )
    rate = count * parameters.slots / times["ours"] / 1e6
    return {"what": "transform in torch, copies included", "device": device, "millions_of_values_per_second": rate}


def crossover(repeats: int, length: int) -> Iterator[Line]:
    """Seconds per million values of each component, then what they add up to."""
    bits = 20
    vector = values_of(bits, length)
    for n in (10, 30, 100, 300, 1000, 3000, 10000):
        spec = spec_of(n, bits, length)
        parameters, chosen = choose(spec), Masked().parameters(n)
        terms, modulus = split_round(parameters), spec.modulus_bits
        pieces, packed = encrypted(vector, terms), masked(vector, modulus, [], [])
        upload = messages.encode(messages.Upload(bytes(16), 1, messages.to_pieces(packed)))
        total = np.zeros(length, integers.accumulator_dtype(modulus))
        key_bits = (2 * n * TAIL).bit_length()
        key = np.zeros(parameters.degree, np.int64)
        seeds = [secrets.token_bytes(32) for _ in range(chosen.neighbours + 1)]

        def unpack_and_add(upload: bytes = upload, modulus: int = modulus, total: Any = total) -> None:
            message = messages.to_server(upload, sender="", limit=messages.limit(messages.Upload, len(upload)))
            assert isinstance(message, messages.Upload)
            packed = messages.from_pieces(message.vector)
            assert packed is not None
            np.add(total, integers.unpack(packed, length, modulus), out=total)

        times = interleaved(
            repeats,
            {
                "encrypt": lambda terms=terms: encrypted(vector, terms),  # type: ignore[misc]
                "collect": lambda pieces=pieces, terms=terms: collect(pieces, terms),  # type: ignore[misc]
                "key": lambda key=key, key_bits=key_bits, seeds=seeds: masked(key, key_bits, seeds, []),  # type: ignore[misc]
                "pack": lambda modulus=modulus: masked(vector, modulus, [], []),  # type: ignore[misc]
                "mask": lambda total=total, seeds=seeds: stream.add_mask(total, seeds[0]),  # type: ignore[misc]
                "unpack": unpack_and_add,
            },
        )
        times = {name: seconds / (1 if name == "key" else length / 1e6) for name, seconds in times.items()}
        yield _crossing(n, chosen.neighbours, times)


def _crossing(n: int, neighbours: int, times: dict[str, float]) -> Line:
    """The key's part of the server: it unpacks n keys and expands their masks, N values each, as the party does."""
    party_split = times["encrypt"] + times["key"]
    party_masked = times["pack"] + (neighbours + 1) * times["mask"]
    line: Line = {
        "what": "split key beside masked, per million 20-bit values",
        "parties": n,
        "neighbours": neighbours,
        "party_split_seconds": party_split,
        "party_masked_seconds": party_masked,
        "party_ratio": party_masked / party_split,
    }
    for dropouts in (0.0, 0.05, 0.1):
        left, gone = n * (1 - dropouts), n * dropouts
        key_mask = times["key"] / (neighbours + 1)
        expansions = left + gone * neighbours * (1 - dropouts)
        split = left * times["collect"] + expansions * key_mask
        plain = left * times["unpack"] + expansions * times["mask"]
        line |= {f"server_split_seconds_{dropouts:.0%}": split, f"server_ratio_{dropouts:.0%}": plain / split}
    return line


def rounds(length: int) -> Iterator[Line]:
    """A real round of each, taking turns, 60 parties with 6 dropped."""
    n, bits, gone = 60, 20, 6
    spec = spec_of(n, bits, length)
    kinds: dict[str, Any] = {"split": Homomorphic().open(spec), "masked": Masked().open(spec)}
    vectors = [values_of(bits, length, seed) for seed in range(4)]
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for _ in range(3):
        for name, session in kinds.items():
            summing = session.begin()
            start = time.process_time()
            for place, party in enumerate(names(n)[gone:]):
                summing.submit(party, vectors[place % 4])
            middle = time.process_time()
            result = summing.finish()
            seconds[name].append((middle - start, time.process_time() - middle))
            expected = sum(vectors[place % 4] for place in range(n - gone))
            if not np.array_equal(result.total, expected):
                raise SystemExit(f"the {name} sum is not the plain one")
    medians = {
        name: [statistics.median(column) for column in zip(*found, strict=True)] for name, found in seconds.items()
    }
    for part, place in (("submit", 0), ("finish", 1)):
        ours, theirs = medians["split"][place], medians["masked"][place]
        yield {
            "what": f"a round of 60 parties, 6 dropped, {length} values: {part}",
            "split_seconds": ours,
            "masked_seconds": theirs,
            "ratio": theirs / ours,
        }


def model(kind: str) -> Line:
    """In a fresh process, so that the peak is of this alone."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_model, (kind,))


def _model(kind: str) -> Line:
    n, bits = 10, 16
    torch.set_num_threads(1)
    spec = spec_of(n, bits, MODEL)
    config: Any = {"split": Homomorphic(), "shared": Homomorphic(key="shared"), "masked": Masked()}[kind]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    session = config.open(spec)
    summing = session.begin()
    start = time.process_time()
    vector = values_of(bits, MODEL)
    drawn = time.process_time() - start
    for party in spec.parties:
        summing.submit(party, vector)
    submitted = time.process_time()
    result = summing.finish()
    finished = time.process_time()
    if not np.array_equal(result.total, n * vector):
        raise SystemExit("the sum is not the plain one")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "what": f"{kind}: 25.6 million parameters of {bits} bits, {n} parties",
        "seconds_per_party": (submitted - start - drawn) / n,
        "seconds_to_open": finished - submitted,
        "bytes_up_per_value": max(result.bytes_up.values()) / MODEL,
        "peak_mebibytes": peak / 1024,
        "of_which_before": before / 1024,
        "of_which_input_and_total": 2 * 8 * MODEL / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("speed", "bytes", "crossover", "rounds", "model"))
    parser.add_argument("--length", type=int, default=2_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="where the torch transform runs, e.g. cuda")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parts: dict[str, Callable[[], Iterator[Line]]] = {
        "speed": lambda: speed(arguments.repeats, arguments.length),
        "bytes": bytes_up,
        "crossover": lambda: crossover(arguments.repeats, arguments.length),
        "rounds": lambda: rounds(arguments.length),
        "model": lambda: (model(kind) for kind in ("split", "shared", "masked")),
    }
    for name in [arguments.only] if arguments.only else parts:
        for line in parts[name]():
            print(json.dumps({key: round(x, 4) if isinstance(x, float) else x for key, x in line.items()}), flush=True)
    if arguments.only in (None, "speed"):
        print(json.dumps(transform(arguments.repeats, arguments.device)))


if __name__ == "__main__":
    main()
