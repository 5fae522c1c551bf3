"""LoRA: equal outputs where it should be equal, per-sample gradients against loops, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from choral.errors import ConfigError
from choral.privacy.dpsgd.private_optimizer import PrivateOptimizer
from choral.privacy.per_sample.model import with_per_sample_gradients
from choral.trainers import lora, merged


def perceptron():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def trained(model, inputs):
    """With factors that do something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter.copy_(torch.randn_like(parameter) / 3)
    return model


def test_it_starts_as_the_model_was_and_trains_the_factors_alone():
    torch.manual_seed(0)
    model, x = perceptron(), torch.randn(4, 6)
    before, names = model(x), set(model.state_dict())
    assert lora(model, rank=2) is model
    assert torch.equal(model(x), before)
    assert names <= set(model.state_dict())
    free = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert free == {
        "0.lora_a.weight": 12,
        "0.lora_b.weight": 16,
        "2.lora_a.weight": 16,
        "2.lora_b.weight": 6,
    }
    model(x).sum().backward()
    assert model[0].weight.grad is None


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_against_the_formula(alpha):
    """W x + b + (alpha / rank) B A x, by numpy-like matrices of the paper's equation 3."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 5).double()
    model = trained(lora(nn.Sequential(copy.deepcopy(layer)), rank=3, alpha=alpha), None)
    x = torch.randn(7, 6, dtype=torch.float64)
    a, b = model[0].lora_a.weight, model[0].lora_b.weight
    scale = 1.0 if alpha is None else 2.0
    want = x @ layer.weight.T + layer.bias + scale * x @ a.T @ b.T
    assert torch.allclose(model(x), want, atol=1e-12)
    assert torch.allclose(merged(model)(x), want, atol=1e-12)


def test_merged_is_plain_and_leaves_the_original():
    torch.manual_seed(0)
    model, x = trained(lora(perceptron(), rank=2), None), torch.randn(4, 6)
    plain = merged(model)
    assert [type(layer) for layer in plain] == [nn.Linear, nn.Tanh, nn.Linear]
    assert torch.allclose(plain(x), model(x), atol=1e-6)
    assert not torch.allclose(plain(x), perceptron()(x), atol=1e-2)
    assert hasattr(model[0], "lora_a")
    perceptron().load_state_dict(plain.state_dict())


def test_fused_inference_of_torchs_transformer_does_not_pass_the_factors_by():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
    )
    x = torch.randn(3, 4, 8)
    trained(lora(model, rank=2), None)
    slow = model(x)
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(x), slow, atol=1e-5)
        assert torch.allclose(merged(model)(x), slow, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 6), (6, 3, 6)], ids=["vectors", "sequences"])
def test_private_steps_equal_a_loop_over_records(shape):
    """Clipped sums of per-sample gradients, against autograd in float64 record by record."""
    torch.manual_seed(0)
    model, x = trained(lora(perceptron(), rank=2), None), torch.randn(*shape)

    def losses(out):
        return out.flatten(1).sin().sum(1)

    double = copy.deepcopy(model).double()
    free = [parameter for parameter in double.parameters() if parameter.requires_grad]
    rows = torch.stack(
        [
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(losses(double(x[i : i + 1].double())).sum(), free)])
            for i in range(len(x))
        ]
    )
    clip = float(rows.norm(dim=1).median())
    want = (rows * (clip / rows.norm(dim=1, keepdim=True)).clamp(max=1.0)).mean(0)
    private = with_per_sample_gradients(model)
    optimizer = PrivateOptimizer(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0),
        private,
        noise_multiplier=1.0,
        max_grad_norm=clip,
        expected_batch_size=len(x),
        source=lambda count: b"\xff" * count,  # noise 0
    )
    for _ in range(2):
        optimizer.expect(len(x))
        losses(private(x)).mean().backward()
        optimizer.step()
        got = torch.cat([p.grad.double().reshape(-1) for p in private.parameters() if p.requires_grad])
        assert (got - want).norm() <= 2e-4 * want.norm() + clip * 2**-11 / 6 + 1e-6


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (perceptron, {"rank": 0}, "expected 1 <= rank <= 6 for '0'"),
        (perceptron, {"rank": 4}, "expected 1 <= rank <= 3 for '2'"),
        (perceptron, {"rank": 1, "alpha": 0.0}, "alpha > 0"),
        (perceptron, {"rank": 1, "alpha": float("nan")}, "alpha > 0"),
        (perceptron, {"rank": 1, "targets": ["1"]}, "no nn.Linear layer is named '1'"),
        (perceptron, {"rank": 1, "targets": "0"}, "targets is a string"),
        (lambda: lora(perceptron(), rank=1), {"rank": 1}, "already"),
        (Shared, {"rank": 1}, "shared with another layer"),
        (lambda: nn.MultiheadAttention(4, 2), {"rank": 1}, "no nn.Linear layer inside"),
        (lambda: nn.Linear(3, 3), {"rank": 1}, "no nn.Linear layer inside"),
    ],
)
def test_what_cannot_be_adapted_is_refused(make, settings, message):
    model = make()
    free = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ConfigError, match=message):
        lora(model, **settings)
    assert [parameter.requires_grad for parameter in model.parameters()] == free


def test_targets_by_last_part():
    model = nn.ModuleDict({"a": nn.ModuleDict({"query": nn.Linear(4, 4), "key": nn.Linear(4, 4)})})
    lora(model, rank=1, targets=["query"])
    assert [type(layer).__name__ for layer in model["a"].values()] == ["LoraLinear", "Linear"]
