"""Who may do what: keys, browsers, and how much a body may hold.

`ROUTES` says for every path whose key it wants; a test walks over all routes of the application, so that none is forgotten.

    open    no key: probes, which come from machines that have none
    key     --api-key, if the server has one
    admin   --admin-api-key if the server has one, and then that key alone; else as `key`
    page    as `key`, and Host must be this server's own name (a page of another name may have resolved it to this address)
    files   Host as for `page`, and no key: what a browser must have before somebody can type one

A browser sends requests to any server its pages ask it to, and only hides the answers (CORS). So a request whose Origin is
another site is refused before anything is done, unless --cors-allow-origins names that site. SGLang 0.5.23 allows all
origins: right for an API with keys behind a gateway, wrong for a server without a key on somebody's own machine.
"""

import hmac
from ipaddress import ip_address
from typing import Literal
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ch07_sglang_radix.serving.http_args import HttpArgs
from ch07_sglang_radix.serving.responses import as_json

Guard = Literal["open", "key", "admin", "page", "files"]

ROUTES: dict[str, Guard] = {
    "/health": "open", "/health_generate": "open", "/ready": "open", "/metrics": "open",
    "/generate": "key", "/tokenize": "key", "/v1/tokenize": "key", "/detokenize": "key", "/v1/detokenize": "key",
    "/model_info": "key", "/get_model_info": "key", "/server_info": "key", "/get_server_info": "key", "/openapi.json": "key",
    "/open_session": "key", "/close_session": "key",
    "/v1/models": "key", "/v1/models/{model}": "key", "/v1/completions": "key", "/v1/chat/completions": "key",
    "/flush_cache": "admin", "/abort_request": "admin", "/pause_generation": "admin", "/continue_generation": "admin",
    "/load_lora_adapter": "admin", "/unload_lora_adapter": "admin",
    "/step_generation": "admin", "/start_profile": "admin", "/stop_profile": "admin",
    "/update_weights_from_disk": "admin", "/update_weights_from_tensor": "admin", "/update_weights_from_distributed": "admin",
    "/init_weights_update_group": "admin", "/destroy_weights_update_group": "admin", "/update_weight_version": "admin",
    "/get_weights_by_name": "admin", "/weights_checker": "admin", "/get_weight_version": "key", "/weight_version": "key",
    "/release_memory_occupation": "admin", "/resume_memory_occupation": "admin",
    "/xray/events": "page", "/": "files",
    "/list_workers": "key", "/add_worker": "admin", "/remove_worker": "admin",  # of the router, parallelism/router.py
}  # fmt: skip
PREFIXES: dict[str, Guard] = {"/xray": "files", "/v1/models/": "key"}
LOCAL_NAMES = ("localhost", "")


def guard_of(path: str) -> Guard:
    """What nobody has thought of wants the key."""
    found = ROUTES.get(path)
    return found or next((guard for prefix, guard in PREFIXES.items() if path.startswith(prefix)), "key")


def guarded(app: FastAPI, args: HttpArgs) -> None:
    app.add_middleware(_Guards, args=args)
    if args.cors_allow_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(args.cors_allow_origins), allow_methods=["*"], allow_headers=["*"]
        )


class _TooLarge(Exception):
    pass


class _Guards:
    """Looks at each request before any route does. Plain ASGI: what streams is not held up."""

    def __init__(self, app: ASGIApp, args: HttpArgs):
        self.app, self.args = app, args

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            status, message = refusal
            await as_json({"error": message}, status)(scope, receive, send)
            return
        await self._with_limit(scope, receive, send)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, object] | None:
        """(status, what is said), or None."""
        path, guard = scope["path"], guard_of(scope["path"])
        if scope["method"] == "OPTIONS":  # a browser asks what it may send; no route answers it
            return None
        if not has_key(guard, headers.get("authorization", ""), self.args):
            return 401, "Unauthorized"
        origin = headers.get("origin")
        if origin and not _same_origin(origin, headers.get("host", "")) and not self._allowed(origin):
            return 403, {"message": f"pages of {origin[:80]} may not call this server; see --cors-allow-origins"}
        if guard in ("page", "files") and not _is_own_name(headers.get("host", ""), self.args):
            return 403, {"message": f"{path} is not served under this Host; see --allowed-hosts"}
        length = headers.get("content-length", "0")
        if length.isdecimal() and len(length) < 20 and int(length) > self.args.max_body_bytes:
            return 413, {"message": self._too_large()}
        return None

    def _allowed(self, origin: str) -> bool:
        return origin in self.args.cors_allow_origins or "*" in self.args.cors_allow_origins

    def _too_large(self) -> str:
        return f"the body has more than {self.args.max_body_bytes} bytes (--max-body-bytes)"

    async def _with_limit(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A body without a length, in chunks, is counted while it comes."""
        read, answering = 0, False

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.args.max_body_bytes:
                raise _TooLarge
            return message

        async def noted(message: Message) -> None:
            nonlocal answering
            answering = True
            await send(message)

        try:
            await self.app(scope, counted, noted)
        except _TooLarge:
            if not answering:
                await as_json({"error": {"message": self._too_large()}}, 413)(scope, receive, send)


def has_key(guard: Guard, authorization: str, args: HttpArgs) -> bool:
    wanted = args.admin_api_key or args.api_key if guard == "admin" else args.api_key
    if guard in ("open", "files") or wanted is None:
        return True
    kind, _, key = authorization.partition(" ")
    # compare_digest takes as long for a key that is wrong at its first letter as for one that is wrong at its last
    return kind.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), wanted.encode())


def _same_origin(origin: str, host: str) -> bool:
    return urlsplit(origin).netloc.lower() == host.lower()


def _is_own_name(host: str, args: HttpArgs) -> bool:
    """An address is nobody's name; a name must be one that this server was told to have."""
    name = urlsplit(f"//{host}").hostname or ""
    try:
        ip_address(name)
        return True
    except ValueError:
        return name in (*LOCAL_NAMES, args.host, *args.allowed_hosts)
