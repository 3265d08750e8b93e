"""Pictures between the processes of a server: plain numbers and bytes, in MessagePack with everything else.

Main has resized them, so what travels is no larger than the model can see, whatever the file was.
"""

import numpy as np

from common.vision.pictures import Pictures
from common.vision.pixels import CHANNELS, Pixels

Packed = tuple[int, int, int, bytes]  # where its rows begin in the prompt; height, width, pixels


def packed(pictures: Pictures) -> list[Packed]:
    pairs = zip(pictures.at, pictures.pixels, strict=True)
    return [(at, *one.rgb.shape[:2], one.rgb.tobytes()) for at, one in pairs]


def unpacked(those: list[Packed], block: int) -> Pictures:
    """block: pixels along a side of what is one row."""
    arrays = [np.frombuffer(rgb, dtype=np.uint8).reshape(height, width, CHANNELS) for _, height, width, rgb in those]
    return Pictures(tuple(Pixels(rgb.copy(), block) for rgb in arrays), tuple(at for at, *_ in those))
