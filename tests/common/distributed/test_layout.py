import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.distributed.layout import GROUPS, Layout, get_rank_mapping, layouts


@st.composite
def some_layout(draw):
    attn_dp, cp, attn_tp = (draw(st.integers(1, 3)) for _ in range(3))
    tp = attn_dp * cp * attn_tp
    ep = draw(st.sampled_from([n for n in range(1, tp + 1) if tp % n == 0]))
    return Layout.of(tp, draw(st.integers(1, 3)), draw(st.integers(1, 2)), attn_dp=attn_dp, cp=cp, ep=ep)


@given(some_layout())
def test_every_rank_is_in_one_group_of_each_kind_and_places_are_all_different(layout):
    for kind in GROUPS:
        groups = layout.groups(kind)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world))
        size = layout.pp * layout.tp if kind == "replica" else getattr(layout, kind)
        assert {len(group) for group in groups} == {size}
        assert all(group == sorted(group) for group in groups)
    assert len({layout.place(rank)[1:4] for rank in range(layout.world)}) == layout.world


@given(some_layout())
def test_a_rank_is_where_the_formula_says(layout):
    for rank in range(layout.world):
        place = layout.place(rank)
        assert rank == (place.dp * layout.pp + place.pp) * layout.tp + place.tp
        assert place.tp == (place.attn_dp * layout.cp + place.cp) * layout.attn_tp + place.attn_tp
        assert place.tp == place.ep * layout.moe_tp + place.moe_tp


def test_sglang_s_own_example():
    """initialize_model_parallel's docstring, SGLang 0.5.23: 8 ranks, tp 2, pp 4."""
    layout = Layout.of(2, 4)
    assert layout.groups("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.groups("pp") == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_attention_and_experts_are_cut_inside_the_tensor_parallel_ranks():
    layout = Layout.of(4, 2, attn_dp=2, ep=4)
    assert layout.world == 8
    assert layout.groups("attn_tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.groups("attn_dp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert layout.groups("ep") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert layout.groups("moe_tp") == [[rank] for rank in range(8)]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"tp": 2, "pp": 2, "world": 3},
            "tp_size=2 x pp_size=2 x dp_size=1 = 4 ranks, but 3 process(es) run; start with torchrun --nproc_per_node=4, or lay 3 "
            "out as tp_size=1 pp_size=3 dp_size=1",
        ),
        (
            {"pp": 2, "world": 3},
            "pp_size=2 x dp_size=1 = 2 ranks, but 3 process(es) run; start with torchrun --nproc_per_node=2, or lay 3 out as "
            "tp_size=1 pp_size=3 dp_size=1",
        ),
        (
            {"tp": 4, "dp": 2, "world": 6},
            "tp_size=4 x pp_size=1 x dp_size=2 = 8 ranks, but 6 process(es) run; start with torchrun --nproc_per_node=8, or lay 6 "
            "out as tp_size=3 pp_size=1 dp_size=2",
        ),
        (
            {"tp": 4, "attn_dp": 3},
            "attn_dp_size=3 does not divide tp_size=4, inside which it is cut; use a product of 1, 2, 4, or tp_size=6",
        ),
        (
            {"tp": 4, "attn_dp": 2, "cp": 4},
            "attn_dp_size=2 x cp_size=4 does not divide tp_size=4, inside which it is cut; use a product of 1, 2, 4, or tp_size=8",
        ),
        ({"tp": 0}, "tp_size=0 must be a whole number of at least 1"),
        ({"pp": True}, "pp_size=True must be a whole number of at least 1"),
        ({"cp": 1.0}, "cp_size=1.0 must be a whole number of at least 1"),
    ],
)
def test_what_does_not_multiply_is_refused_with_the_nearest_legal_sizes(asked, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Layout.of(**asked)


def test_what_is_left_of_the_world_is_tensor_parallel():
    assert Layout.of(pp=2, dp=3, world=12).tp == 2
    assert Layout.of().world == 1


def test_all_layouts_of_a_world():
    assert len(set(layouts(12))) == len(list(layouts(12))) == 18
    assert all(layout.world == 12 for layout in layouts(12))


def test_a_layout_says_what_it_is():
    assert str(Layout.of(2, 2)) == "tp2 x pp2"
    assert str(Layout.of(4, attn_dp=2)) == "tp4 (attn_dp2)"
    assert str(Layout()) == "tp1"
    row = Layout.of(2, 2).table()[3]
    assert (row["pp"], row["tp"], row["tp group"], row["pp group"]) == (1, 1, [2, 3], [1, 3])
    assert "cp group" not in row


# --- where they run


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 3), st.integers(1, 9))
def test_a_stage_never_straddles_two_hosts_unless_it_fills_them(tp, pp, dp, node_size):
    if tp > node_size and tp % node_size:
        with pytest.raises(ValueError, match=rf"^tp_size={tp} over hosts of {node_size} would share a host"):
            get_rank_mapping(tp, pp, dp, node_size)
        return
    mapped = get_rank_mapping(tp, pp, dp, node_size)
    assert [one.place.rank for one in mapped] == list(range(tp * pp * dp))
    assert len({one[1:] for one in mapped}) == len(mapped), "one rank a device"
    assert all(0 <= one.slot < node_size for one in mapped)
    for group in Layout.of(tp, pp, dp).groups("tp"):
        nodes = {mapped[rank].node for rank in group}
        assert len(nodes) == max(1, tp // node_size)


def test_stages_go_over_hosts_and_heads_stay_inside():
    mapped = get_rank_mapping(4, 2, 1, node_size=4)
    assert [(one.place.pp, one.node) for one in mapped] == [(0, 0)] * 4 + [(1, 1)] * 4


@pytest.mark.parametrize("node_size", [0, -1, True, 2.0])
def test_a_host_has_at_least_one_device(node_size):
    with pytest.raises(ValueError, match=f"^node_size={node_size!r} must be a whole number of at least 1$"):
        get_rank_mapping(1, 1, 1, node_size)
