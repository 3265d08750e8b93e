"""Half a character and half a stop string: what the detokenizer does not say yet.

    python ch07_sglang_radix/serving/demo_3_held_back.py

The detokenizer of the server is given the messages that a scheduler would send, one token each, and no model is needed. A
token can end in the middle of a character, and a text can end in what may become a stop: both are shown late or never, as
what was sent cannot be taken back.
"""

from itertools import pairwise

from ch07_sglang_radix.serving.channels import MemoryPipe
from ch07_sglang_radix.serving.detokenizer_manager import DetokenizerManager
from ch07_sglang_radix.serving.messages import BatchTokenIDs, Begin
from ch07_sglang_radix.serving.scheduler_process import NOTHING
from common.distributed.launch import run_main
from common.teaching.show import check, heading, mistake, table
from common.text.tokenizer import Tokenizer
from common.tiny_qwen import TINY_QWEN_PATH

WALL, TAGGED = "The Great Wall is 万里长城 😀.", "a <b> and then <br> more </answer> never shown"
STOP = "</answer>"


def main() -> None:
    tokenizer = Tokenizer(TINY_QWEN_PATH)

    heading("Half a character")
    ids = tokenizer.encode_bare(WALL)
    sent, alone, whole = (
        spoken(tokenizer, ids, []),
        [tokenizer.decode([token]) for token in ids],
        growing(tokenizer, ids),
    )
    rows = [
        (token, tokenizer.token_bytes(token).hex(" "), repr(one), repr(all_of[-8:]), repr(new) if new else "(waits)")
        for token, one, all_of, new in zip(ids, alone, whole, sent, strict=True)
    ]
    table(("token", "bytes", "decoded alone", "all decoded, its end", "sent"), rows)
    check("all that was sent is the text", "".join(sent) == WALL)
    check("some tokens sent nothing: their character was not whole", "" in sent)
    mistake("decoded token by token", wrong=repr("".join(alone)), right=repr("".join(sent)))
    taken_back = sum(not b.startswith(a) for a, b in pairwise(whole))
    mistake(
        "texts that take back what the last one showed, if all is decoded each time", wrong=str(taken_back), right="0"
    )

    heading(f"Half a stop string, stop={STOP!r}")
    ids = tokenizer.encode_bare(TAGGED)
    end = next(n for n in range(1, len(ids)) if STOP in tokenizer.decode(ids[:n]))  # where the scheduler ends it
    ids = ids[:end]
    sent, plain = spoken(tokenizer, ids, [STOP], {"type": "stop", "matched": STOP}), spoken(tokenizer, ids, [])
    rows = [
        (repr(tokenizer.token_text(token)), repr(new) if new else "(waits)", repr(held(plain[: i + 1], sent[: i + 1])))
        for i, (token, new) in enumerate(zip(ids, sent, strict=True))
    ]
    table(("token", "sent", "held back"), rows)
    right = TAGGED.partition(STOP)[0]
    check("the text ends before the stop", "".join(sent) == right)
    check("what only looked like a stop was sent after all", "<b>" in right and "<br>" in right)
    mistake(
        "text sent as it comes, the stop cut off at the end",
        wrong=repr("".join(plain[:-1])[-24:]),
        right=repr("".join(sent[:-1])[-24:]),
    )


def spoken(tokenizer: Tokenizer, ids: list[int], stop: list[str], finished: dict | None = None) -> list[str]:
    """What the detokenizer sends for each token, when they come one a step."""
    detokenizer = DetokenizerManager(tokenizer, MemoryPipe(), MemoryPipe())
    begin, said = Begin(tokenizer.encode_bare("Say it: "), {"stop": stop}), []
    for step, token in enumerate(ids):
        end = (finished or {"type": "length", "length": len(ids)}) if step == len(ids) - 1 else None
        batch = BatchTokenIDs(step, [0], [None if step else begin], [[token]], [end], [0], [NOTHING], [NOTHING])
        said += detokenizer.with_text(batch).new_text
    return said


def growing(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The plain way: all tokens so far decoded, after each."""
    return [tokenizer.decode(ids[: n + 1]) for n in range(len(ids))]


def held(there: list[str], sent: list[str]) -> str:
    return "".join(there)[len("".join(sent)) :]


if __name__ == "__main__":
    run_main(main)
