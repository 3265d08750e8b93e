"""What the planner says a step sends, against the ledger of the real one; what it reads and computes, against counts by hand."""

from collections import Counter

import numpy as np
import pytest
import torch

from common.attention.kv_cache import PagedKVCache
from common.distributed.cost_model import wire_bytes
from common.distributed.layout import Layout
from common.executor import Executor, StepParts
from common.models.config import ModelConfig
from common.models.published_configs import model_shape
from common.planner.holdings import parameters, stages
from common.planner.plan import Load, Stage, Way
from common.planner.work import Step, messages, wire_bytes_of, work
from common.tiny_qwen import TINY_QWEN_PATH
from tests.ranks import layout_of_the_pool

FLOAT32 = Load(context=64, batch=4, dtype=torch.float32, kv_dtype=torch.float32)
CONTROL = ("task", "tokens")


def recorded(way: Way, folder=None) -> tuple[list, list]:
    """(op, label's end, bytes) of a decode step of four sequences, and of the second ten tokens of a prompt."""
    layout = way.layout
    parallel = layout_of_the_pool(
        layout.tp, layout.pp, context_parallel_size=layout.cp, attention_data_parallel_size=layout.attn_dp,
        expert_parallel_size=layout.ep,
    )  # fmt: skip
    executor = Executor(
        folder, "cpu", 16, max_total_tokens=256, max_running_requests=4, skip_tokenizer_init=True, parallel=parallel,
        enable_layernorm_sp=way.sp, ep_dispatch=way.ep_dispatch,
    )  # fmt: skip
    executor.table.set_pages([(row, 0, range(4 * row, 4 * row + 4)) for row in range(4)])
    # with attention data parallelism rank 0's part has the prompt, and every part has as many sequences
    mine, has_prompt = np.arange(4 // layout.attn_dp), parallel.place.attn_dp == 0
    one = np.ones(int(has_prompt), dtype=np.int64)
    tokens = 10 * int(has_prompt)
    decoding = [len(mine)] * layout.attn_dp if layout.attn_dp > 1 else None
    prompt = None
    if layout.attn_dp > 1:
        none = np.zeros(0, dtype=np.int64)
        last = [np.array([9]), *[none] * (layout.attn_dp - 1)]
        prompt = StepParts([10, *[0] * (layout.attn_dp - 1)], last, [none] * layout.attn_dp)
    executor.ragged(
        np.arange(tokens),
        0 * one,
        0 * one,
        tokens * one,
        0 * one,
        parts=prompt and prompt._replace(emitting=prompt.scored),
    )
    said = []
    for emits, step in (
        (4, lambda: executor.decode(mine, np.full(len(mine), 63), parts=decoding)),
        (1, lambda: executor.ragged(np.arange(tokens), 0 * one, 10 * one, tokens * one, one, parts=prompt)),
    ):
        with executor.tp.ledger.recording() as ledger:
            logits = executor.links.bring_logits(step(), emits)
            if logits is not None:
                logits()
            executor.links.flush()
            said.append([(entry.op, entry.label.split(".")[-1], entry.bytes) for entry in ledger.entries])
    return tuple(said)


WAYS = [
    Way(Layout(2)), Way(Layout(3)), Way(Layout(1, 2)), Way(Layout(2, 2)), Way(Layout(2), sp=True), Way(Layout(3), sp=True),
    Way(Layout(2, attn_dp=2)), Way(Layout(4, attn_dp=2)), Way(Layout(2, cp=2)), Way(Layout(4, cp=2)),
]  # fmt: skip


@pytest.mark.parametrize(("size", "way"), [(way.layout.world, way) for way in WAYS], ids=str)
def test_a_step_sends_what_the_ledger_records(ranks, size, way):
    config = ModelConfig.from_folder(TINY_QWEN_PATH)
    steps = [Step(rows=4, known=64, emits=4, decode=True), Step(rows=10, known=10, emits=1, decode=False)]
    everyone = ranks(size).run(recorded, way)
    for number, step in enumerate(steps):
        for rank, told in enumerate(everyone):
            place = way.layout.place(rank)
            want = Counter()
            for message in messages(config, way, stages(config, way.layout.pp)[place.pp], FLOAT32, step):
                if message.label not in CONTROL:
                    want[message.op, message.label, message.nbytes] += message.times
            mine = Counter(told[number])
            if way.layout.pp > 1 and rank == 0:  # the other end of what the last stage sends
                got = [message for message in mine if message[:2] == ("receive", "logits")]
                assert sum(mine.pop(message) for message in got) == way.layout.tp
            if not step.decode and way.spreads:
                # one rank has the last row, and sends it to all; without the prompt a data rank hands in nothing
                row = ("all_to_all", "hidden", step.emits * way.layout.tp * config.hidden_size * 4)
                assert sum(Counter(other[number])[row] for other in everyone) == 1
                mine, want = ({m: n for m, n in said.items() if m[:2] != row[:2]} for said in (mine, want))
                if place.attn_dp > 0:
                    assert not [m for m in mine if m[0] == "all_to_all" and m[2] and m[1] == "gate_up_proj"]
                    continue
            assert mine == want, (rank, step)


def test_one_rank_alone_says_nothing():
    config = model_shape("Qwen2.5-7B")
    assert messages(config, Way(Layout()), stages(config, 1)[0], FLOAT32, Step(1, 10, 1, True)) == []
    assert messages(config, Way(Layout(dp=4)), stages(config, 1)[0], FLOAT32, Step(1, 10, 1, True)) == []


def test_sequence_parallelism_has_the_same_bytes_on_the_wire_but_for_the_rows_that_nobody_wants_at_the_end():
    config = model_shape("Qwen2.5-7B")
    stage, step = Stage(config.num_layers, True, True), Step(rows=1024, known=0, emits=0, decode=False)
    plain, cut = (
        wire_bytes_of(tuple(messages(config, Way(Layout(4), sp), stage, FLOAT32, step)), Layout(4))
        for sp in (False, True)
    )
    assert plain - cut == wire_bytes("all_gather", 256 * config.hidden_size * 4, 4)


def test_a_decode_step_reads_every_weight_but_the_embedding_and_all_keys_and_values():
    config, load = model_shape("Qwen2.5-7B"), Load(context=1024, batch=8)
    one = work(config, Way(Layout(2)), stages(config, 1)[0], load, Step(rows=8, known=1024, emits=8, decode=True))
    has = parameters(config, Layout(2), stages(config, 1)[0])
    assert one.weights == 2 * (has.total - has.embedding)
    assert one.kv == 8 * 1024 * PagedKVCache.bytes_per_page(config.num_layers, 1, 2, config.head_dim, load.kv_dtype)
    multiplied = has.attention + has.mlp + has.head
    scores = 4 * 8 * 1024 * (config.num_heads // 2) * config.head_dim * config.num_layers
    assert one.flops == 2 * 8 * multiplied + scores


def test_a_tied_embedding_is_read_once_as_the_head():
    config, load = model_shape("Qwen2.5-0.5B"), Load(context=16, batch=1)
    has = parameters(config, Layout(), stages(config, 1)[0])
    assert work(config, Way(Layout()), stages(config, 1)[0], load, Step(1, 16, 1, True)).weights == 2 * has.total


@pytest.mark.parametrize("layout", [Layout(4, attn_dp=2), Layout(4, cp=2)])
def test_what_is_cut_over_ranks_is_computed_once(layout):
    """The ranks together compute as much as one alone would, whether they cut heads, requests or tokens."""
    config, load = model_shape("Qwen2.5-7B"), Load(context=1024, batch=8)
    step = Step(rows=8, known=1024, emits=8, decode=True)
    alone = work(config, Way(Layout()), stages(config, 1)[0], load, step)
    each = work(config, Way(layout), stages(config, 1)[0], load, step)
    assert 4 * each.kv == alone.kv
    if layout.attn_dp > 1:  # cp: every rank has all rows' q, k and v
        assert 4 * each.flops == pytest.approx(alone.flops, rel=1e-3)


def test_prefill_counts_each_pair_of_tokens_once_however_it_is_cut_into_chunks():
    config, load, way = model_shape("Qwen2.5-7B"), Load(context=4096, batch=1), Way(Layout())
    stage = stages(config, 1)[0]
    whole = work(config, way, stage, load, Step(4096, 0, 1, False)).flops
    chunks = [
        work(config, way, stage, load, Step(1024, at, int(at == 3072), False)).flops for at in range(0, 4096, 1024)
    ]
    assert sum(chunks) == pytest.approx(whole, rel=1e-6)
