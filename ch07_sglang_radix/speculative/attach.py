"""Where an engine gets what this wing has: who guesses on rank 0, what is kept, and when guessing pays."""

import warnings

from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.server_args import ServerArgs
from ch07_sglang_radix.speculative.ngram_trie import NgramTrie
from ch07_sglang_radix.speculative.ngram_worker import NgramWorker
from ch07_sglang_radix.speculative.prompt_lookup import PromptLookup
from ch07_sglang_radix.speculative.stand_down import StandDown
from common.sampling.acceptance import Rule, by_typicality, with_thresholds, zero_and_renormalise


def attach(scheduler: TPScheduler, args: ServerArgs) -> None:
    """On every rank, and all of them refuse what cannot be; rank 0 alone decides. Raises ValueError."""
    guesser = guesser_of(args) if args.speculative_algorithm == "NGRAM" else None
    if scheduler.replica.rank > 0:
        return
    if guesser:
        scheduler.speculation.guesser = guesser
        if isinstance(guesser, NgramWorker):
            scheduler.at_flush.append(guesser.forget)
    if args.speculative_stand_down:
        scheduler.speculation.rule = StandDown(scheduler)
    scheduler.speculation.acceptance = acceptance_of(args)
    drafter = scheduler.wrapper.verifier.drafter
    scheduler.speculation.draws = args.speculative_use_rejection_sampling and drafter is not None and drafter.draws


def acceptance_of(args: ServerArgs) -> Rule | None:
    """Which guesses are kept; None for the engine's own way, which changes no token."""
    single, acc = args.speculative_accept_threshold_single, args.speculative_accept_threshold_acc
    if args.speculative_use_rejection_sampling:  # where guesses are chosen, not drawn: who guesses is certain of them
        return zero_and_renormalise
    if args.speculative_typical_acceptance or min(single, acc) < 1:
        warnings.warn("what is kept of guesses is lossy: answers are not distributed as the model says", stacklevel=2)
        return by_typicality if args.speculative_typical_acceptance else with_thresholds(single, acc)
    return None


def guesser_of(args: ServerArgs) -> NgramWorker | PromptLookup:
    """Who NGRAM is."""
    if args.speculative_ngram_match_type == "LOOKUP":
        return PromptLookup()
    trie = NgramTrie(
        args.speculative_ngram_max_trie_depth, args.speculative_ngram_capacity, args.speculative_ngram_min_bfs_breadth,
        args.speculative_ngram_max_bfs_breadth, args.speculative_ngram_match_type,
    )  # fmt: skip
    return NgramWorker(trie)
