"""What comes back of a request, in vLLM's shape: log-probabilities, pieces, times, and what went wrong."""

import math

import pytest
import torch

from ch06_tp_vllm import LLM, LLMEngine, SamplingParams
from ch06_tp_vllm.sampling_params import RequestOutputKind
from tests.oracle import greedy, reference_model


def params(tokens=8, **more):
    return SamplingParams(**{"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True} | more)


@pytest.fixture(scope="module")
def llm():
    return LLM(device="cpu", num_gpu_blocks_override=64, check=True)


def small(folder, **more):
    return LLMEngine(str(folder), device="cpu", num_gpu_blocks_override=64, block_size=4, check=True, **more)


def to_the_end(engine):
    """Outputs of all steps."""
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    return outputs


def test_of_every_token_the_best_ones_are_told_with_rank_and_text(llm):
    """Greedy: the chosen token is the best, and stands once."""
    answer = llm.generate([[5, 6, 7]], params(4, logprobs=3))[0].outputs[0]
    decode = llm.llm_engine.runner.tokenizer.decode
    for token, told in zip(answer.token_ids, answer.logprobs, strict=True):
        assert next(iter(told)) == token
        assert [one.rank for one in told.values()] == [1, 2, 3]
        assert [one.decoded_token for one in told.values()] == [decode([other]) for other in told]
        values = [one.logprob for one in told.values()]
        assert values == sorted(values, reverse=True)


def test_a_drawn_token_that_is_not_among_the_best_is_told_beside_them(llm):
    answer = llm.generate([[5, 6, 7]], params(20, logprobs=2, temperature=20.0, seed=1))[0].outputs[0]
    ranks = []
    for token, told in zip(answer.token_ids, answer.logprobs, strict=True):
        ranks.append(told[token].rank)
        assert sorted(one.rank for one in told.values()) == sorted({1, 2, ranks[-1]})
    assert max(ranks) > 2
    assert answer.cumulative_logprob == pytest.approx(
        sum(told[token].logprob for token, told in zip(answer.token_ids, answer.logprobs, strict=True))
    )


def test_without_a_tokenizer_a_told_token_has_no_text(checkpoint):
    engine = small(checkpoint("qwen2"))
    engine.add_request("a", [1, 2, 3], params(1, logprobs=1))
    (output,) = engine.step()
    assert [one.decoded_token for one in output.outputs[0].logprobs[0].values()] == [None]


@pytest.mark.parametrize("budget", [1024, 7])
def test_prompt_logprobs_are_those_of_transformers_and_the_first_token_has_none(checkpoint, budget):
    """In one step or in chunks; of n answers the first one's are told."""
    folder, prompt = checkpoint("qwen2"), list(range(40, 60))
    engine = small(folder, max_num_batched_tokens=budget, max_num_seqs=4)
    expected = reference_model(folder)(torch.tensor([prompt])).logits[0].log_softmax(dim=-1)
    for _ in range(2):  # the second time too: nothing is taken from the cache where every logit is asked for
        engine.add_request("a", prompt, params(2, prompt_logprobs=2, n=2))
        output = to_the_end(engine)[-1]
        assert output.num_cached_tokens == 0
        first, *told = output.prompt_logprobs
        assert first is None
        for own, token, one in zip(expected, prompt[1:], told, strict=False):
            assert one[token].logprob == pytest.approx(own[token].item(), abs=1e-4)
            assert {other for other, at in one.items() if at.rank <= 2} == set(own.topk(2).indices.tolist())
        assert len(told) == len(prompt) - 1
        assert [answer.token_ids for answer in output.outputs] == [greedy(folder, prompt, 2)] * 2


def test_prompt_logprobs_are_told_once_although_the_request_was_preempted(checkpoint):
    """Seven blocks of four for two requests of 22 tokens each at their end."""
    folder, prompts = checkpoint("qwen2"), [list(range(40, 52)), list(range(60, 72))]
    engine = LLMEngine(str(folder), device="cpu", num_gpu_blocks_override=7, block_size=4, check=True)
    for name, prompt in zip("ab", prompts, strict=True):
        engine.add_request(name, prompt, params(10, prompt_logprobs=0))
    done = {output.request_id: output for output in to_the_end(engine) if output.finished}
    assert engine.scheduler.num_preemptions > 0
    for name, prompt in zip("ab", prompts, strict=True):
        assert [list(one) for one in done[name].prompt_logprobs[1:]] == [[token] for token in prompt[1:]]
        assert done[name].outputs[0].token_ids == greedy(folder, prompt, 10)


def test_the_pieces_of_delta_outputs_put_together_are_the_whole(llm):
    drawn = {"n": 2, "temperature": 1.0, "seed": 3, "logprobs": 1}
    whole = llm.generate("What is a page?", params(12, **drawn))[0].outputs
    engine, pieces = llm.llm_engine, [[], []]
    engine.add_request("a", "What is a page?", params(12, output_kind=RequestOutputKind.DELTA, **drawn))
    for output in to_the_end(engine):
        for answer in output.outputs:
            assert len(answer.token_ids) == len(answer.logprobs) == 1
            pieces[answer.index].append(answer)
    for answer, parts in zip(whole, pieces, strict=True):
        assert "".join(part.text for part in parts) == answer.text
        assert [token for part in parts for token in part.token_ids] == answer.token_ids
        assert [list(one) for part in parts for one in part.logprobs] == [list(one) for one in answer.logprobs]


def test_final_only_is_silent_until_the_end(checkpoint):
    engine, told = small(checkpoint("qwen2")), []
    engine.add_request("a", [1, 2, 3], params(6, output_kind=RequestOutputKind.FINAL_ONLY))
    while engine.has_unfinished_requests():
        told.append([len(output.outputs[0].token_ids) for output in engine.step()])
    assert told == [[], [], [], [], [], [6]]


def test_times_are_noted_once_and_the_last_one_when_all_answers_have_ended(llm):
    drawn = {"n": 2, "temperature": 1.5, "seed": 4}
    one, other = (answer.token_ids for answer in llm.generate([[5, 6, 7]], params(12, **drawn))[0].outputs)
    stop = next(token for token in one if token not in other)
    engine = llm.llm_engine
    engine.add_request("a", [5, 6, 7], params(12, stop_token_ids=[stop], **drawn))
    outputs = to_the_end(engine)
    ended = [[answer.finish_reason is not None for answer in output.outputs] for output in outputs]
    assert [True, False] in ended, "one answer goes on alone"
    assert [output.metrics.finished_time is not None for output in outputs] == [all(pair) for pair in ended]
    times = outputs[-1].metrics
    assert times.arrival_time <= times.first_scheduled_time <= times.first_token_time <= times.finished_time
    assert len({(o.metrics.first_scheduled_time, o.metrics.first_token_time) for o in outputs}) == 1


def test_token_0_is_a_token(checkpoint):
    engine = small(checkpoint("qwen2"))
    engine.add_request("a", [1, 2, 3], params(3, allowed_token_ids=[0]))
    assert to_the_end(engine)[-1].outputs[0].token_ids == [0, 0, 0]


def test_tokens_are_counted_from_the_beginning(checkpoint):
    engine = small(checkpoint("qwen2"))
    for name, length, tokens in (("a", 3, 4), ("b", 5, 2)):
        engine.add_request(name, list(range(length)), params(tokens, n=2))
    to_the_end(engine)
    assert (engine.outputs.prompt_tokens, engine.outputs.generation_tokens) == (2 * (3 + 5), 2 * (4 + 2))


def test_a_step_that_fails_ends_its_requests_and_nobody_else(checkpoint, monkeypatch):
    """Two run, one waits."""
    folder = checkpoint("qwen2")
    engine = small(folder, max_num_seqs=2)
    for name, first in zip("abc", (1, 4, 7), strict=True):
        engine.add_request(name, [first, first + 1, first + 2], params(4))
    engine.step()

    def broken(step):
        raise RuntimeError("out of memory,\n  or so")

    monkeypatch.setattr(engine.runner, "run", broken)
    failed = engine.step()
    monkeypatch.undo()
    said = [(o.request_id, o.finished, o.outputs[0].finish_reason, o.outputs[0].stop_reason) for o in failed]
    assert said == [(name, True, "error", "RuntimeError: out of memory, or so") for name in "ab"]
    assert [len(output.outputs[0].token_ids) for output in failed] == [1, 1]
    assert to_the_end(engine)[-1].outputs[0].token_ids == greedy(folder, [7, 8, 9], 4)
    assert engine.blocks.num_free_blocks == 64


def test_a_request_whose_logits_are_nan_ends_with_an_error_and_the_others_go_on(checkpoint, monkeypatch):
    folder = checkpoint("qwen2")
    engine = small(folder)
    run = engine.runner.run

    def first_row_is_nan(step):
        logits = run(step).clone()
        logits[0] = math.nan
        return logits

    for name, first in zip("ab", (1, 4), strict=True):
        engine.add_request(name, [first, first + 1, first + 2], params(4))
    monkeypatch.setattr(engine.runner, "run", first_row_is_nan)
    bad, good = engine.step()
    monkeypatch.undo()
    assert (bad.finished, bad.outputs[0].finish_reason, bad.outputs[0].token_ids) == (True, "error", [])
    assert "logits for this request are NaN or infinite" in bad.outputs[0].stop_reason
    assert not good.finished
    assert to_the_end(engine)[-1].outputs[0].token_ids == greedy(folder, [4, 5, 6], 4)
    assert engine.blocks.num_free_blocks == 64
