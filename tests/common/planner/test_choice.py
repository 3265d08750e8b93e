"""The planner's choice: every legal layout once, times that obey their definition, winners that the numbers make."""

from dataclasses import replace

import pytest
import torch

from common.distributed.cost_model import Link
from common.distributed.layout import Layout
from common.distributed.machines import GPUS, Machine, Speed
from common.models.published_configs import model_shape
from common.planner.bounds import bound
from common.planner.choice import all_bounds, fewest, refuse_if_none_fits, room_of, why
from common.planner.holdings import stages
from common.planner.plan import Load, Way, members, ways
from common.planner.work import Step, messages, seconds_of_messages

H100, SEVEN = Machine.of_gpus("H100"), model_shape("Qwen2.5-7B")
LOAD = Load(context=8192, batch=64)
FREE = Link(0.0, 1e30)  # messages that cost nothing
PLENTY = 10**15


def best(machine=H100, gpus=8, load=LOAD, config=SEVEN):
    return all_bounds(config, gpus, load, machine, PLENTY)


def test_every_legal_layout_is_there_once():
    found = ways(8, SEVEN, LOAD, 8)
    assert len(set(found)) == len(found)
    assert all(way.layout.world == 8 for way in found)
    plain = [way.layout for way in found if way == Way(Layout(way.layout.tp, way.layout.pp, way.layout.dp))]
    assert {(one.tp, one.pp, one.dp) for one in plain} == {
        (8, 1, 1), (1, 8, 1), (1, 1, 8), (4, 2, 1), (4, 1, 2), (2, 4, 1), (1, 4, 2), (2, 1, 4), (1, 2, 4), (2, 2, 2),
    }  # fmt: skip
    for way in found:
        cut = [way.layout.attn_dp > 1, way.layout.cp > 1, way.sp, way.layout.pp > 1]
        assert sum(cut) <= 1, f"{way}: one cuts rows, or there are stages"
        assert way.layout.tp % (way.layout.attn_dp * way.layout.cp) == 0


def test_there_are_no_more_stages_than_layers_and_no_more_parts_than_pages():
    short = replace(LOAD, context=40)  # three pages
    assert max(way.layout.cp for way in ways(8, SEVEN, short, 8)) == 2
    assert max(way.layout.pp for way in ways(32, SEVEN, LOAD, 8)) == 16, "28 layers"


def test_the_ranks_of_a_stage_share_a_host_or_fill_several():
    assert {way.layout.tp for way in ways(12, SEVEN, LOAD, 8)} == {1, 2, 3, 4, 6}, "12 ranks do not fill hosts of 8"
    assert members(Layout(8, dp=2), "tp", 8) == (8, 1)
    assert members(Layout(16), "tp", 8) == (16, 2)
    assert members(Layout(8, 2), "pp", 8) == (2, 2)


@pytest.mark.parametrize(
    "way", [Way(Layout()), Way(Layout(4)), Way(Layout(2, 2, 2)), Way(Layout(4, cp=2)), Way(Layout(4), sp=True)]
)
def test_the_parts_are_the_whole(way):
    found = bound(SEVEN, way, LOAD, H100, PLENTY)
    assert sum(found.parts.values()) == pytest.approx(found.seconds)
    assert found.tokens_per_s == pytest.approx(64 / found.seconds)


def test_one_rank_alone_is_bound_by_its_memory():
    load = Load(context=1024, batch=1)
    found = bound(SEVEN, Way(Layout()), load, H100, PLENTY)
    read = 2 * (7_615_616_512 - 152_064 * 3584) + 1024 * 2 * 28 * 4 * 128 * 2
    assert found.seconds == pytest.approx(read / GPUS["H100"].bytes_per_s)


def test_stages_do_not_shorten_one_request():
    """Its token passes all of them, one after the other."""
    load = Load(context=1024, batch=1)
    one, four = (bound(SEVEN, Way(Layout(1, pp)), load, replace(H100, inside=FREE), PLENTY) for pp in (1, 4))
    assert four.seconds == pytest.approx(one.seconds)
    assert four.parts["waiting"] > 0.6 * four.seconds


@pytest.mark.parametrize(
    ("layout", "batch", "readers"),
    [
        (Layout(), 4, 1), (Layout(2), 1, 2), (Layout(1, 2), 1, 1), (Layout(1, 2), 2, 2), (Layout(1, 4), 2, 2),
        (Layout(2, 2), 1, 2), (Layout(1, 1, 2), 1, 1), (Layout(1, 1, 2), 2, 2), (Layout(2, 1, 4), 3, 6), (Layout(2, 2, 2), 4, 8),
    ],
)  # fmt: skip
def test_memory_is_shared_by_those_who_read_at_the_same_time(layout, batch, readers):
    """Stages of one request take turns, and a replica without a request reads nothing."""
    shared = Machine(
        "shared", PLENTY, True, tuple(Speed(n, 1 << 30, 1e12 / n) for n in range(1, 9)), {"float32": (Speed(1, 0, 1e30),)},
        FREE, FREE, 1 << 20,
    )  # fmt: skip
    alone = replace(shared, reading=(Speed(1, 1 << 30, 1e12),))
    load = replace(LOAD, batch=batch, dtype=torch.float32)
    by_many, by_one = (bound(SEVEN, Way(layout), load, machine, PLENTY).seconds for machine in (shared, alone))
    assert by_many / by_one == pytest.approx(readers)


