"""What comes back: tokens -> requests that have grown or ended -> outputs in vLLM's shape.

vLLM: v1/engine/output_processor.py. Text is made when somebody looks, or after each token where a text may end the answer.
"""

import time
from dataclasses import dataclass, field, replace

from ch06_tp_vllm.outputs import CompletionOutput, Logprob, Logprobs, RequestMetrics, RequestOutput
from ch06_tp_vllm.request import Request
from ch06_tp_vllm.sampling_params import RequestOutputKind, SamplingParams
from common.request.end import End
from common.request.queued_step import QueuedStep
from common.sampling.logprobs import TokenLogprobs
from common.sampling.sampler import problem
from common.text.tokenizer import Tokenizer


@dataclass
class Group:
    """A prompt and the requests of its n answers."""

    request_id: str
    prompt: str | None
    params: SamplingParams
    requests: list[Request]
    metrics: RequestMetrics
    told: list[tuple[int, int]] = field(
        default_factory=list
    )  # DELTA: characters and tokens of each answer that are out

    @property
    def finished(self) -> bool:
        return all([request.status.finished for request in self.requests])  # asked of all in every step: no generator


class OutputProcessor:
    """groups: the unfinished ones by request id."""

    def __init__(self, tokenizer: Tokenizer | None):
        self.tokenizer = tokenizer
        self.groups: dict[str, Group] = {}
        self.grown: dict[str, None] = {}  # groups that got a token since the last `take_outputs`
        self.prompt_tokens = self.generation_tokens = 0  # since the beginning

    def add(self, group: Group) -> None:
        self.groups[group.request_id] = group
        self.prompt_tokens += sum(
            len(request.prompt_token_ids) for request in group.requests
        )  # of n answers n times, as in vLLM
        group.told = [(0, 0)] * len(group.requests)

    def take(self, step: QueuedStep[Request]) -> list[Request]:
        """Append a step's tokens; returns the requests that got some, or an error. Waits for the device."""
        grown: dict[Request, None] = {}
        for request, token, told in step.take():
            if token < 0:
                request.finish(End("error", message=(request.grammar and request.grammar.error) or problem(token)))
            else:
                request.append(token, told)
                self.generation_tokens += 1
            self._note(request)
            grown[request] = None
        return list(grown)

    def fail(self, requests: list[Request], error: BaseException) -> None:
        """A step could not be carried out: these end with it."""
        for request in requests:
            said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            request.finish(End("error", message=" ".join(said.split())))
            self._note(request)

    def _note(self, request: Request) -> None:
        self.grown[request.group] = None
        group = self.groups[request.group]
        if group.metrics.first_token_time is None:
            group.metrics = replace(group.metrics, first_token_time=time.time())
        if request.ended and group.finished:
            group.metrics = replace(group.metrics, finished_time=time.time())

    def take_outputs(self, only_finished: bool = False) -> list[RequestOutput]:
        """The requests that got a token since the last call; the finished ones leave."""
        grown, self.grown = [self.groups[request_id] for request_id in self.grown], {}
        outputs = []
        for group in grown:
            silent = only_finished or group.params.output_kind is RequestOutputKind.FINAL_ONLY
            if silent and not group.finished:
                continue
            outputs.append(self.output(group))
            if group.finished:
                del self.groups[group.request_id]
        return outputs

    def output(self, group: Group) -> RequestOutput:
        first = group.requests[0]
        prompt_logprobs = None
        if first.params.prompt_logprobs is not None:
            told = first.prompt_logprobs
            prompt_logprobs = [None, *(self._told(one, first.params.prompt_logprobs) for one in told)]
        return RequestOutput(
            group.request_id, group.prompt, first.prompt_token_ids,
            [self._answer(group, i, request) for i, request in enumerate(group.requests)], group.finished,
            first.num_cached_tokens or 0, prompt_logprobs, group.metrics,
        )  # fmt: skip

    def _answer(self, group: Group, i: int, request: Request) -> CompletionOutput:
        text, tokens, told = request.answer.shown(), list(request.output_token_ids), request.answer.logprobs
        logprobs: Logprobs | None = None
        if request.params.logprobs:
            logprobs = [self._told(one, request.params.top_logprobs) for one in told]
        if group.params.output_kind is RequestOutputKind.DELTA:
            (characters, count), group.told[i] = group.told[i], (len(text), len(tokens))
            text, tokens, logprobs = text[characters:], tokens[count:], logprobs and logprobs[count:]
        return CompletionOutput(
            i, text, tokens, sum(one.logprob for one in told) if told else None, logprobs,
            request.status.value if request.ended else None, request.error or request.stop_reason,
        )  # fmt: skip

    def _told(self, one: TokenLogprobs, top: int) -> dict[int, Logprob]:
        """The token itself and the best ones, as vLLM lays them out; a token that is among the best stands once."""
        found = {one.token: Logprob(one.logprob, one.rank, self._decoded(one.token))}
        for rank, (token, logprob) in enumerate(one.top[:top], 1):
            if token not in found:
                found[token] = Logprob(logprob, rank, self._decoded(token))
        return found

    def _decoded(self, token: int) -> str | None:
        """With its space and as it is written, as in vLLM 0.33 (tokenizers/detokenizer_utils.py, convert_ids_list_to_tokens).
        Of a character that several tokens make, vLLM gives the last one all of it; here each reads as U+FFFD."""
        return self.tokenizer and self.tokenizer.token_text(token)
