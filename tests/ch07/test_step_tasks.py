"""What a step is made of, and the numbers that move on with it."""

import pytest

from ch07_sglang_radix.request import Req
from ch07_sglang_radix.step_tasks import StepTasks
from common.sampling.params import SamplingParams
from tests.ch07.test_scheduler import make

HOT = {"temperature": 1.0}


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ([{}], 1),
        ([{}, HOT | {"top_k": 5}, HOT | {"top_k": 3}], 5),
        ([HOT | {"top_k": 1024}], 1024),
        ([HOT | {"top_k": 1025}], 0),
        ([{}, HOT], 0),
        ([{}, {"logprobs": True}], 0),
        ([{}, {"logit_bias": {1: 1.0}}], 0),
        ([], 0),
    ],
)
def test_a_rank_gives_as_many_of_its_best_logits_as_any_row_may_look_at(rows, best):
    """0: all of them."""
    reqs = [Req(i, None, [1], SamplingParams(**row), 0) for i, row in enumerate(rows)]
    assert StepTasks(None, gather_best=True)._best(reqs) == best
    assert StepTasks(None, gather_best=False)._best(reqs) == 0


def test_what_a_running_request_is_expected_to_need_falls_to_a_seventh_in_600_decode_steps(checkpoint):
    """SGLang's init_new_token_ratio, min_new_token_ratio_factor and new_token_ratio_decay_steps."""
    scheduler, ratios = make(checkpoint("qwen2")), []
    for _ in range(700):
        ratios.append(scheduler.new_token_ratio)
        scheduler.step_tasks.decode_launched()
    assert ratios[0] == pytest.approx(0.7)
    assert ratios[300] == pytest.approx(0.7 * (1 + 0.14) / 2)
    assert ratios[599] > 0.7 * 0.14 + 1e-6
    assert ratios[600:] == pytest.approx([0.7 * 0.14] * 100)
