import dataclasses

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm

from common.layers.activation import SiluAndMul
from common.layers.norm import RMSNorm
from common.layers.rotary import RotaryEmbedding, apply_rotary, attention_factor, inverse_frequencies
from common.models.config import ModelConfig
from common.models.decoder import SelfAttention
from common.parallel_state import TPGroup
from tests.common.in_memory import InMemory

LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 4096}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "default, theta 1e6": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "llama3.2": {**LLAMA3, "rope_theta": 500_000.0},
    "llama3.1": {**LLAMA3, "factor": 8.0, "rope_theta": 500_000.0},
    "yarn of Qwen2.5": {**YARN, "factor": 4.0, "rope_theta": 1_000_000.0},
    "yarn of DeepSeek": {**YARN, "factor": 40.0, "rope_theta": 10_000.0, "mscale": 1.0, "mscale_all_dim": 0.707},
    "yarn of gpt-oss": {
        **YARN,
        "factor": 32.0,
        "rope_theta": 150_000.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
    "yarn with its factor": {**YARN, "factor": 2.0, "rope_theta": 10_000.0, "attention_factor": 1.25},
}
POSITIONS = torch.tensor([0, 1, 2, 17, 999, 9_999, 3, 3])


def rope_pair(rope, head_dim=64):
    """(our config, transformers' rotary module) for the same parameters."""
    theirs = LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, num_key_value_heads=2, head_dim=head_dim,
        max_position_embeddings=10_000, rope_parameters=dict(rope), architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    return ModelConfig.from_dict(theirs.to_dict()), LlamaRotaryEmbedding(theirs)


def frequencies(config):
    return inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)


every_rope = pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())


@every_rope
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_inverse_frequencies_are_those_of_transformers(rope, head_dim):
    config, theirs = rope_pair(rope, head_dim)
    torch.testing.assert_close(frequencies(config), theirs.inv_freq, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("rope", "factor"), [("llama3.2", 32.0), ("yarn of Qwen2.5", 4.0), ("yarn of gpt-oss", 32.0)])
def test_a_blending_scaling_keeps_some_stretches_some_and_blends_some(rope, factor):
    """That the comparison above meets all three cases."""
    config, _ = rope_pair(ROPES[rope])
    ratio = frequencies(dataclasses.replace(config, rope_scaling=None)) / frequencies(config)
    kept, stretched = torch.isclose(ratio, torch.ones(())), torch.isclose(ratio, torch.tensor(factor))
    assert kept.any()
    assert stretched.any()
    assert (~kept & ~stretched).any()


@every_rope
def test_the_attention_factor_is_that_of_transformers(rope):
    config, theirs = rope_pair(rope)
    assert attention_factor(config.rope_scaling) == pytest.approx(theirs.attention_scaling)
    assert (attention_factor(config.rope_scaling) == 1) == (rope["rope_type"] != "yarn")


@every_rope
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotated_vectors_are_those_of_transformers(rope, dtype):
    config, theirs = rope_pair(rope)
    torch.manual_seed(0)
    q, k = torch.randn(8, 4, 64).to(dtype), torch.randn(8, 2, 64).to(dtype)
    cos, sin = theirs(q, POSITIONS[None])
    want_q, want_k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    rotary = RotaryEmbedding(**config.rotary)(POSITIONS, dtype)
    mine_q, mine_k = apply_rotary(q, rotary), apply_rotary(k, rotary)
    assert mine_q.dtype == dtype
    # the angle of position 9999 is large: an ulp of the frequency shows
    tolerance = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(mine_q, want_q[0].transpose(0, 1), **tolerance)
    torch.testing.assert_close(mine_k, want_k[0].transpose(0, 1), **tolerance)


@pytest.mark.parametrize("normed", [False, True])
def test_an_attention_that_turns_q_and_k_itself_gets_them_bare(normed):
    config = dataclasses.replace(rope_pair(ROPES["default"])[0], qk_norm=normed)
    torch.manual_seed(0)
    block = SelfAttention(config, TPGroup(), 0)
    for param in block.parameters():
        param.normal_()
    seen = []

    def attention(layer, q, k, v):
        seen.append((q, k))
        return q * k.sum() + v.sum()

    class TurningAttention:
        turns = True

        def __call__(self, layer, q, k, v, turning):
            assert not torch.allclose(q, seen[0][0])
            return attention(layer, *turning(q, k), v)

    x, rotary = (
        torch.randn(len(POSITIONS), config.hidden_size),
        RotaryEmbedding(**config.rotary)(POSITIONS, torch.float32),
    )
    assert torch.equal(block(x, rotary, attention), block(x, rotary, TurningAttention()))
    assert all(torch.equal(*pair) for pair in zip(*seen, strict=True))


