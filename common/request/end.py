"""How an answer ends, and what of its text may be shown before and after.

Apart from answer.py, which knows sampling and with it torch: a process that only turns ids into text needs none of that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from common.text.answer import AnswerText


@dataclass(frozen=True)
class End:
    """kind: stop (a token or a text said so), length, abort, error, or refused (it was the request's own fault). matched: the
    stop token or stop text. message: of an error or a refusal.
    """

    kind: str
    matched: int | str | None = None
    message: str | None = None


def text_shown(text: AnswerText, output_ids: Sequence[int], end: End | None) -> str:
    """The text of an answer's tokens that is certain; all of it once the answer has ended. Raises what AnswerText.catch_up does."""
    if end is None:
        text.catch_up(output_ids)
        return text.certain
    if end.kind != "error":
        text.finish(output_ids, by_stop_token=end.kind == "stop" and isinstance(end.matched, int))
    return text.text
