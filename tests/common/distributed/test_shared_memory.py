"""All-reduce in shared memory: right sums, equal bits, and a peer that does not come is named."""

import errno
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ch06_tp_vllm import LLM, SamplingParams
from ch07_sglang_radix import Engine
from common import parallel_state
from common.distributed import shared_memory
from common.distributed.shared_memory import (
    CHUNK,
    DTYPES,
    LOOK_AT_PROCESSES_EVERY_S,
    SharedMemoryAllReduce,
    meet_in_shared_memory,
)
from common.parallel_state import (
    RankFailure,
    TPGroup,
    all_reduce,
    get_tensor_parallel,
    initialize_tensor_parallel,
)
from common.tiny_qwen import TINY_QWEN_PATH
from tests.common.distributed.followers import start, total
from tests.oracle import greedy

SIZES = pytest.mark.parametrize("size", [2, 3])


def meet(tp: TPGroup) -> SharedMemoryAllReduce:
    return meet_in_shared_memory(tp.rank, dict(enumerate(tp.peers)), tp.control_group, 100.0)


def in_shared_memory() -> TPGroup:
    """The pool's ranks, with shared memory of their own."""
    tp = get_tensor_parallel()
    return replace(tp, fast_all_reduce=meet(tp))


# --- the numbers


def stress(rounds: int) -> list[str]:
    """What was wrong. Every rank draws the same sizes and dtypes; each round has numbers of its own, so that a message that
    was read too early, or after it was written over, shows. Whole numbers up to 256, whose sums bfloat16 holds exactly."""
    tp, rng, wrong = in_shared_memory(), random.Random(0), []
    own = random.Random(tp.rank)
    for i in range(rounds):
        dtype = rng.choice(DTYPES)
        room = CHUNK // dtype.itemsize
        n = rng.choice((1, rng.randint(1, 64), rng.randint(1, 3000)))
        if i % 500 == 0:
            n = rng.choice((room - 1, room, room + 1, 2 * room + rng.randint(0, 100)))
        base = (torch.arange(n) + i) % 61
        if own.random() < 0.05:
            time.sleep(0.0001 * own.random())  # one comes late
        y = all_reduce((base + 10 * tp.rank).to(dtype), tp, "stress")
        want = (tp.size * base + 10 * sum(range(tp.size))).to(dtype)
        if not torch.equal(y, want):
            wrong.append(f"round {i}: {n} of {dtype}, {(y != want).sum()} wrong")
    return wrong[:5]


@pytest.mark.parametrize(("size", "rounds"), [(2, 20_000), (3, 10_000)])
def test_thousands_of_random_messages_are_all_summed_right(ranks, size, rounds):
    assert ranks(size).run(stress, rounds) == [[]] * size


def sums_of_noise() -> tuple[list[list[float]], bool, list]:
    """Sums of numbers whose order of addition shows; whether they came back in place; what the ledger has."""
    tp, sums = in_shared_memory(), []
    with tp.ledger.recording() as ledger:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            x = noise(tp.rank, dtype)
            y = all_reduce(x, tp, "noise")
            sums.append(y.double().tolist())
        return sums, y is x, [(e.op, e.label, e.shape, e.dtype, e.bytes) for e in ledger.entries]


def noise(rank: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)).to(dtype)


@SIZES
def test_sums_are_in_the_order_of_the_ranks_and_equal_bit_for_bit(ranks, size):
    answers = ranks(size).run(sums_of_noise)
    assert all(answer == answers[0] for answer in answers)
    for got, dtype in zip(answers[0][0], (torch.float32, torch.bfloat16, torch.float16, torch.float64), strict=True):
        parts = [noise(rank, dtype) for rank in range(size)]
        exact = dtype if dtype.itemsize > 2 else torch.float32  # of what is rounded at all, only the sum
        want = sum(part.to(exact) for part in parts).to(dtype)
        assert got == want.double().tolist(), dtype


def test_the_ledger_has_it_like_any_other_all_reduce(ranks):
    for _, in_place, entries in ranks(2).run(sums_of_noise):
        assert in_place
        assert entries == [
            ("all_reduce", "noise", (1000,), name, 1000 * width)
            for name, width in (("float32", 4), ("bfloat16", 2), ("float16", 2), ("float64", 8))
        ]


