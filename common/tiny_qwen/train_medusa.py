"""Trains Medusa heads for the bundled model: each guesses one token further ahead from the hidden state that wrote the next one.

    python -m common.tiny_qwen.train_medusa        # -> medusa/

The model is frozen. What it computes on conversations about the glossary is noted once: the hidden state at each token of
an answer, and the HEADS + 1 tokens behind it. The heads learn from these notes alone, so a step costs no forward pass of
the model. A head is x + SiLU(Wx + b) and an LM head of its own, which begins as the model's (Medusa-1, Cai et al. 2024,
section 2.2); the loss is the sum of the heads' cross-entropies. Tied to the model's LM head they learn little here: after
300 steps the first head was right in 28 of 100 cases, and with LM heads of their own in 58. So the heads have nearly as
many numbers as the model; that is Medusa's price on a small one.

What is divided by `sizes` while it is learned is divided in the file: hidden states have a few numbers of 100 beside many
of 2. `medusa_choices`, the list of the tree, is made at the end, from notes that were not learned from: how often each rank
of each head is right.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is here

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from common.distributed.launch import run_main
from common.tiny_qwen import TINY_QWEN_PATH
from common.tiny_qwen.corpus import ConversationSampler, load_glossary
from common.tiny_qwen.phrasings import SYSTEM_PROMPT
from common.tiny_qwen.train import SEED, batches, learning_rate, message

HEADS = 3
STEPS = 2500
NOTED, CHECKED = 150_000, 10_000  # tokens of answers that are learned from, and that choices are made from
TOKENS_PER_STEP = 256
PEAK_LR = 2e-3
RANKS, CHOICES = 10, 63  # of a head; of the list: as many as in Medusa's own lists
NOBODY = -100  # a target that does not count


class Heads(torch.nn.Module):
    """hidden [n, D] -> logits [HEADS, n, V]."""

    def __init__(self, lm_head: torch.Tensor, sizes: torch.Tensor):
        super().__init__()
        width = len(sizes)
        self.sizes = sizes
        self.weight = torch.nn.Parameter(torch.randn(HEADS, width, width) * 0.05)
        self.bias = torch.nn.Parameter(torch.zeros(HEADS, 1, width))
        self.lm_heads = torch.nn.Parameter(lm_head.repeat(HEADS, 1, 1))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden.expand(HEADS, *hidden.shape)
        x = x + F.silu(torch.baddbmm(self.bias, x / self.sizes, self.weight.transpose(1, 2)))
        return torch.bmm(x, self.lm_heads.transpose(1, 2))

    def tensors(self, tokens: torch.Tensor, vocab_size: int) -> dict[str, torch.Tensor]:
        """Under the published names; `tokens` are those that the LM heads have learned, all others stay zero."""
        found = {}
        for head in range(HEADS):
            found[f"{head}.0.linear.weight"] = self.weight[head] / self.sizes
            found[f"{head}.0.linear.bias"] = self.bias[head, 0]
            whole = torch.zeros(vocab_size, self.weight.shape[-1])
            whole[tokens] = self.lm_heads[head].detach()
            found[f"{head}.1.weight"] = whole
        return {name: x.detach().to(torch.bfloat16).contiguous() for name, x in found.items()}


# ---- What the model computes ------------------------------------------------------------


@torch.no_grad()
def notes(model: PreTrainedModel, tokenizer: Tokenizer, seed: int, wanted: int) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden states [n, D] at tokens of answers, and the tokens behind each [n, HEADS + 1]; NOBODY behind an answer's end."""
    prefix = torch.tensor([tokenizer.encode(message("system", SYSTEM_PROMPT)).ids])
    hidden, tokens, found = [], [], 0
    bar = tqdm(total=wanted, desc="noting", mininterval=2)
    for long_prompt, ids, learned in _batches(tokenizer, seed):
        past = None
        if long_prompt:
            past = DynamicCache(config=model.config)
            model.model(prefix, past_key_values=past, use_cache=True)
            past.batch_repeat_interleave(len(ids))
        states = model.model(ids, past_key_values=past).last_hidden_state  # [B, T, D]
        behind = following(ids, learned)
        keep = behind[..., 1] != NOBODY
        hidden.append(states[keep])
        tokens.append(behind[keep])
        found += len(tokens[-1])
        bar.update(len(tokens[-1]))
        if found >= wanted:
            bar.close()
            return torch.cat(hidden), torch.cat(tokens)


def _batches(tokenizer: Tokenizer, seed: int) -> Iterator[tuple[bool, torch.Tensor, torch.Tensor]]:
    return batches(ConversationSampler(load_glossary(), random.Random(seed)), tokenizer)


