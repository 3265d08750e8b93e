"""The page's files, and the headers they are sent with: the same for a server and for a replay."""

from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}

# Nothing but the page's own files may be loaded, run or asked: even a prompt that got into the page as HTML could do nothing
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class File(NamedTuple):
    body: bytes
    content_type: str


# by the name asked for: nothing in a request ever becomes a path
FILES = {
    path.name: File(path.read_bytes(), TYPES[path.suffix])
    for path in sorted(FOLDER.iterdir()) if path.suffix in TYPES
}  # fmt: skip
PAGE = FILES["index.html"]
