"""What a config.json says about experts, in old and new spellings, and what is refused."""

import json

import pytest
import torch
from transformers import MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

from common.layers.moe import Mixture
from common.layers.router import RouterRule
from common.models.config import ModelConfig
from common.models.decoder import CausalLM
from common.models.published_configs import MIXTURES, model_shape, published_config
from common.parallel_state import TPGroup

FAMILIES = {
    "Qwen2MoeForCausalLM": Qwen2MoeConfig,
    "Qwen3MoeForCausalLM": Qwen3MoeConfig,
    "MixtralForCausalLM": MixtralConfig,
}
SMALLEST = {
    "vocab_size": 32, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 32,
}  # fmt: skip
every_family = pytest.mark.parametrize("name", FAMILIES)
qwen = pytest.mark.parametrize("name", ["Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"])


def config(name, **changes):
    return ModelConfig.from_dict({**SMALLEST, "architectures": [name], **changes}, where="here")


def refuse(name, words, **changes):
    with pytest.raises(ValueError, match=r"^here: ") as error:
        config(name, **changes)
    assert words in str(error.value)


@every_family
def test_a_config_that_says_nothing_about_experts_means_what_transformers_reads_in_it(name):
    mine, theirs = config(name).mixture, FAMILIES[name](**SMALLEST)
    assert mine.num_experts == theirs.num_experts
    assert mine.router == RouterRule(theirs.num_experts_per_tok, normalise=getattr(theirs, "norm_topk_prob", True))
    assert mine.intermediate_size == getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
    assert mine.shared_size == getattr(theirs, "shared_expert_intermediate_size", 0)
    assert mine.shared_gate == (name == "Qwen2MoeForCausalLM")
    assert mine.sparse == (True,) * 4


def test_every_key_arrives():
    keys = {
        "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True, "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 24, "mlp_only_layers": [3], "decoder_sparse_step": 2,
    }  # fmt: skip
    want = Mixture(6, RouterRule(3), 20, (False, True, False, False), 24, True)
    assert config("Qwen2MoeForCausalLM", **keys).mixture == want


@qwen
@pytest.mark.parametrize(
    ("keys", "sparse"),
    [
        ({"decoder_sparse_step": 1}, (True, True, True, True)),
        ({"decoder_sparse_step": 2}, (False, True, False, True)),
        ({"decoder_sparse_step": 3}, (False, False, True, False)),
        ({"mlp_only_layers": [0, 2, 9, -1]}, (False, True, False, True)),
        ({"mlp_only_layers": [1], "decoder_sparse_step": 2}, (False, False, False, True)),
        ({"mlp_only_layers": None}, (True, True, True, True)),
    ],
)
def test_which_layers_have_experts(name, keys, sparse):
    assert config(name, **keys).mixture.sparse == sparse


@qwen
def test_without_a_sparse_layer_there_is_no_mixture(name):
    assert config(name, decoder_sparse_step=5).mixture is None


@every_family
@pytest.mark.parametrize("spelled", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_the_number_of_experts_is_read_under_each_of_its_names(name, spelled):
    assert config(name, **{spelled: 9}).mixture.num_experts == 9


@every_family
def test_two_names_of_the_number_of_experts_must_agree(name):
    assert config(name, num_experts=9, num_local_experts=9).mixture.num_experts == 9
    refuse(name, "num_experts=9 and num_local_experts=8 are two names of one size", num_experts=9, num_local_experts=8)
    refuse(name, "num_local_experts=9 and n_routed_experts=8 are two", num_local_experts=9, n_routed_experts=8)


@every_family
def test_what_transformers_saves_is_read(name, tmp_path):
    family = FAMILIES[name](**SMALLEST, num_experts=9, architectures=[name])
    family.save_pretrained(tmp_path)
    assert ("num_experts" in json.loads((tmp_path / "config.json").read_text())) == (name == "Qwen2MoeForCausalLM")
    assert ModelConfig.from_folder(tmp_path).mixture.num_experts == 9


@every_family
@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok=5 is more than there are experts, num_experts=4"),
        ({"num_experts": 0}, "num_experts=0 must be an integer of at least 1"),
        ({"num_local_experts": "8"}, "num_local_experts='8' must be an integer of at least 1"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0 must be an integer of at least 1"),
        ({"num_hidden_layers": 1 << 40}, "a mixture of experts has at most 65536 here"),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be_are_refused(name, keys, words):
    refuse(name, words, **keys)


def test_windows_are_refused():
    refuse("MixtralForCausalLM", "sliding_window=4096 is not supported; supported: null", sliding_window=4096)
    for name in ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"):
        refuse(name, "use_sliding_window=true is not supported", use_sliding_window=True)
        assert config(name, use_sliding_window=False, sliding_window=4096, max_window_layers=1).mixture


def test_gpt_oss_is_refused_with_the_reason():
    refuse(
        "GptOssForCausalLM",
        "architecture GptOssForCausalLM is not supported (its heads have attention sinks and every other",
    )


@pytest.mark.parametrize("given", [True, False])
def test_biases_are_where_the_family_has_them(given):
    qwen2, qwen3 = config("Qwen2MoeForCausalLM", qkv_bias=given), config("Qwen3MoeForCausalLM", attention_bias=given)
    mixtral = config("MixtralForCausalLM", attention_bias=given)  # a key that MixtralConfig does not have
    assert (qwen2.qkv_bias, qwen2.o_bias) == (given, False)
    assert (qwen3.qkv_bias, qwen3.o_bias) == (given, given)
    assert (mixtral.qkv_bias, mixtral.o_bias) == (False, False)


# --- published ones

PARAMETERS = {
    "Mixtral-8x7B": 46.7, "Mixtral-8x22B": 140.6, "Qwen1.5-MoE-A2.7B": 14.3, "Qwen2-57B-A14B": 57.4, "Qwen3-30B-A3B": 30.5,
    "Qwen3-235B-A22B": 235.1,
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_published_shape_has_as_many_parameters_as_its_name_says(name):
    published = published_config(name)
    family = next(one for one, cls in FAMILIES.items() if isinstance(published, cls))
    shape = ModelConfig.from_dict({**published.to_dict(), "architectures": [family]})
    with torch.device("meta"):
        model = CausalLM(shape, TPGroup())
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(PARAMETERS[name], abs=0.06)


def test_a_published_shape_can_have_fewer_layers():
    assert published_config("Qwen3-30B-A3B", num_hidden_layers=2).num_hidden_layers == 2
    assert set(PARAMETERS) <= set(MIXTURES)


def test_a_published_shape_is_found_by_its_name():
    for name in PARAMETERS:
        assert model_shape(name).mixture.num_experts == published_config(name).num_experts
    assert model_shape("mistralai/Mixtral-8x7B-v0.1") == model_shape("mistralai/Mixtral-8x7B-Instruct-v0.1")
