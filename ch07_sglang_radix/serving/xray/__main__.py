"""A recording on the page, without an engine: nothing but Python's own library is needed.

    python -m ch07_sglang_radix.serving.xray ch07_sglang_radix/serving/xray/recording.jsonl

prints the address to open. --port 0 (the default) takes a free one; Ctrl-C ends it.
"""

import argparse
import json
import sys
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ch07_sglang_radix.serving.xray.events import check_recording
from ch07_sglang_radix.serving.xray.page import FILES, HEADERS, PAGE, File


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recording", type=Path, help="lines of JSON, as demo_record.py and the page's Save write them")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    args = parser.parse_args()
    try:
        steps = check_recording(args.recording)
        server = ThreadingHTTPServer((args.host, args.port), partial(Replay, args.recording))
    except (OSError, ValueError, OverflowError) as error:
        sys.exit(f"error: {error}")
    host, port = server.server_address[:2]
    print(f"{args.recording.name}, {steps} steps: http://{host}:{port}/xray", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


class Replay(BaseHTTPRequestHandler):
    """The page's files and the one recording; the path of a request is looked up in a table and never opened."""

    def __init__(self, recording: Path, *args):
        self.recording = recording
        super().__init__(*args)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/":
            self.send_response(302)
            self.send_header("Location", "/xray")
            self.end_headers()
        elif found := self._find(path):
            self.send_response(200)
            for name, value in {**HEADERS, "Content-Type": found.content_type}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(found.body)))
            self.end_headers()
            self.wfile.write(found.body)
        else:
            self.send_error(404)

    def _find(self, path: str) -> File | None:
        if path == "/xray":
            return PAGE
        if path == "/xray/source":
            source = {"kind": "replay", "name": self.recording.name}
            return File(json.dumps(source).encode(), "application/json")
        if path == "/xray/recording":
            return File(self.recording.read_bytes(), "application/jsonl; charset=utf-8")
        return FILES.get(path.removeprefix("/xray/"))

    def log_message(self, *args) -> None:
        """Nothing for each request."""


if __name__ == "__main__":
    main()
