"""What configs say, in old and new spellings, and what is refused by name."""

from functools import partial

import pytest

from common.quantization.config import QuantizationConfig
from common.quantization.scheme import Activations, Scheme
from tests.common.quantization.checkpoints import BY_TOKEN, INT4, INT8, gptq, grouped

LAYER = "model.layers.3."
Q, V, DOWN, EXPERT = (
    f"{LAYER}{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "mlp.experts.7.up_proj")
)
GPTQ = Scheme("gptq", 4, "int", "group", 128, format="gptq")
PACKED = Scheme("compressed-tensors", 4, "int", "group", 32, symmetric=False, format="pack-quantized")
BLOCK = Scheme("fp8", 8, "float", "block", block=(128, 128), activations=Activations(8, "float", True, "group", 128))


def read(raw, key="quantization_config"):
    return QuantizationConfig.from_checkpoint({"model_type": "qwen3", key: raw}, "here")


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": {}}])
def test_no_word_of_it_is_full_precision(config):
    assert QuantizationConfig.from_checkpoint(config, "here") is None


@pytest.mark.parametrize(
    ("raw", "schemes"),
    [
        # as Qwen3-8B-FP8 and DeepSeek-V3 were published, without and with a list
        ({"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}, {Q: BLOCK}),
        ({"quant_method": "fp8", "modules_to_not_convert": ["model.layers.3.mlp"], "weight_block_size": [128, 128]},
         {Q: BLOCK, DOWN: None, EXPERT: None, "model.layers.30.mlp.down_proj": BLOCK}),
        ({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["q_proj", "lm_head"]},
         {V: Scheme("fp8", 8, "float", "tensor", activations=Activations(8, "float", False, "tensor")), Q: None, "lm_head": None}),
        ({"quant_method": "fp8", "ignored_layers": ["model.layers.3.self_attn.qkv_proj"]}, {Q: None, V: None}),  # a merged name
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, {Q: GPTQ, "lm_head": None}),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "lm_head": True}, {"lm_head": GPTQ}),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128,
          "dynamic": {"-:.*mlp.*": {}, r"+:.*\.v_proj": {"bits": 8, "group_size": -1}}},
         {Q: GPTQ, DOWN: None, V: Scheme("gptq", 8, "int", "group", None, format="gptq")}),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True},
         {Q: Scheme("awq", 4, "int", "group", 64, symmetric=False), "lm_head": None}),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "head"]},
         {Q: None, "lm_head": Scheme("mxfp4", 4, "float", "group", 32), EXPERT: Scheme("mxfp4", 4, "float", "group", 32)}),
        ({"quant_method": "w4afp8", "weight_block_size": [128, 128]},
         {Q: BLOCK, EXPERT: Scheme("w4afp8", 4, "int", "group", 128, activations=Activations(8, "float", False, "tensor"))}),
        (grouped(INT4), {Q: PACKED, "lm_head": None, f"{LAYER}mlp.gate": None, f"{LAYER}mlp.gate_proj": PACKED}),
        (grouped(INT8, BY_TOKEN, "int-quantized"),
         {Q: Scheme("compressed-tensors", 8, "int", format="int-quantized", activations=Activations(8, "int"))}),
        ({**grouped(INT4), "ignore": [], "config_groups": {  # names before expressions before classes
            "a": {"targets": ["Linear"], "weights": INT4}, "b": {"targets": ["re:.*proj"], "weights": {**INT4, "num_bits": 8}},
            "c": {"targets": [Q], "weights": None}}},
         {Q: None, V: Scheme("compressed-tensors", 8, "int", "group", 32, symmetric=False, format="pack-quantized"),
          "lm_head": PACKED}),
    ],
)  # fmt: skip
def test_the_first_rule_that_speaks_of_a_module_decides(raw, schemes):
    config = read(raw)
    assert {module: config.scheme_of(module) for module in schemes} == schemes


def test_an_older_key_says_the_same():
    raw = {name: value for name, value in grouped(INT4).items() if name != "quant_method"}
    assert read(raw, "compression_config") == read(grouped(INT4))


CT = partial(grouped, INT4)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ([4], "quantization_config=[4] must be an object"),
        ({"bits": 4}, "quant_method=null is not supported; supported: fp8,"),
        ({"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes' is not supported; supported: fp8,"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt='e5m2' is not supported; supported: e4m3"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size=[128] must be a list of two integers"),
        ({"quant_method": "fp8", "weight_block_size": [9, 9], "activation_scheme": "static"}, "static' with weight_block_size"),
        ({"quant_method": "gptq", "group_size": 128}, "gptq needs bits"),
        (gptq(5), "bits=5 is not supported; supported: 2, 3, 4, 8"),
        (gptq(group_size=0), "group_size=0 must be at least 1, or -1"),
        (gptq(checkpoint_format="marlin"), "checkpoint_format='marlin' is not supported; supported: gptq, gptq_v2"),
        (gptq(dynamic={"+:(": {}}), "is no regular expression"),
        (gptq(dynamic={"x": {"bits": 7}}), "dynamic 'x': bits=7 is not supported"),
        (gptq(dynamic={"x": [1]}), "dynamic 'x': [1] must be an object, or null"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version='gemv' is not supported; supported: gemm"),
        ({"quant_method": "awq", "bits": 8}, "bits=8 is not supported; supported: 4"),
        (CT(format_="marlin-24"), "format='marlin-24' is not supported; supported: float-quantized"),
        (CT(format_="int-quantized"), "type='int', num_bits=4, strategy='group', group_size=32 in format='int-quantized'"),
        (CT({**BY_TOKEN, "symmetric": False}), "input_activations: num_bits=8, symmetric=false, strategy='token' is not"),
        (CT(transform_config={"config_groups": {"a": 1}}), "transform_config={'config_groups': {'a': 1}} is not supported"),
        (CT(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config: format='sparse-24-bitmask' is not supported"),
        (CT(sparsity_config=["dense"]), "sparsity_config=['dense'] must be an object, or null"),
        (grouped({**INT8, "actorder": "group"}), "actorder='group' with strategy='channel' in format=pack-quantized is not"),
        (CT(config_groups={}), "config_groups has no group with targets"),
        (CT(config_groups={"a": {"targets": ["Conv2d"], "weights": INT4}}), "target 'Conv2d' is not supported"),
        (CT(config_groups={"a": {"targets": ["re:["], "weights": INT4}}), "is no regular expression"),
        (CT(ignore=["re:*"]), "ignore: 're:*' is no regular expression"),
        (grouped({**INT4, "strategy": "tensor_group"}), "strategy='tensor_group' is not supported"),
        (grouped({**INT4, "group_size": None}), "strategy='group' needs a group_size of at least 1, not null"),
    ],
)  # fmt: skip
def test_what_is_unknown_is_refused_by_name(raw, words):
    with pytest.raises(ValueError, match=r"^here: ") as error:
        read(raw)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_two_keys_must_say_the_same():
    raw = {"quantization_config": gptq(), "compression_config": grouped(INT4)}
    with pytest.raises(ValueError, match="quantization_config and compression_config differ"):
        QuantizationConfig.from_checkpoint(raw, "here")


@pytest.mark.parametrize(
    ("name", "words"), [("gptq", "needs a checkpoint that was made with it"), ("int3", "is unknown")]
)
def test_a_name_that_cannot_be_made_at_load_is_one_line(name, words):
    with pytest.raises(ValueError, match=words):
        QuantizationConfig.named(name)
