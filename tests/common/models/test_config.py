import dataclasses
import json

import pytest
import torch
from transformers import AutoConfig

from common.models.config import ModelConfig
from common.models.decoder import CausalLM
from common.parallel_state import TPGroup

# config.json as published (transformers 4 keys)
QWEN2_5_05B = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN2_5_7B = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
    "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
LLAMA3_2_1B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 128256,
}  # fmt: skip
PUBLISHED = {
    "Qwen2.5-0.5B": QWEN2_5_05B,
    "Qwen2.5-7B": QWEN2_5_7B,
    "Qwen3-0.6B": QWEN3_06B,
    "Llama-3.2-1B": LLAMA3_2_1B,
}

every_published = pytest.mark.parametrize("raw", PUBLISHED.values(), ids=PUBLISHED.keys())


@pytest.fixture
def folder(tmp_path):
    """folder(config, generation_config=None) -> a folder that holds them; text is written as it is."""

    def make(config, generation=None):
        for name, content in (("config.json", config), ("generation_config.json", generation)):
            if content is not None:
                text = content if isinstance(content, str) else json.dumps(content)
                (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path

    return make


# --- published configs


def test_qwen2_5_0_5b():
    assert ModelConfig.from_dict(QWEN2_5_05B) == ModelConfig(
        architecture="Qwen2ForCausalLM", vocab_size=151936, hidden_size=896, intermediate_size=4864, num_layers=24,
        num_heads=14, num_kv_heads=2, head_dim=64, max_position_embeddings=32768, rms_norm_eps=1e-6,
        rope_theta=1e6, rope_scaling=None, tie_word_embeddings=True, qkv_bias=True, o_bias=False, qk_norm=False,
        dtype="bfloat16", eos_token_ids=(151645,),
    )  # fmt: skip


def test_qwen2_5_7b():
    config = ModelConfig.from_dict(QWEN2_5_7B)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (28, 4, 128)
    assert (config.tie_word_embeddings, config.qkv_bias, config.o_bias) == (False, True, False)


def test_qwen3_0_6b_has_heads_wider_than_its_hidden_size_and_norms_on_them():
    config = ModelConfig.from_dict(QWEN3_06B)
    assert config.num_heads * config.head_dim == 2 * config.hidden_size == 2048
    assert (config.qk_norm, config.qkv_bias, config.o_bias) == (True, False, False)


def test_llama_3_2_1b():
    config = ModelConfig.from_dict(LLAMA3_2_1B)
    assert (config.qk_norm, config.qkv_bias, config.o_bias) == (False, False, False)
    assert (config.rope_theta, config.rms_norm_eps) == (500_000.0, 1e-5)
    assert config.rope_scaling == {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "count"),
    [("Qwen2.5-0.5B", 494_032_768), ("Qwen2.5-7B", 7_615_616_512), ("Qwen3-0.6B", 596_049_920),
     ("Llama-3.2-1B", 1_235_814_400)],
)  # fmt: skip
def test_the_decoder_has_as_many_parameters_as_the_published_model(name, count):
    with torch.device("meta"):
        model = CausalLM(ModelConfig.from_dict(PUBLISHED[name]), TPGroup())
    assert sum(param.numel() for param in model.parameters()) == count


# --- two generations of keys


@every_published
def test_the_keys_of_transformers_5_give_the_same_facts(raw, tmp_path):
    AutoConfig.for_model(**raw).save_pretrained(tmp_path)
    new = json.loads((tmp_path / "config.json").read_text())
    assert {"rope_parameters", "dtype"} <= new.keys()
    assert not {"rope_theta", "rope_scaling", "torch_dtype"} & new.keys()
    assert ModelConfig.from_dict(new) == ModelConfig.from_dict(raw)


@pytest.mark.parametrize(
    "scaling", [{"factor": 4.0}, {"factor": 4.0, "rope_theta": 1e6}], ids=["theta outside", "theta inside"]
)
def test_a_rope_scaling_that_says_type_means_rope_type(scaling):
    old = ModelConfig.from_dict({**QWEN2_5_05B, "rope_scaling": {**scaling, "type": "linear"}})
    new = ModelConfig.from_dict({**QWEN2_5_05B, "rope_scaling": {**scaling, "rope_type": "linear"}})
    assert old == new
    assert (old.rope_theta, old.rope_scaling) == (1e6, {"rope_type": "linear", "factor": 4.0})


def test_default_rope_type_is_no_scaling():
    raw = {**QWEN2_5_05B, "rope_scaling": {"type": "default"}}
    assert ModelConfig.from_dict(raw).rope_scaling is None


def test_rope_theta_is_10000_if_nobody_says_so():
    raw = {key: value for key, value in LLAMA3_2_1B.items() if not key.startswith("rope")}
    assert ModelConfig.from_dict(raw).rope_theta == 10_000.0


