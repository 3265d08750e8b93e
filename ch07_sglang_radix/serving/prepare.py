"""A body of /generate -> requests that can run, or one RequestError before anything is queued.

The engine's own validation (generate_request.py) looks at the values; here are the limits of this server, the sessions, and
where it is done: a long text is encoded in a thread, so that it delays its own request only.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

from ch07_sglang_radix.generate_request import GenerateCall, LogprobOptions
from ch07_sglang_radix.handoff import Handoff
from ch07_sglang_radix.serving.http_args import HttpArgs
from ch07_sglang_radix.serving.io_struct import GenerateRequest, RequestError, SessionParams
from ch07_sglang_radix.serving.limits import check_limits
from ch07_sglang_radix.serving.sessions import Continuation, Sessions
from common.request.intake import Intake
from common.sampling.params import SamplingParams

LONG_TEXT = 20_000  # characters, from which on encoding takes longer than other callers should wait
# threads that open pictures, which may wait seconds for the net: others encode and render meanwhile
LOOKERS = ThreadPoolExecutor(8, "pictures")
_DEFAULTS = {field.name: field.default for field in fields(SamplingParams)}


class Preparation:
    def __init__(self, args: HttpArgs, intake: Intake, sessions: Sessions):
        self.args, self.intake, self.sessions = args, intake, sessions
        self.mode = args.engine.disaggregation_mode

    async def __call__(self, request: GenerateRequest) -> tuple[GenerateCall, Continuation | None]:
        """The call, and what it continues if it belongs to a session. Raises RequestError for whatever cannot run."""
        if (request.text is None) == (request.input_ids is None):
            raise RequestError(400, "give either text or input_ids")
        try:
            check_limits(request)
            if request.session_params is not None:
                if request.image_data is not None:
                    raise ValueError(
                        "image_data with session_params: a session keeps text alone; send all of it each time"
                    )
                return self._continued(request)
            arguments = request.text, request.input_ids, request
            texts = [request.text] if isinstance(request.text, str) else request.text or []
            if request.image_data is not None:
                return await asyncio.get_running_loop().run_in_executor(LOOKERS, self._call, *arguments), None
            if sum(map(len, texts)) > LONG_TEXT:
                return await asyncio.to_thread(self._call, *arguments), None
            return self._call(*arguments), None
        except ValueError as error:
            raise RequestError(400, str(error)) from None

    def _continued(self, request: GenerateRequest) -> tuple[GenerateCall, Continuation]:
        if self.mode != "null":
            raise ValueError(
                f"session_params: a session's K and V stay in one engine, and this one does {self.mode} only"
            )
        if is_several(request):
            raise ValueError("session_params: a session goes on by one request at a time, and n=1")
        new_ids = self.intake.ids(request.input_ids if request.text is None else request.text)
        continuation = self._continuation(request.session_params, new_ids)
        return self._call(None, continuation.prompt_ids, request), continuation

    def _continuation(self, params: SessionParams, new_ids: list[int]) -> Continuation:
        bos = self.intake.tokenizer.inner.bos_token_id if self.intake.tokenizer else None
        return self.sessions.continued(params, new_ids, bos)

    def room_for(self, ids: list[int], session: SessionParams | None) -> int:
        """The most tokens that can follow these, behind what the session has."""
        return self.intake.room_for(ids if session is None else self._continuation(session, ids).prompt_ids)

    def _call(self, text: Any, input_ids: Any, request: GenerateRequest) -> GenerateCall:
        logprobs = LogprobOptions.of(
            request.return_logprob, request.logprob_start_len, request.top_logprobs_num, request.token_ids_logprob,
            request.return_text_in_logprobs,
        )  # fmt: skip
        handoff = Handoff.of(self.mode, request.bootstrap_host, request.bootstrap_port, request.bootstrap_room)
        return GenerateCall.of(
            self.intake, text, input_ids, request.sampling_params, logprobs, request.rid, request.extra_key,
            request.priority, request.routing_key, request.require_reasoning, handoff, request.image_data,
            request.lora_path, self.args.engine.enable_lora, self.args.engine.one_seed,
        )  # fmt: skip


def is_several(request: GenerateRequest) -> bool:
    """Does a list come back? For a request that is right, the same as GenerateCall.single says."""
    batch = isinstance(request.text, list) or (bool(request.input_ids) and isinstance(request.input_ids[0], list))
    params = request.sampling_params if isinstance(request.sampling_params, list) else [request.sampling_params or {}]
    return batch or any(isinstance(one.get("n"), int) and one["n"] > 1 for one in params)


def changed(params: SamplingParams) -> dict[str, Any]:
    """The fields that are not the default: what travels."""
    return {name: value for name, default in _DEFAULTS.items() if (value := getattr(params, name)) != default}
