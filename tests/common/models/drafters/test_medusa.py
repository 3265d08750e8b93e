"""Medusa heads: the published files, the same logits over any ranks, and the tree that a list of choices makes of them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from common.draft_tree import Accepted, DraftTree
from common.layers.vocab import ParallelLMHead
from common.models.drafters.contract import DraftOptions, Roots
from common.models.drafters.medusa import MedusaDrafter, chosen, likely_choices, load_heads
from common.parallel_state import TPGroup

D, V, K, M = 12, 31, 3, 2
SPARSE = [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [2], [0, 0, 1]]


def random_heads(folder, own=True, prefix="", **config):
    """FasterDecoding's names: heads and their layers by number, the LM head behind the layers."""
    torch.manual_seed(1)
    tensors = {}
    for head in range(K):
        for layer in range(M):
            tensors[f"{prefix}{head}.{layer}.linear.weight"] = torch.randn(D, D) * 0.5
            tensors[f"{prefix}{head}.{layer}.linear.bias"] = torch.randn(D) * 0.5
        if own:
            tensors[f"{prefix}{head}.{M}.weight"] = torch.randn(V, D)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    raw = {"medusa_num_heads": K, "medusa_num_layers": M, "base_model_name_or_path": "somebody/a-model"} | config
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    return folder, {name.removeprefix(prefix): x for name, x in tensors.items()}


def target(tp=None, rows=4):
    """What a drafter uses of a model: its sizes, and its LM head, cut over the ranks."""
    tp = tp or TPGroup()
    head = ParallelLMHead(V, D, tp)
    torch.manual_seed(2)
    whole = torch.randn(V, D)
    head.load_weight(SimpleNamespace(shape=whole.shape, read=lambda dim, a, b: whole[a:b]))
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=D, vocab_size=V), compute_logits=head)
    return SimpleNamespace(model=model, tp=tp, dtype=torch.float32, num_rows=rows), whole


def by_hand(tensors, head, hidden, shared):
    x = hidden
    for layer in range(M):
        x = x + F.silu(F.linear(x, tensors[f"{head}.{layer}.linear.weight"], tensors[f"{head}.{layer}.linear.bias"]))
    return F.linear(x, tensors.get(f"{head}.{M}.weight", shared))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("own", "prefix"), [(True, ""), (False, ""), (True, "medusa_head.")])
def test_logits_are_those_of_the_published_form_whatever_the_ranks(tmp_path, size, own, prefix):
    folder, tensors = random_heads(tmp_path / "heads", own, prefix)
    hidden, parts = torch.randn(5, D), []
    for rank in range(size):
        of_rank, shared = target(TPGroup(rank, size))
        heads, _ = load_heads(folder, of_rank)
        parts.append(heads(hidden, K, of_rank.model.compute_logits))
    logits = torch.cat(parts, dim=-1)[..., :V]
    assert logits.shape == (5, K, V)
    for head in range(K):
        torch.testing.assert_close(logits[:, head], by_hand(tensors, head, hidden, shared))


def drafter(folder, steps=3, topk=3, nodes=9, path=None):
    return MedusaDrafter(DraftOptions("MEDUSA", str(path or folder), steps, topk, nodes), target()[0])


def draft(one, hidden, nodes=9):
    rows = np.arange(len(hidden))
    one.prefill(None, None, rows, rows * 0, rows * 0 + 1, hidden)
    last = torch.arange(len(hidden)) + 20
    return one.draft(None, Roots.of(rows, rows + 5, torch.device("cpu")), last, nodes), last


def test_each_node_is_the_choice_of_its_head_and_stands_below_the_choice_before(tmp_path):
    folder, tensors = random_heads(tmp_path / "heads", medusa_choices=SPARSE)
    hidden = torch.randn(3, D)
    tree, last = draft(drafter(folder), hidden)
    best = torch.stack([by_hand(tensors, head, hidden, None).argsort(-1, descending=True) for head in range(K)], dim=1)
    nodes = [[], *SPARSE]
    assert tree.tokens[:, 0].tolist() == last.tolist()
    for i, choice in enumerate(SPARSE, start=1):
        assert tree.tokens[:, i].tolist() == best[:, len(choice) - 1, choice[-1]].tolist()
        assert tree.parents[:, i].tolist() == [nodes.index(choice[:-1])] * 3
    assert tree.depth[0].tolist() == [len(choice) for choice in nodes]


@pytest.mark.parametrize(
    ("steps", "topk", "nodes", "wanted"),
    [
        (3, 3, 9, SPARSE),
        (3, 3, 4, [[0], [1], [0, 0]]),
        (2, 3, 9, [[0], [1], [0, 0], [0, 1], [1, 0], [2]]),
        (3, 1, 4, [[0], [0, 0], [0, 0, 0]]),
        (1, 2, 9, [[0], [1]]),
    ],
)
def test_no_choice_is_deeper_or_wider_than_asked_for(steps, topk, nodes, wanted):
    assert chosen(list(map(tuple, SPARSE)), DraftOptions("MEDUSA", None, steps, topk, nodes)) == list(
        map(tuple, wanted)
    )


