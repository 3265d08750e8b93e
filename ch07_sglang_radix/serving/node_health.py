"""GET /health on the nodes above 0, which answer nothing else: 200 from when they are ready until they leave.

For who looks at every host alike, as Kubernetes does. What a node does not survive ends its process (node_main.py), so that
it answers says all there is to say. SGLang 0.5.23: launch_dummy_health_check_server (srt/entrypoints/engine.py).
"""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from ch07_sglang_radix.serving.http_args import bind
from ch07_sglang_radix.serving.logs import log

ROUTES = ("/health", "/health_generate", "/ready")


class _Handler(BaseHTTPRequestHandler):
    timeout = 5.0  # seconds for a request to come: nobody holds a thread

    def do_GET(self) -> None:
        there = self.path.partition("?")[0] in ROUTES
        body = (
            b'{"status": "following node 0"}' if there else b'{"error": {"message": "node 0 answers; here is /health"}}'
        )
        self.send_response(200 if there else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """A probe every few seconds is no news."""


def answer_health(host: str, port: int) -> ThreadingHTTPServer | None:
    """In a thread that ends with the process; close it with `shutdown`. None, and a line, where the port is taken: by node 0,
    on the same host."""
    try:
        bound = bind(host, port)
    except ValueError as error:
        log.info("no health route on this node: %s", error)
        return None
    server = ThreadingHTTPServer((host, port), _Handler, bind_and_activate=False)
    server.socket.close()
    server.socket, server.daemon_threads = bound, True
    threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
    return server
