import json
import math

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RotaryEmbedding
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from common.layers.rotary import attention_factor, inverse_frequencies
from common.models.config import ModelConfig
from common.models.fields import REQUIRED, boolean, integer, number, one_of, read_fields
from common.models.schema import ARCHITECTURES

LIBRARY = {
    "Qwen2ForCausalLM": (Qwen2Config, Qwen2RotaryEmbedding),
    "Qwen3ForCausalLM": (Qwen3Config, Qwen3RotaryEmbedding),
    "LlamaForCausalLM": (LlamaConfig, LlamaRotaryEmbedding),
    "Qwen2MoeForCausalLM": (Qwen2MoeConfig, Qwen2MoeRotaryEmbedding),
    "Qwen3MoeForCausalLM": (Qwen3MoeConfig, Qwen3MoeRotaryEmbedding),
    "MixtralForCausalLM": (MixtralConfig, MixtralRotaryEmbedding),
    "DeepseekV2ForCausalLM": (DeepseekV2Config, DeepseekV2RotaryEmbedding),
    "DeepseekV3ForCausalLM": (DeepseekV3Config, DeepseekV3RotaryEmbedding),
}
# latent attention has as many heads of K and V as of queries: the library reads other numbers, and fails when it attends
LATENT = {"num_key_value_heads": 32, "num_experts_per_tok": 8}
SMALLEST = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
}
every_architecture = pytest.mark.parametrize("name", LIBRARY)  # those that see are in test_vision.py


def smallest(name, **changes):
    latent = LATENT if name.startswith("Deepseek") else {}
    return {**SMALLEST, "architectures": [name], "model_type": ARCHITECTURES[name].model_type, **changes, **latent}


# --- defaults


@every_architecture
def test_defaults_are_those_of_the_class_in_transformers(name):
    theirs, compared = LIBRARY[name][0].__dataclass_fields__, set()
    for key, field in ARCHITECTURES[name].fields.items():
        if key in theirs and field.default is not REQUIRED and key != "eos_token_id":
            assert field.default == theirs[key].default, key
            compared.add(key)
    assert compared >= {
        "max_position_embeddings", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "hidden_act", "dtype",
    }  # fmt: skip
    assert ARCHITECTURES[name].fields["rope_theta"].default == LIBRARY[name][0].default_theta
    assert ARCHITECTURES[name].model_type == LIBRARY[name][0].model_type


@every_architecture
def test_a_config_that_leaves_everything_out_means_what_transformers_reads_in_it(name):
    mine, theirs = ModelConfig.from_dict(smallest(name)), LIBRARY[name][0](**SMALLEST)
    if mine.latent:
        theirs = LIBRARY[name][0](**SMALLEST, **LATENT)
        assert mine.head_dim == theirs.qk_head_dim
    assert mine.max_position_embeddings == theirs.max_position_embeddings
    assert mine.num_kv_heads == (1 if mine.latent else theirs.num_key_value_heads)
    assert mine.rotary["head_dim"] == (
        getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    )
    assert mine.rms_norm_eps == theirs.rms_norm_eps
    assert mine.tie_word_embeddings == theirs.tie_word_embeddings
    assert {"rope_type": "default", "rope_theta": mine.rope_theta} == theirs.rope_parameters
    assert mine.rope_scaling is None


