"""What the notebook on parallelism is drawn from. One rank here; the notebook checks what two and four have recorded."""

import pytest

from ch07_sglang_radix import Engine
from ch07_sglang_radix.benchmarks.record_layouts import ALONE, LAYOUTS, NEW_TOKENS, PROMPTS, record
from ch07_sglang_radix.server_args import ServerArgs
from common.tiny_qwen import TINY_QWEN_PATH
from tests.oracle import greedy


def test_one_rank_alone_has_everything_and_says_nothing():
    with Engine(device="cpu", page_size=4, max_total_tokens=1024) as engine:
        told, config = record(engine), engine.wrapper.config
        unique = sum(p.numel() for p in engine.wrapper.model.parameters())
    assert told["answers"] == [greedy(TINY_QWEN_PATH, ids, NEW_TOKENS) for ids in [*PROMPTS, ALONE]]
    layers, heads = config.num_layers, config.num_kv_heads
    assert told["kv"] == {i: [[[True] * heads] * layers] * len(ids) for i, ids in enumerate(PROMPTS)}
    assert [len(rows) for rows in told["rows"]] == [sum(map(len, PROMPTS)) + len(PROMPTS) * (NEW_TOKENS - 1)] * layers
    assert told["messages"] == []
    assert told["weights"]["embedding"] == told["weights"]["head"] == config.vocab_size * config.hidden_size
    assert sum(told["weights"].values()) - told["weights"]["head"] == unique


@pytest.mark.parametrize(("world", "name"), [(world, name) for world, layouts in LAYOUTS.items() for name in layouts])
def test_a_layout_is_named_as_it_is(world, name):
    options = LAYOUTS[world][name]
    args = ServerArgs.of({"tp_size": world // (options.get("pp_size", 1) * options.get("dp_size", 1))} | options)
    said = {
        "tp": args.tp_size,
        "pp": args.pp_size,
        "dp": args.dp_size,
        "attn-dp": args.attn_dp_size,
        "cp": args.cp_size,
    }
    said = [f"{way}{size}" for way, size in said.items() if size > 1] + ["sp"] * args.enable_layernorm_sp
    assert sorted(name.replace(" x ", ", ").split(", ")) == sorted(said)
