"""What comes in from outside, and how it is refused.

`GenerateRequest` is the body of /generate under SGLang's names (srt/managers/io_struct.py, GenerateReqInput of 0.5.23); the
OpenAI routes make one too. What its values mean is looked at in one place for the engine and the server
(generate_request.py, GenerateCall); here only kinds are declared, so that a body which does not fit is refused by name.
"""

from typing import Any

import msgspec


class RequestError(Exception):
    """Why a request is not served, before anything of it has run. status: of HTTP. kind: OpenAI's error type."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error"):
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind


class SessionParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Continue a session. id: its name. rid: the request of it to continue from; without, it begins with nothing.

    offset: so many tokens of that request's prompt and answer are kept. replace: what continued it so far (no rid: every
    request) is ended and forgotten, and so is what it still computes. drop_previous_output: its prompt alone is continued.
    """

    id: str
    rid: str | None = None
    offset: int | None = None
    replace: bool = False
    drop_previous_output: bool = False


class GenerateRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Exactly one of text and input_ids; a list of them is a batch. sampling_params: one for all, or a list.

    rid: one a prompt; with n > 1 its answers are rid_0, rid_1... extra_key: namespace in the radix tree.
    return_text_in_logprobs: the third of each triple is the token's text. require_reasoning: a grammar holds behind </think>.
    lora_path: name of a loaded adapter, or one a prompt with null for the base.
    bootstrap_room: where the prompt's K and V change engines, if this one does half of the work (handoff.py).
    image_data: the pictures that the prompt has places for, as data: URLs or base64; one, a list, or for a batch a list of such.
    """

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None  # one prompt, or several
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None
    stream: bool = False
    rid: str | list[str] | None = None
    return_logprob: bool = False
    logprob_start_len: int | None = None
    top_logprobs_num: int | None = None
    token_ids_logprob: list[int] | None = None
    return_text_in_logprobs: bool = False
    extra_key: str | None = None
    priority: int = 0
    routing_key: str | None = None
    session_params: SessionParams | None = None
    require_reasoning: bool = False
    lora_path: str | list[str | None] | None = None
    bootstrap_host: str | None = None
    bootstrap_port: int | None = None
    bootstrap_room: int | None = None
    image_data: Any = None


Answer = dict[str, Any]  # {"text", "output_ids", "meta_info", "index"}
