"""The checks of the exercises: which wrong answers they find.

Long because it is a list: each wrong answer is a small function, to be read by itself.
"""

import importlib
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ch06_tp_vllm.exercises.check import EXERCISES
from common.layers.linear import ColumnParallelLinear, RowParallelLinear
from common.models.weights import TensorSource

module_of, outcome = EXERCISES.module_of, EXERCISES.outcome


def right(number):
    return module_of(number, solutions=True)


def bias_everywhere(x, weight, bias, ranks):
    share = x.shape[1] // ranks
    return [x[:, r * share : (r + 1) * share] @ weight[:, r * share : (r + 1) * share].T + bias for r in range(ranks)]


def bias_divided(x, weight, bias, ranks):
    return [
        part - (bias if r == 0 else 0) + bias / ranks
        for r, part in enumerate(right(1).partial_sums(x, weight, bias, ranks))
    ]


def cut_the_stack(gate, up, rank, ranks):
    return np.split(np.concatenate([gate, up]), ranks)[rank]


def interleaved(gate, up, rank, ranks):
    return np.stack([gate, up], axis=1).reshape(-1, gate.shape[1])[
        rank * 2 * len(gate) // ranks : (rank + 1) * 2 * len(gate) // ranks
    ]


def no_parent(tokens, size):
    return [tuple(tokens[i * size : (i + 1) * size]) for i in range(len(tokens) // size)]


def no_cap(tokens, cached, size):
    hits = 0
    for name in right(5).block_hashes(tokens, size):
        if name not in cached:
            break
        hits += 1
    return hits * size


def any_hit(tokens, cached, size):
    names = right(5).block_hashes(tokens, size)[: (len(tokens) - 1) // size]
    return sum(name in cached for name in names) * size


def head_first(table, ref_cnt, free):
    for block in table:
        ref_cnt[block] -= 1
        if ref_cnt[block] == 0:
            free.append(block)


def free_all(table, ref_cnt, free):
    for block in reversed(table):
        ref_cnt[block] -= 1
        free.append(block)


def whole_prompts_only(running, waiting, budget):
    step = []
    for name, lacking in running + waiting:
        if lacking <= budget:
            step.append((name, lacking))
            budget -= lacking
    return step


def to_the_tail(running, waiting, free):
    right(8).preempt(running, waiting, free)
    waiting.append(waiting.pop(0))


def forget_output(running, waiting, free):
    right(8).preempt(running, waiting, free)
    waiting[0]["output"] = []


def decodes_if_it_has_output(request):
    return request["output"][-1:] or request["prompt"]


def prompt_only(request):
    return request["prompt"][request["num_computed"] :] or request["output"][-1:]


def last_if_it_answers(request):
    decodes = request["num_computed"] >= len(request["prompt"]) and request["output"]
    return request["output"][-1:] if decodes else (request["prompt"] + request["output"])[request["num_computed"] :]


def mass_up_to_p(probs, p):
    order = np.argsort(-probs, kind="stable")
    keep = np.zeros(len(probs), dtype=bool)
    keep[order[np.cumsum(probs[order]) <= p]] = True
    return keep


def one_too_many(probs, p):
    order = np.argsort(-probs, kind="stable")
    keep = np.zeros(len(probs), dtype=bool)
    keep[order[np.cumsum(probs[order]) - probs[order] <= p]] = True
    return keep


def missing_only(needed, found):
    if missing := [name for name in needed if name not in found]:
        raise ValueError(f"missing {missing}")


def first_only(needed, found):
    for name in needed:
        if name not in found:
            raise ValueError(name)
    right(10).check_names(needed, found)


def name_everything(needed, found):
    if needed != found:
        raise ValueError(f"{needed} {found}")


def patch_with(gate=ColumnParallelLinear, up=ColumnParallelLinear, down=RowParallelLinear, biases=True, **of_down):
    """apply_tp_to_mlp with other layers in the places of the three."""

    def patch(layer, tp):
        for name, kind in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            old, more = getattr(layer.mlp, name), of_down if name == "down_proj" else {}
            bias = biases and old.bias is not None
            new = kind(old.in_features, old.out_features, tp, bias, name, **more)
            new.weight.weight_loader(TensorSource(old.weight))
            if bias:
                new.bias.weight_loader(TensorSource(old.bias))
            setattr(layer.mlp, name, new)

    return patch


def gate_for_up(layer, tp):
    layer.mlp.up_proj = layer.mlp.gate_proj
    right(11).apply_tp_to_mlp(layer, tp)


def block_bytes(size, layers, heads, head_dim, bytes_each):
    return 2 * layers * size * heads * head_dim * bytes_each


# --- more of them: each would pass a check that looks at less


def all_on_rank_0(x, weight, bias, ranks):
    return [x @ weight.T + bias] + [np.zeros((len(x), len(weight)))] * (ranks - 1)


def every_rth_column(x, weight, bias, ranks):
    return [x[:, r::ranks] @ weight[:, r::ranks].T + bias * (r == 0) for r in range(ranks)]


def in_place(x, weight, bias, ranks):
    x *= 1.0000001
    return right(1).partial_sums(x, weight, bias, ranks)


def up_first(gate, up, rank, ranks):
    return right(2).merged_shard(up, gate, rank, ranks)


def round_robin(gate, up, rank, ranks):
    return np.concatenate([gate[rank::ranks], up[rank::ranks]])


def from_the_block_s_first_slot(table, start, stop, size):
    return [block * size + i for block in table[start // size :] for i in range(size)][: stop - start]


def blocks(tokens, size):
    return [tokens[i : i + size] for i in range(0, len(tokens) // size * size, size)]


def prefixes(tokens, size):
    return [tokens[: i + size] for i in range(0, len(tokens) // size * size, size)]


def xor(tokens, size):
    names, name = [], 0
    for block in blocks(tokens, size):
        name ^= int.from_bytes(sha256(str(block).encode()).digest()[:8], "little")
        names.append(name)
    return names


def polynomial(base):
    def names(tokens, size):
        found = []
        for prefix in prefixes(tokens, size):
            value = len(prefix)
            for token in prefix:
                value = value * base + token
            found.append(value)
        return found

    return names


def hits(names, cached, size):
    n = 0
    for name in names:
        if name not in cached:
            break
        n += 1
    return n * size


def names_of(tokens, size):
    return right(5).block_hashes(tokens, size)


def all_but_the_last(tokens, cached, size):
    return min(hits(names_of(tokens, size), cached, size), len(tokens) - 1)


def one_block_less_if_the_prompt_is_whole_blocks(tokens, cached, size):
    return max(hits(names_of(tokens, size), cached, size) - size * (len(tokens) % size == 0), 0)


def always_a_block_less(tokens, cached, size):
    return max(hits(names_of(tokens, size), cached, size) - size, 0)


def in_front(table, ref_cnt, free):
    right(6).free_request(table, ref_cnt, mine := [])
    free[:0] = mine


def uncounted(table, ref_cnt, free):
    free += [block for block in reversed(table) if ref_cnt[block] == 1]


def a_list_of_its_own(table, ref_cnt, free):
    right(6).free_request(table, ref_cnt, list(free))


def with_zeros(running, waiting, budget):
    step = []
    for name, lacking in running + waiting:
        step.append((name, min(lacking, budget)))
        budget -= step[-1][1]
    return step


def shortest_first(running, waiting, budget):
    return right(7).give_out(sorted(running, key=lambda one: one[1]), waiting, budget)


def in_shares(running, waiting, budget):
    share = max(1, budget // max(1, len(running + waiting)))
    return [(name, min(lacking, share)) for name, lacking in running + waiting][:budget]


def until_one_does_not_fit(running, waiting, budget):
    step = []
    for name, lacking in running + waiting:
        if lacking > budget:
            break
        step.append((name, lacking))
        budget -= lacking
    return step


def eats_the_queue(running, waiting, budget):
    step = right(7).give_out(running, waiting, budget)
    del waiting[: len(step)]
    return step


def preempt_with(newest=True, reset=True, empty=True, one_by_one=True):
    def preempt(running, waiting, free):
        request = running.pop() if newest else running.pop(0)
        free.extend(request["blocks"]) if one_by_one else free.append(request["blocks"])
        if empty:
            request["blocks"] = []
        if reset:
            request["num_computed"] = 0
        waiting.insert(0, request)

    return preempt


def not_sorted(probs, p):
    return np.cumsum(probs) - probs < p


def as_likely_as_the_last(probs, p):
    return probs >= probs[right(9).top_p_keep(probs, p)].min()


def their_ids(probs, p):
    return np.flatnonzero(right(9).top_p_keep(probs, p))


def least_probable_first(probs, p):
    return right(9).top_p_keep(probs.max() - probs, p)


def by_number_of_tensors(needed, found):
    if len(needed) != len(found):
        raise ValueError(f"{len(found)} tensors, {len(needed)} are needed")


def key_error(needed, found):
    for name, shape in needed.items():
        if found[name] != shape:
            raise ValueError(f"{name} is {found[name]}")


def number_of_elements(needed, found):
    as_large = {name: needed[name] if name in needed and np.prod(needed[name]) == np.prod(shape) else shape
                for name, shape in found.items()}  # fmt: skip
    right(10).check_names(needed, as_large)


def names_without_shapes(needed, found):
    if wrong := [name for name in needed | found if needed.get(name) != found.get(name)]:
        raise ValueError(", ".join(wrong))


# (exercise, what is wrong in the answer, words of the complaint)
WRONG = [
    (1, {"partial_sums": bias_everywhere}, "bias in it, times: got 2.0, wanted 1"),
    (1, {"partial_sums": bias_divided}, "ranks that add something of the bias: got 2, wanted 1"),
    (1, {"partial_sums": lambda x, w, b, r: [p - b * (i == 0) for i, p in enumerate(right(1).partial_sums(x, w, b, r))]},
     "got 0.0, wanted 1"),
    (1, {"partial_sums": all_on_rank_0}, "ranks whose part is made of their own columns"),
    (1, {"partial_sums": every_rth_column}, "ranks whose part is made of their own columns"),
    (1, {"partial_sums": in_place}, "as they were"),
    (1, {"partial_sums": lambda *args: sum(right(1).partial_sums(*args))}, "got 3, wanted 1"),
    (1, {"partial_sums": lambda *args: None}, "wanted an array a rank, got None"),
    (2, {"merged_shard": cut_the_stack}, "rows that rank 0 of 2 holds"),
    (2, {"merged_shard": interleaved}, "rows that rank 0 of 1 holds"),
    (2, {"merged_shard": up_first}, "got ['up[0]'"),
    (2, {"merged_shard": round_robin}, "rows that rank 0 of 2 holds"),
    (2, {"merged_shard": lambda gate, up, rank, ranks: np.concatenate([gate, up])}, "shape that rank 0 of 2 holds"),
    (3, {"kv_heads_of": lambda rank, ranks, q, kv: [rank % kv]}, "wanted [[0, 1]]"),
    (3, {"kv_heads_of": lambda rank, ranks, q, kv: list(range(kv))}, "got [[0, 1], [0, 1]]"),
    (3, {"kv_heads_of": lambda rank, ranks, q, kv: list(range(rank * kv // ranks, (rank + 1) * kv // ranks))},
     "8 query and 2 KV heads on 4 ranks"),
    (3, {"kv_heads_of": lambda rank, ranks, q, kv: [h // (q // kv) for h in range(rank * q // ranks, (rank + 1) * q // ranks)]},
     "got [[0, 0, 0, 0, 1, 1, 1, 1]]"),
    (3, {"kv_heads_of": lambda rank, ranks, q, kv: list(range(rank * (kv // ranks), (rank + 1) * (kv // ranks))) or [rank % kv]},
     "wanted [[0], [0], [1], [1]]"),
    (4, {"slot_mapping": lambda table, start, stop, size: [table[i // size] * size + i - start for i in range(start, stop)]},
     "a whole prompt"),
    (4, {"slot_mapping": lambda table, start, stop, size: list(range(table[start // size] * size + start % size,
                                                                     table[start // size] * size + start % size + stop - start))},
     "a whole prompt"),
    (4, {"slot_mapping": lambda table, start, stop, size: right(4).slot_mapping(table, start, stop + 1, size)}, "slots of tokens"),
    (4, {"slot_mapping": lambda table, start, stop, size: right(4).slot_mapping(table, 0, stop - start, size)},
     "a chunk that begins in the middle of a block"),
    (4, {"slot_mapping": lambda table, start, stop, size: list(range(start, stop))}, "a whole prompt"),
    (4, {"slot_mapping": from_the_block_s_first_slot},
     "a chunk that begins in the middle of a block"),
    (5, {"computed_tokens": lambda *given: float(right(5).computed_tokens(*given))}, "got 12.0, wanted 12"),
    (5, {"block_hashes": no_parent}, "the same behind another beginning"),
    (5, {"block_hashes": lambda tokens, size: [sum(block) for block in blocks(tokens, size)]}, "got the same name"),
    (5, {"block_hashes": lambda tokens, size: [sum(prefix) for prefix in prefixes(tokens, size)]}, "got the same name"),
    (5, {"block_hashes": lambda tokens, size: [frozenset(prefix) for prefix in prefixes(tokens, size)]}, "got the same name"),
    (5, {"block_hashes": lambda tokens, size: [tuple(sorted(prefix)) for prefix in prefixes(tokens, size)]}, "got the same name"),
    (5, {"block_hashes": lambda tokens, size: ["".join(map(str, prefix)) for prefix in prefixes(tokens, size)]},
     "got the same name"),
    (5, {"block_hashes": xor}, "got the same name"),
    (5, {"block_hashes": polynomial(31)}, "got the same name"),
    (5, {"block_hashes": polynomial(1000)}, "got the same name"),
    (5, {"block_hashes": lambda tokens, size: [(i, *block) for i, block in enumerate(blocks(tokens, size))]}, "got the same name"),
    (5, {"block_hashes": lambda tokens, size: [(len(p), p[0], p[-1]) for p in prefixes(tokens, size)]}, "got the same name"),
    (5, {"block_hashes": lambda tokens, size: [object() for _ in blocks(tokens, size)]}, "wanted the same name"),
    (5, {"block_hashes": lambda tokens, size: [(len(tokens), *p) for p in prefixes(tokens, size)]}, "wanted the same name"),
    (5, {"block_hashes": prefixes}, "names that can be in a set"),
    (5, {"block_hashes": lambda tokens, size: [tuple(tokens[: i + size]) for i in range(0, len(tokens), size)]}, "got 3, wanted 2"),
    (5, {"computed_tokens": no_cap}, "leaves its last token to compute"),
    (5, {"computed_tokens": any_hit}, "the first block is missing"),
    (5, {"computed_tokens": all_but_the_last}, "computing begins where a block does: tokens that need not be computed (a block is"),
    (5, {"computed_tokens": lambda tokens, cached, size: len(tokens) - 1}, "the first two blocks match"),
    (5, {"computed_tokens": one_block_less_if_the_prompt_is_whole_blocks}, "of which only the first is cached"),
    (5, {"computed_tokens": always_a_block_less}, "got 8, wanted 12"),
    (5, {"computed_tokens": lambda tokens, cached, size: right(5).computed_tokens(tokens, cached, size) // size},
     "got 3, wanted 12"),
    (6, {"free_request": head_first}, "got [9, 7, 2], wanted [9, 2, 7]"),
    (6, {"free_request": free_all}, "is block 4 free"),
    (6, {"free_request": in_front}, "got [2, 7, 9], wanted [9, 2, 7]"),
    (6, {"free_request": uncounted}, "ref_cnt"),
    (6, {"free_request": a_list_of_its_own}, "got [9], wanted [9, 2, 7]"),
    (6, {"free_request": lambda table, ref_cnt, free: right(6).free_request(table, ref_cnt, free) or table.clear()}, "block table"),
    (7, {"give_out": lambda running, waiting, budget: right(7).give_out(waiting, running, budget)}, "there is room for all"),
    (7, {"give_out": whole_prompts_only}, "the last one gets what is left"),
    (7, {"give_out": lambda running, waiting, budget: running + waiting}, "the last one gets what is left"),
    (7, {"give_out": with_zeros}, "('d', 0)"),
    (7, {"give_out": shortest_first}, "in order, even if the first takes all"),
    (7, {"give_out": in_shares}, "there is room for all"),
    (7, {"give_out": until_one_does_not_fit}, "the last one gets what is left"),
    (7, {"give_out": eats_the_queue}, "which stay as they are"),
    (7, {"give_out": lambda running, waiting, budget: [("a", 1)]}, "there is room for all"),
    (8, {"preempt": to_the_tail}, "head of the queue"),
    (8, {"preempt": forget_output}, "its output is kept"),
    (8, {"preempt": preempt_with(newest=False)}, "the newest, [4, 5, 6], goes"),
    (8, {"preempt": preempt_with(reset=False)}, "num_computed"),
    (8, {"preempt": preempt_with(empty=False)}, "no longer its own"),
    (8, {"preempt": preempt_with(one_by_one=False)}, "free_list"),
    (8, {"tokens_of_next_step": decodes_if_it_has_output}, "computed again: got [8], wanted [4, 5, 6, 7, 8]"),
    (8, {"tokens_of_next_step": prompt_only}, "computed again: got [4, 5, 6], wanted"),
    (8, {"tokens_of_next_step": last_if_it_answers}, "a prefix hit that ends where the prompt does"),
    (8, {"tokens_of_next_step": lambda r: r["prompt"] + r["output"]}, "a request that decodes"),
    (8, {"tokens_of_next_step": lambda r: r["prompt"][r["num_computed"]:] + r["output"]}, "a request that decodes"),
    (9, {"top_p_keep": mass_up_to_p}, "with p = 0.5"),
    (9, {"top_p_keep": one_too_many}, "of [0.25, 0.25, 0.5] with p = 0.5"),
    (9, {"top_p_keep": not_sorted}, "of [0.25, 0.25, 0.5]"),
    (9, {"top_p_keep": as_likely_as_the_last}, "some of them equal"),
    (9, {"top_p_keep": their_ids}, "shape of what is returned"),
    (9, {"top_p_keep": least_probable_first}, "with p = 0.5"),
    (9, {"top_p_keep": lambda probs, p: probs > 1 - p}, "with p = 0.7"),
    (9, {"top_p_keep": lambda probs, p: right(9).top_p_keep(probs, p).astype(int)}, "type of what is returned"),
    (10, {"check_names": lambda needed, found: None}, "is a ValueError raised: got False, wanted True"),
    (10, {"check_names": missing_only}, "is a ValueError raised"),
    (10, {"check_names": first_only}, "wanted ['q.bias'] in it too"),
    (10, {"check_names": name_everything}, "wanted nothing about ['q.weight']"),
    (10, {"check_names": by_number_of_tensors}, "wanted ['q.weight', 'q.bias'] in it too"),
    (10, {"check_names": key_error}, "got KeyError ('q.weight'), wanted a ValueError or nothing"),
    (10, {"check_names": number_of_elements}, "is a ValueError raised"),
    (10, {"check_names": names_without_shapes}, "wanted ['(3, 2)'] in it too"),
    (11, {"apply_tp_to_mlp": lambda layer, tp: None}, "does down_proj sum over the ranks"),
    (11, {"apply_tp_to_mlp": patch_with(down=ColumnParallelLinear)}, "does down_proj sum"),
    (11, {"apply_tp_to_mlp": patch_with(up=RowParallelLinear)}, "shape of up_proj.weight on rank 0 of 2"),
    (11, {"apply_tp_to_mlp": patch_with(reduce_results=False)}, "does down_proj sum"),
    (11, {"apply_tp_to_mlp": patch_with(biases=False)}, "with biases"),
    (11, {"apply_tp_to_mlp": gate_for_up}, "is the whole MLP's output"),
    (12, {"num_blocks": lambda free, *shape: min(free) // (block_bytes(*shape) // 2)}, "one rank"),
    (12, {"num_blocks": lambda free, *shape: min(free) // block_bytes(*shape)}, "each of two ranks holds half"),
    (12, {"num_blocks": lambda free, *shape: free[0] // (block_bytes(*shape) // min(len(free), shape[2]))}, "the least memory"),
    (12, {"num_blocks": lambda free, *shape: free[-1] // (block_bytes(*shape) // min(len(free), shape[2]))},
     "it may be any of them"),
    (12, {"num_blocks": lambda free, *shape: sum(free) // block_bytes(*shape)}, "more ranks than KV heads"),
    (12, {"num_blocks": lambda free, *shape: min(free) // (block_bytes(*shape) // len(free))}, "more ranks than KV heads"),
    (12, {"num_blocks": lambda free, *shape: min(free) / (block_bytes(*shape) // min(len(free), shape[2]))}, "wanted 5461"),
    (12, {"num_blocks": lambda free, size, layers, kv, d, b: min(free) // block_bytes(size, layers, kv // len(free), d, b)},
     "got ZeroDivisionError"),
    (12, {"num_blocks": lambda free, *shape: min(free) // block_bytes(*shape[:2], max(1, shape[2] // len(free)), *shape[3:]) or 1},
     "not enough for one"),
    (12, {"num_blocks": lambda free, *shape: float(right(12).num_blocks(free, *shape))}, "got 5461.0, wanted 5461"),
]  # fmt: skip


@pytest.mark.parametrize(("number", "instead", "words"), WRONG)
def test_a_plausible_wrong_answer_is_caught(number, instead, words):
    answer = SimpleNamespace(
        **{name: value for name, value in vars(right(number)).items() if callable(value)} | instead
    )
    said = outcome(number, answer)
    assert said.startswith("not yet: ")
    assert words in said
    assert "got " in said
    assert "\n" not in said


def test_an_exercise_with_one_function_left_is_started(tmp_path, monkeypatch):
    text = Path(module_of(8).__file__).read_text(encoding="utf-8")
    half = text.replace("raise NotImplementedError  # your turn", "running.pop()", 1)
    (tmp_path / "half_done.py").write_text(half, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert outcome(8, importlib.import_module("half_done")) == "not yet: tokens_of_next_step still to be written"
    assert outcome(8, module_of(8)) == "not started"


def test_every_exercise_has_wrong_answers_that_are_caught():
    assert all(sum(number == n for number, *_ in WRONG) >= 5 for n in EXERCISES.numbers)
