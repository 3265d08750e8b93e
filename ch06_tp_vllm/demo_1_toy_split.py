"""Two ways to cut a matrix product, on paper-sized numbers. NumPy only; "ranks" are variables.

    python ch06_tp_vllm/demo_1_toy_split.py
    python ch06_tp_vllm/demo_1_toy_split.py --csv figures/toy_split.csv    # and what the picture is drawn from

Column-parallel: each rank has some columns of W and gets those columns of the result; put them side by side.
Row-parallel: each rank has some rows of W and the matching columns of X and gets a partial sum; add them up.
Mistakes are shown with their numbers, beside the right ones; every step checks itself.
"""

from collections.abc import Iterator

import numpy as np

from common.distributed.cost_model import wire_bytes
from common.distributed.launch import run_main
from common.teaching.report import csv_option, write_csv
from common.teaching.show import check, heading, matrix, mistake, table

X = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])  # [2, 4]: two tokens, four features
W = np.array([[1, 0, 2, 1, 3, 0], [0, 1, 1, 2, 0, 1], [2, 1, 0, 1, 1, 2], [1, 2, 1, 0, 2, 1]])  # [4, 6]


def main() -> None:
    csv = csv_option(__doc__)
    column_parallel()
    row_parallel()
    column_then_row()
    merged_gate_and_up()
    fused_qkv()
    what_goes_wrong()
    what_is_sent()
    if csv:
        write_csv(list(owners()), csv, measured=False)


def column_parallel() -> None:
    heading("Column-parallel: cut the output. Y = concat")
    matrix("X, on both ranks", X)
    matrix("W: rank 0 | rank 1", W, cut=3)
    y0, y1 = X @ W[:, :3], X @ W[:, 3:]
    matrix("Y: rank 0 | rank 1", np.concatenate([y0, y1], axis=1), cut=3)
    check(
        "columns side by side are the product, and nobody had to talk",
        np.allclose(np.concatenate([y0, y1], axis=1), X @ W),
    )


def row_parallel() -> None:
    heading("Row-parallel: cut the input. Y = sum")
    matrix("X: rank 0 | rank 1", X, cut=2)
    matrix("W: rank 0 over rank 1", W, cut=2, axis=0)
    y0, y1 = X[:, :2] @ W[:2], X[:, 2:] @ W[2:]
    matrix("rank 0's partial sum", y0)
    matrix("rank 1's partial sum", y1)
    matrix("their sum: the all-reduce", y0 + y1)
    check("the sum of the partial products is the product", np.allclose(y0 + y1, X @ W))
    check("no single partial sum is", not np.allclose(y0, X @ W) and not np.allclose(y1, X @ W))


def column_then_row() -> None:
    heading("Column, then row: one all-reduce and nothing in between")
    up, down = W, W.T[:, ::-1]  # [4, 6], [6, 4]

    def act(x):
        return np.maximum(x - 20, 0)  # any function of one number; 20 lies among the numbers here

    partial = [act(X @ up[:, cut]) @ down[cut] for cut in (slice(0, 3), slice(3, 6))]
    print("  rank r: act(X @ up[:, mine]) @ down[mine, :]    the columns it made are the ones it needs")
    check("sum over ranks = act(X up) down", np.allclose(sum(partial), act(X @ up) @ down))
    row_first = act(X[:, :2] @ up[:2]) + act(X[:, 2:] @ up[2:])
    mistake(
        "row first: each rank would activate its partial sum, max(x - 20, 0); the second token's features",
        row_first[1], act(X @ up)[1],
    )  # fmt: skip


def merged_gate_and_up() -> None:
    heading("gate and up as one product: cut each, then stack")
    gate, up = W, W[:, ::-1] + 1  # [4, 6] each
    for rank, mine in enumerate((slice(0, 3), slice(3, 6))):
        held = np.concatenate([gate[:, mine], up[:, mine]], axis=1)  # one GEMM instead of two
        matrix(f"rank {rank}: its columns of gate | of up", held, cut=3)
        merged = X @ held
        right = np.allclose(merged[:, :3], (X @ gate)[:, mine]) and np.allclose(merged[:, 3:], (X @ up)[:, mine])
        check(f"rank {rank}: one product of [gate | up] gives what two products give", right)
    stacked, mine = np.concatenate([gate, up], axis=1), slice(0, 3)  # [4, 12]
    half = X @ stacked[:, :6]  # all of gate, nothing of up
    mistake(
        "rank 0 takes the first half of the stacked matrix: what it believes to be its up, of the first token",
        half[0, 3:], (X @ up)[0, mine],
    )  # fmt: skip