@pytest.mark.parametrize(
    ("x", "fits"),
    [
        (torch.ones(3), True),
        (torch.ones(2, 3, dtype=torch.bfloat16), True),
        (torch.ones(0), False),
        (torch.ones(3, dtype=torch.bool), False),
        (torch.ones(2, 3).T, False),
        (torch.ones(3, device="meta"), False),
    ],
    ids=["float32", "bfloat16", "empty", "bool", "transposed", "elsewhere"],
)
def test_what_does_not_fit_goes_the_other_way(x, fits):
    assert SharedMemoryAllReduce.fits(x) is fits


def test_it_remembers_the_views_of_so_many_shapes_only(monkeypatch):
    monkeypatch.setattr(shared_memory, "MOST_SHAPES", 4)
    (one,) = members(1)
    for n in range(1, 10):
        one._slots_of(torch.ones(n))
    assert len(one._views) <= 4


# --- who does not come: the members of a group of whom one alone makes the call


def members(size: int, timeout_s: float = 5.0, **others: int) -> list[SharedMemoryAllReduce]:
    """All ranks of a group, in this process; rank1=pid: that one is another."""
    memory = mmap.mmap(-1, shared_memory._head(size) + 2 * size * CHUNK)
    pids = {rank: others.get(f"rank{rank}", os.getpid()) for rank in range(size)}
    return [SharedMemoryAllReduce(memory, rank, pids, timeout_s) for rank in range(size)]


def test_a_peer_that_is_dead_is_noticed_at_once():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    one, _ = members(2, timeout_s=600, rank1=gone.pid)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"^rank 1 has died$"):
        one(torch.ones(3))
    assert LOOK_AT_PROCESSES_EVERY_S <= time.monotonic() - began < 60


def test_a_peer_that_has_left_is_not_waited_for():
    one, other = members(2, timeout_s=600)
    other.close()
    with pytest.raises(RuntimeError, match=r"^rank 1 has left$"):
        one(torch.ones(3))


def test_a_peer_that_stays_away_is_waited_for_as_long_as_was_said():
    one, _ = members(2, timeout_s=0.3)
    with pytest.raises(RuntimeError, match=r"^no answer of rank 1 in 0\.3 s$"):
        one(torch.ones(3))


def test_the_last_word_of_a_peer_that_has_left_counts():
    one, other = members(2, timeout_s=0.01)
    with pytest.raises(RuntimeError, match="no answer of rank 0"):
        other(torch.full((3,), 2.0))
    other.close()
    assert one(torch.ones(3)).tolist() == [3.0] * 3


@pytest.mark.parametrize(
    ("mine", "theirs", "said"),
    [
        (torch.ones(3), torch.ones(4), "rank 1 sends 16 bytes of float32, this rank 12 bytes of float32"),
        (
            torch.ones(2),
            torch.ones(1, dtype=torch.int64),
            "rank 1 sends 8 bytes of int64, this rank 8 bytes of float32",
        ),
    ],
    ids=["size", "dtype"],
)
def test_another_message_than_mine_is_refused(mine, theirs, said):
    one, other = members(2, timeout_s=0.01)
    with pytest.raises(RuntimeError, match="no answer of rank 0"):
        other(theirs)
    with pytest.raises(RuntimeError, match=f"^{said}$"):
        one(mine)


