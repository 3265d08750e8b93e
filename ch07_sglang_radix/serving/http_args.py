"""The flags of launch_server: those of the engine (server_args.py) and, here, those of the server around it.

Names are SGLang's where SGLang has the thing; `OURS` lists what it has not.
"""

import argparse
import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from ch07_sglang_radix.arguments_not_here import ELSEWHERE, IDLE
from ch07_sglang_radix.server_args import ServerArgs
from common.arguments import refuse_unknown, without_idle
from common.distributed.processes import refuse_too_many_ranks
from common.text.reasoning import FORCED
from common.values import choice, flag, real, shown, text, texts, whole

LEVELS = ("critical", "error", "warning", "info", "debug")
OURS = (
    "single_process",
    "drain_timeout",
    "log_format",
    "cors_allow_origins",
    "allowed_hosts",
    "max_body_bytes",
    "profile_dir",
)
TOOL_CALLS = ("qwen", "qwen25")  # SGLang's names of the format that common/text/tool_calls.py reads
ALIASES = {
    "model_path": ("--model",), "tp_size": ("--tp", "--tensor-parallel-size"), "pp_size": ("--pipeline-parallel-size",),
    "dp_size": ("--data-parallel-size",), "ep_size": ("--expert-parallel-size", "--ep"),
    "moe_runner": ("--moe-runner-backend",),
    "cp_size": ("--attn-cp-size", "--attention-context-parallel-size"),
}  # fmt: skip

# flags of SGLang 0.5.23 that a reader may bring along, and why they do nothing here
NOT_HERE = {
    **{name: why for name, why in ELSEWHERE.items() if name not in ("max_queued_requests", "watchdog_timeout")},
    "sampling_backend": "one sampler here; leave it out",
    "tokenizer_mode": "the fast tokenizer is always used; leave it out", "load_format": "safetensors only; leave it out",
    "incremental_streaming_output": "/generate streams cumulative text; the OpenAI routes stream deltas",
    "skip_server_warmup": "the engine warms up while it loads; leave it out",
}  # fmt: skip


@dataclass(frozen=True)
class HttpArgs:
    """host, port (0: any free one), api_key, admin_api_key (of the admin routes), served_model_name: as in SGLang.

    chat_template: a file in Jinja, or the template itself; instead of the checkpoint's. It is read once, here.
    tool_call_parser: Qwen's format is read with or without it. reasoning_parser: which kind of model thinks (FORCED in
    common/text/reasoning.py); without it <think> is text like any other. enable_metrics: GET /metrics.
    grpc_port: also answer gRPC there (0: any free one).
    max_queued_requests: requests that have no token yet; one more is answered with 503. watchdog_timeout: seconds that a step
    may take, and a process may be stopped, before all end. drain_timeout: seconds that running requests have after SIGTERM.
    single_process: everything in one process, for reading and debugging. log_format: text or json. cors_allow_origins:
    origins whose pages may call the API from a browser; none by default, where SGLang allows all: a page of any site could then
    use a server on this machine. allowed_hosts: names besides the host itself that a request may give in Host.
    Raises ValueError for a value of a wrong kind or outside its range.
    """

    engine: ServerArgs = field(default_factory=ServerArgs)
    host: str = "127.0.0.1"
    port: int = 30000
    api_key: str | None = None
    admin_api_key: str | None = None
    served_model_name: str | None = None
    chat_template: str | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    enable_metrics: bool = False
    grpc_port: int | None = None
    max_queued_requests: int | None = None
    watchdog_timeout: float = 300.0
    drain_timeout: float = 30.0
    single_process: bool = False
    log_format: str = "text"
    cors_allow_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_body_bytes: int = 16 << 20
    profile_dir: str = "."

    def __post_init__(self):
        self._set("port", whole("port", self.port, 0, 65535))
        if self.grpc_port is not None:
            self._set("grpc_port", whole("grpc_port", self.grpc_port, 0, 65535))
        if self.max_queued_requests is not None:
            self._set("max_queued_requests", whole("max_queued_requests", self.max_queued_requests, 1))
        self._set("max_body_bytes", whole("max_body_bytes", self.max_body_bytes, 1024))
        self._set("watchdog_timeout", real("watchdog_timeout", self.watchdog_timeout, 0, 86400, open_below=True))
        self._set("drain_timeout", real("drain_timeout", self.drain_timeout, 0, 86400))
        for name in ("enable_metrics", "single_process"):
            self._set(name, flag(name, getattr(self, name)))
        for name in ("host", "profile_dir"):
            self._set(name, text(name, getattr(self, name), empty=False))
        for name in ("api_key", "admin_api_key", "chat_template"):
            self._set(name, text(name, getattr(self, name), empty=False, none=True))
        for name in ("cors_allow_origins", "allowed_hosts"):
            self._set(name, texts(name, getattr(self, name)))
        choice("log_format", self.log_format, ("text", "json"))
        if self.single_process and self.engine.dp_size > 1 and self.engine.ranks > 1:
            raise ValueError(
                f"single_process has one process, dp_size={self.engine.dp_size} replicas of {self.engine.ranks} ranks need one "
                "each; leave it out"
            )
        if self.engine.dp_size > 1:  # of one replica the ranks are refused where they are started
            each, all_of_them = self.engine.ranks, self.engine.ranks * self.engine.dp_size
            of = f" x {each} ranks" if each > 1 else ""
            refuse_too_many_ranks(f"dp_size={self.engine.dp_size}{of}", all_of_them)
        self._about_text()
        name = text("served_model_name", self.served_model_name, empty=False, none=True)
        self._set("served_model_name", name or str(self.engine.model_path or "tiny-qwen"))

    def _about_text(self) -> None:
        for name, known in (("tool_call_parser", TOOL_CALLS), ("reasoning_parser", tuple(FORCED))):
            if getattr(self, name) is not None:
                choice(name, getattr(self, name), known)
        self._set("chat_template", read_template(self.chat_template))
        for name in ("chat_template", "tool_call_parser", "reasoning_parser"):
            if getattr(self, name) is not None and self.engine.skip_tokenizer_init:
                raise ValueError(f"{name} is about text; leave it out, or skip_tokenizer_init")

    def model(self) -> dict[str, Any]:
        """For /model_info."""
        engine = self.engine
        return {
            "model_path": str(engine.model_path or "tiny-qwen"), "served_model_name": self.served_model_name,
            "tokenizer_path": str(engine.tokenizer_path or engine.model_path or "tiny-qwen"), "is_generation": True,
            "weight_version": "default",
        }  # fmt: skip

    def shown(self) -> dict[str, Any]:
        """For /server_info: no secrets."""
        hidden = ("engine", "api_key", "admin_api_key")
        return {name: value for name, value in vars(self).items() if name not in hidden}

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def parse_args(argv: Sequence[str]) -> HttpArgs:
    """Raises ValueError, in one line, for flags that do not exist here; argparse itself answers --help and bad values."""
    parser = argparse.ArgumentParser(
        prog="python -m ch07_sglang_radix.launch_server", description="An SGLang-like server. Flags have SGLang's names.",
        allow_abbrev=False,
    )  # fmt: skip
    for owner in (ServerArgs, HttpArgs):
        group = parser.add_argument_group(f"of the {'engine' if owner is ServerArgs else 'server'} ({owner.__name__})")
        for one in fields(owner):
            if one.name != "engine":
                add_flag(group, one)
    given, unknown = parser.parse_known_args(argv)
    asked, stray = _not_here(unknown)
    names, known = (
        without_idle(asked, IDLE),
        [one.name for owner in (ServerArgs, HttpArgs) for one in fields(owner)],
    )
    refuse_unknown("flag", list(map(_flag, names)), list(map(_flag, known)), _hints(names))
    if stray:
        raise ValueError(f"{stray[0]!r} belongs to no flag")
    values = vars(given)
    server = {one.name: values.pop(one.name) for one in fields(HttpArgs) if one.name in values}
    return HttpArgs(engine=ServerArgs.of({"log_level": "info"} | values), **server)


