"""What tests/common/test_parallel_state.py does not have: the messages of the other parallelisms, and groups inside the world."""

import pytest
import torch

from common.distributed.layout import Layout
from common.parallel_state import (
    ParallelState,
    TPGroup,
    all_gather_rows,
    all_reduce,
    all_reduce_together,
    all_to_all,
    get_tensor_parallel,
    receive_from,
    reduce_scatter,
    send_to,
    start_exchange,
)
from tests.ranks import layout_of_the_pool

SIZES = pytest.mark.parametrize("size", [2, 4])


def scatter():
    tp = get_tensor_parallel()
    x = torch.arange(4.0 * tp.size).view(2 * tp.size, 2) * (tp.rank + 1)
    with tp.ledger.recording() as ledger:
        mine = reduce_scatter(x, tp, "rows")
        again = all_gather_rows(mine, tp, "rows")
    return mine.tolist(), again.tolist(), ledger.summary()


@SIZES
def test_reduce_scatter_then_all_gather_is_an_all_reduce(ranks, size):
    total = (torch.arange(4.0 * size).view(2 * size, 2) * sum(range(1, size + 1))).tolist()
    for rank, (mine, again, summary) in enumerate(ranks(size).run(scatter)):
        assert mine == total[2 * rank : 2 * rank + 2]
        assert again == total
        assert summary == {
            "reduce_scatter": {"calls": 1, "bytes": 16 * size}, "all_gather": {"calls": 1, "bytes": 16},
        }  # fmt: skip


def odd_rows():
    tp = get_tensor_parallel()
    try:
        reduce_scatter(torch.ones(3, 1), tp, "rows")
    except ValueError as error:
        return str(error)


def test_rows_that_do_not_divide_are_refused(ranks):
    assert ranks(2).run(odd_rows) == ["reduce_scatter 'rows': 3 rows do not divide over 2 ranks; pad them"] * 2


def exchange(size):
    """Rank r has s rows for rank s, each saying (from, to)."""
    tp = get_tensor_parallel()
    send = list(range(size))
    x = torch.tensor([(tp.rank, to) for to in range(size) for _ in range(to)]).view(-1, 2)
    return all_to_all(x, tp, "rows", send, [tp.rank] * size).tolist()


@SIZES
def test_all_to_all_brings_each_rank_its_rows_and_one_without_takes_part(ranks, size):
    answers = ranks(size).run(exchange, size)
    assert answers == [[[source, rank] for source in range(size) for _ in range(rank)] for rank in range(size)]


def wrong_counts():
    try:
        all_to_all(torch.ones(3, 1), TPGroup(0, 2), "rows", [1, 1], [1, 1])
    except ValueError as error:
        return str(error)


def test_counts_that_do_not_fit_are_refused():
    assert wrong_counts() == "all_to_all 'rows': 3 rows, [1, 1] of them to send, for 2 ranks; give each its count"


def ring(n):
    """Everybody sends first: it must not wait until the other one receives."""
    tp = get_tensor_parallel()
    x = torch.full((n,), float(tp.rank))
    with tp.ledger.recording() as ledger:
        sent = [send_to(x + i, (tp.rank + 1) % tp.size, tp, "ring") for i in range(3)]
        got = [receive_from(torch.empty(n), (tp.rank - 1) % tp.size, tp, "ring")[-1].item() for _ in range(3)]
        for one in sent:
            one.wait()
    return got, ledger.summary()


@SIZES
@pytest.mark.parametrize("n", [1, 1 << 20])
def test_sending_does_not_wait_and_messages_arrive_in_order(ranks, size, n):
    for rank, (got, summary) in enumerate(ranks(size).run(ring, n)):
        source = (rank - 1) % size
        assert got == [source, source + 1, source + 2]
        assert summary == {op: {"calls": 3, "bytes": 12 * n} for op in ("send", "receive")}


def together():
    tp = get_tensor_parallel()
    xs = [torch.full((2, 3), float(tp.rank)), torch.full((4,), 1.0), torch.zeros(0)]
    with tp.ledger.recording() as ledger:
        return [x.tolist() for x in all_reduce_together(xs, tp, "both")], ledger.summary()["all_reduce"]


