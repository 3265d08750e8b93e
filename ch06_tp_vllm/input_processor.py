"""What a user asks for -> requests that can run, or one ValueError before anything is queued.

vLLM: v1/engine/input_processor.py. What is the same for both engines is common/request/intake.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ch06_tp_vllm.request import Request
from ch06_tp_vllm.sampling_params import SamplingParams
from common.arguments import refuse_unknown
from common.models.config import ModelConfig
from common.request.intake import NO_TOKENIZER, Intake, Words
from common.sampling.batch import derived_seed
from common.sampling.grammar import GrammarCompiler, GrammarMask
from common.sampling.params import SamplingParams as RowParams
from common.text.answer import AnswerText
from common.values import shown, text

Prompt = str | Sequence[int] | dict[str, Any]  # {"prompt": text} or {"prompt_token_ids": ids}, with a cache_salt or not

WORDS = Words("max_tokens", "prompt_token_ids", "num_gpu_blocks_override")
PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
ELSEWHERE = {
    "multi_modal_data": "this engine reads text only",
    "prompt_embeds": "this engine takes text or token ids",
    "mm_processor_kwargs": "this engine reads text only",
}


class InputProcessor:
    """seed: the engine's, for requests that bring none. step_limit: tokens of a step, if a prompt must fit into one."""

    def __init__(self, intake: Intake, config: ModelConfig, seed: int, step_limit: int | None):
        self.intake, self.config, self.seed, self.step_limit = intake, config, seed, step_limit
        tokenizer = intake.tokenizer
        self._compiler = tokenizer and GrammarCompiler(tokenizer.inner, config.vocab_size, config.eos_token_ids)

    def read(self, prompt: Prompt) -> tuple[str | None, list[int], str | None]:
        """A prompt in any of its forms -> (its text, if it came as one, token ids, cache_salt)."""
        salt = None
        if isinstance(prompt, Mapping):
            refuse_unknown("prompt key", list(prompt), PROMPT_KEYS, ELSEWHERE)
            salt = self.salt(prompt.get("cache_salt"))
            given = [key for key in PROMPT_KEYS[:2] if prompt.get(key) is not None]
            if len(given) != 1:
                raise ValueError(
                    f"a prompt has 'prompt' or 'prompt_token_ids', this one has {sorted(map(str, prompt))}"
                )
            (key,) = given
            prompt = prompt[key]
            if (key == "prompt") != isinstance(prompt, str):
                raise ValueError(
                    f"{key!r} holds {shown(prompt)}; a text goes into 'prompt', token ids into 'prompt_token_ids'"
                )
        return prompt if isinstance(prompt, str) else None, self.intake.ids(prompt), salt

    @staticmethod
    def salt(value: Any) -> str | None:
        return Intake.namespace("cache_salt", value)

    def check(self, ids: Sequence[int], params: SamplingParams) -> RowParams:
        """How each of its answers is drawn. Raises ValueError for a request that could never come to its end."""
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params={shown(params)} must be a SamplingParams")
        if not ids:
            raise ValueError("the prompt is empty: there is no token to continue from")
        self.intake.stops(params.stop)
        if params.bad_words and self.intake.tokenizer is None:
            raise ValueError(f"{NO_TOKENIZER}, so bad_words are no tokens; use logit_bias")
        row = params.row(self.max_tokens(ids, params), self.intake.tokenizer)
        self.intake.fits(ids, row)
        self._grammar(row)
        total = len(ids) + row.max_new_tokens
        if self.step_limit is not None and total > self.step_limit:
            raise ValueError(
                f"prompt {len(ids)} + max_tokens {row.max_new_tokens} = {total} tokens, but without chunked prefill a step "
                f"holds max_num_batched_tokens={self.step_limit}"
            )
        return row

    def max_tokens(self, ids: Sequence[int], params: SamplingParams) -> int:
        """Of the answer: as many as fit, if the user does not say."""
        room = self.intake.room_for(ids)
        if self.step_limit is not None:
            room = max(1, min(room, self.step_limit - len(ids)))
        return room if params.max_tokens is None else params.max_tokens

    def requests(
        self, request_id: str, ids: list[int], params: SamplingParams, row: RowParams, priority: int, salt: str | None, first: int,
        adapter: int = 0,
    ) -> list[Request]:  # fmt: skip
        """The n requests of a prompt; `first` is the number of the first of them since the engine was made. row: from `check`.
        adapter: 0 for none."""
        ends = frozenset(row.stop_token_ids + self.config.eos_token_ids)
        stops = frozenset(row.stop_token_ids) if row.ignore_eos else ends
        if row.grammar:  # behind the end of what it allows nothing may follow
            ends = stops = ends.union(self._compiler.end_ids)
        requests: list[Request] = []
        for i in range(params.n):
            seed = derived_seed(self.seed, first + i) if row.seed is None else row.seed + i
            words = AnswerText(
                self.intake.tokenizer if params.detokenize else None, ids, stop=params.stop,
                include_stop=params.include_stop_str_in_output, not_before=params.min_tokens,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )  # fmt: skip
            requests.append(
                Request(
                    request_id, i, ids, row, seed, priority, first + i, salt, adapter, stops=stops, text=words, held_back=ends,
                    grammar=self._grammar(row),
                )
            )  # fmt: skip
        return requests

    def _grammar(self, row: RowParams) -> GrammarMask | None:
        """Waits until it is compiled, so that a bad one is refused here. vLLM queues the request and compiles meanwhile
        (v1/structured_output/, StructuredOutputManager.grammar_init).
        """
        if row.grammar is None:
            return None
        return self._compiler.mask(self._compiler.compiled(*row.grammar), row.after_thinking)


def check_name(request_id: Any) -> str:
    return text("request_id", request_id, empty=False)
