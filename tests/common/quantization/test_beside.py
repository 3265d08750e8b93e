"""Quantized weights beside what else a model has: adapters, new weights, stages of a pipeline, sums of what it holds."""

import pytest
import torch

from common.kernels.quantized_layout import numbers
from common.layers.moe import AUTO
from common.models.held_weights import checksums, whole_tensor
from common.models.new_weights import stage_checkpoint, stage_tensors
from common.models.quantized_tensors import codes_of
from common.models.stages import Stage
from common.models.weights import load_model
from common.models.weights_digest import weights_digest
from common.parallel_state import TPGroup
from common.quantization import linear_methods
from common.quantization.cpu_methods import HalfCodes
from common.quantization.packed_codes import CodesInMemory
from tests.adapters import greedy_with, save_adapter
from tests.common.models.files import rewrite
from tests.common.quantization.checkpoints import FORMATS, quantise_folder
from tests.common.quantization.test_checkpoints import check
from tests.common.test_executor import prompts_of
from tests.common.test_lora import NEW, answer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def folders(checkpoint, tmp_path_factory):
    return quantise_folder(checkpoint("qwen2"), tmp_path_factory.mktemp("quantized") / "qwen2", FORMATS["fp8 block"])


def kept(folder, **more):
    return load_model(folder, TPGroup(), quantized_compute="weight_only", **more)[0]


@pytest.mark.parametrize("codes", [False, True])
def test_adapters_add_to_quantized_layers_what_they_add_to_plain_ones(folders, codes, monkeypatch, tmp_path):
    quantized, plain = folders
    monkeypatch.setitem(linear_methods.LINEAR_METHODS, "weight_only", (CodesInMemory,))
    monkeypatch.setattr(CodesInMemory, "unasked", codes)
    monkeypatch.setattr(linear_methods, "SMALLEST", 0)
    adapter = save_adapter(plain, tmp_path / "one")
    prompts = prompts_of(9, 21)
    out, _ = answer(1, 1, quantized, [adapter], prompts, [1, 0], 16)
    assert out[0] == greedy_with(plain, adapter, prompts[0], NEW)


def test_every_stage_of_a_pipeline_has_its_own_codes(folders, keeps_codes):
    quantized, plain = folders
    for rank in range(2):
        stage = Stage(rank, 2, None)
        got, want = kept(quantized, stage=stage), load_model(plain, TPGroup(), stage=stage)[0]
        assert codes_of(got)
        for name, layer in codes_of(got).items():
            assert torch.equal(numbers(layer.method.packed, torch.float32), want.get_parameter(f"{name}.weight"))


def test_dequantised_weights_may_be_replaced_and_codes_may_not(folders, keeps_codes):
    quantized, plain = folders
    model, _ = load_model(quantized, TPGroup())
    new = {Q: torch.ones(112, 112)}
    stage_tensors(model, new, torch.float32, AUTO, "here").write()
    assert model.get_parameter(Q.replace("q_proj", "qkv_proj"))[:112].eq(1).all()
    stage_checkpoint(model, quantized, torch.float32, Stage(), AUTO).write()  # the same checkpoint again
    check(model, load_model(plain, TPGroup())[0])
    for refused, way_out in (
        (kept(quantized), "kept as codes .*; start the engine with quantized_compute=dequantise"),
        (
            load_model(plain, TPGroup(), quantization="fp8")[0],
            "rounded at load .*; start the engine without quantization",
        ),
    ):
        for stage in (lambda m: stage_tensors(m, new, torch.float32, AUTO, "here"),
                      lambda m: stage_checkpoint(m, quantized, torch.float32, Stage(), AUTO)):  # fmt: skip
            with pytest.raises(ValueError, match=way_out):
                stage(refused)


def test_what_a_rank_holds_is_summed_and_told(folders, keeps_codes):
    quantized, plain = folders
    one, other = kept(quantized), kept(quantized)
    sums = checksums(one)
    assert sums == checksums(other)
    assert "model.layers.0.self_attn.qkv_proj.q" in sums
    other.model.layers[0].self_attn.qkv_proj.scale.mul_(2)
    assert sums != checksums(other)
    with pytest.raises(ValueError, match="kept as codes"):
        whole_tensor(one, Q, (112, 112), AUTO, TPGroup())
    model, _ = load_model(quantized, TPGroup())
    assert torch.equal(whole_tensor(model, Q, (112, 112), AUTO, TPGroup()), load_model(plain, TPGroup())[0].get_parameter(
        Q.replace("q_proj", "qkv_proj"))[:112])  # fmt: skip


@pytest.mark.skipif(not HalfCodes.works(), reason="this build of torch has no float16 kernel for this CPU")
def test_codes_that_torch_has_packed_are_told_apart(checkpoint, tmp_path):
    """With the same scales: pages on a disk are found by the digest of the weights that have made them."""
    folder, _ = quantise_folder(checkpoint("qwen2"), tmp_path, FORMATS["int8"])
    told = []
    for change in (lambda x: x, lambda x: x, lambda x: x[Q].neg_()):
        rewrite(folder, change)
        model = kept(folder)
        told.append((weights_digest(model), checksums(model)))
    assert told[0] == told[1]
    assert told[1][0] != told[2][0]
    assert {name for name in told[1][1] if told[1][1][name] != told[2][1][name]} == {
        "model.layers.0.self_attn.qkv_proj.digest"
    }
