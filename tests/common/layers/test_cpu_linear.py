"""Forms of a matrix on a CPU: the same numbers, the same products, whichever is taken."""

import pytest
import torch
import torch.nn.functional as F

from ch07_sglang_radix import Engine
from common.layers import cpu_linear
from common.layers.cpu_linear import FORMS, choose_forms, column_major, fastest, measure, packed, packs, row_major
from common.layers.linear import Apart, MergedColumnParallelLinear, ReplicatedLinear, RowParallelLinear, multiply
from common.models.weights import load_model
from common.parallel_state import TPGroup
from tests.oracle import greedy, some_prompts

KNOWN = [form for form in FORMS if form != "packed" or packs(torch.float32)]
CPU_PACKS = pytest.mark.skipif(not packs(torch.float32), reason="this torch does not pack matrices for this CPU")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(layer):
    layer.weight.data = random(*layer.weight.shape, seed=1)
    if layer.bias is not None:
        layer.bias.data = random(*layer.bias.shape, seed=2)
    return layer


# --- one matrix


@pytest.mark.parametrize("form", KNOWN)
@pytest.mark.parametrize("shape", [(48, 32), (1, 1), (37, 19), (576, 130)])
def test_a_form_keeps_shape_size_and_every_number(shape, form):
    weight = random(*shape)
    stored = FORMS[form](weight)
    assert (stored.shape, stored.nbytes, stored.dtype) == (weight.shape, weight.nbytes, weight.dtype)
    assert torch.equal(row_major(stored), weight)


@pytest.mark.parametrize("form", KNOWN)
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 8, 33])
@pytest.mark.parametrize("bias", [False, True])
def test_a_form_multiplies_as_the_plain_matrix(rows, bias, form):
    wide, weight, b = random(rows, 2 * 96), random(130, 96, seed=1), random(130, seed=2) if bias else None
    x = wide[:, 96:]  # a view, as q, k and v are
    torch.testing.assert_close(multiply(x, FORMS[form](weight), b), F.linear(x, weight, b))


@CPU_PACKS
def test_every_form_is_made_from_every_other():
    weight = random(64, 48)
    for first in (row_major, column_major, packed):
        for second in (row_major, column_major, packed):
            assert torch.equal(row_major(second(first(weight))), weight)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_merged_layers_multiply_apart_as_together(ranks, bias):
    x = random(5, 24)
    for rank in range(ranks):
        layer = filled(MergedColumnParallelLinear(24, (20, 13), TPGroup(rank, ranks), bias))
        together = layer(x)
        layer.method = Apart()
        torch.testing.assert_close(layer(x), together)


def test_ranks_may_take_different_forms():
    x, weight = random(5, 24), random(16, 24, seed=1)
    parts = []
    for rank, form in enumerate((KNOWN[0], KNOWN[-2])):
        layer = RowParallelLinear(24, 16, TPGroup(rank, 2), reduce_results=False)
        layer.weight.data = weight[:, 12 * rank : 12 * rank + 12].clone()
        cpu_linear.take_form(layer, form)
        parts.append(layer(x[:, 12 * rank : 12 * rank + 12]))
    torch.testing.assert_close(sum(parts), F.linear(x, weight))


# --- the choice


def test_the_form_with_the_smallest_product_of_times_is_taken():
    times = {"row-major": (3.0, 3.0, 3.0), "column-major": (1.0, 4.0, 4.0), "packed": (2.0, 2.0, 2.0)}
    assert fastest(times) == "packed"  # 8 < 16 < 27
    assert fastest(times | {"column-major": (1.0, 1.0, 4.0)}) == "column-major"


def test_row_major_stays_unless_another_form_is_clearly_faster():
    assert fastest({"row-major": (1.0, 1.0, 1.0), "packed": (0.95, 0.95, 0.95)}) == "row-major"
    assert fastest({"row-major": (1.0, 1.0, 1.0), "packed": (0.9, 0.9, 0.9)}) == "packed"
    assert fastest({}) == "row-major"


