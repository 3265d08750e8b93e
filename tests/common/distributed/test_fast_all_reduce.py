"""Which groups get one: those whose members add up, once for the same members, and never a group that does not."""

import pytest
import torch

from common.distributed import fast_all_reduce
from common.distributed.collectives import TPGroup
from common.distributed.fast_all_reduce import pick, quicken
from common.distributed.layout import GROUPS, Layout
from common.parallel_state import ParallelState


def quickened(layout: Layout, rank: int, monkeypatch, way: str = "shared memory") -> dict[str, object]:
    """{kind: who meets in the fast all-reduce of this rank's group of it, or None}, without processes."""
    monkeypatch.setattr(fast_all_reduce, "meet_in_shared_memory", lambda rank, members, group, timeout_s: list(members))
    monkeypatch.setattr(fast_all_reduce, "meet_in_symmetric_memory", lambda *given: "symmetric")
    world = TPGroup(rank, layout.world, torch.device("cpu"), peers=tuple((0, 100 + r) for r in range(layout.world)))
    made = {}
    for kind in GROUPS:
        groups = layout.groups(kind)
        if len(groups) > 1 and len(groups[0]) > 1:
            ranks = layout.group_of(kind, rank)
            same = next((other for other in made if layout.groups(other) == groups), None)
            made[kind] = made[same] if same else TPGroup(ranks.index(rank), len(ranks), ranks=tuple(ranks))
    made, world = quicken(made, world, layout, way, 1.0)
    state = ParallelState._with(made, layout, layout.place(rank), world)
    return {kind: getattr(state, kind).fast_all_reduce for kind in GROUPS}


def test_with_tensor_parallelism_alone_it_is_the_world(monkeypatch):
    fast = quickened(Layout(3), 2, monkeypatch)
    assert fast["tp"] == fast["attn_tp"] == fast["replica"] == [0, 1, 2]
    assert fast["dp"] is fast["pp"] is None


def test_in_a_layout_of_stages_and_replicas_each_tensor_parallel_group_has_its_own(monkeypatch):
    fast = quickened(Layout(tp=2, pp=2, dp=2), 5, monkeypatch)
    assert fast["tp"] == [4, 5]
    assert fast["pp"] is fast["dp"] is fast["replica"] is None


@pytest.mark.parametrize("way", ["shared memory", "symmetric memory"])
def test_ranks_that_are_cut_in_no_layer_have_none(monkeypatch, way):
    assert set(quickened(Layout(tp=1, pp=2), 0, monkeypatch, way).values()) == {None}


def test_attention_groups_inside_have_theirs(monkeypatch):
    fast = quickened(Layout(tp=4, attn_dp=2), 3, monkeypatch)
    assert (fast["tp"], fast["attn_tp"], fast["attn_dp"]) == ([0, 1, 2, 3], [2, 3], None)


@pytest.mark.parametrize(
    ("how", "disabled", "device", "way"),
    [
        ("auto", False, "cpu", "none"),
        ("shm", False, "cpu", "shared memory"),
        ("auto", False, "cuda", "symmetric memory"),
        ("auto", True, "cuda", "none"),
    ],
)
def test_the_way_follows_from_flags_and_device(how, disabled, device, way):
    assert pick(how, disabled, device) == way
