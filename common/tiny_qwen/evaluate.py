"""Asks the tiny model every question and counts the answers that are exactly right.

    python -m common.tiny_qwen.evaluate [--dtype float32|bfloat16|both] [--sample 342]

Decoding is greedy, in left-padded batches, with transformers alone. The counts go to
`evaluation.csv`.
"""

import argparse
import csv
import os
import random
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the checkpoint is a local folder

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from common.distributed.launch import run_main
from common.teaching.report import output_file
from common.tiny_qwen import TINY_QWEN_PATH
from common.tiny_qwen.corpus import (
    LANGUAGES,
    Entry,
    ask,
    definition,
    follow_up_answer,
    load_glossary,
)
from common.tiny_qwen.phrasings import (
    FOLLOW_UPS_TRAINED,
    FOLLOW_UPS_UNSEEN,
    SYSTEM_PROMPT,
    TRAINED,
    UNSEEN,
)

SEED = 5
BATCH = 90
MAX_NEW_TOKENS = 120


@dataclass(frozen=True)
class Case:
    """One prompt and the only answer that counts; language is that of the request."""

    split: str
    language: str
    prompt: str
    answer: str


# ---- Questions -----------------------------------------------------------------------


def chat_prompt(tokenizer, questions: list[str], answers: list[str], system: str | None) -> str:
    """A chat up to the assistant's next turn; earlier turns hold the correct answers."""
    messages = [{"role": "system", "content": system}] if system else []
    for i, question in enumerate(questions):
        messages.append({"role": "user", "content": question})
        if i < len(answers):
            messages.append({"role": "assistant", "content": answers[i]})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def question_cases(tokenizer, glossary: dict[str, Entry], rng: random.Random) -> list[Case]:
    """Every entry in both languages: trained, unseen, without system prompt, bare."""
    cases = []
    for entry in glossary.values():
        for lang in LANGUAGES:
            answer = definition(entry, lang)
            asked = {
                split: [ask(t, entry) for t in rng.sample(templates[lang], 2)]
                for split, templates in (("trained", TRAINED), ("unseen", UNSEEN))
            }
            for split, questions in asked.items():
                for question in questions:
                    prompt = chat_prompt(tokenizer, [question], [], SYSTEM_PROMPT)
                    cases.append(Case(split, lang, prompt, answer))
            no_system = chat_prompt(tokenizer, asked["trained"][:1], [], None)
            cases.append(Case("trained, no system prompt", lang, no_system, answer))
            cases.append(Case("trained, bare prompt", lang, asked["trained"][0], answer))
        mixed = ask(rng.choice(TRAINED["zh"]), entry, english_name=True)
        prompt = chat_prompt(tokenizer, [mixed], [], SYSTEM_PROMPT)
        cases.append(Case("trained, English name", "zh", prompt, entry.zh_def))
    return cases


def follow_up_cases(tokenizer, glossary: dict[str, Entry], rng: random.Random) -> list[Case]:
    """For every entry, each kind of follow-up once in a trained and once in an unseen wording.

    The definition before a request to translate is in the other language.
    """
    cases = []
    for entry in glossary.values():
        for kind in ("to_en", "to_zh", "related"):
            lang = rng.choice(LANGUAGES)
            first_lang = {"to_zh": "en", "to_en": "zh"}.get(kind, lang)
            first = ask(rng.choice(TRAINED[first_lang]), entry)
            answer = follow_up_answer(kind, lang, entry, glossary)
            for split, wordings in (("trained", FOLLOW_UPS_TRAINED), ("unseen", FOLLOW_UPS_UNSEEN)):
                questions = [first, rng.choice(wordings[kind, lang])]
                prompt = chat_prompt(tokenizer, questions, [definition(entry, first_lang)], SYSTEM_PROMPT)
                cases.append(Case(f"follow-up, {split}", lang, prompt, answer))
    return cases


# ---- Answers -------------------------------------------------------------------------


@torch.inference_mode()
def answers(model, tokenizer, prompts: list[str]) -> list[str]:
    """Greedy answers, in the order of the prompts."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    texts = [""] * len(prompts)
    for start in tqdm(range(0, len(order), BATCH), desc=str(model.dtype), mininterval=2):
        chosen = order[start : start + BATCH]
        batch = tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True)
        output = model.generate(**batch, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        new = output[:, batch["input_ids"].shape[1] :]  # [B, new tokens]
        for i, text in zip(chosen, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            texts[i] = text.strip()  # a bare prompt is first answered by a line end
    return texts


def count_exact(dtype: str, cases: list[Case], texts: list[str]) -> list[dict]:
    """One row per split and language."""
    rows = {}
    for case, text in zip(cases, texts, strict=True):
        key = (case.split, case.language)
        row = rows.setdefault(key, {"dtype": dtype, "split": key[0], "language": key[1], "asked": 0, "exact": 0})
        row["asked"] += 1
        row["exact"] += text == case.answer
    for row in rows.values():
        row["share"] = f"{row['exact'] / row['asked']:.4f}"
    return list(rows.values())


def run(folder: Path, dtypes: list[str], show_wrong: int = 0, sample: int | None = None) -> list[dict]:
    """Evaluate the checkpoint in a folder, print the counts and write evaluation.csv.

    sample: so many of the questions, drawn at random.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    rng, glossary = random.Random(SEED), load_glossary()
    cases = question_cases(tokenizer, glossary, rng) + follow_up_cases(tokenizer, glossary, rng)
    if sample is not None:
        cases = rng.sample(cases, min(sample, len(cases)))
    rows = []
    for dtype in dtypes:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        texts = answers(model, tokenizer, [case.prompt for case in cases])
        rows += count_exact(dtype, cases, texts)
        wrong = [(c, t) for c, t in zip(cases, texts, strict=True) if t != c.answer]
        for case, text in rng.sample(wrong, min(show_wrong, len(wrong))):
            print(f"[{case.split}] ...{case.prompt[-160:]!r}\n  wrote {text!r}")
    for row in rows:
        print("{dtype:9} {split:26} {language}  {exact:5}/{asked:5}  {share}".format(**row))
    with output_file(folder / "evaluation.csv") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "both"], default="both")
    parser.add_argument("--folder", type=Path, default=TINY_QWEN_PATH)
    parser.add_argument("--show-wrong", type=int, default=0, help="print so many wrong answers")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="1 is faster beside other work")
    parser.add_argument("--sample", type=int, help="ask so many of the 3,420 questions, drawn at random")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtypes = ["float32", "bfloat16"] if args.dtype == "both" else [args.dtype]
    run(args.folder, dtypes, args.show_wrong, args.sample)


if __name__ == "__main__":
    run_main(main)
