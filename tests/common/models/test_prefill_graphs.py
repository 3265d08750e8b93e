"""What prefill graphs record, run as it is: a CPU has no CUDA graphs, but their steps are the same launches, padding and all."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.executor import Executor
from common.models.prefill_graphs import SEATS, PrefillGraphs, token_sizes

ROW_TOKENS, MOST = 64, 96  # of each row's pages; of a recorded step


@pytest.fixture(scope="module")
def executor():
    executor = Executor(device="cpu", page_size=4, max_total_tokens=1024, max_running_requests=12)
    executor.table.set_pages([(row, 0, range(row * 16, row * 16 + 16)) for row in range(12)])
    executor.table.set_tokens(torch.arange(12), torch.arange(12) + 700)
    executor.set_steps_in_flight(2)
    return executor


@pytest.fixture(scope="module")
def graphs(executor):
    graphs = PrefillGraphs(executor.model, executor.attention, executor.kv_cache, executor.table, MOST)
    with torch.inference_mode():
        for shape in graphs.shapes:  # padding only
            before = executor.kv_cache.kv.clone()
            graphs._pad(shape)
            assert torch.isfinite(graphs._step(shape)).all()
            assert torch.equal(before, executor.kv_cache.kv)
    graphs._replay = graphs._step
    return graphs


@st.composite
def steps(draw):
    """(tokens, rows, cached, new, emits, scored) of a recorded step: prompts, chunks behind a prefix, some decode."""
    count = draw(st.integers(1, SEATS))
    rows = draw(st.permutations(range(12)))[:count]
    new = [draw(st.integers(1, max(1, MOST // count))) for _ in rows]
    cached = [draw(st.integers(0, ROW_TOKENS - n)) if n < ROW_TOKENS else 0 for n in new]
    new = [min(n, ROW_TOKENS) for n in new]
    tokens = draw(st.lists(st.integers(0, 3583), min_size=sum(new), max_size=sum(new)))
    ends = np.cumsum(new)
    for b, end in enumerate(ends):
        if new[b] == 1 and draw(st.booleans()):
            tokens[end - 1] = -1  # only the device knows it
    emits = [draw(st.booleans()) for _ in rows]
    scored = sorted(draw(st.sets(st.integers(0, sum(new) - 1), max_size=3)))
    return tuple(np.array(each, dtype=np.int64) for each in (tokens, rows, cached, new, emits, scored))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(step=steps())
def test_a_recorded_step_gives_what_the_step_itself_gives(executor, graphs, step):
    before = executor.kv_cache.kv.clone()

    def run(recorded):
        executor.kv_cache.kv.copy_(before)
        executor.prefill_graphs = recorded
        logits = executor.ragged(*step)
        scored = executor._scored
        executor.prefill_graphs = executor._scored = None
        return logits, scored, executor.kv_cache.kv.clone()

    want, got = run(None), run(graphs)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


def test_the_graph_is_what_ran(executor, graphs, monkeypatch):
    """Else the comparison above would be one of launches with launches."""
    ran = []
    monkeypatch.setattr(graphs, "_replay", lambda shape, _slots: ran.append(shape) or graphs._step(shape))
    monkeypatch.setattr(executor, "prefill_graphs", graphs)
    one, row = np.ones(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    executor.ragged(np.arange(17), row, row, 17 * one, one)
    executor.ragged(np.arange(40), np.arange(8), np.zeros(8, np.int64), np.full(8, 5), np.ones(8, np.int64))
    assert ran == [(32, SEATS), (48, SEATS)]
    executor.ragged(np.arange(45), np.arange(9), np.zeros(9, np.int64), np.full(9, 5), np.ones(9, np.int64))  # no seat
    executor.ragged(np.arange(64), row, row, 64 * one, one)
    assert ran[2:] == [(64, SEATS)]


def test_what_is_run_before_it_is_recorded_runs_launch_by_launch(executor, monkeypatch):
    monkeypatch.setattr(
        executor, "prefill_graphs",
        PrefillGraphs(executor.model, executor.attention, executor.kv_cache, executor.table, executor.max_context),
    )  # fmt: skip
    executor._warm_up()
    assert executor.prefill_graphs is not None


def test_sizes():
    assert token_sizes(512)[:6] == [16, 32, 48, 64, 96, 128]
    assert len(token_sizes(512)) == 14
    assert token_sizes(100)[-2:] == [96, 100]
    assert token_sizes(1)[-1] == 1
    assert all(b <= 1.5 * a for a, b in zip(token_sizes(4096)[2:], token_sizes(4096)[3:], strict=False))


def test_none_on_a_cpu():
    for most in (0, 64):
        assert Executor(device="cpu", max_total_tokens=256, prefill_graph_tokens=most).prefill_graphs is None


ALONE = {
    "pp": 1,
    "cp": 1,
    "parts": 1,
    "spreads": False,
    "two_batch": False,
    "vision": None,
    "mixture": None,
    "latent": None,
}


@pytest.mark.parametrize(
    "other",
    [{}, {"pp": 2}, {"cp": 2}, {"parts": 2}, {"spreads": True}, {"two_batch": True}, {"vision": 1}, {"mixture": 1}, {"latent": 1},
     {"speculative": 1}],
    ids=str,
)  # fmt: skip
def test_only_a_prefill_that_launches_the_same_for_the_same_tokens_is_recorded(other):
    has = SimpleNamespace(**ALONE | {"speculative": None} | other)
    engine = SimpleNamespace(
        config=has, communicator=has, two_batch_overlap=has.two_batch,
        parallel=SimpleNamespace(pp=SimpleNamespace(size=has.pp), cp=SimpleNamespace(size=has.cp)),
    )  # fmt: skip
    assert Executor._plain_prefills(engine, has.speculative) is (not other)
