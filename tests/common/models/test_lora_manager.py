"""Adapters of a rank: loaded, placed, freed, forgotten; and what is refused, in one line."""

import numpy as np
import pytest
import torch

from common.layers.communicator import LayerCommunicator
from common.layers.linear import LinearBase
from common.layers.lora import ALL_TARGETS, TARGETS
from common.layers.vocab import VocabParallelEmbedding
from common.models.lora_manager import LoRAManager, LoRAOptions
from common.models.stages import Stage
from common.models.weights import load_model
from common.parallel_state import TPGroup
from tests.adapters import save_adapter
from tests.common.models.dense import logits_of
from tests.oracle import SMALL

IDS = [3, 900, 17, 17, 4]


def manager_of(folder, options=None, tp=None, **more):
    model, _ = load_model(folder, tp or TPGroup(), **more)
    return model, LoRAManager(model, options or LoRAOptions(max_loras=2, max_rank=4), folder)


def logits(model, manager, slot):
    rows = manager.rows(np.full(len(IDS), slot))
    inner = model.forward
    model.forward = lambda *args: inner(*args, adapters=rows)
    try:
        return logits_of(model, IDS)
    finally:
        model.forward = inner


@pytest.fixture
def adapter(checkpoint, tmp_path):
    return save_adapter(checkpoint("llama"), tmp_path / "one")


def test_a_slot_has_the_adapter_that_was_placed_there_last(checkpoint, adapter, tmp_path):
    folder = checkpoint("llama")
    model, manager = manager_of(folder)
    manager.load(7, adapter)
    manager.load(8, save_adapter(folder, tmp_path / "two", seed=2, r=1))
    plain = logits(model, manager, 0)
    manager.place(7, 1)
    first = logits(model, manager, 1)
    assert not torch.allclose(first, plain)
    assert torch.equal(logits(model, manager, 2), plain)  # nobody is there
    manager.place(7, 2)
    assert torch.equal(logits(model, manager, 2), first)
    manager.place(8, 1)
    second = logits(model, manager, 1)
    assert not torch.allclose(second, first)
    assert manager.placed == {1: 8, 2: 7}
    manager.free(1)
    assert torch.equal(logits(model, manager, 1), plain)
    manager.unload(7)
    assert torch.equal(logits(model, manager, 2), plain)
    assert (manager.placed, list(manager.loaded)) == ({}, [8])


def test_a_rank_keeps_its_part_of_an_adapter(checkpoint, adapter):
    folder = checkpoint("llama")
    whole = manager_of(folder)[1].read(adapter)

    def kept(ranks):
        _, manager = manager_of(folder, tp=TPGroup(0, ranks))
        manager.load(1, adapter)
        return sum(t.a.nbytes + t.b.nbytes for _, parts in manager.loaded[1] for t in parts.values())

    assert kept(1) == whole.nbytes
    assert (
        whole.nbytes / 2 < kept(2) < 0.8 * whole.nbytes
    )  # A of column-parallel and B of row-parallel layers are on every rank


def test_a_stage_keeps_its_layers_and_checks_all(checkpoint, adapter):
    folder = checkpoint("llama")
    _, manager = manager_of(folder, stage=Stage(1, 3, None))
    manager.load(1, adapter)
    names = {slots.layer.name for slots, _ in manager.loaded[1]}
    assert names == {f"layers.1.{part}" for part in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")}
    assert manager.read(adapter).modules.keys() == {
        f"model.layers.{i}.{'self_attn' if name in 'q_proj k_proj v_proj o_proj' else 'mlp'}.{name}"
        for i in range(3) for name in TARGETS
    }  # fmt: skip


def test_slots_are_where_the_targets_say(checkpoint):
    def layers_with(targets):
        model, _ = manager_of(checkpoint("llama"), LoRAOptions(1, 4, targets))
        found = [
            m for m in model.modules() if isinstance(m, LinearBase | VocabParallelEmbedding) and m.lora is not None
        ]
        return {layer.name.rpartition(".")[2] for layer in found}

    assert layers_with(TARGETS) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert layers_with(("v_proj",)) == {"qkv_proj"}
    assert layers_with(ALL_TARGETS) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens", "lm_head"}


def test_experts_have_no_slots_and_adapters_are_no_parameters(checkpoint):
    model, manager = manager_of(checkpoint("qwen2_moe"))
    before = dict(load_model(checkpoint("qwen2_moe"), TPGroup())[0].named_parameters())
    assert dict(model.named_parameters()).keys() == before.keys()
    config = SMALL["qwen2_moe"]
    dense = config.num_hidden_layers // 2  # every second layer has experts, and a shared one, which has no slots either
    assert len(manager.slots) == 2 * config.num_hidden_layers + 2 * dense


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_loras": 0}, "max_loras=0 must be an integer of at least 1"),
        ({"max_rank": 2.0}, r"max_rank=2\.0 must be an integer"),
        ({"targets": ("q_proj", "c_attn")}, "LoRA targets c_attn; it can have q_proj, "),
        ({"targets": ()}, "LoRA targets nothing; it can have"),
        ({"backend": "punica"}, "lora_backend='punica' is unknown; use auto, torch_native, triton"),
    ],
)
def test_options_that_cannot_be_are_one_line(checkpoint, options, says):
    with pytest.raises(ValueError, match=says):
        manager_of(checkpoint("llama"), LoRAOptions(**options))


def test_latent_attention_and_spread_rows_are_refused_by_name(checkpoint):
    with pytest.raises(ValueError, match="enable_lora: DeepseekV2ForCausalLM has latent attention"):
        manager_of(checkpoint("deepseek_v2"))
    tp = TPGroup(0, 2)
    with pytest.raises(ValueError, match="enable_lora with enable_layernorm_sp, attn_dp_size or cp_size"):
        manager_of(checkpoint("llama"), tp=tp, communicator=LayerCommunicator(tp, enable_layernorm_sp=True))


def test_what_is_asked_of_adapters_that_are_not_there_is_one_line(checkpoint, adapter):
    _, manager = manager_of(checkpoint("llama"))
    manager.load(1, adapter)
    for ask, says in (
        (lambda: manager.load(1, adapter), "adapter 1 is loaded already"),
        (lambda: manager.place(2, 1), "adapter 2 is not loaded; loaded: 1"),
        (lambda: manager.unload(2), "adapter 2 is not loaded; loaded: 1"),
        (lambda: manager.place(1, 3), "slot 3 is not there; slots are 1 .. 2"),
        (lambda: manager.place(1, 0), "slot 0 is not there; slots are 1 .. 2"),
        (lambda: manager.free(0), "slot 0 is not there; slots are 1 .. 2"),
    ):
        with pytest.raises(ValueError, match=says):
            ask()


def test_a_load_that_fails_keeps_nothing(checkpoint, adapter):
    _, manager = manager_of(checkpoint("llama"))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors is missing"):
        manager.load(1, adapter)
    assert not manager.loaded


def test_a_step_without_adapters_has_no_argument(checkpoint):
    _, manager = manager_of(checkpoint("llama"))
    assert manager.rows(None) is None
    assert manager.rows(np.zeros(4, dtype=np.int64)) is None
