"""Replaced layers: equal results and gradients, the same parameters and names; what cannot be replaced is named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from opacus.layers import DPLSTM
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from choral.errors import ConfigError
from choral.privacy import UnsupportedModelError, replace_layers
from choral.privacy.per_sample.model import with_per_sample_gradients

torch.manual_seed(0)
SEQUENCES = torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(1))  # records, steps, features


def outputs(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, nn.utils.rnn.PackedSequence):
        return [pad_packed_sequence(value)[0]]
    return [t for part in value if part is not None for t in outputs(part)]


def hold_equal(plain: nn.Module, call: Any) -> nn.Module:
    """Outputs, and gradients of a random function of them, before and after; the parameters are the same objects."""
    before = {id(p) for p in plain.parameters()}
    want = outputs(call(plain))
    weights = [torch.randn_like(t) for t in want]
    slopes = dict.fromkeys(plain.parameters())
    for p, g in zip(
        slopes,
        torch.autograd.grad([(t * w).sum() for t, w in zip(want, weights, strict=True)], list(slopes)),
        strict=True,
    ):
        slopes[p] = g
    replaced = replace_layers(plain)
    assert replaced is not plain
    assert {id(p) for p in replaced.parameters()} == before
    got = outputs(call(replaced))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    again = torch.autograd.grad([(t * w).sum() for t, w in zip(got, weights, strict=True)], list(slopes))
    torch.testing.assert_close(list(again), list(slopes.values()), rtol=1e-4, atol=1e-5)
    return replaced


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch_first": True},
        {"num_layers": 3, "bidirectional": True, "batch_first": True},
        {"num_layers": 2, "bias": False, "bidirectional": True},
    ],
)
def test_recurrent_layers_give_equal_results(kind: Any, settings: dict[str, Any]) -> None:
    plain = kind(6, 4, **settings)
    x = SEQUENCES if settings.get("batch_first") else SEQUENCES.transpose(0, 1)
    hold_equal(copy.deepcopy(plain), lambda layer: layer(x))
    rows = settings.get("num_layers", 1) * (2 if settings.get("bidirectional") else 1)
    start = torch.randn(rows, 5, 4)
    hold_equal(copy.deepcopy(plain), lambda layer: layer(x, (start, 2 * start) if kind is nn.LSTM else start))
    packed = pack_padded_sequence(x, [3, 7, 1, 4, 4], bool(settings.get("batch_first")), enforce_sorted=False)
    hold_equal(plain, lambda layer: layer(packed))


def test_the_rectifier_is_kept() -> None:
    hold_equal(nn.RNN(6, 4, nonlinearity="relu", batch_first=True), lambda layer: layer(SEQUENCES))


CELLS = {
    "LSTMCell": lambda **s: nn.LSTMCell(6, 4, **s),
    "GRUCell": lambda **s: nn.GRUCell(6, 4, **s),
    "RNNCell": lambda **s: nn.RNNCell(6, 4, **s),
    "RNNCell, rectified": lambda **s: nn.RNNCell(6, 4, nonlinearity="relu", **s),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CELLS)
def test_cells_give_equal_results_with_and_without_a_state(name: str, bias: bool) -> None:
    plain, start = CELLS[name](bias=bias), torch.randn(5, 4)
    state = (start, 2 * start) if name == "LSTMCell" else start

    def steps(layer: nn.Module) -> Any:
        h = None
        for t in range(3):
            h = layer(SEQUENCES[:, t], h)
        return h

    hold_equal(copy.deepcopy(plain), lambda layer: layer(SEQUENCES[:, 0], state))
    hold_equal(copy.deepcopy(plain), lambda layer: layer(input=SEQUENCES[:, 0], hx=state))
    replaced = hold_equal(copy.deepcopy(plain), steps)
    assert set(replaced.state_dict()) == set(plain.state_dict())
    plain.load_state_dict(replaced.state_dict())
    replaced.load_state_dict(plain.state_dict())
    with pytest.raises(UnsupportedModelError, match="expected \\(records, features\\)"):
        replaced(SEQUENCES[0, 0])


@pytest.mark.parametrize("name", CELLS)
def test_cells_have_the_gradients_of_single_records(name: str) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = CELLS[name](), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h: Any = None
            for step in x.unbind(1):
                h = self.cell(step, h)
            return self.head(h[0] if isinstance(h, tuple) else h)

    model = replace_layers(Reads())
    alone = [torch.autograd.grad(model(x[None]).square().sum(), list(model.parameters())) for x in SEQUENCES]
    private = with_per_sample_gradients(model)
    private(SEQUENCES).square().sum(1).mean().backward()
    for place, p in enumerate(model.parameters()):
        torch.testing.assert_close(private.per_sample(p), torch.stack([g[place] for g in alone]), rtol=1e-4, atol=1e-5)


def test_dropout_falls_between_the_layers() -> None:
    """Not on the last layer's output, nor on the state handed on in time, as in Opacus' layers: against a loop."""
    plain = nn.LSTM(6, 4, num_layers=2, dropout=0.5, batch_first=True)
    first, second = nn.LSTM(6, 4, batch_first=True), nn.LSTM(4, 4, batch_first=True)
    for number, layer in enumerate((first, second)):
        layer.load_state_dict({n: plain.state_dict()[n.replace("_l0", f"_l{number}")] for n in layer.state_dict()})
    replaced = replace_layers(plain)
    torch.manual_seed(3)
    got = replaced(SEQUENCES)[0]
    torch.manual_seed(3)
    want = second(nn.functional.dropout(first(SEQUENCES)[0].contiguous(), 0.5))[0]
    torch.testing.assert_close(got, want)
    assert not torch.equal(replaced(SEQUENCES)[0], got)
    assert torch.equal(replaced.eval()(SEQUENCES)[0], replaced(SEQUENCES)[0])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_gives_equal_results(batch_first: bool, bias: bool) -> None:
    plain = nn.MultiheadAttention(6, 2, batch_first=batch_first, bias=bias)
    if bias:
        nn.init.normal_(plain.in_proj_bias)
    x, memory, other = SEQUENCES, torch.randn(5, 4, 6), torch.randn(5, 4, 6)
    if not batch_first:
        x, memory, other = (t.transpose(0, 1) for t in (x, memory, other))
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    padding = torch.arange(7).expand(5, 7) >= torch.tensor([[7], [3], [5], [1], [7]])
    by_head = torch.rand(10, 7, 7) > 0.7
    by_head[:, :, 0] = False  # nobody is left without anything to attend to
    for call in (
        lambda layer: layer(x, x, x),
        lambda layer: layer(x, x, x, need_weights=False),
        lambda layer: layer(x, x, x, average_attn_weights=False),
        lambda layer: layer(x, memory, memory),
        lambda layer: layer(x, memory, other),
        lambda layer: layer(memory, other, memory),
        lambda layer: layer(x, x, x, attn_mask=causal, is_causal=True, need_weights=False),
        lambda layer: layer(x, x, x, attn_mask=causal.isinf()),
        lambda layer: layer(x, x, x, attn_mask=by_head),
        lambda layer: layer(x, x, x, key_padding_mask=padding),
        lambda layer: layer(x, x, x, key_padding_mask=padding, attn_mask=causal.isinf()),
        lambda layer: layer(x, x, x, key_padding_mask=torch.zeros(5, 7).masked_fill(padding, -torch.inf)),
    ):
        hold_equal(copy.deepcopy(plain), call)


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_layers_give_equal_results_in_training_and_evaluation(norm_first: bool) -> None:
    """Torch's layers take a fused path in evaluation that would read the packed weights; it must not."""
    layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True, norm_first=norm_first)
    plain = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    replaced = replace_layers(copy.deepcopy(plain))
    padding = torch.arange(7).expand(5, 7) >= torch.tensor([[7], [3], [5], [1], [7]])
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    for mode in (True, False):
        for settings in ({}, {"src_key_padding_mask": padding}, {"mask": causal, "is_causal": True}):
            got, want = (m.train(mode)(SEQUENCES, **settings) for m in (replaced, plain))
            real = ~settings.get("src_key_padding_mask", torch.zeros(5, 7, dtype=torch.bool))
            torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-5)
    calls = []
    replaced.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        torch.testing.assert_close(replaced.eval()(SEQUENCES), plain.eval()(SEQUENCES), rtol=1e-4, atol=1e-5)
    assert calls == [1]  # not gone past
    decoder = nn.TransformerDecoderLayer(6, 2, 12, dropout=0.0, batch_first=True)
    want = decoder(SEQUENCES, SEQUENCES[:, :3], tgt_mask=causal)
    torch.testing.assert_close(replace_layers(decoder)(SEQUENCES, SEQUENCES[:, :3], tgt_mask=causal), want)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(6, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.mix = nn.MultiheadAttention(12, 3, batch_first=True)
        self.norm = nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, _ = self.rnn(x)
        return self.head(self.norm(self.mix(h, h, h)[0].mean(1)))


def test_state_dict_keeps_its_names_both_ways() -> None:
    plain, replaced = Reader(), replace_layers(Reader())
    statistics = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert set(replaced.state_dict()) == set(plain.state_dict()) - statistics
    missing = plain.load_state_dict(replaced.state_dict(), strict=False)
    assert set(missing.missing_keys) == statistics - {"norm.num_batches_tracked"}  # of which torch does not complain
    assert not missing.unexpected_keys
    assert all(torch.equal(v, plain.state_dict()[name]) for name, v in replaced.state_dict().items())
    other = {name: v + 1 for name, v in replaced.state_dict().items()}
    replaced.load_state_dict(other)  # strict
    assert all(torch.equal(v, other[name]) for name, v in replaced.state_dict().items())
    with pytest.raises(RuntimeError, match=r"rnn\.cells\.2"):
        replaced.load_state_dict({n: v for n, v in other.items() if n != "rnn.weight_hh_l1"})
    alone = replace_layers(nn.LSTM(3, 2))
    assert list(nn.LSTM(3, 2).load_state_dict(alone.state_dict()).missing_keys) == []


def test_a_copy_of_a_replaced_model_has_its_own_parameters() -> None:
    replaced = replace_layers(Reader())
    copied = copy.deepcopy(replaced)
    before = copied(SEQUENCES)
    with torch.no_grad():
        for p in replaced.parameters():
            p.zero_()
    assert torch.equal(copied(SEQUENCES), before)
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in replaced.parameters()}