@pytest.mark.parametrize("largest", [1 << 20, 8 << 10])
def test_every_form_is_timed_for_every_number_of_rows(largest, monkeypatch):
    monkeypatch.setattr(cpu_linear, "LARGEST_SAMPLE", largest)
    seconds = measure(random(96, 64), (64, 32), KNOWN, torch.ones(1000, dtype=torch.int64))
    assert list(seconds) == KNOWN
    assert all(len(times) == len(cpu_linear.ROWS) and min(times) > 0 for times in seconds.values())


def test_only_the_first_rows_of_a_large_matrix_are_timed(monkeypatch):
    monkeypatch.setattr(cpu_linear, "LARGEST_SAMPLE", 10 * 64 * 4)
    made = []
    monkeypatch.setitem(FORMS, "row-major", lambda weight: made.append(weight.shape) or weight)
    measure(random(96, 64), (), ["row-major"], torch.ones(10, dtype=torch.int64))
    measure(random(96, 64), (64, 32), ["row-major"], torch.ones(10, dtype=torch.int64))
    assert made == [(10, 64)] * 2 + [(9, 64)] * 2  # two matrices in turn; 10/96 of 64 rows and of 32


def test_each_shape_is_measured_once_and_all_its_layers_take_what_won(checkpoint, monkeypatch):
    model, _ = load_model(checkpoint("llama"), TPGroup())
    asked = []

    def told(plain, sizes, forms, others):
        asked.append((tuple(plain.shape), sizes))
        return {"row-major": (1.0,), "column-major": (0.1 if plain.shape == (176 * 2, 128) else 2.0,)}

    monkeypatch.setattr(cpu_linear, "measure", told)
    monkeypatch.setattr(cpu_linear, "SMALLEST", 0)
    choices = choose_forms(model)
    assert asked == [((192, 128), (128, 32, 32)), ((128, 128), ()), ((352, 128), (176, 176)), ((128, 176), ()),
                     ((1009, 128), (1009,))]  # fmt: skip
    assert [(c.shape, len(c.names), c.form) for c in choices] == [
        ((192, 128), 3, "row-major"), ((128, 128), 3, "row-major"), ((352, 128), 3, "column-major"),
        ((128, 176), 3, "row-major"), ((1009, 128), 1, "row-major"),
    ]  # fmt: skip
    for layer in model.model.layers:
        assert layer.mlp.gate_up_proj.weight.stride() == (1, 352)
        assert layer.mlp.down_proj.weight.is_contiguous()


def test_a_choice_says_what_was_measured(checkpoint, monkeypatch):
    model, _ = load_model(checkpoint("llama"), TPGroup())
    assert str(choose_forms(model)[0]) == "layers.0.qkv_proj[192, 128] x 3: row-major; not measured"
    monkeypatch.setattr(cpu_linear, "SMALLEST", 0)
    monkeypatch.setattr(cpu_linear, "measure", lambda *_: {"row-major": (0.004, 0.005, 0.006), "apart": (1e-3,) * 3})
    said = (
        "layers.0.qkv_proj[192, 128] x 3: apart; ms for 1, 8, 32 rows: row-major 4.00 5.00 6.00, apart 1.00 1.00 1.00"
    )
    assert str(choose_forms(model)[0]) == said


def test_small_matrices_are_not_measured(checkpoint, monkeypatch):
    monkeypatch.setattr(cpu_linear, "measure", lambda *_: pytest.fail("measured"))
    model, _ = load_model(checkpoint("llama"), TPGroup())
    assert {choice.form for choice in choose_forms(model)} == {"row-major"}


def test_what_all_ranks_compute_alike_stays_as_it_is():
    model = torch.nn.ModuleList(
        [filled(ReplicatedLinear(24, 16, TPGroup())), filled(RowParallelLinear(24, 16, TPGroup()))]
    )
    choose_forms(model, "column-major")
    assert model[0].weight.is_contiguous()
    assert not model[1].weight.is_contiguous()


def test_a_form_that_is_not_there_is_refused(checkpoint, monkeypatch):
    model, _ = load_model(checkpoint("llama"), TPGroup())
    with pytest.raises(ValueError, match=r"form='blocked' is not there .*; use row-major, column-major"):
        choose_forms(model, "blocked")
    monkeypatch.setattr(cpu_linear, "packs", lambda dtype: False)
    with pytest.raises(ValueError, match=r"form='packed' is not there for torch.float32 on this CPU; use row-major"):
        choose_forms(model, "packed")


