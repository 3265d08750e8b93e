"""A grammar's mask, step by step: how many tokens may come next, which, what the model wanted, and what it got.

    python ch07_sglang_radix/serving/demo_4_grammar.py

The bundled model knows nothing of JSON: it recites its glossary. Under a JSON schema it answers in JSON all the same, and
where the schema leaves a choice its own taste decides. The engine runs as ever; afterwards its answer is walked again with
a matcher of our own, token by token, to look at each mask. What the model wanted is its best token without the mask: the
log-probabilities that are told are those of the model itself, so `top_logprobs_num=1` brings it.

Then the mistake that is made most often: the end token is left out of the grammar's hands.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

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
AGREES = "(yes|no)(, and (yes|no))?"
SHOWN = 3  # of the allowed tokens


class Step(NamedTuple):
    """One mask and what came of it: token ids."""

    before: list[int]
    allowed: list[int]
    wanted: int
    taken: int


def main() -> None:
    with Engine(device="cpu") as engine:
        config, tokenizer = engine.wrapper.config, engine.wrapper.tokenizer
        compiler = GrammarCompiler(tokenizer.inner, config.vocab_size, config.eos_token_ids)
        prompt = tokenizer.encode_chat([{"role": "user", "content": QUESTION}])
        (end,) = config.eos_token_ids

        heading("Without a grammar")
        print(f"  {engine.generate(input_ids=prompt, sampling_params={'max_new_tokens': 24})['text']!r}")

        heading(f"Under a JSON schema: of {config.vocab_size:,} tokens, each step's mask allows")
        text, steps = walk(engine, compiler, prompt, "json_schema", json.dumps(SCHEMA))
        forced = sum(len(step.allowed) == 1 for step in steps)
        check(
            "the text is JSON, with the names of the schema in its order", list(json.loads(text)) == SCHEMA["required"]
        )
        check("every token that was taken was allowed", all(step.taken in step.allowed for step in steps))
        check(f"{forced} of {len(steps)} steps left no choice", 0 < forced < len(steps))
        may_end = [end in step.allowed for step in steps]
        check(
            "the end token was allowed in the last step, and in no other",
            may_end == [False] * (len(steps) - 1) + [True],
        )

        heading(f"Under the regular expression {AGREES}")
        _, steps = walk(engine, compiler, prompt, "regex", AGREES)
        complete = [tokenizer.decode(step.before) in ("yes", "no") for step in steps]
        check("where the text is complete and may go on, the end is one of several", any(complete))
        check("there and at its very end it is allowed", [end in s.allowed for s in steps[:-1]] == complete[:-1])

        heading("The mistake: a mask that leaves the end token alone")
        first = allowed_tokens(compiler.mask(compiler.compiled("regex", AGREES), False), config.vocab_size)
        shortest = {True: "''", False: "'no'"}
        mistake(
            "the shortest answer that a model may give",
            wrong=shortest[end in {*first, end}],
            right=shortest[end in first],
        )


def walk(
    engine: Engine, compiler: GrammarCompiler, prompt: list[int], kind: str, written: str
) -> tuple[str, list[Step]]:
    """The engine's answer, and each of its masks seen again."""
    params: dict[str, Any] = {"max_new_tokens": 80, kind: written}
    answer = engine.generate(input_ids=prompt, sampling_params=params, return_logprob=True, top_logprobs_num=1)
    wanted = [best[0][1] for best in answer["meta_info"]["output_top_logprobs"]]
    mask, output = compiler.mask(compiler.compiled(kind, written), after_thinking=False), answer["output_ids"]
    steps = []
    for n, taken in enumerate(output):
        mask.read(output[:n])
        steps.append(Step(output[:n], allowed_tokens(mask, engine.wrapper.config.vocab_size), wanted[n], taken))
    show(engine.wrapper.tokenizer, steps)
    print(f"  {answer['text']}")
    return answer["text"], steps


def allowed_tokens(mask: GrammarMask, vocab_size: int) -> list[int]:
    """The bits of its row as token ids: bit i of word w is token 32 w + i."""
    (bits,) = GrammarMask.fill([mask], vocab_size)
    return np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")[:vocab_size]).tolist()


def show(tokenizer: Tokenizer, steps: Sequence[Step]) -> None:
    def word(token: int) -> str:
        return tokenizer.special_text(token) or repr(tokenizer.token_text(token))

    rows = []
    for step in steps:
        longest = sorted(step.allowed, key=lambda token: -len(tokenizer.token_text(token)))  # they say most
        such_as = " ".join(map(word, longest[:SHOWN])) + (" ..." if len(longest) > SHOWN else "")
        so_far = repr(tokenizer.decode(step.before)[-14:])
        rows.append((so_far, len(step.allowed), such_as, word(step.wanted), word(step.taken)))
    table(("so far", "allowed", "such as", "the model wanted", "taken"), rows)


if __name__ == "__main__":
    run_main(main)
