import hashlib

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding, Qwen2VLTextConfig

from common.layers.rotary import RotaryEmbedding
from common.vision.keys import ImageKey, row_of, runs
from common.vision.mrope import Part, chunk_positions, shift_of
from tests.common.vision.checkpoints import TEXT

pieces = st.lists(st.one_of(st.integers(1, 5), st.tuples(st.integers(1, 5), st.integers(1, 5))), min_size=1, max_size=6)


def key(number: int, h: int, w: int) -> ImageKey:
    return ImageKey(hashlib.sha256(bytes([number])).digest(), h, w)


def sequence(pieces) -> tuple[np.ndarray, list[ImageKey]]:
    """Texts (their length) and pictures (h, w), which never touch: there are marks between them."""
    ids, keys = [], []
    for piece in pieces:
        if isinstance(piece, int):
            ids += range(piece)
        else:
            keys.append(key(len(keys), *piece))
            ids += [7, *keys[-1].ids.tolist(), 8]
    return np.array(ids, dtype=np.int64), keys


def parts_of(ids: np.ndarray, keys: list[ImageKey]) -> list[Part]:
    def grid_of(run):
        return next(one[1:] for one in keys if one.slices[run.first % 4] == run.slices[0])

    return [Part(run.at, run.count, run.first, *grid_of(run)) for run in runs(ids)]


def theirs(ids, keys):
    """Qwen2VLModel.get_rope_index, of which only the merge size is asked."""
    kinds = torch.from_numpy((ids >= 1 << 62).astype(np.int32))[None]
    grids = torch.tensor([[1, 2 * one.height, 2 * one.width] for one in keys]) if keys else None
    model = Qwen2VLModel.__new__(Qwen2VLModel)
    torch.nn.Module.__init__(model)
    model.config = Qwen2VLConfig(vision_config={"spatial_merge_size": 2})
    positions, delta = model.get_rope_index(torch.from_numpy(ids * 0)[None], kinds, grids)
    return positions[:, 0].numpy(), int(delta)


@given(pieces)
@settings(deadline=None, max_examples=100)
def test_positions_and_shift_are_those_of_transformers(pieces):
    ids, keys = sequence(pieces)
    positions, shift = chunk_positions(0, len(ids), 0, parts_of(ids, keys))
    want, delta = theirs(ids, keys)
    assert positions.tolist() == want.tolist()
    assert shift == delta == sum(shift_of(one.height, one.width) for one in keys)


@given(pieces, st.data())
@settings(deadline=None, max_examples=100)
def test_chunks_that_cut_pictures_anywhere_have_the_positions_of_the_whole(pieces, data):
    ids, keys = sequence(pieces)
    whole, last = chunk_positions(0, len(ids), 0, parts_of(ids, keys))
    cuts = [*sorted(data.draw(st.sets(st.integers(1, len(ids))))), len(ids)]
    at, shift, got = 0, 0, []
    for cut in cuts:
        positions, shift = chunk_positions(at, cut - at, shift, parts_of(ids[at:cut], keys))
        got.append(positions)
        at = cut
    assert np.concatenate(got, axis=1).tolist() == whole.tolist()
    assert shift == last


def test_text_alone_has_plain_positions():
    positions, shift = chunk_positions(5, 4, 0, [])
    assert positions.tolist() == [[5, 6, 7, 8]] * 3
    assert shift == 0


def test_the_picture_of_the_docstring():
    positions, shift = chunk_positions(0, 10, 0, [Part(2, 6, 0, 2, 3)])
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]
    assert shift == -3


def test_runs_tell_two_pictures_apart_that_touch_and_are_the_same():
    ids = np.concatenate([key(5, 2, 3).ids, key(5, 2, 3).ids, [3, 4], key(5, 2, 3).ids[4:]])
    assert [(run.at, run.count, run.first) for run in runs(ids)] == [(0, 6, 0), (6, 6, 0), (14, 2, 4)]
    assert row_of(ids[14:]).tolist() == [4, 5]


@torch.inference_mode()
def test_three_positions_turn_as_in_transformers_and_one_as_three_alike():
    config = Qwen2VLTextConfig(**TEXT)
    rotary = RotaryEmbedding(16, 1024, 10_000.0, sections=(2, 3, 3))
    positions = torch.from_numpy(chunk_positions(3, 20, -2, [Part(4, 6, 0, 2, 3)])[0])
    cos, sin = rotary(positions, torch.float32)
    want_cos, want_sin = Qwen2VLRotaryEmbedding(config)(torch.zeros(1), positions[:, None])
    assert torch.equal(cos[:, 0], want_cos[0])
    assert torch.equal(sin[:, 0, 8:], want_sin[0][:, 8:])
    alike = torch.arange(7)
    for three, one in zip(rotary(alike.expand(3, -1), torch.float32), rotary(alike, torch.float32), strict=True):
        assert torch.equal(three, one)
