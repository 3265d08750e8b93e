"""The process that renders chat templates (started by chat_template.py): a line of JSON in, a line of JSON out.

Imports nothing but jinja2, so that it is there in a tenth of a second and stays small. What a template finds here is what
transformers 5.23 gives it (`utils/chat_template_utils.py`): Jinja's immutable sandbox and the same few functions.
"""

import json
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common.bounded.answer_lines import answer_lines

MOST_CHARACTERS = 8 << 20  # of a rendered chat: more tokens than any model reads


class Refused(jinja2.TemplateError):
    """The template called raise_exception: it does not want these messages."""


class _Generation(Extension):
    """{% generation %}...{% endgeneration %}: marks the assistant's words for training; here it is what is inside."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 asks for a set)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """namespace(a=1), without names that lead into Python's own."""

    def __init__(*args, **kwargs):
        self, *given = args
        names = dict(*given, **kwargs)
        for name in names:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: str) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no name {name!r}: names begin with a letter")


class _Dict:
    """dict(a=1) and dict.fromkeys, and nothing else of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> None:
    raise Refused(message)


def _tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Jinja's own writes <, > and & as for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=8)
def compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


def render(template: str, variables: dict[str, Any]) -> dict[str, str]:
    """{"text": what the template makes of the variables} or {"error": why it makes nothing, in one line}."""
    try:
        pieces, size = [], 0
        for piece in compiled(template).generate(variables):
            pieces.append(piece)
            size += len(piece)
            if size > MOST_CHARACTERS:
                return {"error": f"the chat template writes more than {MOST_CHARACTERS:,} characters"}
        return {"text": "".join(pieces)}
    except Refused as error:
        return {"error": f"the chat template refuses these messages: {_line(str(error))}"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"the chat template is no Jinja template: {_line(str(error.message))} (line {error.lineno})"}
    except MemoryError:
        return {"error": "the chat template takes more memory than it may have"}
    except Exception as error:  # it is a program: it can raise anything
        return {"error": f"the chat template fails: {type(error).__name__}: {_line(str(error))}"}


def _line(text: str) -> str:
    return " ".join(text.split())[:300]


def serve() -> None:
    """Until nobody writes any more."""
    answer_lines(render)
