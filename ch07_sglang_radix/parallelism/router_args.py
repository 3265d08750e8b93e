"""The router's flags. Names, and where nothing else is said defaults, are those of SGLang's router.

SGLang: sgl-model-gateway/bindings/python/src/sglang_router/router_args.py. Ours are shorter where a laptop waits: the health check
every 5 s (60 there), 30 s for running requests at the end (180), 127.0.0.1 (0.0.0.0); connect_timeout_secs, max_body_bytes and
allowed_hosts are ours, as in launch_server.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TypeVar
from urllib.parse import urlsplit

from ch07_sglang_radix.policy_names import LOAD_BALANCE_METHODS
from ch07_sglang_radix.serving.http_args import LEVELS, add_flag
from common.arguments import refuse_unknown
from common.values import choice, real, shown, text, texts, whole

Args = TypeVar("Args")

ELSEWHERE = {
    "--mini-lb": "python -m ch07_sglang_radix.disaggregation.mini_lb is one, and --pd-disaggregation does more"
}
URLS = ("worker_urls", "prefill", "decode")


@dataclass(frozen=True)
class RouterArgs:
    """worker_urls: servers that answer /generate or /v1/...; more can be added while it runs. policy: load_balancing.py.

    pd_disaggregation: a request goes to two servers, one of `prefill` and one of `decode` (--prefill URL, --decode URL, each as
    often as there are servers), chosen by prefill_policy and decode_policy; these are `policy` where they are not given. A prefill
    server says itself where its bootstrap server is.
    api_key: asked of clients, sent to the workers where the router itself asks; without it whatever a client brings is passed on.
    admin_api_key: of the routes that add and remove workers. retry_max_retries: how often another worker is tried, as long as
    nothing of an answer has gone out. Raises ValueError for a value of a wrong kind or outside its range.
    """

    worker_urls: tuple[str, ...] = ()
    policy: str = "cache_aware"
    pd_disaggregation: bool = False
    prefill: tuple[str, ...] = ()
    decode: tuple[str, ...] = ()
    prefill_policy: str | None = None
    decode_policy: str | None = None
    host: str = "127.0.0.1"
    port: int = 30000
    api_key: str | None = None
    admin_api_key: str | None = None
    cache_threshold: float = 0.3
    balance_abs_threshold: int = 64
    balance_rel_threshold: float = 1.5
    max_tree_size: int = 1 << 26
    request_timeout_secs: float = 1800.0
    connect_timeout_secs: float = 5.0
    retry_max_retries: int = 5
    retry_initial_backoff_ms: int = 50
    retry_max_backoff_ms: int = 30_000
    retry_backoff_multiplier: float = 1.5
    health_check_endpoint: str = "/health"
    health_check_interval_secs: float = 5.0
    health_check_timeout_secs: float = 5.0
    health_failure_threshold: int = 3
    health_success_threshold: int = 2
    cb_failure_threshold: int = 10
    cb_success_threshold: int = 3
    cb_timeout_duration_secs: float = 60.0
    shutdown_grace_period_secs: float = 30.0
    log_level: str = "info"
    log_format: str = "text"
    cors_allow_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_body_bytes: int = 16 << 20

    def __post_init__(self):
        for name in (*URLS, "cors_allow_origins", "allowed_hosts"):
            self._set(name, texts(name, getattr(self, name)))
        for name in URLS:
            self._set(name, tuple(map(worker_url, getattr(self, name))))
        given = {name: getattr(self, name) for name in URLS if getattr(self, name)}
        urls = [url for some in given.values() for url in some]
        if len(set(urls)) < len(urls):
            raise ValueError(f"{' and '.join(given)} names {len(urls)}, and only {len(set(urls))} different ones")
        self._check_halves()
        choice("policy", self.policy, LOAD_BALANCE_METHODS)
        for name in ("prefill_policy", "decode_policy"):
            if getattr(self, name) is not None:
                choice(name, getattr(self, name), LOAD_BALANCE_METHODS)
        choice("log_level", self.log_level, LEVELS)
        choice("log_format", self.log_format, ("text", "json"))
        for name in ("host", "health_check_endpoint"):
            self._set(name, text(name, getattr(self, name), empty=False))
        for name in ("api_key", "admin_api_key"):
            self._set(name, text(name, getattr(self, name), empty=False, none=True))
        least = {"port": 0, "balance_abs_threshold": 0, "retry_max_retries": 0, "max_body_bytes": 1024}
        for name, kind in ((one.name, one.type) for one in fields(self)):
            if kind == "int" or kind is int:
                most = 65535 if name == "port" else (1 << 31) - 1
                self._set(name, whole(name, getattr(self, name), least.get(name, 1), most))
            elif kind == "float" or kind is float:
                most, open_below = (1, False) if name == "cache_threshold" else (86400, True)
                self._set(name, real(name, getattr(self, name), 0, most, open_below=open_below))

    def _check_halves(self) -> None:
        if not isinstance(self.pd_disaggregation, bool):
            raise ValueError(f"pd_disaggregation={shown(self.pd_disaggregation)} must be true or false")
        halves = [name for name in ("prefill", "decode", "prefill_policy", "decode_policy") if getattr(self, name)]
        if halves and not self.pd_disaggregation:
            raise ValueError(f"{' and '.join(halves)} without pd_disaggregation; give --pd-disaggregation, too")
        if self.pd_disaggregation and self.worker_urls:
            raise ValueError("worker_urls with pd_disaggregation: name each server as --prefill URL or --decode URL")
        for name in ("prefill", "decode"):
            if self.pd_disaggregation and not getattr(self, name):
                raise ValueError(f"no {name} server is named; give --{name} URL")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def worker_url(url: str) -> str:
    """Without a slash at the end. Raises ValueError if it is none, or names a user: a worker asks for a key (--api-key)."""
    try:
        parts = urlsplit(url)
        right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        right = False
    more = right and (parts.query or parts.fragment or parts.username is not None)
    if not right or more or any(character <= " " for character in url):
        raise ValueError(f"worker url {shown(url)} must be like http://127.0.0.1:30001")
    return url.rstrip("/")


def parse_args(argv: Sequence[str]) -> RouterArgs:
    """See read_flags."""
    module, what = "ch07_sglang_radix.parallelism.router", "One front for several servers."
    return read_flags(RouterArgs, argv, module, what, ELSEWHERE)


def read_flags(
    args: type[Args], argv: Sequence[str], module: str, what: str, elsewhere: Mapping[str, str] = MappingProxyType({})
) -> Args:
    """A dataclass of a front's arguments from its command line. elsewhere: of flags that are not here, the way out.

    Raises ValueError, in one line, for flags that do not exist here; argparse itself answers --help and bad values.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=what, allow_abbrev=False)
    for one in fields(args):
        add_flag(parser, one)
    given, unknown = parser.parse_known_args(argv)
    names = [one.partition("=")[0] for one in unknown if one.startswith("-")]
    if unknown and not names:
        raise ValueError(f"{unknown[0]!r} belongs to no flag")
    refuse_unknown("flag", names, ["--" + one.name.replace("_", "-") for one in fields(args)], elsewhere)
    return args(**vars(given))
