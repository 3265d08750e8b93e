import os
import re
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from common.text import chat_template
from common.text.chat_template import TemplateRenderer
from common.text.tokenizer import Tokenizer
from tests.common.text.kinds import CHAT_TEMPLATE, byte_level, llama

CHAT = [
    {"role": "system", "content": "be <brief> & 'kind' "},
    {"role": "user", "content": " 页表是什么？"},
    {"role": "assistant", "content": "A table 😀.\n", "reasoning_content": "hm"},
    {"role": "user", "content": "more"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"a": "<é>", "b": None}}}]
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = {  # what real templates are made of
    "ChatML": CHAT_TEMPLATE,
    "system turn taken out, namespace, loop variables": (
        "{%- set ns = namespace(first=true, n=0) -%}\n{%- for m in messages %}\n"
        "    {%- if m.role == 'system' and loop.first %}{{ bos_token + '<<SYS>>' + m['content'] | trim + '<</SYS>>' }}"
        "{% else %}{% set ns.n = ns.n + 1 %}{{ loop.index0 ~ ':' ~ ns.n ~ m.content.strip() ~ eos_token }}{% endif %}\n"
        "{%- endfor %}\n{{- '[/INST]' if add_generation_prompt else '' }}"
    ),
    "tools as JSON": (
        "{% if tools %}{% for t in tools %}{{ t | tojson }}\n{{ t | tojson(indent=2) }}{% endfor %}{% endif %}"
        "{{ messages[-1].content }}"
    ),
    "break, continue, macro": (
        "{% macro turn(m) %}<{{ m.role }}>{{ m.content }}{% endmacro %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% continue %}{% endif %}{{ turn(m) }}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{% endfor %}"
    ),
    "marks for training": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}\n{% set x = m.content %}{{ x }}\n"
        "{% endgeneration %}{{ x }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    "thinking": (
        "{% for m in messages %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{{ m.reasoning_content or '' }}"
        "{% endfor %}{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>{% endif %}"
    ),
    "dict, date": "{{ dict(a=1, b=messages | length) }}{{ strftime_now('%Y') }}{{ dict.fromkeys([1, 2]) }}",
    "what is not defined": "{{ nothing }}{{ messages[0].nothing }}{{ messages[0]['nothing'] is none }}",
}
FAILS = {
    "raises, as Mistral's for a system turn": (
        "{{ raise_exception('Conversation roles must alternate\nuser/assistant/user/...') }}",
        "the chat template refuses these messages: Conversation roles must alternate user/assistant/user/...",
    ),
    "not Jinja": ("{% for m in", "the chat template is no Jinja template"),
    "not defined": ("{{ nothing.at.all }}", "the chat template fails: UndefinedError: 'nothing' is undefined"),
    "wrong types": ("{{ 1 + 'a' }}", "the chat template fails: TypeError"),
    "a way into Python": ("{{ ''.__class__.__mro__ }}", "the chat template fails: SecurityError"),
    "another": ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "the chat template fails: SecurityError"),
    "changes the messages": ("{{ messages.append(1) }}", "the chat template fails: SecurityError"),
    "calls itself": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "the chat template fails: RecursionError"),
    "is nested": ("{{" + "(" * 9999, "the chat template fails: RecursionError"),
    "writes too much": (
        "{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
        "the chat template writes more than 8,388,608 characters",
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(llama(tmp_path_factory.mktemp("llama"), chat_template=CHAT_TEMPLATE))


@pytest.fixture
def renderer():
    renderer = TemplateRenderer()
    yield renderer
    renderer.close()


# --- what a template makes


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kwargs", [{}, {"add_generation_prompt": False, "enable_thinking": False}, {"tools": TOOLS}])
def test_a_template_makes_what_transformers_makes_of_it(tokenizer, name, kwargs):
    want = tokenizer.hf.apply_chat_template(
        CHAT, chat_template=TEMPLATES[name], tokenize=False, **{"add_generation_prompt": True, **kwargs}
    )
    assert tokenizer.render_chat(CHAT, chat_template=TEMPLATES[name], **kwargs) == want


@pytest.mark.parametrize("name", ["ChatML", "system turn taken out, namespace, loop variables", "thinking"])
@pytest.mark.parametrize("last", ["the answer is ", "the answer is"])
def test_the_last_message_can_be_left_open(tokenizer, name, last):
    chat = [*CHAT, {"role": "assistant", "content": last}]
    kwargs = {"chat_template": TEMPLATES[name], "continue_final_message": True, "add_generation_prompt": False}
    want = tokenizer.hf.apply_chat_template(chat, tokenize=False, **kwargs)
    assert tokenizer.render_chat(chat, **kwargs) == want
    assert want.endswith("the answer is" if "SYS" in TEMPLATES[name] else last)


def test_a_message_cannot_be_left_open_and_a_new_turn_begun(tokenizer):
    with pytest.raises(ValueError, match="needs add_generation_prompt=False"):
        tokenizer.render_chat(CHAT, continue_final_message=True)
    with pytest.raises(ValueError, match="leaves the last message out"):
        tokenizer.render_chat(CHAT, chat_template="x", continue_final_message=True, add_generation_prompt=False)


def test_one_of_several_templates_is_chosen_by_name(tmp_path):
    several = [{"name": name, "template": f"{name}:{{{{ messages[0].content }}}}"} for name in ("default", "tool_use")]
    tokenizer = Tokenizer(byte_level(tmp_path, chat_template=several))
    chat = [{"role": "user", "content": "x"}]
    assert tokenizer.render_chat(chat) == "default:x"
    assert tokenizer.render_chat(chat, tools=TOOLS) == "tool_use:x"
    assert tokenizer.render_chat(chat, chat_template="tool_use") == "tool_use:x"


# --- what it cannot do


@pytest.mark.parametrize(("template", "reason"), FAILS.values(), ids=FAILS.keys())
def test_a_template_that_fails_is_one_line(tokenizer, template, reason):
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}") as error:
        tokenizer.encode_chat(CHAT, chat_template=template)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    assert tokenizer.render_chat(CHAT[:1]).startswith("<|im_start|>system")  # and the next one works


