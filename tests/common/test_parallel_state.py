import os
import platform
import signal
import time
from pathlib import Path

import pytest
import torch

from common import parallel_state
from common.distributed.ledger import Ledger
from common.parallel_state import (
    RankFailure,
    TPGroup,
    all_gather,
    all_reduce,
    broadcast,
    gather,
    get_tensor_parallel,
    initialize_tensor_parallel,
    pick_device,
    shutdown_tensor_parallel,
    start_all_reduce,
)
from tests.ranks import RankPool

COLLECTIVES = {"all_reduce": all_reduce, "all_gather": all_gather, "gather": gather, "broadcast": broadcast}


@pytest.fixture
def no_torchrun(monkeypatch):
    """A process that torchrun did not start and that has no group yet; left as it was found."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(parallel_state, "_state", None)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep freed memory")
def test_a_step_finds_the_memory_that_the_last_one_freed(no_torchrun):
    import resource  # noqa: PLC0415, where glibc is, it is

    def step():
        return (torch.ones(3 << 20) + 1)[0].item()  # two tensors of 12 MiB, some 3,000 pages each

    initialize_tensor_parallel(device="cpu")
    step()  # the heap may still grow in one of the next
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        step()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 20_000  # 60,000 if each got new memory


# --- collectives on real ranks


def collect(op):
    """Rank r hands in [r+1, 10 (r+1)]: (what came back, what the tensor handed in is afterwards, is it the same one)."""
    tp = get_tensor_parallel()
    x = torch.tensor([tp.rank + 1, 10 * (tp.rank + 1)])
    y = COLLECTIVES[op](x, tp, "test")
    out = None if y is None else [part.tolist() for part in y] if isinstance(y, list) else y.tolist()
    return out, x.tolist(), y is x


def handed_in(size):
    return [[r + 1, 10 * (r + 1)] for r in range(size)]


SIZES = pytest.mark.parametrize("size", [2, 4])


@SIZES
def test_all_reduce_leaves_the_sum_in_place_on_every_rank(ranks, size):
    total = [sum(column) for column in zip(*handed_in(size), strict=True)]
    assert ranks(size).run(collect, "all_reduce") == [(total, total, True)] * size


def sum_in_the_background(numbers):
    tp = get_tensor_parallel()
    x, other = torch.tensor([tp.rank + 1.0]), torch.tensor([10.0 * (tp.rank + 1)])
    with tp.ledger.recording() as ledger:
        waiting = [start_all_reduce(part, tp, label) for part, label in ((x, "x"), (other, "other"))]
        meanwhile = sum(range(numbers))
        return [wait().item() for wait in waiting], meanwhile, [(e.op, e.label) for e in ledger.entries]


@SIZES
def test_an_all_reduce_that_was_started_gives_the_sum_when_it_is_waited_for(ranks, size):
    total = size * (size + 1) / 2
    told = [("all_reduce", "x"), ("all_reduce", "other")]
    assert ranks(size).run(sum_in_the_background, 5) == [([total, 10 * total], 10, told)] * size


def test_one_rank_alone_starts_nothing():
    x = torch.ones(3)
    assert start_all_reduce(x, TPGroup(), "test")() is x


@SIZES
def test_all_gather_gives_every_rank_all_shards_in_order(ranks, size):
    assert ranks(size).run(collect, "all_gather") == [(handed_in(size), mine, False) for mine in handed_in(size)]


@SIZES
def test_gather_gives_rank_0_all_shards_and_the_others_none(ranks, size):
    answers = ranks(size).run(collect, "gather")
    assert [out for out, *_ in answers] == [handed_in(size)] + [None] * (size - 1)
    assert [x for _, x, _ in answers] == handed_in(size)


@SIZES
def test_broadcast_writes_rank_0s_over_everybodys(ranks, size):
    first = handed_in(size)[0]
    assert ranks(size).run(collect, "broadcast") == [(first, first, True)] * size


@pytest.mark.parametrize("op", COLLECTIVES)
def test_one_rank_alone_talks_to_nobody(op):
    tp, x = TPGroup(), torch.tensor([1, 2])
    with tp.ledger.recording() as ledger:
        y = COLLECTIVES[op](x, tp, "test")
    assert (y[0] if isinstance(y, list) else y) is x
    assert ledger.entries == []


@pytest.mark.parametrize("op", COLLECTIVES)
def test_a_detached_rank_says_why_it_cannot_talk(op):
    with pytest.raises(
        ValueError, match=rf"^{op} 'layers.0.mlp': rank 2 of 3 has no process group; start with torchrun"
    ):
        COLLECTIVES[op](torch.ones(2), TPGroup(2, 3), "layers.0.mlp")


def reduce_halves(dtype_name):
    tp = get_tensor_parallel()
    return all_reduce(torch.full((3,), 0.5, dtype=getattr(torch, dtype_name)), tp, "x").float().tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_checkpoint_dtype_can_be_summed(ranks, dtype):
    assert ranks(2).run(reduce_halves, dtype) == [[1.0] * 3] * 2


# --- the ledger


def talk_and_record():
    """One of each, first with the ledger off, then on."""
    tp = get_tensor_parallel()
    tp.ledger.entries.clear()
    before = all_reduce(torch.ones(2, 3), tp, "unseen") is not None, list(tp.ledger.entries)
    with tp.ledger.recording() as ledger:
        all_reduce(torch.ones(2, 3, dtype=torch.bfloat16), tp, "layers.0.o_proj")
        all_reduce(torch.ones(4), tp, "layers.0.down_proj")
        all_gather(torch.ones(5, dtype=torch.int64), tp, "task")
        gather(torch.ones(1, 7), tp, "logits")
        broadcast(torch.ones(1, dtype=torch.int32), tp, "tokens")
    all_reduce(torch.ones(2), tp, "unseen")
    entries = [(e.op, e.label, e.shape, e.dtype, e.bytes) for e in ledger.entries]
    return before[1], entries, ledger.summary()


@pytest.fixture(scope="module")
def recorded(ranks):
    return ranks(2).run(talk_and_record)


def test_the_ledger_is_off_until_it_is_asked_for(recorded):
    assert [before for before, *_ in recorded] == [[], []]


def test_the_ledger_has_the_message_that_each_rank_hands_in(recorded):
    for _, entries, _ in recorded:
        assert entries == [
            ("all_reduce", "layers.0.o_proj", (2, 3), "bfloat16", 12),
            ("all_reduce", "layers.0.down_proj", (4,), "float32", 16),
            ("all_gather", "task", (5,), "int64", 40),
            ("gather", "logits", (1, 7), "float32", 28),
            ("broadcast", "tokens", (1,), "int32", 4),
        ]


def test_the_summary_counts_calls_and_bytes_by_operation(recorded):
    for *_, summary in recorded:
        assert summary == {
            "all_reduce": {"calls": 2, "bytes": 28},
            "all_gather": {"calls": 1, "bytes": 40},
            "gather": {"calls": 1, "bytes": 28},
            "broadcast": {"calls": 1, "bytes": 4},
        }


def test_recording_starts_from_an_empty_page():
    ledger = Ledger()
    for label in ("first", "second"):
        with ledger.recording():
            ledger.record("all_reduce", label, torch.ones(1))
    assert [entry.label for entry in ledger.entries] == ["second"]


def test_recording_ends_with_an_error_too():
    ledger = Ledger()
    with pytest.raises(RuntimeError, match="a step failed"), ledger.recording():
        raise RuntimeError("a step failed")
    assert not ledger.enabled


def test_an_empty_ledger_has_an_empty_summary():
    assert Ledger().summary() == {}


def test_every_group_has_its_own_ledger():
    assert TPGroup(0, 2).ledger is not TPGroup(1, 2).ledger


# --- groups


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2), (7, 8)])
def test_a_detached_group_needs_a_rank_and_a_size_only(rank, size):
    tp = TPGroup(rank, size)
    assert (tp.device.type, tp.device_group, tp.control_group) == ("cpu", None, None)


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_its_group_is_refused(rank, size):
    with pytest.raises(ValueError, match=rf"rank={rank} is outside 0\.\.{size - 1} \(size={size}\)"):
        TPGroup(rank, size)


def own_group():
    tp = get_tensor_parallel()
    return tp.rank, tp.size, str(tp.device), [pid for _, pid in tp.peers].index(os.getpid()), torch.get_num_threads()


def test_each_rank_knows_itself_and_its_peers(ranks):
    assert ranks(4).run(own_group) == [(rank, 4, "cpu", rank, 1) for rank in range(4)]


@pytest.mark.parametrize("size", [None, 1])
def test_without_torchrun_there_is_one_rank_and_no_process_group(no_torchrun, size):
    tp = initialize_tensor_parallel(size, device="cpu")
    assert (tp.rank, tp.size, tp.device_group, tp.control_group) == (0, 1, None, None)
    assert get_tensor_parallel() is tp


def test_get_makes_the_group_once(no_torchrun):
    assert get_tensor_parallel("cpu") is get_tensor_parallel("cpu")


def start_between_two_uses_of_a_world():
    """This test's ranks have a world of torch.distributed that is not ours: what starts in it ends alone."""
    seen = []
    for i in range(3):
        tp = initialize_tensor_parallel(2, device="cpu")
        seen.append(all_reduce(torch.tensor([i + tp.rank]), tp, "x").tolist())
        shutdown_tensor_parallel()
    world = torch.distributed.is_initialized()
    initialize_tensor_parallel(2, device="cpu")
    return seen, world


