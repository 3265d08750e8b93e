"""What a right answer must do. Each check takes the module of an exercise and raises AssertionError with the reason."""

import copy
import random
from collections.abc import Callable
from numbers import Integral
from types import ModuleType, SimpleNamespace

import numpy as np
import torch

from common.parallel_state import TPGroup


def check_1(m: ModuleType) -> None:
    rng = np.random.default_rng(0)
    x, weight, bias = rng.normal(size=(3, 12)), rng.normal(size=(5, 12)), rng.normal(size=5)
    for ranks in (1, 2, 3, 4):
        parts = m.partial_sums(x, weight, bias, ranks)
        assert len(parts) == ranks, f"{len(parts)} parts for {ranks} ranks"
        assert all(part.shape == (3, 5) for part in parts), "a partial sum has the full output's shape"
        assert np.allclose(sum(parts), x @ weight.T + bias), f"the sum over {ranks} ranks is not x W^T + b"
        if ranks > 1:
            zero = m.partial_sums(0 * x, weight, bias, ranks)
            assert sum(np.any(part != 0) for part in zero) == 1, "the bias belongs to one rank"


def check_2(m: ModuleType) -> None:
    gate, up = np.arange(24).reshape(8, 3), 100 + np.arange(24).reshape(8, 3)
    for ranks in (1, 2, 4):
        shards = [m.merged_shard(gate, up, rank, ranks) for rank in range(ranks)]
        for rank, shard in enumerate(shards):
            assert shard.shape == (16 // ranks, 3), f"rank {rank} of {ranks} holds {shard.shape}"
        halves = [np.split(shard, 2) for shard in shards]
        assert np.array_equal(np.concatenate([half[0] for half in halves]), gate), "the first halves together are gate"
        assert np.array_equal(np.concatenate([half[1] for half in halves]), up), "the second halves together are up"


def check_3(m: ModuleType) -> None:
    for ranks, num_q, num_kv, want in (
        (1, 8, 2, [[0, 1]]),
        (2, 8, 2, [[0], [1]]),
        (2, 32, 8, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (4, 8, 2, [[0], [0], [1], [1]]),
        (8, 16, 2, [[0]] * 4 + [[1]] * 4),
        (4, 16, 4, [[0], [1], [2], [3]]),
    ):
        got = [list(m.kv_heads_of(rank, ranks, num_q, num_kv)) for rank in range(ranks)]
        assert got == want, f"{num_q} query and {num_kv} KV heads on {ranks} ranks: {got}, not {want}"


def check_4(m: ModuleType) -> None:
    assert m.slot_mapping([7, 3, 0], 0, 10, 4) == [28, 29, 30, 31, 12, 13, 14, 15, 0, 1]
    assert m.slot_mapping([7, 3, 0], 6, 9, 4) == [14, 15, 0], "a chunk that begins in the middle of a block"
    assert m.slot_mapping([7, 3], 4, 5, 4) == [12], "one token, the first of a new block"
    assert m.slot_mapping([5], 2, 3, 16) == [82]
    assert m.slot_mapping([9, 8, 7], 2, 3, 1) == [7], "blocks of one token"


def check_5(m: ModuleType) -> None:
    a, b = m.block_hashes([1, 2, 3, 4, 5], 2), m.block_hashes([1, 2, 3, 9], 2)
    assert len(a) == 2, "only full blocks have a hash"
    assert a[0] == b[0], "equal blocks, equal hashes"
    assert a[1] != b[1]
    assert m.block_hashes([8, 8, 3, 4], 2)[1] != a[1], "the same tokens behind another beginning are another block"
    cached = set(m.block_hashes(list(range(12)), 4))
    assert m.computed_tokens([*range(12), 99], cached, 4) == 12
    assert m.computed_tokens([*range(8), 99, 98, 97, 96, 95], cached, 4) == 8
    assert m.computed_tokens([99, *range(11)], cached, 4) == 0
    assert m.computed_tokens(list(range(12)), cached, 4) == 8, (
        "a prompt cached from end to end leaves a token to compute"
    )
    middle = set(m.block_hashes(list(range(12)), 4)[1:])
    assert m.computed_tokens([*range(12), 99], middle, 4) == 0, "a hit begins at the first block"


def check_6(m: ModuleType) -> None:
    ref_cnt, free_list = {4: 2, 7: 1, 2: 1, 9: 1}, [9]
    ref_cnt[9] = 0
    m.free_request([4, 7, 2], ref_cnt, free_list)
    assert ref_cnt == {4: 1, 7: 0, 2: 0, 9: 0}, f"reference counts {ref_cnt}"
    assert 4 not in free_list, "block 4 is still held by another request"
    assert free_list == [9, 2, 7], f"free list {free_list}: behind the others, and the tail before the head"
    m.free_request([4], ref_cnt, free_list)
    assert free_list == [9, 2, 7, 4], "the last holder frees it"


def check_7(m: ModuleType) -> None:
    assert m.give_out([("a", 1), ("b", 1)], [("c", 10), ("d", 4)], 16) == [("a", 1), ("b", 1), ("c", 10), ("d", 4)]
    assert m.give_out([("a", 1)], [("c", 10), ("d", 4)], 8) == [("a", 1), ("c", 7)], "the last one gets what is left"
    assert m.give_out([("a", 20), ("b", 1)], [("c", 5)], 8) == [("a", 8)], "in order, even if it takes all"
    assert m.give_out([], [("c", 3)], 3) == [("c", 3)]
    rng = random.Random(0)
    for _ in range(50):
        running = [(f"r{i}", 1) for i in range(rng.randint(0, 6))]
        waiting = [(f"w{i}", rng.randint(1, 30)) for i in range(rng.randint(0, 4))]
        budget = rng.randint(1, 40)
        step = m.give_out(list(running), list(waiting), budget)
        assert sum(n for _, n in step) == min(budget, sum(n for _, n in running + waiting)), (
            "no token of the budget is lost"
        )
        assert all(n > 0 for _, n in step)


def check_8(m: ModuleType) -> None:
    old = {"prompt": [1, 2], "output": [3], "num_computed": 2, "blocks": [5]}
    new = {"prompt": [4, 5, 6], "output": [7, 8], "num_computed": 4, "blocks": [2, 9]}
    late = {"prompt": [6], "output": [], "num_computed": 0, "blocks": []}
    running, waiting, free_list = [old, new], [late], []
    assert m.tokens_of_next_step(new) == [8], "it decodes: the last token goes in"
    m.preempt(running, waiting, free_list)
    assert running == [old], "the newest goes"
    assert waiting[0] is new, "to the head of the queue"
    assert waiting[1] is late
    assert sorted(free_list) == [2, 9], "its blocks are free"
    assert new["blocks"] == [], "and no longer its own"
    assert new["output"] == [7, 8], "its output is kept"
    assert m.tokens_of_next_step(new) == [4, 5, 6, 7, 8], "prompt and output are computed again"
    new["num_computed"] = 4  # a prefix hit of four tokens
    assert m.tokens_of_next_step(new) == [8]
    new["output"] = [7, 8, 9]
    assert m.tokens_of_next_step(new) == [8, 9], "a hit that ends inside the answer leaves two tokens to compute here"
    assert m.tokens_of_next_step(late) == [6]


def check_9(m: ModuleType) -> None:
    for probs, p, want in (
        ([0.6, 0.3, 0.1], 0.5, [1, 0, 0]),
        ([0.6, 0.3, 0.1], 0.7, [1, 1, 0]),
        ([0.1, 0.3, 0.6], 0.95, [1, 1, 1]),
        ([0.25, 0.25, 0.5], 0.5, [0, 0, 1]),
        ([0.2, 0.5, 0.3], 1.0, [1, 1, 1]),
        ([0.125, 0.5, 0.375], 0.875, [0, 1, 1]),
    ):
        got = np.asarray(m.top_p_keep(np.array(probs), p)).astype(int).tolist()
        assert got == want, f"of {probs} with p = {p} these are kept: {got}, not {want}"


def check_10(m: ModuleType) -> None:
    needed = {"a.weight": (2, 3), "a.bias": (2,)}
    m.check_names(needed, dict(needed))
    for found, words, fine in (
        ({}, ["a.weight", "a.bias"], []),
        ({"a.weight": (2, 3)}, ["a.bias"], ["a.weight"]),
        (needed | {"model.b.weight": (2, 3)}, ["model.b.weight"], ["a.weight", "a.bias"]),
        ({"a.weight": (3, 2), "a.bias": (2,)}, ["a.weight", "(3, 2)"], ["a.bias"]),
        ({"x": (1,), "a.weight": (9, 9)}, ["x", "a.bias", "(9, 9)"], []),
    ):
        said = _value_error(lambda found=found: m.check_names(needed, found))
        assert said is not None, f"no ValueError for {found}"
        missing = [word for word in words if word not in said]
        assert not missing, f"the error for {found} does not name {missing}: {said}"
        blamed = [word for word in fine if word in said]
        assert not blamed, f"nothing is wrong with {blamed}, and the error names it: {said}"


def check_11(m: ModuleType) -> None:
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP  # noqa: PLC0415, takes seconds

    torch.manual_seed(0)
    for width, ranks, bias in ((12, 1, False), (12, 2, False), (12, 3, True), (10, 4, False)):
        config = LlamaConfig(hidden_size=8, intermediate_size=width, num_attention_heads=2, mlp_bias=bias)
        whole, x = LlamaMLP(config), torch.randn(3, 8)
        share, partial = -(-width // ranks), []
        for rank in range(ranks):
            layer = SimpleNamespace(mlp=copy.deepcopy(whole))
            m.apply_tp_to_mlp(layer, TPGroup(rank, ranks))
            mlp = layer.mlp
            for name, shape in (("gate_proj", (share, 8)), ("up_proj", (share, 8)), ("down_proj", (8, share))):
                got = tuple(getattr(mlp, name).weight.shape)
                assert got == shape, f"{name} of rank {rank} of {ranks}, F = {width}: {list(got)}, not {list(shape)}"
            sums = getattr(mlp.down_proj, "reduce_results", False)
            assert sums, "nobody sums what the ranks' down_proj leave: which layer of common/layers/linear.py does?"
            mlp.down_proj.reduce_results = False  # the ranks are played here, and their sum is written by hand
            partial.append(mlp(x))
        right = torch.allclose(sum(partial), whole(x), atol=1e-5)
        assert right, f"the sum over {ranks} ranks is not the whole MLP's output" + (" (with biases)" if bias else "")


def check_12(m: ModuleType) -> None:
    gib, small = 1 << 30, (24, 2, 64, 2)  # Qwen2.5-0.5B: layers, KV heads, head_dim, bytes
    for free, size, shape, want in (
        ([gib], 16, small, 5461),
        ([gib, gib], 16, small, 10922),
        ([gib] * 4, 16, small, 10922),
        ([gib, gib // 2], 16, small, 5461),
        ([gib], 1, (28, 4, 128, 2), 18724),
        ([1000], 16, small, 0),
    ):
        layers, heads, head_dim, bytes_each = shape
        got = m.num_blocks(free, size, layers, heads, head_dim, bytes_each)
        said = f"{free} bytes free, blocks of {size}, {layers} layers, {heads} KV heads of {head_dim}, {bytes_each} bytes each"
        assert got == want, f"{said}: {got}, not {want}"
        assert isinstance(got, Integral), f"{got!r} blocks: a part of one is none"


def _value_error(call: Callable[[], object]) -> str | None:
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


CHECKS = {n: globals()[f"check_{n}"] for n in range(1, 13)}
