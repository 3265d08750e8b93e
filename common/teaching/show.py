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


def messages(entries: Sequence[LedgerEntry], ranks: int | None = None) -> None:
    """What a step sent: one row for all layers that send the same.

    ranks: how many there are; the table then says as well what crosses between them (cost_model.py).
    """
    rows = Counter((e.op, re.sub(r"\.\d+\.", ".*.", e.label), e.shape, e.bytes) for e in entries)
    header, cells = ["op", "layer", "shape", "times", "bytes each"], []
    for (op, label, shape, size), n in rows.items():
        wire = [wire_bytes(op, size, ranks)] if ranks else []
        cells.append((op, label, list(shape), n, size, *wire, WHY[label.split(".")[-1]]))
    table((*header, *(["on the wire"] if ranks else []), "why"), cells)


def mistake(said: str, wrong: Any, right: Any) -> None:
    """A mistake that runs without an error: its number beside the right one. They must differ, or it is none."""
    wrong, right = _number(wrong), _number(right)
    if wrong == right:
        raise SystemExit(f"check failed: {said}: {wrong} is right")
    print(f"  {said}\n    wrong: {wrong}\n    right: {right}")


def _number(value: Any) -> str:
    """A row of numbers, or what is one already."""
    return value if isinstance(value, str) else " ".join(f"{x:.4g}" for x in np.asarray(value).ravel())


def check(said: str, ok: bool) -> None:
    """Print what was found; the script ends with this line and exit code 1 if it is not so."""
    if not ok:
        raise SystemExit(f"check failed: {said}")
    print(f"  ok: {said}")