def test_shutdown_leaves_a_world_that_was_there_before(ranks):
    assert ranks(2).run(start_between_two_uses_of_a_world) == [([[1], [3], [5]], True)] * 2


def test_shutdown_of_an_earlier_group_does_not_end_the_present_one(no_torchrun):
    first = initialize_tensor_parallel(device="cpu")
    second = initialize_tensor_parallel(device="cpu")
    shutdown_tensor_parallel(first)
    assert get_tensor_parallel("cpu") is second


def test_shutdown_can_be_called_twice(no_torchrun):
    tp = initialize_tensor_parallel(device="cpu")
    shutdown_tensor_parallel()
    shutdown_tensor_parallel()
    assert get_tensor_parallel("cpu") is not tp


@pytest.mark.parametrize("size", [0, 2, 8])
def test_a_size_that_is_not_the_number_of_processes_is_refused(no_torchrun, size):
    with pytest.raises(ValueError, match=f"tensor_parallel_size={size}") as error:
        initialize_tensor_parallel(size, device="cpu")
    assert str(error.value) == (
        f"tensor_parallel_size={size} but 1 process(es) run; start the script with "
        f"torchrun --nproc_per_node={size}, or ask for tensor_parallel_size=1"
    )


def ask_for_size(size):
    try:
        initialize_tensor_parallel(size, device="cpu")
    except ValueError as error:
        return str(error)
    return None


