"""EAGLE without pages, levels and ranks: for each path its whole sequence through one dense layer, again and again."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


class Reference:
    def __init__(self, head: Path, target: Path, version: int, entering: tuple[int, ...]):
        self.w = {
            name: t.float() if t.is_floating_point() else t for name, t in load_file(head / "model.safetensors").items()
        }
        self.c = json.loads((head / "config.json").read_text())
        self.target = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        self.version, self.entering = version, entering
        self.layer = "midlayer" if version == 3 else "layers.0"

    @torch.no_grad()
    def features(self, tokens: list[int]) -> torch.Tensor:
        output = self.target.model(torch.tensor([tokens]), output_hidden_states=True)
        if self.version == 1:
            return output.last_hidden_state[0]
        return torch.cat([output.hidden_states[n][0] for n in self.entering], dim=-1)

    @torch.no_grad()
    def guess(self, tokens: list[int], path: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Behind tokens 0 .. p, and a path of guesses below the last of them -> (feature [D], log-probabilities [V], -inf for
        those that it cannot say)."""
        features = self.features(tokens[:-1])
        hidden = list(F.linear(features, self.w["fc.weight"]) if self.version == 3 else features)
        embeds = self.target.model.embed_tokens(torch.tensor(tokens[1:] + path))
        for n in range(len(tokens) - 1, len(embeds) + 1):
            out = self._layer(embeds[:n], torch.stack(hidden))[-1]
            hidden.append(out)
        if self.version == 1:
            return out, self.target.lm_head(out).log_softmax(-1)
        said = F.linear(self._norm(out, "norm"), self.w["lm_head.weight"]).log_softmax(-1)
        logprobs = torch.full((self.c["vocab_size"],), -torch.inf)
        for draft_id, offset in enumerate(self.w["d2t"].tolist()):
            logprobs[draft_id + offset] = said[draft_id]
        return out, logprobs

    def tree(self, tokens: list[int], steps: int, topk: int, nodes: int) -> dict[tuple[int, ...], float]:
        """{path: log-probability} of the nodes - 1 best candidates of EAGLE-2."""
        candidates, frontier = {}, {(): 0.0}
        for _ in range(steps):
            children = {}
            for path, score in frontier.items():
                best = self.guess(tokens, list(path))[1].topk(topk)
                children |= {
                    (*path, t): score + s for s, t in zip(best.values.tolist(), best.indices.tolist(), strict=True)
                }
            candidates |= children
            frontier = dict(sorted(children.items(), key=lambda item: -item[1])[:topk])
        return dict(sorted(candidates.items(), key=lambda item: -item[1])[: nodes - 1])

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.w[f"{name}.weight"], eps=self.c["rms_norm_eps"])

    def _turn(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, H, d] at positions 0 .. n-1."""
        n, _, d = x.shape
        angles = torch.outer(torch.arange(n), self.c["rope_theta"] ** (-torch.arange(0, d, 2) / d)).repeat(1, 2)[
            :, None
        ]
        return x * angles.cos() + torch.cat((-x[..., d // 2 :], x[..., : d // 2]), -1) * angles.sin()

    def _layer(self, embeds: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        w, layer, d = (
            lambda name: self.w[f"{self.layer}.{name}.weight"],
            self.layer,
            self.c.get("head_dim") or self.c["hidden_size"] // self.c["num_attention_heads"],
        )
        if self.version == 3:
            x = hidden
            read = torch.cat(
                (self._norm(embeds, f"{layer}.input_layernorm"), self._norm(hidden, f"{layer}.hidden_norm")), -1
            )
        else:
            x = read = F.linear(torch.cat((embeds, hidden), -1), self.w["fc.weight"], self.w["fc.bias"])
        q, k, v = (F.linear(read, w(f"self_attn.{p}_proj")).unflatten(-1, (-1, d)) for p in "qkv")
        q, k = self._turn(q), self._turn(k)
        group = q.shape[1] // k.shape[1]
        k, v = (y.repeat_interleave(group, dim=1) for y in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) * d**-0.5
        n = len(read)
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
        o = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)
        x = x + F.linear(o, w("self_attn.o_proj"))
        y = self._norm(x, f"{layer}.post_attention_layernorm")
        return x + F.linear(F.silu(F.linear(y, w("mlp.gate_proj"))) * F.linear(y, w("mlp.up_proj")), w("mlp.down_proj"))
