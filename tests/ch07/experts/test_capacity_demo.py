"""Who finds room in an expert with a capacity: by the numbers, before anything is answered with it."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from ch07_sglang_radix.experts.demo_6_capacity import capacity_of, within_capacity


def test_the_first_tokens_find_room():
    experts = torch.tensor([[2, 0], [2, 1], [0, 2], [1, 2]])
    assert within_capacity(experts, 3, 2).tolist() == [[True, True], [True, True], [True, False], [True, False]]


def test_the_capacity_is_a_share_of_the_step_s_rows_rounded_up():
    assert [capacity_of(factor, 16, 2, 8) for factor in (0.5, 1.0, 1.25, 2.0)] == [2, 4, 5, 8]
    assert capacity_of(1.0, 1, 2, 8) == 1


@given(st.lists(st.permutations(range(5)), min_size=1, max_size=12), st.integers(1, 3), st.integers(1, 6))
def test_each_expert_computes_as_many_as_want_it_and_fit(chosen, top_k, capacity):
    experts = torch.tensor([one[:top_k] for one in chosen])
    kept = within_capacity(experts, 5, capacity)
    for expert in range(5):
        wanted = int((experts == expert).sum())
        assert int((kept & (experts == expert)).sum()) == min(wanted, capacity)
