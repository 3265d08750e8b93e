"""The loop: add requests at any time, `step`, look at what has grown.

    engine = LLMEngine(model)
    engine.add_request("a", "What is a block table?", SamplingParams(max_tokens=40))
    while engine.has_unfinished_requests():
        for output in engine.step():
            ...

Under torchrun every rank makes the same calls and gets the same outputs; rank 0 schedules and samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import numpy as np

from ch06_tp_vllm.block_manager import BlockManager
from ch06_tp_vllm.model_runner import ModelRunner, StepMetadata
from ch06_tp_vllm.outputs import CompletionOutput, Logprob, RequestOutput
from ch06_tp_vllm.request import Request, RequestStatus
from ch06_tp_vllm.sampling_params import SamplingParams
from ch06_tp_vllm.scheduler import Scheduler, SchedulerOutput
from ch06_tp_vllm.trace import Trace
from common.distributed.messages import share
from common.parallel_state import initialize_tensor_parallel
from common.sampling.batch import SamplingBatch, uniform
from common.sampling.sampler import Drawn
from common.text.tokenizer import IncrementalDetokenizer

DEFAULT_BUDGET = {"cpu": 1024, "cuda": 8192}  # tokens a step: on a CPU what its caches like, on a GPU vLLM's own

Prompt = str | Sequence[int] | dict[str, Any]  # {"prompt": text} or {"prompt_token_ids": ids}


@dataclass
class _Group:
    """A prompt and the requests of its n answers."""

    request_id: str
    prompt: str | None
    requests: list[Request]

    @property
    def finished(self) -> bool:
        return all([request.status.finished for request in self.requests])  # asked of all in every step: no generator


@dataclass(frozen=True)
class _Queued:
    """A step that all ranks have been told to do: who gets a token out of it, and the tokens."""

    requests: list[Request]
    drawn: Drawn | None


class LLMEngine:
    """vLLM's LLMEngine, under its argument names.

    model: a folder in Hugging Face layout, a Hub id, or None for the bundled tiny model. max_num_batched_tokens: the budget
    of a step. num_gpu_blocks_override: blocks in the pool; by default what memory allows. enforce_eager: no CUDA
    graphs. async_scheduling: queue a step before the last one's tokens are seen; None: on a GPU.
    check: test the conservation of blocks after every step. trace: a file to which every step writes a line (trace.py).
    """

    def __init__(
        self, model: str | None = None, *, tensor_parallel_size: int | None = None, dtype: str = "auto",
        device: str = "auto", block_size: int = 16, max_num_seqs: int = 256, max_num_batched_tokens: int | None = None,
        num_gpu_blocks_override: int | None = None, enable_prefix_caching: bool = True,
        enable_chunked_prefill: bool = True, scheduler_reserve_full_isl: bool = True, watermark: float = 0.0,
        scheduling_policy: str = "fcfs", seed: int = 0, enforce_eager: bool = False, async_scheduling: bool | None = None,
        attention_backend: str = "auto", check: bool = False, trace: str | Path | None = None,
    ):  # fmt: skip
        blocks = num_gpu_blocks_override
        sizes = {
            "block_size": block_size, "max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens,
            "num_gpu_blocks_override": blocks,
        }  # fmt: skip
        for name, value in sizes.items():
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value} must be a whole number, at least 1")
        if not isinstance(seed, int):
            raise ValueError(f"seed={seed!r} must be a whole number")
        if trace is not None and not (isinstance(trace, str | Path) and Path(trace).absolute().parent.is_dir()):
            raise ValueError(f"trace={trace!r} must be a file in a folder that exists")
        self.tp = initialize_tensor_parallel(tensor_parallel_size, device)
        self.runner = ModelRunner(
            model, device, block_size, dtype=None if dtype == "auto" else dtype, max_running_requests=max_num_seqs,
            max_total_tokens=None if blocks is None else blocks * block_size, attention_backend=attention_backend,
            disable_cuda_graph=enforce_eager, tp=self.tp,
        )  # fmt: skip
        config = self.runner.config
        self.blocks = BlockManager(
            self.runner.kv_cache.num_pages, block_size, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads,
            tp_rank=self.tp.rank, tp_size=self.tp.size, enable_prefix_caching=enable_prefix_caching,
        )  # fmt: skip
        self.scheduler = Scheduler(
            self.blocks, max_num_batched_tokens=max_num_batched_tokens or DEFAULT_BUDGET[self.tp.device.type],
            max_num_seqs=max_num_seqs, policy=scheduling_policy, enable_chunked_prefill=enable_chunked_prefill,
            scheduler_reserve_full_isl=scheduler_reserve_full_isl, watermark=watermark, settle=self._settle,
        )  # fmt: skip
        self.async_scheduling = self.tp.device.type == "cuda" if async_scheduling is None else async_scheduling
        self.seed, self.check = seed, check
        self.groups: dict[str, _Group] = {}  # the unfinished ones
        self.num_steps = 0
        self._num_requests = 0
        self._queued: _Queued | None = None  # the step whose tokens nobody has looked at
        self._decoding: tuple[list[Request], SamplingBatch] | None = None
        self._grown: dict[str, None] = {}  # groups that got a token since the last step() returned
        self.trace = Trace(trace, self) if trace is not None and self.tp.rank == 0 else None

    # --- for the user

    def add_request(
        self, request_id: str, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0,
        cache_salt: str | None = None,
    ) -> None:  # fmt: skip
        """Queue a prompt: a text, token ids, {"prompt": text} or {"prompt_token_ids": ids}. `priority`: lower goes first.

        cache_salt: its blocks are shared only with requests of the same salt. Raises ValueError, and nothing has changed,
        for a request id in use, an empty prompt, a token outside the vocabulary, lengths that can never fit, and
        values of a wrong kind.
        """
        params = SamplingParams() if params is None else params
        for name, value, kind in (("request_id", request_id, str), ("priority", priority, int)):
            if not isinstance(value, kind):
                raise ValueError(f"{name}={value!r} must be a {kind.__name__}")
        if cache_salt is not None and (
            not isinstance(cache_salt, str) or not cache_salt or not _is_unicode(cache_salt)
        ):
            raise ValueError(f"cache_salt={cache_salt!r} must be a text that is not empty, or None")
        if request_id in self.groups:
            raise ValueError(f"request id {request_id!r} is in use; finish or abort it first")
        text = prompt.get("prompt") if isinstance(prompt, dict) else prompt if isinstance(prompt, str) else None
        ids = self.tokenize(prompt)
        self.check_request(ids, params)
        stops = frozenset(params.stop_token_ids + (() if params.ignore_eos else self.runner.config.eos_token_ids))
        group = _Group(request_id, text, [])
        for i in range(params.n):
            seed = int(uniform(self.seed, self._num_requests) * (1 << 24)) if params.seed is None else params.seed + i
            request = Request(
                request_id, i, ids, params.row(), seed, priority, self._num_requests, cache_salt, stops=stops,
                stop=params.stop,
            )  # fmt: skip
            group.requests.append(request)
            self._num_requests += 1
        self.groups[request_id] = group
        if self.tp.rank == 0:
            for request in group.requests:
                self.scheduler.add(request)

    def abort_request(self, request_id: str) -> None:
        """Drop a request, wherever it is; its blocks are free at once. Raises ValueError for one that is not there."""
        if request_id not in self.groups:
            raise ValueError(f"request id {request_id!r} is unknown or finished: there is nothing to abort")
        for request in self.groups.pop(request_id).requests:
            if not request.status.finished:
                request.status = RequestStatus.FINISHED_ABORTED
                self.scheduler.finish(request)
                if self.trace:
                    self.trace.aborted(request)
        self._grown.pop(request_id, None)

    def has_unfinished_requests(self) -> bool:
        return bool(self.groups)

    def step(self) -> list[RequestOutput]:
        """One iteration; returns the requests that got a token, each with all it has so far.

        On more than one rank all call it together, and rank 0's outputs come back on every rank.
        """
        outputs = []
        if self.tp.rank == 0:
            if self.groups:
                self.run_step()
            self.runner.stop()
            outputs = self.take_outputs()
        else:
            self.runner.follow()
        if self.tp.size > 1:
            outputs = [RequestOutput.from_json(value) for value in share([o.to_json() for o in outputs], self.tp)]
            if self.tp.rank > 0:
                for output in outputs:
                    if output.finished:
                        del self.groups[output.request_id]
        return outputs

    def tokenize(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt in any of its forms. Raises ValueError for what is none."""
        if isinstance(prompt, dict):
            given = [key for key in ("prompt_token_ids", "prompt") if key in prompt]
            if not given:
                raise ValueError(f"a prompt has 'prompt' or 'prompt_token_ids', this one has {sorted(prompt)}")
            prompt = prompt[given[0]]
        if isinstance(prompt, str):
            if self.runner.tokenizer is None:
                raise ValueError("this checkpoint has no tokenizer; give prompt_token_ids instead of text")
            if not _is_unicode(prompt):
                raise ValueError(f"the prompt holds half a surrogate pair, which is no character: {prompt!r:.80}")
            return self.runner.tokenizer.encode(prompt)
        try:
            return [index(token) for token in prompt]
        except TypeError:
            raise ValueError(
                f"a prompt is a text, token ids (whole numbers) or a dict with one of them, not {prompt!r:.80}"
            ) from None

    def check_request(self, ids: Sequence[int], params: SamplingParams) -> None:
        """Raises ValueError for what add_request would refuse."""
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params={params!r} must be a SamplingParams")
        vocab, limit = self.runner.config.vocab_size, self.runner.config.max_position_embeddings
        if not ids:
            raise ValueError("the prompt is empty: there is no token to continue from")
        if min(ids) < 0 or max(ids) >= vocab:
            bad = next(i for i in ids if not 0 <= i < vocab)
            raise ValueError(f"token id {bad} is outside the vocabulary 0..{vocab - 1}")
        if params.stop and self.runner.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer, so no text to stop at; use stop_token_ids")
        total = len(ids) + params.max_tokens
        said = f"prompt {len(ids)} + max_tokens {params.max_tokens} = {total} tokens"
        if total > limit:
            way_out = f" or ask for at most {limit - len(ids)}" if len(ids) < limit else f" to {limit - 1} or fewer"
            raise ValueError(f"{said}, but the model ends at {limit}; shorten the prompt{way_out}")
        pool = len(self.blocks.blocks) * self.blocks.block_size
        if total > pool:
            raise ValueError(f"{said}, but {len(self.blocks.blocks)} blocks hold {pool}; raise num_gpu_blocks_override")
        budget = self.scheduler.max_num_batched_tokens
        if not self.scheduler.enable_chunked_prefill and total > budget:
            raise ValueError(f"{said}, but without chunked prefill a step holds max_num_batched_tokens={budget}")

    # --- rank 0

    def run_step(self) -> None:
        """Schedule, execute, sample, account (rank 0, while there are unfinished requests)."""
        if self.trace:
            self.trace.begin()
        output = self.scheduler.schedule()
        if self.trace:
            self.trace.scheduled(output)
        if not output.scheduled and self._queued is None and not self._grown:
            raise AssertionError(f"{len(self.scheduler.waiting)} requests wait and none can start: blocks were lost")
        queued = self._queue(output) if output.scheduled else None
        if self.trace:
            self.trace.queued()
        self._settle()
        self._queued = queued
        if not self.async_scheduling:
            self._settle()
        if self.check:
            self.blocks.check(self.scheduler.running)
        if self.trace:
            self.trace.end()

    def take_outputs(self, only_finished: bool = False) -> list[RequestOutput]:
        """The requests that got a token since the last call; the finished ones leave."""
        grown, self._grown = [self.groups[request_id] for request_id in self._grown], {}
        outputs = [self._output(group) for group in grown if group.finished or not only_finished]
        for output in outputs:
            if output.finished:
                del self.groups[output.request_id]
        return outputs

    def _queue(self, output: SchedulerOutput) -> _Queued:
        """Tell all ranks what to do; afterwards every number stands as if it were done."""
        emitting = [s.request for s in output.scheduled if s.emits]
        is_decode = output.is_decode
        logits = self.runner.run(self._metadata(output))
        self.num_steps += 1
        for s in output.scheduled:
            s.request.num_computed_tokens += s.num_new
            self._cache(s.request)
        for request in emitting:
            request.pending += 1
            request.drawn_here = True
        if not emitting:
            return _Queued([], None)
        return _Queued(emitting, self.runner.sample(logits, self._sampling(emitting, is_decode)))

    def _metadata(self, output: SchedulerOutput) -> StepMetadata:
        updates, tokens = [], []
        for s in output.scheduled:
            request = s.request
            if request.num_blocks_sent < len(request.block_table):
                updates.append((request.row, request.num_blocks_sent, request.block_table[request.num_blocks_sent :]))
                request.num_blocks_sent = len(request.block_table)
        columns = [(s.request.row, s.num_computed, s.num_new, s.emits) for s in output.scheduled]
        if not output.is_decode:
            for s in output.scheduled:
                if s.num_new == 1 and s.request.drawn_here:
                    tokens.append(-1)
                else:
                    tokens += s.request.all_token_ids[s.num_computed : s.num_computed + s.num_new]
        rows, computed, new, emits = np.array(columns, dtype=np.int64).T
        return StepMetadata(updates, rows, computed, new, emits, np.array(tokens, dtype=np.int64))

    def _sampling(self, requests: list[Request], is_decode: bool) -> SamplingBatch:
        """The parameters of the step's rows; those of a decode batch that has not changed are still there."""
        if is_decode and self._decoding and self._decoding[0] == requests:
            self._decoding[1].advance()
            return self._decoding[1]
        if any(request.params.needs_last_token for request in requests):
            self._settle()  # a penalty, say, must know every token before the one it is for
        batch = SamplingBatch([request.sampling_row() for request in requests])
        self._decoding = (requests, batch) if is_decode and not batch.needs_last_token else None
        return batch

    def _settle(self) -> None:
        """Look at the tokens of the step that was queued last: append them, and end who has come to an end."""
        step, self._queued = self._queued, None
        if step is None or step.drawn is None:
            return
        taken = step.drawn.take()
        for i, request in enumerate(step.requests):
            request.pending -= 1
            if request.status.finished:  # it had ended, or was aborted, when this step was on its way already
                continue
            told = taken.logprobs[i]
            request.append(taken.tokens[i], told.logprob if told else None)
            if request.stop:
                self._read(request)
            self._grown[request.group] = None
            self._cache(request)
            if request.status.finished:
                self.scheduler.finish(request)

    def _cache(self, request: Request) -> None:
        """Name the full blocks whose tokens are computed, or queued to be, and known by now, unless allocate_slots could."""
        if request.num_computed_tokens < (request.num_blocks_named + 1) * self.blocks.block_size:
            return  # no new full block, as in most steps
        # the last token of a finished request was never fed in, or in a step too many
        known = len(request.prompt_token_ids) + len(request.output_token_ids) - request.status.finished
        self.blocks.cache_full_blocks(request, min(request.num_computed_tokens, known))

    def _output(self, group: _Group) -> RequestOutput:
        for request in group.requests:
            self._read(request)
        answers = [
            CompletionOutput(
                i, r.shown, list(r.output_token_ids), sum(r.logprobs) if r.logprobs else None, self._logprobs(r),
                r.status.value if r.status.finished else None, r.stop_reason,
            )
            for i, r in enumerate(group.requests)
        ]  # fmt: skip
        first = group.requests[0]
        return RequestOutput(
            group.request_id,
            group.prompt,
            first.prompt_token_ids,
            answers,
            group.finished,
            first.num_cached_tokens or 0,
        )

    def _read(self, request: Request) -> None:
        """Turn the tokens that are new since the last time into text."""
        if self.runner.tokenizer is None or request.text_is_whole:
            return
        if request.detokenizer is None:
            request.detokenizer = IncrementalDetokenizer(self.runner.tokenizer)
        # as in vLLM a stop token is among the tokens and not in the text
        by_token = request.status is RequestStatus.FINISHED_STOPPED
        new = request.output_token_ids[request.num_decoded : len(request.output_token_ids) - by_token]
        request.num_decoded += len(new)
        text = request.detokenizer.add(*new) if new else ""
        if request.status.finished:
            text += request.detokenizer.finish()
        request.read(text)

    def _logprobs(self, request: Request) -> list[dict[int, Logprob]] | None:
        if not request.params.logprobs:
            return None
        told = request.told_logprobs
        for token, value in zip(request.output_token_ids[len(told) :], request.logprobs[len(told) :], strict=True):
            told.append({token: Logprob(value, self.runner.tokenizer and self.runner.tokenizer.decode([token]))})
        return list(told)


def _is_unicode(text: str) -> bool:
    """Not so if it holds half a surrogate pair, as a damaged JSON string may."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
