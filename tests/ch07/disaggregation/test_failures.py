"""Whatever breaks, and whenever: each request ends with its answer or with an error that says why, and on both sides every page
comes back. Conservation is checked after every step of both (check=True) and at the end over both pools."""

import socket
import time

import pytest

from ch07_sglang_radix.disaggregation.attach import what_it_is
from ch07_sglang_radix.disaggregation.bootstrap import refuse_another
from ch07_sglang_radix.disaggregation.messages import Metadata
from ch07_sglang_radix.handoff import Handoff
from ch07_sglang_radix.serving.watch import wait_until
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.tiny_qwen import TINY_QWEN_PATH
from tests.oracle import greedy

PROMPT = list(range(5, 35))
DETERMINISTIC = {"enable_deterministic_inference": True}


def right(prompt=PROMPT, n=6):
    return greedy(TINY_QWEN_PATH, prompt, n)


def error_of(output):
    assert output.finish_reason["type"] == "abort"
    return output.finish_reason.get("message")


def test_one_room_from_its_beginning_to_its_end(pair):
    both = pair(prefill={"chunked_prefill_size": 8})
    output = both.answer(both.ask(PROMPT))
    assert output.output_ids == right()
    assert both.at_rest()
    names = [type(message).__name__ for _, message in both.decode.manager.log]
    assert names == ["Reserve", "Write", "Write", "Write", "Write", "Metadata"], (
        "a Write for each chunk of 8 of 30 tokens"
    )


def test_pages_leave_before_the_prompt_is_computed_to_its_end(pair):
    both = pair(prefill={"chunked_prefill_size": 8})
    room, numbers = both.ask(PROMPT)
    both.until(lambda: both.sent(room) >= 2)
    assert both.prefill.stage(room) == "waiting"
    both.answer((room, numbers))
    assert both.at_rest()


def test_several_at_once_and_what_the_tree_has_does_not_travel(pair):
    both = pair()
    assert both.answer(both.ask(PROMPT)).output_ids == right()
    both.at_rest()
    moved = both.decode.manager.pages.bytes_moved
    asked = [both.ask([*PROMPT[:28], 40 + i]) for i in range(4)]
    for i, one in enumerate(asked):
        output = both.answer(one)
        assert output.output_ids == right([*PROMPT[:28], 40 + i])
        assert output.cached_tokens == 28
    page = moved // 8
    assert both.decode.manager.pages.bytes_moved - moved == 4 * page, "one page of each"
    assert both.at_rest()


@pytest.mark.parametrize("name", ["overlap", "disable_radix_cache", "enable_mixed_chunk", "gather_best"])
def test_what_a_scheduler_may_do_besides_changes_nothing(pair, name):
    both = pair(prefill={name: True, "chunked_prefill_size": 8}, decode={name: True})
    prompts = [PROMPT, PROMPT[:17], [*PROMPT, 40, 41], PROMPT]
    asked = [both.ask(prompt, max_new_tokens=9) for prompt in prompts]
    ruled = both.ask(PROMPT, grammar=("regex", "(yes|no), it is"), max_new_tokens=30)
    for prompt, one in zip(prompts, asked, strict=True):
        assert both.answer(one).output_ids == right(prompt, 9)
    assert both.answer(ruled).text in ("yes, it is", "no, it is")
    gone = both.ask(PROMPT[::-1], max_new_tokens=100)
    both.until(lambda: both.decode.scheduler.running)
    both.decode.scheduler.abort(gone[1]["decode"])
    assert both.at_rest()


def test_an_answer_of_one_token_ends_where_it_begins(pair):
    both = pair()
    assert both.answer(both.ask(PROMPT, max_new_tokens=1)).output_ids == right(n=1)
    assert both.at_rest()


