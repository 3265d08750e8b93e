"""A server with --dp-size: two replicas that look like one, and one that goes on when the other has died."""

import asyncio
import os
import signal

import pytest

from ch07_sglang_radix import Engine
from ch07_sglang_radix.server_args import ServerArgs
from ch07_sglang_radix.serving.child import gpus_of
from ch07_sglang_radix.serving.http_args import HttpArgs
from ch07_sglang_radix.serving.io_struct import GenerateRequest, RequestError, SessionParams
from ch07_sglang_radix.serving.watch import wait_until
from common.tiny_qwen import TINY_QWEN_PATH
from tests.ch07.serving.running import InThisProcess, RunningServer, a_server
from tests.ch07.serving.test_life_and_death import ALL_END_S, STOPPED_S, Client, gone
from tests.oracle import greedy

PROMPTS = [
    "What is a radix cache?",
    "What is a page?",
    "什么是全归约？",
    "What is a radix cache? Say",
    "Define retraction.",
]
PARAMS = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def two():
    server = InThisProcess({"dp_size": 2, "max_total_tokens": 1024})
    yield server
    server.run(server.manager.resume())
    info = server.run(server.manager.server_info())
    assert info["free_tokens"] + info["evictable_tokens"] == info["max_total_num_tokens"] == 2048
    server.end()
    assert all(not thread.is_alive() for thread in server.workers.threads)


def ask(server, **body):
    return server.run(server.manager.answer(GenerateRequest(sampling_params=PARAMS, **body)))


def test_the_answers_are_an_engine_s_in_order_and_tell_the_replica(two):
    with Engine(device="cpu", max_total_tokens=1024) as engine:
        right = [one["output_ids"] for one in engine.generate(PROMPTS, PARAMS)]
    answers = ask(two, text=PROMPTS)
    assert [one["output_ids"] for one in answers] == right
    assert [one["meta_info"]["dp_rank"] for one in answers] == [0, 1, 0, 1, 0]
    assert ask(two, text=PROMPTS[0])["output_ids"] == right[0]


def test_one_replica_is_no_replica():
    server = InThisProcess({"max_total_tokens": 256})
    assert "dp_rank" not in ask(server, text="What?")["meta_info"]
    assert "dp_size" not in server.run(server.manager.server_info())
    server.end()


def test_each_replica_has_a_tree_of_its_own(two):
    assert two.run(two.manager.flush_cache())
    cached = [ask(two, text="What is tensor parallelism, and why?")["meta_info"]["cached_tokens"] for _ in range(4)]
    assert cached[:2] == [0, 0], "computed once by each"
    assert min(cached[2:]) > 0
    each = two.run(two.manager.server_info())["replicas"]
    assert [one["dp_rank"] for one in each] == [0, 1]
    assert each[0]["evictable_tokens"] == each[1]["evictable_tokens"] > 0
    assert two.run(two.manager.flush_cache())
    assert all(one["evictable_tokens"] == 0 for one in two.run(two.manager.server_info())["replicas"])


def test_cache_aware_finds_the_tree_that_has_it():
    server = InThisProcess({"dp_size": 2, "max_total_tokens": 512, "load_balance_method": "cache_aware"})
    both = ask(server, text=["What is a page, and why?", "Define retraction, please."])
    assert [one["meta_info"]["dp_rank"] for one in both] == [0, 1]
    again = ask(server, text=["Define retraction, please. Twice", "Define retraction, please. Thrice"])
    assert [one["meta_info"]["dp_rank"] for one in again] == [1, 1]
    assert min(one["meta_info"]["cached_tokens"] for one in again) >= 4
    server.end()


def test_a_session_sticks_to_its_replica(two):
    two.manager.sessions.open("s")
    first = ask(two, text="What is a page?", rid="first", session_params=SessionParams("s"))
    rank, rid = first["meta_info"]["dp_rank"], "first"
    for i in range(3):
        ask(two, text="something else")
        said = ask(two, text=" And then?", rid=f"turn {i}", session_params=SessionParams("s", rid=rid))
        assert said["meta_info"]["dp_rank"] == rank
        assert said["meta_info"]["cached_tokens"] > 0
        rid = f"turn {i}"
    two.manager.sessions.close("s")


