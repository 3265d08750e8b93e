"""What may stand in a config.json: the type, range, spellings and default of each key that the decoder reads.

An architecture is one entry of ARCHITECTURES, a kind of rotary scaling one entry of ROPE_TYPES; config.py makes facts
of what they read. Defaults are those of the architecture's class in transformers: whoever saved the file may have
left out what equals them. tests/common/models/test_schema.py compares each with the library.

Sizes have no upper bound here, the weight files know them (weights.py). Keys that are not listed change nothing in
what is computed, or nothing at inference (dropout), and are not read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.models.fields import (
    Field,
    boolean,
    empty,
    integer,
    json_object,
    layer_numbers,
    number,
    one_of,
    texts,
    token_ids,
)
from common.models.mixture import Mixture, deepseek_v2, deepseek_v3, mixtral, qwen_moe

MAX_POSITIONS = 1 << 22  # the rotary table has a row for each: 2 GiB at head_dim 128
MAX_THETA = 1e30  # its powers stay finite in float32


# --- architectures


@dataclass(frozen=True)
class Architecture:
    model_type: str  # how transformers calls it; it picks the class by this, vLLM and SGLang by the architecture
    fields: dict[str, Field]
    qkv_bias: bool | None = (
        None  # on q, k, v; None: the key qkv_bias says so, or attention_bias for all four projections
    )
    qk_norm: bool = False  # RMSNorm on each q and k head
    mixture: Callable[[dict[str, Any], str], Mixture | None] | None = (
        None  # what the fields say about experts, see mixture.py
    )
    spelling: tuple[tuple[str, str], ...] = ()  # parts of our tensors' names, and how its checkpoints write them
    renamed: tuple[tuple[str, str], ...] = ()  # how names of tensors may begin in its checkpoints, and how they do here
    sees: bool = False  # it has a vision tower, see vision.py


EVERY_DECODER = {
    "vocab_size": integer(),
    "hidden_size": integer(),
    "intermediate_size": integer(),
    "num_hidden_layers": integer(),
    "num_attention_heads": integer(),
    "rms_norm_eps": number(1e-6, low=0, high=1),
    "tie_word_embeddings": boolean(False),
    "dtype": one_of("float32", "bfloat16", "float16", None, default=None, older="torch_dtype"),
    "eos_token_id": token_ids(None),
    "layer_types": texts(None),
    # rotary: what transformers 5 writes into rope_parameters stood in the other three before
    "rope_parameters": json_object(),
    "rope_scaling": json_object(),
    "rope_theta": number(10_000.0, low=1, high=MAX_THETA, null=True),
    "original_max_position_embeddings": integer(None, high=MAX_POSITIONS, null=True),
    "partial_rotary_factor": one_of(1, None, default=None),
    # keys with one meaning that is known here
    "hidden_act": one_of("silu", default="silu"),
    "mlp_bias": one_of(False, default=False),
    "is_causal": one_of(True, default=True),
    "per_layer_config": empty("is not supported; the layers of this decoder are alike"),
    "transformers_weights": empty(
        "is not supported; the weights are read from model.safetensors or what its index names"
    ),
}
QWEN = {
    **EVERY_DECODER,
    "max_position_embeddings": integer(32_768, high=MAX_POSITIONS),
    "num_key_value_heads": integer(32, null=True),
    "use_sliding_window": boolean(False),
    "sliding_window": integer(4096, null=True),
    "max_window_layers": integer(28, low=0),
}
QWEN_MOE = {
    **EVERY_DECODER,
    "max_position_embeddings": integer(32_768, high=MAX_POSITIONS),
    "head_dim": integer(None, null=True),
    "use_sliding_window": one_of(False, default=False),
    "num_experts_per_tok": integer(4),
    "norm_topk_prob": boolean(False),
    "decoder_sparse_step": integer(1),
    "mlp_only_layers": layer_numbers(),
}
# beside a vision tower; transformers 5 has theta and no tied head by default here
QWEN_VL = {
    **QWEN,
    "vocab_size": integer(152_064),
    "hidden_size": integer(8192),
    "intermediate_size": integer(29_568),
    "num_hidden_layers": integer(80),
    "num_attention_heads": integer(64),
    "num_key_value_heads": integer(8, null=True),
    "rms_norm_eps": number(1e-5, low=0, high=1),
    "head_dim": one_of(None, default=None),
    "max_window_layers": integer(80, low=0),
    "eos_token_id": token_ids(151_645),
    "rope_theta": number(1_000_000.0, low=1, high=MAX_THETA, null=True),
}
# of transformers 5 in memory -> of every published checkpoint
RENAMED_VL = (("model.language_model.", "model."), ("model.visual.", "visual."))
OTHER_NAMES_OF_E = ("num_local_experts", "n_routed_experts")
MIXTRAL_NAMES = (
    (".mlp.", ".block_sparse_moe."),
    (".gate_proj.", ".w1."),
    (".up_proj.", ".w3."),
    (".down_proj.", ".w2."),
)
DEEPSEEK = {
    **EVERY_DECODER,
    "attention_bias": boolean(False),  # of q_a_proj, kv_a_proj_with_mqa and o_proj
    "kv_lora_rank": integer(512),
    "q_lora_rank": integer(1536, null=True),
    "qk_nope_head_dim": integer(128),
    "qk_rope_head_dim": integer(64),
    "v_head_dim": integer(128),
    "moe_layer_freq": one_of(1, default=1),  # experts in every layer but the first ones
}
NAMES_OF_DEEPSEEKS_E = ("num_experts", "num_local_experts")
DEEPSEEK_NAMES = ((".shared_expert.", ".shared_experts."),)
ARCHITECTURES = {
    "Qwen2ForCausalLM": Architecture("qwen2", {**QWEN, "head_dim": integer(None, null=True)}, qkv_bias=True),
    "Qwen3ForCausalLM": Architecture(
        "qwen3", {**QWEN, "head_dim": integer(128), "attention_bias": boolean(False)}, qk_norm=True
    ),
    "LlamaForCausalLM": Architecture("llama", {
        **EVERY_DECODER,
        "max_position_embeddings": integer(2048, high=MAX_POSITIONS),
        "num_key_value_heads": integer(None, null=True),
        "head_dim": integer(None, null=True),
        "attention_bias": boolean(False),
    }),
    "Qwen2MoeForCausalLM": Architecture("qwen2_moe", {
        **QWEN_MOE,
        "num_key_value_heads": integer(16, null=True),
        "qkv_bias": boolean(True),
        "num_experts": integer(60, alike=OTHER_NAMES_OF_E),
        "moe_intermediate_size": integer(1408),
        "shared_expert_intermediate_size": integer(5632),
    }, mixture=qwen_moe),
    "Qwen3MoeForCausalLM": Architecture("qwen3_moe", {
        **QWEN_MOE,
        "num_key_value_heads": integer(4, null=True),
        "attention_bias": boolean(False),
        "num_experts": integer(128, alike=OTHER_NAMES_OF_E),
        "num_experts_per_tok": integer(8),
        "moe_intermediate_size": integer(768),
    }, qk_norm=True, mixture=qwen_moe),
    "MixtralForCausalLM": Architecture("mixtral", {
        **EVERY_DECODER,
        "max_position_embeddings": integer(131_072, high=MAX_POSITIONS),
        "num_key_value_heads": integer(8, null=True),
        "head_dim": integer(None, null=True),
        "rms_norm_eps": number(1e-5, low=0, high=1),
        "rope_theta": number(1_000_000.0, low=1, high=MAX_THETA, null=True),
        "sliding_window": one_of(None, default=None),
        "num_experts": integer(8, alike=OTHER_NAMES_OF_E),
        "num_experts_per_tok": integer(2),
    }, qkv_bias=False, mixture=mixtral, spelling=MIXTRAL_NAMES),
    "DeepseekV2ForCausalLM": Architecture("deepseek_v2", {
        **DEEPSEEK,
        "max_position_embeddings": integer(2048, high=MAX_POSITIONS),
        "num_key_value_heads": integer(None, null=True),
        "first_k_dense_replace": integer(0, low=0),
        "n_routed_experts": integer(64, alike=NAMES_OF_DEEPSEEKS_E),
        "n_shared_experts": integer(2),
        "moe_intermediate_size": integer(1407),
        "num_experts_per_tok": integer(None, null=True),
        "topk_method": one_of("greedy", "group_limited_greedy", default="greedy"),
        "n_group": integer(None, null=True),
        "topk_group": integer(None, null=True),
        "scoring_func": one_of("softmax", default="softmax"),
        # transformers passes over true, and DeepSeek's own code would not scale then
        "norm_topk_prob": one_of(False, None, default=False),
        "routed_scaling_factor": number(1.0),
    }, mixture=deepseek_v2, spelling=DEEPSEEK_NAMES),
    "DeepseekV3ForCausalLM": Architecture("deepseek_v3", {
        **DEEPSEEK,
        "max_position_embeddings": integer(4096, high=MAX_POSITIONS),
        "num_key_value_heads": integer(128, null=True),
        "first_k_dense_replace": integer(3, low=0),
        "n_routed_experts": integer(256, alike=NAMES_OF_DEEPSEEKS_E),
        "n_shared_experts": integer(1),
        "moe_intermediate_size": integer(2048),
        "num_experts_per_tok": integer(8),
        "topk_method": one_of("noaux_tc", default="noaux_tc"),
        "n_group": integer(8),
        "topk_group": integer(4),
        "scoring_func": one_of("sigmoid", default="sigmoid"),
        "norm_topk_prob": boolean(True),
        "routed_scaling_factor": number(2.5),
        "rope_interleave": boolean(True),
        "num_nextn_predict_layers": integer(1, low=0, null=True, alike=("num_mtp_layers",)),
    }, mixture=deepseek_v3, spelling=DEEPSEEK_NAMES),
    "Qwen2VLForConditionalGeneration": Architecture("qwen2_vl", QWEN_VL, qkv_bias=True, renamed=RENAMED_VL, sees=True),
    "Qwen2_5_VLForConditionalGeneration": Architecture("qwen2_5_vl", QWEN_VL, qkv_bias=True, renamed=RENAMED_VL, sees=True),
}  # fmt: skip


# what has been looked at, and why it is not there
LEFT_OUT = {
    "GptOssForCausalLM": "its heads have attention sinks and every other layer a sliding window, and attention here is over all "
    "keys of a sequence and nothing else",
}

# --- generation_config.json

END_TOKENS = {"eos_token_id": token_ids(None)}
SAMPLING = {
    "temperature": number(None, low=0, null=True),
    "top_p": number(None, above=0, high=1, null=True),
    "top_k": integer(None, low=-1, null=True),  # 0 (transformers) and -1 (vLLM): no limit
    "min_p": number(None, low=0, high=1, null=True),
    "repetition_penalty": number(None, above=0, null=True),
    "max_new_tokens": integer(None, null=True),
}


# --- rotary scaling

ANY_ROPE = {
    "rope_theta": number(None, low=1, high=MAX_THETA),
    "partial_rotary_factor": one_of(1, None, default=None),
}
ROPE_TYPES = {
    "default": ANY_ROPE,
    "mrope": ANY_ROPE,  # of models that see: default, with three positions a token
    "linear": {**ANY_ROPE, "factor": number(above=0)},
    "llama3": {
        **ANY_ROPE,
        "factor": number(above=0),
        "low_freq_factor": number(above=0),
        "high_freq_factor": number(above=0),
        "original_max_position_embeddings": integer(None, high=MAX_POSITIONS),
    },
    "yarn": {
        **ANY_ROPE,
        "factor": number(above=0, null=True),  # null: max_position_embeddings / the original one
        "original_max_position_embeddings": integer(None, high=MAX_POSITIONS),
        "attention_factor": number(None, above=0, high=100, null=True),
        "beta_fast": number(None, low=0, null=True),
        "beta_slow": number(None, low=0, null=True),
        "mscale": number(None, low=0, high=100, null=True),
        "mscale_all_dim": number(None, low=0, high=100, null=True),
        "truncate": boolean(True),
    },
}
