"""The router in front of two prefill and two decode servers: their tokens are transformers', and one of each side may die."""

import signal
from contextlib import ExitStack

from ch07_sglang_radix.serving.watch import wait_until
from common.tiny_qwen import TINY_QWEN_PATH
from tests.ch07.disaggregation.halves import KEPT, settled
from tests.ch07.parallelism.test_router_process import a_router
from tests.ch07.serving.running import LEAN, RunningServer
from tests.ch07.serving.test_life_and_death import Client
from tests.oracle import greedy

PROMPTS = [[5 + i, *range(6, 45)] for i in range(4)]
RIGHT = [greedy(TINY_QWEN_PATH, prompt, 8) for prompt in PROMPTS]
PARAMS = {"max_new_tokens": 8, "ignore_eos": True}


def test_tokens_are_right_and_one_of_each_side_may_die():
    with ExitStack() as stack:
        servers = {}
        for mode in ("prefill", "decode"):
            servers[mode] = [RunningServer("--disaggregation-mode", mode, *KEPT, *LEAN, wait=False) for _ in range(2)]
            for server in servers[mode]:
                stack.callback(server.process.wait)
                stack.callback(server.process.kill)
        for server in [*servers["prefill"], *servers["decode"]]:
            server.said("ready after")
        flags = [flag for mode, two in servers.items() for server in two for flag in (f"--{mode}", server.url)]
        policies = ("--policy", "round_robin", "--health-check-interval-secs", "0.5")
        router = stack.enter_context(a_router("--pd-disaggregation", *flags, *policies))

        def all_are_right() -> None:
            for prompt, right in zip(PROMPTS, RIGHT, strict=True):
                assert router.generate(input_ids=prompt, sampling_params=PARAMS)["output_ids"] == right

        all_are_right()
        both = router.generate(input_ids=PROMPTS[:2], sampling_params=PARAMS | {"n": 2})
        assert [one["output_ids"] for one in both] == [RIGHT[0], RIGHT[0], RIGHT[1], RIGHT[1]]
        assert router.stream(input_ids=PROMPTS[2], sampling_params=PARAMS)[-1]["output_ids"][-8:] == RIGHT[2][-8:]
        for server in [*servers["prefill"], *servers["decode"]]:
            settled(server)

        streams = [Client(router, stream=True, input_ids=[9 + i, 6]).started() for i in range(2)]
        servers["prefill"][0].process.send_signal(signal.SIGKILL)
        servers["decode"][0].process.send_signal(signal.SIGKILL)
        assert wait_until(lambda: sum(b"broke off" in one.text for one in streams) == 1, 100), "one lay on each"
        all_are_right()
        for one in streams:
            one.hang_up()
        for mode in ("prefill", "decode"):
            settled(servers[mode][1])

        servers["prefill"][1].process.send_signal(signal.SIGKILL)
        status, answer = router.call("/generate", {"input_ids": PROMPTS[0], "sampling_params": PARAMS})
        assert status == 503
        assert "prefill" in answer["error"]["message"] or servers["prefill"][1].url in answer["error"]["message"]
        assert wait_until(lambda: router.call("/health")[0] == 503, 100)
        settled(servers["decode"][1])
