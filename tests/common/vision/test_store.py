"""Encoded pictures on a rank: found by what stands among the token ids, kept within a limit, forgotten with the tower."""

import numpy as np
import pytest
import torch

from common.models.weights import load_model
from common.parallel_state import TPGroup
from common.vision.keys import ImageKey, readable
from common.vision.store import ImageStore
from tests.common.vision.checkpoints import IMAGE, PROCESSOR, picture, save_seeing


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return load_model(save_seeing("qwen2_vl", tmp_path_factory.mktemp("model")), TPGroup())[0].visual


PIXELS = [PROCESSOR.pixels(picture(84, 112, seed)) for seed in (1, 2, 3)]


def store_of(tower, *pixels) -> ImageStore:
    store = ImageStore(tower, PROCESSOR, IMAGE)
    for one in pixels:
        store.add(one.key, torch.from_numpy(one.rgb))
    return store


def step(store, ids, cached=0, shift=0):
    ids = np.array(ids, dtype=np.int64)
    return store.chunk(ids, np.array([len(ids)]), np.array([cached]), [shift])


def test_a_chunk_finds_its_rows_by_the_numbers_among_its_tokens(tower):
    store, key = store_of(tower, *PIXELS[:2]), PIXELS[1].key
    chunk = step(store, [5, *key.ids[3:9].tolist(), 6], cached=10)
    assert chunk.token_ids.tolist() == [5, *[IMAGE] * 6, 6]
    assert chunk.at.tolist() == [1, 2, 3, 4, 5, 6]
    with torch.inference_mode():
        whole = tower(PROCESSOR.patches(torch.from_numpy(PIXELS[1].rgb)), PIXELS[1].grid)
    assert torch.equal(torch.cat(chunk.rows), whole[3:9])


def test_a_step_without_pictures_costs_nothing(tower):
    assert store_of(tower).chunk(np.array([1, 2]), np.array([2]), np.array([0]), None) is None


def test_a_picture_is_encoded_once_until_it_is_let_go_of(tower):
    store = store_of(tower, PIXELS[0], PIXELS[0])
    assert store.encoded == 1
    nbytes = store.nbytes
    assert nbytes == PIXELS[0].key.rows * 112 * 4
    for one in PIXELS[1:]:
        store.add(one.key, torch.from_numpy(one.rgb))
    step(store, PIXELS[0].key.ids)  # now the second one is the one that was used longest ago
    store.limit = 2 * nbytes
    store.let_go()
    assert [one.key in store for one in PIXELS] == [True, False, True]
    assert store.nbytes == 2 * nbytes
    with pytest.raises(ValueError, match="row 4 of a picture that this rank has not been given"):
        step(store, PIXELS[1].key.ids[4:])


def test_pictures_that_are_alike_in_a_slice_are_told_apart_by_the_others(tower):
    """2^24 pictures have two such among them, which takes seconds to make; three slices still differ."""
    one, two = (pixels.key for pixels in PIXELS[:2])
    twin = ImageKey(two.sha[:-6] + one.sha[-6:], two.height, two.width)
    assert one.ids[0] == twin.ids[0]
    store = store_of(tower, PIXELS[0])
    store.add(twin, torch.from_numpy(PIXELS[1].rgb))
    for key in (one, twin):
        chunk = step(store, [5, *key.ids.tolist()])
        assert torch.equal(torch.cat(chunk.rows), store._entries[key.sha].rows)
    step(store, [5, one.ids[0]])  # cut behind the one row that does not tell: some picture's, and no error
    store.limit = store.nbytes // 2
    store.let_go()
    assert sorted([one in store, twin in store]) == [False, True]
    left = one if one in store else twin
    assert torch.equal(torch.cat(step(store, left.ids).rows), store._entries[left.sha].rows)
    store.limit = 0
    store.let_go()
    assert store.nbytes == 0


def test_new_weights_forget_all(tower):
    store = store_of(tower, *PIXELS)
    store.forget()
    assert store.nbytes == 0
    assert not any(one.key in store for one in PIXELS)


def test_eyes_see_one_placeholder_where_a_picture_is():
    ids = np.concatenate([[5, 6], PIXELS[0].key.ids, PIXELS[0].key.ids[:2], [7], PIXELS[1].key.ids[5:]])
    assert readable(ids, IMAGE).tolist() == [5, 6, IMAGE, IMAGE, 7, IMAGE]
    assert readable(np.array([1, 2]), IMAGE).tolist() == [1, 2]


def test_the_limit_is_sglangs_variable(tower, monkeypatch):
    assert store_of(tower).limit == 100 << 20
    monkeypatch.setenv("SGLANG_VLM_CACHE_SIZE_MB", "3")
    assert store_of(tower).limit == 3 << 20
