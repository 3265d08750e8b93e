"""The planner's command."""

import json
import subprocess
import sys

import pytest

from common.distributed import plan

ASKED = {"--model": "Qwen2.5-7B", "--gpus": "4", "--context": "4096", "--batch": "16"}


def run(monkeypatch, capsys, **changes) -> str:
    given = ASKED | {f"--{name.replace('_', '-')}": str(value) for name, value in changes.items()}
    monkeypatch.setattr(sys, "argv", ["plan", *(word for pair in given.items() for word in pair)])
    plan.main()
    return capsys.readouterr().out


def test_a_table_and_a_paragraph(monkeypatch, capsys, tmp_path):
    out = run(monkeypatch, capsys, json=tmp_path / "plan.json")
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["why"] in " ".join(out.split())
    names = [layout["layout"] for layout in found["layouts"]]
    assert [line.strip().startswith(name) for line, name in zip(out.splitlines()[2:], names, strict=False)] == [
        True
    ] * len(names)
    assert {"tp4", "pp4", "dp4", "tp2 x pp2", "tp4, sp", "tp4 (attn_dp4)", "tp4 (cp2)"} <= set(names)
    assert found["why"].startswith(f"Take {names[0]}:")


def test_memory_of_a_gpu_and_hosts_can_be_said(monkeypatch, capsys):
    out = run(monkeypatch, capsys, gpu_memory="40GB", mem_fraction="0.5", gpus_per_host="2")
    assert "on 2 hosts" in out
    assert "20.0 GB a rank to plan with" in out


def test_codes_of_weights_and_pages_are_planned_and_said(monkeypatch, capsys, tmp_path):
    plain = run(monkeypatch, capsys, gpus=1)
    coded = run(monkeypatch, capsys, gpus=1, quantization="awq", kv_cache_dtype="int4")
    assert "Qwen2.5-7B, bfloat16, 1 x H100" in plain
    assert "Qwen2.5-7B, bfloat16, weights awq, pages int4, 1 x H100" in coded
    with pytest.raises(ValueError, match="is quantized with awq; leave the argument out"):
        plan.quantized(plan.quantized(plan.model_shape("Qwen2.5-7B"), "awq", "here"), "gptq", "here")


@pytest.mark.parametrize(("text", "size"), [("80GB", 80 * 10**9), ("1.5 GiB", 3 << 29), ("7", 7), ("2tb", 2 * 10**12)])
def test_a_size_is_read(text, size):
    assert plan.bytes_of(text) == size


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpus": 0}, "--gpus 0 must be at least 1"),
        ({"gpus": 10**9}, "--gpus 1000000000: at most 1024 are planned"),
        ({"batch": -1}, "--batch -1 must be at least 1"),
        ({"context": 40_000}, "Qwen2.5-7B has positions for 32768 tokens"),
        ({"model": "Qwen2.5-8B"}, "'Qwen2.5-8B' is unknown; use Qwen2.5-7B"),
        ({"model": "openai/gpt-oss-20b"}, "model=openai/gpt-oss-20b: its attention is not here; use one of"),
        ({"gpu": "H1"}, "gpu='H1' is unknown"),
        ({"gpu_memory": "many"}, "--gpu-memory 'many'"),
        ({"gpu_memory": "0GB"}, "--gpu-memory '0GB'"),
        ({"mem_fraction": 2}, "--mem-fraction 2.0"),
        ({"json": "nowhere/plan.json"}, "--json='nowhere/plan.json' must be a file in a folder that exists"),
        ({"gpus": 1, "gpu_memory": "10GB"}, "does not fit into 1 x 9.0 GB: tp1 comes nearest with 20.0 GB a rank; 3 would do"),
        ({"machine": "nowhere.json"}, "nowhere.json: no such file"),
        ({"gpu": "L4", "interconnect": "nvlink"}, "an L4 has no NVLink"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(monkeypatch, capsys, changes, words):
    with pytest.raises((ValueError, OSError)) as error:
        run(monkeypatch, capsys, **changes)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command_ends_in_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "common.distributed.plan", *(word for pair in (ASKED | {"--gpus": "0"}).items() for word in pair)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: --gpus 0 must be at least 1\n")
