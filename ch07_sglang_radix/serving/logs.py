"""What the server says while it runs: a line of text or of JSON each, with the request's id, and never a word of a prompt.

The text of requests is nobody's business at level info; counts, times and reasons are.
"""

import json
import logging
import sys
import time
from typing import Any

NAME = "ch07_sglang_radix.serving"


class _Log:
    """The one logger of the wing, with the lines that it knows by heart."""

    def __init__(self):
        self._logger = logging.getLogger(NAME)
        self.info, self.warning, self.error = self._logger.info, self._logger.warning, self._logger.error

    def request_ended(self, one: Any) -> None:
        """one: an InFlight. Its module brings the engine, and a router that logs has none."""
        if not self._logger.isEnabledFor(logging.INFO):
            return
        how = one.finish_reason["type"] if one.finish_reason else "client gone"
        seconds = time.monotonic() - one.started
        prompt = len(one.call.requests[one.index].ids)
        self._logger.info(
            "%s after %.3f s: %d prompt tokens, %d of them cached, %d new ones", how, seconds, prompt, one.cached_tokens,
            len(one.output_ids), extra={"rid": one.rid},
        )  # fmt: skip


log = _Log()


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        rid = getattr(record, "rid", None)
        name = f" [{rid}]" if rid else ""
        when = time.strftime("%H:%M:%S", time.localtime(record.created))
        return f"{when} {record.levelname.lower()} {record.process_said}{name}: {record.getMessage()}"


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": round(record.created, 3), "level": record.levelname.lower(), "process": record.process_said,
            "rid": getattr(record, "rid", None), "message": record.getMessage(),
        }  # fmt: skip
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def set_up_logging(process: str, level: str, form: str) -> None:
    """Lines of this process go to standard error; `process` is its name in each of them."""

    def name_it(record: logging.LogRecord) -> bool:
        record.process_said = process
        return True

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    handler.addFilter(name_it)
    for name in ("ch07_sglang_radix", "common", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper() if name != "uvicorn.error" else "WARNING")
