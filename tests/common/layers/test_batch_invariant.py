"""A row's bits do not depend on its company, and an operator for which they do is caught."""

import pytest
import torch
import torch.nn.functional as F

from common.layers import batch_invariant
from common.layers.activation import SiluAndMul
from common.layers.batch_invariant import SiluByExp, agreeing_rows, in_blocks, make_batch_invariant
from common.layers.linear import ReplicatedLinear, RowParallelLinear, multiply
from common.layers.norm import RMSNorm
from common.layers.rotary import RotaryEmbedding, apply_rotary
from common.parallel_state import TPGroup
from common.sampling.logprobs import Logprobs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COMPANY = (1, 2, 3, 5, 15, 16, 17, 40)


def alone_and_in_company(f, width, dtype, rows=COMPANY):
    """How many of the places that a row was put to give other bits than the row alone."""
    rng = torch.Generator().manual_seed(0)
    row = torch.randn(1, width, generator=rng).to(dtype)
    want, other = f(row)[0], 0
    for n in rows:
        for place in {0, n // 2, n - 1}:
            x = torch.randn(n, width, generator=rng).to(dtype)
            x[place] = row[0]
            other += not torch.equal(f(x)[place], want)
    return other


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(36, 7), (151, 112), (1009, 64), (960, 576), (576, 1536), (3584, 224)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_in_blocks(shape, dtype, with_bias):
    rng = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(shape, generator=rng).to(dtype), torch.randn(shape[0], generator=rng).to(dtype)
    bias = bias if with_bias else None
    rows = agreeing_rows(weight, bias)

    def product(x):
        return in_blocks(lambda block: multiply(block, weight, bias), x, rows)

    assert alone_and_in_company(product, shape[1], dtype) == 0
    x = torch.randn(21, shape[1], generator=rng).to(dtype)
    torch.testing.assert_close(product(x), F.linear(x, weight, bias))
    assert product(x[:0]).shape == (0, shape[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_works_row_by_row_as_it_is(dtype):
    norm, rotary = RMSNorm(112, 1e-6), RotaryEmbedding(16, 64, 10_000.0)
    norm.root_weight.copy_(torch.rand(112))
    cos_sin = rotary(torch.tensor([37]), dtype)  # one position for all rows

    def turned(x):
        return apply_rotary(x.view(len(x), 7, 16), cos_sin).flatten(1)

    def told(logits):
        of = Logprobs(logits, torch.zeros(len(logits), dtype=torch.int64), [2] * len(logits), [(5,)] * len(logits))
        return of._values

    for f in (norm, lambda x: norm.add(x, x)[0], SiluByExp(), turned, told, lambda x: x.float().softmax(-1)):
        assert alone_and_in_company(f, 112, dtype) == 0


def test_silu_by_exp_is_silu():
    x = 4 * torch.randn(9, 2 * 57)
    torch.testing.assert_close(SiluByExp()(x), SiluAndMul()(x))
    far = torch.tensor([[-200.0, 200.0, 1.0, 1.0]])
    torch.testing.assert_close(SiluByExp()(far), torch.tensor([[0.0, 200.0]]))


def test_silu_by_exp_computes_the_last_numbers_like_the_others():
    """A vector's width of numbers and what is left over behind it: torch has two functions for these."""
    x = 3 * torch.randn(1, 7001, generator=torch.Generator().manual_seed(0))
    gate = SiluByExp()
    one_by_one = torch.cat([gate(torch.cat((part, torch.ones_like(part)), -1)) for part in x.split(1, dim=1)], dim=1)
    assert torch.equal(gate(torch.cat((x, torch.ones_like(x)), -1)), one_by_one)


def test_an_operator_whose_order_depends_on_the_rows_is_caught():
    """Halves of a sum where there are many rows: as a library does that cuts a long product up."""
    weight = torch.randn(64, 200, generator=torch.Generator().manual_seed(2))

    def planted(x):
        if len(x) < 16:
            return F.linear(x, weight)
        return F.linear(x[:, :100], weight[:, :100]) + F.linear(x[:, 100:], weight[:, 100:])

    assert alone_and_in_company(planted, 200, torch.float32) > 0


def test_a_library_that_adds_up_the_third_row_otherwise_gets_blocks_of_one(monkeypatch):
    def uneven(x, weight, bias):
        y = F.linear(x, weight, bias)
        if len(x) > 2:
            y[2] = (x[2:3, :50] @ weight[:, :50].t() + x[2:3, 50:] @ weight[:, 50:].t())[0]
        return y

    monkeypatch.setattr(batch_invariant, "multiply", uneven)
    assert agreeing_rows(torch.randn(64, 200, generator=torch.Generator().manual_seed(2))) == 1


def test_a_layer_is_tried_with_the_bias_that_its_product_has(monkeypatch):
    """A library that adds a bias otherwise to the third row; a row-parallel layer's is added behind the product."""

    def uneven(x, weight, bias=None):
        y = F.linear(x, weight, bias)
        return (
            y if bias is None or len(x) < 3 else y.index_add(0, torch.tensor([2]), torch.full((1, len(weight)), 1e-3))
        )

    monkeypatch.setattr(batch_invariant, "multiply", uneven)
    tp = TPGroup(0, 1, torch.device("cpu"))
    layers = [ReplicatedLinear(32, 32, tp, bias) for bias in (True, False)] + [RowParallelLinear(32, 32, tp, True)]
    make_batch_invariant(torch.nn.ModuleList(layers))
    assert [layer.method.rows for layer in layers] == [1, 16, 16]
