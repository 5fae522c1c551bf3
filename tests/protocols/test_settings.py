"""Every setting that security rests on is of a known type and in range, or refused with a typed error."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch

from choral.errors import ChoralError
from choral.protocols import Homomorphic, Masked, Plain, Policy, SumSpec
from choral.protocols import argument_checks as checks
from choral.protocols.crypto import keys
from choral.protocols.errors import InputError, PolicyError, SpecError
from choral.protocols.homomorphic import FloatSpec, FloatSum
from choral.protocols.masking import messages
from choral.protocols.masking.parameters import choose
from choral.protocols.masking.party import join

KEYS = {"a": bytes(31) + b"\x01", "b": bytes(31) + b"\x02"}
NFC, NFD = "Z\u00fcrich", "Zu\u0308rich"

NUMBERS = [True, "2", b"2", 2.5, math.nan, math.inf, -1, [2], object(), 1j, 1 << 200, -(1 << 200), Decimal(2), (2,), {}]
WORDS = [None, "", "Malicious", "semi-honest ", "MALICIOUS", "honest", b"malicious", 1, True, ["malicious"], object()]
TEXTS = [1, b"text", ["text"], "x" * 256, "\ud800", object(), True]
SHARES = [True, "1", -1, -0.5, 1.0, 2.5, math.nan, math.inf, [1], object(), 1 << 200]
DIRECTORIES: list[Any] = [
    [],
    {"a": "k" * 32},
    {"a": bytes(31)},
    {"a": bytearray(32)},
    {"a": KEYS["a"], "b": KEYS["a"]},
    {1: KEYS["a"]},
    {"": KEYS["a"]},
    {NFC: KEYS["a"], NFD: KEYS["b"]},
    "ab",
    7,
]
DIGESTS: list[Any] = [b"", bytes(31), bytes(33), "x" * 32, bytearray(32), 32]
PARTIES: list[Any] = [
    (1, 2, 3),
    ("a", None),
    ["a", "b"],
    "ab",
    ("a",),
    (),
    ("a", "a"),
    ("a", ""),
    ("a", b"b"),
    ("a", "b" * 256),
    ("a", "b\ud800"),
    (NFC, NFD),
    ("\uff41", "a"),
    5,
]


def fields(*names: str, bad: list[Any], none: bool = False) -> list[tuple[str, Any]]:
    """Each field with each bad value; none: None is one too."""
    return [(name, value) for name in names for value in [*bad, *([None] if none else [])]]


CASES: dict[str, tuple[Callable[..., Any], dict[str, Any], list[tuple[str, Any]]]] = {
    "Policy": (
        Policy,
        {"corrupt": 0},
        [
            *fields("corrupt", bad=SHARES, none=True),
            *fields("directory", bad=DIRECTORIES, none=True),
            *fields("minimum_cohort", "minimum_threshold", bad=[*NUMBERS, 0, 1], none=True),
            *fields("maximum_modulus_bits", "security_bits", bad=[*NUMBERS, 0, 129], none=True),
            *fields("maximum_bound", "maximum_length", bad=[*NUMBERS, 0], none=True),
            *fields("wraps_at", bad=[*NUMBERS, 0, 65]),
            *fields("directory_size", bad=[*NUMBERS, 0, 1]),
            *fields("server", "cohort", bad=[*WORDS, "everyone"]),
            *fields("encoding", bad=TEXTS, none=True),
            *fields("maximum_weight", bad=[*NUMBERS, 0, 2**62 + 1]),
            *fields("terms", bad=DIGESTS),
            *fields("signatures", bad=[{}, 1], none=True),
        ],
    ),
    "Masked": (
        Masked,
        {},
        [
            *fields("min_survivors", "contributors", bad=[*NUMBERS, 0, 1]),
            *fields("block", bad=[*NUMBERS, 0], none=True),
            *fields("trips", bad=[*NUMBERS, 0, 1, 5], none=False),
            *fields("corrupt", "dropouts", bad=SHARES),
            *fields("server", "cohort", bad=[*WORDS, "everyone"]),
        ],
    ),
    "Homomorphic": (
        Homomorphic,
        {},
        [
            *fields("min_survivors", bad=[*NUMBERS, 0, 1]),
            *fields("corrupt", "dropouts", bad=SHARES),
            *fields("server", bad=[word for word in WORDS if word is not None]),
            *fields("cohort", "key", bad=WORDS),
        ],
    ),
    "SumSpec": (
        SumSpec,
        {"parties": ("a", "b"), "length": 3, "bound": 10},
        [
            *fields("parties", bad=PARTIES, none=True),
            *fields("length", "bound", bad=[*NUMBERS, 0, 4.0, 4.5, np.float64(3), "nan"], none=True),
            *fields("bits", bad=[*NUMBERS, 0, 65]),
            *fields("directory", bad=[*NUMBERS, 0, 1]),
            *fields("encoding", bad=TEXTS, none=True),
            *fields("weight_bound", bad=[*NUMBERS, 0, 11]),
            *fields("terms", bad=DIGESTS),
        ],
    ),
    "FloatSpec": (
        FloatSpec,
        {"parties": ("a", "b"), "length": 3, "bound": 1.0, "precision": 0.1},
        [
            *fields("parties", bad=PARTIES, none=True),
            *fields("length", bad=[*NUMBERS, 0], none=True),
            *fields("bound", "precision", bad=[True, "1", 0, -1, math.nan, math.inf, [1], object()], none=True),
            *fields("encoding", bad=TEXTS, none=True),
        ],
    ),
    "FloatSum": (FloatSum, {}, fields("min_survivors", bad=[*NUMBERS, 0, 1])),
    "choose": (
        lambda n, **given: choose(n, **given),
        {"n": 5, "corrupt": 1, "dropouts": 1, "server": "malicious"},
        [
            *fields("n", bad=[*NUMBERS, 0, 1], none=True),
            *fields("corrupt", "dropouts", bad=SHARES, none=True),
            *fields("server", bad=WORDS),
            *fields("security_bits", "correctness_bits", bad=[True, "40", 0, 129, math.nan, [1]], none=True),
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_settings_of_another_type_or_out_of_range_are_refused_by_name(name: str) -> None:
    make, good, bad = CASES[name]
    make(**good)
    for field, value in bad:
        with pytest.raises(SpecError) as refused:
            make(**good | {field: value})
        assert len(str(refused.value)) < 400, (field, value)


RANGES: list[tuple[Callable[..., Any], dict[str, Any], str, int, int]] = [
    (Policy, {"corrupt": 0}, "minimum_cohort", 2, 1 << 20),
    (Policy, {"corrupt": 0}, "minimum_threshold", 2, 1 << 20),
    (Policy, {"corrupt": 0}, "maximum_modulus_bits", 1, 64),
    (Policy, {"corrupt": 0}, "maximum_bound", 1, 2**62),
    (Policy, {"corrupt": 0}, "maximum_length", 1, 2**31),
    (Policy, {"corrupt": 0}, "wraps_at", 1, 64),
    (Policy, {"corrupt": 0}, "security_bits", 1, 128),
    (Policy, {"corrupt": 0}, "directory_size", 2, 1 << 40),
    (Policy, {"corrupt": 0, "directory": KEYS | {"c": bytes(32)}}, "directory_size", 3, 1 << 40),
    (Policy, {}, "corrupt", 0, 1 << 40),
    (Masked, {}, "min_survivors", 2, 1 << 20),
    (Masked, {}, "corrupt", 0, 1 << 40),
    (SumSpec, {"parties": ("a", "b"), "bound": 1}, "length", 1, 2**31),
    (SumSpec, {"parties": ("a", "b"), "length": 1}, "bound", 1, 2**62 - 1),  # two of them are 64 bits with a sign
    (SumSpec, {"parties": ("a", "b"), "length": 1, "bound": 1}, "bits", 1, 64),
    (SumSpec, {"parties": ("a", "b", "c"), "length": 1, "bound": 1}, "directory", 3, 1 << 40),
    (SumSpec, {"parties": ("a", "b"), "length": 1, "bound": 9}, "weight_bound", 1, 9),
    (Policy, {"corrupt": 0}, "maximum_weight", 1, 2**62),
]


@pytest.mark.parametrize(("make", "good", "field", "low", "high"), RANGES, ids=lambda value: str(value)[:40])
def test_the_last_value_of_a_range_is_taken_and_the_next_one_refused(
    make: Callable[..., Any], good: dict[str, Any], field: str, low: int, high: int
) -> None:
    for value in (low, high):
        assert getattr(make(**good, **{field: value}), field) == value
    for value in (low - 1, high + 1):
        with pytest.raises(SpecError):
            make(**good, **{field: value})


def test_a_shared_key_is_refused_to_who_counts_on_what_it_does_not_give() -> None:
    spec = SumSpec(parties=("a", "b", "c"), length=3, bound=10)
    for terms in ({"corrupt": 1}, {"corrupt": 0.1}, {"dropouts": 0}, {"dropouts": 1}, {"server": "malicious"}):
        with pytest.raises(SpecError, match="withstands no corrupt party and no malicious server"):
            Homomorphic(key="shared", **terms).open(spec)  # type: ignore[arg-type]
    for terms in ({}, {"corrupt": 0}, {"server": "semi-honest"}):
        assert Homomorphic(key="shared", **terms).open(spec).spec == spec  # type: ignore[arg-type]


def test_a_name_may_have_255_characters_and_no_more() -> None:
    checks.names(["x" * 255], "the roster")
    with pytest.raises(SpecError, match="at most 255 characters, got 256"):
        checks.names(["x" * 256], "the roster")


@pytest.mark.parametrize("name", ["Policy", "Masked", "Homomorphic", "SumSpec", "FloatSpec", "FloatSum"])
def test_every_field_is_tried(name: str) -> None:
    make, _, bad = CASES[name]
    assert {field for field, _ in bad} == set(make.__dataclass_fields__)  # type: ignore[attr-defined]


def test_whole_numbers_of_numpy_and_torch_are_plain_ones() -> None:
    spec = SumSpec(parties=("a", "b", "c"), length=np.int64(3), bound=torch.tensor(10))  # type: ignore[arg-type]
    assert [type(value) for value in (spec.length, spec.bound)] == [int, int]
    assert spec == SumSpec(parties=("a", "b", "c"), length=3, bound=10)
    assert Masked(min_survivors=np.int32(2)) == Masked(min_survivors=2)  # type: ignore[arg-type]
    assert Policy(corrupt=np.uint8(2)).corrupt == 2  # type: ignore[arg-type]


def test_a_policy_without_keys_or_encoding_takes_nothing() -> None:
    spec = SumSpec(parties=("a", "b", "c"), length=3, bound=10)
    setup = Masked().setup(spec, session=bytes(16))
    with pytest.raises(PolicyError, match="whose key is not pinned"):
        Policy(corrupt=0).check(setup, "a")
    with pytest.raises(PolicyError, match="another encoding"):
        Masked().open(SumSpec(parties=("a", "b", "c"), length=3, bound=10, encoding="x"), policy=Policy(corrupt=0))


def test_a_roster_with_two_spellings_of_a_name_is_refused_by_parties() -> None:
    from msgspec.structs import replace

    directory = {NFC: KEYS["a"], "b": KEYS["b"]}
    setup = Masked().setup(SumSpec(parties=(NFC, "b"), length=1, bound=1), session=bytes(16))
    Policy(directory=directory, corrupt=0).check(setup, "b")
    twice = replace(setup, roster=(NFC, NFD))
    with pytest.raises(PolicyError, match="spells one name twice"):
        Policy(directory=directory, corrupt=0).check(twice, NFC)
    with pytest.raises(PolicyError, match="not pinned"):
        Policy(directory=directory, corrupt=0).check(replace(setup, roster=(NFD, "b")), "b")


def test_what_is_shown_of_a_wrong_value_is_short_and_no_object() -> None:
    class Secret:
        def __repr__(self) -> str:
            return "the vector 123"

    assert checks.shown(Secret()) == "a Secret"
    assert len(checks.shown("x" * 10_000)) < 50
    assert len(checks.shown(1 << 10_000)) < 50
    assert checks.shown(1 << 128) == checks.shown(-1 << 128) == "a number beyond 2^128"
    assert checks.shown((1 << 128) - 1) == str((1 << 128) - 1)


def test_two_policies_of_the_same_terms_are_one_and_what_they_checked_is_not_shown() -> None:
    policy = Policy(corrupt=1)
    assert policy == Policy(corrupt=1) != Policy(corrupt=2)
    assert "ignatures" not in repr(policy)


# ----------------------------------------------------------------------------------------- sessions and their rounds

SPEC = SumSpec(parties=("north", "south", "east"), length=4, bound=100)
KINDS = [Plain(), Masked(), Homomorphic(), Homomorphic(key="shared")]
EVERY_KIND = pytest.mark.parametrize("kind", KINDS, ids=["plain", "masked", "split", "shared"])


class Odd(torch.Tensor):
    """A subclass whose values cannot be had."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("not here")