def _not_here(unknown: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What argparse has no flag for -> ({name: value}, what follows no flag). A flag without a value is a switch: True.

    A value is read as the kind of the one that asks for nothing, so that --pp-size 1 is what pp_size=1 is.
    """
    asked: dict[str, Any] = {}
    stray, last = [], None
    for one in unknown:
        if one.startswith("--"):
            spelled, given, value = one.partition("=")
            last = next((name for name, others in ALIASES.items() if spelled in others), spelled[2:].replace("-", "_"))
            asked[last] = _as_idle(last, value) if given else True
        elif last is not None and asked[last] is True:
            asked[last] = _as_idle(last, one)
        else:
            stray.append(one)
    return asked, stray


def _as_idle(name: str, value: str) -> Any:
    idle = IDLE.get(name)
    try:
        return value if idle is None else type(idle)(value)
    except ValueError:
        return value


def read_template(given: str | None) -> str | None:
    """A file, or a template itself. Raises ValueError if it cannot be read."""
    if given is None or "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"chat_template={shown(given)} cannot be read: {error}; give a file in Jinja") from None


def add_flag(group: argparse._ArgumentGroup, one: Field) -> None:
    kind, name = str(one.type), _flag(one.name)
    if one.default is True:  # --no-... switches it off
        group.add_argument(name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS)
    elif "bool" in kind:
        group.add_argument(name, action="store_true", default=argparse.SUPPRESS)
    elif "tuple" in kind:
        group.add_argument(name, nargs="*", action="extend", default=argparse.SUPPRESS)  # given twice: both
    else:
        read = int if "int" in kind else float if "float" in kind else str
        said = "" if one.default is None else f"default {one.default}"
        group.add_argument(name, *ALIASES.get(one.name, ()), type=read, default=argparse.SUPPRESS, help=said)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _hints(names: Iterable[str]) -> dict[str, str]:
    return {_flag(name): NOT_HERE[name] for name in names if name in NOT_HERE}


def bind(host: str, port: int) -> socket.socket:
    """Raises ValueError, in one line, if the port is in use or the host is not this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        if os.name == "posix":  # elsewhere it would let two servers share a port
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(2048)
    except OSError as error:
        raise ValueError(
            f"{host}:{port} cannot be served: {error.strerror or error}; another --port, or 0 for any"
        ) from None
    return found