def test_frozen_parameters_and_the_mode_are_kept() -> None:
    model = Reader().eval()
    model.rnn.requires_grad_(False)
    replaced = replace_layers(model)
    assert replaced is model
    assert not any(m.training for m in replaced.modules())
    assert not any(p.requires_grad for p in replaced.rnn.parameters())
    assert all(p.requires_grad for p in replaced.mix.parameters())


def test_a_layer_in_two_places_stays_one_layer() -> None:
    shared = nn.LSTM(6, 6)
    replaced = replace_layers(nn.ModuleList([shared, nn.ModuleDict({"again": shared})]))
    assert replaced[0] is replaced[1]["again"]
    assert not isinstance(replaced[0], nn.LSTM)


def test_replacing_draws_no_random_numbers() -> None:
    model = Reader()
    torch.manual_seed(4)
    replace_layers(model)
    after = torch.rand(3)
    torch.manual_seed(4)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize(
    ("plain", "groups"),
    [
        (nn.BatchNorm2d(6), 3),
        (nn.BatchNorm2d(64), 32),
        (nn.BatchNorm2d(7), 1),
        (nn.BatchNorm2d(1), 1),
        (nn.BatchNorm1d(64), 1),
        (nn.BatchNorm3d(8, affine=False, eps=0.1), 4),
    ],
)
def test_batchnorm_becomes_groups_of_several_values(plain: Any, groups: int) -> None:
    made: Any = replace_layers(plain)
    assert (type(made), made.num_groups, made.eps) == (nn.GroupNorm, groups, plain.eps)
    assert made.weight is plain.weight
    assert made.bias is plain.bias


