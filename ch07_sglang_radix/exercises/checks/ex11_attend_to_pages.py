from types import ModuleType

import numpy as np
import torch

from ch07_sglang_radix.exercises.checks.engines import an_engine, answers, same, some_prompts
from common.attention.torch_native import TorchNativeAttention
from common.teaching.expect import ask, expect


def check(m: ModuleType) -> None:
    for what, hq, hkv, page_size, length, width in (
        ("one page, full", 2, 2, 4, 4, 1),
        ("two pages, the last one not full", 2, 2, 4, 6, 2),
        ("one token", 4, 2, 4, 1, 1),
        ("a row of the page table that is wider than the sequence", 2, 1, 4, 5, 6),
        ("query heads 0 1 2 share KV head 0, 3 4 5 share 1", 6, 2, 2, 7, 5),
        ("pages of one token", 4, 4, 1, 9, 9),
        ("a long sequence", 4, 2, 16, 100, 8),
    ):
        rng = np.random.default_rng(length)
        q, tokens = rng.normal(size=(hq, 8)), rng.normal(size=(2, length, hkv, 8))
        k, v, pages = _scattered(tokens, page_size, width, rng)
        given = q.copy(), k.copy(), v.copy(), pages.copy()
        got = np.asarray(ask(m.attend, q, k, v, pages, length, why=f"{what}: numbers of shape {[hq, 8]}"))
        said = f"{what} (Hq={hq}, Hkv={hkv}, P={page_size}, length {length}, pages {pages.tolist()})"
        expect(f"{said}: shape", got.shape, (hq, 8))
        expect(f"{said}: numbers that are NaN", int(np.isnan(got).sum()), 0)
        off = np.abs(got - dense(q, *tokens)).max(axis=1)
        expect(f"{said}: heads that are not softmax(q k^T / sqrt(d)) v", np.flatnonzero(off > 1e-6), [])
        unchanged = all(map(lambda a, b: np.array_equal(a, b, equal_nan=True), (q, k, v, pages), given))
        expect(f"{said}: are the arguments as they were", unchanged, True)
    _check_in_the_engine(m)


def dense(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """q [Hq, d], k and v [S, Hkv, d], head by head."""
    group, out = len(q) // k.shape[1], []
    for head, one in enumerate(q):
        scores = k[:, head // group] @ one / np.sqrt(len(one))
        weights = np.exp(scores - scores.max())
        out.append(weights @ v[:, head // group] / weights.sum())
    return np.array(out)


def _scattered(tokens: np.ndarray, page_size: int, width: int, rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pages in no order, and never two that ascend; NaN wherever no token of the sequence lies, -1 and another's page behind
    its last."""
    length = tokens.shape[1]
    used = -(-length // page_size)
    order = rng.permutation(used + 3)
    if used == 2 and order[0] < order[1]:
        order[:2] = order[1::-1]
    pages = np.full(width, -1, dtype=np.int64)
    pages[:used] = order[:used]
    pages[used : used + 1] = order[used]
    kv = np.full((2, used + 3, page_size, *tokens.shape[2:]), np.nan)
    for i in range(length):
        kv[:, pages[i // page_size], i % page_size] = tokens[:, i]
    return kv[0], kv[1], pages


def _check_in_the_engine(m: ModuleType) -> None:
    class Attention(TorchNativeAttention):
        """Decode steps by the answer, prefill as ever."""

        def __init__(self, cache, meta):
            super().__init__(cache, meta)
            self.rows = list(zip(meta.page_table.numpy(), meta.context_lens.tolist(), strict=True))

        def __call__(self, layer, q, k, v):
            if len(q) != len(self.rows):
                return super().__call__(layer, q, k, v)
            self.cache.write(layer, self.slots, k, v)
            pool = self.cache.k[layer].numpy(), self.cache.v[layer].numpy()
            heads = [m.attend(one.numpy(), *pool, *row) for one, row in zip(q, self.rows, strict=True)]
            return torch.from_numpy(np.stack(heads).astype(np.float32))

    prompts = some_prompts(3, 9)
    want = answers(an_engine(), prompts, 8)
    engine = an_engine()
    engine.wrapper.attention = Attention
    same(answers(engine, prompts, 8), want)
