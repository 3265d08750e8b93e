"""Replicas in one process: their answers are one engine's, and what is counted adds up."""

import csv

import pytest

from ch07_sglang_radix.benchmarks import bench_load_balance
from ch07_sglang_radix.benchmarks.replicas import make_replicas, serve
from ch07_sglang_radix.benchmarks.workloads import Call, Source
from ch07_sglang_radix.invariants import check_invariants
from ch07_sglang_radix.parallelism.load_balancing import POLICIES, LoadBalancer
from common.tiny_qwen import TINY_QWEN_PATH
from tests.oracle import greedy


@pytest.fixture(scope="module")
def three():
    return make_replicas(3, 512)


def programs(vocab_size):
    """Two turns each, all behind one beginning."""
    source = Source(vocab_size)
    begin, questions = source.text(20), [[source.text(6), source.text(6)] for _ in range(5)]

    def program(asked):
        prompt = begin
        for question in asked:
            prompt = prompt + question
            (answer,) = yield [Call(prompt, 4)]
            assert answer == greedy(TINY_QWEN_PATH, prompt, 4)
            prompt = prompt + answer

    return [program(asked) for asked in questions]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_program_runs_to_its_end_with_transformers_answers(three, policy):
    outcome = serve(three, programs(three[0].wrapper.config.vocab_size), LoadBalancer(policy, range(3)))
    assert sorted(one.program for one in outcome.answered) == sorted(2 * list(range(5)))
    prompt = sum(one.prompt_tokens for one in outcome.answered)
    assert sum(outcome.computed) == prompt - round(outcome.hit_rate * prompt) + 40
    assert 1 <= outcome.imbalance <= 3
    for scheduler in three:
        assert not scheduler.busy
        check_invariants(scheduler)
        scheduler.tree.flush()


def test_one_replica_has_every_prefix(three):
    rates = []
    for policy, count in (("cache_aware", 3), ("round_robin", 1), ("random", 3)):
        balancer = LoadBalancer(policy, range(count))
        rates.append(serve(three[:count], programs(three[0].wrapper.config.vocab_size), balancer).hit_rate)
        for scheduler in three:
            scheduler.tree.flush()
    assert rates[0] == rates[1] > rates[2]


def test_the_benchmark_writes_a_row_for_each_policy(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.csv"
    monkeypatch.setattr("sys.argv", ["bench", "--scale", "0.05", "--workloads", "few-shot", "--out", str(out)])
    bench_load_balance.main()
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["policy"] for row in rows] == list(POLICIES)
    assert {row["requests"] for row in rows} == {"2"}
    assert "one tree %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "words"), [("--scale=0", r"scale=0\.0 must be in"), ("--pool=64", "pool=64 must be at least 4096")]
)
def test_what_makes_no_sense_is_one_line(monkeypatch, flag, words):
    monkeypatch.setattr("sys.argv", ["bench", flag])
    with pytest.raises(ValueError, match=words):
        bench_load_balance.parse_args()
