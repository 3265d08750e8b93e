"""A config whose sizes are far beyond those of the weight files: refused before a model of these sizes is built.

Even one without memory would not be built in time. What is not far beyond, weights.refuse_a_misfit compares tensor by tensor.
"""

import re

from common.layers.moe import Mixture
from common.models.checkpoint import Stored
from common.models.config import ModelConfig
from common.models.json_file import json_shown

QUICKLY_BUILT = 1 << 16  # up to here a wrong size is left to the comparison by name, which says more
QUICKLY_NAMED = 1 << 10  # experts, each with three tensors by name in every layer
LAYER = re.compile(r"model\.layers\.(\d+)\.")


def refuse_sizes_beyond_the_files(config: ModelConfig, found: dict[str, Stored], where: str) -> None:
    """Raises ValueError for sizes that no tensor of the files could have."""
    _refuse_a_decoder_beyond_the_files(config, found, where)
    _refuse_experts_beyond_the_files(config.mixture, found, where)
    _refuse_latents_beyond_the_files(config, found, where)
    _refuse_a_tower_beyond_the_files(config, found, where)


def _refuse_a_decoder_beyond_the_files(config: ModelConfig, found: dict[str, Stored], where: str) -> None:
    layers = len({match[1] for match in map(LAYER.match, found) if match})
    claims = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads * head_dim": config.num_heads * config.head_dim,
    }
    _refuse_beyond_the_widest(claims, QUICKLY_BUILT, found, where)
    if config.num_layers > len(found):
        raise ValueError(_beyond(where, "num_hidden_layers", config.num_layers, f"have {layers} layers"))


def _refuse_experts_beyond_the_files(mixture: Mixture | None, found: dict[str, Stored], where: str) -> None:
    if mixture:
        widths = {
            "moe_intermediate_size": mixture.intermediate_size,
            "shared_expert_intermediate_size": mixture.shared_size,
        }
        _refuse_beyond_the_widest(widths, QUICKLY_BUILT, found, where)
        _refuse_beyond_the_widest({"num_experts": mixture.num_experts}, QUICKLY_NAMED, found, where)


def _refuse_latents_beyond_the_files(config: ModelConfig, found: dict[str, Stored], where: str) -> None:
    if latent := config.latent:
        widths = {
            "kv_lora_rank + qk_rope_head_dim": latent.row,
            "q_lora_rank": latent.q_rank or 0,
            "num_attention_heads * v_head_dim": config.num_heads * latent.v_dim,
        }
        _refuse_beyond_the_widest(widths, QUICKLY_BUILT, found, where)


def _refuse_a_tower_beyond_the_files(config: ModelConfig, found: dict[str, Stored], where: str) -> None:
    if config.vision:
        tower = config.vision.tower
        width, mlp = ("hidden_size", "intermediate_size") if tower.gated else ("embed_dim", "embed_dim * mlp_ratio")
        widths = {f"vision_config's {width}": tower.width, f"vision_config's {mlp}": tower.mlp_width}
        _refuse_beyond_the_widest(widths, QUICKLY_BUILT, found, where)
        if tower.depth > len(found):
            raise ValueError(_beyond(where, "vision_config's depth", tower.depth, f"have {len(found)} tensors"))


def _refuse_beyond_the_widest(claims: dict[str, int], small: int, found: dict[str, Stored], where: str) -> None:
    """Those up to `small` may pass: another error will say more."""
    widest = max((max(stored.shape, default=1) for stored in found.values() if 0 not in stored.shape), default=0)
    for name, size in claims.items():
        if size > max(widest, small):
            raise ValueError(_beyond(where, name, size, f"have no tensor longer than {widest}"))


def _beyond(where: str, name: str, size: int, have: str) -> str:
    return (
        f"{where}: config.json says {name}={json_shown(size)}, but the weight files {have}; "
        f"use the config and the weights of one checkpoint"
    )
