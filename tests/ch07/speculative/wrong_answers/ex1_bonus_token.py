"""(what stands in for the solution's functions, words that the checker must say) of plausible wrong answers."""

from itertools import takewhile

from ch07_sglang_radix.speculative.exercises.solutions import ex1_bonus_token as right


def without_the_bonus(guesses, drawn):
    return right.keep(guesses, drawn)[:-1]


def a_bonus_only_when_all_are_right(guesses, drawn):
    kept = right.keep(guesses, drawn)
    return kept if len(kept) == len(drawn) else kept[:-1]


def a_bonus_only_after_a_wrong_one(guesses, drawn):
    return right.keep(guesses, drawn)[: max(len(guesses), 1)]


def the_wrong_guess_itself(guesses, drawn):
    kept = right.keep(guesses, drawn)
    return kept[:-1] + list(guesses[len(kept) - 1 : len(kept)])


def every_right_one(guesses, drawn):
    return [guess for guess, token in zip(guesses, drawn, strict=False) if guess == token] + [drawn[-1]]


def the_last_that_was_drawn(guesses, drawn):
    return [*right.keep(guesses, drawn)[:-1], drawn[-1]]


def one_place_off(guesses, drawn):
    same = list(takewhile(lambda pair: pair[0] == pair[1], zip(guesses, drawn[1:], strict=False)))
    return [*drawn[: len(same) + 1]]


def all_that_was_drawn(guesses, drawn):
    return list(drawn)


def all_at_once(answer, kept, most, ends):
    return [*answer, *kept]


def ends_after_the_run(answer, kept, most, ends):
    return [*answer, *kept][:most]


def the_last_end(answer, kept, most, ends):
    last = max((i for i, token in enumerate(kept) if token in ends), default=len(kept) - 1)
    return [*answer, *kept[: last + 1]][:most]


def without_its_end(answer, kept, most, ends):
    return [*answer, *takewhile(lambda token: token not in ends, kept)][:most]


def room_for_the_run_alone(answer, kept, most, ends):
    return [*answer, *right.into([], kept, most, ends)]


def ended_already(answer, kept, most, ends):
    return list(answer) if ends & set(answer) else right.into(answer, kept, most, ends)


def in_place(answer, kept, most, ends):
    answer[:] = right.into(answer, kept, most, ends)
    return answer


WRONG = [
    ({"keep": without_the_bonus}, "keep([5, 6, 7], [5, 6, 9, 4]): got [5, 6], wanted [5, 6, 9]"),
    ({"keep": a_bonus_only_when_all_are_right}, "keep([5, 6, 7], [5, 6, 9, 4])"),
    ({"keep": a_bonus_only_after_a_wrong_one}, "keep([5, 6, 7], [5, 6, 7, 4])"),
    ({"keep": the_wrong_guess_itself}, "got [5, 6, 7]"),
    ({"keep": every_right_one}, "keep([5, 6, 7], [5, 6, 9, 4])"),
    ({"keep": the_last_that_was_drawn}, "got [5, 6, 4]"),
    ({"keep": one_place_off}, "keep("),
    ({"keep": all_that_was_drawn}, "got [5, 6, 9, 4]"),
    ({"into": all_at_once}, "into([1], [5, 6, 9], 3, {9})"),
    ({"into": ends_after_the_run}, "into([1], [5, 6, 9], 8, {6})"),
    ({"into": the_last_end}, "into([1], [6, 5, 6], 8, {6})"),
    ({"into": without_its_end}, "into([1], [5, 6, 9], 8, {6}): got [1, 5]"),
    ({"into": room_for_the_run_alone}, "into([1], [5, 6, 9], 3, {9})"),
    ({"into": ended_already}, "into([6], [5, 9], 8, {6})"),
    ({"into": in_place}, "the answer that was given, afterwards"),
]
