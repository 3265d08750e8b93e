"""How many messages of each kind the ranks of a layout must have said to each other: for whoever holds it against the ledger."""

from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.teaching.all_messages import Messages

# what messages are for where rows are cut over ranks; the tests beside those layouts hold every number of them
OF_SEQUENCE_PARALLELISM = {
    "all_gather": "before qkv and gate_up: each rank's rows -> all rows",
    "reduce_scatter": "embedding, o_proj, down_proj: sums, each rank its rows",
    "all_to_all": "prefill: the rows that emit",
}
OF_DATA_RANKS = {
    "all_gather": "decode: rows before the MLP, padded to the longest part",
    "reduce_scatter": "decode: the MLP's sums, each data rank its rows",
    "all_to_all": "prefill: the same two, each part as long as it is",
}
OF_ROWS_THAT_TRAVEL = {
    "all_gather": "where attention or a dense MLP is cut: each rank's rows -> all rows; decode: the rows that emit",
    "reduce_scatter": "embedding, o_proj, a dense MLP, where cut: sums, each rank its rows",
    "all_to_all": "3 a layer of experts: counts, rows there, outputs home; prefill: the rows that emit",
}
OF_CONTEXT_PARALLELISM = {
    "exchange": "prefill: k and v go round the ring",
    "all_gather": "prefill: rows before the MLP, queries with something cached; decode: (o, lse) of each rank's pages",
    "all_to_all": "prefill: answers to others' queries; the rows that emit",
    "reduce_scatter": "prefill: the MLP's sums, each rank its rows",
    "all_reduce": "decode: the MLP's sums",
}


def expected(scheduler: TPScheduler) -> dict[str, tuple[str, int, int]]:
    """What the formula says of each kind in one replica: in words, calls, bytes.

    1 + 2L all-reduces [T, D] a step, however layers and experts are spread; one gather [B, V/R] a step that samples. Between
    stages each rank sends [T, D] on a step, and each rank of the last stage its [B, V/R] back to rank 0.
    """
    wrapper, steps, work = scheduler.wrapper, scheduler.step_number, scheduler.work
    (tp, pp), item = (wrapper.parallel.layout.tp, wrapper.parallel.layout.pp), wrapper.dtype.itemsize
    per_step, row = 1 + 2 * wrapper.config.num_layers, wrapper.config.hidden_size * item
    logits = work["sampled"] * -(-wrapper.config.vocab_size // tp) * item
    said = {}
    if wrapper.communicator.spreads:
        return said
    if tp > 1:
        said["all_reduce"] = ("1 + 2L a step, [T, D]", per_step * steps, per_step * work["tokens"] * row)
    if tp > 1 and pp == 1:
        said["gather"] = ("1 a step that samples, [B, V/R]", work["samplings"], logits)
    for op in ("send", "receive") if pp > 1 else ():
        ranks = (pp - 1) * tp
        said[f"{op} hidden"] = (f"{ranks} a step, [T, D]", ranks * steps, ranks * work["inputs"] * row)
        said[f"{op} logits"] = (f"{tp} a step that samples, [B, V/R]", tp * work["samplings"], tp * logits)
    return said


def why(kind: str, said: Messages, formulas: list[dict], wrapper: TPRadixAttentionModelWrapper) -> str:
    """What these messages are for, and whether the formula knows of as many. formulas: of each replica."""
    if kind in formulas[0]:
        words = formulas[0][kind][0]
        right = tuple(sum(formula[kind][i] for formula in formulas) for i in (1, 2))
        return f"{'as the formula says' if right == said[:2] else f'NOT the formula {right}'}: {words}"
    if kind in (of_rows := _of_rows(wrapper)):
        return of_rows[kind]
    if kind == "gather":
        return "logits of the rows that emit, for rank 0"
    if kind == "all_gather":
        return "the answers, from each replica to all, once"
    if "task" in kind:
        return "what to do, rank 0 -> each"
    what = "tokens, rank 0 -> stage 0" if wrapper.parallel.pp.size > 1 else "tasks and tokens, rank 0 -> all"
    return f"{what}; the answers, once"


def _of_rows(wrapper: TPRadixAttentionModelWrapper) -> dict[str, str]:
    layout = wrapper.parallel.layout
    if not wrapper.communicator.spreads:
        return {}
    said = OF_CONTEXT_PARALLELISM if layout.cp > 1 else OF_DATA_RANKS if layout.attn_dp > 1 else OF_SEQUENCE_PARALLELISM
    return OF_ROWS_THAT_TRAVEL if wrapper.ep_dispatch == "all_to_all" else said
