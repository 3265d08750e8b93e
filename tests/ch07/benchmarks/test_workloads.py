"""The workloads share what they say they share, and the best possible is counted right."""

import contextlib
import random

import pytest

from ch07_sglang_radix.benchmarks.clients import Clients
from ch07_sglang_radix.benchmarks.workloads import WORKLOADS, Call, Source, best_cached, block_trace, distinct_pages
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper

VOCAB = 3000


def play(programs):
    """[(prompt, answer)] with answers made up, the programs' turns interleaved."""
    answers = Source(VOCAB, seed=1)
    served, going = [], [(program, next(program)) for program in programs]
    while going:
        program, calls = going.pop(0)
        replies = [answers.text(call.new_tokens) for call in calls]
        served += zip([call.ids for call in calls], replies, strict=True)
        with contextlib.suppress(StopIteration):
            going.append((program, program.send(replies)))
    return served


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_same_seed_gives_the_same_workload(name):
    one, two = (play(WORKLOADS[name](Source(VOCAB), 0.5)) for _ in range(2))
    assert one == two
    assert one != play(WORKLOADS[name](Source(VOCAB, seed=5), 0.5))
    assert all(0 <= token < VOCAB for prompt, _ in one for token in prompt)


@pytest.mark.parametrize("name", WORKLOADS)
def test_shares_as_much_as_its_name_says(name):
    served = play(WORKLOADS[name](Source(VOCAB), 1.0))
    share = best_cached(served) / sum(len(prompt) for prompt, _ in served)
    if name == "unrelated":
        assert share < 0.01, "a first token that is the same by chance"
        assert best_cached(served, page_size=16) == 0
    else:
        assert 0.7 < share < 1
    assert max(len(prompt) + len(answer) for prompt, answer in served) <= 2048, "the bundled model ends there"
    assert len(served) <= 128, "with more waiting lpm is fcfs"


def test_a_turn_begins_with_the_turn_before_and_its_answer():
    (program,) = WORKLOADS["multi-turn chat"](Source(VOCAB), 1 / 16)
    (first,) = next(program)
    answer = list(range(first.new_tokens))
    (second,) = program.send([answer])
    assert second.ids[: len(first.ids) + len(answer)] == first.ids + answer
    assert len(second.ids) > len(first.ids) + len(answer)


def test_thoughts_branch():
    (program,) = WORKLOADS["tree of thought"](Source(VOCAB), 0.5)
    calls, sizes = next(program), []
    with contextlib.suppress(StopIteration):
        while len(sizes) < 9:
            sizes.append(len(calls))
            answers = [[i] * call.new_tokens for i, call in enumerate(calls)]
            paths = [call.ids + answer for call, answer in zip(calls, answers, strict=True)]
            calls = program.send(answers)
            assert [call.ids for call in calls] == [path for path in paths for _ in range(3)]
    assert sizes == [3, 9, 27]


def test_scale_is_the_number_of_programs():
    for make in WORKLOADS.values():
        counts = [len(make(Source(VOCAB), scale)) for scale in (0.001, 1, 2)]
        assert counts == [1, counts[1], 2 * counts[1]]


def test_best_of_a_few_requests_by_hand():
    a, b, c = [1, 2, 3, 4, 5], [1, 2, 3, 9], [1, 2, 3, 4, 5]
    assert best_cached([(a, []), (b, []), (c, [])]) == 3 + 5
    assert best_cached([(a, []), (b, []), (c, [])], page_size=1) == 3 + 4, "the last token is computed"
    assert best_cached([(a, []), (b, []), (c, [])], page_size=2) == 2 + 4, "whole pages"
    # 1 2 3 4 of the second prompt come from the first and its answer; its last token was never fed in
    assert best_cached([([1, 2], [3, 4, 5]), ([1, 2, 3, 4, 5, 6], [7])]) == 5
    assert best_cached([([1, 2], [3, 4, 5]), ([1, 2, 3, 4, 5, 6], [7])], page_size=1) == 4
    # the last page of the first prompt is computed whatever it finds: the second need not pay for it
    assert best_cached([([1, 2], [9]), ([1, 2, 3], [9])], page_size=2) == 2
    assert distinct_pages([(a, [6]), (b, []), (c, [7])], page_size=2) == 3 + 1 + 1


def test_without_answers_the_best_is_one_minus_distinct_prefixes():
    rng = random.Random(0)
    prompts = [[rng.randrange(2) for _ in range(rng.randint(1, 12))] for _ in range(200)]
    distinct = {tuple(prompt[: i + 1]) for prompt in prompts for i in range(len(prompt))}
    assert best_cached([(prompt, []) for prompt in prompts]) == sum(map(len, prompts)) - len(distinct)


def test_equal_ids_of_a_trace_are_equal_prefixes():
    before = {}
    for line in block_trace(Source(VOCAB), 300):
        for previous, one in zip([None, *line["hash_ids"]], line["hash_ids"], strict=False):
            assert before.setdefault(one, previous) == previous


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory):
    return TPRadixAttentionModelWrapper(None, "cpu", 16, max_total_tokens=4096)


def pairs(outputs):
    return [(out.prompt_ids, out.output_ids) for out in outputs.values()]


@pytest.mark.parametrize("name", ["multi-turn chat", "tree of thought"])
def test_the_engine_finds_all_that_can_be_found(wrapper, name):
    source = Source(wrapper.config.vocab_size)
    clients = Clients(TPScheduler(wrapper, check=True), WORKLOADS[name](source, 0.25))
    outputs = clients.run()
    assert sum(out.cached_tokens for out in outputs.values()) == best_cached(pairs(outputs), page_size=16) > 0
    assert clients.first_token_s.keys() == outputs.keys()
    assert len(clients.step_s) == clients.scheduler.step_number
    assert all(out.completion_tokens > 0 for out in outputs.values())


def test_clients_give_each_answer_to_the_program_that_asked(wrapper):
    got = {}

    def program(number):
        prompts = [[number, 10 + i, 20] for i in range(3)]
        got[number] = yield [Call(prompt, 3 - i) for i, prompt in enumerate(prompts)]
        yield [Call([number], 1)]

    outputs = Clients(TPScheduler(wrapper), [program(i) for i in range(3)]).run()
    assert len(outputs) == 3 * 3 + 3
    said = {tuple(prompt): answer for prompt, answer in pairs(outputs)}
    for number, answers in got.items():
        assert answers == [said[number, 10 + i, 20] for i in range(3)]
