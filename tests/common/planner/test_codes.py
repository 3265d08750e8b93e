"""What the planner says a rank holds of a quantized model, against the layers of the loaded one, to the byte."""

from dataclasses import replace

import pytest
import torch

from common.distributed.layout import Layout
from common.distributed.machines import Machine
from common.distributed.plan import quantized
from common.models import quantized_tensors
from common.models.config import ModelConfig
from common.models.published_configs import model_shape
from common.models.quantized_tensors import weight_bytes
from common.models.stages import Stage as OneStage
from common.models.weights import load_model
from common.parallel_state import TPGroup
from common.planner import codes
from common.planner.bounds import bound
from common.planner.codes import saved_by_codes
from common.planner.holdings import of_stage, stages
from common.planner.plan import Load, Way
from common.planner.work import Step, messages, work
from common.quantization import linear_methods
from common.quantization.cpu_methods import HalfCodes
from common.quantization.make import config_of, make
from common.quantization.method import Hardware
from common.tiny_qwen import TINY_QWEN_PATH
from tests.common.quantization.checkpoints import FORMATS, quantise_folder

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
H100, A100, CPU = Hardware("cuda", (9, 0)), Hardware("cuda", (8, 0)), Hardware("cpu")
LOAD = Load(context=64, batch=2)
MADE = {
    "awq": {"group_size": 32}, "gptq": {"group_size": 64}, "w4a16": {"group_size": -1}, "mxfp4": {}, "fp8": {}, "fp8-block": {},
    "w8a8_int8": {}, "fp8-dynamic": {}, "at load: fp8": {}, "at load: w8a8_int8": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(name) -> (folder of the bundled model in that format, what it is to be rounded to at load)."""
    folders = {}

    def get(name):
        if name.startswith("at load: "):
            return TINY_QWEN_PATH, name.removeprefix("at load: ")
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("made") / name
            make(TINY_QWEN_PATH, folders[name], config_of(name, **MADE[name]))
        return folders[name], None

    return get


def compare(monkeypatch, folder, asked, on, dtype, ranks, pp=1):
    """A layer packs its codes on any device: only who multiplies by them needs the GPU."""
    monkeypatch.setattr(quantized_tensors.Hardware, "of", lambda device: on)
    config = quantized(ModelConfig.from_folder(folder), asked, str(folder))
    way, load = Way(Layout(ranks, pp)), replace(LOAD, dtype=dtype, hardware=on)
    for number, stage in enumerate(stages(config, pp)):
        held = [
            weight_bytes(load_model(folder, TPGroup(rank, ranks), dtype, stage=OneStage(number, pp), quantization=asked)[0])
            for rank in range(ranks)
        ]  # fmt: skip
        assert of_stage(config, way, load, stage).weights == max(held), (ranks, number)
    return saved_by_codes(config, way, stages(config, pp)[0], load)


@pytest.mark.parametrize(("name", "ranks"), [*((name, 3) for name in MADE), ("awq", 1), ("fp8-block", 4)])
def test_on_a_gpu_a_rank_holds_what_its_layers_pack(monkeypatch, made, name, ranks):
    assert compare(monkeypatch, *made(name), H100, torch.bfloat16, ranks) > 0


@pytest.mark.parametrize(("model", "name"), [
    ("qwen3", "fp8 odd block"), ("llama", "gptq"), ("llama", "gptq desc_act"), ("llama", "mixed"), ("llama", "pack 4"),
    ("qwen2_moe", "int8"), ("deepseek_v2", "fp8 block"), ("deepseek_v3", "gptq 3"),
])  # fmt: skip
def test_groups_that_no_cut_respects_shared_experts_and_latent_attention(
    monkeypatch, checkpoint, tmp_path, model, name
):
    folder, _ = quantise_folder(checkpoint(model), tmp_path, FORMATS[name])
    compare(monkeypatch, folder, None, H100, torch.bfloat16, 3)


@pytest.mark.parametrize("name", ["fp8", "fp8-block", "gptq"])
def test_a_gpu_without_fp8_holds_what_it_multiplies(monkeypatch, made, name):
    saved = compare(monkeypatch, *made(name), A100, torch.bfloat16, 2)
    assert (saved > 0) == (name == "gptq"), "rounded in floats: nothing is smaller"


@pytest.mark.parametrize("name", ["w8a8_int8", "gptq", "at load: fp8"])
def test_on_this_cpu_large_matrices_alone_are_codes(monkeypatch, made, name):
    assert compare(monkeypatch, *made(name), CPU, torch.float32, 2) == 0
    monkeypatch.setattr(linear_methods, "SMALLEST", 224 * 200)
    clear()
    try:
        saved = compare(monkeypatch, *made(name), CPU, torch.float32, 2, 2)
    finally:
        clear()
    assert (saved > 0) == (name != "gptq" and HalfCodes.works())


def clear():
    codes._saved.cache_clear()
    codes._saved_by_matrix.cache_clear()


def test_a_head_of_codes_lies_with_the_last_stage(monkeypatch, checkpoint, tmp_path):
    make(checkpoint("llama"), tmp_path / "head", config_of("gptq", group_size=32, lm_head=True))
    compare(monkeypatch, tmp_path / "head", None, H100, torch.bfloat16, 3, 2)


def test_a_config_may_leave_some_layers_plain(monkeypatch, tmp_path):
    said = config_of("w4a16", group_size=32)
    said["ignore"] += ["re:.*layers.0.*", "model.layers.1.mlp.down_proj"]
    make(TINY_QWEN_PATH, tmp_path / "some", said)
    compare(monkeypatch, tmp_path / "some", None, H100, torch.bfloat16, 2, 2)


def test_messages_are_the_same_and_a_token_is_bound_by_the_bytes_that_are_left():
    plain, load = model_shape("Qwen2.5-7B"), Load(context=1024, batch=8, kv_dtype=torch.int4)
    coded, way = quantized(plain, "awq", "here"), Way(Layout(2))
    stage, step = stages(coded, 1)[0], Step(rows=8, known=1024, emits=8, decode=True)
    assert messages(coded, way, stage, load, step) == messages(plain, way, stage, load, step)
    a, b = (work(one, way, stage, load, step) for one in (plain, coded))
    assert a.weights - b.weights == saved_by_codes(coded, way, stage, load)
    assert (a.kv, a.flops) == (b.kv, b.flops)
    slow, fast = (bound(one, way, load, Machine.of_gpus("H100"), 10**12) for one in (plain, coded))
    assert slow.parts["weights"] / fast.parts["weights"] == pytest.approx(a.weights / b.weights)
    whole = work(plain, way, stage, replace(load, kv_dtype=torch.bfloat16), step).kv
    assert whole / a.kv == 2 * 128 / (64 + 2), "two bytes a number; half of one, and a scale of two for 128"