VECTORS: dict[str, Callable[[], Any]] = {
    "meta": lambda: torch.zeros(4, dtype=torch.int64, device="meta"),
    "negated": lambda: torch._neg_view(torch.tensor([1, 2, 3, 4])),
    "conjugate": lambda: torch.zeros(4, dtype=torch.complex64).conj(),
    "float": lambda: torch.ones(4),
    "int32": lambda: torch.ones(4, dtype=torch.int32),
    "uint64": lambda: torch.ones(4, dtype=torch.uint64),
    "bool": lambda: torch.ones(4, dtype=torch.bool),
    "shape": lambda: torch.ones(5, dtype=torch.int64),
    "matrix": lambda: torch.ones(2, 2, dtype=torch.int64),
    "scalar": lambda: torch.tensor(1),
    "empty": lambda: torch.ones(0, dtype=torch.int64),
    "sparse": lambda: torch.ones(4, dtype=torch.int64).to_sparse(),
    "subclass": lambda: torch.ones(4, dtype=torch.int64).as_subclass(Odd),
    "objects": lambda: np.array([1, 2, 3, 4], object),
    "big-endian": lambda: np.array([1, 2, 3, 4], ">i8"),
    "structure": lambda: np.zeros(4, [("x", "i8")]),
    "text": lambda: "1234",
    "set": lambda: {1, 2, 3, 4},
    "none": lambda: None,
    "class": lambda: torch.Tensor,
}


