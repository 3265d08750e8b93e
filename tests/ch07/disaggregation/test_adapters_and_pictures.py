"""Prompts whose K and V depend on more than their tokens, between two halves: adapters that are asked for, pictures to look at."""

from contextlib import contextmanager

import pytest

from ch07_sglang_radix.adapters.control import Adapters
from ch07_sglang_radix.adapters.gate import PATIENCE
from ch07_sglang_radix.disaggregation.local_pair import Pair
from ch07_sglang_radix.images.intake import PictureIntake
from ch07_sglang_radix.images.sender import PictureSender
from ch07_sglang_radix.images.sources import Sources
from ch07_sglang_radix.lora import lora_refs
from common.models.lora_manager import LoRAOptions
from tests.adapters import greedy_with, save_adapter
from tests.common.vision.checkpoints import END, IMAGE, START, greedy_about, picture, save_seeing, some_tokens
from tests.oracle import greedy

NEW = 6
CHUNK = {"chunked_prefill_size": 8}


@contextmanager
def a_pair(folder, prefill, decode):
    both = Pair(prefill={"folder": str(folder)} | CHUNK | prefill, decode={"folder": str(folder)} | decode)
    try:
        yield both
        assert both.at_rest()
    finally:
        both.close()


@pytest.fixture(scope="module")
def base(checkpoint):
    return checkpoint("qwen2")


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {name: save_adapter(base, root / name, seed=i, strength=0.3, r=4) for i, name in enumerate("abc")}


def with_adapters(places, **folders):
    def attach(scheduler):
        for number in list(scheduler.wrapper.lora.loaded):  # by the pair before, whose model this is
            scheduler.wrapper.lora.unload(number)
        Adapters(scheduler, lora_refs(folders), None, "lru")

    return {"lora": LoRAOptions(places, 8), "attach": attach}


def test_adapters_are_the_same_on_both_sides_whatever_their_places(base, adapters):
    """Decode has one place, so that whose prompt has arrived waits for it; the names stand in another order there."""
    prompts = [list(range(5, 5 + n)) for n in (19, 30, 4)]
    asked = [("a", 0), ("b", 0), (None, 0), ("a", 1), ("c", 2), ("b", 1), ("a", 2)]
    prefill = with_adapters(2, **adapters)
    decode = with_adapters(1, **dict(reversed(adapters.items())))
    right = [
        greedy_with(base, adapters[name], prompts[i], NEW) if name else greedy(base, prompts[i], NEW)
        for name, i in asked
    ]
    assert len({tuple(one) for one in right}) == len(right), "or an adapter could be taken for another"
    with a_pair(base, prefill, decode) as both:
        for _ in range(2):  # the second time both trees have it, each adapter's by itself
            rooms = [both.ask(prompts[i], lora_path=name, max_new_tokens=NEW) for name, i in asked]
            assert [both.answer(one).output_ids for one in rooms] == right
        assert both.at_rest()


@pytest.mark.parametrize("passed_over", [0, PATIENCE])
def test_who_goes_back_leaves_its_adapter_s_place_to_those_who_hold_the_pages(base, adapters, passed_over):
    """Two prompts have arrived, hold pages, and wait for the one place; whoever has it finds no page any more."""
    first, *others = [[100 * i + t for t in range(5, 25)] for i in range(3)]
    prefill, decode = with_adapters(2, **adapters), with_adapters(1, **adapters) | {"pool": 96}
    with a_pair(base, prefill, decode) as both:
        asked = [both.ask(first, lora_path="a", max_new_tokens=76)]
        both.until(lambda: both.decode.scheduler.running)
        asked += [both.ask(prompt, lora_path="b", max_new_tokens=NEW) for prompt in others]
        both.until(lambda: all(both.decode.stage(room) == "arrived" for room, _ in asked[1:]))
        both.until(lambda: both.decode.scheduler.waiting)
        both.decode.scheduler.waiting[0].passed_over = passed_over
        assert both.answer(asked[0]).output_ids == greedy_with(base, adapters["a"], first, 76)
        for prompt, one in zip(others, asked[1:], strict=True):
            assert both.answer(one).output_ids == greedy_with(base, adapters["b"], prompt, NEW)
        assert both.decode.scheduler.retractions == 1


