"""How fast a layout can be at best.

A rank's turn cannot be shorter than what it must read takes over its memory's bandwidth, nor than what it must compute over its
arithmetic's peak, and its messages wait for both: turn = max(read, compute) + messages. Kernels take longer, and what starts them.
Two numbers are not the least there can be: how many experts a step reads is an expectation for evenly routed tokens (work.py), and
messages other than a sum over NVLink start as NCCL expects them to (machines.py).

Ranks of a host may share its memory, so how fast one reads depends on how many do so at once: of one request's stages one at a
time, of more replicas than requests those that have one.

Decode over N stages: the requests of a replica form m = min(N, requests) groups in flight, and a group's next token waits for
the last one to have passed all stages. So a token takes all stages' turns, or m turns of the slowest, whichever is longer.
Every request is taken to have its full context: the step gets no slower than that.

Prefill: a prompt of the full context in chunks, alone in its replica; chunk i + 1 enters a stage while i is in the next one.
"""

from dataclasses import dataclass
from typing import NamedTuple

from common.distributed.machines import Machine
from common.models.config import ModelConfig
from common.planner.holdings import Holdings, holdings, stages
from common.planner.plan import Load, Stage, Way
from common.planner.work import Message, Step, Work, seconds_of_messages, wire_bytes_of, work


class Turn(NamedTuple):
    """Seconds of one rank in one step."""

    weights: float  # reading them, and keys and values: 0 where arithmetic takes longer
    kv: float
    compute: float  # 0 where reading takes longer
    messages: float

    @property
    def total(self) -> float:
        return sum(self)


@dataclass(frozen=True)
class Bound:
    """Of a way: what a rank holds, says and needs at least."""

    way: Way
    held: Holdings
    room: int  # bytes that a rank may hold
    said: tuple[Message, ...]  # of the rank that is longest at it, for one token of each request
    wire_bytes: int  # of these, between all ranks of its groups
    seconds: float  # from one token of a request to its next
    parts: dict[str, float]  # seconds by what they go into, of the slowest stage's ranks
    first_token_s: float  # of a prompt of the full context, alone
    tokens_per_s: float

    @property
    def fits(self) -> bool:
        return self.held.total <= self.room


def bound(config: ModelConfig, way: Way, load: Load, machine: Machine, room: int) -> Bound:
    layout, of_stages = way.layout, stages(config, way.layout.pp)
    mine = -(-load.batch // layout.dp)  # requests of the fullest replica
    lanes = min(layout.pp, mine)
    step = Step(rows=-(-mine // lanes), known=load.context, emits=-(-mine // lanes), decode=True)
    works = [work(config, way, stage, load, step) for stage in of_stages]
    at_once = layout.tp * lanes * min(layout.dp, load.batch)
    turns = [_turn(one, way, load, machine, at_once) for one in works]
    slowest = max(range(len(turns)), key=lambda i: turns[i].total)
    seconds = max(sum(turn.total for turn in turns), lanes * turns[slowest].total)
    parts = {name: lanes * part for name, part in turns[slowest]._asdict().items()}
    parts["waiting"] = seconds - lanes * turns[slowest].total
    said = tuple(message._replace(times=lanes * message.times) for message in works[slowest].messages)
    return Bound(
        way, holdings(config, way, load), room, said, wire_bytes_of(said, layout), seconds, parts,
        _first_token(config, way, of_stages, load, machine), load.batch / seconds,
    )  # fmt: skip


def _turn(one: Work, way: Way, load: Load, machine: Machine, at_once: int) -> Turn:
    """at_once: ranks that have something to do at the same time."""
    at_once = min(machine.ranks_a_host, at_once)
    per_s = machine.bytes_per_s(one.weights + one.kv, at_once)
    weights, kv = one.weights / per_s, one.kv / per_s
    compute = one.flops / machine.flops_per_s(str(load.dtype).removeprefix("torch."), at_once)
    messages = seconds_of_messages(one.messages, way.layout, machine)
    return Turn(weights, kv, 0.0, messages) if weights + kv >= compute else Turn(0.0, 0.0, compute, messages)


def _first_token(config: ModelConfig, way: Way, of_stages: list[Stage], load: Load, machine: Machine) -> float:
    """When the last chunk leaves the last stage."""
    done = [0.0] * len(of_stages)
    at_once = way.layout.tp * min(len(of_stages), -(-load.context // load.chunk))
    for start in range(0, load.context, load.chunk):
        rows = min(load.chunk, load.context - start)
        step = Step(rows, start, emits=int(start + rows == load.context), decode=False)
        arrived = 0.0
        for i, stage in enumerate(of_stages):
            turn = _turn(work(config, way, stage, load, step), way, load, machine, at_once)
            arrived = done[i] = max(arrived, done[i]) + turn.total
    return done[-1]
