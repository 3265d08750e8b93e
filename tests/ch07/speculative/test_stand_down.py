"""The rule, by a clock of the test's own: no real time is measured."""

from ch07_sglang_radix import Engine
from ch07_sglang_radix.speculative.stand_down import AGAIN, LOOK, TRIAL, StandDown


class Steps:
    """Stands in for a scheduler: steps of so many ms, a verify step with so many tokens a request. With overlap a step waits for
    the one before it, whose runs of tokens are counted then; plain steps' tokens are counted at once, as always."""

    def __init__(self, plain_ms, verify_ms, tokens, overlap=False):
        self.ms, self.tokens, self.now, self.overlap = (plain_ms, verify_ms), tokens, 0.0, overlap
        self.late = (0.0, 0)  # ms and tokens of the step before
        self.beside, self.after_step = [], []
        self.steps, self.work, self.speculation = {"prefill": 0, "decode": 0}, {"sampled": 0}, self
        self.launched = 0
        self.rule = StandDown(self, lambda: self.now)

    def run(self, batch, steps):
        """Which of them verified."""
        made = []
        for _ in range(steps):
            (begin,), (end,) = self.beside, self.after_step
            begin()
            made.append(self.rule.verifies(batch))
            self.steps["decode"] += 1
            self.launched += made[-1]
            step = (self.ms[made[-1]], batch * self.tokens if made[-1] else 0)
            ms, tokens = self.late if self.overlap else step
            self.late = step
            self.work["sampled"] += tokens + (0 if made[-1] else batch)
            self.now += ms / 1000
            end()
        return made


def test_both_kinds_are_tried_and_the_better_one_goes_on():
    pays, does_not = Steps(10, 12, 3), Steps(10, 40, 3)
    assert pays.run(1, 2 * TRIAL) == does_not.run(1, 2 * TRIAL) == [True] * TRIAL + [False] * TRIAL
    assert all(pays.run(1, AGAIN - 2 * TRIAL))
    assert not any(does_not.run(1, AGAIN - 2 * TRIAL))
    # and the other one is looked at again from time to time
    assert pays.run(1, AGAIN) == [False] * LOOK + [True] * (AGAIN - LOOK)
    assert does_not.run(1, AGAIN) == [True] * LOOK + [False] * (AGAIN - LOOK)


def test_each_batch_size_has_an_answer_of_its_own():
    steps = Steps(10, 12, 2)
    steps.run(1, 2 * TRIAL)
    steps.ms = (10, 40)
    steps.run(32, 2 * TRIAL)
    assert (steps.rule.verifies(1), steps.rule.verifies(32), steps.rule.verifies(20)) == (True, False, False)
    assert {size: [round(rate) for rate in pair] for size, pair in steps.rule.rates.items()} == {
        1: [100, 167],
        32: [3200, 1600],
    }


def test_what_has_changed_is_noticed():
    steps = Steps(10, 12, 3)
    steps.run(4, AGAIN)
    steps.tokens = 1  # another text: nothing is right any more
    assert not any(steps.run(4, 40)[30:])


def test_with_overlap_a_step_is_not_taken_for_the_one_before_it():
    pays, does_not = Steps(10, 12, 2, overlap=True), Steps(10, 40, 3, overlap=True)
    for steps, plain, verify in ((pays, 100, 167), (does_not, 100, 75)):
        made = steps.run(1, 4 * AGAIN)
        assert [round(rate) for rate in steps.rule.rates[1]] == [plain, verify]
        better = made[2 * (TRIAL + 1) :].count(verify > plain)
        assert better >= 4 * AGAIN - 2 * (TRIAL + 1) - 4 * (LOOK + 1)


def test_a_prefill_is_no_measurement():
    steps = Steps(10, 12, 3)
    steps.steps["prefill"] -= 1
    (begin,), (end,) = steps.beside, steps.after_step
    begin()
    steps.rule.verifies(1)
    steps.steps["prefill"] += 1
    end()
    assert steps.rule.rates == {1: (0.0, 0.0)}


def test_an_engine_stands_down_where_guesses_are_never_right_and_says_so():
    with Engine(device="cpu", speculative_algorithm="NGRAM", speculative_num_draft_tokens=64) as engine:
        text = engine.generate("What is a radix cache?", {"max_new_tokens": 60, "ignore_eos": True})["text"]
        told = engine.get_server_info()
        assert told["spec_stand_down"].keys() == {"1"}
        assert engine.scheduler.steps["decode"] > told["spec_verify_steps"] >= TRIAL
    with Engine(device="cpu") as engine:
        assert engine.generate("What is a radix cache?", {"max_new_tokens": 60, "ignore_eos": True})["text"] == text
