"""Published layouts of EAGLE heads: each tensor is used, or the load fails with names and numbers, in one line."""

import pytest
import torch

from common.attention.torch_native import TorchNativeAttention
from common.models.drafters.contract import DraftOptions, Target
from common.models.drafters.eagle import EagleDrafter
from common.models.drafters.eagle_head import load_head
from common.models.weights import load_model
from common.parallel_state import TPGroup
from tests.common.models.drafters.eagle_files import DRAFT_VOCAB, change_tensors, save_head


@pytest.fixture
def load(checkpoint, tmp_path):
    """load(version, change, **config) -> what load_head returns of a head whose tensors were changed."""

    def call(version, change=None, stored=None, **config):
        target, tp = checkpoint("qwen2"), TPGroup()
        folder = save_head(tmp_path / "head", stored or version, target, **config)
        if change:
            change_tensors(folder, change)
        model, _ = load_model(target, tp)
        known = Target(model, tp, TorchNativeAttention, torch.float32, torch.float32, 4, 4, 512)
        return load_head(folder, version, known, steps=3)

    return call


@pytest.mark.parametrize("version", [1, 3])
def test_a_published_layout_fills_every_parameter(load, version):
    head, config, ids = load(version)
    assert all(p.abs().sum() > 0 for p in head.parameters())
    assert config.features == {1: (), 3: (2, 1, 0)}[version]
    assert (ids is None) == (version == 1)


def test_d2t_holds_offsets(load):
    stored = {}
    _, _, ids = load(3, stored.update)
    assert ids.tolist() == stored["t2d"].nonzero().flatten().tolist()


def test_layers_are_numbered_by_their_output(load):
    _, config, _ = load(3, **hears(0, 1, 0))
    assert config.features == (1, 2, 1)


def test_the_target_s_head_serves_a_head_without_one(load):
    def drop(tensors):
        for name in ("lm_head.weight", "d2t", "t2d"):
            del tensors[name]

    head, config, ids = load(3, drop, draft_vocab_size=None)
    assert config.draft_vocab is None
    assert ids is None
    assert not hasattr(head, "lm_head")


def test_biases_of_q_k_v_as_the_config_says(load):
    def add(tensors):
        for name in "qkv":
            key = f"layers.0.self_attn.{name}_proj"
            tensors[f"{key}.bias"] = torch.randn(len(tensors[f"{key}.weight"]))

    head, _, _ = load(1, add, qkv_bias=True)
    assert head.layer.self_attn.qkv_proj.bias.abs().sum() > 0


def remove(name):
    return lambda tensors: tensors.pop(name)


def put(name, *shape, dtype=torch.float32):
    return lambda tensors: tensors.update({name: torch.zeros(shape, dtype=dtype)})


def hears(*layers):
    return {"eagle_config": {"eagle_aux_hidden_state_layer_ids": list(layers)}}


WRONG = {
    "a tensor is missing": (1, remove("fc.weight"), {}, r"1 missing: fc.weight"),
    "a bias is missing": (1, remove("fc.bias"), {}, r"1 missing: fc.bias"),
    "a bias that the config denies": (1, None, {"bias": False}, r"1 unexpected: fc.bias"),
    "a norm that EAGLE has not": (1, put("layers.0.input_layernorm.weight", 112), {}, r"unexpected: layers.0.input_layernorm"),
    "a second layer": (1, put("layers.1.mlp.up_proj.weight", 150, 112), {}, r"unexpected: layers.1.mlp.up_proj"),
    "a second layer in the config": (1, None, {"num_hidden_layers": 2}, r"num_hidden_layers=2; an EAGLE head of one layer"),
    "another width": (1, put("fc.weight", 112, 336), {}, r"fc.weight is \[112, 336\], not \[112, 224\]"),
    "another target": (1, None, {"vocab_size": 1010}, r"vocab_size=1010, but the target's is 1009; give a head of this target"),
    "a wider target": (3, None, {"hidden_size": 224}, r"hidden_size=224, but the target's is 112"),
    "no d2t": (3, remove("d2t"), {}, rf"draft_vocab_size={DRAFT_VOCAB} of vocab_size=1009, but no tensor d2t"),
    "d2t of another length": (3, put("d2t", 7, dtype=torch.int64), {}, rf"d2t is I64 \[7\], not I64 \[{DRAFT_VOCAB}\]"),
    "d2t of another type": (3, put("d2t", DRAFT_VOCAB), {}, rf"d2t is F32 \[{DRAFT_VOCAB}\]"),
    "t2d names others": (3, put("t2d", 1009, dtype=torch.bool), {}, r"t2d and d2t name different tokens"),
    "a smaller vocabulary": (3, None, {"draft_vocab_size": 300}, r"d2t is I64 \[301\], not I64 \[300\]"),
    "no vocabulary": (3, None, {"draft_vocab_size": 0}, r"draft_vocab_size=0 must be an integer from 1 to vocab_size=1009"),
    "two layers to hear": (3, None, hears(0, 1), r"layers 1, 2 of a target of 3"),
    "a layer beyond": (3, None, hears(0, 1, 2), r"layers 1, 2, 3 of a target of 3"),
    "a family that is not there": (1, None, {"architectures": ["GPT2LMHeadModel"]}, r"GPT2LMHeadModel"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_one_line(load, name):
    version, change, config, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as caught:
        load(version, change, **config)
    assert "\n" not in str(caught.value)


def test_ids_themselves_are_no_offsets(load):
    def add_up(tensors):
        tensors["d2t"] = tensors["d2t"] + torch.arange(DRAFT_VOCAB)

    with pytest.raises(ValueError, match=r"d2t leads to .* not to 301 of 0 .. 1008; d2t holds offsets"):
        load(3, add_up)


@pytest.mark.parametrize(("asked", "stored", "use"), [(1, 3, "EAGLE3"), (3, 1, "EAGLE")])
def test_the_other_version_is_named(load, asked, stored, use):
    with pytest.raises(ValueError, match=f"holds an {use} head; use speculative_algorithm={use}"):
        load(asked, stored=stored)


def test_without_a_config_there_is_no_head(checkpoint, tmp_path):
    model, _ = load_model(checkpoint("qwen2"), TPGroup())
    known = Target(model, TPGroup(), TorchNativeAttention, torch.float32, torch.float32, 4, 4, 512)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_head(tmp_path, 1, known, 3)


def test_a_target_with_latent_rows_is_refused_in_a_line(checkpoint):
    model, _ = load_model(checkpoint("deepseek_v2_lite"), TPGroup())
    known = Target(model, TPGroup(), TorchNativeAttention, torch.float32, torch.float32, 4, 4, 512)
    with pytest.raises(
        ValueError, match=r"EAGLE for DeepseekV2ForCausalLM: its pages hold latent rows.*; use NGRAM"
    ) as caught:
        EagleDrafter(DraftOptions("EAGLE", "anywhere", 3, 1, 4), known)
    assert "\n" not in str(caught.value)