def test_several_tensors_go_in_one_message(ranks):
    for sums, told in ranks(2).run(together):
        assert sums == [[[1.0] * 3] * 2, [2.0] * 4, []]
        assert told == {"calls": 1, "bytes": 40}


def test_one_rank_alone_hands_back_what_it_was_given():
    x, alone = torch.ones(2, 2), TPGroup()
    assert reduce_scatter(x, alone, "x") is x
    assert all_gather_rows(x, alone, "x") is x
    assert all_to_all(x, alone, "x", [2], [2]) is x
    assert all_reduce_together([x], alone, "x")[0] is x
    assert not alone.ledger.entries


# --- groups inside the world


def who_is_with_me():
    state = layout_of_the_pool(None, 2)
    world, tp, pp = state.world, state.tp, state.pp
    total = [all_reduce(torch.tensor([2.0**world.rank]), group, "who").item() for group in (world, tp, pp)]
    alone = (state.dp, state.cp, state.attn_dp, state.ep)
    return state.place.pp, tp.rank, total, tp.ranks, tp.world_rank, {g.size for g in alone}, tp.ledger is world.ledger


@pytest.mark.parametrize("size", [4])
def test_each_group_has_its_own_sum_and_all_share_a_ledger(ranks, size):
    answers = ranks(size).run(who_is_with_me)
    for rank, (stage, tp_rank, total, members, world_rank, others, one_ledger) in enumerate(answers):
        assert (stage, tp_rank, world_rank) == (rank // 2, rank % 2, rank)
        assert total == [15, 3 << 2 * stage, 5 << tp_rank]
        assert members == (2 * stage, 2 * stage + 1)
        assert others == {1}
        assert one_ledger


def groups_that_are_the_same():
    state = layout_of_the_pool(2, attention_data_parallel_size=2)
    return state.tp is state.replica is state.attn_dp is state.world, state.attn_tp.size


def test_groups_of_the_same_ranks_are_one_group(ranks):
    assert ranks(2).run(groups_that_are_the_same) == [(True, 1)] * 2


def test_a_layout_played_by_hand_has_places_and_no_processes():
    state = ParallelState.of(TPGroup(1, 3))
    assert state.layout == Layout(3)
    assert state.place.tp == 1
    assert state.tp is state.replica
    assert (state.pp.size, state.pp.world_rank) == (1, 1)


def refused(**sizes):
    try:
        ParallelState.initialize(device="cpu", **sizes)
    except ValueError as error:
        return str(error)


def test_a_world_of_another_size_is_refused(ranks):
    (said, again) = ranks(2).run(refused_here)
    assert said == again
    assert said[0].startswith("tp_size=2 x pp_size=2 x dp_size=1 = 4 ranks, but 2 process(es) run")
    assert said[1] == "world_size=3 but 2 process(es) run; leave it out, or start as many"


def refused_here():
    return (
        refused(tensor_parallel_size=2, pipeline_parallel_size=2),
        refused(tensor_parallel_size=3, world_size=3),
    )


def round_the_ring(lengths):
    """Everybody's numbers come by, one rank's after another's; some have none."""
    tp = get_tensor_parallel()
    block, came = torch.full((lengths[tp.rank], 2), float(tp.rank)), []
    with tp.ledger.recording() as ledger:
        for step in range(1, tp.size):
            source = (tp.rank - step) % tp.size
            coming = torch.empty(lengths[source], 2)
            wait = start_exchange(block, (tp.rank + 1) % tp.size, coming, (tp.rank - 1) % tp.size, tp, "ring")
            block = wait()
            came.append((source, len(block), bool((block == source).all())))
        return came, ledger.summary()["exchange"]


@pytest.mark.parametrize("size", [2, 3])
def test_a_ring_brings_everybody_s_block_an_empty_one_too(ranks, size):
    lengths = [3, 0, 2][:size]
    for rank, (came, said) in enumerate(ranks(size).run(round_the_ring, lengths)):
        sources = [(rank - step) % size for step in range(1, size)]
        assert came == [(source, lengths[source], True) for source in sources]
        handed_on = [rank, *sources[:-1]]
        assert said == {"calls": size - 1, "bytes": 8 * sum(lengths[source] for source in handed_on)}
