"""Rows travel to experts and come home: as many as there are, or in fixed buffers."""

import random

import pytest
import torch

from common.layers.dispatch import add_at_home, set_out, set_out_fixed
from common.layers.expert_placement import ExpertPlacement
from tests.ranks import layout_of_the_pool

D = 3


def travel(tokens: list[int], experts: int, k: int, redundant: int, ep: int, seed: int, fixed: bool) -> dict:
    """Every rank sends rows of its own; expert e multiplies by e + 1, or where it is cut, each rank by its share of that."""
    state = layout_of_the_pool(expert_parallel_size=ep)
    tp, rng = state.tp, random.Random(seed)
    placement = ExpertPlacement(1, experts, state.ep, state.moe_tp, redundant)
    physical = [*range(experts), *rng.choices(range(experts), k=redundant)]
    rng.shuffle(physical)
    placement.place(torch.tensor([physical]))
    everybody = [[rng.sample(range(experts), k) for _ in range(n)] for n in tokens]
    mine = tokens[tp.rank]
    chosen = torch.tensor(everybody[tp.rank], dtype=torch.int64).view(mine, k)
    x = torch.arange(mine * D, dtype=torch.float32).view(mine, D) + 100 * tp.rank
    live = None
    if fixed:  # all ranks have as many rows, some of them padding
        most = max(tokens)
        live = torch.arange(most) < mine
        x = torch.cat((x, torch.full((most - mine, D), torch.nan)))
        chosen = torch.cat((chosen, torch.zeros(most - mine, k, dtype=torch.int64)))
    places = placement.locate(0, chosen, state.ep.rank)
    with tp.ledger.recording() as ledger:
        way = placement, tp, "moe"
        there = set_out_fixed(x, places, live, *way) if fixed else set_out(x, places, *way)
        rows, slots = there.received()
        factors = torch.tensor([0 if e is None else e + 1 for e in placement.held(0)] + [0]) / placement.moe_tp.size
        y = there.home((rows * factors[slots].unsqueeze(1)).where(slots.unsqueeze(1) >= 0, 0))
        said = [(entry.op, entry.label, entry.shape) for entry in ledger.entries]
    want = x[:mine].unsqueeze(1) * (chosen[:mine] + 1).unsqueeze(2)
    # what this rank must get: a row for each choice of each rank, where its places are
    for_me = 0
    for source, choices in enumerate(everybody):
        ids = torch.tensor(choices, dtype=torch.int64).view(-1, k)
        there_are = placement.local(placement.locate(0, ids, source // state.moe_tp.size))
        for_me += int((there_are >= 0).sum())
    return {
        "right": torch.allclose(y[:mine], want), "real": int((slots >= 0).sum()), "for me": for_me, "said": said,
        "nan": bool(rows.isnan().any()), "slots": placement.slots, "moe_tp": state.moe_tp.size,
    }  # fmt: skip


CASES = {  # ranks, ep, tokens of each rank, experts, k, redundant
    "two": (2, 2, [5, 2], 4, 2, 0),
    "one has no tokens": (2, 2, [4, 0], 5, 2, 1),
    "nobody has": (2, 2, [0, 0], 5, 2, 0),
    "columns cut": (2, 1, [3, 2], 3, 2, 1),
    "three": (3, 3, [1, 0, 6], 7, 1, 2),
    "four, columns cut": (4, 2, [3, 0, 1, 4], 5, 3, 2),
    "four": (4, 4, [0, 0, 2, 0], 4, 4, 0),
}


@pytest.mark.parametrize("fixed", [False, True], ids=["exact", "fixed"])
@pytest.mark.parametrize(("size", "name"), [(case[0], name) for name, case in CASES.items()], ids=str)
def test_every_choice_comes_home_from_its_expert(size, name, fixed, ranks):
    _, ep, tokens, experts, k, redundant = CASES[name]
    told = ranks(size).run(travel, tokens, experts, k, redundant, ep, 7, fixed)
    for rank, one in enumerate(told):
        assert one["right"]
        assert one["real"] == one["for me"]  # a row of padding reaches nobody
        assert not one["nan"]
        sent = (size, one["slots"], max(tokens), D) if fixed else (tokens[rank] * k * one["moe_tp"], D)
        back = sent if fixed else (one["real"], D)
        assert one["said"] == [
            ("all_to_all", "moe.counts", (size, one["slots"])),
            ("all_to_all", "moe.dispatch", sent),
            ("all_to_all", "moe.combine", back),
        ]


def test_at_home_they_are_added_in_the_order_of_the_experts():
    """1e8 + 1 is 1e8 in float32: what comes first can be seen."""
    y = torch.tensor([[[1.0], [1e8], [-1e8]]])
    ones = torch.ones(1, 3)
    assert add_at_home(y, ones, torch.tensor([[0, 1, 2]])).item() == 0  # (1 + 1e8) - 1e8
    assert add_at_home(y, ones, torch.tensor([[2, 0, 1]])).item() == 1  # (1e8 - 1e8) + 1
    assert add_at_home(y[:, :1], 3 * ones[:, :1], torch.tensor([[5]])).item() == 3
