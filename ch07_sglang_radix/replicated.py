"""The other design, SGLang's own: the same scheduler on every rank, fed with the same requests.

    rank 0                                    every other rank
    new requests      -> broadcast            the same requests
    queue, tree, pools: what to do now        queue, tree, pools: what to do now
    execute it        (all-reduces inside)    execute it
    logits            <-> all-gather          logits
    sample                                    sample, with the same seeds

No task goes over the wire and no token. Instead every rank needs a queue, a tree and pools, and all the logits; and all of
them must decide alike, always: one clock read, one set iterated, one random number more on one rank, and they compute
different steps. SGLang 0.5.23 does it so: srt/managers/scheduler_components/request_receiver.py broadcasts the requests,
srt/layers/logits_processor.py gathers the logits on all ranks, and srt/layers/sampler.py leaves the tokens as each rank has
drawn them unless SYNC_TOKEN_IDS_ACROSS_TP is set.

`compare` is ours: before every step the ranks compare what they are about to do. It costs a message a step, and says which
rank has left the others, and in what, where otherwise they would go on with different texts, or wait for each other for ever.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any
from zlib import crc32

import torch

from ch07_sglang_radix.control_plane import ControlPlane
from ch07_sglang_radix.request import RequestOutput
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tasks import DecodeTask, PrefillTask, encode
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.parallel_state import ParallelState, TPGroup, all_gather, broadcast
from common.sampling.batch import SamplingBatch
from common.sampling.params import SamplingParams
from common.sampling.sampler import Drawn, sample


class Divergence(ValueError):
    """The ranks were about to do different things; the text says which rank, and what."""


class ReplicatedScheduler(TPScheduler):
    """A TPScheduler that decides on every rank. Same calls, same results; requests are rank 0's to bring.

    compare: before every step, see whether all ranks are about to do the same; raises Divergence on all of them if not.
    The other arguments are TPScheduler's, but for gather_best and trace.
    """

    def __init__(self, wrapper: TPRadixAttentionModelWrapper, *, compare: bool = True, **options: Any):
        if wrapper.verifier:
            raise ValueError(
                "guesses are not verified by this design: its steps are tasks of one token; use TPScheduler"
            )
        self.ranks = wrapper.tp
        super().__init__(_AsIfAlone(wrapper), **options)
        self.control = ReplicatedControl(wrapper, compare)
        self._inbox: list[dict[str, Any]] = []  # requests that the other ranks have not heard of

    @property
    def busy(self) -> bool:
        return bool(self._inbox) or super().busy

    def enqueue(self, text: str | None, ids: list[int], params: SamplingParams, **more: Any) -> int:
        if params.prompt_logprobs is not None:
            raise ValueError("log-probabilities of a prompt are not told by this design; use TPScheduler")
        if params.grammar:
            raise ValueError(
                "grammars are not in this design: the ranks do not agree on whose is compiled; use TPScheduler"
            )
        self._inbox.append({"text": text, "ids": ids, "params": asdict(params), **more})
        return self.num_requests + len(self._inbox) - 1

    def process_requests(self, arrivals: Callable[[int], bool] | None = None) -> dict[int, RequestOutput]:
        more = True
        while more:
            coming = self._receive_requests(arrivals)
            more = self.step() or coming
        results, self.results, self.grown = self.results, {}, {}
        return dict(sorted(results.items()))

    def _receive_requests(self, arrivals: Callable[[int], bool] | None) -> bool:
        """Queue what has come to rank 0, on every rank; returns whether more is to come."""
        coming, refused = False, None
        if self.ranks.rank == 0 and arrivals is not None:
            try:
                coming = arrivals(self.step_number)
            except ValueError as error:
                refused = str(error)
        said = share_requests(self._inbox, coming, refused, self.ranks)
        self._inbox = []
        if said["refused"]:
            raise ValueError(said["refused"])
        for one in said["requests"]:
            params = SamplingParams(**one.pop("params"))
            super().enqueue(one.pop("text"), one.pop("ids"), params, **one)
        return said["coming"]


class ReplicatedControl(ControlPlane):
    """The protocol of this design: every rank calls `execute` and `sample`, and nobody follows."""

    def __init__(self, wrapper: TPRadixAttentionModelWrapper, compare: bool):
        super().__init__(wrapper)
        self.compare = compare
        self._drawn = 0  # CRC-32 of all tokens drawn so far

    def execute(self, task: PrefillTask | DecodeTask) -> torch.Tensor | None:
        """This rank's part of a step that all ranks have decided on; returns the logits [B, V] of the rows that emit."""
        if self.compare:
            self._see_that_all_agree(task)
        logits_local = self._execute_locally(task)
        if logits_local is None:
            return None
        parts = all_gather(logits_local, self.tp, "logits")  # COMM all-gather [B, V/R]: every rank samples
        return torch.cat(parts, dim=-1)[:, : self.wrapper.config.vocab_size]

    def sample(self, logits: torch.Tensor, batch: SamplingBatch) -> Drawn:
        sampled = sample(logits, batch)
        self.wrapper.receive_tokens(sampled.tokens)
        if self.compare:
            self._drawn = crc32(sampled.tokens.cpu().numpy().tobytes(), self._drawn)
        return Drawn(sampled)

    def _see_that_all_agree(self, task: PrefillTask | DecodeTask) -> None:
        mine = torch.tensor([self._drawn, crc32(encode(task).tobytes()), *_facts(task)])
        everyone = all_gather(mine, self.tp, "compare")  # COMM all-gather [7]: is everybody about to do the same?
        for rank, theirs in enumerate(everyone):
            if theirs[0] != everyone[0][0]:
                raise Divergence(f"before step {task.step}: rank {rank} has drawn other tokens than rank 0")
            if not torch.equal(theirs, everyone[0]):
                rank_0, other = (_said(*one[2:].tolist()) for one in (everyone[0], theirs))
                raise Divergence(f"before step {task.step}: rank 0 wants a {rank_0}; rank {rank} a {other}")


