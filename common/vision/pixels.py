"""A picture -> the pixels that the model was trained to look at, cut into patches.

    a file, its bytes, a PIL image
      -> RGB, upright, no transparency                   opened by sources.py (ch07_sglang_radix/images/)
      -> resized so that both sides are whole blocks     smart_resize; a block is merge x merge patches, one row of the decoder
      -> uint8 [H, W, 3]                                 what travels to the ranks, and what the key is the hash of
      -> (x / 255 - mean) / std, float32                 a table of 256 numbers a channel
      -> patches [N, C * frames * p * p]                 in blocks; a still image stands for both frames of a video

Numbers are those of transformers 5.23 (models/qwen2_vl/image_processing_pil_qwen2_vl.py) bit for bit: it resizes with Pillow's
bicubic filter too. (Its torchvision form resizes a little differently, by up to some levels of 255.)
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image

from common.vision.keys import MAX_ROWS, ImageKey

MOST_UNLIKE = 200  # of one side to the other
CHANNELS = 3


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The nearest (height, width) in whole `factor`s, scaled alike until the area is in min_pixels .. max_pixels.

    Too large is rounded down and too small up, so that the bounds hold afterwards, but for pictures so thin that one factor is
    their side. Python's round: 42 is 1.5 factors of 28 and becomes 2, 70 is 2.5 and becomes 2.
    """
    if max(height, width) > MOST_UNLIKE * min(height, width):
        raise ValueError(f"a picture of {width}x{height} is more than {MOST_UNLIKE} times as long as wide; crop it")
    new = round(height / factor) * factor, round(width / factor) * factor
    if new[0] * new[1] > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new = tuple(max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif new[0] * new[1] < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new = tuple(math.ceil(side * grow / factor) * factor for side in (height, width))
    return new


@dataclass(frozen=True, eq=False)
class Pixels:
    """A picture as it travels: rgb, uint8 [H, W, 3], both sides whole blocks of `block` pixels."""

    rgb: np.ndarray
    block: int

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks (h, w): as many rows of the decoder, h * w, stand for it."""
        return self.rgb.shape[0] // self.block, self.rgb.shape[1] // self.block

    @cached_property
    def key(self) -> ImageKey:
        """Of the pixels and their shape, not of the file: the same picture as PNG and as BMP is one."""
        shape = np.array(self.rgb.shape[:2], dtype="<i8")
        return ImageKey(hashlib.sha256(shape.tobytes() + self.rgb.tobytes()).digest(), *self.grid)


@dataclass(frozen=True)
class ImageProcessor:
    """What preprocessor_config.json says (common/models/vision.py reads it)."""

    patch: int = 14
    merge: int = 2
    frames: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def block(self) -> int:
        return self.patch * self.merge

    def size(self, height: int, width: int) -> tuple[int, int]:
        """What a picture of this size is resized to. Raises ValueError for one that has no place."""
        new = smart_resize(height, width, self.block, self.min_pixels, self.max_pixels)
        rows = new[0] * new[1] // self.block**2
        if rows > MAX_ROWS:
            raise ValueError(
                f"a picture of {width}x{height} becomes {rows} rows, more than {MAX_ROWS}; make it smaller"
            )
        return new

    def pixels(self, image: Image.Image) -> Pixels:
        """An RGB image (mode "RGB") -> its pixels as they travel."""
        height, width = self.size(image.height, image.width)
        return Pixels(np.array(image.resize((width, height), Image.Resampling.BICUBIC)), self.block)

    @cached_property
    def levels(self) -> torch.Tensor:
        """float32 [3, 256]: what each of the 256 levels of each channel becomes."""
        x = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
        mean, std = (np.array(numbers, dtype=np.float32) for numbers in (self.mean, self.std))
        return torch.from_numpy(((x[:, None] - mean) / std).T.copy())

    def patches(self, rgb: torch.Tensor) -> torch.Tensor:
        """uint8 [H, W, 3] -> float32 [N, C * frames * p * p]: block by block, in a block its merge * merge patches.

        So `merge * merge` neighbouring rows are one block, whatever the width of the picture.
        """
        height, width, _ = rgb.shape
        levels = self.levels.to(rgb.device)
        x = torch.stack([levels[c][rgb[..., c].long()] for c in range(CHANNELS)])  # [C, H, W]
        x = x.view(CHANNELS, height // self.block, self.merge, self.patch, width // self.block, self.merge, self.patch)
        x = x.permute(1, 4, 2, 5, 0, 3, 6)  # [h, w, m, m, C, p, p]
        x = x.unsqueeze(5).expand(*x.shape[:5], self.frames, *x.shape[5:])
        return x.reshape(height * width // self.patch**2, -1)