def test_log_probabilities_of_the_first_token_and_of_the_prompt_come_along(pair):
    both = pair()
    output = both.answer(both.ask(PROMPT, logprobs=True, top_logprobs=2, prompt_logprobs=0, logprob_start=10))
    assert [one.token for one in output.logprobs] == right()
    assert len(output.logprobs[0].top) == 2
    assert [one.token for one in output.prompt_logprobs] == PROMPT[10:]
    assert both.at_rest()


def test_a_grammar_goes_on_behind_the_first_token(pair):
    both = pair()
    output = both.answer(both.ask(PROMPT, grammar=("regex", "(yes|no), it is"), max_new_tokens=30))
    assert output.text in ("yes, it is", "no, it is")
    assert both.at_rest()


# --- a side dies: its links break


def test_prefill_dies_before_anything_was_computed(pair):
    both = pair()
    asked = both.ask(PROMPT, halves=("decode",))
    both.until(lambda: both.decode.stage(asked[0]) == "transfer")
    both.prefill.half.close()
    assert "rank 0 of the prefill side is gone" in error_of(both.answer(asked))
    assert both.decode.at_rest()


def test_prefill_was_never_there(pair):
    both = pair()
    both.prefill.half.close()
    assert "does not answer" in error_of(both.answer(both.ask(PROMPT, halves=("decode",))))
    assert both.decode.at_rest()


def test_prefill_dies_while_pages_travel(pair):
    both = pair()
    both.gate.clear()
    asked = both.ask(PROMPT)
    both.in_transfer(asked)
    both.prefill.half.close()
    both.gate.set()
    assert "rank 0 of the prefill side is gone" in error_of(both.answer(asked))
    assert both.decode.at_rest()


def test_prefill_dies_after_the_transfer_and_nothing_is_lost(pair):
    both = pair()
    asked = both.ask(PROMPT)
    both.until(lambda: both.decode.scheduler.running)
    both.prefill.half.close()
    assert both.answer(asked).output_ids == right()
    assert both.decode.at_rest()


def test_decode_dies_before_the_prompt_is_computed(pair):
    both = pair()
    asked = both.ask(PROMPT, halves=("decode",))
    both.until(both.prefill.manager.rooms)
    both.decode.half.close()
    both.until(lambda: not both.prefill.manager.rooms())
    _, numbers = both.ask(PROMPT, halves=("prefill",), room=asked[0])
    both.until(lambda: numbers["prefill"] in both.prefill.results)
    assert "rank 0 of the decode side is gone" in error_of(both.prefill.results[numbers["prefill"]])
    assert both.prefill.at_rest()


def test_decode_dies_while_pages_travel(pair):
    both = pair(prefill={"chunked_prefill_size": 8})
    both.gate.clear()
    asked = both.ask(PROMPT)
    both.in_transfer(asked)
    assert both.prefill.side.held.of, "nobody has said that they have come"
    both.decode.half.close()
    both.gate.set()
    both.until(lambda: not both.prefill.side.passages)
    assert both.prefill.at_rest()


def test_decode_dies_while_the_prompt_is_computed(pair):
    both = pair(prefill={"chunked_prefill_size": 4})
    room, numbers = both.ask(PROMPT)
    both.until(lambda: both.sent(room) >= 2)
    both.decode.half.close()
    both.until(lambda: numbers["prefill"] in both.prefill.results)
    assert "rank 0 of the decode side is gone" in error_of(both.prefill.results[numbers["prefill"]])
    assert both.prefill.at_rest()


# --- somebody gives up


