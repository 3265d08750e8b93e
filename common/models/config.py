"""A Hugging Face config.json -> the facts the decoder needs.

One decoder serves the models that differ only in these facts:

    Qwen2ForCausalLM (Qwen2, Qwen2.5)   bias on q, k, v
    Qwen3ForCausalLM                    RMSNorm on each q and k head, head_dim given
    LlamaForCausalLM                    neither; llama3 rope scaling
    Qwen2MoeForCausalLM                 as Qwen2, experts in place of the MLP, and one that all tokens visit
    Qwen3MoeForCausalLM                 as Qwen3, experts in place of the MLP
    MixtralForCausalLM                  as Llama, experts in place of the MLP
    DeepseekV2ForCausalLM, V3           latent attention (layers/mla.py), experts in all but the first layers
    Qwen2VLForConditionalGeneration, Qwen2_5_VL   as Qwen2, and a vision tower beside it (vision.py)

schema.py says what may stand under each key. Many facts stand in a checkpoint twice; which one counts is what
transformers 5.23 does, found by trying, or the checkpoint is refused:

    dtype | torch_dtype                               the first; the types of the stored tensors are not asked
    rope_parameters | rope_scaling                    rope_scaling, whole, unless it is empty
    rope_theta in it | beside it                      the one inside; not that of the other object
    rope_type | type                                  the first
    original_max_position_embeddings in it | beside   the one beside; neither: max_position_embeddings
    head_dim | hidden_size / num_attention_heads      the first; weights.py compares it with the weights
    eos_token_id in generation_config | config        the first, if the key is there. The tokenizer's is not asked
    architectures | model_type                        refused unless they agree
    num_experts | num_local_experts | n_routed_experts   refused unless they agree
    layer_types | num_hidden_layers, sliding_window   refused unless they agree
    one key twice in an object                        refused unless the values agree
    tie_word_embeddings | a stored lm_head            the stored one (weights.py)
    all sizes | shapes of the tensors                 refused unless they agree (weights.py)
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.layers.expert_placement import refuse_ranks_without
from common.layers.mla import Latent
from common.layers.rotary import grown_by_yarn
from common.models.fields import read_fields
from common.models.json_file import json_shown, name_shown, read_json
from common.models.mixture import Mixture
from common.models.schema import ARCHITECTURES, END_TOKENS, LEFT_OUT, MAX_POSITIONS, ROPE_TYPES, Architecture
from common.models.vision import Vision, text_of, vision_of
from common.quantization.config import QuantizationConfig


@dataclass(frozen=True)
class ModelConfig:
    architecture: str
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # Hq
    num_kv_heads: int  # Hkv; 1 with latent attention: a row is all that is cached, for all heads
    head_dim: int  # d; of a query: with latent attention dn + r
    max_position_embeddings: int  # the longest context; with yarn the stretched one
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None  # rope_type and all that belongs to it; see layers/rotary.py
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    dtype: str  # of the checkpoint: float32, bfloat16, float16
    eos_token_ids: tuple[int, ...]
    latent: Latent | None = None  # what is cached instead of K and V
    draft_layers: int = 0  # behind the last: a checkpoint may have such, which only guess, and they are left alone
    mixture: Mixture | None = None  # experts in place of some or all MLPs
    vision: Vision | None = None  # a tower beside the decoder, whose rows stand among those of the tokens
    quantization: QuantizationConfig | None = None  # how its weights are written; None: as numbers

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read config.json (and generation_config.json for the end-of-text tokens).

        Raises FileNotFoundError without a config, ValueError for a model this decoder cannot run, each in one line
        with file, key, value and what is allowed.
        """
        path = Path(folder) / "config.json"
        try:
            raw = read_json(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error}; give a folder in Hugging Face layout (config.json, *.safetensors)"
            ) from None
        beside, generation = path.with_name("generation_config.json"), {}
        if os.path.lexists(beside):
            generation = read_json(beside)
            read_fields(generation, END_TOKENS, str(beside), "a generation config")
        return cls.from_dict(raw, generation, where=str(path))

    @classmethod
    def from_dict(
        cls, raw: dict[str, Any], generation: dict[str, Any] | None = None, where: str = "config"
    ) -> "ModelConfig":
        """The same from what the files hold."""
        name = _architecture(raw, where)
        architecture = ARCHITECTURES[name]
        text = text_of(raw, where) if architecture.sees else raw
        read = read_fields(text, architecture.fields, where, f"a config of {name}")
        _refuse_sliding_windows(read, where)
        theta, scaling, longest = _rope(read, where, architecture.sees)
        latent = _latent(read, scaling, where) if "kv_lora_rank" in read else None
        heads = (_heads if latent is None else _latent_heads)(read, where)
        vision = None
        if architecture.sees:
            rope, sizes = (
                read["rope_scaling"] or read["rope_parameters"] or {},
                (read["hidden_size"], read["vocab_size"]),
            )
            vision = vision_of(raw, architecture.model_type, rope, heads["head_dim"], *sizes, where)
        return cls(
            architecture=name,
            vocab_size=read["vocab_size"],
            hidden_size=read["hidden_size"],
            intermediate_size=read["intermediate_size"],
            num_layers=read["num_hidden_layers"],
            **heads,
            max_position_embeddings=longest,
            rms_norm_eps=float(read["rms_norm_eps"]),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=read["tie_word_embeddings"],
            **_biases(architecture, read),
            qk_norm=architecture.qk_norm,
            dtype=read["dtype"] or "float32",
            eos_token_ids=_end_tokens({**read, **(generation or {})}["eos_token_id"], read["vocab_size"]),
            latent=latent,
            draft_layers=read.get("num_nextn_predict_layers") or 0,
            mixture=architecture.mixture(read, where) if architecture.mixture else None,
            vision=vision,
            quantization=QuantizationConfig.from_checkpoint(raw, where),
        )

    @property
    def rotary(self) -> dict[str, Any]:
        """The arguments of its RotaryEmbedding."""
        return {
            "head_dim": self.latent.rope_dim if self.latent else self.head_dim, "max_positions": self.max_position_embeddings,
            "theta": self.rope_theta, "scaling": self.rope_scaling, "sections": self.vision.mrope_section if self.vision else (),
        }  # fmt: skip

    def refuse_experts_layout(self, ep: int, dispatch: str = "replicated", redundant: int = 0) -> None:
        """Raises ValueError for experts that cannot be dealt out so over `ep` ranks; a dense model has none at all."""
        if self.mixture is not None:
            experts = self.mixture.num_experts
            refuse_ranks_without(experts, ep)
            if redundant > experts * (ep - 1):
                raise ValueError(
                    f"ep_num_redundant_experts={redundant}: with {experts * (ep - 1)} each of {ep} ranks has all of {experts} "
                    f"experts already; use at most that"
                )
        elif ep > 1 or dispatch != "replicated":
            asked = f"to deal out over ep_size={ep} (vLLM: enable_expert_parallel)"
            if ep == 1:
                asked = f"for rows to travel to (ep_dispatch={dispatch})"
            raise ValueError(
                f"{self.architecture} has no experts {asked}; leave that out: tensor parallelism cuts its MLPs"
            )

    @property
    def kv_row(self) -> dict[str, int]:
        """What a page holds of a token, layer and KV head: arguments of PagedKVCache and of its bytes_per_page."""
        return {"head_dim": self.latent.row, "planes": 1} if self.latent else {"head_dim": self.head_dim, "planes": 2}


