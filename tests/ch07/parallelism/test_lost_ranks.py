"""A rank is lost, of whatever layout, in the middle of answers: the others end in time, and who is lost is named."""

import os
import signal

import pytest

from ch07_sglang_radix import Engine
from common import parallel_state
from common.parallel_state import RankFailure

PATIENCE_S = 5.0  # of rank 0 with one that is stopped; it ends those that it has started
PROMPTS = [[5, 6, 7], [8] * 40, [9, 10], list(range(60, 200))]
BOTH = {"tp_size": 2, "pp_size": 2}  # rank 3 is neither rank 0 nor the first of its stage
DATA = {"tp_size": 2, "attn_dp_size": 2}
SEQUENCE = {"tp_size": 2, "enable_layernorm_sp": True}
FATES = {signal.SIGKILL: "has died", signal.SIGSTOP: "is stopped"}
CASES = [
    ({"tp_size": 2}, 1, signal.SIGKILL), ({"pp_size": 3}, 1, signal.SIGKILL), ({"pp_size": 3}, 2, signal.SIGKILL),
    (BOTH, 3, signal.SIGKILL), ({"cp_size": 2}, 1, signal.SIGKILL), (SEQUENCE, 1, signal.SIGKILL), (DATA, 1, signal.SIGKILL),
    ({"pp_size": 3}, 1, signal.SIGSTOP), (BOTH, 3, signal.SIGSTOP), (DATA, 1, signal.SIGSTOP),
]  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "victim", "signal_"), CASES, ids=[f"{'-'.join(way)}-{rank}-{number.name}" for way, rank, number in CASES]
)
def test_a_rank_that_is_lost_ends_the_others_and_is_named(layout, victim, signal_, monkeypatch):
    monkeypatch.setattr(parallel_state, "CPU_TIMEOUT_S", PATIENCE_S)
    engine = Engine(device="cpu", **layout)
    processes = engine.scheduler.replica.spawned.processes
    stream = engine.generate(
        input_ids=PROMPTS, sampling_params={"max_new_tokens": 900, "ignore_eos": True}, stream=True
    )
    try:
        next(stream)
        lost = processes[victim - 1].pid
        os.kill(lost, signal_)
        with pytest.raises(RankFailure, match=rf"rank {victim} \(pid {lost}\) {FATES[signal_]}"):
            list(stream)
    finally:  # a stopped one would stay
        engine.shutdown()
    assert all(process.poll() is not None for process in processes)
