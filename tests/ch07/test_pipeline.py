"""Stages under one will: nothing changes an answer, every message is the formula's, and nobody waits who need not."""

import asyncio
import itertools
import time
from collections import Counter
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from ch07_sglang_radix import Engine, dynamic_chunk_sizer
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tasks import num_words
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.distributed.spawn import FRAME
from common.sampling.params import SamplingParams
from common.tiny_qwen import TINY_QWEN_PATH
from tests.ch07.serving.running import LEAN, a_server
from tests.ch07.test_product import cases, see, serve
from tests.oracle import greedy, some_prompts
from tests.ranks import layout_of_the_pool

LAYOUTS = pytest.mark.parametrize(("size", "layout"), [(2, (1, 2)), (4, (2, 2)), (3, (1, 3))], ids=str)
TWO = pytest.mark.parametrize(("size", "layout"), [(2, (1, 2)), (4, (2, 2))], ids=str)


@cache
def staged(tp: int, pp: int, page_size: int, pool: int, folder: Path | None = None) -> TPRadixAttentionModelWrapper:
    """In a pool of tp x pp ranks, or alone."""
    parallel = layout_of_the_pool(tp, pp) if tp * pp > 1 else None
    return TPRadixAttentionModelWrapper(folder, "cpu", page_size, max_total_tokens=pool, parallel=parallel)


def serve_staged(tp, pp, case, more):
    return serve(case, partial(staged, tp, pp), **more)


@pytest.mark.parametrize(  # 100 draws: 14 on two ranks, whose messages are quickest
    ("size", "layout", "one_of"), [(2, (1, 2), 7), (4, (2, 2), 20), (3, (1, 3), 14)], ids=str
)
def test_nothing_changes_an_answer(size, layout, one_of, ranks):
    @seed(size)  # or each layout would draw the same ones
    @settings(
        max_examples=max(settings().max_examples // one_of, 3), deadline=None, derandomize=settings().max_examples <= 200,
        suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.reuse, Phase.generate),
    )  # fmt: skip
    @given(case=cases, more_lanes=st.sampled_from([0, 0, 1]), most=st.sampled_from([None, None, 1, 3]))
    def draw(case, more_lanes, most):
        more = {"num_lanes": layout[1] + more_lanes, "max_lane_size": most}
        for answers, _ in ranks(size).run(serve_staged, *layout, case, more):
            see(answers, case)

    draw()


def test_the_draws_reach_retraction(ranks):
    busy = [(0, i, 10, 0, None, None) for i in (0, 3, 6, 1, 4, 7, 2, 5, 8)]
    options = {"schedule_policy": "fcfs", "overlap": True}
    case = {"page_size": 1, "chunk": 64, "small_pool": True, "options": options, "requests": busy}
    (answers, retractions), _ = ranks(2).run(serve_staged, 1, 2, case, {})
    see(answers, case)
    assert retractions > 0


def answer_all(tp, pp, folder, prompts, options):
    scheduler = TPScheduler(staged(tp, pp, 4, 4096, folder), check=True, **options)
    for _ in range(2):
        for prompt in prompts:
            scheduler.add_request(input_ids=prompt, max_new_tokens=8)
    return [out.output_ids for out in scheduler.process_requests().values()]


@LAYOUTS
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama"])
def test_every_family_s_tokens_equal_transformers(name, size, layout, checkpoint, ranks):
    folder, prompts = checkpoint(name), some_prompts(1009, 6, shared=24, longest=16)
    expected = [greedy(folder, prompt, 8) for prompt in prompts] * 2
    for options in ({"chunked_prefill_size": 8, "gather_best": True}, {"enable_mixed_chunk": True, "overlap": True}):
        assert ranks(size).run(answer_all, *layout, folder, prompts, options) == [expected] * size


