"""Experts that move while requests run: what rank 0 decides, and that no token notices.

The first part has a scheduler and an executor of nothing but numbers; the second real ranks.
"""

from types import SimpleNamespace

import pytest
import torch

from ch07_sglang_radix.experts.rebalancer import READ, REBALANCE, Rebalancer

LAYERS, EXPERTS = 3, 4  # layer 1 is dense


class Numbers:
    """An executor of two ranks with three slots each, whose load a test says."""

    def __init__(self):
        shares = ((0, 3), (3, 6))
        start = torch.tensor([0, 1, 2, 3, 0, 1]).repeat(LAYERS, 1)
        self.placement = SimpleNamespace(shares=shares, physical_to_logical=start)
        self.counts = torch.zeros(LAYERS, 6, dtype=torch.int64)
        router = SimpleNamespace(groups=1)
        mixture = SimpleNamespace(num_experts=EXPERTS, sparse=(True, False, True), router=router)
        self.config = SimpleNamespace(mixture=mixture, architecture="Numbers")
        self.moves = []

    def expert_load(self):
        return self.counts.clone()

    def refuse_experts_of_codes(self, what):
        """They are numbers."""

    def move_experts(self, placement):
        self.moves.append(placement.clone())
        self.placement.physical_to_logical = placement.clone()
        self.counts.zero_()

    def compute(self, rows):
        """As the ranks would: rows [L][E] of each expert, shared out evenly among its copies."""
        for layer, of in enumerate(rows):
            held = self.placement.physical_to_logical[layer]
            for slot, expert in enumerate(held.tolist()):
                self.counts[layer, slot] += of[expert] // int((held == expert).sum())


class Steps:
    """A scheduler that only counts, alone."""

    def __init__(self, executor):
        self.wrapper, self.replica = executor, SimpleNamespace(rank=0, size=1)
        self.after_step, self.step_number, self.settled, self.said = [], 0, 0, []
        self.control = SimpleNamespace(notes={}, together=self.together)

    def together(self, note):
        self.said.append(note)
        self.control.notes[note]()

    def settle_all(self):
        self.settled += 1

    def step(self, rows):
        self.wrapper.compute(rows)
        self.step_number += 1
        for call in self.after_step:
            call()


HOT = [[96, 12, 84, 0], [0] * EXPERTS, [12, 12, 12, 12]]


def test_every_n_th_step_experts_move_to_where_all_have_alike_much_to_do():
    executor = Numbers()
    scheduler = Steps(executor)
    Rebalancer(scheduler, every=2)
    load = scheduler.expert_load
    scheduler.step(HOT)
    assert (load.readings, scheduler.said, executor.moves) == (0, [], [])
    scheduler.step(HOT)
    assert scheduler.said == [REBALANCE]
    assert scheduler.settled == 1
    assert load.of_expert.tolist() == [[192, 24, 168, 0], [24] * EXPERTS]
    assert load.of_rank.tolist() == [[2 * (48 + 6 + 84), 2 * (0 + 48 + 6)], [2 * (6 + 6 + 12), 2 * (12 + 6 + 6)]]
    assert load.balancedness == pytest.approx((96 / 138 + 1) / 2)
    (move,) = executor.moves
    # 96 and 84 get a copy each, every rank one of both; 0 and 2 stay in their slots on rank 0, 3 and 0 on rank 1
    assert move.tolist() == [[0, 1, 2, 3, 0, 2], [0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 0, 1]]
    assert load.moved == 1
    scheduler.step(HOT)
    scheduler.step(HOT)
    assert load.newest.tolist()[0] == [2 * (48 + 12 + 42), 2 * (0 + 48 + 42)]
    assert len(executor.moves) == 1, "it is as good as it gets"


def test_a_layer_stays_where_nothing_would_be_gained():
    executor = Numbers()
    scheduler = Steps(executor)
    Rebalancer(scheduler, every=1)
    scheduler.step([[12, 12, 12, 12], [0] * EXPERTS, [12, 12, 12, 12]])  # even already
    assert executor.moves == []
    assert scheduler.expert_load.rebalanced == 1
    assert scheduler.expert_load.moved == 0


def test_what_was_counted_before_a_move_is_not_counted_again():
    executor = Numbers()
    scheduler = Steps(executor)
    Rebalancer(scheduler, every=2, reads=True)
    for _ in range(6):
        scheduler.step(HOT)
    load = scheduler.expert_load
    assert scheduler.said == [READ, REBALANCE] * 3
    assert load.of_expert.tolist() == [[6 * 96, 6 * 12, 6 * 84, 0], [6 * 12] * EXPERTS]
    assert load.newest.sum() == 192 + 48
    assert load.readings == 6


def test_the_load_that_counts_is_that_since_the_last_rebalancing():
    """A layer that was hot at one end and is now at the other is judged by now."""
    executor = Numbers()
    scheduler = Steps(executor)
    Rebalancer(scheduler, every=1)
    scheduler.step([[240, 0, 0, 0], [0] * EXPERTS, [0, 0, 0, 0]])
    scheduler.step([[0, 0, 0, 120], [0] * EXPERTS, [0, 0, 0, 0]])
    held = executor.placement.physical_to_logical[0].tolist()
    assert 3 in held[:3]
    assert 3 in held[3:]


def test_a_dense_model_is_refused_in_one_line():
    executor = Numbers()
    executor.config.mixture = None
    with pytest.raises(ValueError, match="Numbers has none; leave them out") as error:
        Rebalancer(Steps(executor))
    assert "\n" not in str(error.value)
