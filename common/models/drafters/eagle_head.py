"""EAGLE's draft model: one decoder layer that reads the target's hidden states and guesses the next one.

At index i it reads feature i (what the target computed at position i) and token i+1, writes its guess of feature i+1, and that
gives its guess of token i+2. Where the true feature is not known yet, its own guess stands in.

    EAGLE-1, 2   feature: the last hidden state, after the final norm (Li et al. 2024)
                 x = fc(embedding, feature)                        [T, 2D] -> [T, D]
                 h = x + attention(x)                              no norm before it
                 guess = h + mlp(norm(h)), logits by the target's LM head
    EAGLE-3      feature: the hidden states that enter three layers, g = fc(features) [T, 3D] -> [T, D] (Li et al. 2025)
                 h = g + attention(norm(embedding), norm(g))       q, k and v read [T, 2D]
                 guess = h + mlp(norm(h)), which is the next step's g; logits by an LM head of its own, of norm(guess), over a
                 part of the vocabulary: target id = draft id + d2t[draft id]

Attention and MLP are cut over the ranks as the target's are; fc and the norms are whole on each. Embedding and, in EAGLE-1, LM head
are the target's. Names in the files are those of the published heads (yuhuili/EAGLE-*, EAGLE3-*) and of what SGLang 0.5.23 loads
(srt/models/llama_eagle.py, llama_eagle3.py): layers.0.* without an input_layernorm, or midlayer.*.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.layers.cpu_linear import choose_forms
from common.layers.linear import ReplicatedLinear
from common.layers.mlp import MLP
from common.layers.norm import RMSNorm
from common.layers.rotary import RotaryEmbedding, apply_rotary
from common.layers.vocab import ParallelLMHead
from common.models.checkpoint import Stored, checkpoint_files, open_tensors
from common.models.config import ModelConfig
from common.models.decoder import SelfAttention
from common.models.drafters.contract import Target
from common.models.json_file import json_shown, read_json
from common.models.quantized_tensors import plain_tensors
from common.models.tensor_names import needed_of
from common.models.weights import CheckpointTensor, LoadReport, refuse_a_misfit
from common.parallel_state import TPGroup

Rotary = tuple[torch.Tensor, torch.Tensor]  # cos and sin [T, 1, d] of the indices, as RotaryEmbedding gives them
NAME = "draft"  # of its collectives in the ledger
SHARED = ("embed_tokens.weight", "lm_head.weight")  # copies of the target's that some files carry
SUFFIXES = ("Eagle3", "Eagle", "NextN")  # of architectures: LlamaForCausalLMEagle3


@dataclass(frozen=True)
class EagleConfig:
    version: int  # 1 (and 2, which shares its heads) or 3
    base: ModelConfig
    fc_bias: bool
    features: tuple[int, ...]  # the layers that these enter; (): the last ones
    draft_vocab: int | None  # of an LM head of its own; None: the target's

    @classmethod
    def from_folder(cls, folder: Path, version: int, target: ModelConfig) -> "EagleConfig":
        """Raises FileNotFoundError without a config, ValueError for a head that is not one of this target."""
        path = folder / "config.json"
        raw = read_json(path)
        base = ModelConfig.from_dict(raw | _as_decoder(raw), where=str(path))
        base = replace(base, qkv_bias=bool(raw.get("qkv_bias", base.qkv_bias)), tie_word_embeddings=False)
        if base.num_layers != 1:
            raise ValueError(f"{path}: num_hidden_layers={base.num_layers}; an EAGLE head of one layer is supported")
        sizes = {
            "hidden_size": (base.hidden_size, target.hidden_size),
            "vocab_size": (base.vocab_size, target.vocab_size),
        }
        for name, (own, wanted) in sizes.items():
            if own != wanted:
                raise ValueError(
                    f"{path}: {name}={own}, but the target's is {wanted}; give a head of this target as "
                    f"speculative_draft_model_path"
                )
        features = _captured(raw, target.num_layers, str(path)) if version == 3 else ()
        draft_vocab = raw.get("draft_vocab_size") if version == 3 else None
        if draft_vocab is not None and not (type(draft_vocab) is int and 1 <= draft_vocab <= base.vocab_size):
            raise ValueError(
                f"{path}: draft_vocab_size={json_shown(draft_vocab)} must be an integer from 1 to vocab_size={base.vocab_size}"
            )
        return cls(version, base, bool(raw.get("bias", version == 1)), features, draft_vocab)


def _as_decoder(raw: dict[str, Any]) -> dict[str, Any]:
    """LlamaForCausalLMEagle3 has the fields of LlamaForCausalLM."""
    name = (raw.get("architectures") or ["LlamaForCausalLM"])[0]
    for suffix in SUFFIXES:
        if isinstance(name, str) and name.endswith(suffix):
            name = name.removesuffix(suffix)
    return {"architectures": [name], "tie_word_embeddings": False}


def _captured(raw: dict[str, Any], layers: int, where: str) -> tuple[int, ...]:
    """A config numbers a layer by its output, which enters the next one; by default SGLang's three of a deep target."""
    said = (raw.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    entering = (2, layers // 2, layers - 3) if said is None else tuple(n + 1 for n in said)
    if len(entering) != 3 or not all(0 <= n < layers for n in entering):
        raise ValueError(
            f"{where}: hidden states of layers {', '.join(map(str, entering))} of a target of {layers} layers; "
            f"name three of them in eagle_config.eagle_aux_hidden_state_layer_ids (0 .. {layers - 2})"
        )
    return entering


class EagleLayer(nn.Module):
    """The decoder layer; which norms it begins with is the version's."""

    def __init__(self, config: EagleConfig, tp: TPGroup):
        super().__init__()
        base, wide = config.base, config.base.hidden_size * (2 if config.version == 3 else 1)
        if config.version == 3:
            self.input_layernorm = RMSNorm(base.hidden_size, base.rms_norm_eps)  # of the embedding
            self.hidden_norm = RMSNorm(base.hidden_size, base.rms_norm_eps)
        self.self_attn = SelfAttention(base, tp, 0, input_size=wide)
        self.self_attn.o_proj.name = f"{NAME}.o_proj"
        self.post_attention_layernorm = RMSNorm(base.hidden_size, base.rms_norm_eps)
        self.mlp = MLP(base.hidden_size, base.intermediate_size, tp, NAME)


class EagleHead(nn.Module):
    """inputs -> (residual, x); `keys_and_values` of any tokens; `forward` of those whose guess is wanted."""

    def __init__(self, config: EagleConfig, tp: TPGroup, max_positions: int):
        super().__init__()
        self.config, self.version, base = config.base, config.version, config.base
        self.fc = ReplicatedLinear(
            base.hidden_size * (3 if self.version == 3 else 2), base.hidden_size, tp, config.fc_bias, f"{NAME}.fc"
        )
        layer = EagleLayer(config, tp)
        if self.version == 3:
            self.midlayer, self.norm = layer, RMSNorm(base.hidden_size, base.rms_norm_eps)
        else:
            self.layers = nn.ModuleList([layer])
        if config.draft_vocab is not None:
            self.lm_head = ParallelLMHead(config.draft_vocab, base.hidden_size, tp)
        self.rotary = RotaryEmbedding(**base.rotary | {"max_positions": max_positions})

    @property
    def layer(self) -> EagleLayer:
        return self.midlayer if self.version == 3 else self.layers[0]

    def begin(self, features: torch.Tensor) -> torch.Tensor:
        """The target's features [T, F] -> what stands where the head's own guess does in later steps [T, D]."""
        return self.fc(features) if self.version == 3 else features

    def inputs(self, embeds: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """embeds [T, D] of tokens i+1, hidden [T, D] of indices i -> (what attention is added to [T, D], what q, k and v read)."""
        if self.version == 3:
            return hidden, torch.cat((self.layer.input_layernorm(embeds), self.layer.hidden_norm(hidden)), dim=-1)
        x = self.fc(torch.cat((embeds, hidden), dim=-1))
        return x, x

    def keys_and_values(self, x: torch.Tensor, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor]:
        """k, v [T, Hkv/R, d]: they depend on their own input alone, so an index whose guess nobody needs costs no more."""
        attn = self.layer.self_attn
        _, k, v = attn.qkv_proj.split(attn.qkv_proj(x))
        k, v = (y.unflatten(-1, (-1, attn.head_dim)) for y in (k, v))
        if attn.k_norm:
            k = attn.k_norm(k)
        return apply_rotary(k, rotary), v

    def forward(self, residual: torch.Tensor, x: torch.Tensor, rotary: Rotary, attention) -> torch.Tensor:
        """-> the guesses of features i+1 [T, D]."""
        layer = self.layer
        o = layer.self_attn(x, rotary, attention)
        y, residual = layer.post_attention_layernorm.add(o, residual)
        return residual + layer.mlp(y)


def load_head(
    folder: Path, version: int, target: Target, steps: int
) -> tuple[EagleHead, EagleConfig, torch.Tensor | None]:
    """This rank's part of the head in a folder, and for an LM head of its own the target's id of each of its tokens.

    steps: how far behind the last position of a sequence it guesses.
    Raises FileNotFoundError and ValueError for what is no head of this target, the same on every rank, before memory is taken:
    every parameter is filled and every tensor used, but for copies of what is the target's.
    """
    config = EagleConfig.from_folder(folder, version, target.model.config)
    with ExitStack() as stack:
        found = open_tensors(checkpoint_files(folder), stack)
        _refuse_other_version(found, version, str(folder))
        if version == 3 and config.draft_vocab is None and "lm_head.weight" in found:
            config = replace(config, draft_vocab=config.base.vocab_size)
        ids = _target_ids(found, config, target.tp.device, str(folder)) if config.draft_vocab is not None else None
        own_head = config.draft_vocab is not None
        with torch.device("meta"):
            needed = needed_of(EagleHead(config, target.tp, 1), found)
        refuse_a_misfit(
            plain_tensors(needed), found, f"an EAGLE{'-3' if version == 3 else ''} head as config.json describes it", str(folder),
            lambda name: name in SHARED[: 1 if own_head else 2] or name in ("d2t", "t2d") or name.endswith("rotary_emb.inv_freq"),
        )  # fmt: skip
        previous = torch.get_default_dtype()
        torch.set_default_dtype(target.dtype)
        try:
            with target.tp.device:
                head = EagleHead(config, target.tp, target.max_context + steps).eval()
        finally:
            torch.set_default_dtype(previous)
        report = LoadReport()
        for name, param, shard_id, _ in needed_of(head, found):
            param.weight_loader(CheckpointTensor(found[name].file, name, report), shard_id)
    choose_forms(head)
    return head, config, ids


def _refuse_other_version(found: dict[str, Stored], version: int, where: str) -> None:
    has = {1: any(n.startswith("layers.0.") for n in found), 3: any(n.startswith("midlayer.") for n in found)}
    other = 4 - version
    if has[other] and not has[version]:
        names = {1: "EAGLE", 3: "EAGLE3"}
        raise ValueError(f"{where} holds an {names[other]} head; use speculative_algorithm={names[other]}")


def _target_ids(found: dict[str, Stored], config: EagleConfig, device: torch.device, where: str) -> torch.Tensor | None:
    """d2t [draft_vocab] holds OFFSETS: -> the target's ids themselves; None if both have the same tokens.

    t2d [V], where it is stored, says the same again: which of the target's tokens the head knows.
    """
    size, vocab = config.draft_vocab, config.base.vocab_size
    if "d2t" not in found:
        if size == vocab:
            return None
        raise ValueError(
            f"{where}: draft_vocab_size={size} of vocab_size={vocab}, but no tensor d2t says which; fetch it again"
        )
    stored = found["d2t"]
    if stored.shape != (size,) or stored.dtype not in ("I64", "I32"):
        raise ValueError(
            f"{where}: d2t is {stored.dtype} {list(stored.shape)}, not I64 [{size}] as draft_vocab_size says"
        )
    ids = stored.file.get_tensor("d2t").long() + torch.arange(size)
    if int(ids.min()) < 0 or int(ids.max()) >= vocab or len(ids.unique()) != size:
        raise ValueError(
            f"{where}: draft id + d2t leads to {len(ids.unique())} tokens from {int(ids.min())} to {int(ids.max())}, not to {size} "
            f"of 0 .. {vocab - 1}; d2t holds offsets"
        )
    if "t2d" in found:
        known = torch.zeros(vocab, dtype=torch.bool)
        known[ids] = True
        if found["t2d"].shape != (vocab,) or not torch.equal(found["t2d"].file.get_tensor("t2d").bool(), known):
            raise ValueError(f"{where}: t2d and d2t name different tokens; fetch the head again")
    return ids.to(device)