@pytest.mark.parametrize("half", ["prefill", "decode"])
@pytest.mark.parametrize("stage", ["bootstrap", "waiting", "inflight"])
def test_an_abort_on_either_side_at_any_moment_reaches_the_other(pair, half, stage):
    both = pair(prefill={"chunked_prefill_size": 8})
    both.gate.clear()
    only = (half,) if stage == "bootstrap" else ("prefill", "decode")
    asked = both.ask(PROMPT, halves=only)
    room, numbers = asked
    if stage == "bootstrap":
        both.until(lambda: both.prefill.stage(room) == "bootstrap" or both.decode.stage(room) == "transfer")
    elif stage == "waiting":
        both.until(lambda: both.sent(room))
    else:
        both.in_transfer(asked)
    ours = getattr(both, half)
    if stage == "inflight" and half == "prefill":
        assert ours.scheduler.abort(numbers[half]) == 0, "it has ended there; what travels is decode's by now"
        both.gate.set()
        assert both.answer(asked).output_ids == right()
    else:
        assert ours.scheduler.abort(numbers[half]) == 1
        ours.step()
        other = both.decode if half == "prefill" else both.prefill
        if stage == "waiting" and half == "decode":  # the other side hears of it before it is done
            assert wait_until(lambda: other.manager.rooms()[0].why, 100)
        both.gate.set()
        both.until(lambda: all(number in both.halves[name].results for name, number in numbers.items()))
        if stage == "waiting":
            assert f"aborted on the {half} side" in error_of(other.results[numbers[other.mode]])
    assert both.at_rest()


def test_an_abort_on_decode_before_it_has_reserved_reaches_prefill_too(pair):
    both = pair()
    asked = both.ask(PROMPT)
    assert both.decode.scheduler.abort(asked[1]["decode"]) == 1, "no step has been made yet"
    assert both.answer(asked).finish_reason["type"] == "abort"
    assert "aborted on the decode side" in error_of(both.ended(asked, "prefill"))
    assert both.at_rest()


def test_metadata_of_another_room_is_not_taken_for_this_one_s(pair):
    both = pair()
    both.gate.clear()
    asked = both.ask(PROMPT)
    both.in_transfer(asked)
    slot = both.decode.manager.rooms()[0].slot
    sender = both.prefill.manager
    sender._links[asked[0], 0].send(Metadata(slot, 5, 13, 0, 0))
    both.gate.set()
    assert error_of(both.answer(asked)) == f"slot {slot} is room {asked[0]}'s, and got the metadata of room 5"
    assert both.at_rest()


def test_a_room_that_is_asked_for_twice_is_refused_and_the_first_goes_on(pair):
    both = pair()
    both.gate.clear()
    asked = both.ask(PROMPT)
    both.in_transfer(asked)
    _, again = both.ask(PROMPT, room=asked[0])
    both.until(lambda: again["decode"] in both.decode.results)
    assert f"room {asked[0]} is in use" in error_of(both.decode.results[again["decode"]])
    both.gate.set()
    assert both.answer(asked).output_ids == right()
    assert both.at_rest()


def test_a_number_of_a_room_that_has_failed_is_not_used_again(pair):
    both = pair()
    asked = both.ask(PROMPT)
    room, numbers = asked
    both.until(lambda: both.decode.stage(room) == "transfer")
    both.prefill.scheduler.abort(numbers["prefill"])
    assert error_of(both.answer(asked))
    again = both.ask(PROMPT, room=room)
    assert error_of(both.answer(again))
    assert both.at_rest()


# --- pages run out on decode


def test_a_prompt_waits_until_decode_has_pages_for_it(pair):
    both = pair(decode={"pool": 64})
    asked = [both.ask([100 * i + t for t in range(5, 45)], max_new_tokens=20) for i in range(3)]
    both.until(lambda: len(both.decode.scheduler.running) == 1)
    assert sum(both.decode.stage(room) == "prealloc" for room, _ in asked) == 2
    assert sum(both.prefill.stage(room) == "bootstrap" for room, _ in asked) == 2, "and nothing is computed for them"
    for i, one in enumerate(asked):
        assert both.answer(one).output_ids == right([100 * i + t for t in range(5, 45)], 20)
    assert both.at_rest()


