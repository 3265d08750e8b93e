"""An executor without its memory, and with it again: the same numbers, in the form each matrix had."""

from pathlib import Path

import pytest
import torch

from common.executor import Executor
from common.layers.cpu_linear import choose_forms, packs
from common.memory_occupation import PAGES, TAGS, WEIGHTS, MemoryOccupation
from common.models.drafters.contract import DraftOptions
from common.models.held_weights import checksums

FORMS = ["row-major", "column-major", *(["packed"] if packs(torch.float32) else [])]


def layouts(executor: Executor) -> dict[str, tuple]:
    """Of each weight: which object, which form."""
    held = dict(executor.model.named_parameters()) | dict(executor.model.named_buffers())
    return {name: (id(x), x.is_mkldnn, x.shape, None if x.is_mkldnn else x.stride()) for name, x in held.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["qwen2", "llama", "qwen2_moe", "deepseek_v3"])
def test_weights_come_back_as_they_were(checkpoint, name, form):
    executor = Executor(str(checkpoint(name)), "cpu", max_total_tokens=256)
    choose_forms(executor.model, form)
    occupation, sums, before = MemoryOccupation(executor), checksums(executor.model), layouts(executor)
    occupation.keep_a_copy()
    files = occupation._files.name
    occupation.release(set(TAGS))
    assert sum(p.numel() for p in executor.model.parameters() if not p.is_mkldnn) == 0
    assert executor.kv_cache.kv.untyped_storage().nbytes() == 0
    occupation.resume({WEIGHTS})
    assert occupation.away == set(TAGS), "the others may have failed"
    occupation.awake({WEIGHTS})
    assert occupation.away == set(TAGS) - {WEIGHTS}
    assert checksums(executor.model) == sums
    assert layouts(executor) == before
    assert not Path(files).exists()


def test_pages_come_back_empty_and_every_view_of_them_sees_that(checkpoint):
    executor = Executor(str(checkpoint("qwen2")), "cpu", max_total_tokens=256)
    cache, occupation = executor.kv_cache, MemoryOccupation(executor)
    cache.kv.fill_(3)
    occupation.release({PAGES})
    occupation.release({PAGES})  # it is away already
    occupation.resume({PAGES})
    assert not cache.kv.any()
    cache.write(1, torch.tensor([5]), *torch.ones(2, 1, *cache.k.shape[3:]))
    assert cache.k[1].flatten(0, 1)[5].eq(1).all()


@pytest.mark.parametrize("algorithm", ["STANDALONE", "EAGLE3", "MEDUSA"])
def test_a_drafter_sleeps_with_the_model(algorithm):
    """Its weights and pages are its own, and the model's memory would not be enough for who asks for room."""
    guesses = DraftOptions(algorithm, None, 3, 1, 4)
    executor = Executor(None, "cpu", 16, max_total_tokens=256, speculative=guesses)
    drafter, occupation = executor.verifier.drafter, MemoryOccupation(executor)
    held = lambda: sum(p.untyped_storage().nbytes() for p in drafter.module.parameters() if not p.is_mkldnn)  # noqa: E731
    sums, size = checksums(drafter.module), held()
    occupation.keep_a_copy()
    occupation.release(set(TAGS))
    assert (held(), size > 0) == (0, True)
    assert drafter.cache is None or drafter.cache.kv.untyped_storage().nbytes() == 0
    occupation.resume(set(TAGS))
    occupation.awake(set(TAGS))
    assert (checksums(drafter.module), held()) == (sums, size)
    if drafter.cache:
        assert drafter.cache.kv.untyped_storage().nbytes() == executor.num_pages * drafter.page_bytes


def test_what_cannot_be_put_aside_is_kept(checkpoint, monkeypatch):
    executor = Executor(str(checkpoint("qwen2")), "cpu", max_total_tokens=256)
    occupation, sums = MemoryOccupation(executor), checksums(executor.model)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("common.memory_occupation.save_file", full)
    with pytest.raises(ValueError, match=r"weights cannot be put aside .*No space left on device"):
        occupation.keep_a_copy()
    assert (occupation.away, occupation._files) == (set(), None)
    assert checksums(executor.model) == sums
