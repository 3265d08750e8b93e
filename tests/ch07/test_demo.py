"""The book's command as a reader types it, and what it says to bad input: one line, exit code 1, nobody left behind."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ch07_sglang_radix import demo_tp_radix
from ch07_sglang_radix.serving.watch import wait_until
from common import parallel_state
from common.distributed.cost_model import wire_bytes
from common.tiny_qwen import TINY_QWEN_PATH
from tests import warm
from tests.oracle import greedy

ROOT = Path(__file__).parents[2]
DEMO = "ch07_sglang_radix/demo_tp_radix.py"
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0", "PYTHONUNBUFFERED": "1"}


def command(*argv):
    """(exit code, output, errors) of `python *argv`, a process of its own."""
    done = subprocess.run(
        [sys.executable, *map(str, argv)], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=200, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def start(tmp_path):
    """start(flags, size) -> the demo's ranks, as torchrun starts them."""
    return lambda *args, size=2: warm.Torchrun([DEMO, *map(str, args)], size, ROOT, ENV, tmp_path)


@pytest.fixture
def torchrun(start):
    """torchrun(flags, size) -> (exit code, output, errors)."""
    return lambda *args, size=2: start(*args, size=size).finish(200)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "report.json"
    code, out, err = command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", DEMO, "--json", path)
    assert code == 0, err
    return out, json.loads(path.read_text())


def test_the_report_says_what_was_asked_for(demo):
    _, report = demo
    assert report["world_size"] == 2
    assert report["page_size"] == 16
    assert report["invariants_ok"] is True
    assert len(report["requests"]) >= 8
    assert set(report["requests"][0]) == {
        "prompt", "prompt_ids", "text", "output_ids", "prompt_tokens", "cached_tokens"
    }  # fmt: skip
    assert set(report["comm"]) == {"all_reduce", "gather", "broadcast"}
    assert report["steps"]["prefill"] > 1


def test_the_answers_are_transformers_greedy_answers(demo):
    for request in demo[1]["requests"]:
        expected = greedy(TINY_QWEN_PATH, request["prompt_ids"], len(request["output_ids"]))
        assert request["output_ids"] == expected, request["prompt"]


def test_the_answers_are_the_glossary_s(demo):
    glossary = [json.loads(line) for line in (TINY_QWEN_PATH / "glossary.jsonl").read_text("utf-8").splitlines()]
    definitions = {entry[key] for entry in glossary for key in ("en_def", "zh_def")}
    known = [request["text"] in definitions for request in demo[1]["requests"]]
    assert sum(known) >= len(known) - 1


def test_repeat_and_follow_up_hit_and_the_hit_rate_is_their_sum(demo):
    _, report = demo
    requests = report["requests"]
    first = requests[0]
    repeat = next(r for r in requests[1:] if r["prompt"] == first["prompt"])
    assert first["cached_tokens"] == 0
    assert repeat["cached_tokens"] == (first["prompt_tokens"] - 1) // 16 * 16
    assert requests[-1]["cached_tokens"] >= first["prompt_tokens"] // 16 * 16, "the follow-up finds its first turn"
    cached, prompt = (sum(r[key] for r in requests) for key in ("cached_tokens", "prompt_tokens"))
    assert report["hit_rate"] == pytest.approx(cached / prompt)
    assert report["hit_rate"] > 0.7