class OwnGate(nn.LSTM):
    pass


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (OwnGate(6, 4), "own class"),
        (nn.LSTM(6, 4, proj_size=2), "proj_size"),
        (nn.MultiheadAttention(6, 2, kdim=3), "kdim"),
        (nn.MultiheadAttention(6, 2, add_bias_kv=True), "add_bias_kv"),
        (nn.MultiheadAttention(6, 2, add_zero_attn=True), "add_zero_attn"),
    ],
)
def test_what_cannot_be_replaced_is_named_and_nothing_is_changed(layer: nn.Module, why: str) -> None:
    model = nn.ModuleDict({"first": nn.LSTM(6, 6), "second": layer})
    with pytest.raises(UnsupportedModelError, match=f"layer second, a {type(layer).__name__}, .*{why}"):
        replace_layers(model)
    assert type(model["first"]) is nn.LSTM


def test_hooks_wrapped_models_and_functions_are_refused() -> None:
    layer = nn.LSTM(6, 6)
    layer.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match="hooks"):
        replace_layers(layer)
    with pytest.raises(UnsupportedModelError, match="wrapped already"):
        replace_layers(with_per_sample_gradients(nn.Linear(2, 2)))
    with pytest.raises(UnsupportedModelError, match=r"expected a torch\.nn\.Module"):
        replace_layers(lambda x: x)  # type: ignore[arg-type]


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="three dimensions"):
        replace_layers(nn.LSTM(6, 4))(torch.randn(7, 6))
    attention = replace_layers(nn.MultiheadAttention(6, 2))
    with pytest.raises(ConfigError, match="three dimensions"):
        attention(*[torch.randn(7, 6)] * 3)
    with pytest.raises(ConfigError, match="attn_mask"):
        attention(*[SEQUENCES] * 3, is_causal=True)


