"""Where the decode side asks who computes prompts: GET /route of the prefill side's bootstrap server.

    {"version": 4, "engine": "3f2a...", "model": ..., "page_size": 16, "kv_cache_dtype": "float32", "ranks": 2, "addresses": [...]}

The answer is compared with what the asking engine is: pages of another size, dtype or model would be read as numbers that mean
nothing, so they are refused here, by name and with both numbers, before any page is reserved. SGLang's ranks each register by PUT
/route (0.5.23, srt/disaggregation/common/conn.py, CommonKVBootstrapServer); here rank 0 knows them all before it listens.
"""

import json
import threading
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HOST = "127.0.0.1"
ASK_S = 5.0
MAX_ROUTE = 1 << 20  # bytes of an answer
MUST_BE_EQUAL = ("version", "model", "page_size", "kv_cache_dtype", "enable_deterministic_inference", "backend")


class BootstrapServer:
    """Answers in a thread. route: what GET /route says. port: 0 is any free one. Raises ValueError if it is in use."""

    def __init__(self, route: dict[str, Any], port: int = 0):
        body = json.dumps(route).encode()

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found = self.path in ("/route", "/health")
                self.send_response(200 if found else 404)
                said = body if self.path == "/route" else b"{}"
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, *args: Any) -> None:
                pass

        try:
            self._server = ThreadingHTTPServer((HOST, port), Answer)
        except OSError as error:
            raise ValueError(
                f"disaggregation_bootstrap_port={port} cannot be served: {error.strerror or error}; another one, or 0 for any"
            ) from None
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="bootstrap", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def ask_route(host: str, port: int) -> dict[str, Any]:
    """Raises ValueError, in one line, if nobody answers or the answer is no route."""
    connection = HTTPConnection(host, port, timeout=ASK_S)
    try:
        connection.request("GET", "/route")
        answer = connection.getresponse()
        raw = answer.read(MAX_ROUTE)
        if answer.status != 200:
            raise ValueError(f"status {answer.status}")
        route = json.loads(raw)
        if not isinstance(route, dict) or not isinstance(route.get("addresses"), list):
            raise ValueError("what it says is no route")
        return route
    except (OSError, HTTPException, ValueError) as error:
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"the prefill engine's bootstrap server at {host}:{port} does not answer: {said}") from None
    finally:
        connection.close()


def refuse_another(mine: dict[str, Any], route: dict[str, Any], where: str) -> None:
    """Raises ValueError, with both numbers, if these two cannot exchange pages."""
    for name in MUST_BE_EQUAL:
        if mine[name] != route.get(name):
            raise ValueError(
                f"{name} is {mine[name]} here and {route.get(name)} at the prefill engine at {where}; start both with the same"
            )