def test_who_is_retracted_on_decode_is_computed_there_and_ends_all_the_same(pair):
    both = pair(decode={"pool": 96, "reserved": 0})
    prompts = [[100 * i + t for t in range(5, 35)] for i in range(3)]
    asked = [both.ask(prompt, max_new_tokens=24) for prompt in prompts]
    for prompt, one in zip(prompts, asked, strict=True):
        assert both.answer(one).output_ids == right(prompt, 24)
    assert both.decode.scheduler.retractions > 0
    assert both.at_rest()


def test_the_last_one_goes_back_if_prompts_that_travel_hold_the_pages_it_needs(pair):
    """And nothing is reserved before it runs again: it came first."""
    both = pair(decode={"pool": 96})
    first, *travelling, later = [[100 * i + t for t in range(5, 25)] for i in range(4)]
    asked = [both.ask(first, max_new_tokens=76)]
    both.until(lambda: both.decode.scheduler.running)
    both.gate.clear()
    asked += [both.ask(prompt) for prompt in travelling]
    for one in asked[1:]:
        both.in_transfer(one)
    both.until(lambda: both.decode.scheduler.waiting)
    assert both.decode.scheduler.running == []
    asked.append(both.ask(later))
    both.until(lambda: both.prefill.stage(asked[3][0]) == "bootstrap")
    for _ in range(3):
        both.step()
    assert [both.decode.stage(room) for room, _ in asked] == [None, "transfer", "transfer", "prealloc"]
    both.gate.set()
    assert both.answer(asked[0]).output_ids == right(first, 76)
    for prompt, one in zip([*travelling, later], asked[1:], strict=True):
        assert both.answer(one).output_ids == right(prompt)
    assert both.decode.scheduler.retractions == 1
    assert both.at_rest()


def test_a_row_too_few_is_waited_for(pair):
    both = pair()
    prompts = [[100 * i + t for t in range(5, 25)] for i in range(7)]  # 4 rows
    asked = [both.ask(prompt, max_new_tokens=12) for prompt in prompts]
    for prompt, one in zip(prompts, asked, strict=True):
        assert both.answer(one).output_ids == right(prompt, 12)
    assert both.at_rest()


# --- time runs out


@pytest.mark.parametrize(
    ("halves", "said"),
    [(("prefill",), "no decode engine has reserved pages"), (("decode",), "not all pages of this prompt have come")],
)
def test_who_waits_for_a_side_that_was_never_asked_hears_so_in_time(pair, halves, said):
    both = pair(prefill={"timeout": 0.3}, decode={"timeout": 0.3})
    _, numbers = both.ask(PROMPT, halves=halves)
    began = time.monotonic()
    (name,) = halves
    both.until(lambda: numbers[name] in both.halves[name].results)
    assert said in error_of(both.halves[name].results[numbers[name]])
    assert time.monotonic() - began >= 0.3
    assert both.at_rest()


def test_pages_that_decode_never_says_it_has_come_back_and_are_not_sent_any_more(pair):
    """Prefill's request has its token by then. What waits for a slow wire would be read from pages that are another prompt's."""
    both = pair(prefill={"timeout": 0.3, "chunked_prefill_size": 8, "pool": 64})
    both.gate.clear()
    asked = both.ask(PROMPT)
    both.in_transfer(asked)
    both.until(lambda: both.prefill.side.failed)
    assert both.prefill.side.held.of == {}
    assert both.ended(asked, "prefill").output_ids == right(n=1)
    another = both.ask([200 + t for t in range(60)])
    both.until(lambda: both.prefill.stage(another[0]) == "inflight")
    both.gate.set()
    said = "0.3 s are over in which not all ranks of the decode engine have said that they have the pages"
    assert error_of(both.answer(asked)) == said
    both.answer(another)
    assert both.at_rest()


