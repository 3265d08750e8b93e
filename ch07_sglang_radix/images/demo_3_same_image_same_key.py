"""Same image, same key: what stands among the token ids, what the tree finds, and how often the tower runs.

    python ch07_sglang_radix/images/demo_3_same_image_same_key.py

Six requests ask about two pictures, one of them saved in two formats. The tree compares numbers that are made of the pixels, so it
finds a picture again whatever file it came in; the store encodes each picture once, until it must let go of one.
"""

import io
import random

from PIL import Image

from ch07_sglang_radix import Engine
from common.distributed.launch import run_main
from common.teaching.show import check, heading, mistake, table
from common.tiny_qwen.shapes import Shape, draw
from common.tiny_qwen.tiny_vision import prompt_of, tiny_vision
from common.vision.keys import ROW_BITS, WIDE

CIRCLE, STAR = (draw(Shape(*of), 112, 84, random.Random(7)) for of in (("red", "circle"), ("blue", "star")))
PARAMS = {"max_new_tokens": 1}


def saved_as(image: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def main() -> None:
    with Engine(tiny_vision(), device="cpu", check=True) as engine:
        numbers(engine)
        hits(engine)
        store(engine)


def numbers(engine: Engine) -> None:
    heading("The first rows of each, as the tree and the tasks have them")
    keys = [engine.scheduler.intake.see.opened(image).key for image in (CIRCLE, STAR)]
    table(
        ("picture", "row", "bit 62", "48 bits of its SHA-256", "the row again"),
        [
            (name, row, int(bool(one & WIDE)), f"{(one & ~WIDE) >> ROW_BITS:012x}", one & ((1 << ROW_BITS) - 1))
            for name, key in zip(("circle", "star"), keys, strict=True)
            for row, one in enumerate(key.ids[:5].tolist())
        ],
    )  # fmt: skip
    check(
        "row 4 has the slice of row 0: four of them go round", keys[0].ids[4] >> ROW_BITS == keys[0].ids[0] >> ROW_BITS
    )
    check(f"no token id is as large: there are {engine.wrapper.config.vocab_size:,}", int(keys[0].ids.min()) >= WIDE)


def hits(engine: Engine) -> None:
    heading("Six requests, one after the other")
    png, bmp = saved_as(CIRCLE, "PNG"), saved_as(CIRCLE, "BMP")
    requests = [
        ("the circle, as PNG", "What is it?", png), ("the same file", "What is it?", png),
        ("the same picture, as BMP", "What is it?", bmp), ("another question about it", "Which colour is it?", bmp),
        ("the star", "What is it?", STAR), ("the circle and the star", "What are they?", [CIRCLE, STAR]),
    ]  # fmt: skip
    lines = []
    for said, question, image in requests:
        count = len(image) if isinstance(image, list) else 1
        meta = engine.generate(prompt_of(question, count), PARAMS, image_data=image)["meta_info"]
        lines.append((said, meta["prompt_tokens"], meta["cached_tokens"], engine.wrapper.images.encoded))
    table(("request", "prompt tokens", "from the tree", "encoded so far"), lines)
    rows = 12
    mistake("the star after the circle, with placeholders as keys: tokens found", wrong=lines[1][2], right=lines[4][2])
    check(f"another question finds the picture, {rows} rows with what stands around them", lines[3][2] > rows)
    check("two pictures were encoded in six requests", engine.wrapper.images.encoded == 2)


def store(engine: Engine) -> None:
    heading("A store without room, and a tree that is flushed")
    images = engine.wrapper.images
    images.limit = 0
    lines = []
    for said in ("flushed", "flushed again"):
        engine.flush_cache()
        answer = engine.generate(prompt_of("What is it?"), PARAMS, image_data=CIRCLE)
        lines.append((said, answer["meta_info"]["cached_tokens"], images.encoded, images.nbytes))
    table(("", "from the tree", "encoded so far", "bytes kept"), lines)
    check("what was let go of is encoded again when it is needed", images.encoded == 3)


if __name__ == "__main__":
    run_main(main)