def _architecture(raw: dict[str, Any], where: str) -> str:
    """The first of `architectures`; model_type, if it is given, must name the same model."""
    names = raw.get("architectures") or ["none named"]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise ValueError(f"{where}: architectures={json_shown(names)} must be a list of texts")
    if names[0] not in ARCHITECTURES:
        why = f" ({LEFT_OUT[names[0]]})" if names[0] in LEFT_OUT else ""
        raise ValueError(
            f"{where}: architecture {name_shown(names[0])} is not supported{why}; supported: {', '.join(ARCHITECTURES)}"
        )
    want = ARCHITECTURES[names[0]].model_type
    given = raw.get("model_type", want)
    if given != want:
        raise ValueError(f"{where}: model_type={json_shown(given)} is not that of {names[0]}, which is {want!r}")
    return names[0]


def _biases(architecture: Architecture, read: dict[str, Any]) -> dict[str, bool]:
    if architecture.qkv_bias is not None or "qkv_bias" in read:
        return {"qkv_bias": read.get("qkv_bias", architecture.qkv_bias), "o_bias": False}
    return {"qkv_bias": read["attention_bias"], "o_bias": read["attention_bias"]}


def _heads(read: dict[str, Any], where: str) -> dict[str, int]:
    heads = read["num_attention_heads"]
    kv_heads = read["num_key_value_heads"] or heads
    if heads % kv_heads:
        raise ValueError(
            f"{where}: num_attention_heads={json_shown(heads)} is not a multiple of num_key_value_heads={json_shown(kv_heads)}"
        )
    head_dim = read["head_dim"] or read["hidden_size"] // heads
    if head_dim < 2 or head_dim % 2:
        origin = "" if read["head_dim"] else (
            f" (hidden_size={json_shown(read['hidden_size'])} over num_attention_heads={json_shown(heads)})"
        )  # fmt: skip
        raise ValueError(
            f"{where}: head_dim={json_shown(head_dim)}{origin} must be even and at least 2; rotary pairs its halves"
        )
    return {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}