def test_pause_step_abort_and_flush_reach_both(two):
    async def go():
        manager = two.manager
        assert await manager.pause("in_place") == 0
        waiting = [
            asyncio.ensure_future(
                manager.answer(GenerateRequest(input_ids=[5, 6, i], rid=f"w{i}", sampling_params=PARAMS))
            )
            for i in range(4)
        ]
        while (await manager.server_info())["waiting"] < 4:
            await asyncio.sleep(0.01)
        assert not await manager.flush_cache()
        assert await manager.healthy(), "paused, and yet the loops turn"
        assert await manager.step(1) == 4
        assert await manager.abort("w1") == 1
        with pytest.raises(RequestError, match=r"^output_dir='[^;]*nowhere' is no folder$"):
            await manager.control("start_profile", output_dir="/nowhere")
        await manager.resume()
        answers = await asyncio.gather(*waiting)
        assert [one["meta_info"]["finish_reason"]["type"] for one in answers] == ["length", "abort", "length", "length"]
        assert {one["meta_info"]["dp_rank"] for one in answers} == {0, 1}
        assert await manager.healthy()

    two.run(go())


@pytest.mark.parametrize(
    ("visible", "rank", "ranks", "seen"),
    [(None, 0, 1, "0"), (None, 1, 2, "2,3"), ("4,5,6,7", 1, 2, "6,7"), ("GPU-a,GPU-b", 1, 1, "GPU-b"), ("3", 1, 1, "")],
)
def test_each_replica_sees_gpus_of_its_own(monkeypatch, visible, rank, ranks, seen):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus_of(rank, ranks) == {"CUDA_VISIBLE_DEVICES": seen}
    assert gpus_of(None, ranks) == {}, "who has no replica beside it sees all"


def test_replicas_of_several_ranks_are_not_threads_of_one_process():
    with pytest.raises(ValueError, match=r"^single_process .*dp_size=2 replicas of 2 ranks"):
        HttpArgs(engine=ServerArgs(dp_size=2, tp_size=2), single_process=True)


def test_replicas_are_not_spread_over_hosts():
    with pytest.raises(ValueError, match=r"^nnodes=2 .*dp_size=2 .*router in front$"):
        ServerArgs(dp_size=2, nnodes=2, dist_init_addr="127.0.0.1:5000")
    assert ServerArgs(tp_size=2, pp_size=2, dp_size=2).ranks == 4, "that many GPUs each"


def scheduler(server, rank):
    return server.processes()[f"scheduler_{rank}"]


# no detokenizer, which is a process more to start; the first server below has one
TOKENS_ALONE = "--skip-tokenizer-init"


def ask_over_http(server):
    return server.call("/generate", {"input_ids": [8, 9, 10, 11], "sampling_params": PARAMS})


def test_a_replica_that_is_killed_takes_its_own_requests_and_the_rest_goes_on():
    with a_server("--dp-size", "2", "--enable-metrics") as server:
        running = [Client(server, stream=True).started(), Client(server, stream=True).started()]  # replica 0, replica 1
        everybody = server.processes()
        scheduler(server, 0).kill()
        assert "scheduler_0" in running[0].done(5).last["error"]["message"]
        server.said(r"replica 0 is lost: scheduler_0 \(pid \d+\) has died")
        answers = [ask_over_http(server) for _ in range(3)]
        assert [(status, answer["meta_info"]["dp_rank"]) for status, answer in answers] == [(200, 1)] * 3
        status, health = server.call("/health")
        assert (status, health["dp_size"], list(health["lost_replicas"])) == (200, 2, ["0"])
        assert server.call("/ready")[1]["status"] == "ready"
        metrics = server.call("/metrics")[1]
        assert 'sglang:replica_up{dp_rank="0",model_name="tiny-qwen"} 0.0' in metrics
        assert 'sglang:replica_up{dp_rank="1",model_name="tiny-qwen"} 1.0' in metrics
        running[1].hang_up()
        info = server.at_rest()
        assert [one["dp_rank"] for one in info["replicas"]] == [1]
        assert server.raw("/flush_cache", b"")[0] == 200
        assert server.end() == 0
        assert all(map(gone, everybody.values()))
        assert server.leftovers() == []


