"""Each format over each number of ranks: what a rank holds of a quantized checkpoint is what it holds of the plain weights that its
codes stand for, bit by bit; in codes, too."""

from itertools import count

import pytest
import torch

from common.kernels.quantized_layout import numbers
from common.layers.moe import Experts, MoEOptions
from common.models.quantized_tensors import codes_of, held_tensors, weight_bytes
from common.models.weights import load_model, load_then_shard
from common.parallel_state import TPGroup
from tests.common.quantization.checkpoints import FORMATS, quantise_folder
from tests.common.test_executor import prompts_of
from tests.common.test_lora import NEW, answer
from tests.oracle import greedy

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
DENSE = {"awq": "llama"}  # its words have 8 outputs: 151 are no number of words
over_ranks = pytest.mark.parametrize("ranks", [1, 2, 3, 4])


@pytest.fixture(scope="module")
def folders(checkpoint, tmp_path_factory):
    """folders(model, format) -> (quantized, plain)."""
    made = {}

    def get(model, name):
        if (model, name) not in made:
            target = tmp_path_factory.mktemp("quantized") / model
            made[model, name] = quantise_folder(checkpoint(model), target, FORMATS[name])
        return made[model, name]

    return get


def check(got, want):
    want = dict(want.named_parameters())
    for own, param in got.named_parameters():
        assert torch.equal(param, want[own]), own


@over_ranks
@pytest.mark.parametrize("name", FORMATS)
def test_a_rank_holds_what_the_codes_stand_for(folders, name, ranks):
    quantized, plain = folders(DENSE.get(name, "qwen2"), name)
    for rank in range(ranks):
        got, report = load_model(quantized, TPGroup(rank, ranks))
        check(got, load_model(plain, TPGroup(rank, ranks))[0])
        assert any("dequantised" in note for note in report.notes)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("qwen3", "fp8 block"), ("llama", "gptq"), ("llama", "mixed"), ("qwen2_moe", "int8"), ("mixtral", "gptq"),
        ("deepseek_v2", "fp8 block"),
    ],
)  # fmt: skip
def test_every_family_is_read_so(folders, model, name):
    """Experts, three tensors of codes each or in other words; latent attention; the router and the head are plain in the files."""
    quantized, plain = folders(model, name)
    for rank in range(3):
        check(load_model(quantized, TPGroup(rank, 3))[0], load_model(plain, TPGroup(rank, 3))[0])


def test_a_rank_reads_codes_of_its_own_experts_alone(folders):
    quantized, plain = folders("qwen3_moe", "fp8 block")
    read = []
    for rank in range(2):
        moe = MoEOptions(ep=TPGroup(rank, 2), moe_tp=TPGroup())
        got, report = load_model(quantized, TPGroup(rank, 2), moe=moe)
        check(got, load_model(plain, TPGroup(rank, 2), moe=moe)[0])
        read.append({name for name in report.tensors if ".experts." in name})
    assert read[0]
    assert not read[0] & read[1]


def test_a_rank_reads_its_slices_and_what_they_are_widened_to(folders):
    """A quarter of the codes, and the groups around them; and no scale of a row that it has not."""
    quantized, _ = folders("llama", "gptq")
    alone = load_model(quantized, TPGroup())[1].bytes_read
    shares = [load_model(quantized, TPGroup(rank, 4))[1].bytes_read / alone for rank in range(4)]
    assert max(shares) < 0.3
    old = load_then_shard(quantized, TPGroup(0, 4))
    assert old[1].bytes_read > 0.95 * alone
    check(old[0], load_model(quantized, TPGroup(0, 4))[0])


