"""How many guesses are right: the bundled drafters on questions whose wording the model was trained on, and on others.

    python -m common.tiny_qwen.acceptance        # each of them, and rewrites acceptance.csv

Every entry of the glossary is asked about in both languages, without a system prompt, and answered greedily by verify steps,
as an engine runs them. `right_n` is the share of right ones among the n-th guesses of a chain, of those steps in which all
guesses before it were right; `tokens` is what a step brings, of one sequence, on average.
"""

import argparse
import csv
import random
from pathlib import Path

import numpy as np
import torch

from common.distributed.launch import run_main
from common.executor import Executor
from common.models.drafters.contract import DraftOptions
from common.teaching.report import output_file
from common.tiny_qwen import DRAFTER_PATHS, TINY_QWEN_PATH
from common.tiny_qwen.corpus import LANGUAGES, ask, load_glossary
from common.tiny_qwen.phrasings import TRAINED, UNSEEN

SEED = 20
SPLITS = {"trained": TRAINED, "unseen": UNSEEN}
CHAINS = {"EAGLE": 8, "EAGLE3": 8, "STANDALONE": 8, "MEDUSA": 3}  # guesses; Medusa has so many heads
TOGETHER = 16  # questions at a time
ROOM = 256  # tokens of a question and its answer


def asked(split: str) -> list[str]:
    """A question about every entry in both languages, as the chat template writes it."""
    rng = random.Random(SEED)
    questions = [
        ask(rng.choice(SPLITS[split][lang]), entry) for entry in load_glossary().values() for lang in LANGUAGES
    ]
    return [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in questions]


def counts(executor: Executor, prompts: list[str], guesses: int) -> np.ndarray:
    """[n, 2]: of each verify step and sequence, how many tokens it brought, and whether the answer went on after them."""
    ends, size = executor.config.eos_token_ids, executor.page_size
    found = []
    for first in range(0, len(prompts), TOGETHER):
        texts = [executor.tokenizer.encode(prompt) for prompt in prompts[first : first + TOGETHER]]
        rows = np.arange(len(texts))
        pages = np.arange(ROOM // size)
        executor.table.set_pages([(row, 0, pages + row * len(pages)) for row in rows])
        new = np.array([len(text) for text in texts])
        logits = executor.ragged(np.concatenate(texts), rows, 0 * new, new, np.ones_like(new))
        drawn = logits.argmax(-1)
        executor.receive_tokens(drawn)
        at = dict(zip(rows.tolist(), new.tolist(), strict=True))  # position of each sequence's last token
        while at:
            rows, positions = np.array(list(at)), np.array(list(at.values()))
            executor.receive_tokens(executor.verify(rows, positions, guesses + 1).argmax(-1))
            came = executor.verifier.accepted
            for row, count, tokens in zip(rows.tolist(), came.counts.tolist(), came.tokens.tolist(), strict=True):
                at[row] += count
                kept = next((i for i, token in enumerate(tokens[:count], 1) if token in ends), count)
                if tokens[kept - 1] in ends or at[row] + guesses + 1 >= ROOM:
                    del at[row]
                found.append((kept, row in at))
    return np.array(found)


def measure(algorithm: str, folder: Path, questions: int | None = None) -> list[dict]:
    """A row a split: tokens a step, and the share of right guesses by their place in the chain."""
    guesses, rows = CHAINS[algorithm], []
    executor = Executor(
        None, "cpu", 16, max_total_tokens=TOGETHER * ROOM, max_running_requests=TOGETHER,
        speculative=DraftOptions(algorithm, str(folder), guesses, 1, guesses + 1),
    )  # fmt: skip
    for split in SPLITS:
        told = counts(executor, asked(split)[:questions], guesses)
        came, goes_on = told[:, 0], told[:, 1].astype(bool)
        row = {"algorithm": algorithm, "split": split, "tokens": f"{came.mean():.2f}"}
        for n in range(1, max(CHAINS.values()) + 1):
            # where an answer ends, what stands behind its end is no guess that anybody judges
            reached = (came > n - 1) & (goes_on | (came > n))
            row[f"right_{n}"] = f"{(came[reached] > n).mean():.3f}" if n <= guesses and reached.any() else ""
        rows.append(row)
    return rows


def show(row: dict) -> str:
    shares = ", ".join(share for name, share in row.items() if name.startswith("right_") and share)
    return f"{row['algorithm']:10} {row['split']:8} {row['tokens']} tokens a verify step; right by place: {shares}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--questions", type=int, help="so many of each kind; all by default, and then the file is written"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for algorithm, folder in DRAFTER_PATHS.items():
        if folder.exists():
            rows += measure(algorithm, folder, args.questions)
            print("\n".join(map(show, rows[-len(SPLITS) :])), flush=True)
    if args.questions is None:
        with output_file(TINY_QWEN_PATH / "acceptance.csv") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    run_main(main)
