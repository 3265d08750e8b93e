"""Which rank holds which expert, and which copy a row is sent to."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.layers.expert_placement import ExpertPlacement, shares
from common.parallel_state import TPGroup

sizes = st.integers(1, 9).flatmap(lambda e: st.tuples(st.just(e), st.integers(1, min(e, 4)), st.integers(0, 4)))


def of_ranks(experts: int, ep: int, redundant: int = 0, layers: int = 2, **more) -> list[ExpertPlacement]:
    return [ExpertPlacement(layers, experts, TPGroup(rank, ep), redundant=redundant, **more) for rank in range(ep)]


@given(sizes)
def test_every_physical_expert_lies_in_one_slot_and_shares_differ_by_one(size):
    experts, ep, redundant = size
    ranks = of_ranks(experts, ep, redundant)
    held = [expert for placement in ranks for expert in placement.held(0) if expert is not None]
    assert held == [p % experts for p in range(experts + redundant)]
    counts = [stop - first for first, stop in shares(experts + redundant, ep)]
    assert max(counts) - min(counts) <= 1
    assert {placement.slots for placement in ranks} == {max(counts)}


@given(sizes, st.randoms(use_true_random=False), st.sampled_from(["static", "dynamic"]))
def test_all_ranks_agree_which_copy_computes_a_row_and_only_that_one_does(size, rng, algorithm):
    """Where every rank has all rows, a choice is computed by one rank alone; after an arbitrary new placement as before."""
    experts, ep, redundant = size
    ranks = of_ranks(experts, ep, redundant, algorithm=algorithm)
    new = torch.tensor(
        [rng.sample([*range(experts), *rng.choices(range(experts), k=redundant)], experts + redundant)] * 2
    )
    chosen = torch.tensor([[rng.randrange(experts) for _ in range(2)] for _ in range(7)])
    for again in (False, True):
        found = torch.zeros_like(chosen)
        for placement in ranks:
            if again:
                placement.place(new)
            held = placement.held(1)
            local = placement.local(placement.locate(1, chosen))
            found += local >= 0
            for slot, logical in zip(local.flatten().tolist(), chosen.flatten().tolist(), strict=True):
                assert slot < 0 or held[slot] == logical
        assert torch.equal(found, torch.ones_like(chosen))


def test_a_source_takes_the_copy_it_holds_and_the_others_are_dealt_out():
    """Expert 0 on ranks 0 and 1 of 4: ranks 2 and 3 have none, and take one each."""
    ranks = of_ranks(6, 4, 2, layers=1)
    new = torch.tensor([[0, 1, 0, 2, 3, 4, 5, 5]])
    for placement in ranks:
        placement.place(new)
    assert ranks[0].slots == 2
    goes = [int(ranks[0].locate(0, torch.tensor([[0]]), source)) // 2 for source in range(4)]
    assert goes[:2] == [0, 1]
    assert sorted(goes[2:]) == [0, 1]


def test_a_row_of_padding_which_chose_nobody_is_computed_by_nobody():
    for placement in of_ranks(5, 2, 1):
        assert placement.here(0, torch.tensor([[-1, -1], [4, 0]]))[0].tolist() == [-1, -1]


def test_copies_take_turns_if_the_choice_is_dynamic():
    placement = of_ranks(2, 2, 1, layers=1, algorithm="dynamic")[0]  # 0 | 1 0
    places = placement.locate(0, torch.zeros(4, 1, dtype=torch.int64)).flatten().tolist()
    assert places == [0, 3, 0, 3]


def test_the_load_counts_real_rows_of_a_layer_in_the_slot_that_computes_them():
    placement = ExpertPlacement(2, 5, TPGroup(1, 2))  # holds 2, 3, 4
    chosen, live = torch.tensor([[0, 2], [2, 1], [4, 0]]), torch.tensor([True, True, False])
    local = placement.local(placement.locate(1, chosen))
    placement.note(1, local, live)
    placement.note(1, local)
    assert placement.load.tolist() == [[0, 0, 0], [4, 0, 1]]


def test_tables_stay_where_they_are():
    """A captured CUDA graph reads these addresses."""
    placement = ExpertPlacement(1, 4, TPGroup(0, 2), redundant=2)
    tables = ("copies", "count", "nearest", "physical_to_logical", "load")
    before = [getattr(placement, name).data_ptr() for name in tables]
    placement.place(torch.tensor([[3, 2, 1, 0, 0, 0]]))
    assert [getattr(placement, name).data_ptr() for name in tables] == before
    assert placement.held(0) == [3, 2, 1]
    assert placement.count.tolist() == [[3, 1, 1, 1]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExpertPlacement(1, 3, TPGroup(0, 4)), "ep_size=4 ranks for 3 experts: some would have none; use ep_size=3"),
        (lambda: ExpertPlacement(1, 3, algorithm="fake"), "ep_dispatch_algorithm='fake' is unknown; use static or dynamic"),
        (lambda: ExpertPlacement(1, 3).place(torch.tensor([[0, 1]])), r"a placement \[1, 2\] is not .* = \[1, 3\]"),
        (lambda: ExpertPlacement(1, 3).place(torch.tensor([[0, 1, 1]])), "layer 0: expert 2 of 3 lies nowhere"),
        (lambda: ExpertPlacement(1, 2, redundant=1).place(torch.tensor([[0, 1, 5]])), "expert 5 of 2 is none"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()
