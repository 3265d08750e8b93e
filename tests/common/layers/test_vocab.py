import pytest
import torch

from common.layers import vocab
from common.layers.vocab import (
    ParallelLMHead,
    VocabParallelEmbedding,
    best_logprobs,
    first_best,
    gather_best_logits,
    gather_logits,
)
from common.parallel_state import TPGroup, get_tensor_parallel
from tests.common.in_memory import InMemory

V, D = 11, 6  # 11 rows: neither 2 nor 3 ranks divide it
IDS = [*reversed(range(V)), 0, V - 1, 5, 5]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def both_ends(tied):
    """On a real rank: the embeddings of all ids, the logits that rank 0 gets, and every message."""
    tp = get_tensor_parallel()
    embedding = VocabParallelEmbedding(V, D, tp)
    embedding.weight.weight_loader(InMemory(random(V, D)))
    head = ParallelLMHead(V, D, tp, tied_to=embedding if tied else None)
    if not tied:
        head.weight.weight_loader(InMemory(random(V, D, seed=1)))
    with tp.ledger.recording() as ledger:
        x = embedding(torch.tensor(IDS))
        local = head(x)
        logits = gather_logits(local, V, tp)
    messages = [(e.op, e.label, e.shape) for e in ledger.entries]
    return x.numpy(), tuple(local.shape), None if logits is None else logits.numpy(), messages


@pytest.fixture(scope="module", params=[1, 2, 3], ids="R={}".format)
def answers(request, ranks):
    """{tied: what each of R ranks gave}"""
    if request.param == 1:
        return {tied: [both_ends(tied)] for tied in (False, True)}
    pool = ranks(request.param)
    return {tied: pool.run(both_ends, tied) for tied in (False, True)}


def test_every_rank_has_the_embedding_of_every_token(answers):
    for x, *_ in answers[False]:
        assert torch.equal(torch.from_numpy(x), random(V, D)[IDS])  # a row and zeros: nothing is rounded


@pytest.mark.parametrize("tied", [False, True])
def test_rank_0_gets_the_logits_of_the_whole_vocabulary(answers, tied):
    w = random(V, D, seed=0 if tied else 1)
    logits = torch.from_numpy(answers[tied][0][2])
    assert logits.shape == (len(IDS), V), "without the padding"
    torch.testing.assert_close(logits, random(V, D)[IDS] @ w.T)


def test_other_ranks_get_no_logits(answers):
    assert [logits is None for _, _, logits, _ in answers[False]] == [rank > 0 for rank in range(len(answers[False]))]


