"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}, nested.

SGLang 0.5.23 answers flat ({"object": "error", "message": ...}, srt/entrypoints/openai/protocol.py, ErrorResponse), which the
official client reads too, but not every other one.
"""

import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import wraps
from typing import Any

from fastapi import Request, Response

from ch07_sglang_radix.serving.io_struct import Answer, RequestError
from ch07_sglang_radix.serving.responses import as_json

MOST_CHARACTERS = 500


class APIError(Exception):
    """A request that is not served, in one line. param: the field that is to blame, as `messages[0].content`."""

    def __init__(
        self, message: str, param: str | None = None, *, status: int = 400, kind: str = "invalid_request_error",
        code: str | None = None,
    ):  # fmt: skip
        message = " ".join(message.split())  # names of fields can hold anything
        message, param = message[:MOST_CHARACTERS], param and param[:MOST_CHARACTERS]
        super().__init__(message)
        self.message, self.param, self.status, self.kind, self.code = message, param, status, kind, code

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def of_request_error(error: RequestError, fields: Collection[str], renamed: Mapping[str, str]) -> APIError:
    """The manager's refusal in the words of this API. renamed: {SGLang's name: the field here}; fields: of the body."""
    message = re.sub(r"\w+", lambda word: renamed.get(word[0], word[0]), error.message)
    first = re.match(r"\w+", message)
    param = first[0] if first and first[0] in fields else None
    return APIError(message, param, status=error.status, kind=error.kind)


def of_abort(answer: Answer) -> APIError | None:
    """The error with which an answer has ended, if it has. An abort that somebody asked for has no status, and is none."""
    reason = answer["meta_info"]["finish_reason"]
    if reason is None or reason["type"] != "abort" or "status_code" not in reason:
        return None
    return APIError(reason["message"], status=reason["status_code"], kind=reason["err_type"])


def answers_errors(route: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """A route whose APIError becomes the response."""

    @wraps(route)
    async def wrapped(request: Request) -> Response:
        try:
            return await route(request)
        except APIError as error:
            return as_json(error.body, error.status)

    return wrapped
