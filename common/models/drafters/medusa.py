"""Medusa as a drafter: K heads on the target's last hidden state, of which head i guesses i + 1 tokens further than the LM head.

    hidden state at p-1 ── LM head ──> token p         drawn already: the root of the tree
                        ├─ head 1 ───> token p+1       its best, second best, ...
                        ├─ head 2 ───> token p+2
                        └─ head 3 ───> token p+3

    head:  x = x + SiLU(W x + b), `medusa_num_layers` times, then an LM head of its own, or the target's

No head knows what another one guesses, so a tree is a choice among all combinations of their best: [0] the best of head 1, [0, 1]
the second best of head 2 below it. Which choices are worth a node depends on how often each head's best, second best, ... is right;
the list, the most useful first, is in config.json (`medusa_choices`), measured where the heads were trained. What a sequence leaves
for its next step is one hidden state; there is no K and V, and a prefix that the radix tree finds needs nothing.

Medusa, Cai et al. 2024, sections 2.1 and 2.2. Files as FasterDecoding's code names them, heads and layers by number:
    0.0.linear.weight [D, D], 0.0.linear.bias [D], 0.1.weight [V, D]      the first head of one layer, and its LM head
Theirs come as medusa_lm_head.pt, a pickle, which is not read: store the same names as safetensors. SGLang 0.5.23 has no Medusa;
vLLM takes the best token of each head, a chain (vllm/v1/spec_decode/medusa.py).
"""

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.attention.sequence_table import SequenceTable
from common.distributed.transfer import upload, upload_all
from common.draft_tree import Accepted, DraftTree
from common.layers.heads import split_evenly
from common.layers.linear import load_pieces, loadable
from common.layers.vocab import best_logprobs
from common.models.checkpoint import Stored, checkpoint_files, open_tensors
from common.models.drafters.contract import Drafter, DraftOptions, Draws, Roots, Target
from common.models.hub import resolve_model
from common.models.json_file import json_shown, read_json
from common.models.quantized_tensors import plain_tensors
from common.models.tensor_names import Needed
from common.models.weights import CheckpointTensor, LoadReport, refuse_a_misfit
from common.parallel_state import TPGroup

PREFIX = "medusa_head."  # of the names, in files that hold more than the heads
MOST_HEADS, MOST_LAYERS, MOST_CHOICES = 64, 64, 4096

Choice = tuple[int, ...]  # (0, 1): the best of head 1, and below it the second best of head 2


class MedusaHeads(nn.Module):
    """hidden [B, D] -> logits of this rank [B, K, V/R]. The blocks are whole on each rank, LM heads are cut as the target's is.

    All heads are computed at once: weight [M, K, D, D] are the blocks of M layers. shared: the target's LM head, or None for
    own ones [K, V/R, D].
    """

    def __init__(self, heads: int, layers: int, hidden_size: int, vocab_size: int, tp: TPGroup, shared: bool):
        super().__init__()
        of = {(layer, head): (hidden_size, hidden_size) for layer in range(layers) for head in range(heads)}
        self.weight = loadable(torch.zeros(layers, heads, hidden_size, hidden_size), self._load_weight, of)
        biases = {where: shape[:1] for where, shape in of.items()}
        self.bias = loadable(torch.zeros(layers, heads, 1, hidden_size), self._load_bias, biases)
        self.lm_heads = None
        if not shared:
            local, self._pieces = split_evenly(vocab_size, tp.rank, tp.size)
            of = {head: (vocab_size, hidden_size) for head in range(heads)}
            self.lm_heads = loadable(torch.zeros(heads, local, hidden_size), self._load_lm_head, of)

    def _load_weight(self, source, at: tuple[int, int]) -> None:
        self.weight[at].copy_(source.read(0, 0, source.shape[0]))

    def _load_bias(self, source, at: tuple[int, int]) -> None:
        self.bias[at].copy_(source.read(0, 0, source.shape[0]))

    def _load_lm_head(self, source, head: int) -> None:
        load_pieces(self.lm_heads[head], source, 0, self._pieces)

    def needed(self, prefix: str) -> list[Needed]:
        """What fills it, under the published names."""
        found, layers = [], len(self.weight)
        for (layer, head), shape in self.weight.shard_shapes.items():
            name = f"{prefix}{head}.{layer}.linear"
            found.append(Needed(f"{name}.weight", self.weight, (layer, head), shape))
            found.append(Needed(f"{name}.bias", self.bias, (layer, head), shape[:1]))
        if self.lm_heads is not None:
            for head, shape in self.lm_heads.shard_shapes.items():
                found.append(Needed(f"{prefix}{head}.{layers}.weight", self.lm_heads, head, shape))
        return found

    def forward(self, hidden: torch.Tensor, heads: int, lm_head) -> torch.Tensor:
        """Of the first so many heads; lm_head: the target's."""
        x = hidden.expand(heads, *hidden.shape)  # [K, B, D]
        for weight, bias in zip(self.weight[:, :heads], self.bias[:, :heads], strict=True):
            x = x + F.silu(torch.baddbmm(bias, x, weight.transpose(1, 2)))
        if self.lm_heads is None:
            logits = lm_head(x.flatten(0, 1)).unflatten(0, (heads, -1))
        else:
            logits = torch.bmm(x, self.lm_heads[:heads].transpose(1, 2))
        return logits.transpose(0, 1)