def test_each_rank_computes_its_share_of_the_logits(answers):
    assert {local for _, local, _, _ in answers[False]} == {(len(IDS), -(-V // len(answers[False])))}


def test_the_embedding_talks_once_and_the_logits_once(answers):
    share = -(-V // len(answers[False]))
    want = [("all_reduce", "embed_tokens", (len(IDS), D)), ("gather", "logits", (len(IDS), share))]
    for *_, messages in answers[False]:
        assert messages == (want if len(answers[False]) > 1 else [])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 16])
def test_together_the_ranks_read_every_row_once(ranks):
    source = InMemory(random(V, D))
    for rank in range(ranks):
        VocabParallelEmbedding(V, D, TPGroup(rank, ranks)).weight.weight_loader(source)
    assert source.times_read(0) == [1] * V


@pytest.fixture
def talk(monkeypatch):
    """Ranks that are called one after the other in this process: sums, and what was gathered, are made here."""
    gathered = []
    monkeypatch.setattr(vocab, "all_reduce", lambda x, tp, name: x)
    monkeypatch.setattr(vocab, "gather", lambda x, tp, name: gathered.append(x))
    return gathered


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, V])
def test_of_all_ranks_one_has_the_row_of_a_token(talk, ranks):
    rows = []
    for rank in range(ranks):
        embedding = VocabParallelEmbedding(V, D, TPGroup(rank, ranks))
        embedding.weight.weight_loader(InMemory(random(V, D)))
        rows.append(embedding(torch.tensor(IDS)))
    assert torch.equal(sum(rows), random(V, D)[IDS])
    assert all(sum(bool(row[i].any()) for row in rows) == 1 for i in range(len(IDS)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_logits_of_all_ranks_side_by_side_are_those_of_the_vocabulary(talk, monkeypatch, ranks, tied):
    x, w = random(5, D, seed=3), random(V, D, seed=0 if tied else 1)
    for rank in range(ranks):
        tp = TPGroup(rank, ranks)
        embedding = VocabParallelEmbedding(V, D, tp)
        embedding.weight.weight_loader(InMemory(random(V, D)))
        head = ParallelLMHead(V, D, tp, tied_to=embedding if tied else None)
        if not tied:
            head.weight.weight_loader(InMemory(w))
        assert head.tied == tied
        assert gather_logits(head(x), V, tp) is None
    monkeypatch.setattr(vocab, "gather", lambda x, tp, name: talk)
    logits = gather_logits(talk[0], V, TPGroup(0, ranks))
    torch.testing.assert_close(logits, x @ w.T)
    assert logits.shape == (5, V)


@pytest.mark.parametrize("best", [1, 2, 3, V])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_best_of_all_are_among_the_best_of_each(talk, monkeypatch, ranks, best):
    """Few different values: ties within a rank and between ranks; the padding would win."""
    local = -(-V // ranks)
    full = torch.randint(0, 4, (50, V), generator=torch.Generator().manual_seed(1)).float()
    padded = torch.full((50, local * ranks), 9.0)
    padded[:, :V] = full
    shares = padded.split(local, dim=1)
    if ranks == 1:
        assert torch.equal(gather_best_logits(padded, best, V, TPGroup()), full)
        return
    assert [gather_best_logits(own, best, V, TPGroup(rank, ranks)) for rank, own in enumerate(shares)] == [None] * ranks
    assert {tuple(pairs.shape) for pairs in talk} == {(50, min(best, local), 2)}
    monkeypatch.setattr(vocab, "gather", lambda x, tp, name: talk)
    few = gather_best_logits(shares[0], best, V, TPGroup(0, ranks))
    kept, at = first_best(full, best)
    assert torch.equal(few.gather(1, at), kept)
    assert torch.equal(few.argmax(-1), full.argmax(-1))


def best_of(best, dtype):
    """On a real rank: all logits, and the best ones only, as rank 0 gets them, and the bytes of both."""
    tp = get_tensor_parallel()
    local = -(-V // tp.size)
    # few different values, so that there are ties within a rank and between ranks; the padding would win
    full = torch.randint(0, 4, (50, V), generator=torch.Generator().manual_seed(1)).to(dtype)
    mine = torch.full((50, local * tp.size), 9.0, dtype=dtype)
    mine[:, :V] = full
    mine = mine[:, tp.rank * local : (tp.rank + 1) * local].contiguous()
    with tp.ledger.recording() as ledger:
        everything, few = gather_logits(mine, V, tp), gather_best_logits(mine, best, V, tp)
    sizes = [entry.bytes for entry in ledger.entries]
    return None if few is None else (everything.float().numpy(), few.float().numpy()), sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("best", [1, 3, 11])
@pytest.mark.parametrize("size", [2, 3])
def test_the_best_of_each_rank_hold_the_best_of_all(size, best, dtype, ranks):
    answers = ranks(size).run(best_of, best, dtype)
    everything, few = (torch.from_numpy(x) for x in answers[0][0])
    assert torch.equal(everything.argmax(-1), few.argmax(-1)), "the first of equals, as without"
    kept, at = first_best(everything, best)
    assert torch.equal(few.gather(1, at), kept)
    assert all(answer is None for answer, _ in answers[1:])
    for _, (all_bytes, best_bytes) in answers:
        assert best_bytes == 50 * min(best, -(-V // size)) * 8
        assert all_bytes == 50 * -(-V // size) * dtype.itemsize


def logprobs_of(best):
    """On each rank: its share of few different values -> what all agree on."""
    tp = get_tensor_parallel()
    torch.manual_seed(2)
    local = -(-V // tp.size)
    logits = torch.randint(0, 4, (50, V)).float()
    padded = torch.full((50, local * tp.size), 9.0)
    padded[:, :V] = logits
    found = best_logprobs(padded[:, tp.rank * local : (tp.rank + 1) * local], best, V, tp)
    return [x.numpy() for x in (logits, *found)]


@pytest.mark.parametrize("best", [1, 3, V])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_rank_gets_the_log_probabilities_of_the_best(size, best, ranks):
    answers = ranks(size).run(logprobs_of, best) if size > 1 else [logprobs_of(best)]
    answers = [[torch.from_numpy(x) for x in answer] for answer in answers]
    logits, values, ids = answers[0]
    wanted, at = first_best(logits.log_softmax(-1), best)
    assert torch.equal(ids, at)
    torch.testing.assert_close(values, wanted)
    for _, others, their_ids in answers:  # the same bits
        assert torch.equal(others, values)
        assert torch.equal(their_ids, ids)


def test_first_best_takes_the_first_of_equals():
    x = torch.tensor([[1.0, -2.0, 3.0, 3.0, 0.0, -0.0, 3.0]])
    assert first_best(x, 5)[1].tolist() == [[2, 3, 6, 0, 4]]


def test_a_tied_head_is_the_embeddings_own_memory():
    embedding = VocabParallelEmbedding(V, D, TPGroup(1, 2))
    assert ParallelLMHead(V, D, TPGroup(1, 2), embedding).weight is embedding.weight


def test_an_untied_head_has_its_own_memory():
    embedding = VocabParallelEmbedding(V, D, TPGroup(1, 2))
    assert ParallelLMHead(V, D, TPGroup(1, 2)).weight is not embedding.weight


def test_padding_rows_are_zero():
    embedding = VocabParallelEmbedding(V, D, TPGroup(1, 2))
    embedding.weight.weight_loader(InMemory(random(V, D)))
    assert embedding.weight.shape == (6, D)
    assert not embedding.weight[5].any()