def test_who_goes_back_waits_for_those_who_hold_pages_and_for_nobody_who_comes_later(base, adapters):
    """One place for adapters, and prompts of another one keep coming: they would have it for ever."""
    first, *others = [[100 * i + t for t in range(5, 25)] for i in range(7)]
    prefill, decode = with_adapters(2, **adapters), with_adapters(1, **adapters) | {"pool": 96}
    with a_pair(base, prefill, decode) as both:
        ahead = [both.ask(first, lora_path="a", max_new_tokens=76)]
        both.until(lambda: both.decode.scheduler.running)
        ahead += [both.ask(prompt, lora_path="b", max_new_tokens=NEW) for prompt in others[:2]]
        both.until(lambda: both.decode.scheduler.waiting)
        later = [both.ask(prompt, lora_path="b", max_new_tokens=NEW) for prompt in others[2:]]
        both.until(lambda: not both.decode.scheduler.waiting)
        assert [both.decode.stage(room) for room, _ in later] == ["prealloc"] * 4, "none of them has gone first"
        assert both.answer(ahead[0]).output_ids == greedy_with(base, adapters["a"], first, 76)
        for prompt, one in zip(others, [*ahead[1:], *later], strict=True):
            assert both.answer(one).output_ids == greedy_with(base, adapters["b"], prompt, NEW)


def test_a_short_prompt_is_not_deflected_past_who_waits_for_an_adapter_s_place(base, adapters):
    """One place, and short prompts of the adapter that is in it keep coming."""
    prefill, decode = with_adapters(2, **adapters), with_adapters(1, **adapters) | {"deflect": 8}
    with a_pair(base, prefill, decode) as both:
        running = both.ask(range(5, 25), lora_path="b", max_new_tokens=30)
        both.until(lambda: both.decode.scheduler.running)
        waits = both.ask(range(105, 125), lora_path="a", max_new_tokens=NEW)
        both.until(lambda: both.decode.stage(waits[0]) == "arrived")
        short = [both.ask(range(205 + i, 209 + i), lora_path="b", max_new_tokens=30) for i in range(3)]
        assert both.answer(waits).output_ids == greedy_with(base, adapters["a"], list(range(105, 125)), NEW)
        assert not any(one[1]["decode"] in both.decode.results for one in short)
        for one in (running, *short):
            both.answer(one)


def test_other_files_behind_the_same_name_are_refused_before_anything_is_computed(base, adapters):
    prompt = list(range(40, 60))
    prefill, decode = (
        with_adapters(2, a=adapters["a"], b=adapters["b"]),
        with_adapters(1, a=adapters["c"], b=adapters["b"]),
    )
    with a_pair(base, prefill, decode) as both:
        other = both.ask(prompt, lora_path="a")
        reason = both.answer(other).finish_reason
        assert "or different files behind its lora_path" in reason["message"]
        assert "load the same files on both" in reason["message"]
        assert both.prefill.scheduler.work["inputs"] == 0
        assert both.ended(other, "prefill").output_ids == []
        same = both.ask(prompt, lora_path="b", max_new_tokens=NEW)
        assert both.answer(same).output_ids == greedy_with(base, adapters["b"], prompt, NEW)


def test_behind_pictures_positions_go_on_where_prefill_left_them(tmp_path):
    """The row of a prompt with pictures is another's afterwards, whose positions are not shifted."""
    folder = save_seeing("qwen2_5_vl", tmp_path)
    see = PictureIntake.of(folder, Sources())
    shown = [picture(84, 112, 1), picture(140, 56, 2)]
    about = [START, IMAGE, END]
    asked = [
        ([*some_tokens(3, 1), *about, *some_tokens(4, 2)], shown[:1]),
        (some_tokens(9, 3), []),
        ([*about, *some_tokens(2, 4), *about, *some_tokens(5, 5)], shown),
        (some_tokens(11, 6), []),
    ]
    right = [greedy_about(folder, *one, NEW) for one in asked]
    with a_pair(folder, {"attach": PictureSender}, {"attach": PictureSender}) as both:
        for together in (False, True):
            got = []
            for prompt, images in asked:
                ids, pictures = see(prompt, [see.opened(image) for image in images])
                got.append(both.ask(ids, pictures=pictures, max_new_tokens=NEW))
                if not together:
                    both.answer(got[-1])
            assert [both.answer(one).output_ids for one in got] == right
        assert both.decode.scheduler.wrapper.images.encoded == 0, "pictures are seen where the prompt is computed"