def test_every_rank_says_so_if_the_size_is_wrong(ranks):
    want = "tensor_parallel_size=4 but 2 process(es) run; start the script with torchrun --nproc_per_node=4"
    assert all(want in message for message in ranks(2).run(ask_for_size, 4))


# --- devices


def test_auto_takes_the_gpu_of_the_local_rank_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(pick_device("auto", rank)) for rank in range(3)] == ["cuda:0", "cuda:1", "cpu"]


def test_auto_never_puts_some_ranks_on_gpus_and_some_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(pick_device("auto", rank, 3)) for rank in range(3)] == ["cpu"] * 3
    assert [str(pick_device("auto", rank, 2)) for rank in range(2)] == ["cuda:0", "cuda:1"]


def test_cpu_is_the_cpu_even_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert str(pick_device("cpu", 1)) == "cpu"


@pytest.mark.parametrize(("gpus", "local_rank"), [(0, 0), (2, 2)])
def test_cuda_without_a_gpu_for_this_rank_is_refused(monkeypatch, gpus, local_rank):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError, match=rf"device=cuda but local rank {local_rank} finds {gpus} GPU\(s\)"):
        pick_device("cuda", local_rank)


@pytest.mark.parametrize("device", ["tpu", "cuda:0", ""])
def test_an_unknown_device_is_refused_with_the_known_ones(device):
    with pytest.raises(ValueError, match=f"device='{device}' is unknown; use auto, cpu or cuda"):
        pick_device(device)


