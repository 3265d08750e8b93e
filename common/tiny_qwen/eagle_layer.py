"""The EAGLE head as it is trained: dense, without pages and ranks, all places of a batch at once (train_eagle.py).

common/models/drafters/eagle_head.py is the same layer as an engine runs it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

MLP_WIDTH = {1: 1024, 3: 256}


# ---- The head ------------------------------------------------------------------------


class Norm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, eps=1e-6)


class Head(nn.Module):
    """One decoder layer over (embedding of token i+1, feature i). Names of parameters are those of the published heads.

    version 1: fc joins the two, and the layer begins without a norm; its output is a feature of the target, so the target's
    LM head reads it. version 3: fc joins three features; norms on both inputs, side by side into q, k and v; a norm and an LM
    head of its own, over the tokens `vocabulary`.
    """

    def __init__(self, version: int, target: PreTrainedModel, vocabulary: torch.Tensor | None = None):
        super().__init__()
        c = target.config
        d_model, self.heads, self.kv_heads = c.hidden_size, c.num_attention_heads, c.num_key_value_heads
        self.version, self.d, self.theta = version, d_model // self.heads, c.rope_parameters["rope_theta"]
        self.target = [target]  # in a list: it is no part of the head, and is not trained
        width, wide = MLP_WIDTH[version], d_model * (2 if version == 3 else 1)
        self.fc = nn.Linear(d_model * (3 if version == 3 else 2), d_model, bias=version == 1)
        layer = nn.ModuleDict({
            "self_attn": nn.ModuleDict({
                "q_proj": nn.Linear(wide, self.heads * self.d, bias=False),
                "k_proj": nn.Linear(wide, self.kv_heads * self.d, bias=False),
                "v_proj": nn.Linear(wide, self.kv_heads * self.d, bias=False),
                "o_proj": nn.Linear(self.heads * self.d, d_model, bias=False),
            }),
            "mlp": nn.ModuleDict({
                "gate_proj": nn.Linear(d_model, width, bias=False),
                "up_proj": nn.Linear(d_model, width, bias=False),
                "down_proj": nn.Linear(width, d_model, bias=False),
            }),
            "post_attention_layernorm": Norm(d_model),
        })  # fmt: skip
        if version == 1:
            self.layers = nn.ModuleList([layer])
        else:
            layer["input_layernorm"], layer["hidden_norm"] = Norm(d_model), Norm(d_model)
            self.midlayer, self.norm = layer, Norm(d_model)
            self.lm_head = nn.Linear(d_model, len(vocabulary), bias=False)
            self.lm_head.weight.data.copy_(target.lm_head.weight[vocabulary])  # a good place to begin
            self.register_buffer("d2t", vocabulary - torch.arange(len(vocabulary)))
            known = torch.zeros(c.vocab_size, dtype=torch.bool)
            known[vocabulary] = True
            self.register_buffer("t2d", known)
        for linear in (
            m for m in self.modules() if isinstance(m, nn.Linear) and m is not getattr(self, "lm_head", None)
        ):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.normal_(layer["self_attn"]["o_proj"].weight, std=0.02)
        nn.init.normal_(layer["mlp"]["down_proj"].weight, std=0.02)
        self.sizes = torch.ones(self.fc.in_features)  # of the numbers that fc reads, see `measure`

    @property
    def layer(self) -> nn.ModuleDict:
        return self.layers[0] if self.version == 1 else self.midlayer

    def measure(self, embeds: torch.Tensor, features: torch.Tensor) -> None:
        """What fc reads is divided by its size, or an embedding (0.1) would be lost beside a feature (2, the largest 100).

        Files have it inside fc's weight, `folded`: published heads know no such division.
        """
        read = features if self.version == 3 else torch.cat((embeds, features), dim=-1)
        self.sizes = read.flatten(0, -2).square().mean(0).sqrt()

    def folded(self) -> dict[str, torch.Tensor]:
        """The tensors of the head as its file has them."""
        return self.state_dict() | {"fc.weight": self.fc.weight.detach() / self.sizes}

    def begin(self, features: torch.Tensor) -> torch.Tensor:
        """What the target hands over [.., n D] -> what stands where the head's own guess stands in later steps [.., D]."""
        return self.fc(features / self.sizes) if self.version == 3 else features

    def inputs(self, embeds: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(residual [.., D], what q, k and v read)."""
        if self.version == 1:
            x = self.fc(torch.cat((embeds, hidden), dim=-1) / self.sizes)
            return x, x
        return hidden, torch.cat((self.layer["input_layernorm"](embeds), self.layer["hidden_norm"](hidden)), dim=-1)

    def split(self, x: torch.Tensor, name: str, positions: torch.Tensor | None) -> torch.Tensor:
        """x [B, n, ..] -> q, k or v by heads [B, H, n, d], turned to its positions [n] or [B, n]."""
        y = self.layer["self_attn"][name](x).unflatten(-1, (-1, self.d)).transpose(1, 2)
        if positions is None:
            return y
        angles = positions.unsqueeze(-1) * self.theta ** (-torch.arange(0, self.d, 2) / self.d)  # [.., n, d/2]
        cos, sin = (f(torch.cat((angles, angles), dim=-1)) for f in (torch.cos, torch.sin))
        if cos.dim() == 3:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [B, 1, n, d]
        low, high = y.chunk(2, dim=-1)
        return y * cos + torch.cat((-high, low), dim=-1) * sin

    def finish(self, residual: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
        """o [B, H, n, d] -> the head's guess of the next feature [B, n, D]."""
        mlp = self.layer["mlp"]
        x = residual + self.layer["self_attn"]["o_proj"](o.transpose(1, 2).flatten(2))
        y = self.layer["post_attention_layernorm"](x)
        return x + mlp["down_proj"](F.silu(mlp["gate_proj"](y)) * mlp["up_proj"](y))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.target[0].lm_head(hidden) if self.version == 1 else self.lm_head(self.norm(hidden))


# ---- A chain of guesses at every place of an answer ------------------------------------


class Places(NamedTuple):
    """Where a head guesses, M places a row, of those with fewer the rest is False in `real`."""

    index: torch.Tensor  # [B, M] i: features up to i and tokens up to i+1 are known, token i+2 is guessed
    real: torch.Tensor  # [B, M]


def places_of(learned: torch.Tensor) -> Places:
    """learned [B, T] -> the i with token i+2 among the learned ones."""
    wanted = learned[:, 2:]
    most = int(wanted.sum(1).max())
    order = torch.argsort((~wanted).to(torch.int8), dim=1, stable=True)[:, :most]  # the wanted ones first, ascending
    return Places(order, wanted.gather(1, order))


class Guesses(NamedTuple):
    hidden: torch.Tensor  # [N, D] the head's feature
    logits: torch.Tensor  # [N, V]
    at: torch.Tensor  # [B, M] bool: the N places


def guesses(head: Head, embeds, features, places: Places, steps: int):
    """Yields step by step what the head guesses at all places at once; step j guesses token i+2 after j guesses of its own.

    embeds, features [B, T, .]; at step j the hidden state at i is what step j-1 wrote at i-1, and the keys that it sees are
    those of true features up to i-j, and its own ones behind them.
    """
    rows = torch.arange(len(embeds)).unsqueeze(1)
    i, real = places
    group = head.heads // head.kv_heads
    _, x = head.inputs(embeds[:, 1:], head.begin(features[:, :-1]))
    positions = torch.arange(x.shape[1])
    k0 = head.split(x, "k_proj", positions).repeat_interleave(group, 1)  # [B, H, T-1, d]
    v0 = head.split(x, "v_proj", None).repeat_interleave(group, 1)
    e, hidden = embeds[rows, i + 1], head.begin(features[rows, i])  # [B, M, D]
    follows = torch.zeros_like(real)  # place n stands right behind place n-1
    follows[:, 1:] = real[:, 1:] & (i[:, 1:] == i[:, :-1] + 1)
    live, own = real, []  # own: keys and values of the guesses so far
    for j in range(steps):
        residual, x = head.inputs(e, hidden)
        q = head.split(x, "q_proj", i)  # [B, H, M, d]
        if j:
            own.append(
                (
                    head.split(x, "k_proj", i).repeat_interleave(group, 1),
                    head.split(x, "v_proj", None).repeat_interleave(group, 1),
                )
            )
        scores = q @ k0.transpose(2, 3) * head.d**-0.5  # [B, H, M, T-1]
        scores = scores.masked_fill((positions > (i - j).unsqueeze(-1)).unsqueeze(1), -torch.inf)
        chain = [(k.roll(j - m, 2), v.roll(j - m, 2)) for m, (k, v) in enumerate(own, 1)]  # of step m, at i-j+m
        own_scores = [(q * k).sum(-1, keepdim=True) * head.d**-0.5 for k, _ in chain]  # [B, H, M, 1] each
        weights = torch.cat((scores, *own_scores), dim=-1).softmax(-1)
        o = weights[..., : len(positions)] @ v0
        for m, (_, v) in enumerate(chain):
            o = o + weights[..., len(positions) + m, None] * v
        out = head.finish(residual, o)
        yield Guesses(out[live], head.logits(out[live]), live)
        # EAGLE-3's features have no teacher of their own: what a later guess needs of an earlier one, only gradients can say
        hidden = (out if head.version == 3 else out.detach()).roll(1, 1)
        live = live & follows & torch.cat((torch.zeros_like(live[:, :1]), live[:, :-1]), dim=1)
