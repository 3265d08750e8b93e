"""A tokenizer manager without an engine: it says given texts, token by token, and remembers what it was asked."""

import asyncio

from ch07_sglang_radix.scheduler import WORDS
from ch07_sglang_radix.serving.http_args import HttpArgs
from ch07_sglang_radix.serving.io_struct import GenerateRequest, RequestError
from common.request.intake import Intake
from common.text.detokenizer import IncrementalDetokenizer
from common.text.tokenizer import Tokenizer
from common.tiny_qwen import TINY_QWEN_PATH

ROOM = 77


class FakeManager:
    """texts: of the answers, in turn. finish: of each. refusal: raised before the first answer. pause: seconds a token takes.

    requests: all that came; running: answers whose iterator is open.
    """

    state = "ready"

    def __init__(self, *texts: str, tokenizer: Tokenizer | None = None, **args):
        self.texts = texts or ("Hello there.",)
        self.tokenizer = tokenizer or Tokenizer(TINY_QWEN_PATH)
        self.args = HttpArgs(served_model_name="fake", **args)
        self.finish: dict | None = None
        self.refusal: RequestError | None = None
        self.pause = 0.0
        self.on_event: dict = {}  # nothing happens here
        self.requests: list[GenerateRequest] = []
        self.running = 0

    @property
    def asked(self) -> GenerateRequest:
        """The last request."""
        return self.requests[-1]

    async def model_info(self):
        return {"served_model_name": "fake", "max_model_len": 100}

    @property
    def intake(self):
        return Intake(self.tokenizer, 1, 1, 1, 1, WORDS)

    def room_for(self, ids, session=None):
        return ROOM

    async def generate(self, request: GenerateRequest, is_disconnected=None):
        self.requests.append(request)
        if self.refusal:
            raise self.refusal
        prompts = self._prompts(request)
        params = request.sampling_params
        count = len(prompts) * params.get("n", 1)
        self.running += 1
        try:
            streams = [self._answers(request, prompts[i * len(prompts) // count], i) for i in range(count)]
            while streams:
                for stream in list(streams):
                    answer = next(stream, None)
                    if answer is None:
                        streams.remove(stream)
                    elif request.stream or answer["meta_info"]["finish_reason"]:
                        await asyncio.sleep(self.pause)
                        yield answer
        finally:
            self.running -= 1

    def _prompts(self, request):
        if request.input_ids is not None:
            several = isinstance(request.input_ids[0], list)
            return request.input_ids if several else [request.input_ids]
        texts = [request.text] if isinstance(request.text, str) else request.text
        return [self.tokenizer.encode(text) for text in texts]

    def _answers(self, request, prompt, index):
        eos = self.tokenizer.hf.eos_token_id
        ids = [*self.tokenizer.encode_bare(self.texts[index % len(self.texts)]), eos]
        detokenizer, text = IncrementalDetokenizer(self.tokenizer, prompt), ""
        for n in range(1, len(ids) + 1):
            ended = n == len(ids)
            text += detokenizer.finish() if ended else detokenizer.add(ids[n - 1])
            meta = {
                "id": request.rid, "prompt_tokens": len(prompt), "completion_tokens": n, "cached_tokens": len(prompt) // 2,
                "finish_reason": (self.finish or {"type": "stop", "matched": eos}) if ended else None,
            }  # fmt: skip
            if request.return_logprob:
                meta |= self._logprobs("output", ids[:n], request.top_logprobs_num)
                if request.logprob_start_len == 0:
                    meta |= self._logprobs("input", prompt, request.top_logprobs_num)
            yield {"text": text, "output_ids": ids[:n], "meta_info": meta, "index": index}

    @staticmethod
    def _logprobs(which, ids, top):
        first = which == "input"
        lists = {f"{which}_token_logprobs": [(None if first and not i else -i / 8, t, None) for i, t in enumerate(ids)]}
        if top:
            best = [(-i / 8, i, None) for i in range(top)]
            lists[f"{which}_top_logprobs"] = [None if first and not i else best for i in range(len(ids))]
        return lists