@over_ranks
@pytest.mark.parametrize("name", FORMATS)
def test_a_rank_may_keep_the_codes(folders, name, ranks, keeps_codes):
    quantized, plain = folders(DENSE.get(name, "qwen2"), name)
    for rank in range(ranks):
        got, report = load_model(quantized, TPGroup(rank, ranks), quantized_compute="weight_only")
        want, _ = load_model(plain, TPGroup(rank, ranks))
        kept = codes_of(got)
        assert len(kept) == (
            6 if name == "mixed" else 12
        )  # o_proj and down_proj; qkv_proj and gate_up_proj if their parts agree
        assert "kept as codes (codes, widened at each product)" in "".join(report.notes)
        held = held_tensors(got)
        for own, layer in kept.items():
            weight = want.get_parameter(f"{own}.weight")
            assert torch.equal(numbers(layer.method.packed, torch.float32), weight), own
            x, bias = torch.randn(3, weight.shape[1]), torch.randn(len(weight))
            got_y, want_y = layer.method.apply(layer, x, bias), torch.nn.functional.linear(x, weight, bias)
            assert torch.allclose(got_y, want_y, rtol=1e-5, atol=1e-5), own
            assert f"{own}.q" in held
            assert f"{own}.weight" not in held
            if name.startswith("fp8 tensor static"):
                assert set(layer.method.input_scales) == {0.25}
        assert weight_bytes(got) < weight_bytes(want)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("qwen3_moe", "fp8 block"), ("qwen3_moe", "gptq desc_act"), ("qwen3_moe", "pack 4"), ("qwen2_moe", "int-quantized"),
        ("qwen2_moe", "mxfp4"), ("deepseek_v3", "w4afp8"),
    ],
)  # fmt: skip
def test_experts_are_dequantised_or_keep_their_codes(folders, model, name, keeps_codes):
    """On one to four ranks, of each method; columns of an expert are cut inside groups and blocks."""
    quantized, plain = folders(model, name)
    for ranks in (1, 2, 3, 4):
        rank = ranks // 2
        want, _ = load_model(plain, TPGroup(rank, ranks))
        check(load_model(quantized, TPGroup(rank, ranks))[0], want)
        got, _ = load_model(quantized, TPGroup(rank, ranks), quantized_compute="weight_only")
        experts = {own: one for own, one in got.named_modules() if isinstance(one, Experts)}
        assert experts
        for own, one in experts.items():
            for matrices, which in zip(one.matrices, ("w13", "w2"), strict=True):
                weight = want.get_parameter(f"{own}.{which}")
                assert one.get_parameter(which).is_meta
                assert matrices.shape == weight.shape
                assert torch.equal(torch.stack([matrices[slot] for slot in range(len(matrices))]), weight), own
        if (model, ranks) != ("deepseek_v3", 4):  # there six rows of an expert lie in a tile of 64
            assert weight_bytes(got) < weight_bytes(want)


@pytest.mark.parametrize("runner", ["loop", "grouped"])
def test_a_mixture_of_codes_says_what_its_numbers_say(folders, runner, keeps_codes):
    """With an expert that lies twice, and slots that nobody chooses."""
    quantized, plain = folders("qwen3_moe", "pack 4")
    moe = MoEOptions(runner=runner, redundant=2)
    got, _ = load_model(quantized, TPGroup(), moe=moe, quantized_compute="weight_only")
    want, _ = load_model(plain, TPGroup(), moe=moe)
    x = torch.randn(5, got.config.hidden_size)
    for one, other in zip(got.model.layers, want.model.layers, strict=True):
        if one.sparse:
            assert one.mlp.experts.coded
            torch.testing.assert_close(one.mlp(x), other.mlp(x), rtol=1e-5, atol=1e-6)


def test_what_is_merged_and_grouped_apart_is_dequantised(keeps_codes, checkpoint, tmp_path):
    """GPTQ with an order of columns of each matrix's own: a layer of three has no one order."""
    seeds = count()
    quantized, plain = quantise_folder(
        checkpoint("qwen2"), tmp_path, FORMATS["gptq desc_act"], lambda name: next(seeds)
    )
    got, _ = load_model(quantized, TPGroup(), quantized_compute="weight_only")
    assert sorted({name.rpartition(".")[2] for name in codes_of(got)}) == ["down_proj", "o_proj"]
    want, _ = load_model(plain, TPGroup())
    assert torch.equal(got.model.layers[0].self_attn.qkv_proj.weight, want.model.layers[0].self_attn.qkv_proj.weight)


# --- rounded at load


@over_ranks
@pytest.mark.parametrize("name", ["fp8", "w8a8_fp8", "w8a8_int8"])
def test_a_full_precision_checkpoint_is_rounded_alike_by_any_number_of_ranks(checkpoint, folders, name, ranks):
    _, plain = folders("qwen2", "int8" if "int8" in name else "fp8 channel")
    for rank in range(ranks):
        got, _ = load_model(checkpoint("qwen2"), TPGroup(rank, ranks), quantization=name)
        check(got, load_model(plain, TPGroup(rank, ranks))[0])
        assert got.config.quantization.at_load


# --- a model's answers


ANSWERING = {**DENSE, "w4afp8": "deepseek_v3"}  # experts alone have its four bits


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", FORMATS)
def test_greedy_tokens_are_those_of_transformers_on_the_dequantised_weights(size, name, ranks, folders):
    quantized, plain = folders(ANSWERING.get(name, "qwen2"), name)
    prompts = prompts_of(5, 40, 19)
    answers, *_ = ranks(size).run(answer, size, 1, quantized, [], prompts, [0, 0, 0], 16, False)
    assert answers[0] == [greedy(plain, prompt, NEW) for prompt in prompts]
