"""DeepSeek's config.json and weight files: what they say, and what is refused in a line."""

import dataclasses
import json

import pytest
import torch

from common.executor import Executor
from common.models.config import ModelConfig
from common.models.decoder import CausalLM
from common.models.published_configs import model_shape, published_config, published_shape
from common.models.weights import load_model
from common.parallel_state import TPGroup
from common.planner.plan import Load, ways
from tests.common.models.files import rewrite
from tests.common.models.test_schema import YARN, smallest

V2, V3 = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"
DRAFT = "model.layers.3.eh_proj.weight"  # of a layer that only guesses


def config(name, **changes):
    return ModelConfig.from_dict(smallest(name, **changes))


def test_the_row_that_is_cached_is_one_head_for_all():
    read = config(V2, num_hidden_layers=3)
    assert (read.num_heads, read.num_kv_heads, read.head_dim) == (32, 1, 192)
    assert read.kv_row == {"head_dim": 576, "planes": 1}
    assert config("Qwen3ForCausalLM").kv_row == {"head_dim": 128, "planes": 2}
    assert read.rotary["head_dim"] == 64


def test_scale_grows_with_the_square_of_mscale():
    plain = config(V3).latent.scale
    assert plain == 192**-0.5
    for factor, mscale, grown in ((4.0, 1.0, 1.1386294), (40.0, 1.0, 1.3688879), (40.0, 0.707, 1.2608038), (4.0, 0, 1)):
        scaled = config(V3, rope_scaling={**YARN, "factor": factor, "mscale": 1.0, "mscale_all_dim": mscale})
        assert scaled.latent.scale == pytest.approx(plain * grown**2)


@pytest.mark.parametrize("key", ["n_routed_experts", "num_experts", "num_local_experts"])
def test_the_number_of_experts_has_three_names(key):
    assert config(V2, **{key: 24}).mixture.num_experts == 24


def test_router_rules():
    rule = config(V2, routed_scaling_factor=16.0).mixture.router
    assert (rule.scores, rule.normalise, rule.scaling, rule.groups, rule.bias) == ("softmax", False, 16.0, 1, False)
    grouped = config(V2, topk_method="group_limited_greedy", n_group=8, topk_group=3).mixture.router
    assert (grouped.groups, grouped.chosen_groups, grouped.group_score) == (8, 3, "best")
    rule = config(V3, first_k_dense_replace=1).mixture.router
    assert (rule.scores, rule.normalise, rule.scaling, rule.bias) == ("sigmoid", True, 2.5, True)
    assert (rule.top_k, rule.groups, rule.chosen_groups, rule.group_score) == (8, 8, 4, "two_best")


