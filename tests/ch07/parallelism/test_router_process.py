"""The router as a process in front of two real servers: same answers, a worker that dies, SIGTERM, and no worker at all."""

import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

from ch07_sglang_radix.serving.watch import wait_until
from tests.ch07.serving.running import ONE_PROCESS, ROOT, RunningServer, a_server
from tests.ch07.serving.test_life_and_death import Client


@contextmanager
def a_router(*flags):
    command = [sys.executable, "-m", "ch07_sglang_radix.parallelism.router", "--port", "0", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    router = RunningServer.__new__(RunningServer)
    router.process, router.lines = process, []
    router._reader = threading.Thread(target=router._read, daemon=True)
    router._reader.start()
    try:
        router.url = router.said(r"ready: .*(http://\S+:\d+)")
        yield router
    finally:
        process.kill()
        process.wait()


def test_two_servers_behind_a_router_are_one_that_survives_either():
    body = {"text": "What is a page?", "sampling_params": {"max_new_tokens": 8}}
    with a_server(*ONE_PROCESS) as first, a_server(*ONE_PROCESS) as second:
        flags = ("--health-check-interval-secs", "0.3", "--worker-urls", first.url, second.url)
        with a_router(*flags) as router:
            right = first.generate(**body)
            for _ in range(2):
                answer = router.generate(**body)
                assert answer["output_ids"] == right["output_ids"]
            assert answer["meta_info"]["cached_tokens"] > 0, "cache_aware: where it was before"
            assert [one["text"] for one in router.stream(**body)][-1] == right["text"]
            gone = Client(router, stream=True).started()
            assert wait_until(lambda: first.info()["running"] + second.info()["running"] == 1, 100)
            gone.hang_up()
            first.at_rest()
            second.at_rest()
            streams = [Client(router, stream=True, input_ids=[5 + 100 * i, 6]).started() for i in range(2)]
            by = "first" if first.info()["running"] else "second"
            (first if by == "first" else second).process.send_signal(signal.SIGKILL)
            assert wait_until(lambda: any(b"broke off" in one.text for one in streams), 100)
            assert router.generate(**body)["output_ids"] == right["output_ids"], "the other one"
            for one in streams:
                one.hang_up()
            (second if by == "first" else first).at_rest()


def test_sigterm_lets_streams_end_and_without_workers_it_is_a_503():
    with a_router("--worker-urls", "http://127.0.0.1:9") as router:
        status, answer = router.call("/generate", {"text": "a"})
        assert status == 503
        assert "none of 1 worker(s) can be asked: http://127.0.0.1:9: does not answer" in answer["error"]["message"]
        assert any(re.search("http://127.0.0.1:9 gets no requests: does not answer", line) for line in router.lines)
        router.process.terminate()
        assert router.process.wait(100) == 0