def test_who_waits_for_pages_of_decode_for_too_long_hears_so_on_both_sides(pair):
    both = pair(decode={"pool": 64, "timeout": 0.3})
    first = both.ask(PROMPT, max_new_tokens=30)
    both.until(lambda: both.decode.scheduler.running)
    second = both.ask([*range(200, 240)])
    both.prefill.step()
    both.decode.step()
    assert both.decode.stage(second[0]) == "prealloc"
    time.sleep(0.4)
    assert "0.3 s are over in which no pages were free" in error_of(both.answer(second))
    assert "0.3 s are over in which no pages were free" in error_of(both.ended(second, "prefill"))
    assert both.answer(first).output_ids == right(n=30)
    assert both.at_rest()


def test_a_prefill_engine_that_does_not_say_where_it_is_holds_up_nobody_else_s_requests(pair):
    both = pair()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        handoff = Handoff("", "127.0.0.1", silent.getsockname()[1], 1)
        number = both.decode.enqueue(handoff, PROMPT)
        both.decode.step()
        assert both.answer(both.ask(PROMPT)).output_ids == right()
        assert both.decode.stage(1) == "prealloc", "it has not been given up before"
        both.decode.scheduler.abort(number)
    both.until(lambda: number in both.decode.results)
    assert both.at_rest()


# --- who does not fit


@pytest.mark.parametrize(
    ("decode", "said"), [({"page_size": 8}, "page_size is 8 here and 4 at the prefill engine at 127.0.0.1:")]
)
def test_a_half_that_is_something_else_is_refused_with_both_numbers(pair, decode, said):
    both = pair(decode=decode)
    assert said in error_of(both.answer(both.ask(PROMPT, halves=("decode",))))
    assert both.decode.at_rest()


@pytest.mark.parametrize("theirs", [[7, *PROMPT[1:]], [*PROMPT, *range(100, 120)], PROMPT[:17]])
def test_a_room_with_another_prompt_on_each_side_fails_before_anything_is_computed(pair, theirs):
    """Of the same length, longer and shorter on the prefill side; the link that they share with others goes on."""
    both = pair()
    room, numbers = both.ask(theirs, halves=("prefill",))
    asked = room, numbers | both.ask(PROMPT, halves=("decode",), room=room)[1]
    said = f"room {room} has different prompts on its two sides"
    assert said in error_of(both.answer(asked))
    assert said in error_of(both.ended(asked, "prefill"))
    assert both.prefill.scheduler.work["inputs"] == both.decode.scheduler.work["inputs"] == 0
    assert both.at_rest()
    links = both.decode.manager._to.copy()
    assert both.answer(both.ask(PROMPT)).output_ids == right()
    assert both.decode.manager._to == links, "it was not lost"
    assert both.at_rest()


def test_a_deterministic_half_is_refused_by_one_that_adds_up_otherwise():
    def one(**options):
        wrapper = TPRadixAttentionModelWrapper(None, "cpu", 4, max_total_tokens=16, skip_tokenizer_init=True, **options)
        return what_it_is(wrapper) | {"backend": "tcp"}

    off, on, half = one(), one(**DETERMINISTIC), one(dtype="bfloat16", kv_cache_dtype="float32", **DETERMINISTIC)
    refuse_another(on, on, "there")
    refuse_another(off, off, "there")
    what = r"enable_deterministic_inference is on, tp_size=1, cpu, torch.float32 here and"
    with pytest.raises(ValueError, match=f"{what} off at the prefill engine at there; start both with the same"):
        refuse_another(on, off, "there")
    with pytest.raises(ValueError, match=f"{what} on, tp_size=1, cpu, torch.bfloat16 at"):
        refuse_another(on, half, "there")


def test_flushing_the_cache_waits_for_pages_that_travel(pair):
    both = pair()
    both.gate.clear()
    asked = both.ask(PROMPT)
    both.in_transfer(asked)
    assert both.prefill.scheduler.busy
    both.gate.set()
    assert both.answer(asked).output_ids == right()
    assert both.at_rest()
    assert not both.prefill.scheduler.busy
