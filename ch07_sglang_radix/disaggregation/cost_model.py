"""What one engine with chunks and two engines that share the work make of long prompts: a model of it, from measured times.

    one engine   a decode step follows each chunk: who runs waits for a chunk and a step, the prompt for its chunks and the steps
                 between them
    two engines  who runs waits for a step. The prompt's pages leave chunk by chunk, in line: behind its last chunk it waits for
                 that chunk's pages alone if the wire is as fast as the computing, else for those that queue before them
    deflected    the decode engine computes the prompt itself and is one engine for it: who runs waits for its chunks, and it for
                 nothing that is on the prefill engine or on the wire

Prompts that come every so many seconds wait for each other as soon as one takes longer than that: `Arrivals`. What the model leaves
out: cores that two processes share, the meeting of the two sides, and attention, by which a later chunk takes longer than a first.
"""

from dataclasses import dataclass
from math import inf


@dataclass(frozen=True)
class Felt:
    """chunks: of the prompt. gap_s: seconds between two tokens of those who run, if a chunk of it comes between them; step_s: if
    none does. first_s: until the prompt's first token, if nobody waits before it. busy_s: for which the slower of the two, the
    engine that computes it and the wire, has no time for another."""

    chunks: int
    gap_s: float
    step_s: float
    first_s: float
    busy_s: float


@dataclass(frozen=True)
class Times:
    """chunk_s, step_s: seconds of `chunk` prompt tokens, and of a decode step of those who run. token_bytes: K and V of a token."""

    chunk: int
    chunk_s: float
    step_s: float
    token_bytes: float = 0.0

    def chunks(self, prompt: int) -> int:
        return -(-prompt // self.chunk)

    def together(self, prompt: int) -> Felt:
        """One engine."""
        chunks = self.chunks(prompt)
        first = chunks * self.chunk_s + (chunks - 1) * self.step_s
        return Felt(chunks, self.chunk_s + self.step_s, self.step_s, first, first + self.step_s)

    def apart(self, prompt: int, wire: float = inf) -> Felt:
        """Two engines. wire: bytes a second."""
        chunks, travel = self.chunks(prompt), self.chunk * self.token_bytes / wire
        computed = left = 0.0
        for _ in range(chunks):
            computed += self.chunk_s
            left = max(left, computed) + travel
        return Felt(chunks, self.step_s, self.step_s, left, chunks * max(self.chunk_s, travel))

    def least_backlog(self, prompt: int, wire: float = inf) -> float:
        """Seconds of others' prompts on the prefill engine beyond which a deflected prompt has its first token sooner. Of one chunk
        always: only the steps between its chunks can make it later."""
        return max(self.together(prompt).first_s - self.apart(prompt, wire).first_s, 0.0)

    @property
    def even_wire(self) -> float:
        """Bytes a second of a wire that is as fast as the computing."""
        return self.chunk * self.token_bytes / self.chunk_s


@dataclass(frozen=True)
class Arrivals:
    """count prompts, one every `every_s` seconds."""

    every_s: float
    count: int

    def gap_s(self, felt: Felt, share: float = 0.99) -> float:
        """The gap between tokens that a `share` of all gaps do not exceed: with a chunk in it only if enough gaps have one."""
        rest_s = max(self.every_s - felt.chunks * felt.gap_s, 0.0)  # of the time from one prompt to the next
        with_chunk = felt.chunks / (felt.chunks + rest_s / felt.step_s)
        return felt.gap_s if with_chunk > 1 - share else felt.step_s

    def first_s(self, felt: Felt) -> float:
        """The median prompt's first token: each waits for what those before it have left undone."""
        late_s = max(felt.busy_s - self.every_s, 0.0)
        return felt.first_s + late_s * (self.count - 1) / 2
