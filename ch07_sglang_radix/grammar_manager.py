"""Requests with a grammar wait while it is compiled, and nobody else waits for them.

    enqueue       start(req)      the compiler's threads have the text, or had it before
    each step     take()          compiled: the request gets a matcher of its own. Not to be compiled: it ends with 400
    admission     the gate        "not now" to who still waits, and the next one in the queue is asked

SGLang 0.5.23 does the same with a queue of its own beside the waiting one (constrained/grammar_manager.py, GrammarManager).
There every rank compiles and the ranks must agree on who is ready; here rank 0 alone does, as it alone samples.
"""

from collections.abc import Callable
from concurrent.futures import Future
from time import monotonic

from llguidance import LLMatcher

from ch07_sglang_radix.request import Req
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.sampling import grammar
from common.sampling.grammar import GrammarCompiler


class GrammarManager:
    """A gate (prefill_adder.py)."""

    def __init__(self, wrapper: TPRadixAttentionModelWrapper):
        config, tokenizer = wrapper.config, wrapper.tokenizer
        self.compiler = tokenizer and GrammarCompiler(tokenizer.inner, config.vocab_size, config.eos_token_ids)
        self.compiling: dict[Req, tuple[Future[LLMatcher], float]] = {}  # until when

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that are allowed where a grammar accepts. They end the answer, ignore_eos or not: nothing may follow."""
        return frozenset(self.compiler.end_ids)

    def start(self, req: Req) -> None:
        """A request that is about to be queued; most have no grammar."""
        if req.params.grammar:
            self.compiling[req] = self.compiler.start(*req.params.grammar), monotonic() + grammar.SECONDS

    def __call__(self, req: Req, matched: int) -> bool:
        return req not in self.compiling

    def take(self, refuse: Callable[[Req, str], None]) -> None:
        """Whoever is ready has a mask from now on; `refuse` is told of those who can never run, and why."""
        for req, (future, until) in list(self.compiling.items()):
            late = monotonic() > until
            if not (future.done() or late or req.ended):
                continue
            del self.compiling[req]
            if req.ended:  # aborted meanwhile
                pass
            elif not future.done():
                refuse(req, grammar.too_slow(req.params.grammar[0]))
            elif error := future.exception():
                refuse(req, str(error))
            else:
                req.grammar = self.compiler.mask(future.result(), req.params.after_thinking)
