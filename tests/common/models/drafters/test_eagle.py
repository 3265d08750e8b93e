"""EAGLE drafters against a dense layer: prefill by parts and behind a found prefix, verify and plain steps, a row used again."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from common.models.drafters.contract import DraftOptions
from common.parallel_state import get_tensor_parallel
from tests.common.models.drafters.eagle_files import save_head
from tests.common.models.drafters.eagle_reference import Reference

ENTERING = {1: (), 3: (2, 1, 0)}  # (2, L/2, L-3) of the three layers of the checkpoints here
NAMES = {1: "EAGLE", 3: "EAGLE3"}


class Drafted(NamedTuple):
    tokens: list[int]  # of the sequence, the root the last one
    tree: list[tuple[int, ...]]  # the path to each node
    guesses: dict[tuple[int, ...], list[float]]  # by path of the nodes that ran: the head's feature


def paths_of(tokens: list[int], parents: list[int]) -> list[tuple[int, ...]]:
    paths = [()]
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        paths.append((*paths[parent], token))
    return paths


def write(folder, head, version, options, page_size, turns, levels="copied") -> list[Drafted]:
    """Three sequences are read in parts and go on by `turns`: numbers of nodes, 1 a plain decode step. Runs on every rank."""
    from common.executor import Executor  # noqa: PLC0415, in the child only
    from common.models.drafters import eagle  # noqa: PLC0415

    if levels != "copied":  # over any backend, as on a GPU
        eagle.CopiedLevels, kept = None, eagle.CopiedLevels
        eagle.TorchNativeAttention, native = object, eagle.TorchNativeAttention
    steps, topk, nodes = options
    try:
        executor = Executor(
            str(folder), "cpu", page_size, tp=get_tensor_parallel("cpu"), max_total_tokens=512, max_running_requests=4,
            skip_tokenizer_init=True, speculative=DraftOptions(NAMES[version], str(head), steps, topk, nodes),
        )  # fmt: skip
        if levels == "triton":
            from common.kernels.paged_attention import TritonAttention  # noqa: PLC0415

            drafter = executor.verifier.drafter
            drafter.target = replace(drafter.target, attention=TritonAttention)
        return _write(executor, version, page_size, turns)
    finally:
        if levels != "copied":
            eagle.CopiedLevels, eagle.TorchNativeAttention = kept, native


def _write(executor, version, page_size, turns) -> list[Drafted]:
    drafter, drafted = executor.verifier.drafter, []
    run, guessed = drafter._run, []
    drafter._run = lambda *args: guessed.append(run(*args)) or guessed[-1]
    rng = np.random.default_rng(3)
    pages = rng.permutation(512 // page_size)
    each = len(pages) // 4
    rows, found = np.array([2, 0, 1]), 4  # the third one begins with the first one's pages
    texts = {}
    for row in rows:
        executor.table.set_pages([(row, 0, pages[row * each : (row + 1) * each])])
    executor.table.set_pages([(1, 0, pages[2 * each : 2 * each + found // page_size])])
    # another request has had row 2 before: what waits of it is forgotten
    old = rng.integers(0, 1009, 9)
    executor.ragged(old, rows[:1], np.zeros(1, int), np.array([9]), np.zeros(1, int))
    for row, length in ((2, 11), (0, 7)):
        texts[row] = rng.integers(0, 1009, length).tolist()
    texts[1] = texts[2][: found + 1] + rng.integers(0, 1009, 3).tolist()  # the same token behind it: bigrams are found
    cached = np.array([0, 0, found])
    for part in ((4, 1, 0), (1, 3, 0), (6, 3, 4)):
        new = np.array(part)
        ids = np.concatenate([texts[row][c : c + n] for row, c, n in zip(rows, cached, new, strict=True) if n])
        last = cached + new == [len(texts[row]) for row in rows]
        some = new > 0
        executor.ragged(ids, rows[some], cached[some], new[some], last[some].astype(int))
        cached = cached + new
    assert last.all()
    drawn = rng.integers(0, 1009, 3)
    executor.receive_tokens(torch.from_numpy(drawn))
    for row, token in zip(rows.tolist(), drawn.tolist(), strict=True):
        texts[row].append(token)
    for nodes in turns:
        positions = np.array([len(texts[row]) - 1 for row in rows])
        guessed.clear()
        # pages behind those that a step has room in are another's: whoever writes there spoils the first sequence
        reached = [-(-(p + nodes) // page_size) for p in positions.tolist()]
        executor.table.set_pages([(r, n, [pages[2 * each]] * (each - n)) for r, n in zip(rows, reached, strict=True)])
        if nodes == 1:
            executor.decode(rows, positions)
        else:
            executor.verify(rows, positions, nodes)
        tree = executor.verifier.waiting.tree
        assert torch.equal(tree.tokens[:, 0], torch.tensor([texts[row][-1] for row in rows]))
        paths = [paths_of(t, p) for t, p in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True)]
        if nodes > 1:
            for b, row in enumerate(rows.tolist()):
                roots = [g[0].unflatten(0, (3, -1))[b] for g in guessed]  # by level [n, D]
                drafted.append(Drafted(list(texts[row]), paths[b], {(): roots[0][0].tolist()}))
                if drafter.chains:
                    for depth, out in enumerate(roots[1:], 1):
                        drafted[-1].guesses[paths[b][depth]] = out[0].tolist()
        # the first sequence goes down the tree as far as it leads, the second one step, the third nowhere
        drawn = torch.from_numpy(rng.integers(0, 1009, (3, nodes)))
        for b, most in ((0, nodes), (1, 1)):
            deepest = max(range(nodes), key=lambda i: len(paths[b][i]))
            for i, token in zip(range(nodes), paths[b][deepest][:most], strict=False):
                drawn[b, paths[b].index(paths[b][deepest][:i])] = token
        executor.receive_tokens(drawn.flatten())
        for row, n in zip(rows.tolist(), reached, strict=True):
            executor.table.set_pages([(row, n, pages[row * each + n : (row + 1) * each])])
        accepted = executor.verifier.accepted
        for b, row in enumerate(rows.tolist()):
            texts[row] += accepted.tokens[b, : accepted.counts[b]].tolist()
    return drafted


def compare(drafted: list[Drafted], reference: Reference, options) -> None:
    steps, topk, nodes = options
    assert drafted
    for one in drafted:
        for path, feature in one.guesses.items():
            expected, _ = reference.guess(one.tokens, list(path))
            torch.testing.assert_close(torch.tensor(feature), expected, rtol=1e-3, atol=2e-4)
        wanted = reference.tree(one.tokens, min(steps, nodes - 1), topk, nodes)
        assert set(one.tree[1:]) == set(wanted)


TURNS = (1, 6, 6, 1, 1, 6)
CASES = {"chain": (5, 1, 6), "tree": (3, 3, 6), "more nodes run than fit": (4, 4, 6)}


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("version", [1, 3])
@pytest.mark.parametrize("levels", ["copied", "paged"])
def test_every_guess_is_that_of_a_dense_layer(checkpoint, tmp_path, version, options, page_size, levels):
    target = checkpoint("qwen2")
    head = save_head(tmp_path / "head", version, target)
    drafted = write(target, head, version, options, page_size, TURNS, levels)
    compare(drafted, Reference(head, target, version, ENTERING[version]), options)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_kernels_compute_its_levels(checkpoint, tmp_path, options):
    pytest.importorskip("triton")
    target = checkpoint("qwen2")
    head = save_head(tmp_path / "head", 3, target)
    compare(write(target, head, 3, options, 4, TURNS[:3], "triton"), Reference(head, target, 3, ENTERING[3]), options)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("version", [1, 3])
def test_every_rank_grows_the_same_tree(checkpoint, tmp_path, ranks, version, size):
    target, options = checkpoint("qwen2"), CASES["tree"]
    head = save_head(tmp_path / "head", version, target)
    first, *others = ranks(size).run(write, target, head, version, options, 4, TURNS)
    for other in others:
        assert [(d.tokens, d.tree) for d in other] == [(d.tokens, d.tree) for d in first]
    compare(first, Reference(head, target, version, ENTERING[version]), options)
