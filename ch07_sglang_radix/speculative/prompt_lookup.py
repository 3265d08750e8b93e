"""Prompt lookup as a guesser: a chain for each request, out of its own tokens (common/request/prompt_lookup.py).

vLLM 0.11's method "ngram" (vllm/v1/spec_decode/ngram_proposer.py). SGLang's NGRAM keeps a trie over all requests.
"""

from collections.abc import Sequence

import numpy as np

from ch07_sglang_radix.request import Req
from common.request.prompt_lookup import continuation


class PromptLookup:
    """longest, shortest: of the last tokens so many are looked for, the longest match first. A chain for each request."""

    def __init__(self, longest: int = 3, shortest: int = 1):
        self.longest, self.shortest = longest, shortest

    def guess(self, reqs: Sequence[Req], nodes: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.zeros((len(reqs), nodes - 1), dtype=np.int64)  # 0 where nothing is known: a guess like any other
        for own, req in zip(tokens, reqs, strict=True):
            found = continuation(req.all_ids, nodes - 1, self.longest, self.shortest)
            own[: len(found)] = found
        return tokens, np.broadcast_to(np.arange(nodes - 1), tokens.shape)
