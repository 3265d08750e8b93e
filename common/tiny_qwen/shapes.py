"""Pictures of one coloured shape, and what is asked about them: all that the tiny vision model has ever seen.

image = draw(Shape("red", "circle"), width=84, height=84, rng=random.Random(0))     # a PIL image
"""

import math
import random
from typing import NamedTuple

from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 40, 40), "orange": (245, 140, 20), "yellow": (240, 215, 40), "green": (40, 150, 60), "blue": (40, 80, 210),
    "purple": (130, 50, 160), "black": (20, 20, 20),
}  # fmt: skip
ZH_COLOURS = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "blue": "蓝色", "purple": "紫色", "black": "黑色",
}  # fmt: skip
ZH_SHAPES = {"circle": "圆形", "square": "方形", "triangle": "三角形", "star": "星形", "cross": "十字", "ring": "圆环"}
SHAPES = tuple(ZH_SHAPES)
# never trained: whoever names these has learned colours and shapes, and not pictures by heart
UNSEEN = {
    ("red", "star"),
    ("blue", "triangle"),
    ("green", "ring"),
    ("yellow", "cross"),
    ("purple", "square"),
    ("black", "circle"),
}


class Shape(NamedTuple):
    colour: str
    shape: str

    @property
    def name(self) -> str:
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.colour} {self.shape}"


EVERY = [Shape(colour, shape) for colour in COLOURS for shape in SHAPES]


def draw(what: Shape, width: int, height: int, rng: random.Random, any_colour: bool = False) -> Image.Image:
    """The shape somewhere, in some size and shade, on some light ground. any_colour: in one that may have no name."""
    ground = tuple(rng.randint(215, 255) for _ in range(3))
    colour = tuple(max(0, min(255, level + rng.randint(-15, 15))) for level in COLOURS[what.colour])
    if any_colour:
        colour = tuple(rng.randint(0, 180) for _ in range(3))
    radius = min(width, height) * rng.uniform(0.32, 0.46)
    x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
    scale = 4  # drawn larger and averaged, so that edges are smooth
    image = Image.new("RGB", (width * scale, height * scale), ground)
    pen, x, y, r = ImageDraw.Draw(image), x * scale, y * scale, radius * scale
    if what.shape in ("circle", "ring"):
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        if what.shape == "ring":
            pen.ellipse((x - r / 2, y - r / 2, x + r / 2, y + r / 2), fill=ground)
    elif what.shape == "square":
        pen.rectangle((x - 0.8 * r, y - 0.8 * r, x + 0.8 * r, y + 0.8 * r), fill=colour)
    elif what.shape == "cross":
        pen.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill=colour)
        pen.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill=colour)
    else:
        corners = 3 if what.shape == "triangle" else 5
        turns = [i / corners if corners == 3 else i / 10 for i in range(corners if corners == 3 else 10)]
        radii = [r if corners == 3 or i % 2 == 0 else 0.42 * r for i in range(len(turns))]
        pen.polygon(
            [
                (x + q * math.sin(2 * math.pi * turn), y - q * math.cos(2 * math.pi * turn))
                for turn, q in zip(turns, radii, strict=True)
            ],
            fill=colour,
        )
    return image.resize((width, height), Image.Resampling.BOX)


class Question(NamedTuple):
    """{images}: how many pictures it is about."""

    text: str
    images: int = 1

    def answer(self, *shapes: Shape) -> str:
        first = shapes[0]
        if self.text == WHAT_ARE_THEY:
            return " and ".join(shape.name for shape in shapes).capitalize() + "."
        if self.text == WHICH_COLOUR:
            return first.colour.capitalize() + "."
        if self.text == WHICH_SHAPE:
            return f"A {first.shape}."
        if self.text == WHAT_ZH:
            return f"{ZH_COLOURS[first.colour]}的{ZH_SHAPES[first.shape]}。"
        return first.name.capitalize() + "."


WHAT, WHICH_COLOUR, WHICH_SHAPE = "What is it?", "Which colour is it?", "Which shape is it?"
WHAT_ZH, WHAT_ARE_THEY = "这是什么？", "What are they?"
QUESTIONS = (
    Question(WHAT),
    Question(WHICH_COLOUR),
    Question(WHICH_SHAPE),
    Question(WHAT_ZH),
    Question(WHAT_ARE_THEY, 2),
)