@pytest.mark.parametrize("problem", [AttributeError, NotImplementedError, RuntimeError])
def test_a_torch_that_cannot_pack_does_without(problem, checkpoint, monkeypatch):
    def broken(weight):
        raise problem("no such operator")

    monkeypatch.setattr(cpu_linear, "packed", broken)
    monkeypatch.setattr(cpu_linear, "packs", packs.__wrapped__)
    monkeypatch.setattr(cpu_linear, "SMALLEST", 0)
    model, _ = load_model(checkpoint("llama"), TPGroup())
    for choice in choose_forms(model):
        assert "row-major" in choice.seconds
        assert "packed" not in choice.seconds


def test_a_cpu_without_bfloat16_says_so_in_one_line(checkpoint, monkeypatch):
    monkeypatch.setattr(cpu_linear, "computes_in", lambda dtype: dtype != torch.bfloat16)
    model, _ = load_model(checkpoint("llama"), TPGroup(), torch.bfloat16)
    with pytest.warns(UserWarning, match=r"^this CPU has no instructions for torch.bfloat16; dtype=float32 is faster$"):
        choose_forms(model)


# --- a model


@pytest.mark.parametrize("form", KNOWN)
@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_a_rank_computes_the_same_in_any_form_and_back(name, form, checkpoint):
    for rank in range(2):
        model, _ = load_model(checkpoint(name), TPGroup(rank, 2))
        attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
        attention.o_proj.reduce_results = mlp.down_proj.reduce_results = False  # partial sums: nobody else is there
        x, o = random(5, model.config.hidden_size), random(5, attention.o_proj.weight.shape[1])
        outputs = lambda: (attention.qkv_proj(x), attention.o_proj(o), mlp(x), model.compute_logits(x))  # noqa: B023, E731
        expected = outputs()
        weights = {key: param.clone() for key, param in model.named_parameters()}
        choose_forms(model, form)
        torch.testing.assert_close(outputs(), expected)
        assert {key: param.shape for key, param in model.named_parameters()} == {k: w.shape for k, w in weights.items()}
        choose_forms(model, "row-major")
        torch.testing.assert_close(outputs(), expected, rtol=0, atol=0)
        assert all(torch.equal(param, weights[key]) for key, param in model.named_parameters())


def held(model):
    return sum(x.nbytes for x in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("form", KNOWN)
def test_nothing_is_held_twice_in_an_untied_model(form, checkpoint):
    model, _ = load_model(checkpoint("llama"), TPGroup())
    before = held(model)
    choose_forms(model, form)
    assert held(model) == before


@CPU_PACKS
@pytest.mark.parametrize("exact", [True, False])
def test_a_tied_embedding_keeps_its_rows_in_half_the_bytes_if_that_is_exact(exact, checkpoint):
    model, _ = load_model(checkpoint("qwen2"), TPGroup())
    embedding, head = model.model.embed_tokens, model.lm_head
    if exact:
        embedding.weight.data = embedding.weight.bfloat16().float()
    before, rows = held(model), embedding(torch.arange(1009)).clone()
    choose_forms(model, "packed")
    assert head.weight is embedding.weight
    assert embedding.weight.dtype == (torch.bfloat16 if exact else torch.float32)
    assert embedding(torch.arange(1009)).dtype == torch.float32
    assert torch.equal(embedding(torch.arange(1009)), rows)
    assert held(model) - before == rows.nbytes // (2 if exact else 1)
    choose_forms(model, "row-major")
    assert held(model) == before
    assert torch.equal(head.weight, rows)


@pytest.mark.parametrize("form", KNOWN)
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama"])
def test_tokens_equal_transformers_in_any_form(name, form, checkpoint):
    folder = checkpoint(name)
    prompts = some_prompts(1009, 6, shared=24, longest=16)
    engine = Engine(str(folder), device="cpu")
    choose_forms(engine.wrapper.model, form)
    results = engine.generate(input_ids=prompts, sampling_params={"max_new_tokens": 12, "ignore_eos": True})
    assert [r["output_ids"] for r in results] == [greedy(folder, prompt, 12) for prompt in prompts]
