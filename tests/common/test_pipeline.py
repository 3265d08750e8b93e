"""Executors that are stages of one pipeline: the same tokens as the whole model, with the messages that the formula says."""

import numpy as np
import pytest
import torch

from common.executor import SCORED_ROWS, Executor
from common.models.config import ModelConfig
from common.parallel_state import broadcast
from common.tiny_qwen import TINY_QWEN_PATH
from tests.common.test_executor import assert_told, prompts_of, told
from tests.oracle import greedy
from tests.ranks import layout_of_the_pool

P, PAGES = 16, 8
NEW = 6


def pipeline(tp, pp, folder, **options):
    options = {"max_total_tokens": 4096, "max_running_requests": 4} | options
    return Executor(folder, "cpu", P, parallel=layout_of_the_pool(tp, pp), **options)


def draw(executor, mine, rows, best=0):
    """Rank 0's best token of each row, told to the ranks of the first stage."""
    logits = executor.links.bring_logits(mine, rows, best)
    tokens = torch.empty(rows, dtype=torch.int64)
    if logits is not None:
        tokens.copy_(logits().argmax(dim=-1))
    if executor.links.first:
        broadcast(tokens, executor.tp, "tokens")
        executor.receive_tokens(tokens)
    return tokens.tolist()


def answer(tp, pp, folder, prompts, chunk, best, options):
    """Greedy tokens of all prompts side by side, as rank 0 draws them; and what this rank has sent and received."""
    executor = pipeline(tp, pp, folder, **options)
    executor.table.set_pages([(row, 0, range(row * PAGES, (row + 1) * PAGES)) for row in range(len(prompts))])
    out = [[] for _ in prompts]
    with executor.tp.ledger.recording() as ledger:
        for first in range(0, max(map(len, prompts)), chunk):
            rows = np.array([row for row, prompt in enumerate(prompts) if len(prompt) > first])
            new = np.array([len(prompts[row][first : first + chunk]) for row in rows])
            emits = np.array([len(prompts[row]) <= first + chunk for row in rows])
            tokens = np.concatenate([prompts[row][first : first + chunk] for row in rows])
            mine = executor.ragged(tokens, rows, 0 * rows + first, new, emits)
            if emits.any():
                for row, token in zip(rows[emits], draw(executor, mine, int(emits.sum()), best), strict=True):
                    out[row].append(token)
        rows = np.arange(len(prompts))
        for i in range(NEW - 1):
            mine = executor.decode(rows, np.array([len(prompt) + i for prompt in prompts]))
            for row, token in enumerate(draw(executor, mine, len(rows), best)):
                out[row].append(token)
        executor.links.flush()
    messages = [(e.op, e.label, e.shape) for e in ledger.entries]
    return out, messages, list(executor.model.stage), executor.kv_cache.kv.shape[0]


LAYOUTS = [(1, 2), (1, 3), (2, 2)]


@pytest.mark.parametrize(("size", "layout"), [(tp * pp, (tp, pp)) for tp, pp in LAYOUTS], ids=str)
@pytest.mark.parametrize(("name", "chunk", "best"), [("qwen2", 1000, 0), ("qwen3", 7, 1), ("llama", 33, 0)])
def test_stages_draw_the_tokens_of_transformers(checkpoint, ranks, size, layout, name, chunk, best):
    folder, prompts = checkpoint(name), prompts_of(20, 41, 1)
    answers = ranks(size).run(answer, *layout, folder, prompts, chunk, best, {})
    assert answers[0][0] == [greedy(folder, prompt, NEW) for prompt in prompts]
    layers = [stage for _, _, stage, _ in answers]
    assert sorted({i for stage in layers for i in stage}) == [0, 1, 2]
    assert [pages for *_, pages in answers] == list(map(len, layers))  # no pages for the layers of others