@pytest.mark.parametrize("kv_heads", [{}, {"num_key_value_heads": None}], ids=["absent", "null"])
def test_without_kv_heads_every_query_head_has_its_own(kv_heads):
    raw = {key: value for key, value in LLAMA3_2_1B.items() if key != "num_key_value_heads"}
    assert ModelConfig.from_dict({**raw, **kv_heads}).num_kv_heads == 32


@pytest.mark.parametrize("head_dim", [{}, {"head_dim": None}], ids=["absent", "null"])
def test_without_head_dim_the_heads_share_the_hidden_size(head_dim):
    raw = {key: value for key, value in LLAMA3_2_1B.items() if key != "head_dim"}
    assert ModelConfig.from_dict({**raw, **head_dim}).head_dim == 2048 // 32


def test_attention_bias_of_llama_is_on_all_four_projections():
    config = ModelConfig.from_dict({**LLAMA3_2_1B, "attention_bias": True})
    assert (config.qkv_bias, config.o_bias) == (True, True)


def test_dtype_is_float32_if_nobody_says_so():
    raw = {key: value for key, value in LLAMA3_2_1B.items() if key != "torch_dtype"}
    assert ModelConfig.from_dict(raw).dtype == "float32"


# --- end of text


@pytest.mark.parametrize(
    ("in_config", "in_generation", "want"),
    [
        (151645, None, (151645,)),
        ([1, 2], None, (1, 2)),
        (None, None, ()),
        (151643, {"eos_token_id": [151645, 151643]}, (151645, 151643)),
        (151643, {"eos_token_id": 151645}, (151645,)),
        (151643, {"temperature": 0.7}, (151643,)),
    ],
)
def test_end_of_text_is_what_generation_config_says_else_what_config_says(folder, in_config, in_generation, want):
    where = folder({**QWEN2_5_05B, "eos_token_id": in_config}, in_generation)
    assert ModelConfig.from_folder(where).eos_token_ids == want


# --- refusals


def refuse(change, *words, base=QWEN2_5_05B):
    with pytest.raises(ValueError, match=r"^here: ") as error:
        ModelConfig.from_dict({**base, **change}, where="here")
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("named", [["MistralForCausalLM"], ["GptOssForCausalLM", "Qwen2ForCausalLM"]])
def test_an_unknown_architecture_is_refused_with_the_known_ones(named):
    refuse({"architectures": named}, named[0], "Qwen2ForCausalLM, Qwen3ForCausalLM, LlamaForCausalLM")


@pytest.mark.parametrize("named", [None, []])
def test_a_config_without_architecture_is_refused(named):
    refuse({"architectures": named}, "architecture none named is not supported")


def test_an_incomplete_config_is_refused_with_all_that_is_missing():
    with pytest.raises(ValueError, match="a config of Qwen2ForCausalLM needs vocab_size, num_hidden_layers"):
        ModelConfig.from_dict(
            {key: value for key, value in QWEN2_5_05B.items() if key not in ("vocab_size", "num_hidden_layers")}
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_sliding_window": True}, "use_sliding_window=true is not supported"),
        ({"mlp_bias": True}, "mlp_bias=true is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; supported: silu"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "quant_method='aqlm' is not supported; supported: fp8"),
        ({"compression_config": {"quant_method": "gptq", "bits": 5}}, "compression_config: bits=5 is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}},
         "rope_type='dynamic' is not supported; supported: default, linear, llama3, yarn"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope_type='longrope' is not supported"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type='yarn' needs factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "an object of its own for 'full_attention'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type='linear' needs factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
         "rope_type='llama3' needs high_freq_factor"),
        ({"is_causal": False}, "is_causal=false is not supported; supported: true"),
        ({"per_layer_config": {"0": {"num_attention_heads": 2}}}, "per_layer_config={'0': {'num_attention_heads': 2}} is not"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights='other.safetensors' is not supported"),
    ],
)  # fmt: skip
def test_what_would_change_the_numbers_is_refused(change, words):
    refuse(change, words)


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        ModelConfig.from_folder(tmp_path)
    assert f"{tmp_path / 'config.json'} is missing" in str(error.value)


@pytest.mark.parametrize("text", ["", "{", '{"vocab_size": }', "<html>"])
def test_a_config_that_is_not_json_is_named(folder, text):
    with pytest.raises(ValueError, match=r"config\.json is not JSON: "):
        ModelConfig.from_folder(folder(text))


@pytest.mark.parametrize("text", ["[]", "null", '"Qwen2"'])
def test_a_config_that_is_no_object_is_named(folder, text):
    with pytest.raises(ValueError, match=r"config\.json"):
        ModelConfig.from_folder(folder(text))


def test_a_generation_config_that_is_not_json_is_named(folder):
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        ModelConfig.from_folder(folder(QWEN2_5_05B, "{"))


def test_an_error_names_the_file(folder):
    where = folder({**QWEN2_5_05B, "mlp_bias": True})
    with pytest.raises(ValueError, match=r"mlp_bias") as error:
        ModelConfig.from_folder(where)
    assert str(where / "config.json") in str(error.value)


def test_facts_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig.from_dict(QWEN2_5_05B).num_heads = 1
