"""The shapes of published models, for benchmarks, tests and the planner: random weights cost what trained ones do."""

import re
import tempfile
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from common.models.config import ModelConfig
from common.models.schema import ARCHITECTURES
from common.parallel_state import TPGroup, broadcast


def _shape(
    model_type: str, hidden: int, width: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool, theta: float,
    longest: int, eps: float = 1e-6, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    rope = more.pop("rope", None) or {"rope_type": "default"}
    return dict(
        model_type=model_type, vocab_size=vocab, hidden_size=hidden, intermediate_size=width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=longest,
        tie_word_embeddings=tied, rms_norm_eps=eps, rope_parameters={**rope, "rope_theta": theta}, **more,
    )  # fmt: skip


def _qwen2(hidden: int, width: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> dict[str, Any]:
    return _shape("qwen2", hidden, width, layers, heads, kv_heads, vocab, tied, 1_000_000.0, 32_768)


def _qwen3(hidden: int, width: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    return _shape("qwen3", hidden, width, layers, heads, 8, 151_936, tied, 1_000_000.0, 40_960, head_dim=128)


def _llama3(
    hidden: int, width: int, layers: int, heads: int, factor: float, tied: bool = False, **more
) -> dict[str, Any]:
    """factor: of the positions beyond 8,192, from Llama 3.1 on; 0 for Llama 3."""
    longest, rope = 8192, None
    if factor:
        longest, rope = 131_072, {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }  # fmt: skip
    return _shape(
        "llama", hidden, width, layers, heads, 8, 128_256, tied, 500_000.0, longest, eps=1e-5, rope=rope, **more
    )


def _smollm2(hidden: int, width: int, layers: int, heads: int, kv_heads: int, theta: float) -> dict[str, Any]:
    return _shape("llama", hidden, width, layers, heads, kv_heads, 49_152, True, theta, 8192, eps=1e-5)


def _qwen3_moe(hidden: int, width: int, layers: int, heads: int, expert: int) -> dict[str, Any]:
    """norm_topk_prob is true in the published files and false by default in transformers."""
    return _shape(
        "qwen3_moe", hidden, width, layers, heads, 4, 151_936, False, 1_000_000.0, 40_960, head_dim=128, num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=expert, norm_topk_prob=True,
    )  # fmt: skip


def _qwen2_moe(
    hidden: int, width: int, layers: int, heads: int, kv_heads: int, longest: int, experts: int, top_k: int, expert: int,
    shared: int,
) -> dict[str, Any]:  # fmt: skip
    return _shape(
        "qwen2_moe", hidden, width, layers, heads, kv_heads, 151_936, False, 1_000_000.0, longest, num_experts=experts,
        num_experts_per_tok=top_k, moe_intermediate_size=expert, shared_expert_intermediate_size=shared, norm_topk_prob=False,
    )  # fmt: skip


def _mixtral(hidden: int, expert: int, layers: int, heads: int, vocab: int, longest: int) -> dict[str, Any]:
    return _shape(
        "mixtral", hidden, expert, layers, heads, 8, vocab, False, 1_000_000.0, longest, eps=1e-5, num_local_experts=8,
        num_experts_per_tok=2,
    )  # fmt: skip


def _deepseek(
    version: str, hidden: int, width: int, layers: int, heads: int, vocab: int, mscale: float, experts: int, top_k: int,
    expert: int, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """A row of 512 + 64 numbers in all of them."""
    yarn = {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
        "mscale": mscale, "mscale_all_dim": mscale,
    }  # fmt: skip
    return _shape(
        version, hidden, width, layers, heads, heads, vocab, False, 10_000.0, 163_840, rope=yarn, n_routed_experts=experts,
        num_experts_per_tok=top_k, moe_intermediate_size=expert, **{"q_lora_rank": 1536, "first_k_dense_replace": 1, **more},
    )  # fmt: skip


_DEEPSEEK_V3 = _deepseek(
    "deepseek_v3", 7168, 18_432, 61, 128, 129_280, 1.0, 256, 8, 2048, n_shared_experts=1, n_group=8, topk_group=4,
    routed_scaling_factor=2.5, first_k_dense_replace=3,
)  # fmt: skip

# from the config.json of each on the Hub
CONFIGS = {
    "SmolLM2-135M": _smollm2(576, 1536, 30, 9, 3, 100_000.0),
    "SmolLM2-360M": _smollm2(960, 2560, 32, 15, 5, 100_000.0),
    "SmolLM2-1.7B": _smollm2(2048, 8192, 24, 32, 32, 130_000.0),
    "Qwen2.5-0.5B": _qwen2(896, 4864, 24, 14, 2, 151_936, True),
    "Qwen2.5-1.5B": _qwen2(1536, 8960, 28, 12, 2, 151_936, True),
    "Qwen2.5-3B": _qwen2(2048, 11_008, 36, 16, 2, 151_936, True),
    "Qwen2.5-7B": _qwen2(3584, 18_944, 28, 28, 4, 152_064, False),
    "Qwen2.5-14B": _qwen2(5120, 13_824, 48, 40, 8, 152_064, False),
    "Qwen2.5-32B": _qwen2(5120, 27_648, 64, 40, 8, 152_064, False),
    "Qwen2.5-72B": _qwen2(8192, 29_568, 80, 64, 8, 152_064, False),
    "Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, True),
    "Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, True),
    "Qwen3-4B": _qwen3(2560, 9728, 36, 32, True),
    "Qwen3-8B": _qwen3(4096, 12_288, 36, 32, False),
    "Qwen3-14B": _qwen3(5120, 17_408, 40, 40, False),
    "Qwen3-32B": _qwen3(5120, 25_600, 64, 64, False),
    "Llama-3-8B": _llama3(4096, 14_336, 32, 32, 0),
    "Llama-3-70B": _llama3(8192, 28_672, 80, 64, 0),
    "Llama-3.1-8B": _llama3(4096, 14_336, 32, 32, 8.0),
    "Llama-3.1-70B": _llama3(8192, 28_672, 80, 64, 8.0),
    "Llama-3.1-405B": _llama3(16_384, 53_248, 126, 128, 8.0),
    "Llama-3.2-1B": _llama3(2048, 8192, 16, 32, 32.0, True, head_dim=64),
    "Llama-3.2-3B": _llama3(3072, 8192, 28, 24, 32.0, True, head_dim=128),
}
MIXTURES = {
    "Mixtral-8x7B": _mixtral(4096, 14_336, 32, 32, 32_000, 32_768),
    "Mixtral-8x22B": _mixtral(6144, 16_384, 56, 48, 32_768, 65_536),
    "Qwen1.5-MoE-A2.7B": _qwen2_moe(2048, 5632, 24, 16, 16, 8192, 60, 4, 1408, 5632),
    "Qwen2-57B-A14B": _qwen2_moe(3584, 18_944, 28, 28, 4, 131_072, 64, 8, 2560, 20_480),
    "Qwen3-30B-A3B": _qwen3_moe(2048, 6144, 48, 32, 768),
    "Qwen3-235B-A22B": _qwen3_moe(4096, 12_288, 94, 64, 1536),
    "DeepSeek-V2-Lite": _deepseek(
        "deepseek_v2", 2048, 10_944, 27, 16, 102_400, 0.707, 64, 6, 1408, n_shared_experts=2, q_lora_rank=None),
    "DeepSeek-V2": _deepseek(
        "deepseek_v2", 5120, 12_288, 60, 128, 102_400, 0.707, 160, 6, 1536, n_shared_experts=2, n_group=8, topk_group=3,
        topk_method="group_limited_greedy", routed_scaling_factor=16.0),
    "DeepSeek-V3": _DEEPSEEK_V3,  # its files are FP8: this is their shape
    "DeepSeek-R1": _DEEPSEEK_V3,
}  # fmt: skip
OTHERS = ("gpt-oss-20b", "gpt-oss-120b")  # without a shape here


def model_shape(name: str) -> ModelConfig:
    """A published model by its name (with the owner, and -Instruct, -Base or -Chat behind it, or without), or a local folder.

    Raises ValueError for a model that is not in the table, with the nearest names.
    """
    if (Path(name) / "config.json").exists():
        return ModelConfig.from_folder(name)
    short = re.sub(r"-(v0\.\d|Instruct|Base|Chat|it)(-v?[\d.]+)?$", "", name.rsplit("/", 1)[-1])
    known = {each.lower(): each for each in (*CONFIGS, *MIXTURES, *OTHERS)}
    found = known.get(short.lower()) or known.get(short.lower().removeprefix("meta-"))
    if found in OTHERS:
        raise ValueError(f"model={name}: its attention is not here; use one of {', '.join(CONFIGS | MIXTURES)}")
    if found is None:
        near = get_close_matches(short.lower(), known, 3) or CONFIGS
        raise ValueError(
            f"model={name!r} is unknown; use {', '.join(known.get(each, each) for each in near)}, or a folder with a config.json"
        )
    return published_shape(found)


def published_shape(name: str, **changes) -> ModelConfig:
    """What the decoder needs to know of a model in CONFIGS or MIXTURES; changes as in published_config."""
    values = dict((CONFIGS | MIXTURES)[name], **changes)
    architecture = next(key for key, one in ARCHITECTURES.items() if one.model_type == values["model_type"])
    return ModelConfig.from_dict({**values, "architectures": [architecture]}, where=name)


def published_config(name: str, **changes):
    """transformers' configuration of a published model by its name; changes: num_hidden_layers=4, and what else its config has."""
    from transformers import AutoConfig  # noqa: PLC0415, seconds that who asks for a shape alone need not wait

    values = dict((CONFIGS | MIXTURES)[name], **changes)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def save_random_weights(name: str, folder: Path, device: str = "cpu", **changes) -> Path:
    """A bfloat16 checkpoint of that shape with random weights, made on `device`; kept if it is there already."""
    if not (folder / "config.json").exists():
        from transformers import AutoModelForCausalLM  # noqa: PLC0415, as above

        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(published_config(name, **changes), dtype=torch.bfloat16)
        # what is saved may be put together anew, experts apart: a card that holds it once has no room for that
        model.to("cpu")
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        model.save_pretrained(unfinished)
        unfinished.rename(folder)  # whoever is interrupted leaves no half of a checkpoint
    return folder


def weights_folder(name: str) -> Path:
    """Where random weights of that name are kept: in the temporary directory."""
    return Path(tempfile.gettempdir()) / "bench_checkpoints" / name


def shared_random_weights(name: str, tp: TPGroup, **changes) -> Path:
    """The same in the temporary directory, for all ranks of a host: rank 0 makes it, the others wait."""
    changed = "".join(f"-{key}={value}" for key, value in changes.items())
    folder = weights_folder(f"{name}{changed}")
    if tp.rank == 0:
        save_random_weights(name, folder, tp.device.type, **changes)
        if tp.device.type == "cuda":
            torch.cuda.empty_cache()
    broadcast(torch.zeros(1), tp, "checkpoint")  # COMM broadcast [1]: it is there
    return folder
