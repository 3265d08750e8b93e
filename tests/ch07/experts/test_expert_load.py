"""What is told of experts' load: by the engine, in the trace, in the metrics. One count, made once."""

import json
import logging
import os
import re
import signal

import numpy as np
import pytest

from ch07_sglang_radix import Engine
from ch07_sglang_radix.expert_load import ExpertLoad
from ch07_sglang_radix.serving import step_state
from ch07_sglang_radix.serving.channels import MemoryPipe
from ch07_sglang_radix.serving.messages import Control, Event, TokenizedGenerate
from ch07_sglang_radix.serving.metrics import Metrics
from ch07_sglang_radix.serving.scheduler_process import SchedulerProcess
from common.parallel_state import RankFailure
from common.tiny_qwen import TINY_QWEN_PATH
from common.tiny_qwen.upcycle import tiny_mixture
from tests.ch07.serving.running import ONE_PROCESS, a_server
from tests.oracle import greedy

PROMPTS, NEW = [[5, 6, 7, 8], [9] * 20, [30, 31, 32]], 12
EVERY = 5


def test_balancedness_is_that_of_each_layer_and_not_of_the_sums():
    load = ExpertLoad([0, 2], 2, 2)
    assert load.balancedness == 1.0
    load.add(np.array([[30, 10], [10, 30]]), np.array([[30, 10], [10, 30]]))
    assert load.newest.sum(0).tolist() == [40, 40]
    assert load.balancedness == pytest.approx(20 / 30)
    load.add(np.array([[0, 0], [8, 8]]), np.array([[0, 0], [8, 8]]))
    assert load.balancedness == 1.0, "a layer without rows says nothing"
    facts = load.facts()
    assert (facts["layers"], facts["rows_of_ranks"], facts["readings"]) == ([0, 2], [[30, 10], [18, 38]], 2)


def engine(**options) -> Engine:
    return Engine(
        tiny_mixture(), tp_size=2, ep_size=2, device="cpu", ep_num_redundant_experts=2, enable_eplb=True,
        eplb_rebalance_num_iterations=EVERY, check=True, **options,
    )  # fmt: skip


