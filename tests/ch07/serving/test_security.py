"""Keys, origins and sizes, over the whole application; nothing behind the routes is needed for that."""

import asyncio
import re
from pathlib import Path

import httpx
import pytest
from starlette.routing import Route

from ch07_sglang_radix.serving import security
from ch07_sglang_radix.serving.channels import MemoryPipe
from ch07_sglang_radix.serving.http_args import HttpArgs
from ch07_sglang_radix.serving.http_server import make_app
from ch07_sglang_radix.serving.io_struct import RequestError
from ch07_sglang_radix.serving.security import PREFIXES, ROUTES, guard_of
from ch07_sglang_radix.serving.tokenizer_manager import TokenizerManager


def app(**http):
    made = make_app(TokenizerManager(HttpArgs(**http), None, MemoryPipe(), MemoryPipe()))
    made.state.xray.close()  # its stream ends at once
    return made


def ask(application, path, method="GET", headers=None, content=None, base="http://127.0.0.1:30000"):
    async def one():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url=base) as client:
            return await client.request(method, path, headers=headers, content=content)

    return asyncio.run(one())


def routes(application):
    """(path, a method of it) of every route, those of routers included."""
    found = list(application.routes)
    for route in found:
        if inner := getattr(route, "original_router", None):  # FastAPI's way to include a router
            found += inner.routes
            continue
        assert isinstance(route, Route), "a mount needs a prefix in the table, and a line here"
        yield route.path, min(route.methods - {"HEAD", "OPTIONS"})


def test_every_route_stands_in_the_table():
    served = {path for path, _ in routes(app())}
    unnamed = {path for path in served if path not in ROUTES and not any(map(path.startswith, PREFIXES))}
    assert not unnamed
    assert served >= {"/generate", "/health", "/flush_cache", "/server_info"}


@pytest.mark.parametrize(("enable", "status"), [(False, 404), (True, 200)])
def test_metrics_are_there_if_the_flag_is(enable, status):
    assert ask(app(enable_metrics=enable), "/metrics").status_code == status


BEARER = lambda key: {"Authorization": f"Bearer {key}"}  # noqa: E731


@pytest.mark.parametrize(
    ("keys", "opens"),
    [
        ({}, {"key": {None, "user", "admin", "no"}, "admin": {None, "user", "admin", "no"}}),
        ({"api_key": "user"}, {"key": {"user"}, "admin": {"user"}}),
        ({"admin_api_key": "admin"}, {"key": {None, "user", "admin", "no"}, "admin": {"admin"}}),
        ({"api_key": "user", "admin_api_key": "admin"}, {"key": {"user"}, "admin": {"admin"}}),
    ],
    ids=["no key", "api key", "admin key", "both"],
)
def test_a_route_opens_to_its_key_and_to_no_other(keys, opens):
    application = app(**keys)
    for path, method in routes(application):
        guard = guard_of(path)
        for key in (None, "user", "admin", "no"):
            answer = ask(application, path, method, BEARER(key) if key else {}, b"{}")
            allowed = guard in ("open", "files") or key in opens["key" if guard == "page" else guard]
            assert (answer.status_code != 401) == allowed, (path, guard, key)
            if not allowed:
                assert answer.json() == {"error": "Unauthorized"}


@pytest.mark.parametrize(
    "header", ["user", "Basic user", "Bearer", "Bearer ", "Bearer user2", "Bearer use", "Bearer schlüssel"]
)
def test_what_is_nearly_the_key_is_not_the_key(header):
    answer = ask(app(api_key="user"), "/model_info", headers={"Authorization": header.encode("latin-1")})
    assert answer.status_code == 401


def test_the_scheme_is_written_as_one_likes():
    assert ask(app(api_key="user"), "/model_info", headers={"authorization": "bearer  user"}).status_code == 200