def test_with_free_messages_to_cut_the_layers_wins_over_copies_of_them():
    """It reads each weight once for all requests."""
    assert best(replace(H100, inside=FREE))[0].way.layout.tp > 1
    dear = replace(H100, inside=replace(H100.inside, start_s=1e-3))
    assert best(dear)[0].way.layout.dp == 8


def test_over_a_slow_link_stages_beat_cut_layers_once_there_are_many_rows_to_sum():
    big, load = model_shape("Qwen2.5-72B"), Load(context=512, batch=1024)
    slow = Machine.of_gpus("H100", "ethernet")
    quick = {str(b.way): b.seconds for b in all_bounds(big, 4, load, slow, PLENTY)}
    assert quick["pp4"] < quick["tp4"]
    fast = {str(b.way): b.seconds for b in all_bounds(big, 4, load, H100, PLENTY)}
    assert fast["tp4"] < fast["pp4"]


def test_a_long_prompt_starts_sooner_where_its_tokens_are_shared_out_than_with_copies():
    by = {str(b.way): b for b in best(gpus=4)}
    assert by["tp4 (cp4)"].first_token_s < by["dp4"].first_token_s / 3
    chunked = {str(b.way): b for b in best(gpus=4, load=replace(LOAD, context=32_768, chunk=1024))}
    assert chunked["pp4"].first_token_s < chunked["dp4"].first_token_s / 3, (
        "chunks follow each other through the stages"
    )


def test_those_that_fit_come_first_and_the_quickest_of_them_is_first():
    room = room_of(H100, 8, 20 * 10**9, 0.9)
    found = all_bounds(SEVEN, 8, LOAD, H100, room)
    fits = [b.fits for b in found]
    assert fits == sorted(fits, reverse=True)
    assert len(set(fits)) == 2
    times = [b.seconds for b in found if b.fits]
    assert times[0] == pytest.approx(min(times), rel=1e-3)


def test_too_few_gpus_are_told_how_many_would_do():
    big = model_shape("Qwen2.5-72B")
    room = room_of(H100, 1, None, 0.9)
    with pytest.raises(ValueError, match=r"tp1 comes nearest with .* GB a rank; 5 would do \(pp5\)") as error:
        refuse_if_none_fits(all_bounds(big, 1, LOAD, H100, room), big, "it", 1, LOAD, H100, 0.9, None)
    assert "\n" not in str(error.value)
    number, way = fewest(big, 2, LOAD, H100, 0.9, None)
    assert number == 5 == way.layout.world
    assert not any(b.fits for b in all_bounds(big, 4, LOAD, H100, room))
    assert any(b.fits for b in all_bounds(big, 5, LOAD, H100, room))


def test_what_never_fits_says_so(monkeypatch):
    monkeypatch.setattr("common.planner.choice.MOST_GPUS", 12)
    big = model_shape("Llama-3.1-405B")
    found = all_bounds(big, 2, LOAD, H100, 10**9)
    with pytest.raises(ValueError, match="nor do 12 GPUs"):
        refuse_if_none_fits(found, big, "it", 2, LOAD, H100, 0.9, 10**9)


def test_the_reason_has_the_numbers_of_the_table():
    found = best(gpus=2)
    text = why(found, LOAD, 2)
    assert text.startswith(f"Take {found[0].way}: at best {1e3 * found[0].seconds:,.2f} ms a token")
    other = next(b for b in found if b.seconds > found[0].seconds * 1.001)
    assert f"The next, {other.way}, takes {1e3 * (other.seconds - found[0].seconds):,.2f} ms more" in text


@pytest.mark.parametrize("way", ways(16, SEVEN, LOAD, 8), ids=str)
def test_a_faster_machine_is_never_slower(way):
    slow = bound(SEVEN, way, LOAD, Machine.of_gpus("A100"), PLENTY)
    fast = bound(SEVEN, way, LOAD, Machine.of_gpus("H200"), PLENTY)
    assert fast.seconds < slow.seconds
    assert fast.first_token_s < slow.first_token_s


def test_messages_that_leave_the_host_cost_more():
    said = tuple(messages(SEVEN, Way(Layout(4)), stages(SEVEN, 1)[0], LOAD, Step(64, 8192, 64, True)))
    inside, outside = (seconds_of_messages(said, Layout(4), replace(H100, ranks_a_host=n)) for n in (4, 2))
    assert outside > inside


def test_a_float32_plan_on_a_gpu_is_refused_by_name():
    with pytest.raises(
        ValueError, match="dtype=float32: there is no number for it on H100, nvlink; use bfloat16, float16"
    ):
        bound(SEVEN, Way(Layout()), replace(LOAD, dtype=torch.float32), H100, PLENTY)