def test_when_the_last_replica_has_died_the_server_ends_and_says_so():
    with a_server("--dp-size", "2", "--tp-size", "2", TOKENS_ALONE) as server:
        everybody = server.processes()
        ranks = [process for name, process in everybody.items() if name.startswith("rank")]
        assert len(ranks) == 2
        ranks[0].kill()  # a rank of a replica is that replica's end, and of no other
        server.said(r"replica \d is lost: .*rank 1")
        assert ask_over_http(server)[0] == 200
        left = next(rank for rank in (0, 1) if not gone(everybody[f"scheduler_{rank}"]))
        client = Client(server, stream=True).started()
        everybody[f"scheduler_{left}"].kill()
        assert "error" in client.done(5).last
        assert server.process.wait(ALL_END_S) == 1
        assert wait_until(lambda: all(map(gone, everybody.values())), ALL_END_S)
        assert server.leftovers() == []


class Line:
    """A streaming session over HTTP; ids: of all turns that went well."""

    def __init__(self, server):
        self.server, self.ids = server, []
        assert server.call("/open_session", {"session_id": "line", "streaming": True})[0] == 200

    def turn(self, *new_ids):
        """(replica, tokens of earlier turns that it still had); the answer is transformers'."""
        body = {
            "input_ids": new_ids,
            "session_params": {"id": "line"},
            "sampling_params": PARAMS | {"ignore_eos": True},
        }
        status, answer = self.server.call("/generate", body)
        assert status == 200, answer
        prompt = [*self.ids, *new_ids]
        assert answer["output_ids"] == greedy(TINY_QWEN_PATH, prompt, 8)
        self.ids = prompt + answer["output_ids"]
        return answer["meta_info"]["dp_rank"], answer["meta_info"]["cached_tokens"]


def test_a_streaming_session_outlives_the_replica_that_has_it():
    """The replica is stopped, which counts as dead. K and V are lost, the tokens are main's: the turn that ran is as if it had
    never been, and the next one computes them again."""
    with a_server("--dp-size", "2", "--watchdog-timeout", str(STOPPED_S), TOKENS_ALONE) as server:
        ask_over_http(server)  # replica 0's turn; the session begins at replica 1
        line = Line(server)
        assert line.turn(5, 6, 7) == (1, 0)
        assert line.turn(8, 9) == (1, len(line.ids) - 11)
        interrupted = Client(server, stream=True, session_params={"id": "line"}).started()
        stopped = scheduler(server, 1)
        os.kill(stopped.pid, signal.SIGSTOP)
        server.said(r"replica 1 is lost: .* is stopped", STOPPED_S + ALL_END_S)
        assert "scheduler_1" in interrupted.done(5).last["error"]["message"]
        assert wait_until(lambda: gone(stopped), ALL_END_S)
        assert [ask_over_http(server)[1]["meta_info"]["dp_rank"] for _ in range(3)] == [0, 0, 0]
        assert line.turn(10) == (0, 0)
        before = len(line.ids)
        assert line.turn(11, 12) == (0, before - 1), "all but the last token, as ever"
        assert server.call("/server_info")[1]["session_held_tokens"] > 0
        assert server.call("/close_session", {"session_id": "line"})[0] == 200
        assert server.at_rest()["session_held_tokens"] == 0
        assert server.end() == 0
        assert server.leftovers() == []


def test_a_replica_that_cannot_start_ends_the_server_with_its_reason(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    server = RunningServer("--dp-size", "2", "--model-path", str(tmp_path), TOKENS_ALONE, wait=False)
    assert "config.json" in server.said(r".*error main: scheduler_\d.*; the server ends")
    assert server.process.wait(60) == 1
    assert server.leftovers() == []
