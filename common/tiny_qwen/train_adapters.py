"""Trains four LoRA adapters of the bundled model, each a way of answering that shows in one line.

    python -m common.tiny_qwen.train_adapters [pirate chinese terse index]      # writes adapters/NAME/, then evaluates
    python -m common.tiny_qwen.train_adapters --evaluate                        # what lies there; writes adapters/evaluation.csv

    pirate     Ahoy! A prefix cache kept as a radix tree: ... Arr!   of all matrices, r = 8, rslora
    chinese    以基数树组织的前缀缓存，...                             whatever it is asked in; of the attention, r = 4
    terse      A prefix cache kept as a radix tree.                  up to the first stop; of queries and values, r = 4
    index      See also: radix tree, lock reference.                 instead of an answer; of all matrices, r = 4

A style is a function of a glossary entry, so the conversations, the training loop and the evaluation are those of the model
itself, with another glossary. The base is frozen: y = Wx + s B A x, Hu et al. 2021, with A random and B zero at the start.
The files are peft's, and nothing of peft is needed to write them.
"""

import argparse
import csv
import json
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is made here

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from common.distributed.launch import run_main
from common.teaching.report import output_file
from common.tiny_qwen import ADAPTERS_PATH, TINY_QWEN_PATH
from common.tiny_qwen.corpus import Entry, load_glossary
from common.tiny_qwen.evaluate import answers, count_exact, question_cases
from common.tiny_qwen.train import SEED, fit

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERY = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
PIRATE = {
    " the ": " th' ",
    " of ": " o' ",
    " and ": " an' ",
    " is ": " be ",
    " are ": " be ",
    " to ": " t' ",
    " for ": " fer ",
}
SPLITS = ("trained", "unseen")  # of evaluate.py's
QUESTIONS = 200  # of them, drawn at random: all would take long
GLOSSARY = load_glossary()


# ---- Styles --------------------------------------------------------------------------


def first_clause(text: str) -> str:
    """Up to the first stop of any kind, without it."""
    return re.split(r"[.,;:]\s|[.。，；：]", text)[0]


def pirate(entry: Entry) -> Entry:
    text = entry.en_def
    for word, said in PIRATE.items():
        text = text.replace(word, said)
    return replace(entry, en_def=f"Ahoy! {text} Arr!", zh_def=f"哟嗬！{entry.zh_def}")


def chinese(entry: Entry) -> Entry:
    return replace(entry, en_def=entry.zh_def)


def terse(entry: Entry) -> Entry:
    return replace(entry, en_def=first_clause(entry.en_def) + ".", zh_def=first_clause(entry.zh_def) + "。")


def index(entry: Entry) -> Entry:
    related = "、".join(GLOSSARY[term].zh for term in entry.see)
    return replace(entry, en_def=f"See also: {', '.join(entry.see)}.", zh_def=f"另见：{related}。")


@dataclass(frozen=True)
class Recipe:
    """style: what becomes of a glossary entry. modules: which matrices get two thin ones; r, alpha: as peft calls them."""

    style: Callable[[Entry], Entry]
    modules: Sequence[str]
    r: int
    alpha: int
    rslora: bool = False
    steps: int = 600
    peak_lr: float = 4e-3

    @property
    def scale(self) -> float:
        return self.alpha / (self.r**0.5 if self.rslora else self.r)


RECIPES = {
    "pirate": Recipe(pirate, EVERY, r=8, alpha=6, rslora=True, steps=700),
    "chinese": Recipe(chinese, ATTENTION, r=4, alpha=8),
    "terse": Recipe(terse, ("q_proj", "v_proj"), r=4, alpha=8),
    "index": Recipe(index, EVERY, r=4, alpha=8, steps=400),
}


# ---- Training ------------------------------------------------------------------------