class Tagger(nn.Module):
    """Reads sequences of several lengths, packed."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = (
            nn.Embedding(9, 6),
            make(6, 4, batch_first=True, bidirectional=True),
            nn.Linear(8, 3),
        )

    def forward(self, t: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(self.embed(t), lengths, batch_first=True, enforce_sorted=False)
        h, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=t.shape[1])
        return self.head(h).mean(1)


def test_packed_sequences_get_their_own_records_gradients() -> None:
    """In Opacus' layers the rows are in the order of lengths: right on average, and of the wrong records."""
    t = torch.randint(9, (4, 7), generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([2, 7, 1, 5])
    model = replace_layers(Tagger(nn.LSTM))
    private = with_per_sample_gradients(model)
    private.forget()
    private(t, lengths).square().mean(1).mean().backward()
    rows = {name: private.per_sample(p) for name, p in model.named_parameters()}
    for i in range(4):
        alone = torch.autograd.grad(
            model.eval()(t[i : i + 1], lengths[i : i + 1]).square().mean(), list(model.parameters())
        )
        for (name, found), g in zip(rows.items(), alone, strict=True):
            torch.testing.assert_close(found[i], g, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_opacus_own_layers_are_refused_packed_sequences_that_it_sorts() -> None:
    private = with_per_sample_gradients(Tagger(DPLSTM))
    with pytest.raises(UnsupportedModelError, match="layer rnn, of Opacus, keeps the gradients") as caught:
        private(torch.zeros(3, 4, dtype=torch.long), torch.tensor([2, 4, 1]))
    assert "replace_layers" in caught.value.hint


class SortedByHand(nn.Module):
    """Puts records in another order and back: each layer's rows are records, but not the same ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(9, 6), nn.GRU(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        order = t[:, 0].argsort()
        return self.head(self.rnn(self.embed(t)[order])[0][order.argsort(), -1])


def test_records_in_another_order_within_the_model_are_refused() -> None:
    private = with_per_sample_gradients(replace_layers(SortedByHand()))
    with pytest.raises(UnsupportedModelError, match="depends on the other records"):
        private(torch.tensor([[3, 1, 2], [1, 4, 4], [2, 0, 8], [0, 5, 5]]))


class Patches(nn.Module):
    """A vision transformer's way: a bare parameter for the positions, dropout behind it."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.pos, self.drop, self.head = nn.Parameter(torch.zeros(1, 7, 6)), nn.Dropout(dropout), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(x + self.pos).mean(1))


def test_bare_parameters_are_followed_and_with_dropout_beside_them_named() -> None:
    private = with_per_sample_gradients(Patches(0.0))
    private.forget()
    private(SEQUENCES).square().mean().backward()
    assert private.per_sample(private.pos).shape == (5, 1, 7, 6)
    with pytest.raises(UnsupportedModelError, match=r"layer .*Patches.* has parameters whose") as caught:
        with_per_sample_gradients(Patches(0.5))(SEQUENCES).square().mean().backward()
    assert "nn.Embedding" in caught.value.hint