@pytest.mark.parametrize(("size", "layout"), [(2, (1, 2)), (4, (2, 2))], ids=str)
def test_the_messages_of_a_stage_are_the_formula_s(checkpoint, ranks, size, layout):
    tp, pp = layout
    folder, prompt = checkpoint("llama"), prompts_of(40)[0]
    config = ModelConfig.from_folder(folder)
    steps = [16, 16, 8, *[1] * (NEW - 1)]  # tokens of each
    told = ranks(size).run(answer, tp, pp, folder, [prompt], 16, 0, {"pp_layer_partition": "2,1"})
    for rank, (_, ledger, layers, _) in enumerate(told):
        stage = rank // tp
        expected = []
        for i, tokens in enumerate(steps):
            hidden, emits = (tokens, config.hidden_size), i >= 2
            names = [f"layers.{layer}.{part}" for layer in layers for part in ("o_proj", "down_proj")]
            if stage == 0:
                names = ["embed_tokens", *names]
            else:
                expected.append(("receive", "hidden", hidden))
            expected += [("all_reduce", name, hidden) for name in names if tp > 1]
            if stage == 0:
                expected.append(("send", "hidden", hidden))
            share = (1, -(-config.vocab_size // tp))
            if emits and stage == pp - 1:
                expected.append(("send", "logits", share))
            if emits and rank == 0:
                expected += [("receive", "logits", share)] * tp
            if emits and stage == 0 and tp > 1:
                expected.append(("broadcast", "tokens", (1,)))
        assert ledger == expected


def told_by_stages(tp, pp, *case):
    return told(*case, layout_of_the_pool(tp, pp))


@pytest.mark.parametrize(("size", "layout"), [(2, (1, 2)), (4, (2, 2))], ids=str)
def test_prompt_log_probabilities_come_from_the_last_stage(checkpoint, ranks, size, layout):
    folder, prompts = checkpoint("qwen2"), prompts_of(9, SCORED_ROWS + 3)
    first, *others = ranks(size).run(told_by_stages, *layout, folder, prompts, 100, 0, [7])
    assert_told(first, folder, prompts, 0, [7])
    assert others == [[[], []]] * (size - 1)


def run_ahead(folder, steps):
    """Rank 0 begins all steps before it takes a single answer; returns what it then gets."""
    executor = pipeline(1, 2, folder)
    executor.set_steps_in_flight(steps)
    executor.table.set_pages([(row, 0, range(row * PAGES, (row + 1) * PAGES)) for row in range(4)])
    one, waiting = np.ones(1, dtype=np.int64), []
    for i in range(steps):
        mine = executor.ragged(np.array([i % 7 + 1] * 5), one * (i % 4), 0 * one, 5 * one, one)
        waiting.append(executor.links.bring_logits(mine, 1))
    answers = [int(logits().argmax()) for logits in waiting if logits is not None]
    executor.links.flush()
    return answers


def test_answers_may_be_taken_long_after_the_next_steps_have_begun(checkpoint, ranks):
    folder = checkpoint("llama")
    first, last = ranks(2).run(run_ahead, folder, 20)
    assert first == [greedy(folder, [i % 7 + 1] * 5, 1)[0] for i in range(20)]
    assert last == []


def split(partition_of_rank):
    state = layout_of_the_pool(1, 2)
    try:
        pipeline(1, 2, TINY_QWEN_PATH, pp_layer_partition=partition_of_rank[state.pp.rank])
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    ("partitions", "said"),
    [
        (["3,1", "2,2"], "the stages hold the layers 0..2, 2..3; give every rank the same pp_layer_partition"),
        (["2,3"] * 2, "pp_layer_partition=2,3 makes 5 layers, but the model has 4; use 2,2"),
        (["1,1,2"] * 2, "pp_layer_partition=1,1,2 lists 3 stage(s), but pp_size=2; use 2,2"),
    ],
)
def test_a_split_that_is_none_is_refused_on_every_rank(ranks, partitions, said):
    assert ranks(2).run(split, partitions) == [said] * 2
