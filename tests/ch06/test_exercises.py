"""The checks of the exercises: they pass the solutions, catch wrong answers, and leave a fresh clone green."""

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ch06_tp_vllm.exercises.check import module_of, outcome
from ch06_tp_vllm.exercises.checks import CHECKS
from common.layers.linear import ColumnParallelLinear, RowParallelLinear
from common.models.weights import TensorSource

FOLDER = Path(__file__).parents[2] / "ch06_tp_vllm" / "exercises"


@pytest.mark.parametrize("number", CHECKS)
def test_my_answer(number):
    """The reader's own: skipped until it is started."""
    said = outcome(number, module_of(number))
    if said == "not started":
        pytest.skip(said)
    assert said == "passed"


@pytest.mark.parametrize("number", CHECKS)
def test_the_solution_passes(number):
    assert outcome(number, module_of(number, solutions=True)) == "passed"


@pytest.mark.parametrize("number", CHECKS)
def test_the_anatomy_is_the_same_everywhere(number):
    text = Path(module_of(number).__file__).read_text(encoding="utf-8")
    assert re.match(rf'"""Exercise {number}: .+ \(\d\d minutes\)\.\n\nRead  .+\nEdit  this file\nTest  python -m '
                    rf"ch06_tp_vllm.exercises.check {number}\n", text)  # fmt: skip
    assert "raise NotImplementedError  # your turn" in text
    for file in re.search(r"Read  (.+)\n", text).group(1).replace(";", ",").split(","):
        name = file.strip().split(" ")[0]
        if name.endswith(".py"):
            assert (FOLDER.parents[1] / name).exists() or (FOLDER.parent / name).exists(), name


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


WRONG = [
    (1, {"partial_sums": bias_everywhere}),
    (1, {"partial_sums": bias_divided}),
    (2, {"merged_shard": cut_the_stack}),
    (2, {"merged_shard": interleaved}),
    (3, {"kv_heads_of": lambda rank, ranks, q, kv: [rank % kv]}),
    (3, {"kv_heads_of": lambda rank, ranks, q, kv: list(range(kv))}),
    (4, {"slot_mapping": lambda table, start, stop, size: [table[i // size] * size + i - start for i in range(start, stop)]}),
    (4, {"slot_mapping": lambda table, start, stop, size: list(range(table[start // size] * size + start % size,
                                                                     table[start // size] * size + start % size + stop - start))}),
    (5, {"block_hashes": no_parent}),
    (5, {"computed_tokens": no_cap}),
    (5, {"computed_tokens": any_hit}),
    (6, {"free_request": head_first}),
    (6, {"free_request": free_all}),
    (7, {"give_out": lambda running, waiting, budget: right(7).give_out(waiting, running, budget)}),
    (7, {"give_out": whole_prompts_only}),
    (7, {"give_out": lambda running, waiting, budget: running + waiting}),
    (8, {"preempt": to_the_tail}),
    (8, {"preempt": forget_output}),
    (8, {"tokens_of_next_step": decodes_if_it_has_output}),
    (8, {"tokens_of_next_step": prompt_only}),
    (8, {"tokens_of_next_step": last_if_it_answers}),
    (9, {"top_p_keep": mass_up_to_p}),
    (9, {"top_p_keep": one_too_many}),
    (10, {"check_names": lambda needed, found: None}),
    (10, {"check_names": missing_only}),
    (10, {"check_names": first_only}),
    (10, {"check_names": name_everything}),
    (11, {"apply_tp_to_mlp": lambda layer, tp: None}),
    (11, {"apply_tp_to_mlp": patch_with(down=ColumnParallelLinear)}),
    (11, {"apply_tp_to_mlp": patch_with(up=RowParallelLinear)}),
    (11, {"apply_tp_to_mlp": patch_with(reduce_results=False)}),
    (11, {"apply_tp_to_mlp": patch_with(biases=False)}),
    (11, {"apply_tp_to_mlp": gate_for_up}),
    (12, {"num_blocks": lambda free, *shape: min(free) // (block_bytes(*shape) // 2)}),
    (12, {"num_blocks": lambda free, *shape: min(free) // block_bytes(*shape)}),
    (12, {"num_blocks": lambda free, *shape: free[0] // (block_bytes(*shape) // min(len(free), shape[2]))}),
    (12, {"num_blocks": lambda free, *shape: sum(free) // block_bytes(*shape)}),
    (12, {"num_blocks": lambda free, *shape: min(free) // (block_bytes(*shape) // len(free))}),
    (12, {"num_blocks": lambda free, *shape: min(free) / (block_bytes(*shape) // min(len(free), shape[2]))}),
]  # fmt: skip


@pytest.mark.parametrize(("number", "instead"), WRONG)
def test_a_plausible_wrong_answer_is_caught(number, instead):
    answer = SimpleNamespace(
        **{name: value for name, value in vars(right(number)).items() if callable(value)} | instead
    )
    assert outcome(number, answer).startswith("not yet: ")


def test_an_exercise_with_one_function_left_is_started(tmp_path, monkeypatch):
    text = Path(module_of(8).__file__).read_text(encoding="utf-8")
    half = text.replace("raise NotImplementedError  # your turn", "running.pop()", 1)
    (tmp_path / "half_done.py").write_text(half, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert outcome(8, importlib.import_module("half_done")) == "not yet: tokens_of_next_step still to be written"
    assert outcome(8, module_of(8)) == "not started"


def test_every_exercise_has_a_wrong_answer_that_is_caught():
    assert {number for number, _ in WRONG} == set(CHECKS)