class _AsIfAlone:
    """A wrapper as its only rank would see it: whoever decides need not know how many do."""

    def __init__(self, wrapper: TPRadixAttentionModelWrapper):
        self._wrapper = wrapper
        self.tp = replace(wrapper.tp, rank=0, size=1)
        self.parallel = ParallelState.of(self.tp)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)


def share_requests(new: Sequence[dict[str, Any]], coming: bool, refused: str | None, tp: TPGroup) -> dict[str, Any]:
    """Rank 0's new requests to every rank, as JSON: {requests, coming, refused}. Two words if there is nothing new."""
    said = {"requests": list(new), "refused": refused} if new or refused else None
    payload = torch.tensor(list(json.dumps(said).encode() if said and tp.rank == 0 else b""), dtype=torch.uint8)
    head = torch.tensor([len(payload), int(coming)])
    broadcast(head, tp, "requests")  # COMM broadcast [2]: bytes of the new requests, and whether more is to come
    size, coming = head.tolist()
    if size:
        payload = payload if tp.rank == 0 else torch.empty(size, dtype=torch.uint8)
        broadcast(payload, tp, "requests")  # COMM broadcast [bytes]: the new requests
    said = json.loads(payload.numpy().tobytes()) if size else {"requests": [], "refused": None}
    return said | {"coming": bool(coming)}


def _facts(task: PrefillTask | DecodeTask) -> tuple[int, int, int, int, int]:
    """decode or not, sequences, tokens to compute, pages that are new, the first of them."""
    pages = [page for update in task.updates for page in update.pages]
    decode = isinstance(task, DecodeTask)
    sequences, tokens = (task.rows, task.rows) if decode else (task.sequences, task.token_ids)
    return int(decode), len(sequences), len(tokens), len(pages), pages[0] if pages else -1


def _said(decode: int, sequences: int, tokens: int, pages: int, first: int) -> str:
    new = f"{pages} new page(s), the first is {first}" if pages else "no new page"
    return f"{'decode' if decode else 'prefill'} of {sequences} sequence(s), {tokens} token(s), {new}"
