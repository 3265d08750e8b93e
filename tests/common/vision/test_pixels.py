import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs_of

from common.vision.keys import MAX_ROWS
from common.vision.pixels import ImageProcessor, smart_resize
from tests.common.vision.checkpoints import PROCESSOR, picture


@given(st.integers(1, 4000), st.integers(1, 4000))
@settings(deadline=None, max_examples=300)
def test_sizes_are_those_of_transformers(height, width):
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="200 times as long"):
            smart_resize(height, width, 28, 3136, 200_704)
        return
    mine = smart_resize(height, width, 28, 3136, 200_704)
    assert mine == theirs_of(height, width, 28, 3136, 200_704)
    assert mine[0] % 28 == mine[1] % 28 == 0
    assert mine[0] * mine[1] >= 3136
    if max(height, width) < 8 * min(height, width):
        assert mine[0] * mine[1] <= 200_704


@pytest.mark.parametrize("size", [(84, 84), (100, 37), (640, 480), (31, 31), (1000, 90), (28, 56)])
def test_patches_are_those_of_transformers_bit_for_bit(size):
    theirs = Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=200_704)(
        images=[picture(*size, seed=3)], return_tensors="pt"
    )
    pixels = PROCESSOR.pixels(picture(*size, seed=3))
    assert torch.equal(PROCESSOR.patches(torch.from_numpy(pixels.rgb)), theirs["pixel_values"])
    assert [1, 2 * pixels.grid[0], 2 * pixels.grid[1]] == theirs["image_grid_thw"][0].tolist()


def test_the_key_is_of_the_pixels_and_their_shape():
    one = PROCESSOR.pixels(picture(84, 56, seed=1))
    same = PROCESSOR.pixels(picture(84, 56, seed=1))
    other = PROCESSOR.pixels(picture(84, 56, seed=2))
    assert one.key == same.key != other.key
    grey, turned = (PROCESSOR.pixels(Image.new("RGB", size, (9, 9, 9))) for size in ((84, 56), (56, 84)))
    assert grey.rgb.tobytes() == turned.rgb.tobytes()
    assert grey.key.sha != turned.key.sha


def test_a_picture_of_more_rows_than_a_key_counts_is_refused():
    large = ImageProcessor(max_pixels=1 << 28)
    with pytest.raises(ValueError, match=f"more than {MAX_ROWS}"):
        large.size(28 * 200, 28 * 100)
    assert large.size(28 * 128, 28 * 128) == (28 * 128, 28 * 128)


def test_levels_are_what_the_library_makes_of_each_of_256():
    channel = np.arange(256, dtype=np.uint8).reshape(16, 16)
    theirs = Qwen2VLImageProcessorPil(do_resize=False, patch_size=4, merge_size=2, temporal_patch_size=1)
    image = Image.fromarray(np.stack([channel] * 3, axis=-1))
    mine = ImageProcessor(patch=4, merge=2, frames=1).patches(torch.from_numpy(np.array(image)))
    assert torch.equal(mine, theirs(images=[image], return_tensors="pt")["pixel_values"])
