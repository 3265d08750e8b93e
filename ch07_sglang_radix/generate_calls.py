"""`generate` and `async_generate` with SGLang's arguments: of an engine, and of several that look like one.

Both read the call in the same way (generate_request.py); what answers it is the engine's own.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from ch07_sglang_radix.generate_request import GenerateCall, LogprobOptions
from ch07_sglang_radix.handoff import Handoff
from ch07_sglang_radix.server_args import ServerArgs
from common.arguments import says_names
from common.request.intake import Intake
from common.values import flag

Answer = dict[str, Any]
# arguments of SGLang's generate (0.5.23, srt/entrypoints/engine.py) that are not here
ELSEWHERE = dict.fromkeys(("audio_data", "video_data"), "this engine reads text and pictures") | {
    "cache_salt": "use extra_key, which keeps what a request caches apart too",
    "custom_logit_processor": "use logit_bias of sampling_params",
    "return_hidden_states": "answers are tokens and their log-probabilities",
    "data_parallel_rank": "one engine is one replica; start several",
}
asked = says_names("argument", ELSEWHERE, dict.fromkeys(ELSEWHERE) | {"return_hidden_states": False})


class GenerateCalls(ABC):
    """Give it its arguments, an intake and what answers a call, whole or as a stream. disaggregation_mode: of half an engine,
    which. enable_lora: has it adapters?"""

    server_args: ServerArgs
    disaggregation_mode = "null"
    enable_lora = False

    @asked
    def generate(
        self, prompt: str | Sequence[str] | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None, return_logprob: bool = False,
        logprob_start_len: int | None = None, top_logprobs_num: int | None = None,
        token_ids_logprob: Sequence[int] | None = None, stream: bool = False, *, rid: str | Sequence[str] | None = None,
        extra_key: str | None = None, priority: int = 0, routing_key: str | None = None, require_reasoning: bool = False,
        bootstrap_host: str | None = None, bootstrap_port: int | None = None, bootstrap_room: int | None = None,
        image_data: Any = None, lora_path: str | Sequence[str | None] | None = None,
    ) -> Answer | list[Answer] | Iterator[Answer]:  # fmt: skip
        """One prompt -> one result, a list -> a list in the same order; with n > 1 a list, n results a prompt.

        A result has `text`, `output_ids` and `meta_info`: id, prompt_tokens, cached_tokens,
        completion_tokens, finish_reason and, with return_logprob, output_token_logprobs: (log-probability, token id, None) for
        each token; where guesses were verified, spec_verify_ct, spec_num_correct_drafts, spec_num_proposed_drafts,
        spec_accept_rate and spec_accept_length; top_logprobs_num and token_ids_logprob add lists of others, logprob_start_len >=
        0 the same for the prompt from there on. Without `temperature` the answer is greedy (SGLang's own default is 1). `stop`,
        a string or several, ends an answer and is not part of it. `json_schema`, `regex` or `ebnf` says what the answer must be
        (grammar.py), with require_reasoning what must come after </think>; a grammar that cannot be compiled ends its own
        request, with finish_reason abort and status_code 400. With `stream` an iterator comes back: of each answer that has
        grown, all it has so far, and `index`, which of the answers it is; on ranks other than 0 only the whole answers, at the
        end. Who leaves the iterator early ends what still runs. bootstrap_room: for half an engine, with where the prefill half
        listens (handoff.py). image_data: the pictures that the prompt has places for, each a path, bytes, a PIL image, a data:
        URL or base64 (images/). lora_path: name of an adapter, or one for each prompt, None for the base. Nothing runs if any
        prompt or parameter is refused (ValueError).
        """
        logprobs = LogprobOptions.of(return_logprob, logprob_start_len, top_logprobs_num, token_ids_logprob)
        handoff = Handoff.of(self.disaggregation_mode, bootstrap_host, bootstrap_port, bootstrap_room)
        own = (
            rid, extra_key, priority, routing_key, require_reasoning, handoff, image_data, lora_path, self.enable_lora,
            self.server_args.one_seed,
        )  # fmt: skip
        call = GenerateCall.of(self._intake_of("generate"), prompt, input_ids, sampling_params, logprobs, *own)
        return self._answers(call, flag("stream", stream))

    @asked
    async def async_generate(
        self, prompt: str | Sequence[str] | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None, return_logprob: bool = False,
        logprob_start_len: int | None = None, top_logprobs_num: int | None = None,
        token_ids_logprob: Sequence[int] | None = None, stream: bool = False, *, rid: str | Sequence[str] | None = None,
        extra_key: str | None = None, priority: int = 0, routing_key: str | None = None, require_reasoning: bool = False,
        bootstrap_host: str | None = None, bootstrap_port: int | None = None, bootstrap_room: int | None = None,
        image_data: Any = None, lora_path: str | Sequence[str | None] | None = None,
    ) -> Answer | list[Answer] | AsyncIterator[Answer]:  # fmt: skip
        """`generate` for many callers at once: their requests run together. With `stream`, an async iterator.

        Of several ranks rank 0 calls it; the others are in `follow`. A caller that is cancelled has its requests aborted.
        """
        logprobs = LogprobOptions.of(return_logprob, logprob_start_len, top_logprobs_num, token_ids_logprob)
        handoff = Handoff.of(self.disaggregation_mode, bootstrap_host, bootstrap_port, bootstrap_room)
        own = (
            rid, extra_key, priority, routing_key, require_reasoning, handoff, image_data, lora_path, self.enable_lora,
            self.server_args.one_seed,
        )  # fmt: skip
        call = GenerateCall.of(self._intake_of("async_generate"), prompt, input_ids, sampling_params, logprobs, *own)
        return await self._async_answers(call, flag("stream", stream))

    @abstractmethod
    def _intake_of(self, method: str) -> Intake:
        """What looks at a prompt. Raises ValueError on a rank that may not call `method`."""

    @abstractmethod
    def _answers(self, call: GenerateCall, stream: bool) -> Answer | list[Answer] | Iterator[Answer]: ...

    @abstractmethod
    async def _async_answers(
        self, call: GenerateCall, stream: bool
    ) -> Answer | list[Answer] | AsyncIterator[Answer]: ...
