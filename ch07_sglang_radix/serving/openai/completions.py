"""/v1/completions: a text, or several, continued as it stands."""

from codecs import getincrementaldecoder
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import Request, Response

from ch07_sglang_radix.serving.io_struct import Answer, GenerateRequest
from ch07_sglang_radix.serving.openai.answering import (
    Choice,
    check_model,
    ending,
    head,
    new_id,
    respond,
    token_name,
    tokenizer_of,
)  # fmt: skip
from ch07_sglang_radix.serving.openai.errors import APIError
from ch07_sglang_radix.serving.openai.protocol import (
    TO_SGLANG,
    CompletionBody,
    namespace,
    one_constraint,
    read,
    sampling_params,
)  # fmt: skip
from ch07_sglang_radix.serving.tokenizer_manager import TokenizerManager
from common.text.tokenizer import Tokenizer

MAX_TOKENS = 16  # OpenAI's default

Logprob = Sequence[Any]  # (log-probability or None, token id, text or None)


async def completions(manager: TokenizerManager, http: Request) -> Response:
    body = read(await http.body(), CompletionBody)
    model, adapter = await check_model(manager, body)
    tokenizer = tokenizer_of(manager)
    prompts, are_ids = _prompts(body.prompt)
    n = body.n or 1
    if body.best_of not in (None, n):
        raise APIError(f"best_of={body.best_of} is not supported: all n={n} answers come back", "best_of")
    one_constraint({"json_schema": body.json_schema, "regex": body.regex, "ebnf": body.ebnf})
    params = sampling_params(body) | {"max_new_tokens": body.max_tokens or MAX_TOKENS}
    if body.json_schema is not None:
        params["json_schema"] = body.json_schema
    rid = body.rid or new_id("cmpl-")
    single = len(prompts) == 1
    given = prompts[0] if single else prompts
    request = GenerateRequest(
        **{"input_ids" if are_ids else "text": given}, sampling_params=params, stream=bool(body.stream),
        rid=rid if single else [f"{rid}_{i}" for i in range(len(prompts))], return_logprob=body.logprobs is not None,
        logprob_start_len=0 if body.echo and body.logprobs is not None else None, top_logprobs_num=body.logprobs,
        extra_key=namespace(body), priority=body.priority or 0, routing_key=body.user, session_params=body.session_params,
        lora_path=adapter, **body.handoff,
    )  # fmt: skip

    def echoed(i: int) -> str:
        """Asked for with the first answer: only then it is known that these are token ids."""
        return "" if not body.echo else tokenizer.decode(prompts[i]) if are_ids else prompts[i]

    return await respond(manager, request, body, CompletionReply(rid, model, n, tokenizer, echoed), http)


def _prompts(prompt: str | list[str | int | list[int]]) -> tuple[list[Any], bool]:
    """(prompts one by one, whether they are token ids)."""
    if isinstance(prompt, str):
        return [prompt], False
    kinds = {type(one) for one in prompt}
    if len(kinds) != 1:
        what = "is empty" if not kinds else "mixes texts and token ids"
        raise APIError(f"prompt {what}; give a text, several texts, token ids, or several lists of them", "prompt")
    return ([prompt], True) if kinds == {int} else (prompt, kinds == {list})


class CompletionReply:
    """echoed(i): the text that comes before the answers of prompt i."""

    renamed = {value: key for key, value in TO_SGLANG.items()} | {
        "max_new_tokens": "max_tokens", "top_logprobs_num": "logprobs", "input_ids": "prompt",
    }  # fmt: skip

    def __init__(self, rid: str, model: str, n: int, tokenizer: Tokenizer, echoed: Callable[[int], str]):
        self.head, self.n = head(rid, "text_completion", model), n
        self._tokenizer, self._echoed = tokenizer, echoed
        self._shown: dict[int, tuple[int, TokenList]] = {}  # of a stream: characters, tokens

    def whole(self, answer: Answer) -> Choice:
        return self._choice(answer, 0, TokenList(self._tokenizer))

    def chunks(self, answer: Answer) -> list[Choice]:
        index, finish = answer["index"], answer["meta_info"]["finish_reason"]
        begun = index in self._shown
        shown, tokens = self._shown.get(index) or (0, TokenList(self._tokenizer))
        if begun and len(answer["text"]) == shown and not finish:
            return []  # its new tokens wait for the text that they are part of
        self._shown[index] = len(answer["text"]), tokens
        return [self._choice(answer, shown, tokens, echo=not begun)]

    def _choice(self, answer: Answer, shown: int, tokens: "TokenList", echo: bool = True) -> Choice:
        meta, index = answer["meta_info"], answer["index"]
        before = self._echoed(index // self.n) if echo else ""
        finish = meta["finish_reason"]
        return {
            "index": index, "text": before + answer["text"][shown:], "logprobs": tokens.new(meta),
            **(ending(finish) if finish else {"finish_reason": None}),
        }  # fmt: skip


class TokenList:
    """OpenAI's lists, one item a token: the prompt's first if they were asked for, and each token once."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._told = 0
        self._characters = 0
        self._text = getincrementaldecoder("utf-8")(errors="replace")

    def new(self, meta: dict[str, Any]) -> dict[str, list[Any]] | None:
        if "output_token_logprobs" not in meta:
            return None
        tokens = self._of(meta, "token_logprobs")[self._told :]
        tops = self._of(meta, "top_logprobs")[self._told :]
        self._told += len(tokens)
        return {
            "tokens": [token_name(self._tokenizer, token) for _, token, _ in tokens],
            "token_logprobs": [logprob for logprob, _, _ in tokens],
            "top_logprobs": [
                {token_name(self._tokenizer, token): p for p, token, _ in top or ()} or None for top in tops
            ],
            "text_offset": [self._offset(token) for _, token, _ in tokens],
        }

    @staticmethod
    def _of(meta: dict[str, Any], what: str) -> list[Any]:
        return [*meta.get(f"input_{what}", ()), *meta.get(f"output_{what}", ())]

    def _offset(self, token: int) -> int:
        """Where it begins, in characters; SGLang says -1."""
        before = self._characters
        self._characters += len(self._text.decode(self._tokenizer.token_bytes(token)))
        return before
