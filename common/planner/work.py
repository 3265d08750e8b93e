"""What one rank reads, computes and says in a step of its stage."""

from dataclasses import dataclass
from functools import lru_cache
from math import comb, prod
from typing import NamedTuple

from common.attention.kv_format import wire_dtype
from common.distributed.cost_model import wire_bytes
from common.distributed.layout import Layout
from common.distributed.machines import Machine
from common.distributed.spawn import FRAME
from common.layers.heads import split_evenly
from common.layers.moe import Mixture
from common.models.config import ModelConfig
from common.planner.codes import saved_by_codes
from common.planner.holdings import own_heads, page_bytes, parameters
from common.planner.plan import Load, Stage, Way, members

WORD = 8  # bytes of a number in a task, and of a token


class Message(NamedTuple):
    """`times` operations over the group `kind`, each of a tensor of `nbytes` on a rank."""

    op: str
    label: str
    kind: str
    nbytes: int
    times: int = 1


@dataclass(frozen=True)
class Step:
    """New tokens of a stage's turn, of all its data ranks together: `rows` of them behind `known` others each.

    `emits` sequences give a token. A decode step has a row a request; a prefill step those of one prompt's chunk.
    """

    rows: int
    known: int
    emits: int
    decode: bool


@dataclass(frozen=True)
class Work:
    """Of one rank."""

    weights: int  # bytes read
    kv: int  # bytes read
    flops: int
    messages: tuple[Message, ...]