def test_the_first_layers_are_dense():
    assert config(V3, num_hidden_layers=5).mixture.sparse == (False, False, False, True, True)
    assert config(V3).mixture is None


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (V2, {"topk_method": "noaux_tc"}, "topk_method='noaux_tc' is not supported; supported: greedy, group_limited_greedy"),
        (V2, {"norm_topk_prob": True}, "norm_topk_prob=true is not supported; supported: false, null"),
        (V2, {"scoring_func": "sigmoid"}, "scoring_func='sigmoid' is not supported; supported: softmax"),
        (V3, {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported; supported: sigmoid"),
        (V3, {"topk_method": "greedy"}, "topk_method='greedy' is not supported"),
        (V3, {"n_group": None}, "n_group=null must be an integer"),
        (V2, {"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported"),
        (V2, {"qk_rope_head_dim": 7}, "qk_rope_head_dim=7 must be even"),
        (V2, {"kv_lora_rank": None}, "kv_lora_rank=null must be an integer"),
        (V2, {"n_routed_experts": 7}, "num_experts_per_tok=8 is more than there are experts, n_routed_experts=7"),
        (V2, {"topk_method": "group_limited_greedy"}, "n_group=null, topk_group=null, n_routed_experts=64: groups must divide"),
        (V3, {"first_k_dense_replace": 0, "n_group": 7}, "n_group=7, topk_group=4, n_routed_experts=256: groups must divide"),
        (V3, {"first_k_dense_replace": 0, "topk_group": 9}, "n_group=8, topk_group=9, n_routed_experts=256: groups must"),
        (V3, {"first_k_dense_replace": 0, "n_group": 256, "topk_group": 8}, "a group needs two experts"),
        (V3, {"first_k_dense_replace": 0, "n_group": 128, "topk_group": 3}, "the chosen ones num_experts_per_tok=8 together"),
        (V2, {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale_all_dim": 1.0}}, "mscale_all_dim=1.0 is supported with"),
        (V3, {"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, "fmt='e5m2' is not supported"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_one_line(name, changes, words):
    with pytest.raises(ValueError, match=r"^config: ") as error:
        config(name, **changes)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_in_the_spelling_of_deepseek_s_own_code_means_the_same():
    """As V2-Lite was published: rope_scaling, torch_dtype, and keys for training and for code of its own."""
    old = {
        "architectures": [V2], "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}, "bos_token_id": 100_000, "ep_size": 1,
        "eos_token_id": 100_001, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 10_944, "kv_lora_rank": 512, "max_position_embeddings": 163_840, "model_type": "deepseek_v2",
        "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
        "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
        "num_key_value_heads": 16, "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06, "rope_theta": 10_000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096, "type": "yarn",
        },
        "tie_word_embeddings": False, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16", "use_cache": True,
        "v_head_dim": 128, "vocab_size": 102_400,
    }  # fmt: skip
    read = ModelConfig.from_dict(old)
    assert dataclasses.replace(read, dtype="float32", eos_token_ids=()) == published_shape("DeepSeek-V2-Lite")


@pytest.mark.parametrize("name", [V2, V3])
def test_other_heads_of_k_and_v_than_of_q_are_refused(name):
    raw = {**smallest(name), "num_key_value_heads": 4}
    with pytest.raises(
        ValueError, match="num_key_value_heads=4 is not num_attention_heads=32; latent attention has K and V"
    ):
        ModelConfig.from_dict(raw)


def test_tokens_per_expert_must_be_said_where_there_are_experts():
    raw = {**smallest(V2), "num_experts_per_tok": None}
    with pytest.raises(ValueError, match="num_experts_per_tok=null, but layers from 0 on have experts"):
        ModelConfig.from_dict(raw)
    assert ModelConfig.from_dict({**raw, "first_k_dense_replace": 2}).mixture is None


def test_layers_that_only_guess_are_left_alone(copy):
    folder = copy("deepseek_v3")
    rewrite(folder, lambda x: x.update({DRAFT: torch.zeros(2, 2)}))
    with pytest.warns(UserWarning, match=f"{DRAFT} left alone"):
        load_model(folder, TPGroup())
    for stored, said in ((DRAFT.replace("3", "4"), 1), (DRAFT, 0)):
        rewrite(folder, lambda x: x.update({stored: torch.zeros(2, 2)}))  # noqa: B023
        raw = json.loads((folder / "config.json").read_text())
        raw["num_nextn_predict_layers"] = said
        (folder / "config.json").write_text(json.dumps(raw))
        with pytest.raises(ValueError, match=f"unexpected: .*{stored}"):
            load_model(folder, TPGroup())


@pytest.mark.parametrize(
    ("tensor", "shape"),
    [
        ("self_attn.kv_b_proj.weight", (112, 23)),
        ("self_attn.kv_a_proj_with_mqa.weight", (29, 112)),
        ("self_attn.q_b_proj.weight", (111, 20)),
        ("self_attn.q_a_layernorm.weight", (19,)),
        ("mlp.gate.e_score_correction_bias", (8,)),
    ],
)
def test_a_misfit_is_named(tensor, shape, copy):
    folder, name = copy("deepseek_v3"), f"model.layers.1.{tensor}"
    rewrite(folder, lambda x: x.update({name: torch.zeros(shape)}))
    for rank in range(2):
        with pytest.raises(ValueError, match="1 of wrong shape: ") as error:
            load_model(folder, TPGroup(rank, 2))
        assert f"{name} is {list(shape)}, not" in str(error.value)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("kv_lora_rank", "kv_lora_rank + qk_rope_head_dim="),
        ("q_lora_rank", "q_lora_rank="),
        ("v_head_dim", "num_attention_heads * v_head_dim="),
        ("qk_nope_head_dim", "num_attention_heads * head_dim="),
        ("qk_rope_head_dim", "num_attention_heads * head_dim="),
    ],
)
def test_sizes_beyond_the_files_are_one_line(key, said, copy):
    folder = copy("deepseek_v3")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, key: 1 << 60}))
    with pytest.raises(ValueError, match="but the weight files have no tensor longer than") as error:
        load_model(folder, TPGroup())
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def refusal_with_cp(folder):
    from tests.ranks import layout_of_the_pool  # noqa: PLC0415, in the ranks only

    with pytest.raises(ValueError, match=r"^cp_size=2: the ring sends K and V of heads round") as error:
        Executor(folder, "cpu", 4, max_total_tokens=64, parallel=layout_of_the_pool(context_parallel_size=2))
    return str(error.value)


def test_context_parallelism_is_refused_by_every_rank_in_one_line(checkpoint, ranks):
    one, other = ranks(2).run(refusal_with_cp, checkpoint("deepseek_v3"))
    assert one == other
    assert "\n" not in one


def test_the_planner_s_layouts_of_a_latent_model_cut_no_context(copy):
    """Where no engine runs it, none is planned."""
    config = model_shape(str(copy("deepseek_v3")))
    found = ways(4, config, Load(context=512, batch=4))
    assert {way.layout.cp for way in found} == {1}
    assert {way.layout.attn_dp for way in found} == {1, 2, 4}


def bytes_a_token(folder, flags):
    """On each rank: what a token takes in the pool, measured, and how it was cut."""
    from tests.ranks import layout_of_the_pool  # noqa: PLC0415, in the ranks only

    parallel = layout_of_the_pool(**flags) if flags else None
    executor = Executor(folder, "cpu", 4, max_total_tokens=64, parallel=parallel)
    return executor.kv_cache.kv.nbytes // (executor.num_pages * 4), executor.model.heads.num_q


@pytest.mark.parametrize("size", [2])
def test_tensor_parallelism_copies_the_rows_and_data_ranks_do_not(size, checkpoint, ranks):
    """A token costs a rank 3 layers x 30 numbers, whatever R: R ranks hold R copies of one pool. Data ranks hold R pools."""
    folder, row = checkpoint("deepseek_v3"), 3 * 30 * 4
    assert ranks(size).run(bytes_a_token, folder, {}) == [(row, 4), (row, 4)]
    assert ranks(size).run(bytes_a_token, folder, {"attention_data_parallel_size": 2}) == [(row, 7), (row, 7)]
    kv_heads = 2 * 3 * 8  # of Qwen2, one of two a rank: these are cut
    assert ranks(size).run(bytes_a_token, checkpoint("qwen2"), {}) == [(kv_heads * 4, 7)] * 2


@pytest.mark.parametrize(
    ("name", "billions"), [("DeepSeek-V2-Lite", 15.7), ("DeepSeek-V2", 236), ("DeepSeek-V3", 671), ("DeepSeek-R1", 671)]
)
def test_a_published_shape_has_as_many_parameters_as_published(name, billions):
    shape = published_shape(name)
    with torch.device("meta"):
        model = CausalLM(shape, TPGroup())
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.003)
    assert shape.kv_row == {"head_dim": 576, "planes": 1}
    fewer = published_config(name, num_hidden_layers=4)
    read = ModelConfig.from_dict({**fewer.to_dict(), "architectures": [shape.architecture]})
    assert (read.latent, read.rotary, read.num_layers) == (shape.latent, shape.rotary, 4)
    assert read.mixture == dataclasses.replace(shape.mixture, sparse=shape.mixture.sparse[:4])
