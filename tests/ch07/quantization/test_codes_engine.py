"""Engines whose weights stay codes on a CPU: the answers of the numbers that the codes stand for, and what else an engine does."""

import pytest
import torch

from ch07_sglang_radix import Engine
from ch07_sglang_radix.experts.rebalancer import Rebalancer
from common.models.quantized_tensors import codes_of, weight_bytes
from tests.common.quantization.checkpoints import FORMATS, quantise_folder
from tests.oracle import greedy

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
PROMPTS, NEW = [[5, 9, 300, 7, 41, 12], list(range(20, 60)), [8]], 8
GREEDY = {"max_new_tokens": NEW, "ignore_eos": True, "temperature": 0.0}


def engine_of(folder, **more) -> Engine:
    return Engine(str(folder), device="cpu", skip_tokenizer_init=True, page_size=4, max_total_tokens=256, **more)


def ask(engine: Engine) -> list[list[int]]:
    return [one["output_ids"] for one in engine.generate(input_ids=PROMPTS, sampling_params=GREEDY)]


@pytest.fixture(scope="module")
def folders(checkpoint, tmp_path_factory):
    return lambda model, name: quantise_folder(checkpoint(model), tmp_path_factory.mktemp("codes"), FORMATS[name])


@pytest.mark.parametrize(
    ("model", "name", "runner"),
    [("qwen3_moe", "pack 4", "grouped"), ("qwen2_moe", "mxfp4", "loop"), ("llama", "fp8 block", "auto"), ("llama", "int8", "auto")],
)  # fmt: skip
def test_tokens_are_those_of_transformers_on_the_dequantised_weights(folders, model, name, runner):
    quantized, plain = folders(model, name)
    want = [greedy(plain, prompt, NEW) for prompt in PROMPTS]
    with engine_of(quantized, quantized_compute="weight_only", moe_runner=runner) as engine:
        held = engine.scheduler.wrapper.model
        assert codes_of(held)
        assert weight_bytes(held) < 4 * sum(param.numel() for param in held.parameters())
        assert ask(engine) == want
        engine.flush_cache()
        engine.release_memory_occupation()
        engine.resume_memory_occupation()
        assert ask(engine) == want


def test_experts_of_codes_do_not_move(folders):
    quantized, _ = folders("qwen3_moe", "pack 4")
    with engine_of(quantized, quantized_compute="weight_only") as engine:
        executor = engine.scheduler.wrapper
        for what, do in (
            ("enable_eplb", lambda: Rebalancer(engine.scheduler, every=10)),
            ("experts that move", lambda: executor.move_experts(executor.placement.physical_to_logical)),
        ):
            with pytest.raises(ValueError, match=f"{what}: this model's experts are kept as codes") as error:
                do()
            assert str(error.value).endswith("start the engine with quantized_compute=auto")
        with pytest.raises(ValueError, match=r"kept as codes .*; start the engine with quantized_compute=dequantise"):
            engine.update_weights_from_tensor({"model.norm.weight": torch.ones(112)})
