"""The scheduler and the block manager against vLLM's own, where vLLM 0.33 is installed (its Python alone is enough, no GPU).

Random requests, few different tokens so that many blocks are shared, small pools, both policies, with and without cache, gate
and watermark; some are aborted. After every step: the same tokens for the same requests, the same block tables, the same free
queue. vLLM's pool has one block more, its block 0, which nobody gets.
"""

import os
import random

import pytest
import torch

from ch06_tp_vllm.block_manager import BlockManager
from ch06_tp_vllm.request import Request
from ch06_tp_vllm.scheduler import Scheduler
from common.request.end import End
from common.sampling.params import SamplingParams
from common.tiny_qwen import TINY_QWEN_PATH

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
pytest.importorskip("vllm.v1.core.sched.scheduler", exc_type=ImportError)

import vllm
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler as VllmScheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request as VllmRequest
from vllm.v1.request import RequestStatus as VllmStatus
from vllm.v1.structured_output import StructuredOutputManager

MAX_LEN, RUNS = 512, 300


@pytest.fixture(scope="module")
def model():
    if not vllm.__version__.startswith("0.33."):
        pytest.skip(f"this is vLLM {vllm.__version__}; the rules are those of 0.33")
    init_none_hash(sha256)
    return ModelConfig(model=str(TINY_QWEN_PATH), dtype="float32", seed=0, max_model_len=MAX_LEN)


class Theirs:
    """vLLM's scheduler; a worker that answers at once."""

    def __init__(self, model, blocks, size, budget, seqs, caching, reserve, watermark, policy):
        scheduler = SchedulerConfig(
            max_num_batched_tokens=budget, max_num_seqs=seqs, max_model_len=MAX_LEN, enable_chunked_prefill=True,
            is_encoder_decoder=False, async_scheduling=False, policy=policy, scheduler_reserve_full_isl=reserve,
        )  # fmt: skip
        cache = CacheConfig(block_size=size, gpu_memory_utilization=0.9, enable_prefix_caching=caching)
        config = VllmConfig(
            scheduler_config=scheduler, model_config=model, cache_config=cache, parallel_config=ParallelConfig(),
            device_config=DeviceConfig(device="cpu"),
        )  # fmt: skip
        spec = FullAttentionSpec(block_size=size, num_kv_heads=1, head_size=1, dtype=torch.float32)
        cache.num_gpu_blocks = blocks + 1
        pool = KVCacheConfig(blocks + 1, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
        self.scheduler = VllmScheduler(
            vllm_config=config, kv_cache_config=pool, structured_output_manager=StructuredOutputManager(config),
            block_size=size, hash_block_size=size,
        )  # fmt: skip
        self.manager = self.scheduler.kv_cache_manager
        self.manager.watermark_blocks = int(watermark * blocks)  # of as many blocks as ours
        self.hasher = get_request_block_hasher(size, sha256) if caching else None
        self.requests = {}

    def add(self, name, prompt, out, priority, arrival):
        params = vllm.SamplingParams(max_tokens=out, ignore_eos=True, temperature=0)
        self.requests[name] = VllmRequest(
            request_id=name, prompt_token_ids=list(prompt), sampling_params=params, pooling_params=None,
            arrival_time=arrival, priority=priority, block_hasher=self.hasher,
        )  # fmt: skip
        self.scheduler.add_request(self.requests[name])

    def table(self, name):
        return [block - 1 for block in self.manager.get_block_ids(name)[0]]

    def free_queue(self):
        return [block.block_id - 1 for block in self.manager.block_pool.free_block_queue.get_all_free_blocks()]

    def take(self, output, drawn):
        names = list(output.num_scheduled_tokens)
        self.scheduler.update_from_output(output, ModelRunnerOutput(
            req_ids=names, req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=[[drawn[name]] if name in drawn else [] for name in names], logprobs=None,
            prompt_logprobs_dict={}, pooler_output=[],
        ))  # fmt: skip
        self.requests = {name: request for name, request in self.requests.items() if not request.is_finished()}


@pytest.fixture
def names_stay(monkeypatch):
    """The one difference that is meant: vLLM leaves a block its name if the step that fills it never runs."""
    free = BlockManager.free

    def without_taking_names_back(self, request):
        request.num_blocks_named = 0
        free(self, request)

    monkeypatch.setattr(BlockManager, "free", without_taking_names_back)


@pytest.mark.parametrize("seed", range(0, RUNS, 50))
def test_every_step_is_vllm_s(model, names_stay, seed):
    for one in range(seed, seed + 50):
        play(model, random.Random(one))


def play(model, rng):
    size, num_blocks, budget = rng.choice([1, 2, 3, 4]), rng.randint(6, 24), rng.randint(1, 30)
    seqs, caching, reserve = rng.randint(1, min(6, budget)), rng.random() < 0.8, rng.random() < 0.6
    watermark, policy = rng.choice([0, 0, 0.1, 0.3]), rng.choice(["fcfs", "fcfs", "priority"])
    theirs = Theirs(model, num_blocks, size, budget, seqs, caching, reserve, watermark, policy)
    blocks = BlockManager(num_blocks, size, enable_prefix_caching=caching)
    ours = Scheduler(
        blocks, max_num_batched_tokens=budget, max_num_seqs=seqs, policy=policy, scheduler_reserve_full_isl=reserve,
        watermark=watermark,
    )  # fmt: skip
    coming, requests, step = [some_request(rng, str(i), num_blocks * size) for i in range(rng.randint(1, 14))], {}, 0
    while coming or requests:
        for at, name, prompt, out, priority in coming:
            if at == step:
                arrival = 1000 * step + int(name)
                theirs.add(name, prompt, out, priority, arrival)
                requests[name] = Request(name, 0, prompt, SamplingParams(max_new_tokens=out), 0, priority, arrival)
                ours.add(requests[name])
        coming = [one for one in coming if one[0] > step]
        their_step, our_step = theirs.scheduler.schedule(), ours.schedule()
        assert their_step.num_scheduled_tokens == {s.request.group: s.num_new for s in our_step.scheduled}
        assert theirs.free_queue() == list(blocks.free_blocks)
        drawn = {}
        for s in our_step.scheduled:
            request = s.request
            assert theirs.table(request.group) == request.block_table
            request.num_computed_tokens += s.num_new
            if s.emits:
                drawn[request.group] = rng.randrange(2)
        theirs.take(their_step, drawn)
        for s in our_step.scheduled:
            if s.emits:
                s.request.drawn_here = True
                s.request.append(drawn[s.request.group])
            if s.request.status.finished:
                ours.finish(requests.pop(s.request.group))
        assert theirs.requests.keys() == requests.keys()
        if requests and rng.random() < 0.03:
            name = rng.choice(sorted(requests))
            theirs.scheduler.finish_requests(name, VllmStatus.FINISHED_ABORTED)
            del theirs.requests[name]
            requests[name].finish(End("abort"))
            ours.finish(requests.pop(name))
        step += 1


def some_request(rng, name, pool):
    """(step in which it comes, name, prompt, tokens of its answer, priority)"""
    total = rng.randint(2, pool)
    length = rng.randint(1, total - 1)
    prompt = [rng.randrange(2) if rng.random() < 0.2 else 1 for _ in range(length)]
    out = total - length if rng.random() < 0.3 else min(total - length, rng.randint(1, 10))
    return rng.randint(0, 12), name, prompt, out, rng.randint(0, 2)