def _latent(read: dict[str, Any], scaling: dict[str, Any] | None, where: str) -> Latent:
    nope, rope, v = (read[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    if rope % 2:
        raise ValueError(f"{where}: qk_rope_head_dim={json_shown(rope)} must be even; rotary turns pairs")
    scale, grown = (nope + rope) ** -0.5, (read["rope_scaling"] or read["rope_parameters"] or {}).get("mscale_all_dim")
    if scaling and grown:
        if scaling["rope_type"] != "yarn":
            raise ValueError(f"{where}: mscale_all_dim={json_shown(grown)} is supported with rope_type='yarn' only")
        scale *= grown_by_yarn(scaling["factor"], grown) ** 2
    return Latent(read["kv_lora_rank"], rope, nope, v, read["q_lora_rank"], scale, read.get("rope_interleave", True))


def _latent_heads(read: dict[str, Any], where: str) -> dict[str, int]:
    """Heads of K and V are made of the row that is cached: as many as there are query heads, and 1 in the cache."""
    heads = read["num_attention_heads"]
    if read["num_key_value_heads"] not in (None, heads):
        raise ValueError(
            f"{where}: num_key_value_heads={json_shown(read['num_key_value_heads'])} is not num_attention_heads="
            f"{json_shown(heads)}; latent attention has K and V for each query head"
        )
    return {"num_heads": heads, "num_kv_heads": 1, "head_dim": read["qk_nope_head_dim"] + read["qk_rope_head_dim"]}


def _refuse_sliding_windows(read: dict[str, Any], where: str) -> None:
    """Attention here is always full. A Qwen config may speak of windows that no layer has."""
    layers, types = read["num_hidden_layers"], read["layer_types"]
    if types is None:
        if read.get("use_sliding_window") and read["sliding_window"] and read["max_window_layers"] < layers:
            raise ValueError(f"{where}: use_sliding_window=true is not supported; attention here is always full")
        return
    if len(types) != layers:
        raise ValueError(f"{where}: layer_types has {len(types)} entries, num_hidden_layers={json_shown(layers)}")
    other = next((kind for kind in types if kind != "full_attention"), None)
    if other is not None:
        raise ValueError(f"{where}: {json_shown(other)} in layer_types is not supported; supported: full_attention")


def _end_tokens(eos: Any, vocab_size: int) -> tuple[int, ...]:
    """Those that can be sampled: some configs say -1 for none, and whoever masks an end token indexes logits by it."""
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    return tuple(token for token in eos if 0 <= token < vocab_size)


def _rope(read: dict[str, Any], where: str, sees: bool) -> tuple[float, dict[str, Any] | None, int]:
    """(theta, scaling, longest context)."""
    key = "rope_scaling" if read["rope_scaling"] else "rope_parameters"
    rope, longest = read[key] or {}, read["max_position_embeddings"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = [one for one in ROPE_TYPES if one != "mrope" or sees]
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"{where}: rope_type={json_shown(kind)} is not supported; supported: {', '.join(known)}")
    nested = next((name for name, value in rope.items() if isinstance(value, dict)), None)
    if nested is not None:
        raise ValueError(
            f"{where}: {key} has an object of its own for {json_shown(nested)}; one for all layers is supported"
        )
    # whose theta: rope_scaling takes the place of rope_parameters with all that is in it
    scaling = read_fields(rope, ROPE_TYPES[kind], f"{where}: {key}", f"rope_type={kind!r}")
    theta = scaling.pop("rope_theta") or read["rope_theta"]
    if theta is None:
        raise ValueError(f"{where}: rope_theta=null, and {key} has none; it must be a number")
    del scaling["partial_rotary_factor"]
    if kind in ("default", "mrope"):
        return float(theta), None, longest
    if "original_max_position_embeddings" in scaling:
        original = read["original_max_position_embeddings"] or scaling["original_max_position_embeddings"] or longest
        scaling["original_max_position_embeddings"] = original
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError(
            f"{where}: {key}: high_freq_factor={json_shown(scaling['high_freq_factor'])} must be above "
            f"low_freq_factor={json_shown(scaling['low_freq_factor'])}"
        )
    if kind == "yarn":
        if theta <= 1:
            raise ValueError(f"{where}: rope_theta={json_shown(theta)} must be above 1 for rope_type='yarn'")
        if scaling["factor"] is None:
            scaling["factor"] = longest / original
        # Qwen's recipe for long contexts leaves max_position_embeddings as it was trained
        longest = max(longest, int(original * scaling["factor"]))
        if longest > MAX_POSITIONS:
            raise ValueError(
                f"{where}: {key}: {json_shown(original)} original positions stretched by factor={json_shown(scaling['factor'])} "
                f"are more than the {MAX_POSITIONS} that are supported"
            )
    return float(theta), {"rope_type": kind, **scaling}, longest
