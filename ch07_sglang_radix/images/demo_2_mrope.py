"""Three positions a token: what M-RoPE gives a picture among words, chunk by chunk, and what decode goes on with.

    python ch07_sglang_radix/images/demo_2_mrope.py

By hand first: two words, a picture of two by three blocks, two words. Then the same in chunks that cut the picture: one number,
the shift, is all that a chunk has to be told of what came before it.
"""

from itertools import pairwise

import torch

from common.distributed.launch import run_main
from common.layers.rotary import RotaryEmbedding
from common.teaching.show import check, heading, mistake, table
from common.vision.mrope import Part, chunk_positions, shift_of

WORDS = ("A", "B", *(f"row {i}" for i in range(6)), "C", "D")
PICTURE = Part(at=2, count=6, first=0, height=2, width=3)
CUTS = (0, 4, 7, 10)


def main() -> None:
    heading("A picture of 2 x 3 rows between two words and two words")
    whole, shift = chunk_positions(0, len(WORDS), 0, [PICTURE])
    table(
        ("token", *WORDS), [(name, *row) for name, row in zip(("time", "line", "column"), whole.tolist(), strict=True)]
    )
    print(
        f"  six rows took {max(PICTURE.height, PICTURE.width)} positions: the shift is {shift}, and token 10, the next one, is at 7"
    )
    check("the shift is max(h, w) - h * w", shift == shift_of(2, 3) == -3)
    mistake("the text goes on by its number, as if the rows were words", wrong=range(8, 10), right=whole[0, 8:])

    heading("The same in chunks of 4, 3 and 3 tokens")
    known, lines, parts = 0, [], []
    for start, stop in pairwise(CUTS):
        first = max(start, 2)
        part = Part(first - start, min(stop, 8) - first, first - 2, 2, 3)
        before = known
        positions, known = chunk_positions(start, stop - start, before, [part])
        parts.append(torch.from_numpy(positions))
        lines.append((f"{start} .. {stop - 1}", before, " ".join(map(str, positions[1].tolist())), known))
    table(("tokens", "shift before", "line", "shift behind"), lines)
    check(
        "a picture that is cut moves nothing until its last row has come",
        torch.equal(torch.cat(parts, dim=1), torch.from_numpy(whole)),
    )

    heading("A head of 16, theta 100: frequencies 0 and 1 turn with time, 2 to 4 with the line, 5 to 7 with the column")
    rotary = RotaryEmbedding(16, 64, 100.0, sections=(2, 3, 3))
    cos, _ = rotary(torch.from_numpy(whole), torch.float32)
    table(
        ("token", "positions", *(f"cos {i}" for i in (0, 2, 5))),
        [
            (WORDS[t], " ".join(map(str, whole[:, t])), *(f"{float(cos[t, 0, i]):.4f}" for i in (0, 2, 5)))
            for t in (1, 3, 5, 8)
        ],
    )
    text = torch.arange(10)
    check("text alone: three positions that are equal turn as one does", all(
        torch.equal(three, one)
        for three, one in zip(rotary(text.expand(3, -1), torch.float32), rotary(text, torch.float32), strict=True)))  # fmt: skip


if __name__ == "__main__":
    run_main(main)
