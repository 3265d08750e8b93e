"""Flags: SGLang's names, one line for what is not here."""

import subprocess
import sys
from dataclasses import fields

import pytest

from ch07_sglang_radix.server_args import IDLE
from ch07_sglang_radix.serving.http_args import NOT_HERE, HttpArgs, parse_args


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
        (["--dcp-size", "2"], r"flag --dcp-size is not here: use cp_size="),
        (["--speculative-token-map=x.pt"], "flag --speculative-token-map is not here: "),
        (["--trust-remote-code"], "never run here"),
        (["--nnodes", "2"], "dist_init_addr=None must be HOST:PORT of node 0"),
        (["--nnodes", "2", "--node-rank", "2", "--dist-init-addr", "a:1"], "node_rank=2 must be at most 1; nnodes=2"),
        (["--dist-init-addr", "a:1"], "give nnodes and node_rank, too"),
        (
            ["--nnodes", "2", "--dp-size", "2", "--dist-init-addr", "a:1"],
            "nnodes=2 hosts are one replica, dp_size=2",
        ),
        (["--nnodes", "0"], "nnodes=0 must be at least 1"),
        (["--temprature", "1"], "unknown flag '--temprature'; "),
        (["stray"], "'stray' belongs to no flag"),
        (["--dcp-size", "1", "stray"], "'stray' belongs to no flag"),
        (["--dcp-size"], "flag --dcp-size is not here"),
        (["--pp-size", "2", "--cp-size", "2"], "pp_size=2 and cp_size=2 are not combined here"),
        (["--dp-size", "100000"], r"^dp_size=100000 would start 100000 processes; this machine takes \d+ ranks$"),
        (["--dp-size", "5000", "--tp-size", "4"], r"^dp_size=5000 x 4 ranks would start 20000 processes"),
        (["--ep", "0"], "ep_size=0 must be at least 1"),
        (["--base-gpu-id", "one"], "CUDA_VISIBLE_DEVICES"),
        (["--lora-drain-wait-threshold", "5"], "who has waited for 4 prefill steps gets a place"),
        (["--lora-paths", "a=x", "a=y"], "lora_paths has 2 adapters of the name 'a'"),
        (["--lora-paths", "a=x", "--pp-size", "2"], "enable_lora with pp_size=2"),
        (["--lora-eviction-policy", "lfu"], "lora_eviction_policy='lfu' is unknown; use lru or fifo"),
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


@pytest.mark.parametrize(
    "flags",
    [
        "--pp-size 1", "--pipeline-parallel-size=1", "--ep-size 1", "--ep=1", "--dcp-size 1",
        "--attn-dp-size 1", "--nnodes 1 --node-rank 0",
        "--base-gpu-id 0 --stream-interval 1", "--load-format auto --tokenizer-mode=auto", "--cpu-offload-gb 0",
        "--disaggregation-mode null --json-model-override-args {}",
    ],
)  # fmt: skip
def test_a_flag_that_asks_for_nothing_passes(flags):
    """Launch scripts spell SGLang's defaults out, and what there is not does what they ask for."""
    assert parse_args([*flags.split(), "--port", "0"]) == parse_args(["--port", "0"])


def test_idle_flags_are_flags_of_sglang_that_have_a_reason_here():
    assert IDLE.keys() <= NOT_HERE.keys() | {one.name for one in fields(HttpArgs)}


@pytest.mark.parametrize("flags", [["--dcp-size", "2"], ["--schedule-policy", "lmp"], ["--port", "no"], ["--help"]])
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "launch_server" in done.stdout or "error: " in done.stderr, "it was refused, or helped"


def test_secrets_are_not_shown():
    shown = str(HttpArgs(api_key="topsecret", admin_api_key="evenmore").shown())
    assert "topsecret" not in shown
    assert "evenmore" not in shown