class MedusaDrafter(Drafter):
    """`path`: a folder with the heads and their config.json; None: those of the bundled model."""

    features = ()

    def __init__(self, options: DraftOptions, target: Target):
        self.options, self.target, self.device = options, target, target.tp.device
        self.heads, choices = load_heads(resolve_model(options.path), target)
        self.module, count = self.heads, self.heads.weight.shape[1]
        if options.steps > count:
            raise ValueError(
                f"speculative_num_steps={options.steps}, but there are {count} Medusa heads, which guess as many tokens; "
                f"use {count} or fewer"
            )
        kept = chosen(choices or likely_choices(count, options.topk, options.nodes - 1), options)
        # what the list does not fill hangs below the root, and may be right as well: then there is something to move
        self.chains = len(kept) == options.nodes - 1 and all(set(choice) == {0} for choice in kept)
        self._depth = max(map(len, kept), default=0)
        self._most = 1 + max((choice[-1] for choice in kept), default=0)  # ranks of a head that are looked at
        number = {choice: i for i, choice in enumerate([(), *kept])}
        missing = [0] * (options.nodes - 1 - len(kept))  # token 0 below the root
        at = [(len(choice) - 1) * self._most + choice[-1] for choice in kept]  # in a row of all heads' best
        self._real = len(kept)
        self._at = upload(np.array(at, dtype=np.int64), self.device)
        below = [-1, *(number[choice[:-1]] for choice in kept), *missing]
        self._parents = upload(np.array(below, dtype=np.int64), self.device)
        hidden_size = target.model.config.hidden_size
        self._newest = torch.zeros(
            target.num_rows, hidden_size, dtype=target.dtype, device=self.device
        )  # feature of each row

    def prefill(self, table, token_ids, rows, cached, new, features) -> None:
        there, last = upload_all(self.device, rows, np.cumsum(new) - 1)
        self._newest[there] = features[last]

    def accepted(self, table, rows, positions, tree, accepted: Accepted, features) -> None:
        (there,) = upload_all(self.device, rows)
        last = accepted.nodes.gather(1, accepted.counts.unsqueeze(1) - 1)  # [B, 1]
        self._newest[there] = features.gather(1, last.unsqueeze(-1).expand(-1, -1, features.shape[2])).squeeze(1)

    def draft(
        self, table: SequenceTable, roots: Roots, last_tokens: torch.Tensor, nodes: int, draws: Draws | None = None
    ) -> DraftTree:
        guesses = last_tokens.new_zeros(len(last_tokens), nodes - 1)
        real = min(self._real, nodes - 1)  # every beginning of the list is a tree
        if real:
            model = self.target.model
            logits = self.heads(self._newest[roots.rows], self._depth, model.compute_logits)  # [B, K, V/R]
            _, best = best_logprobs(logits.flatten(0, 1), self._most, model.config.vocab_size, self.target.tp)
            guesses[:, :real] = best.unflatten(0, (len(last_tokens), -1)).flatten(1)[:, self._at[:real]]
        tokens = torch.cat((last_tokens.unsqueeze(1), guesses), dim=1)
        return DraftTree(tokens, self._parents[:nodes].expand(tokens.shape))


