"""The shapes of published models, for benchmarks and tests: random weights cost what trained ones do."""

import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from common.parallel_state import TPGroup, broadcast

CONFIGS = {
    "SmolLM2-135M": dict(
        model_type="llama", vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    ),
    "Qwen2.5-0.5B": dict(
        model_type="qwen2", vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32_768, tie_word_embeddings=True,
        rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    ),
    "Qwen3-0.6B": dict(
        model_type="qwen3", vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960,
        tie_word_embeddings=True, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    ),
    "Qwen2.5-7B": dict(
        model_type="qwen2", vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=32_768, tie_word_embeddings=False,
        rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    ),
}  # fmt: skip


def published_config(name: str, **changes) -> PretrainedConfig:
    """The configuration of a published model by its name."""
    values = dict(CONFIGS[name], **changes)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def save_random_weights(name: str, folder: Path, device: str = "cpu") -> Path:
    """A bfloat16 checkpoint of that shape with random weights, made on `device`; kept if it is there already."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(published_config(name), dtype=torch.bfloat16)
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        model.save_pretrained(unfinished)
        unfinished.rename(folder)  # whoever is interrupted leaves no half of a checkpoint
    return folder


def shared_random_weights(name: str, tp: TPGroup) -> Path:
    """The same in the temporary directory, for all ranks of a host: rank 0 makes it, the others wait."""
    folder = Path(tempfile.gettempdir()) / "bench_checkpoints" / name
    if tp.rank == 0:
        save_random_weights(name, folder, tp.device.type)
        if tp.device.type == "cuda":
            torch.cuda.empty_cache()
    broadcast(torch.zeros(1), tp, "checkpoint")  # COMM broadcast [1]: it is there
    return folder
