"""Real processes that are killed or stopped: the client hears of it, and the half that lives has its pages back and serves on."""

import signal

import pytest

from ch07_sglang_radix.serving.watch import wait_until
from common.tiny_qwen import TINY_QWEN_PATH
from tests.ch07.disaggregation.halves import KEPT, a_front, settled, two_halves
from tests.ch07.serving.running import LEAN, RunningServer
from tests.ch07.serving.test_life_and_death import Client
from tests.oracle import greedy

PROMPT = list(range(5, 45))
RIGHT = greedy(TINY_QWEN_PATH, PROMPT, 8)
BODY = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 8, "ignore_eos": True}}


def test_prefill_is_killed_and_what_it_had_handed_over_goes_on():
    with two_halves("--page-size", "4", decode=LEAN) as halves:
        running = Client(halves.front, stream=True).started()  # 2,000 tokens
        halves.prefill.process.send_signal(signal.SIGKILL)
        status, answer = halves.front.call("/generate", BODY)
        assert status in (500, 503)
        assert "does not answer" in answer["error"]["message"] or "gone" in answer["error"]["message"]
        before = len(running.text)
        assert wait_until(lambda: len(running.text) > before, 100), "its pages had come, and nobody else is needed"
        running.hang_up()
        settled(halves.decode)
        assert halves.front.call("/health")[0] == 503
        new = RunningServer("--disaggregation-mode", "prefill", *KEPT, *LEAN, "--page-size", "4")
        try:
            with a_front("--prefill", new.url, "--decode", halves.decode.url) as front:
                assert front.generate(**BODY)["output_ids"] == RIGHT, "another prefill engine takes its place"
            settled(new)
        finally:
            new.process.kill()


def test_decode_is_killed_in_the_middle_of_an_answer():
    with two_halves(prefill=LEAN) as halves:
        running = Client(halves.front, stream=True).started()
        halves.decode.process.send_signal(signal.SIGKILL)
        assert wait_until(lambda: b"broke off" in running.text, 100), running.text[-300:]
        status, answer = halves.front.call("/generate", BODY)
        assert status == 503
        assert halves.decode.url in answer["error"]["message"]
        settled(halves.prefill)


@pytest.fixture(scope="module")
def impatient():
    """Of several processes each, so that a scheduler alone can be stopped."""
    with two_halves("--disaggregation-timeout", "8", "--skip-tokenizer-init") as halves:
        yield halves


@pytest.mark.parametrize("half", ["prefill", "decode"])
def test_a_half_that_is_stopped_is_not_waited_for_for_ever(impatient, half):
    """It neither answers nor closes its links: the other's rooms run out of time, and the balancer's client gets an error."""
    assert impatient.front.generate(**BODY)["output_ids"] == RIGHT
    scheduler = getattr(impatient, half).processes()["scheduler"]
    scheduler.suspend()
    status, answer = impatient.front.call("/generate", BODY | {"input_ids": [9, *PROMPT]})
    assert status == 500
    assert "8 s are over" in answer["error"]["message"] or "no sign of life" in answer["error"]["message"]
    scheduler.resume()
    impatient.at_rest()
    assert impatient.front.generate(**BODY)["output_ids"] == RIGHT
