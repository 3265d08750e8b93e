"""Flags: SGLang's names, one line for what is not here."""

import subprocess
import sys

import pytest

from ch07_sglang_radix.serving.http_args import HttpArgs, parse_args


def test_flags_have_sglang_s_names():
    flags = (
        "--model-path m --tp-size 2 --host 0.0.0.0 --port 0 --mem-fraction-static 0.5 --schedule-policy lpm "
        "--max-running-requests 7 --chunked-prefill-size -1 --disable-radix-cache --api-key k --max-queued-requests 3 "
        "--served-model-name name --random-seed 5 --cors-allow-origins http://a http://b"
    )
    args = parse_args(flags.split())
    engine = args.engine
    assert (engine.model_path, engine.tp_size, engine.mem_fraction_static, engine.schedule_policy) == (
        "m",
        2,
        0.5,
        "lpm",
    )
    assert (engine.max_running_requests, engine.chunked_prefill_size, engine.disable_radix_cache) == (7, -1, True)
    assert (args.host, args.port, args.api_key, args.max_queued_requests) == ("0.0.0.0", 0, "k", 3)
    assert (args.served_model_name, engine.random_seed) == ("name", 5)
    assert args.cors_allow_origins == ("http://a", "http://b")


def test_the_defaults_are_sglang_s():
    args = parse_args([])
    assert (args.host, args.port, args.engine.log_level, args.watchdog_timeout) == ("127.0.0.1", 30000, "info", 300.0)
    assert args.cors_allow_origins == (), "but for this one: see security.py"


@pytest.mark.parametrize("alias", ["--model", "--model-path"])
def test_a_model_has_two_names(alias):
    assert parse_args([alias, "x"]).engine.model_path == "x"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--pp-size", "2"], r"flag --pp-size is not here: .*tp_size"),
        (["--speculative-algorithm=EAGLE"], "flag --speculative-algorithm is not here: "),
        (["--trust-remote-code"], "never run here"),
        (["--nnodes", "2"], "one host here"),
        (["--temprature", "1"], "unknown flag '--temprature'; "),
        (["stray"], "'stray' belongs to no flag"),
        (["--port", "70000"], "port=70000 must be at most 65535"),
        (["--tp-size", "0"], "tp_size=0"),
        (["--max-queued-requests", "0"], "max_queued_requests=0"),
        (["--drain-timeout", "-1"], "drain_timeout"),
        (["--log-format", "xml"], "log_format='xml' is unknown; use text or json"),
        (["--api-key", ""], "api_key: an empty text"),
        (["--tool-call-parser", "llama3"], "tool_call_parser='llama3' is unknown; use qwen or qwen25"),
        (
            ["--reasoning-parser", "kimi"],
            "reasoning_parser='kimi' is unknown; use qwen3, qwen3-thinking or deepseek-r1",
        ),
        (["--chat-template", "chatml"], "chat_template='chatml' cannot be read: .*; give a file in Jinja"),
        (["--skip-tokenizer-init", "--chat-template", "{}"], "chat_template is about text"),
        (["--skip-tokenizer-init", "--reasoning-parser", "qwen3"], "reasoning_parser is about text"),
        (["--grammar-backend", "xgrammar"], "llguidance is the only one here"),
    ],
)
def test_what_is_not_here_is_one_line(flags, said):
    with pytest.raises(ValueError, match=said) as error:
        parse_args(flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags", [["--pp-size", "2"], ["--schedule-policy", "lmp"], ["--port", "no"], ["--help"]])
def test_flags_are_read_before_anything_that_takes_seconds_is_imported(flags):
    """So a bad one is told at once."""
    code = (
        "import sys; from ch07_sglang_radix.launch_server import main\n"
        "import os; os._exit = lambda code: None\n"
        f"sys.argv[1:] = {flags}\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "slow = {'torch', 'transformers', 'uvicorn', 'fastapi'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "launch_server" in done.stdout or "error: " in done.stderr, "it was refused, or helped"


def test_secrets_are_not_shown():
    shown = str(HttpArgs(api_key="topsecret", admin_api_key="evenmore").shown())
    assert "topsecret" not in shown
    assert "evenmore" not in shown