def test_the_communication_is_the_formula(demo):
    out, report = demo
    config = json.loads((TINY_QWEN_PATH / "config.json").read_text())
    steps = sum(report["steps"].values())
    per_step = 1 + 2 * config["num_hidden_layers"]
    prompts = sum(r["prompt_tokens"] - r["cached_tokens"] for r in report["requests"])
    fed_in = prompts + sum(len(r["output_ids"]) - 1 for r in report["requests"])
    assert report["comm"]["all_reduce"] == {
        "calls": per_step * steps,
        "bytes": per_step * fed_in * config["hidden_size"] * 4,
    }
    sampled = sum(len(r["output_ids"]) for r in report["requests"])
    assert report["comm"]["gather"] == {"calls": steps, "bytes": sampled * -(-config["vocab_size"] // 2) * 4}
    assert out.count("as the formula says") == 2


def test_wire_bytes_stand_beside_tensor_bytes(demo):
    out, report = demo
    for op, said in report["comm"].items():
        (line,) = [line for line in out.splitlines() if line.startswith(f"  {op} ")]
        assert f" {said['bytes']:,} bytes " in line
        assert f" {wire_bytes(op, said['bytes'], 2):,} on the wire" in line


def test_the_readme_shows_this_output(demo):
    block = re.search(r"<!-- demo -->\n```\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL).group(1)
    shown = [line for line in block.splitlines() if line.strip() not in ("", "...")]
    assert len(shown) > 15
    printed = demo[0].splitlines()
    assert [line for line in shown if line not in printed] == []


@pytest.mark.parametrize("size", [2, 4])
def test_two_stages_give_the_same_answers_and_say_what_the_formula_says(size, tmp_path, torchrun):
    path = tmp_path / "report.json"
    code, out, err = torchrun("--pp-size", 2, "--json", path, "--max-new-tokens", 20, size=size)
    assert code == 0, err
    report = json.loads(path.read_text())
    assert (report["world_size"], report["invariants_ok"]) == (size, True)
    for request in report["requests"]:
        expected = greedy(TINY_QWEN_PATH, request["prompt_ids"], len(request["output_ids"]))
        assert request["output_ids"] == expected, request["prompt"]
    assert set(report["comm"]) == {"send", "receive", "broadcast"} | ({"all_reduce"} if size == 4 else set())
    assert report["comm"]["send"] == report["comm"]["receive"]
    assert out.count("as the formula says") == (5 if size == 4 else 4)
    assert "NOT the formula" not in out


SPREAD = {  # flags that spread a step's rows over ranks, and all kinds of message that there are then
    ("--attn-dp-size", "2"): {"all_gather", "reduce_scatter", "all_to_all", "broadcast", "gather"},
    ("--cp-size", "2"): {"exchange", "all_gather", "reduce_scatter", "all_to_all", "all_reduce", "broadcast", "gather"},
    ("--enable-layernorm-sp",): {"all_gather", "reduce_scatter", "all_to_all", "broadcast", "gather"},
}


def write_reports(path: Path) -> None:
    """On each rank of a pool the demo itself, once for each of SPREAD; rank 0 writes."""
    before = parallel_state._state
    for i, flags in enumerate(SPREAD):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [DEMO, *flags, "--json", f"{path}{i}", "--max-new-tokens", "6", "--force-cpu"])
            demo_tp_radix.main()
        parallel_state._state = before


@pytest.mark.parametrize("size", [2, 4])
def test_every_way_to_spread_rows_has_the_same_report(size, ranks, tmp_path):
    ranks(size).run(write_reports, tmp_path / "report")
    told = [json.loads((tmp_path / f"report{i}").read_text("utf-8")) for i in range(len(SPREAD))]
    questions = [question for _, question in demo_tp_radix.QUESTIONS]
    for kinds, report in zip(SPREAD.values(), told, strict=True):
        assert (report["world_size"], report["invariants_ok"]) == (size, True)
        prompts = [request["prompt"] for request in report["requests"]]
        assert sorted(prompts) == sorted([*questions, demo_tp_radix.FOLLOW_UP])
        assert [prompt for prompt in prompts if prompt != demo_tp_radix.FOLLOW_UP] == questions, "in their order"
        for request in report["requests"]:
            assert request["output_ids"] == greedy(TINY_QWEN_PATH, request["prompt_ids"], 6), request["prompt"]
        assert set(report["comm"]) == kinds
        assert report["hit_rate"] > 0.5
        assert all(said["calls"] > 0 for said in report["comm"].values())


def test_own_prompts_one_a_line_and_one_rank(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is a page?\n什么是控制面？\n", encoding="utf-8")
    report = tmp_path / "report.json"
    flags = ["--page-size", "1", "--max-new-tokens", "9", "--temperature", "0.8"]
    done = warm.run([DEMO, "--prompts-file", str(prompts), "--json", str(report), *flags], ROOT, env=ENV)
    assert done.returncode == 0, done.stderr
    said = json.loads(report.read_text())
    assert [r["prompt"] for r in said["requests"]] == ["What is a page?", "什么是控制面？"]
    assert said["world_size"] == 1
    assert said["comm"] == {}
    assert "conservation" in done.stdout


@pytest.fixture
def refused(monkeypatch, capfd):
    """The demo in this process, which says nothing itself: what it raises is the line that a process of its own ends with."""

    def refused(*args) -> str:
        monkeypatch.setattr(sys, "argv", [DEMO, *map(str, args)])
        with pytest.raises((ValueError, OSError)) as info:
            demo_tp_radix.main()
        assert capfd.readouterr().err == ""
        return str(info.value)

    return refused


def broken_model(tmp_path, change):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in TINY_QWEN_PATH.iterdir():
        if path.suffix in (".json", ".safetensors", ".jinja"):
            (folder / path.name).write_bytes(path.read_bytes())
    change(folder)
    return folder


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def set_config(**values):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate, "model.safetensors .* is truncated or damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"holds no \*.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (
            set_config(architectures=["GPT2LMHeadModel"]),
            "architecture GPT2LMHeadModel is not supported; supported: Qwen2",
        ),
        (lambda folder: [p.unlink() for p in folder.glob("tokenizer*")], "has no tokenizer files"),
        (set_config(num_hidden_layers=5, layer_types=None), r"missing: model\.layers\.4\."),
        (set_config(num_hidden_layers=3, layer_types=None), r"unexpected: model\.layers\.3\."),
        (set_config(intermediate_size=100), r"of wrong shape: .*gate_proj.weight is \[\d+, 224\], not \[100, 224\]"),
    ],
)
def test_a_broken_model_is_one_line(tmp_path, change, message, refused):
    line = refused("--model-name", broken_model(tmp_path, change))
    assert len(line.splitlines()) == 1, line
    assert re.search(message, line)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--page-size", 0], "page_size=0 must be at least 1"),
        (["--pp-size", 2], "pp_size=2 x dp_size=1 = 2 ranks, but 1 process"),
        (["--max-new-tokens", 5000], r"= \d+ tokens, but the model ends at 2048"),
        (["--max-new-tokens", 0], "max_new_tokens=0 must be at least 1"),
        (["--dtype", "int8"], "dtype='int8' is unknown; use auto, float32, bfloat16, float16"),
        (["--model-name", "./not-there"], "is no folder and no Hub id"),
        (["--prompts-file", "not-there.txt"], "not-there.txt"),
        (["--json", "no/such/folder/x.json"], "no/such/folder/x.json"),
    ],
)
def test_a_bad_flag_is_one_line(args, message, refused):
    line = refused(*args)
    assert len(line.splitlines()) == 1, line
    assert re.search(message, line)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--temperature", -1], r"temperature=-1.0 must be in \[0, 1000\]"),
        (["--model-name", "nobody/nothing-here"], "no local folder, .* the Hub did not give it"),  # and it was asked
    ],
)
def test_a_process_says_nothing_but_this_line_and_exits_with_1(args, message):
    code, _, err = command(DEMO, *args)
    assert code == 1
    assert len(err.strip().splitlines()) == 1, err
    assert re.search(f"^error: .*{message}", err)


