"""What rank 0 decides: who runs, on which pages, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest

from ch07_sglang_radix import invariants
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.parallel_state import ParallelState, get_tensor_parallel
from common.sampling.params import SamplingParams
from common.tiny_qwen import TINY_QWEN_PATH
from tests.oracle import greedy, some_prompts


def make(folder, *, page_size=4, pool=None, rows=256, **options):
    wrapper = TPRadixAttentionModelWrapper(
        str(folder), "cpu", page_size, max_total_tokens=pool, max_running_requests=rows
    )
    return TPScheduler(wrapper, check=True, **options)


def params(n, **more):
    return SamplingParams(max_new_tokens=n, ignore_eos=True, **more)


@pytest.fixture
def scheduler(checkpoint):
    return make(checkpoint("qwen2"))


def test_requests_join_and_leave_at_any_step(scheduler, checkpoint):
    """Six requests, one every second step, of different lengths: each text is what it says alone."""
    prompts = some_prompts(1009, 6, shared=16, longest=12)
    lengths = [9, 2, 12, 1, 7, 4]
    running = []

    def arrive(step):
        running.append(len(scheduler.running))
        due = step // 2
        while scheduler.num_requests <= min(due, 5):
            i = scheduler.num_requests
            scheduler.add_request(input_ids=prompts[i], sampling_params=params(lengths[i]))
        return scheduler.num_requests < 6

    results = scheduler.process_requests(arrivals=arrive)
    for i, prompt in enumerate(prompts):
        assert results[i].output_ids == greedy(checkpoint("qwen2"), prompt, lengths[i])
    assert max(running) > 1


def test_several_prompts_make_one_ragged_step(scheduler):
    for prompt in ([1] * 5, [2] * 9, [3]):
        scheduler.add_request(input_ids=prompt, max_new_tokens=3)
    scheduler.process_requests()
    assert scheduler.steps == {"prefill": 1, "decode": 2}
    assert scheduler.work == {"tokens": 15 + 2 * 3, "inputs": 15 + 2 * 3, "samplings": 3, "sampled": 9}


def test_token_0_is_a_token(scheduler):
    scheduler.add_request(input_ids=[1, 2], sampling_params=params(3, allowed_token_ids=[0]))
    (out,) = scheduler.process_requests().values()
    assert out.output_ids == [0, 0, 0]
    assert (out.prompt_tokens, out.completion_tokens, scheduler.num_finished) == (2, 3, 1)


def test_a_prompt_waits_a_step_for_the_prefix_that_another_is_computing(scheduler):
    shared = list(range(40))
    for tail in ([1], [2], [3]):
        scheduler.add_request(input_ids=shared + tail, max_new_tokens=1)
    results = scheduler.process_requests()
    assert [results[i].cached_tokens for i in range(3)] == [0, 40, 40]
    assert scheduler.steps["prefill"] == 2


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_at_least_one_token_of_a_cached_prompt_is_computed(checkpoint, page_size):
    """A fully cached prompt would leave nothing to take logits from."""
    scheduler = make(checkpoint("qwen2"), page_size=page_size)
    prompt = list(range(32))
    for _ in range(2):
        scheduler.add_request(input_ids=prompt, max_new_tokens=2)
        (out,) = scheduler.process_requests().values()
    assert out.cached_tokens == (31 // page_size) * page_size
    assert out.output_ids == greedy(checkpoint("qwen2"), prompt, 2)


def test_the_answer_is_cached_too(scheduler):
    """A follow-up turn finds prompt and answer, all but the last token, which was never fed in."""
    scheduler.add_request(input_ids=list(range(10)), sampling_params=params(11))
    (first,) = scheduler.process_requests().values()
    scheduler.add_request(input_ids=first.prompt_ids + first.output_ids + [5], sampling_params=params(1))
    (second,) = scheduler.process_requests().values()
    assert second.cached_tokens == 20


def test_chunks_hold_the_budget_and_end_at_pages(checkpoint):
    scheduler = make(checkpoint("qwen2"), chunked_prefill_size=8)
    seen = []
    execute = scheduler.control.execute
    scheduler.control.execute = lambda task: (seen.append(task), execute(task))[1]
    scheduler.add_request(input_ids=list(range(21)), max_new_tokens=1)
    scheduler.add_request(input_ids=list(range(100, 105)), max_new_tokens=1)
    results = scheduler.process_requests()
    parts = [[(s.cached, s.new, s.emits) for s in task.sequences] for task in seen]
    assert parts == [[(0, 8, 0)], [(8, 8, 0)], [(16, 5, 1)], [(0, 5, 1)]]
    assert results[0].output_ids == greedy(checkpoint("qwen2"), list(range(21)), 1)


def test_retracted_requests_lose_nothing(checkpoint):
    """Four answers of 40 tokens in a pool for one and a half: outputs are kept, the texts are the same."""
    scheduler = make(checkpoint("qwen2"), pool=72)
    scheduler.new_token_ratio = 0.1  # admit too many
    prompts = some_prompts(1009, 6, shared=4, longest=6)[:4]
    ids = [scheduler.add_request(input_ids=p, sampling_params=params(40)) for p in prompts]
    results = scheduler.process_requests()
    assert scheduler.retractions > 0
    for i, prompt in zip(ids, prompts, strict=True):
        assert results[i].output_ids == greedy(checkpoint("qwen2"), prompt, 40)
    assert results[ids[0]].cached_tokens == 0, "tokens it computed itself are no hit"


def test_a_pool_that_holds_exactly_one_request_serves_many(checkpoint):
    scheduler = make(checkpoint("qwen2"), pool=24)
    for i in range(3):
        scheduler.add_request(input_ids=[i] * 12, sampling_params=params(12))
    results = scheduler.process_requests()
    assert [len(r.output_ids) for r in results.values()] == [12, 12, 12]


def test_more_requests_than_rows(checkpoint):
    scheduler = make(checkpoint("qwen2"), rows=2)
    for i in range(5):
        scheduler.add_request(input_ids=[i, i], max_new_tokens=3)
    assert len(scheduler.process_requests()) == 5


def test_stop_token_ends_an_answer_and_is_kept_in_the_ids(scheduler, checkpoint):
    prompt = list(range(12))
    expected = greedy(checkpoint("qwen2"), prompt, 6)
    scheduler.add_request(input_ids=prompt, sampling_params=params(6, stop_token_ids=(expected[2],)))
    (out,) = scheduler.process_requests().values()
    assert out.output_ids == expected[: expected.index(expected[2]) + 1]
    assert out.finish_reason == {"type": "stop", "matched": expected[2]}


def test_sampling_does_not_depend_on_company_chunks_or_retraction(checkpoint):
    prompts = some_prompts(1009, 6, shared=4, longest=6)[:4]
    hot = params(40, temperature=1.0, top_p=0.9, seed=7)
    scheduler = make(checkpoint("qwen2"))
    alone = []
    for prompt in prompts:
        scheduler.add_request(input_ids=prompt, sampling_params=hot)
        alone += [out.output_ids for out in scheduler.process_requests().values()]
    crowd = make(checkpoint("qwen2"), pool=72, chunked_prefill_size=4)
    crowd.new_token_ratio = 0.1
    for prompt in prompts:
        crowd.add_request(input_ids=prompt, sampling_params=hot)
    assert [out.output_ids for out in crowd.process_requests().values()] == alone
    assert crowd.retractions > 0


def test_requests_without_a_seed_differ_and_a_run_repeats(checkpoint):
    def texts():
        scheduler = make(checkpoint("qwen2"), seed=3)
        for _ in range(3):
            scheduler.add_request(input_ids=[1, 2, 3], sampling_params=params(8, temperature=1.0))
        return [out.output_ids for out in scheduler.process_requests().values()]

    first = texts()
    assert len({tuple(t) for t in first}) == 3
    assert texts() == first


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"input_ids": []}, "prompt is empty"),
        ({"input_ids": [5, 1009]}, r"token id 1009 is outside the vocabulary 0\.\.1008"),
        ({"input_ids": [-1]}, "token id -1"),
        ({"input_ids": [1] * 500, "max_new_tokens": 20}, "= 520 tokens, but the model ends at 512; .* at most 12"),
        ({"text": "a", "input_ids": [1]}, "either text or input_ids"),
        ({"text": "a"}, "no tokenizer"),
    ],
)
def test_refused_requests_say_why_and_leave_no_trace(scheduler, request_, message):
    with pytest.raises(ValueError, match=message):
        scheduler.add_request(**request_)
    scheduler.add_request(input_ids=[1, 2], max_new_tokens=2)
    assert list(scheduler.process_requests()) == [0]


def test_a_request_larger_than_the_pool_is_refused(checkpoint):
    scheduler = make(checkpoint("qwen2"), pool=40)
    with pytest.raises(ValueError, match=r"prompt 30 \+ max_new_tokens 20 = 50 tokens, but the pool holds 40"):
        scheduler.add_request(input_ids=[1] * 30, max_new_tokens=20)


@pytest.mark.parametrize(
    ("page_size", "chunk", "message"),
    [
        (16, 100, "page_size=16 does not divide chunked_prefill_size=100; use 96 or 112"),
        (16, 10, "page_size=16 does not divide chunked_prefill_size=10; use 16"),
        (1, 0, "chunked_prefill_size=0 must be at least 1, or -1 for no limit"),
        (1, -2, "chunked_prefill_size=-2 must be"),
    ],
)
def test_a_chunk_that_is_no_whole_pages_is_refused(checkpoint, page_size, chunk, message):
    with pytest.raises(ValueError, match=message):
        make(checkpoint("qwen2"), page_size=page_size, chunked_prefill_size=chunk)


@pytest.mark.parametrize(("page_size", "chunk", "kept"), [(1, 1, 1), (4, 8, 8), (4, -1, -1), (4, None, 1024)])
def test_a_chunk_may_be_a_page_or_without_limit(checkpoint, page_size, chunk, kept):
    assert make(checkpoint("qwen2"), page_size=page_size, chunked_prefill_size=chunk).chunked_prefill_size == kept


def test_on_a_cpu_no_step_is_queued_before_the_last_one_is_seen_unless_asked_for(checkpoint):
    assert [make(checkpoint("qwen2"), overlap=overlap).overlap for overlap in (None, True)] == [False, True]


@pytest.mark.parametrize(("conservativeness", "ratio"), [(0.5, 0.35), (1.0, 0.7), (2.0, 1.0)])
def test_running_requests_are_expected_to_need_a_share_of_their_worst_case(checkpoint, conservativeness, ratio):
    scheduler = make(checkpoint("qwen2"), schedule_conservativeness=conservativeness)
    assert scheduler.new_token_ratio == pytest.approx(ratio)


def test_a_request_has_priority_0_unless_it_says(scheduler):
    scheduler.enqueue(None, [1], params(1))
    scheduler.enqueue(None, [2], params(1), priority=1)
    assert [req.priority for req in scheduler.waiting] == [0, 1]


@pytest.mark.parametrize("seed", [1.5, "x", 1 << 63])
def test_a_seed_is_a_whole_number_of_64_bits(checkpoint, seed):
    with pytest.raises(ValueError, match="seed="):
        make(checkpoint("qwen2"), seed=seed)


def test_on_the_other_ranks_there_is_no_queue_no_tree_and_no_pool(checkpoint):
    wrapper = TPRadixAttentionModelWrapper(str(checkpoint("qwen2")), "cpu", 4, max_total_tokens=64)
    wrapper.parallel = ParallelState.of(replace(wrapper.tp, rank=1, size=2))
    other = TPScheduler(wrapper)
    assert not {"waiting", "tree", "pool", "policy", "admission", "outcome", "step_tasks"} & vars(other).keys()
    assert [other.enqueue(None, [1], params(1)) for _ in range(2)] == [0, 1], "it counts, to give the same ids"


# --- the checker itself: a bug of each kind must not pass


def running_scheduler(folder):
    """Two requests in the middle of their answers, sharing a prefix in the tree."""
    scheduler = make(folder)
    for tail in ([1], [2]):
        scheduler.add_request(input_ids=[*range(12), *tail], sampling_params=params(8))
    for _ in range(4):
        scheduler.step()
    assert len(scheduler.running) == 2
    invariants.check_invariants(scheduler)
    return scheduler


def lose_a_page(s):
    s.pool.alloc(1)


def free_a_page_in_use(s):
    req = s.running[0]
    s.pool.free(s.req_to_token.req_to_token[req.row, req.prefix_len : req.prefix_len + 4])


def forget_a_lock(s):
    s.tree.dec_lock_ref(s.running[0].last_node)


def point_at_a_foreign_page(s):
    s.req_to_token.req_to_token[s.running[0].row, 0] += 4


def miscount_the_tree(s):
    s.tree.evictable_size += 4


def swap_slots_in_a_node(s):
    node = next(s.tree.nodes())
    node.value = node.value[::-1].copy()


def lose_a_row(s):
    s.req_to_token.alloc()


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        (lose_a_page, "belong to nobody"),
        (free_a_page_in_use, "two owners: the free list and request 0"),
        (forget_a_lock, "lock_ref=1, but 2 requests"),
        (point_at_a_foreign_page, "request 0: position 0 points at slot"),
        (miscount_the_tree, "its nodes hold"),
        (swap_slots_in_a_node, "not whole pages"),
        (lose_a_row, "are free"),
    ],
)
def test_the_checker_catches(bug, message, checkpoint):
    scheduler = running_scheduler(checkpoint("qwen2"))
    bug(scheduler)
    with pytest.raises(invariants.InvariantError, match=message):
        invariants.check_invariants(scheduler)


# --- the seeds' own test: 2 ranks, 2 sequences of unequal prompt, prefill and 3 decode steps


def two_sequences(folder):
    tp = get_tensor_parallel()
    scheduler = make(folder, page_size=4)
    wrapper, written = scheduler.wrapper, {}
    write = wrapper.kv_cache.write

    def spy(layer, slots, k, v):
        for i, slot in enumerate(slots.tolist()):
            written[layer, slot] = (k[i].clone(), v[i].clone())
        write(layer, slots, k, v)

    wrapper.kv_cache.write = spy
    for prompt in ([1, 2, 3, 4, 5, 6, 7], [9, 8, 7]):
        scheduler.add_request(input_ids=prompt, sampling_params=params(4))
    results = scheduler.process_requests()
    for (layer, slot), (k, v) in written.items():
        k_read, v_read = wrapper.kv_cache.read(layer, [slot])
        np.testing.assert_array_equal(k_read[0], k)
        np.testing.assert_array_equal(v_read[0], v)
    outputs = [results[i].output_ids for i in range(2)]
    return outputs, scheduler.steps, sorted({slot for _, slot in written}), wrapper.model.heads.num_kv, tp.rank


def test_two_ranks_two_sequences(checkpoint, ranks):
    (out0, steps0, slots0, kv0, _), (out1, steps1, slots1, kv1, _) = ranks(2).run(two_sequences, checkpoint("qwen2"))
    assert steps0 == steps1 == {"prefill": 1, "decode": 3}
    assert out0 == out1
    assert out0 == [greedy(checkpoint("qwen2"), p, 4) for p in ([1, 2, 3, 4, 5, 6, 7], [9, 8, 7])]
    assert slots0 == slots1, "page ids mean the same on every rank"
    assert len(slots0) == 7 + 3 + 2 * 3
    assert kv0 == kv1 == 1, "each rank's page holds its own KV head"


# --- who talks


def count_messages(folder, prompts, new_tokens):
    tp = get_tensor_parallel()
    scheduler = make(folder)
    with tp.ledger.recording() as ledger:
        for prompt in prompts:
            scheduler.add_request(input_ids=prompt, sampling_params=params(new_tokens))
        scheduler.process_requests()
    return [(e.op, e.label, e.shape, e.bytes) for e in ledger.entries]


@pytest.mark.parametrize("size", [2, 4])
def test_the_ledger_of_a_step_is_the_formula(size, checkpoint, ranks):
    """1 + 2L all-reduces [T, D] and one gather [B, V/R], prefill (T=12, B=2) and decode (T=B=2) alike."""
    layers, hidden, vocab_local = 3, 112, -(-1009 // size)
    for entries in ranks(size).run(count_messages, checkpoint("qwen2"), [[1] * 7, [2] * 5], 2):
        work = [e for e in entries if e[1] not in ("task", "tokens", "results", "pool size")]
        expected = []
        for tokens in (12, 2):
            names = [f"layers.{i}.{part}" for i in range(layers) for part in ("o_proj", "down_proj")]
            shape = (tokens, hidden)
            expected += [("all_reduce", name, shape, tokens * hidden * 4) for name in ("embed_tokens", *names)]
            expected += [("gather", "logits", (2, vocab_local), 2 * vocab_local * 4)]
        assert work == expected
        control = [e[:2] for e in entries if e[1] in ("task", "tokens")]
        assert control == [("broadcast", "task"), ("broadcast", "tokens")] * 2 + [("broadcast", "task")]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("pool", [172, 150, 140])
def test_a_prompt_in_chunks_among_requests_that_take_more_than_was_reckoned(checkpoint, pool, overlap, mixed):
    """Admission reserves a share of what the running ones may need; between two chunks they can take all of it."""
    scheduler = make(
        checkpoint("qwen2"), page_size=1, pool=pool, chunked_prefill_size=16, overlap=overlap, enable_mixed_chunk=mixed
    )
    scheduler.new_token_ratio = 0.2
    prompts, new = [[10 + i] * 4 for i in range(4)], 20
    ids = [scheduler.add_request(input_ids=p, sampling_params=params(new)) for p in prompts]
    scheduler.step()
    long = list(range(100, 228))
    last = scheduler.add_request(input_ids=long, sampling_params=params(1))
    results = scheduler.process_requests()
    assert [results[i].output_ids for i in ids] == [greedy(checkpoint("qwen2"), p, new) for p in prompts]
    assert results[last].output_ids == greedy(checkpoint("qwen2"), long, 1)


@pytest.mark.parametrize("chunk", [-1, 128, 64])
def test_who_shares_a_prompt_in_chunks_waits_for_its_last_chunk_too(chunk, checkpoint):
    scheduler = make(checkpoint("qwen2"), page_size=16, chunked_prefill_size=chunk)
    document = list(range(100, 292))
    for tail in ([1], [2], [3]):
        scheduler.add_request(input_ids=document + tail, max_new_tokens=1)
    assert [out.cached_tokens for out in scheduler.process_requests().values()] == [0, 192, 192]


def test_all_go_back_to_the_queue_and_lose_nothing(checkpoint):
    """Between any two steps, with a prompt in chunks and a step on its way too."""
    prompts = some_prompts(1009, 4, shared=8, longest=30)
    for overlap in (False, True):
        scheduler = make(checkpoint("qwen2"), chunked_prefill_size=16, overlap=overlap)
        for prompt in prompts:
            scheduler.add_request(input_ids=prompt, sampling_params=params(8))

        def retract(step, scheduler=scheduler):
            if step % 3 == 2 and scheduler.steps["decode"] < 20:
                scheduler.retraction.retract_all()
                assert not scheduler.admitted
                assert len(scheduler.waiting) == len(scheduler.unfinished)
                invariants.check_invariants(scheduler)
            return False

        results = scheduler.process_requests(arrivals=retract)
        assert scheduler.retractions > 0
        assert [results[i].output_ids for i in range(4)] == [greedy(checkpoint("qwen2"), one, 8) for one in prompts]


def test_a_probe_is_counted_nowhere_and_cached_nowhere(checkpoint):
    scheduler = make(checkpoint("qwen2"), page_size=1)
    scheduler.add_request(input_ids=[5, 6, 7], sampling_params=params(2))
    scheduler.process_requests()
    before = (dict(scheduler.served), scheduler.num_requests, scheduler.num_finished, scheduler.tree.pretty())
    scheduler.enqueue(None, [0], params(1), probe=True)
    assert scheduler.process_requests()[-1].output_ids == greedy(checkpoint("qwen2"), [0], 1)
    after = (dict(scheduler.served), scheduler.num_requests, scheduler.num_finished, scheduler.tree.pretty())
    assert after == before


def test_who_shows_no_text_still_stops_at_one(checkpoint):
    scheduler = make(TINY_QWEN_PATH)
    ids = scheduler.wrapper.tokenizer.encode("What is a radix cache?")
    outputs = []
    for shows_text in (True, False):
        for words in ({}, {"stop": (" cache",)}):
            scheduler.enqueue(None, ids, params(20), words=words, shows_text=shows_text)
        outputs += scheduler.process_requests().values()
    shown, stopped, silent, silent_stopped = outputs
    assert (silent.text, silent.output_ids) == ("", shown.output_ids)
    assert (silent_stopped.output_ids, silent_stopped.finish_reason) == (stopped.output_ids, stopped.finish_reason)