@EVERY_KIND
def test_no_vector_gives_an_untyped_error_and_none_spoils_the_round(kind: Any) -> None:
    summing = kind.open(SPEC).begin()
    for make in VECTORS.values():
        with pytest.raises(InputError):
            summing.submit("north", make())
    for party in SPEC.parties:
        summing.submit(party, torch.tensor([1, 2, 3, 4]))
    assert summing.finish().total.tolist() == [3, 6, 9, 12]


@EVERY_KIND
def test_no_name_or_loss_gives_an_untyped_error(kind: Any) -> None:
    session = kind.open(SPEC)
    for lost in (5, ["north"], "north", {"north": 5}, {"north": []}, {5: "keys"}, {"west": "keys"}):
        with pytest.raises(SpecError):
            session.begin(lost)
    summing = session.begin()
    for party in (None, 5, ["north"], {}, b"north", "west", ("north",)):
        with pytest.raises(SpecError, match="unknown party"):
            summing.submit(party, np.zeros(4, np.int64))


@EVERY_KIND
def test_what_is_opened_is_a_spec_and_a_policy(kind: Any) -> None:
    for spec in (None, 5, "spec", {"parties": ("a", "b")}, SPEC.parties):
        with pytest.raises(SpecError, match="expected a SumSpec"):
            kind.open(spec)
    for policy in (5, "strict", {"corrupt": 1}):
        with pytest.raises(ChoralError):
            kind.open(SPEC, policy=policy)


