"""Messages -> the text that a model was trained to see, by the checkpoint's own template, bounded in time and memory.

A chat template is a program from a stranger. Jinja's sandbox keeps it away from files and from Python, but a loop over
range(100000) inside another, a macro that calls itself twice, or 'x' * 10**10 never comes back, and a thread cannot be
ended from outside. So a small process renders (template_process.py); it is killed when it takes too long or too much.
"""

import json
from collections.abc import Mapping
from typing import Any

from common.bounded.process import BoundedProcess

SECONDS = 5.0  # for one chat; the largest real template takes some milliseconds
BYTES = 512 << 20  # of memory; it needs about 25 MB


class TemplateRenderer(BoundedProcess):
    """Renders any number of chats, one at a time, in a process that is started with the first and ends with this one."""

    def __init__(self):
        super().__init__("common.text.template_process", "the chat template", "renders it")

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """Raises ValueError, in one line, for a template that fails, refuses, is none, or takes too long or too much."""
        try:
            line = json.dumps({"template": template, "variables": variables}).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"messages and their parameters must be plain values as in JSON: {error}") from None
        return self._answer(line, SECONDS, BYTES)["text"]