# --- ranks that stop, stay away or die


@pytest.fixture(scope="module")
def three_ranks():
    """three_ranks() -> ranks of this file's own, since these tests leave them in no state to go on with."""
    pools = []

    def get():
        if not pools or pools[-1].broken:
            pools.append(RankPool(3))
        return pools[-1]

    yield get
    for pool in pools:
        pool.close()


def reduce_without_rank_1(stop, joined):
    """Rank 0 alone goes into an all-reduce, rank 1 is stopped or merely stays away: what rank 0 is told.

    joined: a file by which rank 1 says that it has met the others. Rank 0 has done so earlier, and who is stopped in the middle
    of the meeting finds afterwards that its time is over.
    """
    tp = initialize_tensor_parallel(3, device="cpu", timeout_s=10)  # less is too little to meet on a busy machine
    if tp.rank != 0:
        if tp.rank == 1:
            Path(joined).touch()
        return None
    while not Path(joined).exists():
        time.sleep(0.01)
    pid = tp.peers[1][1]
    try:
        if stop:
            os.kill(pid, signal.SIGSTOP)
        all_reduce(torch.ones(3), tp, "layers.0.o_proj")
    except RankFailure as error:
        return str(error).replace(str(pid), "PID")
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_stopped_rank_is_named(three_ranks, tmp_path):
    message = "rank 0: all_reduce 'layers.0.o_proj' [3] failed: rank 1 (pid PID) is stopped (SIGSTOP)"
    assert three_ranks().run(reduce_without_rank_1, True, str(tmp_path / "joined")) == [message, None, None]


def test_a_rank_that_stays_away_is_not_called_dead(three_ranks, tmp_path):
    message, *_ = three_ranks().run(reduce_without_rank_1, False, str(tmp_path / "joined"))
    assert "failed: no peer on this host is dead, so one is stuck or unreachable (" in message


def reduce_beside_a_dying_rank(folder, victim, started):
    """The victim kills itself while its peers wait in an all-reduce; they write down what they were told."""
    tp = initialize_tensor_parallel(3, device="cpu", timeout_s=300)
    all_reduce(torch.ones(1), tp, "warm-up")
    if tp.rank == victim:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        if started:
            start_all_reduce(torch.ones(4, 8), tp, "layers.7.down_proj")()
        else:
            all_reduce(torch.ones(4, 8), tp, "layers.7.down_proj")
    except RankFailure as error:
        Path(folder, str(tp.rank)).write_text(f"{tp.peers[victim][1]} {error}")


@pytest.mark.timeout(250)  # a death is noticed at once, not after the 300 s that a slow peer would get
@pytest.mark.parametrize("started", [False, True])
def test_the_survivors_of_a_killed_rank_are_told_which_one_it_was(three_ranks, tmp_path, started):
    pool, victim = three_ranks(), 2
    try:
        with pytest.raises(AssertionError, match="rank 2:\ndied without a word"):
            pool.run(reduce_beside_a_dying_rank, str(tmp_path), victim, started)
    finally:
        pool.close()
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}
    for path in tmp_path.iterdir():
        pid, _, message = path.read_text().partition(" ")
        assert (
            message == f"rank {path.name}: all_reduce 'layers.7.down_proj' [4, 8] failed: rank 2 (pid {pid}) has died"
        )
