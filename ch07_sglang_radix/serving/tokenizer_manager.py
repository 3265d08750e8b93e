"""Between the routes and the scheduler: text -> token ids, requests out, answers in, and who waits for which.

It lives in the process of the HTTP server, on its event loop. SGLang's is srt/managers/tokenizer_manager.py.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Literal

from ch07_sglang_radix.serving.io_struct import Answer, GenerateRequest
from common.text.tokenizer import Tokenizer

State = Literal["starting", "ready", "draining", "failed"]
PauseMode = Literal["abort", "retract", "in_place"]


class TokenizerManager:
    """tokenizer: None with skip_tokenizer_init, or if the checkpoint has none. args: HttpArgs and ServerArgs (launcher.py)."""

    def __init__(self, args: Any):
        self.args = args
        self.tokenizer: Tokenizer | None = None
        self.state: State = "starting"

    # --- answers

    async def generate(
        self, request: GenerateRequest, is_disconnected: Callable[[], Awaitable[bool]] | None = None
    ) -> AsyncIterator[Answer]:
        """The answers of a request, each with `index`, which of them it is (n > 1, or a batch).

        With `stream` what each has so far, CUMULATIVE, whenever it has grown; else each once, when it has ended. A
        dictionary is what Engine.generate returns: text, output_ids, meta_info with SGLang's finish_reason object or None.

        Raises RequestError before the first answer for bad input (400), a full queue and a server that is not ready (503).
        Afterwards an error is a finish_reason {"type": "abort", "message", "status_code", "err_type"}. Whoever closes the
        iterator, or is cancelled, or says yes to is_disconnected, has the request aborted.
        """
        raise NotImplementedError
        yield {}

    # --- control

    async def abort(self, rid: str | None = None, abort_all: bool = False) -> int:
        """End a request by its rid, or all; returns how many were there to end. They come back with finish_reason abort."""
        raise NotImplementedError

    async def flush_cache(self) -> bool:
        """Forget every cached prefix; False, and nothing is done, while requests wait or run."""
        raise NotImplementedError

    async def server_info(self) -> dict[str, Any]:
        """What the engine is, with pool, tree, queue and hit rate as they stand (Engine.get_server_info), and the arguments."""
        raise NotImplementedError

    async def model_info(self) -> dict[str, Any]:
        """model_path, tokenizer_path, served_model_name, is_generation, max_model_len, ...: the scheduler is not asked."""
        raise NotImplementedError

    async def pause(self, mode: PauseMode = "abort") -> int:
        """No step runs until `resume`. abort: all requests end; retract: they give their pages back and wait; in_place: they
        keep them. Returns how many it met.
        """
        raise NotImplementedError

    async def resume(self) -> None:
        raise NotImplementedError

    async def step(self, steps: int = 1) -> int:
        """While paused: so many steps; returns how many there were to do."""
        raise NotImplementedError

    async def start_profile(self, **options: Any) -> dict[str, Any]:
        """torch.profiler on every rank, one trace a rank; returns where they will lie."""
        raise NotImplementedError

    async def stop_profile(self) -> dict[str, Any]:
        raise NotImplementedError

    async def open_session(self, capacity_of_str_len: int, session_id: str | None = None) -> str:
        """Returns its id. Raises RequestError if it is open."""
        raise NotImplementedError

    async def close_session(self, session_id: str) -> None:
        raise NotImplementedError