def test_what_the_list_does_not_fill_is_token_0_below_the_root(tmp_path):
    folder, _ = random_heads(tmp_path / "heads", medusa_choices=[[0], [0, 0]])
    tree, _ = draft(drafter(folder, nodes=6), torch.randn(2, D), nodes=6)
    assert tree.parents.tolist() == [[-1, 0, 1, 0, 0, 0]] * 2
    assert tree.tokens[:, 3:].tolist() == [[0, 0, 0]] * 2


def test_fewer_nodes_than_the_engine_s_are_the_first_of_its_tree(tmp_path):
    one = drafter(random_heads(tmp_path / "heads", medusa_choices=SPARSE)[0])
    hidden = torch.randn(2, D)
    whole, _ = draft(one, hidden)
    some, _ = draft(one, hidden, nodes=4)
    assert some.tokens.tolist() == whole.tokens[:, :4].tolist()
    assert some.parents.tolist() == whole.parents[:, :4].tolist()
    assert draft(one, hidden, nodes=1)[0].tokens.shape == (2, 1)


def test_a_chain_is_one_if_only_the_best_are_taken(tmp_path):
    folder, _ = random_heads(tmp_path / "heads", medusa_choices=SPARSE)
    assert drafter(folder, topk=1, nodes=4).chains
    assert not drafter(folder).chains


def test_a_list_too_short_for_a_chain_makes_a_tree(tmp_path):
    """Token 0 below the root may be what the target says: its K and V are then not where its path ends."""
    folder, _ = random_heads(tmp_path / "heads", medusa_choices=[[0], [0, 0]])
    one = drafter(folder, topk=1, nodes=4)
    tree, _ = draft(one, torch.randn(2, D), nodes=4)
    assert tree.parents.tolist() == [[-1, 0, 1, 0]] * 2
    assert not one.chains


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 40))
def test_a_list_made_up_is_a_tree_of_the_likeliest(heads, topk, count):
    found = likely_choices(heads, topk, count)
    assert len(found) == min(count, sum(topk**n for n in range(1, heads + 1)))
    for i, choice in enumerate(found):
        assert len(choice) == 1 or choice[:-1] in found[:i]
        assert max(choice) < topk
    assert found[0] == (0,)


def test_the_next_guesses_are_made_from_the_last_token_that_was_accepted(tmp_path):
    one = drafter(random_heads(tmp_path / "heads", medusa_choices=SPARSE)[0])
    features = torch.randn(2, 4, D)
    tree = DraftTree(torch.zeros(2, 4, dtype=torch.int64), torch.tensor([[-1, 0, 0, 2]] * 2))
    accepted = Accepted(
        torch.tensor([[0, 2, 3, -1], [0, -1, -1, -1]]), torch.zeros(2, 4, dtype=torch.int64), torch.tensor([3, 1])
    )
    one.accepted(None, np.array([3, 1]), np.array([9, 9]), tree, accepted, features)
    assert torch.equal(one._newest[[3, 1]], torch.stack((features[0, 3], features[1, 0])))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"medusa_num_heads": 0}, "medusa_num_heads=0 must be an integer"),
        ({"medusa_num_layers": "1"}, "medusa_num_layers='1' must be an integer"),
        ({"medusa_num_layers": 3}, "0.2.linear"),
        ({"medusa_num_heads": 4}, "3.0.linear"),
        ({"medusa_choices": [[0, 0], [0]]}, r"\[0, 0\] before \[0\]"),
        ({"medusa_choices": [[0], [0]]}, r"\[0\] twice"),
        ({"medusa_choices": [[0], [0, -1]]}, r"\[0, -1\]; a choice is a list of ranks"),
        ({"medusa_choices": [[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]}, "there are 3 heads"),
        ({"medusa_choices": []}, "must be a list of 1 to"),
        ({"medusa_choices": [[]]}, "there are 3 heads"),
    ],
)  # fmt: skip
def test_what_is_no_set_of_heads_of_this_target_is_one_line(tmp_path, config, message):
    folder, _ = random_heads(tmp_path / "heads", **config)
    with pytest.raises(ValueError, match=message) as error:
        load_heads(folder, target()[0])
    assert "\n" not in str(error.value)


def test_a_pickle_is_not_read(tmp_path):
    folder, _ = random_heads(tmp_path / "heads")
    (folder / "medusa_lm_head.safetensors").rename(folder / "medusa_lm_head.pt")
    with pytest.raises(FileNotFoundError, match=r"medusa_lm_head\.pt, a pickle"):
        load_heads(folder, target()[0])


def test_more_steps_than_heads_are_refused(tmp_path):
    with pytest.raises(ValueError, match="speculative_num_steps=4, but there are 3 Medusa heads"):
        drafter(random_heads(tmp_path / "heads")[0], steps=4)