NO_MESSAGES: list[Any] = [
    None,
    5,
    "text",
    b"",
    b"\x01",
    bytearray(b"\x01\x90"),
    ["hello"],
    b"\x01\x91\xa5setup",
    object(),
]


def test_the_steps_of_a_party_give_typed_errors_for_whatever_comes(network: Callable[..., Any]) -> None:
    """Each step is tried on a party's state of its own, as a refusal spends it."""
    for raw in NO_MESSAGES:
        net = network(3)
        given = {"name": "p0", "identity": net.identities["p0"], "policy": net.policy, "randomness": net.random["p0"]}
        with pytest.raises(ChoralError):
            join(raw, **given)
        for field, value in [("name", 5), ("name", None), ("identity", "x" * 32), ("identity", None), ("policy", {})]:
            with pytest.raises(ChoralError):
                join(messages.encode(net.setup), **given | {field: value})
        state, _ = join(messages.encode(net.setup), **given)
        with pytest.raises(ChoralError):
            state.reveal(raw)
        net.open()
        for number in ("2", None, True, 1.0, 0, 1 << 32):
            with pytest.raises(ChoralError):
                net.members["p0"].advertise(number, randomness=net.random["p0"])
            with pytest.raises(ChoralError):
                net.session.begin(number)
        stage, states = net.round({name: [1, 2, 3] for name in net.names}, until="upload")
        for sender in ("p1", "p9", None, 5, []):
            with pytest.raises(ChoralError):
                stage.receive(sender, raw)
        with pytest.raises(ChoralError):
            states["p1"].confirm(raw)
        _, advertised, _ = net.members["p0"].advertise(2, randomness=net.random["p0"])
        with pytest.raises(ChoralError):
            advertised.share(raw, randomness=net.random["p0"])


def test_keys_of_another_type_are_refused() -> None:
    for wrong in (None, 5, "x" * 32, bytearray(32), [0] * 32):
        for call in (keys.x25519_public, keys.ed25519_public, keys.PrivateKey):
            with pytest.raises(SpecError, match="32 bytes"):
                call(wrong)
        with pytest.raises(keys.WeakKeyError):
            keys.x25519_shared(bytes(range(32)), wrong)  # type: ignore[arg-type]
        assert not keys.ed25519_verify(wrong, b"", bytes(64))  # type: ignore[arg-type]
        assert not keys.ed25519_verify(bytes(range(32)), b"", wrong)  # type: ignore[arg-type]


def test_a_sum_of_floats_refuses_what_is_no_spec_and_no_vector() -> None:
    for spec in (None, 5, SPEC):
        with pytest.raises(SpecError, match="expected a FloatSpec"):
            FloatSum().open(spec)  # type: ignore[arg-type]
    summing = FloatSum().open(FloatSpec(parties=("a", "b"), length=4, bound=1.0, precision=0.1)).begin()
    for make in VECTORS.values():
        with pytest.raises(InputError):
            summing.submit("a", make())
    for party in (None, [], "c"):
        with pytest.raises(SpecError):
            summing.submit(party, np.zeros(4))  # type: ignore[arg-type]
