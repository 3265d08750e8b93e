"""A layer of latent attention: cut over ranks it adds up to the whole, every rank caches the same, and it is transformers'."""

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from common.attention.contract import AttentionMetadata
from common.attention.kv_cache import PagedKVCache
from common.attention.latent import LatentNativeAttention
from common.layers.mla import LatentAttention
from common.layers.rotary import RotaryEmbedding
from common.models.config import ModelConfig
from common.parallel_state import TPGroup
from tests.common.in_memory import InMemory
from tests.oracle import DEEPSEEK, YARN

T, ALONE = 40, TPGroup()
KINDS = {
    "V2": (DeepseekV2Config, DeepseekV2Attention, DeepseekV2RotaryEmbedding, {"q_lora_rank": 20}),
    "V2-Lite": (DeepseekV2Config, DeepseekV2Attention, DeepseekV2RotaryEmbedding, {"q_lora_rank": None}),
    "V3": (DeepseekV3Config, DeepseekV3Attention, DeepseekV3RotaryEmbedding, {"q_lora_rank": 20}),
    "V3, halves": (
        DeepseekV3Config, DeepseekV3Attention, DeepseekV3RotaryEmbedding, {"q_lora_rank": 20, "rope_interleave": False}),
}  # fmt: skip
ROPES = {
    "default": None,
    "yarn": YARN,
    "yarn, one mscale": {**YARN, "mscale": 1.0},
    "yarn, no mscale": {key: YARN[key] for key in YARN if "mscale" not in key},
    "yarn, no mscale_all_dim": {key: YARN[key] for key in YARN if key != "mscale_all_dim"},
    "yarn that shrinks": {**YARN, "factor": 0.5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
}


def theirs_and_config(kind, rope=None, bias=False):
    config_class, attention, rotary, more = KINDS[kind]
    config = config_class(**DEEPSEEK, **more, rope_parameters=rope and dict(rope), attention_bias=bias)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    block = attention(config, 0).eval()
    for param in block.parameters():
        param.data.normal_(0, 0.3)
    raw = {**config.to_dict(), "architectures": [attention.__name__.replace("Attention", "ForCausalLM")]}
    return block, rotary(config), ModelConfig.from_dict(raw)


def ours(config, weights, tp=ALONE):
    block = LatentAttention(
        config.hidden_size, config.num_heads, config.latent, tp, 0, 0, bias=config.o_bias, reduce_results=False
    )
    sources = {name: InMemory(tensor) for name, tensor in weights.items()}
    for name, param in block.named_parameters():
        assert param.shard_shapes == {None: tuple(weights[name].shape)}
        param.weight_loader(sources[name], None)
    assert set(sources) == {name for name, _ in block.named_parameters()}
    return block, sources


@torch.no_grad()
def run(config, block, x, page_size=4):
    cache = PagedKVCache(1, -(-T // page_size), page_size, 1, **config.kv_row)
    pages = torch.arange(cache.num_pages).flip(0)
    at = torch.arange(T)
    slots = pages[at // page_size] * page_size + at % page_size
    meta = AttentionMetadata(slots, pages[None], torch.tensor([0, T]), torch.tensor([T]), page_size, T)
    rotary = RotaryEmbedding(**config.rotary)(at, x.dtype)
    return block(x, rotary, LatentNativeAttention(cache, meta)), cache.kv


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_layer_is_that_of_transformers(kind, rope, bias):
    block, rotary, config = theirs_and_config(kind, ROPES[rope], bias)
    assert config.latent.scale == pytest.approx(block.scaling)
    x, mask = torch.randn(T, config.hidden_size), torch.full((T, T), -torch.inf).triu(1)[None, None]
    position = rotary(x[None], torch.arange(T)[None])
    want, _ = block(hidden_states=x[None], attention_mask=mask, position_embeddings=position)
    got, _ = run(config, ours(config, dict(block.named_parameters()))[0], x)
    torch.testing.assert_close(got, want[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("size", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("kind", ["V2-Lite", "V3"])
def test_parts_add_up_and_every_rank_caches_the_same(kind, size):
    """7 heads on 2, 3, 4 and 8 ranks: the missing ones are zeros. What is narrow and feeds all heads is whole on each."""
    block, _, config = theirs_and_config(kind)
    weights, x = dict(block.named_parameters()), torch.randn(T, config.hidden_size)
    whole, rows = run(config, ours(config, weights)[0], x)
    total, read = torch.zeros_like(whole), {}
    for rank in range(size):
        part, sources = ours(config, weights, TPGroup(rank, size))
        assert part.heads.num_q == -(-7 // size)
        assert part.heads.num_kv == 1
        y, own_rows = run(config, part, x)
        assert torch.equal(own_rows, rows)
        total += y
        for name, source in sources.items():
            along = 1 if name == "o_proj.weight" else 0
            counted = torch.tensor(source.times_read(along))
            read[name] = read.get(name, 0) + counted
    torch.testing.assert_close(total, whole, atol=1e-4, rtol=1e-4)
    for name, times in read.items():
        cut = name.startswith(("q_b_proj", "q_proj", "kv_b_proj", "o_proj"))
        assert times.tolist() == [1 if cut else size] * len(times), name
