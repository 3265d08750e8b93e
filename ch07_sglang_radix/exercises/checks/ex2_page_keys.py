import random
from types import ModuleType

import numpy as np

from ch07_sglang_radix.memory_pool import TokenToKVPool
from ch07_sglang_radix.radix_cache import RadixCache
from common.teaching.expect import ask, expect


def check(m: ModuleType) -> None:
    def ids(*tokens: int) -> np.ndarray:
        return np.array(tokens, dtype=np.int64)

    for n, page_size, want in ((7, 4, 4), (8, 4, 8), (3, 4, 0), (5, 1, 5), (0, 2, 0)):
        got = ask(m.aligned, np.arange(n), page_size)
        expect(f"aligned: of 0 .. {n - 1} these are kept with pages of {page_size}", got, list(range(want)))
    for a, b, page_size, want in (
        (ids(1, 2, 3, 4), ids(1, 2, 3, 5), 4, False),
        (ids(1, 2, 3, 4), ids(1, 2, 9, 9), 2, True),
        (ids(1, 2, 3, 4), ids(1, 3, 3, 4), 2, False),
        (ids(1, 2), ids(2, 1), 2, False),
        (ids(1, 23), ids(12, 3), 2, False),
        (ids(1, 4), ids(2, 3), 2, False),
        (ids(1, 1), ids(2, 2), 2, False),
        (ids(7), ids(7, 8), 1, True),
        (ids(5, 0, 1, 2), ids(5, 0), 2, True),
    ):
        keys = [ask(m.child_key, one, page_size) for one in (a, b)]
        for key in keys:
            ask(hash, key, why="a child_key that can be a key of a dict")
        same = bool(keys[0] == keys[1])
        expect(f"do {a.tolist()} and {b.tolist()} have the same child_key with pages of {page_size}", same, want)
    for a, b, page_size, want in (
        (ids(1, 2, 3, 4), ids(1, 2, 3, 9), 1, 3),
        (ids(1, 2, 3, 4), ids(1, 2, 3, 9), 2, 2),
        (ids(1, 2, 3, 4), ids(1, 9, 3, 4), 2, 0),
        (ids(1, 2, 3, 4, 5, 6), ids(1, 2, 3, 4), 2, 4),
        (ids(1, 2, 5, 5, 3, 4), ids(1, 2, 6, 6, 3, 4), 2, 2),
        (ids(1, 2), ids(1, 2), 2, 2),
        (ids(1, 2), ids(3, 2), 1, 0),
    ):
        got = ask(m.common_length, a, b, page_size)
        expect(f"tokens that {a.tolist()} and {b.tolist()} share with pages of {page_size}", got, want)
    _check_in_the_tree(m)


def _check_in_the_tree(m: ModuleType) -> None:
    class Tree(RadixCache):
        def key(self, ids):
            return m.aligned(np.asarray(ids, dtype=np.int64), self.page_size)

        def child_key(self, key):
            return m.child_key(key, self.page_size)

        def _common_length(self, a, b):
            n = int(m.common_length(a, b, self.page_size))
            # a length of 0 would be split for ever
            assert n >= self.page_size, (
                f"child_key finds {a.tolist()} for {b.tolist()}: got common_length {n}, wanted a page at least"
            )
            return n

    rng = random.Random(0)
    for page_size in (1, 2, 4):
        tree, content = Tree(TokenToKVPool(page_size=page_size)), {}
        for i in range(60):
            tokens = [rng.randrange(2) for _ in range(rng.randint(0, 14))]
            pages = [tuple(tokens[:n]) for n in range(page_size, len(tokens) + 1, page_size)]
            known = tree.insert(tokens, 100 * i + np.arange(len(tokens)))
            want = page_size * sum(page in content for page in pages)
            expect(f"the real tree, pages of {page_size}: tokens of {tokens} that were there", known, want)
            for page in pages:
                start = 100 * i + len(page) - page_size
                content.setdefault(page, list(range(start, start + page_size)))
            slots = tree.match_prefix(tokens).slots.tolist()
            want = [slot for page in pages for slot in content[page]]
            expect(f"the real tree, pages of {page_size}: slots of {tokens}", slots, want)