PROMPT = list(range(40, 75))
WISHES = [
    SamplingParams(max_new_tokens=12, repetition_penalty=1.5, presence_penalty=0.5),
    SamplingParams(max_new_tokens=12, temperature=0.9, top_p=0.8, seed=3),
    SamplingParams(max_new_tokens=12, frequency_penalty=1.0, min_new_tokens=5, logit_bias={7: 3.0}),
    SamplingParams(max_new_tokens=5, logprobs=True, top_logprobs=3, token_ids_logprob=[5, 6]),
    SamplingParams(max_new_tokens=2, prompt_logprobs=2, logprob_start=3),
    SamplingParams(max_new_tokens=1, prompt_logprobs=0),
    SamplingParams(max_new_tokens=12, grammar=("regex", "(yes|no|perhaps) and [a-c]{5}"), logprobs=True),
    SamplingParams(max_new_tokens=9, allowed_token_ids=[5, 6, 7], bad_words_ids=[[5, 6]]),
]


def wish(tp, pp, options):
    scheduler = TPScheduler(staged(tp, pp, 4, 4096), chunked_prefill_size=8, check=True, **options)
    for _ in range(2):
        for i, params in enumerate(WISHES):
            scheduler.add_request(input_ids=[*PROMPT[: 20 + i], i], sampling_params=params)
    results = scheduler.process_requests().values()
    return [(r.output_ids, r.text, [asdict(one) for one in r.logprobs + r.prompt_logprobs]) for r in results]


@cache
def wishes_of_one_rank(**options):
    return wish(1, 1, options)


@LAYOUTS
@pytest.mark.parametrize("options", [{}, {"overlap": True, "enable_mixed_chunk": True}], ids=str)
def test_penalties_grammars_and_log_probabilities_are_those_of_one_rank(size, layout, options, ranks):
    alone = wishes_of_one_rank(**options)
    assert sum(len(told) for *_, told in alone) > 100
    for answers in ranks(size).run(wish, *layout, options):
        assert [(ids, text) for ids, text, _ in answers] == [(ids, text) for ids, text, _ in alone]
        for (*_, told), (*_, expected) in zip(answers, alone, strict=True):
            for mine, right in zip(told, expected, strict=True):
                assert (mine["token"], mine["rank"]) == (right["token"], right["rank"])
                assert mine["logprob"] == pytest.approx(right["logprob"], abs=1e-4)


def listen(tp, pp, prompts):
    """What this rank has said and heard: {(op, purpose): [calls, bytes]}; on rank 0 also what the formula needs."""
    wrapper = staged(tp, pp, 4, 4096)
    scheduler = TPScheduler(wrapper, check=True)
    words, send_task = [], scheduler.control.send_task
    scheduler.control.send_task = lambda task: (words.append(num_words(task)), send_task(task))
    with wrapper.tp.ledger.recording() as ledger:
        for prompt in prompts:
            scheduler.add_request(input_ids=prompt, max_new_tokens=8)
        scheduler.process_requests()
    calls, sizes = Counter(), Counter()
    for e in ledger.entries:
        kind = (e.op, "" if e.op == "all_reduce" else e.label)
        calls[kind] += 1
        sizes[kind] += e.bytes
    heard = {kind: [n, sizes[kind]] for kind, n in calls.items()}
    return heard, words, scheduler.steps, scheduler.work, len(wrapper.model.stage), wrapper.config