def following(ids: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
    """ids, learned [B, T] -> the tokens t+1 .. t+1+HEADS behind each token t [B, T, HEADS + 1], as far as its answer goes."""
    length, room = ids.shape[1], HEADS + 1
    ids, learned = F.pad(ids, (0, room)), F.pad(learned, (0, room))
    shifted = [(ids[:, i : length + i], learned[:, i : length + i]) for i in range(1, room + 1)]
    tokens, real = (torch.stack(part, dim=-1) for part in zip(*shifted, strict=True))
    return tokens.masked_fill(~real.cummin(dim=-1).values, NOBODY)


# ---- Training ---------------------------------------------------------------------------


def train(heads: Heads, hidden: torch.Tensor, wanted: torch.Tensor, steps: int) -> None:
    """wanted [n, HEADS]: the place of the wanted token among those that the heads know."""
    optimizer = torch.optim.AdamW(heads.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)
    bar = tqdm(range(steps), desc="training", mininterval=2)
    for step in bar:
        some = torch.randint(len(hidden), (TOKENS_PER_STEP,))
        logits, targets = heads(hidden[some]), wanted[some].T
        loss = sum(F.cross_entropy(of, target, ignore_index=NOBODY) for of, target in zip(logits, targets, strict=True))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, PEAK_LR)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def shares(heads: Heads, hidden: torch.Tensor, wanted: torch.Tensor) -> list[list[float]]:
    """How often each head's best, second best, ... is right: [HEADS][RANKS]."""
    right, asked = torch.zeros(HEADS, RANKS), torch.zeros(HEADS, 1)
    for some, targets in zip(hidden.split(1000), wanted.split(1000), strict=True):
        right += (heads(some).topk(RANKS, dim=-1).indices == targets.T.unsqueeze(-1)).sum(dim=1)
        asked += (targets != NOBODY).sum(dim=0).unsqueeze(-1)
    return (right / asked).tolist()


def choices_of(right: list[list[float]], count: int) -> list[list[int]]:
    """The `count` choices that are most often right, if what one head says tells nothing of the next; parents come first."""
    found: list[tuple[float, list[int]]] = []
    below: list[tuple[float, list[int]]] = [(1.0, [])]
    for of_head in right:
        below = [(chance * share, [*path, rank]) for chance, path in below for rank, share in enumerate(of_head)]
        below = sorted(below, key=lambda item: (-item[0], item[1]))[:count]
        found += below
    found = sorted((item for item in found if item[0] > 0), key=lambda item: (-item[0], len(item[1]), item[1]))
    return [path for _, path in found[:count]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--noted", type=int, default=NOTED, help="tokens to learn from")
    parser.add_argument("--out", type=Path, default=TINY_QWEN_PATH / "medusa", help="folder of the heads")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="1 is faster beside other work")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    start = time.perf_counter()
    tokenizer = Tokenizer.from_file(str(TINY_QWEN_PATH / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(TINY_QWEN_PATH, dtype=torch.float32).eval().requires_grad_(False)
    hidden, tokens = notes(model, tokenizer, SEED, args.noted)
    known = tokens[tokens >= 0].unique()  # what no answer has is not learned
    place = torch.full((model.config.vocab_size,), NOBODY)
    place[known] = torch.arange(len(known))

    def places(of: torch.Tensor) -> torch.Tensor:
        return torch.where(of >= 0, place[of.clamp(min=0)], NOBODY)[:, 1:]

    heads = Heads(model.lm_head.weight[known], hidden.square().mean(dim=0).sqrt())
    train(heads, hidden, places(tokens), args.steps)
    checked, behind = notes(model, tokenizer, SEED + 1, CHECKED)
    right = shares(heads, checked, places(behind))
    args.out.mkdir(parents=True, exist_ok=True)
    config = {
        "base_model_name_or_path": "common/tiny_qwen", "medusa_num_heads": HEADS, "medusa_num_layers": 1,
        "medusa_choices": choices_of(right, CHOICES), "torch_dtype": "bfloat16",
    }  # fmt: skip
    (args.out / "config.json").write_text(json.dumps(config, sort_keys=True) + "\n", encoding="utf-8")
    save_file(heads.tensors(known, model.config.vocab_size), args.out / "model.safetensors", metadata={"format": "pt"})
    size = sum(p.numel() for p in heads.parameters())
    print(f"trained {size:,} parameters in {time.perf_counter() - start:.0f} s")
    for number, of_head in enumerate(right, start=1):
        print(f"head {number}: best right {of_head[0]:.3f}, among the best three {sum(of_head[:3]):.3f}")


if __name__ == "__main__":
    run_main(main)