def test_position_zero_turns_nothing():
    config, _ = rope_pair(ROPES["default"])
    x = torch.randn(1, 4, 64)
    assert torch.equal(apply_rotary(x, RotaryEmbedding(**config.rotary)(torch.tensor([0]), x.dtype)), x)


@every_rope
def test_scores_depend_on_the_distance_alone(rope):
    config, _ = rope_pair(rope)
    rotary = RotaryEmbedding(**config.rotary)
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 64).double(), torch.randn(1, 1, 64).double()

    def score(i, j):
        turn = [apply_rotary(x, rotary(torch.tensor([p]), torch.float64)) for x, p in ((q, i), (k, j))]
        return (turn[0] * turn[1]).sum()

    torch.testing.assert_close(score(20, 3), score(217, 200), rtol=1e-3, atol=1e-3)


def test_angles_stay_float32_in_a_bfloat16_model():
    """load_model builds with bfloat16 as the default: 8 bits would put all positions above 256 on a grid."""
    config, _ = rope_pair(ROPES["llama3.2"])
    in_float32 = RotaryEmbedding(**config.rotary)
    torch.set_default_dtype(torch.bfloat16)
    try:
        in_bfloat16 = RotaryEmbedding(**config.rotary)
    finally:
        torch.set_default_dtype(torch.float32)
    assert in_bfloat16.cos.dtype == torch.float32
    assert torch.equal(in_bfloat16.cos, in_float32.cos)
    assert torch.equal(in_bfloat16.sin, in_float32.sin)


def norm_pair(size, eps, dtype):
    weight = 1 + 0.1 * torch.randn(size, generator=torch.Generator().manual_seed(1))
    theirs = Qwen2RMSNorm(size, eps).to(dtype)
    theirs.weight.data.copy_(weight)
    mine = RMSNorm(size, eps).to(dtype)
    RMSNorm.load_weight(mine, InMemory(weight.to(dtype)))
    return mine, theirs


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.1])
@pytest.mark.parametrize("shape", [(5, 96), (5, 4, 16)], ids=["hidden", "heads"])
def test_rms_norm_is_that_of_transformers(shape, eps):
    mine, theirs = norm_pair(shape[-1], eps, torch.float32)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mine(x), theirs(x))


def test_rms_norm_in_bfloat16_is_that_of_transformers_within_a_rounding_step():
    mine, theirs = norm_pair(896, 1e-6, torch.bfloat16)
    x = torch.randn(64, 896, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert mine(x).dtype == torch.bfloat16
    torch.testing.assert_close(mine(x), theirs(x), rtol=2**-7, atol=0)


def test_rms_norm_of_bfloat16_is_rounded_once_at_the_end():
    mine, _ = norm_pair(4096, 1e-6, torch.bfloat16)
    x = (1000 * torch.randn(3, 4096, generator=torch.Generator().manual_seed(0))).bfloat16()
    exact = x.double() / x.double().pow(2).mean(-1, keepdim=True).sqrt() * mine.weight.double()
    torch.testing.assert_close(mine(x).double(), exact, rtol=2**-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_gives_the_norm_of_the_sum_and_the_sum(dtype):
    mine, _ = norm_pair(96, 1e-6, dtype)
    x, residual = torch.randn(5, 96).to(dtype), torch.randn(5, 96).to(dtype)
    normed, total = mine.add(x, residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, mine(x + residual))


def test_add_leaves_its_arguments_alone():
    mine, _ = norm_pair(96, 1e-6, torch.float32)
    x, residual = torch.ones(2, 96), torch.ones(2, 96)
    mine.add(x, residual)
    assert torch.equal(x, torch.ones(2, 96))
    assert torch.equal(residual, torch.ones(2, 96))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_and_mul_is_the_gate_of_transformers_mlp(dtype):
    mlp = Qwen2MLP(Qwen2Config(hidden_size=8, intermediate_size=24)).to(dtype)
    mlp.down_proj = torch.nn.Identity()
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    gate_up = torch.cat([mlp.gate_proj(x), mlp.up_proj(x)], dim=-1)
    torch.testing.assert_close(SiluAndMul()(gate_up), mlp(x))
