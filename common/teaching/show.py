"""What demos print: tables, matrices, and checks that can fail."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from common.distributed.cost_model import wire_bytes
from common.distributed.ledger import LedgerEntry

WHY = {
    "embed_tokens": "one rank's row + zeros -> the row",
    "o_proj": "the heads' partial sums -> the full sum",
    "down_proj": "the MLP's partial sums -> the full sum",
    "logits": "rank 0 alone samples",
    "tokens": "the tokens rank 0 chose",
    "step": "what to do in this step",
    "task": "what to do in this step",
    "stop": "no more steps for now",
    "results": "the answers so far, for the script on each rank",
}


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], indent: str = "  ") -> None:
    """Columns as wide as they must be: numbers to the right, words to the left."""
    cells = [[_text(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    right = [all(isinstance(row[i], int | float | np.number) for row in rows) for i in range(len(header))]
    for row in [list(header), *cells]:
        line = "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        print((indent + line).rstrip())


def _text(cell: Any) -> str:
    if isinstance(cell, bool) or not isinstance(cell, int | float | np.number):
        return str(cell)
    return f"{cell:,}" if isinstance(cell, int | np.integer) else f"{cell:,.2f}"


def matrix(name: str, values: np.ndarray, cut: int | Sequence[int] = (), axis: int = 1, indent: str = "  ") -> None:
    """A small matrix; `cut` draws the lines between owners, along columns (axis 1) or rows (axis 0)."""
    cuts = [cut] if isinstance(cut, int) else list(cut)
    words = [[f"{x:g}" for x in row] for row in values]
    width = max(len(word) for row in words for word in row)
    print(f"{indent}{name} {list(values.shape)}")
    for i, row in enumerate(words):
        if axis == 0 and i in cuts:
            print(indent + "  " + "-" * ((width + 1) * len(row) - 1))
        bounds = [0, *(cuts if axis == 1 else ()), len(row)]
        parts = [" ".join(w.rjust(width) for w in row[i:j]) for i, j in pairwise(bounds)]
        print(f"{indent}  {' | '.join(parts)}")


def messages(entries: Sequence[LedgerEntry], size: int) -> None:
    """What a step of `size` ranks sent: one row for all layers that send the same.

    "bytes each" are of the tensor that a rank hands in, "on the wire" those that the busiest rank moves for it
    (distributed/cost_model.py); at R = 2 the two are equal.
    """
    rows = Counter((e.op, re.sub(r"\.\d+\.", ".*.", e.label), e.shape, e.bytes) for e in entries)
    table(
        ("op", "layer", "shape", "times", "bytes each", "on the wire", "why"),
        [
            (op, label, list(shape), times, n, wire_bytes(op, n, size), WHY[label.split(".")[-1]])
            for (op, label, shape, n), times in rows.items()
        ],
    )


def check(said: str, ok: bool) -> None:
    """Print what was found; the script ends with this line and exit code 1 if it is not so."""
    if not ok:
        raise SystemExit(f"check failed: {said}")
    print(f"  ok: {said}")
