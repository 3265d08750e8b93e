"""A grammar's mask, step by step: how many tokens may come next, which, what the model wanted, and what it got.

    python ch07_sglang_radix/serving/demo_4_grammar.py

The bundled model knows nothing of JSON: it recites its glossary. Under a JSON schema it answers in JSON all the same, and
its own taste is still seen where the schema leaves a choice. The engine runs as ever; afterwards its answer is walked again
with a matcher of our own, token by token, to look at each mask. The model's own wish is its best token without the mask:
log-probabilities are those of the model itself, so `top_logprobs_num=1` tells it.

Then the mistake that is made most often: the end token left out of the grammar's hands.
"""

import json
from collections.abc import Sequence

import numpy as np

from ch07_sglang_radix.engine import Engine
from common.distributed.launch import run_main
from common.sampling.grammar import GrammarCompiler, GrammarMask
from common.teaching.show import check, heading, mistake, table
from common.text.tokenizer import Tokenizer

QUESTION = "What is a radix cache?"
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["tree", "table", "list"]},
        "shared": {"type": "boolean"},
        "why": {"type": "string", "maxLength": 24},
    },
    "required": ["kind", "shared", "why"],
    "additionalProperties": False,
}
YES_OR_NO = "(yes|no)( and (yes|no))?"
SHOWN = 4  # of the allowed tokens


def main() -> None:
    with Engine(device="cpu") as engine:
        tokenizer, config = engine.wrapper.tokenizer, engine.wrapper.config
        compiler = GrammarCompiler(tokenizer.hf, config.vocab_size, config.eos_token_ids)
        prompt = tokenizer.encode_chat([{"role": "user", "content": QUESTION}])

        heading(f"{QUESTION} Without a grammar")
        print(f"  {engine.generate(input_ids=prompt, sampling_params={'max_new_tokens': 24})['text']!r}")

        written = json.dumps(SCHEMA)
        heading(f"Under a JSON schema: the mask of each step, of {config.vocab_size:,} tokens")
        answer, walked = walk(engine, compiler, prompt, "json_schema", written)
        print(f"  {answer['text']}")
        value = json.loads(answer["text"])
        forced = sum(step.allowed == 1 for step in walked)
        check("it is JSON with the three names of the schema", list(value) == ["kind", "shared", "why"])
        check(f"{forced} of {len(walked)} tokens were the only one allowed", 0 < forced < len(walked))
        check("every token taken was allowed", all(step.taken_is_allowed for step in walked))
        check(
            "the end token was allowed at the end alone",
            [step.end for step in walked] == [False] * (len(walked) - 1) + [True],
        )

        heading(f"Under a regular expression, {YES_OR_NO}")
        answer, walked = walk(engine, compiler, prompt, "regex", YES_OR_NO)
        print(f"  {answer['text']}")
        check(
            "the end token is allowed wherever the text is complete", any(s.end for s in walked[:-1]) or walked[-1].end
        )

        heading("The mistake: a mask that leaves the end token alone")
        bits, end = first_mask(compiler, config.vocab_size, written), config.eos_token_ids[0]
        sloppy = {*bits, end}
        mistake(
            "tokens that may begin the answer, the end among them?",
            wrong=f"{len(sloppy)}, and the answer may be empty" if end in sloppy else "",
            right=f"{len(bits)}, and it begins with {tokenizer.decode([min(bits)])!r}" if end not in bits else "",
        )


class Step:
    """One mask, and what became of it."""

    def __init__(self, text: str, allowed: Sequence[int], end: int, wish: int, taken: int):
        self.text, self.ids, self.allowed = text, allowed, len(allowed)
        self.end, self.wish, self.taken = end in allowed, wish, taken
        self.taken_is_allowed = taken in allowed


def walk(
    engine: Engine, compiler: GrammarCompiler, prompt: list[int], kind: str, written: str
) -> tuple[dict, list[Step]]:
    """The engine's answer, and each of its masks seen again."""
    params = {"max_new_tokens": 80, kind: written}
    answer = engine.generate(input_ids=prompt, sampling_params=params, return_logprob=True, top_logprobs_num=1)
    wishes = [best[0][1] for best in answer["meta_info"]["output_top_logprobs"]]
    output, tokenizer = answer["output_ids"], engine.wrapper.tokenizer
    mask = compiler.mask(compiler.start(kind, written).result(), after_thinking=False)
    (end,), steps = engine.wrapper.config.eos_token_ids, []
    for n, (wish, taken) in enumerate(zip(wishes, output, strict=True)):
        mask.read(output[:n])
        allowed = allowed_tokens(mask, engine.wrapper.config.vocab_size)
        steps.append(Step(tokenizer.decode(output[:n]), allowed, end, wish, taken))
    table(
        ("so far", "allowed", "such as", "the model wanted", "taken"),
        [
            (repr(step.text[-16:]), step.allowed, such_as(tokenizer, step.ids), word(tokenizer, step.wish), word(tokenizer, step.taken))
            for step in steps
        ],
    )  # fmt: skip
    return answer, steps


def allowed_tokens(mask: GrammarMask, vocab_size: int) -> list[int]:
    """The bits of its row as token ids: bit i of word w is token 32 w + i."""
    (bits,) = GrammarMask.fill([mask], vocab_size)
    return np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")[:vocab_size]).tolist()


def first_mask(compiler: GrammarCompiler, vocab_size: int, written: str) -> set[int]:
    return set(allowed_tokens(compiler.mask(compiler.start("json_schema", written).result(), False), vocab_size))


def such_as(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The longest of them say most."""
    longest = sorted(ids, key=lambda token: -len(tokenizer.token_text(token)))[:SHOWN]
    return " ".join(word(tokenizer, token) for token in longest) + (" ..." if len(ids) > SHOWN else "")


def word(tokenizer: Tokenizer, token: int) -> str:
    return (
        repr(tokenizer.token_text(token))[1:-1] if tokenizer.special_text(token) else repr(tokenizer.token_text(token))
    )


if __name__ == "__main__":
    run_main(main)