def test_an_empty_line_among_the_prompts_is_named(tmp_path, refused):
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\nthree\n")
    assert f"line 2 of {path} is empty" in refused("--prompts-file", path)


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--temperature", -1], "error: temperature=-1.0 must be"),
        (["--max-new-tokens", 5000], "error: prompt 187 + max_new_tokens 5000"),  # found by rank 0 alone
    ],
)
def test_two_ranks_say_it_once(args, line, torchrun):
    code, _, err = torchrun(*args)
    assert code != 0
    assert err.count(line) == 1
    assert err.count("error: ") == 1


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_and_is_named(victim, tmp_path, start):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Tell me everything.\n" * 400)
    both = start("--prompts-file", prompts, "--max-new-tokens", 900)
    assert wait_until(lambda: "prefill" in both.printed()[0], 200), "until they are in the middle of it"
    dead, other = both.ranks[victim], both.ranks[1 - victim]
    dead.kill()
    assert other.wait(200) != 0, "by itself: nobody has told it to"
    _, _, err = both.finish(200)
    assert re.search(rf"error: rank {1 - victim}.* rank {victim} \(pid {dead.pid}\) has died", err), err


def test_two_replicas_answer_what_one_does_and_each_its_share(demo, tmp_path, torchrun):
    """round_robin: #0, #2, ... and the second turn of #0 in one, #1, #3, ... in the other."""
    code, out, err = torchrun("--dp-size", 2, "--json", tmp_path / "report.json")
    assert code == 0, err
    report = json.loads((tmp_path / "report.json").read_text())
    answers = [(request["prompt"], request["output_ids"]) for request in report["requests"]]
    assert sorted(answers) == sorted((request["prompt"], request["output_ids"]) for request in demo[1]["requests"])
    assert [prompt for prompt, _ in answers[-2:]] == ["Define retraction.", "Say that in Chinese."], "in their order"
    assert (report["world_size"], report["invariants_ok"]) == (2, True)
    assert report["requests"][0]["cached_tokens"] == report["requests"][1]["cached_tokens"] == 0, (
        "each has a tree of its own"
    )
    assert report["requests"][-1]["cached_tokens"] > report["requests"][0]["prompt_tokens"], (
        "the follow-up found its past"
    )
    assert set(report["comm"]) == {"all_gather"}, "replicas of one rank each say nothing but their answers"
    assert "replica 0: 6 requests" in out
    assert "replica 1: 4 requests" in out


def test_two_replicas_of_two_ranks_torchrun_s_four(demo, tmp_path, torchrun):
    code, out, err = torchrun("--dp-size", 2, "--json", tmp_path / "report.json", size=4)
    assert code == 0, err
    report = json.loads((tmp_path / "report.json").read_text())
    answers = sorted((request["prompt"], request["output_ids"]) for request in report["requests"])
    assert answers == sorted((request["prompt"], request["output_ids"]) for request in demo[1]["requests"])
    assert set(report["comm"]) == {"all_reduce", "gather", "broadcast", "all_gather"}
    assert out.count("as the formula says") == 2, "of rank 0's replica"
