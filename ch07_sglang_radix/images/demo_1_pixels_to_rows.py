"""From pixels to rows: sizes that fit, patches in blocks, a tower, and what travels to the ranks.

    python ch07_sglang_radix/images/demo_1_pixels_to_rows.py

A picture is resized so that its sides are whole blocks of 28 x 28 pixels; each block becomes one row, as wide as the embedding of a
token. The tower here is the bundled one, two layers of Qwen2-VL's.
"""

import random

import torch

from common.distributed.launch import run_main
from common.models.weights import load_model
from common.parallel_state import TPGroup
from common.teaching.show import check, heading, mistake, table
from common.tiny_qwen.shapes import Shape, draw
from common.tiny_qwen.tiny_vision import tiny_vision
from common.vision.pixels import ImageProcessor, smart_resize

SIZES = ((640, 480), (1920, 1080), (4000, 3000), (100, 30), (28, 28), (42, 70))  # width, height


def main() -> None:
    sizes()
    patches()
    rows()


def sizes() -> None:
    processor = ImageProcessor()
    heading(f"Whole blocks of {processor.block}, {processor.min_pixels:,} to {processor.max_pixels:,} pixels")
    lines = []
    for width, height in SIZES:
        new_height, new_width = processor.size(height, width)
        count = new_height * new_width // processor.block**2
        lines.append(
            (
                f"{width} x {height}",
                f"{new_width} x {new_height}",
                count,
                f"{width / height:.3f}",
                f"{new_width / new_height:.3f}",
            )
        )
    table(("picture", "resized", "rows", "width / height", "afterwards"), lines)
    mistake(
        "42 x 70 with halves rounded up: 1.5 and 2.5 blocks", wrong="56 x 84",
        right="{1} x {0}".format(*smart_resize(70, 42, 28, 28 * 28, processor.max_pixels)),
    )  # fmt: skip


def patches() -> None:
    heading("Which patch comes when: a picture of 4 x 6 patches, two blocks high and three wide")
    small = ImageProcessor(patch=1, merge=2, frames=1)
    numbers = torch.arange(24).view(4, 6, 1).expand(4, 6, 3).to(torch.uint8)
    order = [int(small.levels[0].eq(patch[0]).nonzero()) for patch in small.patches(numbers)]
    place = [order.index(i) for i in range(24)]
    for line in range(4):
        print("  " + " ".join(f"{place[6 * line + column]:3d}" for column in range(6)))
    check(
        "patches 0 to 3 are the first block, so that four neighbouring rows can be merged whatever the width",
        order[:4] == [0, 1, 6, 7],
    )


def rows() -> None:
    heading("A picture of 112 x 84 in the bundled tower")
    model, _ = load_model(tiny_vision(), TPGroup())
    processor = ImageProcessor()
    pixels = processor.pixels(draw(Shape("red", "circle"), 112, 84, random.Random(3)))
    cut = processor.patches(torch.from_numpy(pixels.rgb))
    with torch.inference_mode():
        seen = model.visual(cut, pixels.grid)
    travels = pixels.rgb.nbytes
    table(
        ("", "shape", "bytes"),
        [
            ("pixels, which travel to the ranks", list(pixels.rgb.shape), travels),
            ("patches, twice for two frames", list(cut.shape), cut.nbytes),
            ("rows, which the store keeps", list(seen.shape), seen.nbytes),
        ],
    )
    check("each row stands for 2 x 2 patches", len(seen) * 4 == len(cut) == 4 * pixels.key.rows)
    check(f"what travels is {cut.nbytes // travels} times smaller than what the tower reads", cut.nbytes == 8 * travels)


if __name__ == "__main__":
    run_main(main)
