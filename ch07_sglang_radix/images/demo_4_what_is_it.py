"""What is it? Pictures that the model has never seen, asked about in two languages, one and two at a time.

    python ch07_sglang_radix/images/demo_4_what_is_it.py
    python ch07_sglang_radix/images/demo_4_what_is_it.py --tp-size 2
    python ch07_sglang_radix/images/demo_4_what_is_it.py --image FILE "Which colour is it?"

The model is the bundled one with a vision tower of two layers (common/tiny_qwen/train_vision.py). Six pairs of a colour and a shape
were left out of its training. All questions are answered together, in chunks of 8 tokens that cut every picture.
"""

import argparse
import random
from pathlib import Path

from PIL import Image

from ch07_sglang_radix import Engine
from common.distributed.launch import run_main
from common.teaching.show import check, heading, table
from common.tiny_qwen.shapes import (
    UNSEEN,
    WHAT,
    WHAT_ARE_THEY,
    WHAT_ZH,
    WHICH_COLOUR,
    WHICH_SHAPE,
    Question,
    Shape,
    draw,
)
from common.tiny_qwen.tiny_vision import prompt_of, tiny_vision

PARAMS = {"max_new_tokens": 60}
GLOSSARY = "What is a radix cache?"
ASKED = (
    (WHAT, ("green", "cross")), (WHAT, ("red", "circle")), (WHICH_COLOUR, ("purple", "square")),
    (WHICH_SHAPE, ("blue", "triangle")), (WHAT_ZH, ("orange", "ring")), (WHAT_ARE_THEY, ("blue", "circle"), ("yellow", "star")),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default=WHAT)
    parser.add_argument("--image", type=Path, metavar="FILE", help="a picture of yours, of one shape")
    parser.add_argument("--tp-size", type=int, default=1, help="ranks; they are started by this command")
    args = parser.parse_args()
    with Engine(tiny_vision(), tp_size=args.tp_size, device="cpu", chunked_prefill_size=8, check=True) as engine:
        if args.image:
            print(engine.generate(prompt_of(args.question), PARAMS, image_data=args.image)["text"])
        else:
            tour(engine)


def tour(engine: Engine) -> None:
    rng, asked = random.Random(1), [(text, [Shape(*one) for one in shapes]) for text, *shapes in ASKED]
    pictures: list[list[Image.Image]] = [[draw(shape, 112, 112, rng) for shape in shapes] for _, shapes in asked]
    prompts = [prompt_of(text, len(shapes)) for text, shapes in asked] + [prompt_of(GLOSSARY, 0)]
    answers = engine.generate(prompts, PARAMS, image_data=[*pictures, None])
    heading("Six questions about seven pictures")
    rows, right = [], 0
    for (text, shapes), answer in zip(asked, answers, strict=False):
        wanted = Question(text, len(shapes)).answer(*shapes)
        right += answer["text"] == wanted
        shown = ", ".join(
            f"{one.colour} {one.shape}" + (" (never trained)" if tuple(one) in UNSEEN else "") for one in shapes
        )
        rows.append((shown, text, answer["text"]))
    table(("picture", "question", "answer"), rows)
    check(f"{right} of {len(asked)} answers are right, word for word", right == len(asked))

    heading("And one about none")
    print(f"  {GLOSSARY}\n  {answers[-1]['text']}")
    meta = [answer["meta_info"] for answer in answers]
    check("it can still recite the glossary", answers[-1]["text"].startswith("A prefix cache kept as a radix tree"))
    check("seven pictures were encoded", engine.wrapper.images.encoded == 7 == sum(map(len, pictures)))
    print(f"  tokens of the prompts: {' '.join(str(one['prompt_tokens']) for one in meta)}")


if __name__ == "__main__":
    run_main(main)
