"""Token ids -> text, in a process of its own: while the scheduler prepares the next step, this one decodes the last.

One BatchTokenIDs in, one BatchStr out. The scheduler knows where an answer ends (it looks for stop texts itself, token by
token); here the same AnswerText makes the text that is shown: half a character and what may be the beginning of a stop are
held back, and a stop is cut off. Nothing here needs torch, and the process starts without it. SGLang:
srt/managers/detokenizer_manager.py.
"""

import os
from contextlib import suppress
from dataclasses import dataclass, field

from ch07_sglang_radix.serving.channels import Pull, Push
from ch07_sglang_radix.serving.messages import VERSION, BatchStr, BatchTokenIDs, Begin, Hello, Leave
from common.request.end import End, text_shown
from common.text.answer import AnswerText
from common.text.tokenizer import Tokenizer


@dataclass(eq=False)
class Shown:
    """An answer's tokens, its text, and how many characters of that are out."""

    text: AnswerText
    output_ids: list[int] = field(default_factory=list)
    characters: int = 0


class DetokenizerManager:
    """inbox: from the scheduler, or from those of `replicas`; main: to the tokenizer manager."""

    def __init__(self, tokenizer: Tokenizer, inbox: Pull, main: Push, replicas: int = 1):
        self.tokenizer, self.inbox, self.main, self.replicas = tokenizer, inbox, main, replicas
        self.answers: dict[int, Shown] = {}  # that have not ended: one for each request that the scheduler has

    def run(self) -> None:
        """Until every scheduler has said that there is no more."""
        left = 0
        while left < self.replicas:
            message = self.inbox.receive(None)
            if isinstance(message, Leave):
                left += 1
            else:
                self.main.send(self.with_text(message))

    def with_text(self, batch: BatchTokenIDs) -> BatchStr:
        texts = [
            self._new_text(*one) for one in zip(batch.tickets, batch.begins, batch.new_ids, batch.finished, strict=True)
        ]
        return BatchStr(
            batch.step, batch.tickets, texts, batch.new_ids, batch.finished, batch.cached_tokens, batch.logprobs,
            batch.prompt_logprobs, batch.dp_rank, batch.drafts, batch.weight_version,
            batch.cached_details,
        )  # fmt: skip

    def _new_text(self, ticket: int, begin: Begin | None, new_ids: list[int], finished: dict | None) -> str:
        if begin is not None:
            self.answers[ticket] = Shown(AnswerText(self.tokenizer, begin.context, **begin.words))
        shown, end = self.answers[ticket], None
        shown.output_ids += new_ids
        if finished is not None:
            del self.answers[ticket]
            end = as_end(finished)
        with suppress(
            ValueError
        ):  # a stop pattern that takes too long now, and was quick in the scheduler: no new text
            text = text_shown(shown.text, shown.output_ids, end)
            new, shown.characters = text[shown.characters :], len(text)
            return new
        return ""


def detokenize(tokenizer_folder: str, inbox: Pull, main: Push, replicas: int = 1) -> None:
    """What the process does, or the thread."""
    manager = DetokenizerManager(Tokenizer(tokenizer_folder), inbox, main, replicas)
    main.send(Hello(VERSION, "detokenizer", os.getpid()))
    manager.run()


def as_end(finish_reason: dict) -> End:
    """SGLang's words (Req.finish) -> what the text depends on: whether the last token is a stop, and is not shown."""
    kind = finish_reason["type"]
    if kind == "abort" and "message" in finish_reason:
        kind = "error"
    return End(kind, finish_reason.get("matched"))