def test_llamas_default_end_token_is_no_end_token(tmp_path):
    """The one default that is not the library's: transformers has 2 in LlamaConfig and does not stop at it."""
    config = LlamaConfig(**SMALLEST, architectures=["LlamaForCausalLM"])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["eos_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "generation_config.json").unlink()
    assert AutoConfig.from_pretrained(tmp_path).eos_token_id == 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id is None
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == ()


# --- what stands twice, or in an old and a new way

YARN = {"type": "yarn", "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 1e6}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "rope_scaling beside rope_parameters": {"rope_parameters": DEFAULT, "rope_scaling": YARN},
    "and rope_theta beside both": {"rope_parameters": DEFAULT, "rope_scaling": YARN, "rope_theta": 5e5},
    "an empty rope_scaling": {"rope_parameters": DEFAULT, "rope_scaling": {}, "rope_theta": 5e5},
    "a null rope_scaling": {"rope_parameters": DEFAULT, "rope_scaling": None},
    "theta inside and beside": {"rope_parameters": DEFAULT, "rope_theta": 5e5},
    "theta beside alone": {"rope_theta": 5e5},
    "theta null beside, given inside": {"rope_parameters": DEFAULT, "rope_theta": None},
    "rope_type and type": {"rope_parameters": {"rope_type": "default", "type": "yarn", "factor": 4.0}},
    "type and rope_type": {"rope_scaling": {"rope_type": "yarn", "type": "default", "factor": 4.0}},
    "linear by type": {"rope_scaling": {"type": "linear", "factor": 3}},
    "yarn without the original length": {"rope_scaling": YARN, "max_position_embeddings": 512},
    "yarn with it inside": {"rope_scaling": {**YARN, "original_max_position_embeddings": 99}},
    "yarn with it inside and beside": {
        "rope_scaling": {**YARN, "original_max_position_embeddings": 99}, "original_max_position_embeddings": 77},
    "llama3 without it": {"rope_parameters": LLAMA3, "max_position_embeddings": 512},
    "llama3 with it beside": {"rope_parameters": LLAMA3, "original_max_position_embeddings": 77},
    "yarn whose factor is null": {
        "rope_scaling": {**YARN, "factor": None, "original_max_position_embeddings": 128}, "max_position_embeddings": 512},
    "yarn with all it may have": {
        "rope_scaling": {**YARN, "beta_fast": 16, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False}},
    "yarn that shrinks": {"rope_scaling": {**YARN, "factor": 0.5}},
    "yarn with zeros for defaults": {"rope_scaling": {**YARN, "beta_fast": 0, "beta_slow": None, "mscale": 0}},
    "yarn with its attention factor": {"rope_scaling": {**YARN, "attention_factor": 1.5, "mscale": 2, "mscale_all_dim": 1}},
}  # fmt: skip


@every_architecture
@pytest.mark.parametrize("changes", ROPES.values(), ids=ROPES)
def test_rotary_keys_are_resolved_as_in_transformers(name, changes):
    raw = smallest(name, head_dim=64, num_key_value_heads=4, **json.loads(json.dumps(changes)))
    theirs = LIBRARY[name][1](AutoConfig.for_model(**json.loads(json.dumps(raw))))
    mine = ModelConfig.from_dict(raw)
    frequencies = inverse_frequencies(mine.rotary["head_dim"], mine.rope_theta, mine.rope_scaling)
    torch.testing.assert_close(frequencies, theirs.inv_freq, rtol=1e-6, atol=0)
    assert attention_factor(mine.rope_scaling) == pytest.approx(theirs.attention_scaling)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": None}, "rope_theta": 5e5},
        {"rope_theta": None},
        {"rope_parameters": {"rope_type": None, "type": "linear", "factor": 2.0}},
        {"rope_parameters": {"full_attention": DEFAULT}},
        {"rope_parameters": [1]},
        {"rope_scaling": "yarn"},
    ],
)
def test_rotary_keys_that_transformers_cannot_resolve_are_refused(changes):
    raw = smallest("Qwen2ForCausalLM", **changes)
    with pytest.raises(Exception):  # noqa: B017, PT011, of many kinds
        Qwen2RotaryEmbedding(AutoConfig.for_model(**json.loads(json.dumps(raw))))
    with pytest.raises(ValueError, match=r"^config: (rope_|.*rope_theta)"):
        ModelConfig.from_dict(raw)


@pytest.mark.parametrize(
    ("given", "longest"),
    [
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 512}, "max_position_embeddings": 512}, 2048),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 512}, "max_position_embeddings": 2048}, 2048),
        ({"rope_scaling": YARN, "max_position_embeddings": 512}, 2048),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}, "max_position_embeddings": 512}, 512),
        ({"max_position_embeddings": 512}, 512),
    ],
)
def test_yarn_makes_the_context_longer_where_the_config_kept_the_old_length(given, longest):
    config = ModelConfig.from_dict(smallest("Qwen2ForCausalLM", **given))
    assert config.max_position_embeddings == config.rotary["max_positions"] == longest


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16", "torch_dtype": "float16"},
        {"torch_dtype": "float16"},
        {"dtype": None, "torch_dtype": "bfloat16"},
    ],
)
def test_of_two_dtypes_the_new_key_counts(changes):
    theirs = AutoConfig.for_model(**smallest("LlamaForCausalLM", **changes))
    assert f"torch.{ModelConfig.from_dict(smallest('LlamaForCausalLM', **changes)).dtype}" == str(theirs.dtype)


