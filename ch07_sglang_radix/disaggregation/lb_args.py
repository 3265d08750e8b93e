"""The balancer's flags; --prefill and --decode are those of SGLang's (sgl-model-gateway, mini_lb)."""

from collections.abc import Sequence
from dataclasses import dataclass

from ch07_sglang_radix.parallelism.router_args import read_flags, worker_url
from ch07_sglang_radix.serving.http_args import LEVELS
from common.values import choice, real, text, texts, whole


@dataclass(frozen=True)
class LbArgs:
    """prefill, decode: the servers of each half; requests go round among them. api_key: asked of clients, whose key is passed on.
    Raises ValueError for a value of a wrong kind or outside its range, and if a half is missing."""

    prefill: tuple[str, ...] = ()
    decode: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    admin_api_key: str | None = None
    request_timeout_secs: float = 1800.0
    connect_timeout_secs: float = 5.0
    log_level: str = "info"
    log_format: str = "text"
    cors_allow_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_body_bytes: int = 16 << 20

    def __post_init__(self):
        for name in ("prefill", "decode", "cors_allow_origins", "allowed_hosts"):
            self._set(name, texts(name, getattr(self, name)))
        for name in ("prefill", "decode"):
            urls = tuple(map(worker_url, getattr(self, name)))
            if not urls:
                raise ValueError(f"no {name} server is named; give --{name} URL")
            self._set(name, urls)
        self._set("port", whole("port", self.port, 0, 65535))
        self._set("max_body_bytes", whole("max_body_bytes", self.max_body_bytes, 1024))
        for name in ("request_timeout_secs", "connect_timeout_secs"):
            self._set(name, real(name, getattr(self, name), 0, 86400, open_below=True))
        self._set("host", text("host", self.host, empty=False))
        for name in ("api_key", "admin_api_key"):
            self._set(name, text(name, getattr(self, name), empty=False, none=True))
        choice("log_level", self.log_level, LEVELS)
        choice("log_format", self.log_format, ("text", "json"))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def parse_args(argv: Sequence[str]) -> LbArgs:
    """See read_flags."""
    module = "ch07_sglang_radix.disaggregation.mini_lb"
    return read_flags(LbArgs, argv, module, "One front for prefill and decode servers.")
