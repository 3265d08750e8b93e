"""Any one number that changes, changes the digest."""

import pytest
import torch
from torch import nn

from common.executor import Executor
from common.layers.cpu_linear import choose_forms
from common.models.weights_digest import weights_digest


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 7, bias=False)).to(torch.bfloat16)


def test_equal_weights_have_equal_digests():
    assert weights_digest(a_model()) == weights_digest(a_model())


@pytest.mark.parametrize("at", [0, 7, 14])
def test_one_number_changes_it(at):
    model = a_model()
    with torch.no_grad():
        model[0].weight.view(-1)[at] += 1
    assert weights_digest(model) != weights_digest(a_model())


def test_two_numbers_that_change_places_change_it():
    model = a_model()
    with torch.no_grad():
        row = model[1].weight.view(-1)
        row[:8] = row[:8].flip(0)
        row[8:16] = torch.cat((row[12:16], row[8:12]))
    assert weights_digest(model) != weights_digest(a_model())


def test_a_name_or_a_type_changes_it():
    assert weights_digest(a_model().float()) != weights_digest(a_model())
    assert weights_digest(nn.ModuleDict({"a": a_model()[1]})) != weights_digest(nn.ModuleDict({"b": a_model()[1]}))


def test_a_tensor_without_memory_counts_by_its_name():
    model = a_model()
    model.register_parameter("weight", nn.Parameter(torch.empty(3, device="meta")))
    assert weights_digest(model) == weights_digest(model)


def test_the_form_that_was_measured_to_be_fast_changes_nothing():
    """With a copy for its head the tied embedding lies in bfloat16."""
    model, seen = Executor(device="cpu", max_total_tokens=64, dtype="float32", skip_tokenizer_init=True).model, {}
    for form in ("row-major", "column-major", "apart", "row-major"):
        choose_forms(model, form)
        seen[weights_digest(model)] = model.model.embed_tokens.weight.dtype
    assert len(seen) == 1