@TWO
def test_every_rank_s_ledger_is_the_formula_op_by_op(size, layout, ranks):
    tp, pp = layout
    told = ranks(size).run(listen, tp, pp, [list(range(9, 9 + n)) for n in (300, 20, 3, 260)])
    _, words, steps, work, _, config = told[0]
    steps = sum(steps.values())
    assert max(words) > FRAME, "a task of two messages"
    parts, task_bytes = sum(1 + (n > FRAME - 1) for n in words), sum(8 * (FRAME + max(0, n - FRAME + 1)) for n in words)
    drawn = work["samplings"]
    for rank, (heard, *_, layers, _) in enumerate(told):
        stage, hidden = rank // tp, [steps, 4 * config.hidden_size * work["inputs"]]
        logits = [drawn, 4 * work["sampled"] * -(-config.vocab_size // tp)]
        expected = {("broadcast", "results"): heard["broadcast", "results"]}
        if tp > 1:
            n = 2 * layers + (stage == 0)
            expected["all_reduce", ""] = [n * steps, n * hidden[1]]
            if stage == 0:
                expected["broadcast", "tokens"] = [drawn, 8 * work["sampled"]]
        if stage < pp - 1:
            expected["send", "hidden"] = hidden
        if stage > 0:
            expected["receive", "hidden"] = hidden
        if stage == pp - 1:
            expected["send", "logits"] = logits
        if rank == 0:
            expected["receive", "logits"] = [tp * n for n in logits]
            news = (tp - 1) * drawn
            expected["send", "task"] = [(size - 1) * parts + news, (size - 1) * task_bytes + news * 8 * FRAME]
        else:
            news = drawn if stage == 0 else 0
            expected["receive", "task"] = [parts + news, task_bytes + news * 8 * FRAME]
        assert heard == expected, f"rank {rank}"
        assert heard["broadcast", "results"][0] == 2


def hold_back(gate, prompt, chunk):
    """The second stage does not begin the first chunk before the first stage has done the third: what came in which order."""
    wrapper, events = staged(1, 2, 1, 4096), []
    scheduler = TPScheduler(wrapper, chunked_prefill_size=chunk, check=True)
    execute = wrapper.execute_prefill_task

    def held(task):
        deadline = time.monotonic() + 200
        while wrapper.parallel.pp.rank == 1 and not gate.exists():
            assert time.monotonic() < deadline, "the first stage waits for the second one"
            time.sleep(0.01)
        out = execute(task)
        events.append(task.step)
        if wrapper.parallel.pp.rank == 0 and len(events) == 3:
            gate.touch()
        return out

    wrapper.execute_prefill_task = held
    try:
        scheduler.add_request(input_ids=prompt, max_new_tokens=4)
        results = scheduler.process_requests()
    finally:
        del wrapper.execute_prefill_task
    return events, results[0].output_ids


def test_chunks_of_one_prompt_are_in_several_stages_at_once(ranks, tmp_path):
    prompt = list(range(50, 90))
    for events, tokens in ranks(2).run(hold_back, tmp_path / "gate", prompt, 8):
        assert events == [0, 1, 2, 3, 4]
        assert tokens == greedy(TINY_QWEN_PATH, prompt, 4)


def chunks_of(dynamic):
    """The parts of one long prompt, where a key costs a hundredth of a token's other work; and its answer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_chunk_sizer, "measure", lambda *_: dynamic_chunk_sizer.PrefillTime(100, 1))
        scheduler = TPScheduler(
            staged(1, 2, 4, 4096), chunked_prefill_size=256, check=True, enable_dynamic_chunking=dynamic
        )
    scheduler.add_request(input_ids=[i * i % 1000 for i in range(1000)], max_new_tokens=4)
    parts = []
    scheduler.after_step.append(lambda: parts.append(scheduler.last_prefill))
    (answer,) = scheduler.process_requests().values()
    return [n for batch in {id(one): one for one in parts}.values() for _, n in batch], answer.output_ids


def test_dynamic_chunks_get_shorter_and_change_no_answer(ranks):
    """256 tokens, then in whole tiles as many behind these as take as long, and a quarter at least."""
    (alike, answer), (dynamic, same) = (ranks(2).run(chunks_of, flag)[0] for flag in (False, True))
    assert answer == same
    assert alike == [256, 256, 256, 232]
    assert dynamic == [256, 128, *[64] * 9, 40]


def measured_by_itself():
    scheduler = TPScheduler(staged(1, 2, 4, 4096), chunked_prefill_size=128, enable_dynamic_chunking=True, check=True)
    chunk = scheduler.admission.next_chunk(512) if scheduler.replica.rank == 0 else 64
    scheduler.add_request(input_ids=PROMPT * 20, max_new_tokens=4)
    (answer,) = scheduler.process_requests().values()
    return chunk, answer.output_ids


def test_what_a_chunk_costs_is_measured_with_all_stages_before_the_first_request(ranks):
    expected = greedy(TINY_QWEN_PATH, PROMPT * 20, 4)
    assert all(64 <= chunk <= 128 and ids == expected for chunk, ids in ranks(2).run(measured_by_itself))


def lanes_of(layout):
    """Which lanes' decode steps followed each other."""
    scheduler, seen = TPScheduler(staged(*layout, 4, 4096)), []
    begin = scheduler.control.begin
    scheduler.control.begin = lambda task: (seen.append(scheduler.lane), begin(task))
    for i in range(4):
        scheduler.add_request(input_ids=[5 + i, 6], sampling_params=SamplingParams(max_new_tokens=9, ignore_eos=True))
    scheduler.process_requests()
    return seen


def test_micro_batches_take_turns(ranks):
    lanes, _ = ranks(2).run(lanes_of, (1, 2))
    assert set(lanes) == {0, 1}
    assert all(a != b for a, b in itertools.pairwise(lanes))


def refuse(layout, options):
    try:
        TPScheduler(staged(*layout, 4, 4096), **options)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    ("layout", "options", "said"),
    [
        (
            (1, 2), {"pp_size": 3},
            "pp_size=3, but the wrapper's ranks are laid out as pp2; give the same to ParallelState.initialize, or leave it out",
        ),
        ((1, 2), {"pp_size": 2, "tp_size": 1}, None),
        ((1, 2), {"enable_layernorm_sp": False}, None),
        (
            (1, 2), {"enable_layernorm_sp": True},
            "enable_layernorm_sp=True, but the wrapper was made with False; give it the same, or leave it out",
        ),
        ((2, 1), {"num_lanes": 2}, "num_lanes=2 for one stage of 2 ranks; lanes need pp_size > 1"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_agree_are_refused_on_every_rank(ranks, layout, options, said):
    assert ranks(2).run(refuse, layout, options) == [said] * 2


PROMPTS = [[5, 6, 7], [8] * 40, [9, 10], list(range(60, 200))]


def test_an_engine_starts_its_stages_and_ends_them(tmp_path):
    answers = [greedy(TINY_QWEN_PATH, prompt, 6) for prompt in PROMPTS]
    with Engine(pp_size=2, device="cpu", check=True, chunked_prefill_size=32, pp_layer_partition="1,3") as engine:
        processes = engine.scheduler.replica.spawned.processes
        assert len(processes) == 1
        assert engine.scheduler.num_lanes == 2
        params = {"max_new_tokens": 6, "ignore_eos": True}
        engine.start_profile(tmp_path)
        results = engine.generate(input_ids=PROMPTS, sampling_params=params)
        engine.stop_profile()
        assert [r["output_ids"] for r in results] == answers
        chunks = list(engine.generate(input_ids=PROMPTS[0], sampling_params=params, stream=True))
        assert [chunk["output_ids"] for chunk in chunks] == [answers[0][:n] for n in range(1, 7)]
        stream = engine.generate(input_ids=PROMPTS, sampling_params=params | {"max_new_tokens": 50}, stream=True)
        next(stream)
        stream.close()  # with steps on their way
        result = asyncio.run(engine.async_generate(input_ids=PROMPTS[3], sampling_params=params))
        assert result["output_ids"] == answers[3]
        info = engine.get_server_info()
        assert (info["tp_size"], info["pp_size"], info["held_tokens"]) == (1, 2, 0)
    assert [process.poll() for process in processes] == [0]
    assert {file.name.partition("-TP-")[2] for file in tmp_path.iterdir()} == {
        f"0-PP-{stage}.trace.json" for stage in (0, 1)
    }


def test_a_server_of_two_stages_answers():
    with a_server("--pp-size", "2", "--page-size", "4", "--pp-async-batch-depth", "1", *LEAN) as server:
        for prompt in PROMPTS:
            body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 6, "ignore_eos": True}}
            assert server.generate(**body)["output_ids"] == greedy(TINY_QWEN_PATH, prompt, 6)
            assert server.stream(**body)[-1]["output_ids"] == greedy(TINY_QWEN_PATH, prompt, 6)
        info = server.at_rest()
        assert (info["tp_size"], info["pp_size"]) == (1, 2)
