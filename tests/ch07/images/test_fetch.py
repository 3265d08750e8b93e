"""Pictures from the net: never from inside, never for long, never large."""

import http.server
import socket
import threading
import time

import pytest

from ch07_sglang_radix.images import fetch as module
from ch07_sglang_radix.images.fetch import fetch, is_public

BODY = b"x" * 1000


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            while True:  # a byte now and then, for ever
                try:
                    self.wfile.write(b".")
                    self.wfile.flush()
                except OSError:
                    return
                time.sleep(0.1)
            return
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        self.send_response(200 if self.path in ("/a.png", "/%E5%9B%BE%20a.png?b=%41&c=1") else 404)
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def url():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def anybody(_address: str) -> bool:
    return True


def test_a_picture_is_fetched_and_a_redirect_followed(url):
    assert fetch(f"{url}/a.png", 2000, public=anybody) == BODY
    assert fetch(f"{url}/to/{url}/a.png", 2000, public=anybody) == BODY
    assert fetch(f"{url}/to//a.png", 2000, public=anybody) == BODY


def test_an_address_as_people_write_it_is_asked_as_http_writes_it(url):
    assert fetch(f"{url}/图 a.png?b=%41&c=1", 2000, public=anybody) == BODY


def test_a_name_of_the_inside_is_not_told_where_it_leads(monkeypatch):
    monkeypatch.setattr(module.socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("10.1.2.3", 80))])
    with pytest.raises(ValueError, match=r"'wiki\.intern' leads to no address of the public net") as error:
        fetch("http://wiki.intern/a.png", 2000)
    assert "10.1.2.3" not in str(error.value)


def test_this_machine_is_not_asked(url):
    for one in (url, url.replace("127.0.0.1", "localhost")):
        with pytest.raises(ValueError, match="no address of the public net"):
            fetch(f"{one}/a.png", 2000)


def test_a_redirect_to_the_inside_is_refused_like_a_url_to_it(url):
    port = url.rpartition(":")[2]

    def public(address: str) -> bool:
        return address == "127.0.0.1"  # that is public today, and ::1 and the cloud's own are not

    with pytest.raises(ValueError, match=r"169\.254\.169\.254' leads to no address of the public net"):
        fetch(f"http://127.0.0.1:{port}/to/http://169.254.169.254/latest/meta-data", 2000, public=public)
    with pytest.raises(ValueError, match="which is no URL"):
        fetch(f"{url}/to/http://[::1", 2000, public=public)
    for elsewhere in ("file:///etc/passwd", "ftp://example.com/a"):
        with pytest.raises(ValueError, match="by http and https alone"):
            fetch(f"{url}/to/{elsewhere}", 2000, public=public)


def test_redirects_end(url):
    deep = f"{url}/a.png"
    for _ in range(5):
        deep = f"{url}/to/{deep}"
    with pytest.raises(ValueError, match="more than 3 redirects"):
        fetch(deep, 2000, public=anybody)


def test_what_is_too_large_missing_or_slow_is_one_line(url, monkeypatch):
    with pytest.raises(ValueError, match="has more than 999 bytes"):
        fetch(f"{url}/a.png", 999, public=anybody)
    with pytest.raises(ValueError, match="answers 404"):
        fetch(f"{url}/b.png", 2000, public=anybody)
    with pytest.raises(ValueError, match="takes longer than"):
        fetch(f"{url}/slow", 2000, timeout_s=0.5, public=anybody)


def test_a_name_server_that_does_not_answer_is_not_waited_for(monkeypatch):
    over, real = threading.Event(), module.socket.getaddrinfo

    def getaddrinfo(host, *place, flags=0, **more):
        if not flags & socket.AI_NUMERICHOST:
            over.wait(60)
        return real(host, *place, flags=flags, **more)

    monkeypatch.setattr(module.socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(
        ValueError, match=r"^'example\.test' cannot be fetched from: the lookup of [^\n]* takes longer than 0\.\d+ s$"
    ):
        fetch("http://example.test/a.png", 2000, timeout_s=0.3)
    over.set()


def test_the_address_that_was_looked_at_is_the_one_that_is_asked(url, monkeypatch):
    """A name that has a public address when it is looked up and another one when it is asked would lead inside."""
    asked = []

    def lookup(host, port, *_, **__):
        asked.append(host)
        return [(2, 1, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(module.socket, "getaddrinfo", lookup)
    port = url.rpartition(":")[2]
    assert fetch(f"http://example.test:{port}/a.png", 2000, public=anybody) == BODY
    assert asked.count("example.test") == 1


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True), ("2606:4700::1111", True), ("127.0.0.1", False), ("10.1.2.3", False), ("192.168.0.1", False),
        ("172.16.0.1", False), ("169.254.169.254", False), ("100.64.0.1", False), ("0.0.0.0", False), ("::1", False), ("::", False),
        ("fe80::1", False), ("fe80::1%eth0", False), ("fc00::1", False), ("::ffff:127.0.0.1", False), ("::ffff:10.0.0.1", False),
        ("2002:7f00:1::", False), ("224.0.0.1", False), ("ff02::1", False), ("255.255.255.255", False),
        ("64:ff9b::7f00:1", False), ("fec0::1", False),
    ],
)  # fmt: skip
def test_which_addresses_are_everybodys(address, public):
    assert is_public(address) is public


@pytest.mark.parametrize(
    "bad", ["http://", "http://user:word@example.com/a", "http://[::1", "http://x:99999/a", "javascript:1"]
)
def test_a_bad_url_is_one_line(bad):
    with pytest.raises(ValueError, match=r"^[^\n]*$"):
        fetch(bad, 2000, public=anybody)
