"""A process of our own for what may never come back (more in common/text/test_chat_template.py)."""

import json

import pytest

from common.bounded.process import BoundedProcess

MEMORY = 512 << 20


class Echo(BoundedProcess):
    def __init__(self):
        super().__init__("tests.common.bounded.echo", "the echo", "echoes it")

    def ask(self, seconds=20.0, **request):
        return self._answer(json.dumps(request).encode() + b"\n", seconds, MEMORY)

    def _first_lines(self):
        return [b'{"say": "one"}\n', b'{"say": "two"}\n']


@pytest.fixture
def echo():
    echo = Echo()
    yield echo
    echo.close()


def test_it_is_told_the_first_lines_before_all_others_whenever_it_is_started(echo):
    first = echo.ask(say="three")
    assert first["told"] == ["one", "two", "three"]
    again = echo.ask(say="four")
    assert again == {"told": ["one", "two", "three", "four"], "pid": first["pid"]}
    with pytest.raises(ValueError, match=r"^the echo ended the process that echoes it$"):
        echo.ask(end=True)
    restarted = echo.ask(say="five")
    assert restarted["told"] == ["one", "two", "five"]
    assert restarted["pid"] != first["pid"]


def test_an_error_is_a_value_error_and_the_process_stays(echo):
    before = echo.ask()["pid"]
    with pytest.raises(ValueError, match=r"^not this$"):
        echo.ask(error="not this")
    assert echo.ask()["pid"] == before


def test_what_comes_too_late_is_no_answer_to_the_next(echo):
    echo.ask()
    with pytest.raises(ValueError, match=r"^the echo takes more than 0.2 s$"):
        echo.ask(seconds=0.2, sleep=5.0, say="late")
    assert echo.ask(say="next")["told"] == ["one", "two", "next"]
