"""tie_word_embeddings says that the LM head is the embedding; what if the files have an lm_head.weight all the same?"""

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.models.weights import load_model
from common.parallel_state import TPGroup
from tests.common.models.dense import logits_of
from tests.common.models.files import rewrite, tensors

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PROMPT = [5, 1000, 0, 333, 8, 8, 21]


def with_head(x, head):
    x[HEAD] = head(x[EMBEDDING])


def alone(x):
    x[HEAD] = x.pop(EMBEDDING)


HEADS = {  # how the file says it, and whether head and embedding are one in transformers 5.23
    "no head": (lambda x: None, True),
    "an equal head": (lambda x: with_head(x, torch.clone), True),
    "another head": (lambda x: with_head(x, lambda e: e.flip(0).contiguous()), False),
    "a head with another last number": (lambda x: with_head(x, lambda e: torch.cat((e[:-1], e[-1:] + 1))), False),
    "a rounded head": (lambda x: with_head(x, torch.Tensor.bfloat16), False),
    "a head alone": (alone, True),
}


@pytest.mark.parametrize(("change", "tied"), HEADS.values(), ids=HEADS)
def test_a_tied_checkpoint_with_a_stored_head_is_what_transformers_makes_of_it(copy, change, tied):
    folder = copy("qwen2")
    rewrite(folder, change)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == tied
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model, report = load_model(folder, TPGroup())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied == model.config.tie_word_embeddings
    with torch.inference_mode():
        want = theirs(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(logits_of(model, PROMPT), want, rtol=1e-4, atol=1e-4)
    said = [str(w.message) for w in warned]
    assert said == report.notes == ([] if tied else [
        f"{folder}: config.json says tie_word_embeddings=true, but {HEAD} is not {EMBEDDING}; both are used"
    ])  # fmt: skip


def test_an_equal_head_is_compared_once_and_not_kept(copy, checkpoint):
    folder = copy("qwen2")
    rewrite(folder, lambda x: with_head(x, torch.clone))
    compared = 2 * tensors(folder)[EMBEDDING].nbytes
    for rank in range(2):
        report = load_model(folder, TPGroup(rank, 2))[1]
        assert report.bytes_read == load_model(checkpoint("qwen2"), TPGroup(rank, 2))[1].bytes_read + compared
        assert HEAD not in report.tensors


def test_every_rank_comes_to_the_same_head(copy):
    """The heads differ in a row of the last rank alone; each rank could only see its own rows."""
    folder = copy("qwen2")
    rewrite(folder, lambda x: with_head(x, lambda e: torch.cat((e[:-1], e[-1:] + 1))))
    with pytest.warns(UserWarning, match="both are used"):
        models = [load_model(folder, TPGroup(rank, 3))[0] for rank in range(3)]
    assert [model.config.tie_word_embeddings for model in models] == [False] * 3
    whole = torch.cat([model.lm_head.weight for model in models])[: models[0].config.vocab_size]
    assert torch.equal(whole, tensors(folder)[HEAD])