def fused_qkv() -> None:
    heading("q, k and v as one product: the same, by heads")
    print("  A head: a few features of q, k and v that attend among themselves. Here two query heads of two features,")
    print("  and one KV head (features of k and v) that both of them look up.")
    wq, wk, wv = W[:, :4], W[:, 4:], W[:, 1:3]
    for rank, mine in enumerate((slice(0, 2), slice(2, 4))):
        held = np.concatenate([wq[:, mine], wk, wv], axis=1)
        matrix(f"rank {rank}: query head {rank} | k | v, the KV head on both", held, cut=(2, 4))
        q, k, v = np.split(X @ held, [2, 4], axis=1)
        right = np.allclose(q, (X @ wq)[:, mine]) and np.allclose(k, X @ wk) and np.allclose(v, X @ wv)
        check(f"rank {rank}: one product, split behind it, is three products", right)
    half = X @ np.concatenate([wq, wk, wv], axis=1)[:, :4]  # both query heads, no k and no v
    mistake(
        "rank 0 takes the first half of the fused matrix: what it believes to be k, of the first token",
        half[0, 2:], (X @ wk)[0],
    )  # fmt: skip


def what_goes_wrong() -> None:
    heading("Two mistakes that run without an error")
    bias = np.array([10, 20, 30, 40, 50, 60])
    each_adds = (X[:, :2] @ W[:2] + bias) + (X[:, 2:] @ W[2:] + bias)
    mistake(
        "row-parallel, and every rank adds the bias 10 20 30 40 50 60: it counts R times; Y of the first token",
        each_adds[0], (X @ W + bias)[0],
    )  # fmt: skip
    q, k = X @ W[:, :4], X @ W[:, 2:]  # one head of four features

    def weights(q, k):
        scores = np.exp((q @ k.T - (q @ k.T).max(axis=1, keepdims=True)) / 2000)
        return scores / scores.sum(axis=1, keepdims=True)

    halves = (weights(q[:, :2], k[:, :2]) + weights(q[:, 2:], k[:, 2:])) / 2
    mistake(
        "a head cut through, half of its features on each rank: how the second token attends to both",
        halves[1], weights(q, k)[1],
    )  # fmt: skip


def what_is_sent() -> None:
    heading("What would be sent, layer by layer: bytes of the tensor on one rank, and on the wire between both")
    y = X @ W
    rows = [
        ("column, alone", "all_gather", [2, 3], y[:, :3].nbytes, "only if every rank needs all columns of Y"),
        ("row, alone", "all_reduce", [2, 6], y.nbytes, "partial sums -> the sum"),
        ("column, then row", "all_reduce", [2, 4], (y @ W.T).nbytes, "the same; between the two, nothing"),
    ]
    rows = [(layer, op, shape, nbytes, wire_bytes(op, nbytes, 2), why) for layer, op, shape, nbytes, why in rows]
    table(("layer", "op", "shape", "bytes", "on the wire", "why"), rows)


def owners() -> Iterator[dict]:
    """Every number of both products, and the rank that has it."""
    left, right = np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1, 1, 1])  # who has a feature of X, who a column of W
    for cut, of_x, of_w, results in (
        ("column", None, right[None, :], [("Y", X @ W, right[None, :])]),
        ("row", left[None, :], left[:, None], [
            ("partial sum", X[:, :2] @ W[:2], 0), ("partial sum", X[:, 2:] @ W[2:], 1), ("Y", X @ W, None),
        ]),
    ):  # fmt: skip
        for i, (name, values, owner) in enumerate([("X", X, of_x), ("W", W, of_w), *results]):
            who = np.broadcast_to("both" if owner is None else owner, values.shape)
            for (row, column), value in np.ndenumerate(values):
                yield {
                    "cut": cut, "place": i, "matrix": name, "row": row, "column": column, "value": value,
                    "rank": who[row, column],
                }  # fmt: skip


if __name__ == "__main__":
    run_main(main)
