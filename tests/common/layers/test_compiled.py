"""Compiled pieces are the pieces: the same tokens, compiled once for all layers, and refused in a line where they cannot be."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from ch07_sglang_radix import Engine
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.layers.compiled import CXX, CompiledPieces
from common.layers.norm import RMSNorm
from common.tiny_qwen import TINY_QWEN_PATH
from tests.oracle import greedy

PROMPTS = [[100, 3, 4, 7], [200, 3], [300, 8, 9, 10, 11, 12]]
CPU = torch.device("cpu")


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def recorded():
    """The bundled model whose pieces are Dynamo's graphs, run as they were recorded."""
    torch._dynamo.reset()
    counters.clear()
    wrapper = TPRadixAttentionModelWrapper(None, "cpu", 16, max_total_tokens=2048)
    pieces = CompiledPieces(wrapper.tp.device, max_rows=8, backend="eager")
    pieces.give_to(wrapper.model.model)
    pieces.warm_up(wrapper.model, wrapper.dtype)
    yield wrapper
    torch._dynamo.reset()


def test_tokens_equal_transformers_and_nothing_is_compiled_while_requests_wait(recorded):
    assert graphs() == 2 * 4, "one row and several, of four functions; not of every layer"
    scheduler = TPScheduler(recorded, chunked_prefill_size=64)
    for prompt in PROMPTS:
        scheduler.add_request(input_ids=prompt, max_new_tokens=8)
    outputs = scheduler.process_requests()
    assert [outputs[i].output_ids for i in range(len(PROMPTS))] == [greedy(TINY_QWEN_PATH, p, 8) for p in PROMPTS]
    assert graphs() == 2 * 4
    assert not counters["graph_break"]


def test_larger_steps_run_as_ever():
    norm, calls = RMSNorm(16, 1e-6), []

    class Noted:
        max_rows = 4

        @staticmethod
        def norm(x, *_):
            calls.append(len(x))
            return x

    norm.compiled = Noted
    for rows in (1, 4, 5):
        norm(torch.ones(rows, 16))
    assert calls == [1, 4]


def test_no_compiler_is_said_in_a_line(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ValueError, match="there is no compiler no-such-compiler; install it, name another one in the variable CXX"
    ):
        Engine(device="cpu", enable_torch_compile=True)
    CompiledPieces(CPU, backend="eager")


def test_what_is_compiled_needs_heads_and_an_mlp():
    with pytest.raises(ValueError, match="not Qwen2MoeForCausalLM; leave it out"):
        Engine(str(TINY_QWEN_PATH / "mixture"), device="cpu", enable_torch_compile=True)


@pytest.mark.skipif(not shutil.which(CXX), reason=f"inductor writes C++, and there is no {CXX}")
def test_inductor_computes_the_same():
    """Of one row, and of the smallest function with a sum in it: a compiler runs for seconds."""
    torch._dynamo.reset()
    pieces = CompiledPieces(CPU, max_rows=1)
    norm, x, residual = RMSNorm(64, 1e-6), torch.randn(1, 64), torch.randn(1, 64)
    norm.root_weight.uniform_(0.5, 2)
    want = norm.add(x, residual)
    norm.compiled = pieces
    for got, expected in zip(norm.add(x, residual), want, strict=True):
        torch.testing.assert_close(got, expected)
    torch._dynamo.reset()