def work(config: ModelConfig, way: Way, stage: Stage, load: Load, step: Step) -> Work:
    """Every weight is read once, but for the embedding, of which each token takes a row, and experts that no row of the step
    has chosen; K and V are read once by each sequence. That, and what is multiplied, is the least there can be where sequences
    share no pages, but for the experts: how many of them are read is what to expect if every expert is as likely."""
    layout, has = way.layout, parameters(config, way.layout, stage, way.travels)
    head = (has.head or has.embedding) if stage.last else 0
    own = own_rows(way, step)
    if step.decode:  # a row a sequence
        pairs = tokens_read = own * -(-step.known // layout.cp)
    else:  # one sequence, which lies with one data rank
        pairs = (step.rows * step.known + step.rows**2 // 2) // layout.cp
        tokens_read = (step.known + step.rows) // layout.cp
    flops = 2 * (has.attention * own + has.mlp * step.rows + head * step.emits)
    flops += 2 * pairs * _numbers_of_a_pair(config, layout, step) * stage.layers
    read = has._replace(embedding=0, head=head)
    if mixture := config.mixture:
        read = read._replace(experts=round(has.experts * read_share(mixture, layout.ep, step.rows)))
        seen = -(-own // layout.attn_tp) if way.travels else step.rows  # by router and shared expert of this rank
        flops += 2 * (has.router + has.shared) * seen
        flops += 2 * has.experts * step.rows * mixture.router.top_k // mixture.num_experts
    a_token = page_bytes(config, layout, stage, load) // load.page_size
    return Work(
        read.nbytes(load.dtype) - saved_by_codes(config, way, stage, load),
        tokens_read * a_token,
        flops,
        tuple(messages(config, way, stage, load, step)),
    )


def touched(mixture: Mixture, rows: int) -> float:
    """The share of a layer's experts that at least one of so many rows has chosen, if every expert is as likely.

    A router has favourites: then it is less, and the rank that has them is late for another reason.
    """
    return 1 - (1 - mixture.router.top_k / mixture.num_experts) ** rows


def read_share(mixture: Mixture, ep: int, rows: int) -> float:
    """Of its experts' weights, the share that the rank reads for which a layer's sum waits.

    Experts that are cut by columns are read alike by all. Dealt out over `ep` ranks, one of these has most of what was chosen.
    """
    experts, share = mixture.num_experts, touched(mixture, rows)
    if ep == 1:
        return share
    return most_on_a_rank(experts, ep, round(experts * share)) / split_evenly(experts, 0, ep)[0]


@lru_cache(maxsize=4096)
def most_on_a_rank(experts: int, ranks: int, drawn: int) -> float:
    """The expected number of the rank that has most of `drawn` different experts, if each set of so many is as likely.

    E[max] = sum over m of 1 - P(max <= m), and P(max <= m) is the coefficient of x^drawn in the product over the ranks of
    sum over j <= m of C(own, j) x^j, out of C(experts, drawn). A polynomial is an integer here, its coefficients `experts` + 1
    bits each: none is more than the sum of all C(experts, j), which is 2^experts.
    """
    bits, most = experts + 1, 0.0
    own = [sum(piece.n for piece in split_evenly(experts, rank, ranks)[1]) for rank in range(ranks)]
    for m in range(min(max(own), drawn)):
        product = prod(sum(comb(n, j) << j * bits for j in range(m + 1)) for n in own)
        most += 1 - ((product >> drawn * bits) & ((1 << bits) - 1)) / comb(experts, drawn)
    return most


def _numbers_of_a_pair(config: ModelConfig, layout: Layout, step: Step) -> int:
    """That a query and a key multiply, and a score and a value, all heads of a rank together."""
    heads, latent = own_heads(config, layout).num_q, config.latent
    if latent is None:
        return 2 * heads * config.head_dim
    expanded = latent.nope_dim + latent.rope_dim + latent.v_dim
    return heads * (latent.row + latent.kv_rank if step.decode else expanded)


def own_rows(way: Way, step: Step) -> int:
    """For which the fullest rank computes attention. A decode step's are shared out over data ranks, a prompt's over cp ranks."""
    return -(-step.rows // (way.layout.attn_dp if step.decode else way.layout.cp))


def messages(config: ModelConfig, way: Way, stage: Stage, load: Load, step: Step) -> list[Message]:
    """Of a rank that has the prompt's rows, or the most of a decode step's; one entry for all layers that send the same."""
    layout, size = way.layout, load.dtype.itemsize
    row = config.hidden_size * size
    rows = split_evenly(config.vocab_size, 0, layout.tp)[0]
    said: list[Message] = []
    if layout.tp * layout.pp > 1:  # between stages a message for each rank: nobody waits for who is behind
        said.append(Message("send" if layout.pp > 1 else "broadcast", "task", "replica", FRAME * WORD))
    if not stage.first:
        said.append(Message("receive", "hidden", "pp", step.rows * row))
    if layout.cp > 1:
        said += _between_parts_of_a_context(config, layout, load, step, stage.layers)
    if layout.tp > 1:
        everywhere = not way.spreads or (layout.cp > 1 and step.decode)
        said += (_sums if everywhere else _spread)(config, way, step, stage, row)
    if not stage.last:
        said.append(Message("send", "hidden", "pp", step.rows * row))
    elif step.emits:
        logits = step.emits * rows * size
        if layout.pp > 1:
            said.append(Message("send", "logits", "replica", logits))
        elif layout.tp > 1:
            said.append(Message("gather", "logits", "tp", logits))
    if step.emits and layout.tp > 1 and stage.first:  # whoever embeds them
        told = [Message("send", "task", "tp", FRAME * WORD)] if layout.pp > 1 else []
        said += [*told, Message("broadcast", "tokens", "tp", step.emits * WORD)]
    return said


def _sums(config: ModelConfig, way: Way, step: Step, stage: Stage, row: int) -> list[Message]:
    """Every rank has all rows: embedding and attention are summed over the ranks that cut them, MLPs over all."""
    whole, attention = step.rows * row, way.layout.attn_tp > 1
    first = [Message("all_reduce", "embed_tokens", "attn_tp", whole)] if stage.first and attention else []
    o_proj = [Message("all_reduce", "o_proj", "attn_tp", whole, stage.layers)] if attention else []
    return [*first, *o_proj, Message("all_reduce", "down_proj", "tp", whole, stage.layers)]


def _spread(config: ModelConfig, way: Way, step: Step, stage: Stage, row: int) -> list[Message]:
    """Rows lie on their part's ranks: gathered and scattered among these for attention, and among all for the MLP."""
    layout, layers = way.layout, stage.layers
    mine = -(-own_rows(way, step) // layout.attn_tp)  # rows that a rank holds; the part's others hold as many
    said = []
    if layout.attn_tp > 1:
        part = mine * layout.attn_tp * row
        said += [
            Message("reduce_scatter", "embed_tokens", "attn_tp", part),
            Message("all_gather", "qkv_proj", "attn_tp", mine * row, layers),
            Message("reduce_scatter", "o_proj", "attn_tp", part, layers),
        ]
    if way.travels:
        said += _of_rows_that_travel(config.mixture, way, step, stage.sparse, mine, row)
        layers -= stage.sparse
    uneven = layout.attn_dp > 1 and not step.decode  # one data rank has all of a prompt's rows
    holding = layout.attn_tp if uneven else layout.tp  # ranks
    there, back = ("all_to_all", "all_to_all") if uneven else ("all_gather", "reduce_scatter")
    if layers:
        said += [
            Message(there, "gate_up_proj", "tp", mine * row * (layout.tp if uneven else 1), layers),
            Message(back, "down_proj", "tp", mine * holding * row, layers),
        ]
    if step.decode:
        said.append(Message("all_gather", "hidden", "tp", mine * row))
    elif step.emits:  # the last row, from the rank that has it to all
        said.append(Message("all_to_all", "hidden", "tp", layout.tp * step.emits * row))
    return said


def _of_rows_that_travel(mixture: Mixture, way: Way, step: Step, layers: int, mine: int, row: int) -> list[Message]:
    """Counts, rows to their experts, outputs home. What comes to a prefill step's rank to go home again is its share of all rows
    that are sent, if every expert is as likely. layers/dispatch.py."""
    layout, k = way.layout, mixture.router.top_k
    slots, _ = split_evenly(mixture.num_experts, 0, layout.ep)
    there = back = layout.tp * slots * mine * row
    if not step.decode:
        there, back = mine * k * layout.moe_tp * row, step.rows * k // layout.ep * row
    return [
        Message("all_to_all", "counts", "tp", layout.tp * slots * WORD, layers),
        Message("all_to_all", "dispatch", "tp", there, layers),
        Message("all_to_all", "combine", "tp", back, layers),
    ]


def _between_parts_of_a_context(
    config: ModelConfig, layout: Layout, load: Load, step: Step, layers: int
) -> list[Message]:
    """Decode: each rank's answers (o and its log-sum-exp) to all queries. Prefill: K and V go round, and for tokens that were
    cached before queries and answers travel. attention/context_parallel.py."""
    heads = own_heads(config, layout)
    size, own = load.dtype.itemsize, -(-step.rows // layout.cp)
    query = heads.num_q * config.head_dim * size
    answer = query + heads.num_q * 4
    if step.decode:
        return [Message("all_gather", "merge", "cp", step.rows * answer, layers)]
    block = own * 2 * heads.num_kv * config.head_dim * wire_dtype(load.kv_dtype, load.dtype).itemsize
    said = [Message("exchange", "ring", "cp", block, layers * (layout.cp - 1))]
    if step.known:
        said += [
            Message("all_gather", "cached", "cp", own * query, layers),
            Message("all_to_all", "cached", "cp", layout.cp * own * answer, layers),
        ]
    return said


def seconds_of_messages(said: tuple[Message, ...], layout: Layout, machine: Machine) -> float:
    """One after the other, each over the group of its kind that lies on most hosts."""
    total = 0.0
    for message in said:
        ranks, on = members(layout, message.kind, machine.ranks_a_host)
        total += message.times * machine.link(ranks, on).seconds(message.op, message.nbytes, ranks)
    return total


def wire_bytes_of(said: tuple[Message, ...], layout: Layout) -> int:
    """Between all ranks of the groups that one rank talks in."""
    return sum(m.times * wire_bytes(m.op, m.nbytes, members(layout, m.kind, layout.world)[0]) for m in said)