@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize(
    ("changes", "full"),
    [
        ({"use_sliding_window": True, "max_window_layers": 1}, False),
        ({"use_sliding_window": True, "max_window_layers": 2}, True),
        ({"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None}, True),
        ({"use_sliding_window": False, "max_window_layers": 0}, True),
        ({"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True}, False),
        ({"layer_types": ["full_attention"] * 2, "use_sliding_window": True, "max_window_layers": 0}, True),
    ],
)
def test_windows_are_refused_where_transformers_would_have_a_layer_with_one(name, changes, full):
    raw = smallest(name, **changes)
    assert all(kind == "full_attention" for kind in AutoConfig.for_model(**raw).layer_types) == full
    if full:
        ModelConfig.from_dict(raw)
    else:
        with pytest.raises(ValueError, match=r"use_sliding_window=true|'sliding_attention' in layer_types"):
            ModelConfig.from_dict(raw)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "qwen2"}, "model_type='qwen2' is not that of LlamaForCausalLM, which is 'llama'"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries, num_hidden_layers=2"),
        ({"num_key_value_heads": 3}, "num_attention_heads=32 is not a multiple of num_key_value_heads=3"),
        ({"hidden_size": 31}, "head_dim=0 (hidden_size=31 over num_attention_heads=32) must be even and at least 2"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
        (
            {"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}},
            "high_freq_factor=4.0 must be above low_freq_factor=4.0",
        ),
        ({"rope_scaling": {**YARN, "factor": 1e6}}, "more than the 4194304 that are supported"),
        ({"rope_scaling": {**YARN, "rope_theta": 1}}, "rope_theta=1 must be above 1 for rope_type='yarn'"),
    ],
)
def test_facts_that_contradict_each_other_are_refused(changes, words):
    with pytest.raises(ValueError, match=r"^config: ") as error:
        ModelConfig.from_dict(smallest("LlamaForCausalLM", **changes))
    assert words in str(error.value)


def test_only_end_tokens_that_can_be_sampled_are_kept():
    raw = smallest("LlamaForCausalLM", eos_token_id=[-1, 0, 31, 32, 10**12])
    assert ModelConfig.from_dict(raw).eos_token_ids == (0, 31)


# --- kinds of fields


@pytest.mark.parametrize(
    ("field", "good", "bad", "rule"),
    [
        (integer(), [1, 10**400], [0, -1, 1.0, "1", True, None, [1], math.nan], "must be an integer of at least 1"),
        (integer(low=0, high=5, null=True), [0, 5, None], [-1, 6, False], "an integer of at least 0 and at most 5, or null"),
        (number(low=0, high=1), [0, 1, 0.5, -0.0], [-1e-9, 2, "0", None, True, math.nan, math.inf, 10**400],
         "must be a number of at least 0 and at most 1"),
        (number(above=0), [1e-300, 1, 1e299], [0, 0.0, -1, math.inf, math.nan, 10**400], "must be a number above 0"),
        (number(null=True), [-1e299, None], [-math.inf, 1e301], "must be a number that is finite, or null"),
        (boolean(), [True, False], [0, 1, None, "true"], "must be true or false"),
        (one_of(1, "a", default=1), [1, 1.0, "a"], [True, "b", None, [], {}], "is not supported; supported: 1, a"),
    ],
)  # fmt: skip
def test_what_fits_a_field(field, good, bad, rule):
    for value in good:
        assert read_fields({"key": value}, {"key": field}, "here", "it") == {"key": value}
    for value in bad:
        with pytest.raises(ValueError, match=r"^here: key=") as error:
            read_fields({"key": value}, {"key": field}, "here", "it")
        assert str(error.value).endswith(rule)
        assert "\n" not in str(error.value)


def test_a_key_that_is_not_there_has_its_default_and_null_is_not_that():
    fields = {"a": integer(5), "b": integer()}
    assert read_fields({"b": 1, "c": "unknown"}, fields, "here", "it") == {"a": 5, "b": 1}
    with pytest.raises(ValueError, match="here: a=null must be an integer"):
        read_fields({"a": None, "b": 1}, fields, "here", "it")
    with pytest.raises(ValueError, match="here: it needs b"):
        read_fields({}, fields, "here", "it")
