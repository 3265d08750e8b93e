"""A Hugging Face config.json -> the facts the decoder needs.

One decoder serves the models that differ only in these facts:

    Qwen2ForCausalLM (Qwen2, Qwen2.5)   bias on q, k, v
    Qwen3ForCausalLM                    RMSNorm on each q and k head, head_dim given
    LlamaForCausalLM                    neither; llama3 rope scaling
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM")
ROPE_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class ModelConfig:
    architecture: str
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # Hq
    num_kv_heads: int  # Hkv
    head_dim: int  # d
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    dtype: str  # of the checkpoint: float32, bfloat16, float16
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read config.json (and generation_config.json for the end-of-text tokens).

        Raises FileNotFoundError without a config, ValueError for a model this decoder cannot run.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing; give a folder in Hugging Face layout (config.json, *.safetensors)"
            )
        raw = read_json(path)
        generation = path.with_name("generation_config.json")
        eos = raw.get("eos_token_id")
        if generation.is_file():
            eos = read_json(generation).get("eos_token_id", eos)
        return cls.from_dict(raw, eos, where=str(path))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], eos: Any = None, where: str = "config") -> "ModelConfig":
        architecture = (raw.get("architectures") or ["none named"])[0]
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f"{where}: architecture {architecture} is not supported; supported: {', '.join(ARCHITECTURES)}"
            )
        missing = [k for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
                   if k not in raw]  # fmt: skip
        if missing:
            raise ValueError(f"{where}: {', '.join(missing)} missing; this is not a complete {architecture} config")
        _refuse_what_would_be_wrong(raw, where)
        heads = raw["num_attention_heads"]
        qwen2 = architecture == "Qwen2ForCausalLM"
        theta, scaling = _rope(raw, where)
        return cls(
            architecture=architecture,
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            max_position_embeddings=raw.get("max_position_embeddings", 2048),
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            qkv_bias=qwen2 or raw.get("attention_bias", False),
            o_bias=not qwen2 and raw.get("attention_bias", False),
            qk_norm=architecture == "Qwen3ForCausalLM",
            dtype=raw.get("dtype") or raw.get("torch_dtype") or "float32",  # transformers 5 says dtype, 4 torch_dtype
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        )

    @property
    def rotary(self) -> dict[str, Any]:
        """The arguments of its RotaryEmbedding."""
        return {
            "head_dim": self.head_dim, "max_positions": self.max_position_embeddings, "theta": self.rope_theta,
            "scaling": self.rope_scaling,
        }  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, naming the file, for anything else."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}, not an object")
    return raw


def _rope(raw: dict[str, Any], where: str) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling): transformers 5 writes both into rope_parameters, 4 wrote rope_theta and rope_scaling."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or raw.get("rope_theta") or 10000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind not in ROPE_KEYS:
        raise ValueError(f"{where}: rope_type={kind!r} is not supported; supported: default, {', '.join(ROPE_KEYS)}")
    absent = [key for key in ROPE_KEYS[kind] if key not in rope]
    if absent:
        raise ValueError(f"{where}: rope_type={kind!r} needs {', '.join(absent)}")
    return theta, {"rope_type": kind, **{key: rope[key] for key in ROPE_KEYS[kind]}}


def _refuse_what_would_be_wrong(raw: dict[str, Any], where: str) -> None:
    """Features that would change the numbers silently if they were ignored."""
    if raw.get("use_sliding_window"):
        raise ValueError(f"{where}: use_sliding_window=true is not supported; attention here is always full")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{where}: hidden_act={raw['hidden_act']!r} is not supported; supported: silu")
    if raw.get("mlp_bias"):
        raise ValueError(f"{where}: mlp_bias=true is not supported")
    if raw.get("quantization_config"):
        raise ValueError(f"{where}: quantized checkpoints are not supported; use the float16, bfloat16 or float32 one")