def test_keys_are_compared_in_constant_time(monkeypatch):
    compared = []
    real = security.hmac.compare_digest
    monkeypatch.setattr(security.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    ask(app(api_key="user"), "/model_info", headers=BEARER("nope"))
    assert compared == [(b"nope", b"user")]


def test_a_page_of_another_site_may_not_call(caplog):
    here = {"Origin": "http://127.0.0.1:30000"}
    assert ask(app(), "/model_info", headers=here).status_code == 200
    for origin in ("http://evil.example", "http://127.0.0.1:30001", "null"):
        answer = ask(app(), "/abort_request", "POST", {"Origin": origin}, b'{"abort_all": true}')
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers
    friend = app(cors_allow_origins=("http://friend.example",))
    answer = ask(friend, "/model_info", headers={"Origin": "http://friend.example"})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "http://friend.example")
    preflight = {"Origin": "http://friend.example", "Access-Control-Request-Method": "POST"}
    assert ask(friend, "/generate", "OPTIONS", preflight).status_code == 200
    assert ask(friend, "/model_info", headers={"Origin": "http://evil.example"}).status_code == 403


def test_a_page_is_served_under_this_server_s_own_name_only():
    for host in ("127.0.0.1:30000", "localhost:30000", "[::1]:30000", "192.168.0.5"):
        assert ask(app(), "/xray", headers={"Host": host}).status_code != 403, host
    for host in ("evil.example", "localhost.evil.example:30000", "127.0.0.1.nip.io"):
        assert ask(app(), "/xray", headers={"Host": host}).status_code == 403, host
        assert ask(app(), "/model_info", headers={"Host": host}).status_code == 200, "an API has any name"
    assert ask(app(allowed_hosts=("box.lan",)), "/xray", headers={"Host": "box.lan:80"}).status_code != 403


def test_a_body_has_a_size():
    application = app(max_body_bytes=2000)

    async def in_pieces():
        for _ in range(30):
            yield b" " * 100

    for content in (b" " * 2001, in_pieces()):
        answer = ask(application, "/generate", "POST", content=content)
        assert answer.status_code == 413
        assert "--max-body-bytes" in answer.text
    assert ask(application, "/tokenize", "POST", content=b" " * 1998 + b"{}").status_code == 400, "fits; and is refused"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "give either text or input_ids"),
        (b"{", "the body"),
        (b"[1]", "the body"),
        (b'{"text": 5}', r"\$\.text"),
        (b'{"text": "a", "video_data": "x"}', "video_data"),
        (b'{"text": "a", "session_params": {"id": 1}}', r"session_params\.id"),
        (b'{"text": "\xff"}', "the body"),
        (b"[" * 100_000, "the body"),
    ],
)
def test_a_body_that_does_not_fit_says_where(body, said):
    application = app()
    manager_is_ready(application)
    answer = ask(application, "/generate", "POST", content=body)
    assert answer.status_code == 400
    assert re.search(said, answer.json()["error"]["message"])


def manager_is_ready(application):
    """Far enough for a body to be read."""
    application.state.manager.state, application.state.manager._prepare = "ready", _prepare


async def _prepare(request):
    raise RequestError(400, "give either text or input_ids")


def test_nothing_is_served_before_it_is_ready():
    application = app()
    assert ask(application, "/ready").status_code == 503
    assert ask(application, "/health").status_code == 503
    answer = ask(application, "/generate", "POST", content=b'{"text": "a"}')
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "the server is starting")


def test_unknown_paths_and_methods_are_json_errors():
    assert ask(app(), "/nowhere").json() == {"error": {"message": "Not Found"}}
    assert ask(app(), "/generate", "DELETE").json() == {"error": {"message": "Method Not Allowed"}}


def test_the_readme_s_table_is_the_table_of_the_code():
    readme = (Path(security.__file__).parent / "README.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- routes -->(.*?)<!-- /routes -->", readme, re.DOTALL).group(1)
    rows = dict(re.findall(r"^\| (\w+) \| (`.*`) \|$", table, re.MULTILINE))
    told = {path: guard for guard, paths in rows.items() for path in re.findall(r"`(.*?)`", paths)}
    assert told == ROUTES