@pytest.mark.parametrize(
    "template", [LOOPS, "{{ 10 ** 999999 ** 2 }}", "{{ 'a' * 99999 ~ 'b' in 'a' * 999999 }}" * 9999]
)
def test_a_template_that_does_not_end_is_stopped(renderer, monkeypatch, template):
    renderer.render("x", {})
    with monkeypatch.context() as patch:
        patch.setattr(chat_template, "SECONDS", 0.5)
        with pytest.raises(ValueError, match=r"^the chat template takes more than 0.5 s$"):
            renderer.render(template, {})
    assert renderer.render("{{ a }}", {"a": 1}) == "1"


@pytest.mark.parametrize("template", [
    "{{ 'x' * 10**10 }}",
    "{{ '%09999999999d' % 1 }}",
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{{ ('a' * 10**6).replace('a', 'b' * 10**6) | length }}",
])  # fmt: skip
def test_a_template_that_eats_memory_is_stopped(renderer, monkeypatch, template):
    monkeypatch.setattr(chat_template, "BYTES", 150 << 20)
    monkeypatch.setattr(chat_template, "SECONDS", 60)
    with pytest.raises(
        ValueError, match=r"^the chat template takes more (than 150 MB of memory|memory than it may have|than 60 s)$"
    ):
        renderer.render(template, {})
    assert renderer.render("{{ a }}", {"a": 1}) == "1"


@pytest.mark.parametrize("messages", [[], "hi", None, 5, [1], [{"role": "user"}], [{"role": "user", "content": 5}]])
def test_what_is_no_conversation_is_one_line(tokenizer, messages):
    with pytest.raises(ValueError, match=r"a (conversation|message) is") as error:
        tokenizer.encode_chat(messages)
    assert "\n" not in str(error.value)


def test_values_that_are_not_plain_are_refused(tokenizer):
    for value in (object(), {1, 2}, b"x"):
        with pytest.raises(ValueError, match="must be plain values as in JSON"):
            tokenizer.encode_chat(CHAT, custom=value)
    with pytest.raises(ValueError, match="the template's `messages` are the conversation itself"):
        tokenizer.encode_chat(CHAT, messages=[])


def test_the_callers_messages_stay_as_they_are(tokenizer):
    chat = [dict(message) for message in CHAT]
    tokenizer.render_chat(chat, continue_final_message=True, add_generation_prompt=False)
    assert chat == CHAT


# --- the process


def test_threads_get_each_their_own_text(renderer):
    wrong = []

    def ask(i):
        for j in range(20):
            if renderer.render("{{ a }}", {"a": f"{i}.{j}"}) != f"{i}.{j}":
                wrong.append((i, j))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_it_is_started_again_when_it_was_killed(renderer):
    renderer.render("x", {})
    renderer._process.kill()
    renderer._process.wait()
    assert renderer.render("{{ a }}", {"a": 1}) == "1"


def test_an_interrupted_chat_leaves_no_answer_to_the_next(renderer, monkeypatch):
    renderer.render("x", {})

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(renderer._answers, "get", interrupted)
        with pytest.raises(KeyboardInterrupt):
            renderer.render("first", {})
    assert renderer.render("second", {}) == "second"


def test_no_process_is_started_without_a_chat(tmp_path):
    tokenizer = Tokenizer(byte_level(tmp_path, chat_template=CHAT_TEMPLATE))
    tokenizer.encode("the")
    assert tokenizer._renderer._process is None


def test_the_process_ends_with_its_renderer():
    renderer = TemplateRenderer()
    renderer.render("x", {})
    process = psutil.Process(renderer._process.pid)
    del renderer
    assert not process.is_running()


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_the_process_ends_with_the_program(end):
    code = (
        "from common.text.chat_template import TemplateRenderer\n"
        "renderer = TemplateRenderer()\nrenderer.render('x', {})\nprint(renderer._process.pid, flush=True)\ninput()"
    )
    program = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process = psutil.Process(int(program.stdout.readline()))
    if end == "kill":
        program.kill()
    program.communicate("\n")
    process.wait(timeout=100)


@pytest.mark.skipif(os.name == "nt", reason="no such signal on Windows")
def test_ctrl_c_is_for_the_engine(renderer):
    renderer.render("x", {})
    os.kill(renderer._process.pid, signal.SIGINT)
    time.sleep(0.1)
    assert renderer.render("y", {}) == "y"