def test_info_trace_log_and_metrics_tell_the_same(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(step_state, "TELL_EVERY_S", 0.0)
    trace = tmp_path / "steps.jsonl"
    caplog.set_level(logging.INFO, logger="ch07_sglang_radix.experts.rebalancer")
    with engine(expert_balancedness_report_mode="both", trace=trace, log_level="info") as one:
        main, metrics = MemoryPipe(), Metrics("m", experts=True)
        told = []
        main.send = told.append
        process = SchedulerProcess(one, MemoryPipe(), main)
        assert process.obey(Control(0, "tell_steps")).error is None
        for i, ids in enumerate(PROMPTS):
            process.take(TokenizedGenerate(i, str(i), ids, {"max_new_tokens": NEW, "ignore_eos": True}, {}))
        while process.turn():
            pass
        info, fed = one.get_server_info()["experts"], one.scheduler.work["inputs"]
        layers, config = one.wrapper.config.num_layers, one.wrapper.config.mixture
        states = [message.value for message in told if isinstance(message, Event)]
    for state in states:
        metrics.step_state(state)

    def found(name, **labels):
        return metrics.registry.get_sample_value(f"sglang:{name}", {"model_name": "m"} | labels)

    lines = [json.loads(line) for line in trace.read_text(encoding="utf-8").splitlines()]
    rows = [line["experts"]["rows"] for line in lines if "experts" in line]
    by_hand = [fed * config.router.top_k] * layers
    assert (
        [sum(layer) for layer in info["rows_of_experts"]] == [sum(layer) for layer in info["rows_of_ranks"]] == by_hand
    )
    assert np.sum(rows, axis=0).tolist() == np.sum(info["rows_of_ranks"], axis=0).tolist()
    of_experts = [line["experts"]["of_experts"] for line in lines if "experts" in line]
    assert np.sum(of_experts, axis=0).tolist() == info["rows_of_experts"]
    assert sum(line["experts"]["moved"] for line in lines if "experts" in line) == info["moved"] > 0
    assert info["readings"] == len(rows) == len(lines) == found("eplb_balancedness_count")
    assert found("eplb_balancedness_sum") == pytest.approx(
        sum(line["experts"]["balancedness"] for line in lines), abs=1e-3 * len(lines)
    )
    for layer in range(layers):
        ranks = [found("eplb_gpu_physical_count_total", layer=str(layer), gpu=str(rank)) for rank in range(2)]
        experts = [
            found("expert_rows_total", layer=str(layer), expert=str(expert)) for expert in range(config.num_experts)
        ]
        assert (ranks, experts) == (info["rows_of_ranks"][layer], info["rows_of_experts"][layer])
    for number, line in enumerate(lines, 1):  # a reading is a note and a sum, a rebalancing the new placement besides
        placed = number % EVERY == 0
        assert line["ledger"]["all_reduce"][0] == 1 + 2 * layers + 1
        assert line["ledger"]["broadcast"][0] == 2 + 1 + placed, "task, tokens, note; placement"
        assert line["ledger"].get("all_to_all", [0])[0] <= layers * placed
    said = [record.getMessage() for record in caplog.records]
    assert sum("[Expert Balancedness]" in line for line in said) == len(rows)
    assert sum("experts placed anew" in line for line in said) == info["rebalanced"] == len(lines) // EVERY


def test_without_the_flags_nothing_is_read_and_no_message_sent(tmp_path):
    """A mixture that nobody watches has the messages of its layers alone."""
    trace = tmp_path / "steps.jsonl"
    with Engine(tiny_mixture(), tp_size=2, ep_size=2, device="cpu", trace=trace) as one:
        one.generate(input_ids=PROMPTS, sampling_params={"max_new_tokens": 4, "ignore_eos": True})
        assert "experts" not in one.get_server_info()
        assert one.scheduler.expert_load is None
    lines = [json.loads(line) for line in trace.read_text(encoding="utf-8").splitlines()]
    assert not any("experts" in line for line in lines)
    layers = 1 + 2 * 4
    assert {line["ledger"]["all_reduce"][0] for line in lines if line["kind"] == "decode"} == {layers}


def test_a_rank_that_dies_while_weights_move_ends_the_others_with_its_name():
    with engine() as one:
        process, move = one.scheduler.tp.spawned.processes[0], one.wrapper.move_experts

        def while_it_dies(placement) -> None:
            os.kill(process.pid, signal.SIGKILL)
            move(placement)

        one.wrapper.move_experts = while_it_dies
        with pytest.raises(RankFailure, match=rf"rank 1 \(pid {process.pid}\) has died"):
            one.generate(input_ids=PROMPTS, sampling_params={"max_new_tokens": NEW, "ignore_eos": True})


def test_the_mixture_of_equal_experts_answers_as_the_dense_model_while_they_move():
    with engine() as one:
        answers = one.generate(input_ids=PROMPTS, sampling_params={"max_new_tokens": NEW, "ignore_eos": True})
        assert one.get_server_info()["experts"]["moved"] > 0
    assert [answer["output_ids"] for answer in answers] == [greedy(TINY_QWEN_PATH, prompt, NEW) for prompt in PROMPTS]


def test_a_server_says_how_even_its_ranks_are():
    flags = (
        "--model-path", str(tiny_mixture()), "--tp-size", "2", "--ep-size", "2", "--enable-eplb",
        "--eplb-rebalance-num-iterations", "4", "--expert-balancedness-report-mode", "prometheus", "--enable-metrics",
    )  # fmt: skip
    params = {"max_new_tokens": 9, "ignore_eos": True}
    with a_server(*flags, *ONE_PROCESS) as server:
        answer = server.generate(text="What is a radix cache?", sampling_params=params)
        info = server.at_rest()["experts"]
        status, text = server.raw("/metrics")
    assert answer["meta_info"]["completion_tokens"] == 9
    assert status == 200
    assert "sglang:eplb_balancedness_count{model_name=" in text
    found = re.findall(r'sglang:eplb_gpu_physical_count_total{gpu="(\d)",layer="(\d)",model_name=".+"} (\S+)', text)
    assert {(int(layer), int(gpu)): float(rows) for gpu, layer, rows in found} == {
        (layer, gpu): rows for layer, of in enumerate(info["rows_of_ranks"]) for gpu, rows in enumerate(of)
    }
    assert info["rebalanced"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"enable_eplb": True}, "enable_eplb with ep_size=1: one rank has every expert"),
        ({"expert_balancedness_report_mode": "both"}, "expert_balancedness_report_mode with ep_size=1"),
        ({"expert_balancedness_report_mode": "loud"}, "expert_balancedness_report_mode='loud'"),
        ({"eplb_rebalance_num_iterations": 0}, "eplb_rebalance_num_iterations=0"),
        ({"enable_eplb": 2}, "enable_eplb=2"),
        (
            {"eplb_algorithm": "elasticity_aware"},
            "eplb_algorithm is not here: EPLB as DeepSeek published it is the only one",
        ),
    ],
)
def test_what_cannot_be_is_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        Engine(tiny_mixture(), device="cpu", **arguments)
    assert "\n" not in str(error.value)
