"""The benchmark of two engines, as far as it goes without starting any: whom it starts, what it counts, what it draws."""

import pytest
import torch

from ch07_sglang_radix.benchmarks import bench_disaggregation as bench
from ch07_sglang_radix.benchmarks.disaggregation_report import readme_table
from ch07_sglang_radix.disaggregation.cost_model import Times
from ch07_sglang_radix.disaggregation.lb_args import parse_args as parse_balancer
from ch07_sglang_radix.server_args import TRANSFER_BACKENDS, ServerArgs
from ch07_sglang_radix.serving.http_args import parse_args as parse_server
from common.teaching.report import write_csv


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_server_takes_the_flags_it_is_started_with(device):
    args = bench.parse_args(["--device", device, "--model-path", "folder"])
    for who in ("chunked", "replicas", "prefill", "decode"):
        engine = parse_server(bench.flags_of(args, who)).engine
        assert isinstance(engine, ServerArgs)
        assert (engine.device, engine.chunked_prefill_size, engine.skip_tokenizer_init) == (device, args.chunk, True)
        if who in ("prefill", "decode"):
            assert engine.disaggregation_mode == who
            assert engine.disaggregation_transfer_backend == args.transfer_backend in TRANSFER_BACKENDS
        elif device == "cuda":
            assert engine.tp_size if who == "chunked" else engine.dp_size == 2
    assert parse_balancer(["--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:2"])


def test_a_flag_beats_the_device_s_default():
    assert bench.parse_args(["--device", "cuda"]).prompts == [2048, 8192]
    assert bench.parse_args(["--device", "cuda", "--prompts", "9"]).prompts == [9]
    assert bench.parse_args([]).transfer_backend == "tcp"


def test_each_half_gets_one_of_the_cards_that_are_seen(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert bench._visible() == ["4", "7"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert bench._visible() == ["0", "1"]


def test_without_two_gpus_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("sys.argv", ["bench_disaggregation", "--device", "cuda"])
    with pytest.raises(ValueError, match="and there are 1; use --device cpu"):
        bench.main()


def test_rounds_become_a_row_and_rows_a_figure_and_a_table(tmp_path):
    args = bench.parse_args(["--device", "cuda", "--model-path", "Qwen2.5-7B", "--window", "1.2", "--chunk", "200"])
    rounds = [([0.010] * 99 + [0.5], [0.2, 0.4]), ([0.010] * 100, [0.3, 0.9])]
    alone = Times(200, chunk_s=0.5, step_s=0.01)
    rows = [
        bench.row_of(args, name, prompt, every, rounds, alone)
        for every in (1.2, 0.4) for prompt in (100, 400) for name in bench.CONTENDERS
    ]  # fmt: skip
    told = rows[0]
    assert (told["itl_median_ms"], told["itl_p99_lowest_ms"], told["itl_p99_highest_ms"]) == (10, 10, 500)
    assert (told["ttft_median_ms"], told["ttft_p99_ms"], told["rounds"], told["gaps"]) == (350, 900, 2, 200)
    assert (told["itl_alone_ms"], told["ttft_alone_ms"]) == (10, 500)
    last = rows[9:]  # three prompts of 400, one every 0.4 s; of two engines each gets every other one
    assert [row["itl_p99_model_ms"] for row in last] == [510, 510, 10]
    assert [row["ttft_model_ms"] for row in last] == [1010 + 620, 1010 + 110, 1000 + 600]
    write_csv(rows, tmp_path / "disaggregation_gpu.csv")
    bench.draw_it("disaggregation_gpu", tmp_path)
    assert "Qwen2.5-7B" in (tmp_path / "disaggregation_gpu.svg").read_text(encoding="utf-8")
    table = readme_table([{name: str(value) for name, value in row.items()} for row in rows]).splitlines()
    assert len(table) == 2 + len(rows)
    assert table[3].startswith(
        "| replicas | 100 | 1.20 | 10.00 | 10.00 (10.00 to 500.00) | 10.00 | 500.00 | 350.00 | 500.00 |"
    )


@pytest.mark.parametrize(("every", "count"), [(0.4, 8), (1.6, 2), (9.0, 1)])
def test_a_round_lasts_as_long_at_every_rate(every, count):
    assert bench.prompts_of(bench.parse_args([]), every) == count
