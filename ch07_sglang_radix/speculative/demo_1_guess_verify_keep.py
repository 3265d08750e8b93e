"""Guesses are fed with the last token in one step; what the model draws at each place says which of them stay.

    python ch07_sglang_radix/speculative/demo_1_guess_verify_keep.py

On words, with a "model" that knows one sentence; then the bundled model, whose smaller sibling guesses; and what a guess is worth.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from ch07_sglang_radix import Engine
from common.distributed.launch import run_main
from common.draft_tree import DraftTree, walk
from common.teaching.show import check, heading, mistake, table
from common.text.tokenizer import Tokenizer
from common.tiny_qwen import TINY_QWEN_PATH

# what our model draws behind a word, whatever stood before it
MODEL = {
    "the": "cache",
    "cache": "keeps",
    "keeps": "what",
    "what": "was",
    "was": "computed",
    "all": "that",
    "computed": "once",
}
WORDS = [*MODEL, "that", "once"]
GUESSES = ["cache", "keeps", "all", "was"]  # somebody's, behind "the"
QUESTIONS, NEW, STEPS = ("What is speculative decoding?", "What is a draft model?"), 48, 4


def main() -> None:
    by_hand()
    with_a_model()
    what_a_guess_is_worth()


def by_hand() -> None:
    heading("One step by hand: the last word is `the`, four guesses behind it")
    fed = ["the", *GUESSES]
    drawn = [MODEL[word] for word in fed]
    kept, right = [], True
    rows = []
    for place, (word, draws) in enumerate(zip(fed, drawn, strict=True)):
        guess = GUESSES[place] if place < len(GUESSES) else "-"
        if right:
            kept.append(draws)
        rows.append((place, word, draws, guess, draws if right else "", "" if not right else _why(draws, guess)))
        right = right and draws == guess
    table(("place", "fed", "the model draws", "guess of that", "comes out", ""), rows)
    print(f"  {len(kept)} words for one step: {' '.join(kept)}")
    accepted = walk(_chain(fed), torch.tensor([[WORDS.index(word) for word in drawn]]))
    check("the product's walk comes to the same", _words(accepted.tokens[0]) == kept)
    one_by_one = ["the"]
    for _ in kept:
        one_by_one.append(MODEL[one_by_one[-1]])
    check("and so do as many plain steps, one after the other", one_by_one[1:] == kept)

    heading("Two mistakes that run without an error")
    alike = [guess for guess, draws in zip(GUESSES, drawn, strict=False) if guess == draws]
    mistake("the bonus is taken to be what was drawn last, and not what was drawn in place of the first wrong guess",
            " ".join([*alike, drawn[-1]]), " ".join(kept))  # fmt: skip
    mistake("the first wrong guess is thrown away, and what was drawn in its place with it",
            " ".join(kept[:-1]), " ".join(kept))  # fmt: skip
    nothing = ["once", "once", "once", "once"]
    accepted = walk(
        _chain(["the", *nothing]), torch.tensor([[WORDS.index(MODEL.get(w, "once")) for w in ["the", *nothing]]])
    )
    check("a step whose guesses are all wrong still brings a word", _words(accepted.tokens[0]) == ["cache"])


def _why(draws: str, guess: str) -> str:
    return "kept" if draws == guess else "the bonus" if guess == "-" else f"instead of `{guess}`: the bonus"


def _chain(words: Sequence[str]) -> DraftTree:
    return DraftTree.chain(torch.tensor([[WORDS.index(word) for word in words]]))


def _words(tokens: torch.Tensor) -> list[str]:
    return [WORDS[token] for token in tokens.tolist() if token >= 0]


def with_a_model() -> None:
    plain = answers()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "steps.jsonl"
        guessed = answers(
            speculative_algorithm="STANDALONE", speculative_num_steps=STEPS, speculative_stand_down=False, trace=trace
        )
        steps = [json.loads(line) for line in trace.read_text(encoding="utf-8").splitlines()]
    tokenizer = Tokenizer(TINY_QWEN_PATH)
    for number, (question, answer) in enumerate(zip(QUESTIONS, guessed, strict=True)):
        heading(f"{question!r}: a model of 2 layers guesses {STEPS} tokens a step for one of 4 layers")
        runs = [run for step in steps for run in step.get("verified", ()) if run["request"] == number]
        ids, rows = answer["output_ids"], []
        begins = 1  # the first token is drawn by the prompt's step
        for run in runs:
            came = len(run["path"])
            guesses = "|".join(tokenizer.decode([token]) for token in run["tokens"][1:])
            rows.append(
                (len(rows) + 1, repr(guesses), came - 1, repr(tokenizer.decode(ids[begins : begins + came][-1:])), came)
            )
            begins += came
        table(("step", "guesses", "right", "drawn behind them", "tokens"), rows)
        print(f"  {answer['text']}")
        check(
            f"{len(rows)} verify steps brought the {len(ids) - 1} tokens of as many plain ones",
            len(rows) < len(ids) - 1,
        )
    same = [one["output_ids"] for one in guessed] == [one["output_ids"] for one in plain]
    check("token for token the text that plain steps give", same)


def answers(**arguments) -> list[dict]:
    with Engine(device="cpu", max_total_tokens=1024, **arguments) as engine:
        encode = engine.wrapper.tokenizer.encode_chat
        ids = [encode([{"role": "user", "content": question}]) for question in QUESTIONS]
        return engine.generate(input_ids=ids, sampling_params={"max_new_tokens": NEW})


def what_a_guess_is_worth() -> None:
    heading("Tokens a step, if each guess is right in a share `a` of the cases, whatever was before")
    shares, counts = (0.5, 0.7, 0.9), (1, 2, 4, 8, 16)
    table(("guesses", *(f"a = {share}" for share in shares)), [(n, *(expected(a, n) for a in shares)) for n in counts])
    check(
        "no number of guesses brings more than 1 / (1 - a)", all(expected(a, 500) <= 1 / (1 - a) + 1e-9 for a in shares)
    )
    heading("And how much sooner, if a guess costs a tenth of a step, and verifying costs a step")
    table(
        ("guesses", *(f"a = {share}" for share in shares)),
        [(n, *(expected(a, n) / (1 + n / 10) for a in shares)) for n in counts],
    )
    best = {a: max(range(30), key=lambda n: expected(a, n) / (1 + n / 10)) for a in shares}
    print(f"  best: {', '.join(f'{n} guesses for a = {a}' for a, n in best.items())}")
    check("the better the guesser, the further it should guess", best[0.5] < best[0.7] < best[0.9])


def expected(share: float, guesses: int) -> float:
    """1 + a + a^2 + ... + a^n: the bonus, and each guess if all up to it are right."""
    return sum(share**n for n in range(guesses + 1))


if __name__ == "__main__":
    run_main(main)
