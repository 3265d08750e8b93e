"""Files that do not fit what the config says: refused by name, on every rank, whoever of them has read it."""

import json
import math

import pytest
import torch

from common.models.weights import load_model
from common.parallel_state import TPGroup
from tests.common.models.files import rewrite
from tests.common.quantization.checkpoints import FORMATS, quantise_folder
from tests.common.test_lora import answer

Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def folder(checkpoint, tmp_path):
    return lambda name: quantise_folder(checkpoint("qwen2"), tmp_path, FORMATS[name])[0]


def change(folder, name, to):
    rewrite(folder, lambda x: x.update({name: to(x[name])}))


def refused(folder, words, ranks=1, **more):
    said = []
    for rank in range(ranks):
        try:
            load_model(folder, TPGroup(rank, ranks), **more)
        except ValueError as error:
            said.append(str(error))
            assert "\n" not in said[-1]
    assert said
    assert all(words in one for one in said), said


@pytest.mark.parametrize(
    ("name", "tensor", "to", "words"),
    [
        ("fp8 block", f"{Q}.weight_scale_inv", lambda x: x[:, :0].contiguous(), f"{Q}.weight_scale_inv is [1, 0], not [1, 1]"),
        ("fp8 odd block", f"{DOWN}.weight_scale_inv", lambda x: x[:, :3].contiguous(), "weight_scale_inv is [3, 3], not [3, 4]"),
        ("fp8 tensor", f"{Q}.weight_scale", lambda x: x.expand(2).clone(), "weight_scale is [2], not [] or [1]"),
        ("fp8 channel", f"{Q}.weight", lambda x: x.view(torch.int8), f"{Q}.weight is I8, not F8_E4M3"),
        ("int8", f"{Q}.weight", lambda x: x.view(torch.uint8), f"{Q}.weight is U8, not I8"),
        ("gptq", f"{Q}.qweight", lambda x: x[:-1].contiguous(), f"{Q}.qweight is [13, 112], not [14, 112]"),
        ("gptq", f"{DOWN}.scales", lambda x: x[:-1].contiguous(), f"{DOWN}.scales is [4, 112], not [5, 112]"),
        ("pack 4", f"{Q}.weight_zero_point", lambda x: x.float(), f"{Q}.weight_zero_point is F32, not I32"),
    ],
)  # fmt: skip
def test_wrong_shapes_and_types_are_named(folder, name, tensor, to, words):
    path = folder(name)
    change(path, tensor, to)
    refused(path, words, ranks=2)


@pytest.mark.parametrize(
    ("name", "change_", "words"),
    [
        ("gptq", lambda x: x.pop(f"{Q}.qzeros"), f"1 missing: {Q}.qzeros"),
        ("gptq", lambda x: x.update({f"{Q}.perm": torch.zeros(1)}), f"1 unexpected: {Q}.perm"),
        ("fp8 block", lambda x: x.update({f"{Q}.weight_scale": torch.ones(1)}), f"1 unexpected: {Q}.weight_scale;"),
        ("fp8 block", lambda x: x.update({f"{Q}.weight": x[f"{Q}.weight"].float()}), f"1 unexpected: {Q}.weight_scale_inv"),
    ],
)  # fmt: skip
def test_tensors_that_nothing_reads_and_parameters_that_nothing_fills_are_named(folder, name, change_, words):
    path = folder(name)
    rewrite(path, change_)
    refused(path, words, ranks=2)


def test_a_bias_that_the_model_has_not_may_be_zeros_in_gptq_alone(folder):
    bias = "model.layers.1.self_attn.o_proj.bias"
    path = folder("gptq")
    rewrite(path, lambda x: x.update({bias: torch.zeros(112, dtype=torch.float16)}))
    load_model(path, TPGroup(1, 2))
    change(path, bias, lambda x: x.index_fill(0, torch.tensor([111]), 1e-3))
    refused(path, f"1 unexpected: {bias}", ranks=2)


def test_words_of_an_older_library_are_refused_by_their_number(folder):
    path = folder("pack 3")
    change(path, f"{Q}.weight_packed", lambda x: torch.cat([x, x[:, :1]], dim=1))  # 10 codes a word: 12 for 112, not 11
    refused(path, f"{Q}.weight_packed is [112, 12], not [112, 11]", ranks=2)


@pytest.mark.parametrize("size", [16, 64, -1])
def test_another_group_size_than_the_files_have_is_named(folder, size):
    path = folder("gptq")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["group_size"] = size
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    refused(path, "scales is [")


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "suffix"),
    [("fp8 block", "weight_scale_inv"), ("int8", "weight_scale"), ("gptq", "scales"), ("pack 4", "weight_scale")],
)
def test_scales_that_are_no_numbers_are_refused(folder, name, suffix, number):
    path = folder(name)

    def spoil(x):
        x.view(-1)[-1] = number
        return x

    change(path, f"{Q}.{suffix}", spoil)
    refused(path, f"{Q}: NaN or infinity in ", ranks=3)


def test_full_precision_that_is_no_number_is_not_rounded(checkpoint, copy):
    path = copy("qwen2")
    rewrite(path, lambda x: x[f"{Q}.weight"].view(-1)[:1].fill_(math.nan))
    refused(path, f"{Q}: NaN or infinity in the weights", quantization="fp8")


def test_what_one_rank_has_found_ends_all(folder, ranks):
    """The last output of q_proj is rank 1's."""
    path = folder("gptq")
    change(path, f"{Q}.scales", lambda x: x.index_fill(1, torch.tensor([111]), math.nan))
    with pytest.raises(AssertionError) as error:
        ranks(2).run(answer, 2, 1, path, [], [[1, 2]], [0], 16, False)
    assert f"rank 1: {Q}: NaN or infinity in" in str(error.value)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"quantization": "awq"}, "quantization='awq', but "),
        ({"quantized_compute": "fast"}, "quantized_compute='fast' is unknown; use auto, dequantise, weight_only, activations"),
    ],
)  # fmt: skip
def test_an_argument_that_does_not_fit_is_one_line(folder, more, words):
    refused(folder("gptq"), words, **more)


def test_a_plain_checkpoint_keeps_no_codes(checkpoint):
    refused(checkpoint("qwen2"), "is not quantized: quantized_compute=weight_only", quantized_compute="weight_only")


@pytest.mark.parametrize("number", [math.nan, math.inf, 0.0, -0.5])
def test_a_scale_of_activations_is_finite_and_above_zero(folder, number):
    path = folder("fp8 tensor static")
    change(path, f"{Q}.input_scale", lambda x: torch.tensor(number))
    refused(path, f"{Q}: input_scale is {number}; ", ranks=2, quantized_compute="activations")


@pytest.mark.parametrize("name", ["gptq", "awq", "int8", "mxfp4"])
def test_words_of_codes_are_not_looked_at_as_numbers(checkpoint, tmp_path, name):
    """A word of eight codes is beyond what float16 holds."""
    path, _ = quantise_folder(checkpoint("llama"), tmp_path, FORMATS[name])
    load_model(path, TPGroup(), torch.float16, check_finite=True)
    rewrite(path, lambda x: x["model.norm.weight"][:1].fill_(math.nan))
    refused(path, "NaN or infinity as float16 in 1 tensors: model.norm.weight", dtype=torch.float16, check_finite=True)