@pytest.fixture
def no_torchrun(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(parallel_state, "_state", None)


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_ranks_that_were_started_add_up_and_one_that_dies_is_named(no_torchrun):
    tp = start(2, "die at 7", all_reduce="shm")
    assert isinstance(tp.fast_all_reduce, SharedMemoryAllReduce)
    assert total([1, 10], tp) == [3, 30]
    pid = tp.peers[1][1]
    with pytest.raises(RankFailure, match=rf"^rank 0: all_reduce 'total' \[1\] failed: rank 1 \(pid {pid}\) has died"):
        total([7], tp)


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_a_rank_that_is_stopped_is_named_when_its_time_is_up(no_torchrun):
    tp = start(2, timeout_s=6, all_reduce="shm")
    pid = tp.peers[1][1]
    os.kill(pid, signal.SIGSTOP)
    said = rf"^rank 0: all_reduce 'total' \[1\] failed: rank 1 \(pid {pid}\) is stopped \(SIGSTOP\)$"
    with pytest.raises(RankFailure, match=said):
        all_reduce(torch.ones(1), tp, "total")


# --- how they meet


def meet_without(what: str) -> str:
    """What a rank is told if rank 0 cannot make the file, or rank 1 finds another one's."""
    tp = get_tensor_parallel()
    kept = shared_memory._new_file, shared_memory._map

    def full(size):
        raise OSError(errno.ENOSPC, "No space left on device")

    def absent(name, size):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    if what == "room" and tp.rank == 0:
        shared_memory._new_file = full
    if what == "sight" and tp.rank == 1:
        shared_memory._map = absent
    try:
        meet(tp)
    except ValueError as error:
        return str(error)
    finally:
        shared_memory._new_file, shared_memory._map = kept
    return "met"


@pytest.mark.parametrize(("what", "of", "why"), [("room", 0, "No space left on device"), ("sight", 1, "No such file")])
def test_ranks_that_cannot_share_memory_all_say_so(ranks, what, of, why):
    told = ranks(2).run(meet_without, what)
    for rank, said in enumerate(told):
        assert said.startswith('all_reduce="shm" finds no ')
        assert said.endswith("leave it out (gloo)")
        assert (why in said) == (rank == of)


def test_ranks_of_two_hosts_are_refused_before_they_talk():
    with pytest.raises(
        ValueError, match=r'^all_reduce="shm" is memory of one host, but the 3 ranks run on 2; leave it out \(gloo\)$'
    ):
        meet_in_shared_memory(0, {0: (1, 11), 1: (1, 12), 2: (2, 11)}, None, 1.0)


def file_left_behind() -> tuple[bool, bool]:
    """Was there one, and is it still there?"""
    made, make = [], shared_memory._new_file

    def watched(size):
        made.append(make(size))
        return made[-1]

    shared_memory._new_file = watched
    try:
        in_shared_memory()
    finally:
        shared_memory._new_file = make
    return bool(made), any(Path(path).exists() for path in made)


@pytest.mark.skipif(os.name != "posix", reason="Windows keeps a file that is mapped")
def test_no_file_is_left_behind(ranks):
    assert ranks(2).run(file_left_behind) == [(True, False), (False, False)]


def test_one_rank_alone_needs_none(no_torchrun):
    assert initialize_tensor_parallel(1, device="cpu", all_reduce="shm").fast_all_reduce is None


def test_an_unknown_way_is_refused(no_torchrun):
    with pytest.raises(ValueError, match=r"^all_reduce='mpi' is unknown; use auto or shm$"):
        initialize_tensor_parallel(1, device="cpu", all_reduce="mpi")


def test_gpus_are_told_that_they_have_their_own(no_torchrun, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        ValueError, match=r'^all_reduce="shm" is for CPU ranks, and GPUs have symmetric memory; leave it out$'
    ):
        initialize_tensor_parallel(1, device="cuda", all_reduce="shm")


# --- engines


def test_an_engine_s_answers_are_transformers(no_torchrun):
    engine = Engine(tp_size=2, device="cpu", all_reduce="shm", check=True)
    assert isinstance(engine.wrapper.tp.fast_all_reduce, SharedMemoryAllReduce)
    prompts = [engine.wrapper.tokenizer.encode(text) for text in ("What is a radix cache?", "Explain retraction.")]
    answers = engine.generate(input_ids=prompts, sampling_params={"max_new_tokens": 24, "ignore_eos": True})
    assert [answer["output_ids"] for answer in answers] == [greedy(TINY_QWEN_PATH, ids, 24) for ids in prompts]
    engine.shutdown()


def test_chapter_6_has_it_too(no_torchrun):
    llm = LLM(tensor_parallel_size=2, device="cpu", all_reduce="shm")
    (out,) = llm.generate(["What is a block table?"], SamplingParams(temperature=0.0, max_tokens=12))
    assert list(out.outputs[0].token_ids) == greedy(
        TINY_QWEN_PATH, list(out.prompt_token_ids), len(out.outputs[0].token_ids)
    )
