"""Rank 0's guesser NGRAM: what all requests have said so far, in one trie (ngram_trie.py).

It reads each request's new tokens when it is asked to guess for it: at first the whole prompt, later what the last step brought. So
a text that quotes its prompt is guessed from the prompt, and a question that was asked before is answered from that answer.
"""

from collections.abc import Sequence

import numpy as np

from ch07_sglang_radix.request import Req
from ch07_sglang_radix.speculative.ngram_trie import NgramTrie, Place


class NgramWorker:
    def __init__(self, trie: NgramTrie):
        self.trie = trie
        self._places: dict[Req, tuple[Place, int]] = {}  # of a request, and how many of its tokens have been read

    def forget(self) -> None:
        """All that was read. Nobody runs now."""
        self._places.clear()
        self.trie.forget()

    def guess(self, reqs: Sequence[Req], nodes: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each request nodes - 1 guesses [B, N - 1], and the nodes that they stand below, 0 being its last token.

        What is missing is token 0 below the root. A probe is no text: it is neither read nor guessed for.
        """
        for req in [req for req in self._places if req.ended]:
            self._read(req)  # its last tokens: they are how such an answer ends
            del self._places[req]
        tokens = np.zeros((len(reqs), nodes - 1), dtype=np.int64)
        parents = np.zeros_like(tokens)
        for i, req in enumerate(reqs):
            if req.probe:
                continue
            found = self.trie.guess(self._read(req), nodes - 1)
            tokens[i, : len(found.tokens)] = found.tokens
            parents[i, : len(found.parents)] = found.parents
        return tokens, parents

    def _read(self, req: Req) -> Place:
        """What is new of it -> where it stands now."""
        place, read = self._places.get(req) or (Place(req.extra_key), 0)
        ids = req.all_ids
        self.trie.read(place, ids[read:].tolist())
        self._places[req] = place, len(ids)
        return place
