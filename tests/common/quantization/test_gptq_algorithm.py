"""GPTQ: outputs nearer than those of rounding alone, on inputs like those it has seen; and its file reads as what it chose."""

from dataclasses import replace

import pytest
import torch

from common.quantization.gptq_algorithm import Inputs, gptq
from common.quantization.methods import METHODS
from common.quantization.rounding import round_to_nearest
from common.quantization.scheme import Scheme

SCHEME = Scheme("gptq", 4, "int", "group", 32)
SCHEMES = [
    SCHEME,
    replace(SCHEME, symmetric=False),
    replace(SCHEME, bits=3, act_order=True),
    replace(SCHEME, group_size=None),
    replace(SCHEME, bits=2, group_size=48, symmetric=False, act_order=True),
]


def layer(seed=0, n=48, m=160):
    """A matrix, and inputs that go together, of very different sizes."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(24, m, generator=g) * torch.rand(m, generator=g).square() * 4
    return torch.randn(n, m, generator=g), torch.randn(800, 24, generator=g) @ mix + 0.1 * torch.randn(
        800, m, generator=g
    )


def inputs_of(x):
    inputs = Inputs(x.shape[1])
    for part in x.split(70):
        inputs.add(part)
    return inputs


def test_hessian_is_the_mean_over_all_rows_however_they_come():
    _, x = layer()
    assert torch.allclose(inputs_of(x).hessian, 2 / len(x) * (x.T @ x).double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s} {s.act_order}")
def test_outputs_are_nearer_than_those_of_rounding_alone(scheme):
    w, x = layer()
    seen, unseen = x[:600], x[600:]
    stored = METHODS["gptq"].stored
    codes = gptq(w, inputs_of(seen).hessian, scheme, stored)
    nearest = round_to_nearest(w, scheme, stored)
    for rows in (seen, unseen):
        off = [(rows @ (w - of.dequantise()).T).square().mean() for of in (codes, nearest)]
        assert off[0] < 0.5 * off[1]
    assert (codes.dequantise() - w).square().mean() > (nearest.dequantise() - w).square().mean()  # what it is paid with
    parts = METHODS["gptq"].encode(scheme, codes)
    again = METHODS["gptq"].codes(scheme, parts, w.shape, slice(0, len(w)), slice(0, w.shape[1]))
    assert torch.equal(again.dequantise(), codes.dequantise())


def test_inputs_that_do_not_go_together_leave_nothing_to_make_up_for():
    w, _ = layer()
    codes = gptq(w, torch.eye(w.shape[1]), SCHEME)
    assert torch.equal(codes.q, round_to_nearest(w, SCHEME).q)


def test_an_input_that_was_always_zero_gets_no_weight():
    w, x = layer()
    x[:, 7] = 0
    codes = gptq(w, inputs_of(x).hessian, SCHEME)
    assert not codes.dequantise()[:, 7].any()
    assert codes.scale.isfinite().all()


def test_columns_of_the_largest_inputs_come_first():
    w, x = layer()
    x[:, 100] = 10 * x.abs().amax(1)
    codes = gptq(w, inputs_of(x).hessian, replace(SCHEME, act_order=True))
    assert codes.group[100] == 0
    assert sorted(codes.group.bincount().tolist()) == [32] * 5