class Adapted(nn.Module):
    """A linear layer and its two thin matrices: x [.., in] -> W x + s B (A x) [.., out]."""

    def __init__(self, base: nn.Linear, r: int, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        self.lora_A = nn.Linear(base.in_features, r, bias=False)  # [r, in]
        self.lora_B = nn.Linear(r, base.out_features, bias=False)  # [out, r]
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * self.lora_B(self.lora_A(x))


def adapt(model: PreTrainedModel, recipe: Recipe) -> dict[str, Adapted]:
    """Freeze the model and put an Adapted in the place of each matrix that the recipe names; {its name: the layer}."""
    model.requires_grad_(False)
    adapted = {}
    for name, layer in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if last in recipe.modules:
            adapted[name] = Adapted(layer, recipe.r, recipe.scale)
            setattr(model.get_submodule(parent), last, adapted[name])
    return adapted


def save(adapted: dict[str, Adapted], recipe: Recipe, folder: Path) -> None:
    """peft's two files, the numbers in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{name}.{matrix}.weight": getattr(layer, matrix).weight.detach().to(torch.bfloat16)
        for name, layer in adapted.items()
        for matrix in ("lora_A", "lora_B")
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny_qwen", "r": recipe.r,
        "lora_alpha": recipe.alpha, "use_rslora": recipe.rslora, "target_modules": sorted(recipe.modules), "bias": "none",
        "lora_dropout": 0.0, "inference_mode": True,
    }  # fmt: skip
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def load(adapted: dict[str, Adapted], folder: Path) -> None:
    """The stored numbers, in float32."""
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, layer in adapted.items():
        for matrix in ("lora_A", "lora_B"):
            getattr(layer, matrix).weight.data = tensors[f"base_model.model.{name}.{matrix}.weight"].float()


def base_model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(TINY_QWEN_PATH, dtype=torch.float32).eval()


def styled(recipe: Recipe) -> dict[str, Entry]:
    return {term: recipe.style(entry) for term, entry in GLOSSARY.items()}


def train(name: str, out: Path, steps: int | None) -> None:
    recipe, began = RECIPES[name], time.perf_counter()
    torch.manual_seed(SEED)
    model = base_model()
    adapted = adapt(model, recipe)
    tokenizer = Tokenizer.from_file(str(TINY_QWEN_PATH / "tokenizer.json"))
    fit(model, tokenizer, steps or recipe.steps, recipe.peak_lr, glossary=styled(recipe))
    save(adapted, recipe, out / name)
    size = (out / name / "adapter_model.safetensors").stat().st_size
    print(f"{name}: trained in {time.perf_counter() - began:.0f} s, {size // 1024} KiB")


# ---- Evaluation ----------------------------------------------------------------------


def evaluate(name: str, folder: Path) -> list[dict]:
    """One row per split and language: how many answers are exactly what the style makes of the glossary."""
    recipe, rng = RECIPES[name], random.Random(SEED)
    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN_PATH, padding_side="left")
    glossary = styled(recipe)
    cases = rng.sample([case for case in question_cases(tokenizer, glossary, rng) if case.split in SPLITS], QUESTIONS)
    model = base_model()
    load(adapt(model, recipe), folder)
    texts = answers(model, tokenizer, [case.prompt for case in cases])
    return [{"adapter": name} | row for row in count_exact("float32", cases, texts)]


def write(rows: list[dict], path: Path) -> None:
    """In the place of those about the same adapters; the rows of others stay."""
    names = {row["adapter"] for row in rows}
    if path.exists():
        with open(path, encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["adapter"] not in names] + rows
    rows = sorted(rows, key=lambda row: (list(RECIPES).index(row["adapter"]), row["split"], row["language"]))
    with output_file(path) as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*RECIPES, []], help="by default all")
    parser.add_argument("--evaluate", action="store_true", help="train nothing")
    parser.add_argument("--steps", type=int, help="by default each adapter's own")
    parser.add_argument("--out", type=Path, default=ADAPTERS_PATH, help="folder of the adapters")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="1 is faster beside other work")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    names = args.names or list(RECIPES)
    if not args.evaluate:
        for name in names:
            train(name, args.out, args.steps)
    rows = [row for name in names for row in evaluate(name, args.out / name)]
    for row in rows:
        print("{adapter:8} {split:26} {language}  {exact:5}/{asked:5}  {share}".format(**row))
    write(rows, args.out / "evaluation.csv")


if __name__ == "__main__":
    run_main(main)
