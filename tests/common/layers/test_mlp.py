"""Which way gate and up go: by one launch with SiLU where a kernel multiplies by them, else by a product and the layer's gate."""

import pytest
import torch

from common.kernels import linear_choice
from common.layers.activation import SiluAndMul
from common.layers.batch_invariant import RowBlocks
from common.layers.linear import Apart
from common.layers.mlp import MLP
from common.parallel_state import TPGroup
from common.quantization.codes import Codes
from common.quantization.gpu_methods import RoundedActivations, WeightOnlyKernels
from common.quantization.rounding import round_to_nearest
from common.quantization.scheme import Activations, Scheme
from tests.common.kernels.where import DEVICE, GPU, kernel, relative_error

HALF = torch.bfloat16 if GPU else torch.float16  # the interpreter does not multiply bfloat16
WIDTH, F = 48, 37


class OnGpu(torch.Tensor):
    """Says so: without a GPU kernels run in Triton's interpreter."""

    is_cuda = True


class Adapters:
    """What LoRA adds, in place of adapter_rows.py: one to each number."""

    def add(self, y, x, lora):
        return y + 1


def mlp(dtype: torch.dtype = HALF) -> MLP:
    one = MLP(WIDTH, F, TPGroup(device=DEVICE)).to(DEVICE, dtype)
    random = torch.Generator().manual_seed(0)
    for weight in one.parameters():
        weight.copy_(torch.randn(weight.shape, generator=random) / weight.shape[1] ** 0.5)
    return one


def rows(count: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype).as_subclass(OnGpu)


def gate_of(x: torch.Tensor, one: MLP) -> torch.Tensor:
    gate, up = (x.double() @ one.gate_up_proj.weight.double().t()).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@pytest.fixture(autouse=True)
def nothing_measured():
    with linear_choice.forgotten():
        yield


@pytest.fixture
def gates(monkeypatch):
    """A list that grows with each call of the layer's own gate."""
    calls, forward = [], SiluAndMul.forward
    monkeypatch.setattr(SiluAndMul, "forward", lambda self, x: calls.append(len(x)) or forward(self, x))
    return calls


@kernel
@pytest.mark.parametrize(("count", "dtype"), [(1, HALF), (1, torch.float32), (5, HALF)])
def test_a_few_rows_are_gated_by_the_kernel_that_multiplies(count, dtype, gates):
    one, x = mlp(dtype), rows(count, dtype)
    want = gate_of(x, one) @ one.down_proj.weight.double().t()
    assert relative_error(one(x), want) < (2e-3 if dtype == torch.float16 else 1e-2 if dtype != torch.float32 else 2e-6)
    assert not gates


@kernel
def test_where_the_library_was_faster_it_multiplies(gates):
    one, x = mlp(), rows(5)
    with linear_choice.noting() as met:
        one(x)
    assert one.gate_up_proj.weight.data_ptr() in met[linear_choice.Matrix(2 * F, WIDTH, str(HALF), False)], "noted"
    fused, times = one(x), []
    assert not gates
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_choice, "SMALLEST", 0)
        linear_choice.choose(met, TPGroup(), lambda *which: times.append(which) or (2.0, 1.0))
    assert relative_error(one(x), fused) < 1e-2
    assert gates == [5]
    assert times


@kernel
@pytest.mark.parametrize("count", [3, 0])
def test_float32_of_several_rows_and_no_row_have_no_kernel(count, gates):
    one, x = mlp(torch.float32), rows(count, torch.float32)
    assert one.gate_up_proj.gated(x) is None
    assert one(x).shape == (count, WIDTH)
    assert gates == [count]


@kernel
def test_adapters_add_to_gate_and_up_before_silu(gates):
    one, x = mlp(), rows(1)
    gate, up = (x.double() @ one.gate_up_proj.weight.double().t() + 1).chunk(2, dim=-1)
    want = (torch.nn.functional.silu(gate) * up) @ one.down_proj.weight.double().t() + 1
    assert relative_error(one(x, Adapters()), want) < 1e-2
    assert gates == [1]


@kernel
def test_a_compiled_gate_and_methods_of_their_own_keep_their_way(gates):
    one, x = mlp(), rows(1)
    one.act.compiled = type("Pieces", (), {"max_rows": 32, "gate": staticmethod(lambda x: x[:, :F] * 0)})
    assert not one(x).any(), "the compiled one"
    one.act.compiled = None
    for method in (RowBlocks(), Apart()):
        one.gate_up_proj.method = method
        assert one.gate_up_proj.gated(x) is None
    assert gates == [1]


@kernel
def test_what_is_compiled_ahead_has_the_gate_in_it(monkeypatch):
    from common.kernels import linear  # noqa: PLC0415

    monkeypatch.setattr(linear_choice, "SMALLEST", 0)
    one = mlp()
    with linear_choice.noting() as met:
        one(rows(3))
    seen, multiply = [], linear.linear
    monkeypatch.setattr(
        linear, "linear", lambda x, *rest, **how: seen.append((len(x), how)) or multiply(x, *rest, **how)
    )
    linear_choice.rehearse(met)
    gated = [count for count, how in seen if how.get("gated")]
    assert {1, 16, 32, 64} <= set(gated), "of gate and up"
    assert gated == [count for count, how in seen if not how], "and what is measured"


def test_a_row_on_a_cpu_is_not_gated(gates):
    one = MLP(WIDTH, F, TPGroup())
    assert one.gate_up_proj.gated(torch.randn(1, WIDTH)) is None
    one(torch.randn(1, WIDTH))
    assert gates == [1]


@kernel
@pytest.mark.parametrize("kind", [WeightOnlyKernels, RoundedActivations])
def test_one_row_by_codes_is_gated_and_two_are_not(kind, gates):
    scheme = Scheme("w8a8_int8", 8, "int", activations=Activations(8, "int"))
    one, method = mlp(), kind(scheme)
    codes = round_to_nearest(one.gate_up_proj.weight.float().cpu(), scheme)
    codes = Codes(*(None if x is None else x.to(DEVICE) for x in codes))
    method.pack(one.gate_up_proj, codes)
    one.gate_up_proj.weight.copy_(codes.dequantise(torch.float32))
    one.gate_up_proj.method = method
    want = gate_of(rows(2), one) @ one.down_proj.weight.double().t()
    assert relative_error(one(rows(2)[:1]), want[:1]) < 1e-2
    assert not gates
    assert relative_error(one(rows(2)), want) < 3e-2
    assert gates == [2]
