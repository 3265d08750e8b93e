"""Pages from GPU to GPU: through the balancer the tokens are transformers', no page goes by way of the host, and deaths cost
nobody his pages. Where there is one GPU, both halves are on it; of two, each half sees one and not the other."""

import signal
import threading
import time

import pytest
import torch

from common.tiny_qwen import TINY_QWEN_PATH
from tests.ch07.disaggregation.halves import KEPT, a_front, settled, two_halves
from tests.ch07.serving.running import RunningServer
from tests.ch07.serving.test_life_and_death import Client
from tests.oracle import greedy, some_prompts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
FLAGS = ("--device", "cuda", "--dtype", "float32", "--disaggregation-transfer-backend", "cuda_ipc")
NEW = 10
LONG = [5 + i % 900 for i in range(1000)]
ONE_CARD = ("0", "0")
EACH_ITS_OWN = ("0", "1")


def right(folder, prompts, new=NEW):
    return [greedy(folder, prompt, new) for prompt in prompts]


def sampling(new=NEW):
    return {"max_new_tokens": new, "ignore_eos": True, "temperature": 0}


def goes_from_gpu_to_gpu(halves):
    """What prefill counts is what it copied for the host."""
    halves.at_rest()
    return halves.prefill.info()["kv_bytes_moved"] == 0 < halves.decode.info()["kv_bytes_moved"]


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("cards", [ONE_CARD, pytest.param(EACH_ITS_OWN, marks=two_gpus)])
def test_tokens_equal_transformers(cards, page):
    prompts = [*some_prompts(1000, 4, shared=40, longest=24), LONG[:300]]
    flags = (*FLAGS, "--page-size", str(page))
    with two_halves(*flags, prefill=("--chunked-prefill-size", "32"), cards=cards) as halves:
        for _ in range(2):  # the second time both sides find them in their trees
            answers = halves.front.generate(input_ids=prompts, sampling_params=sampling())
            assert [one["output_ids"] for one in answers] == right(TINY_QWEN_PATH, prompts)
            assert goes_from_gpu_to_gpu(halves)


@two_gpus
@pytest.mark.parametrize(("prefill", "decode"), [(2, 1), (1, 2), (2, 2)])
def test_other_ranks_on_the_other_side(prefill, decode):
    prompts = [*some_prompts(1000, 4, shared=40, longest=24), LONG[:300]]
    sizes = {"prefill": ("--tp-size", str(prefill)), "decode": ("--tp-size", str(decode))}
    with two_halves(*FLAGS, "--page-size", "16", "--chunked-prefill-size", "64", **sizes) as halves:
        answers = halves.front.generate(input_ids=prompts, sampling_params=sampling())
        assert [one["output_ids"] for one in answers] == right(TINY_QWEN_PATH, prompts)
        assert goes_from_gpu_to_gpu(halves)


@two_gpus
def test_latent_pages(checkpoint):
    folder = checkpoint("deepseek_v3")
    prompts = some_prompts(1000, 4, shared=20, longest=24)
    flags = (*FLAGS, "--model-path", str(folder), "--skip-tokenizer-init", "--page-size", "16")
    with two_halves(*flags, cards=EACH_ITS_OWN) as halves:
        answers = halves.front.generate(input_ids=prompts, sampling_params=sampling())
        assert [one["output_ids"] for one in answers] == right(folder, prompts)
        assert goes_from_gpu_to_gpu(halves)


@pytest.mark.parametrize("after_s", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("cards", [ONE_CARD, pytest.param(EACH_ITS_OWN, marks=two_gpus)])
def test_prefill_is_killed_while_its_pages_are_read_and_decode_serves_on(cards, after_s):
    body = {"input_ids": LONG[:300], "sampling_params": sampling()}
    with two_halves(*FLAGS, "--page-size", "16", "--chunked-prefill-size", "16", cards=cards) as halves:
        assert halves.front.generate(**body)["output_ids"] == right(TINY_QWEN_PATH, [LONG[:300]])[0]
        running = Client(halves.front, stream=True).started()
        asked = [
            threading.Thread(target=halves.front.call, args=("/generate", body | {"input_ids": [i, *LONG]}))
            for i in range(6)
        ]
        for one in asked:
            one.start()
        time.sleep(after_s)
        halves.prefill.process.send_signal(signal.SIGKILL)
        for one in asked:
            one.join(60)
            assert not one.is_alive(), "nobody waits for who is dead"
        running.hang_up()
        settled(halves.decode)
        variables = {"CUDA_VISIBLE_DEVICES": cards[0]}
        new = RunningServer("--disaggregation-mode", "prefill", *KEPT, *FLAGS, "--page-size", "16", variables=variables)
        try:
            with a_front("--prefill", new.url, "--decode", halves.decode.url) as front:
                prompt = [7, *LONG[:300]]
                answer = front.generate(input_ids=prompt, sampling_params=sampling())
                assert answer["output_ids"] == right(TINY_QWEN_PATH, [prompt])[0]
            settled(new)
            settled(halves.decode)
        finally:
            new.process.kill()


@pytest.mark.parametrize("cards", [ONE_CARD, pytest.param(EACH_ITS_OWN, marks=two_gpus)])
def test_decode_is_killed_while_it_reads_and_prefill_has_its_pages_back(cards):
    body = {"input_ids": LONG, "sampling_params": sampling()}
    with two_halves(*FLAGS, "--page-size", "16", "--chunked-prefill-size", "16", cards=cards) as halves:
        halves.front.generate(input_ids=LONG[:50], sampling_params=sampling())
        asked = threading.Thread(target=halves.front.call, args=("/generate", body))
        asked.start()
        time.sleep(0.1)
        halves.decode.process.send_signal(signal.SIGKILL)
        asked.join(60)
        assert not asked.is_alive()
        settled(halves.prefill)
