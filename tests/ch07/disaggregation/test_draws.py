"""An answer that is drawn and not greedy is one answer, whichever engine draws which of its tokens."""

import pytest

from ch07_sglang_radix.disaggregation.local_pair import Pair
from ch07_sglang_radix.scheduler import TPScheduler
from common.sampling.params import SamplingParams

PROMPTS = [list(range(5, 5 + n)) for n in (19, 30, 4)]
WILD = {"max_new_tokens": 12, "ignore_eos": True, "temperature": 3.0}
OURS, OTHERS = 7, 8  # random_seed of the prefill engine, and of the decode engine


def of_one_engine(wrapper, seed, params):
    scheduler = TPScheduler(wrapper, seed=seed)
    numbers = [scheduler.enqueue(None, prompt, SamplingParams(**params)) for prompt in PROMPTS]
    outputs = scheduler.process_requests()
    return [outputs[number].output_ids for number in numbers]


@pytest.mark.parametrize("own", [{}, {"seed": (1 << 64) - 1}])
def test_decode_goes_on_by_the_seed_by_which_prefill_drew(own):
    """Of a request that brings none each engine would make one of its own random_seed and of what it was asked before."""
    both = Pair(prefill={"seed": OURS}, decode={"seed": OTHERS})
    try:
        params = WILD | own
        wrapper = both.prefill.scheduler.wrapper
        right, other = (of_one_engine(wrapper, seed, params) for seed in (OURS, OTHERS))
        assert (right == other) == bool(own), "or nothing would be seen"
        both.decode.scheduler.num_requests += 5  # it has been asked by other balancers
        rooms = [both.ask(prompt, **params) for prompt in PROMPTS]
        assert [both.answer(one).output_ids for one in rooms] == right
        assert both.at_rest()
    finally:
        both.close()
