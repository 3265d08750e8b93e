"""Which expert for which token: the routers of a tiny mixture, measured over the glossary's answers.

    python -m common.tiny_qwen.routing [--folder common/tiny_qwen/mixture]

Each term is asked for in both languages, each answer is the right one, and every token of the answers counts. A line a layer,
also in `routing.csv`: the share of the choices that the hottest and the coldest expert get (1/E each if all are equal), the
entropy of the shares (log2 E bits if all are equal), and what a choice goes by, as far as these four numbers tell:

    language, place   half of the sum of differences between two groups' shares (0: the same, 1: no expert in common); the
                      groups are English and Chinese, first and second half of an answer
    chance            the same for two groups drawn at random: what a difference of nothing looks like
    token             how often a token's first expert is the most frequent one of the same token's other occurrences
"""

import argparse
import math
import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the checkpoint is a local folder

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from common.distributed.launch import run_main
from common.teaching.report import write_csv
from common.tiny_qwen.corpus import LANGUAGES, Entry, ask, definition, load_glossary
from common.tiny_qwen.phrasings import TRAINED
from common.tiny_qwen.upcycle import MIXTURE_PATH

SEED = 20


@dataclass(frozen=True)
class Routed:
    """One answer's tokens and the experts of each; a layer without a router has no line."""

    language: str
    ids: list[int]  # [T]
    chosen: torch.Tensor  # [L, T, k], the strongest first


@torch.inference_mode()
def chosen_experts(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """What each router of transformers' model chooses for each token of one sequence: [L, T, k], the strongest first."""
    said: list[torch.Tensor] = []
    routers = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    hooks = [router.register_forward_hook(lambda _, __, output: said.append(output[0])) for router in routers]
    model.model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return torch.stack(said).topk(model.config.num_experts_per_tok).indices


def glossary_routes(folder: Path, entries: Iterable[Entry] | None = None) -> list[Routed]:
    """Every term's answer in both languages, or those of some entries."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    routes = []
    for entry in load_glossary().values() if entries is None else entries:
        for language in LANGUAGES:
            chat = [{"role": "user", "content": ask(TRAINED[language][0], entry)}]
            prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            asked, answer = (tokenizer(text)["input_ids"] for text in (prompt, definition(entry, language)))
            routes.append(Routed(language, answer, chosen_experts(model, asked + answer)[:, len(asked) :]))
    return routes


# ---- What a choice goes by -----------------------------------------------------------


def shares(chosen: torch.Tensor, experts: int) -> torch.Tensor:
    """Share of the choices that each expert gets: [E]."""
    return torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()


def entropy(share: torch.Tensor) -> float:
    """In bits."""
    return float(torch.special.entr(share).sum() / math.log(2))


def difference(chosen: torch.Tensor, group: torch.Tensor, experts: int) -> float:
    """Total variation distance between the shares of two groups of tokens; chosen [T, k], group [T] of booleans."""
    return float((shares(chosen[group], experts) - shares(chosen[~group], experts)).abs().sum() / 2)


def told_by_the_token(first: list[int], ids: list[int]) -> float:
    """How often a token's first expert is what the same token mostly got elsewhere; tokens that occur once do not count."""
    of_token: dict[int, Counter] = defaultdict(Counter)
    for token, expert in zip(ids, first, strict=True):
        of_token[token][expert] += 1
    right = asked = 0
    for token, expert in zip(ids, first, strict=True):
        others = of_token[token] - Counter([expert])
        if others:
            asked += 1
            right += others.most_common(1)[0][0] == expert
    return right / asked


def measure(routes: list[Routed], experts: int, first_layer: int = 0) -> list[dict]:
    """One row a layer with a router."""
    chosen = torch.cat([route.chosen for route in routes], dim=1)  # [L, T, k]
    ids = [token for route in routes for token in route.ids]
    groups = {
        "language": [route.language == "en" for route in routes for _ in route.ids],
        "place": [2 * i < len(route.ids) for route in routes for i in range(len(route.ids))],
    }
    groups["chance"] = random.Random(SEED).sample(groups["place"], len(ids))
    rows = []
    for layer, of_layer in enumerate(chosen, first_layer):
        share = shares(of_layer, experts)
        numbers = {"hottest": float(share.max()), "coldest": float(share.min()), "entropy": entropy(share)}
        numbers |= {name: difference(of_layer, torch.tensor(group), experts) for name, group in groups.items()}
        numbers["token"] = told_by_the_token(of_layer[:, 0].tolist(), ids)
        rows.append({"layer": layer, "tokens": len(ids)} | {name: f"{value:.3f}" for name, value in numbers.items()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=MIXTURE_PATH)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(args.folder).config
    rows = measure(glossary_routes(args.folder), model.num_experts, getattr(model, "first_k_dense_replace", 0))
    for cells in [rows[0].keys(), *(row.values() for row in rows)]:
        print("".join(f"{cell:>10}" for cell in cells))
    write_csv(rows, args.folder / "routing.csv", measured=False)


if __name__ == "__main__":
    run_main(main)