def chosen(choices: Sequence[Choice], options: DraftOptions) -> list[Choice]:
    """The first nodes - 1 of them that are no deeper than `steps` and take none but the `topk` best of a head."""
    fit = [choice for choice in choices if len(choice) <= options.steps and max(choice) < options.topk]
    return fit[: options.nodes - 1]


def likely_choices(heads: int, topk: int, count: int) -> list[Choice]:
    """A list for heads that come without one, as if each rank were right 0.3 times as often as the rank before it, and each head
    0.7 times as often as the head before it, whose best is right in 6 of 10 cases."""

    def chance(choice: Choice) -> float:
        return prod(0.6 * 0.7**head * 0.3**rank for head, rank in enumerate(choice))

    most = min(topk, 10)
    below = [()]
    found: list[Choice] = []
    for _ in range(heads):
        below = [(*choice, rank) for choice, rank in product(below, range(most))]
        below = sorted(below, key=lambda choice: (-chance(choice), choice))[:count]
        found += below
    return sorted(found, key=lambda choice: (-chance(choice), len(choice), choice))[:count]


def load_heads(folder: str | Path, target: Target) -> tuple[MedusaHeads, list[Choice] | None]:
    """This rank's part of the heads in a folder, and their list of choices if config.json has one.

    Raises FileNotFoundError and ValueError for what is no set of heads of this target, the same on every rank, before memory is
    taken: every parameter is filled and every tensor used.
    """
    folder, config = Path(folder), target.model.config
    path = folder / "config.json"
    raw = read_json(path)
    heads, layers = (
        _whole(raw, name, most, path)
        for name, most in (("medusa_num_heads", MOST_HEADS), ("medusa_num_layers", MOST_LAYERS))
    )
    choices = _choices(raw, heads, path)
    pickled = sorted(one.name for one in folder.glob("*.pt"))
    if pickled and not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{folder} has {pickled[0]}, a pickle, which may run code and is not read; store its tensors under the same names as "
            f"safetensors"
        )
    with ExitStack() as stack:
        found = open_tensors(checkpoint_files(folder), stack)
        prefix = PREFIX if any(name.startswith(PREFIX) for name in found) else ""
        shared = not any(f"{prefix}{head}.{layers}.weight" in found for head in range(heads))
        sizes = heads, layers, config.hidden_size, config.vocab_size, target.tp, shared
        with torch.device("meta"):
            needed = MedusaHeads(*sizes).needed(prefix)
        refuse_a_misfit(
            plain_tensors(needed), found, "Medusa heads as config.json describes them", str(folder), lambda name: False
        )
        made = _filled(sizes, prefix, found, target)
    return made, choices


def _filled(sizes: tuple, prefix: str, found: dict[str, Stored], target: Target) -> MedusaHeads:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(target.dtype)
    try:
        with target.tp.device:
            heads = MedusaHeads(*sizes).eval()
    finally:
        torch.set_default_dtype(previous)
    report = LoadReport()
    for name, param, where, _ in heads.needed(prefix):
        param.weight_loader(CheckpointTensor(found[name].file, name, report), where)
    return heads


def _whole(raw: dict[str, Any], name: str, most: int, path: Path) -> int:
    value = raw.get(name)
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{path}: {name}={json_shown(value)} must be an integer from 1 to {most}")
    return value


def _choices(raw: dict[str, Any], heads: int, path: Path) -> list[Choice] | None:
    """`medusa_choices`, of which each stands behind the one that it is below."""
    said = raw.get("medusa_choices")
    if said is None:
        return None
    if not isinstance(said, list) or not 1 <= len(said) <= MOST_CHOICES:
        raise ValueError(f"{path}: medusa_choices={json_shown(said)} must be a list of 1 to {MOST_CHOICES} choices")
    known: dict[Choice, None] = {(): None}
    for one in said:
        if not isinstance(one, list) or not all(type(rank) is int and 0 <= rank < 1024 for rank in one):
            raise ValueError(f"{path}: medusa_choices has {json_shown(one)}; a choice is a list of ranks from 0 on")
        choice = tuple(one)
        if not 1 <= len(choice) <= heads:
            raise ValueError(f"{path}: medusa_choices has {json_shown(one)}, but there are {heads} heads")
        if choice in known or choice[:-1] not in known:
            why = "twice" if choice in known else f"before {list(choice[:-1])}, which it stands below"
            raise ValueError(f"{path}: medusa_choices has {json_shown(one)} {why}")
        known[choice] = None
    return list(known)[1:]
