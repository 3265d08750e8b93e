"""The checks of the wing's exercises: they pass the solutions, catch wrong answers, and leave a fresh clone green."""

from types import SimpleNamespace

import pytest

from ch07_sglang_radix.disaggregation.exercises.check import EXERCISES
from tests import anatomy

WING = anatomy.ROOT / "ch07_sglang_radix" / "disaggregation"
module_of, outcome = EXERCISES.module_of, EXERCISES.outcome


@pytest.mark.parametrize("number", EXERCISES.numbers)
def test_my_answer(number):
    """The reader's own: skipped until it is started."""
    said = outcome(number, module_of(number))
    if said == "not started":
        pytest.skip(said)
    assert said == "passed"


@pytest.mark.parametrize("number", EXERCISES.numbers)
def test_the_solution_passes(number):
    assert outcome(number, module_of(number, solutions=True)) == "passed"


@pytest.mark.parametrize("number", EXERCISES.numbers)
def test_the_anatomy_is_the_same_everywhere(number):
    anatomy.check_exercise(EXERCISES, number, WING)


@pytest.mark.parametrize("number", EXERCISES.numbers)
def test_who_returns_nothing_is_told_what_was_wanted(number):
    anatomy.check_nothing_returned(EXERCISES, number)


def test_the_table_of_the_readme_is_what_the_files_say():
    anatomy.check_table(EXERCISES)


def test_the_chapter_s_table_names_every_exercise():
    anatomy.check_steps(EXERCISES, WING)


def test_every_link_leads_somewhere():
    anatomy.check_links(EXERCISES.folder / "README.md")


def test_every_assertion_of_a_check_says_what_was_got_and_what_was_wanted():
    anatomy.check_messages(EXERCISES)


def right(number):
    return module_of(number, solutions=True)


# --- 1: reserve first


def prompts_alone(free, waiting, running, reserved):
    count = 0
    for prompt, _ in waiting:
        if prompt > free:
            break
        free, count = free - prompt, count + 1
    return count


def whole_answers(free, waiting, running, reserved):
    return right(1).how_many(free, waiting, running, 1 << 30)


def always_reserved(free, waiting, running, reserved):
    return right(1).how_many(free, [(p, 1 << 30) for p, _ in waiting], [1 << 30] * len(running), reserved)


def overtakes(free, waiting, running, reserved):
    return right(1).how_many(free, sorted(waiting), running, reserved)


def never_alone(free, waiting, running, reserved):
    return right(1).how_many(free - reserved, waiting, [0, *running], reserved)


def forgets_who_has_just_come(free, waiting, running, reserved):
    count = 0
    for one in waiting:
        if not right(1).how_many(free, [one], running, reserved):
            break
        free, count = free - one[0], count + 1
    return count


# --- 2: the room's number


def whoever_comes(slots, metadata):
    slot, _, token = metadata
    return ("token", slots.pop(slot), token) if slot in slots else ("late", None, None)


def found_by_its_number(slots, metadata):
    _, room, token = metadata
    slot = next((slot for slot, waits in slots.items() if waits == room), None)
    if slot is None:
        return "late", None, None
    del slots[slot]
    return "token", room, token


def keeps_the_slot(slots, metadata):
    return right(2).take(dict(slots), metadata)


def fails_the_other(slots, metadata):
    what, room, token = right(2).take(slots, metadata)
    return (what, metadata[1], token) if what == "failed" else (what, room, token)


def another_s_is_late(slots, metadata):
    slot, room, _ = metadata
    return right(2).take(slots, metadata) if slots.get(slot) == room else ("late", None, None)


# --- 3: the least


def _decide(states, runs=min, ends=min):
    columns = list(zip(*states, strict=True))
    return [i for i, one in enumerate(columns) if runs(one) == 4], [
        i for i, one in enumerate(columns) if ends(one) == 0
    ]


def runs_where_it_ends(states):
    return [i for i, one in enumerate(zip(*states, strict=True)) if 4 in one and 1 not in one], right(3).decide(states)[
        1
    ]


# --- 4: heads


def rank_of_my_number(held, wanted):
    return {0: [(place, [place]) for place in range(min(len(held[0]), len(wanted)))]}


def head_as_place(held, wanted):
    return {
        s: [(held[s][there], places) for there, places in sent] for s, sent in right(4).slices(held, wanted).items()
    }


def from_all_who_hold_it(held, wanted):
    found = {}
    for rank, heads in enumerate(held):
        for head in dict.fromkeys(wanted):
            if head in heads:
                places = [i for i, one in enumerate(wanted) if one == head]
                found.setdefault(rank, []).append((heads.index(head), places))
    return found


def once_for_each_place(held, wanted):
    found = {}
    for place, head in enumerate(wanted):
        source = next(rank for rank, heads in enumerate(held) if head in heads)
        found.setdefault(source, []).append((held[source].index(head), [place]))
    return found


def the_first_place_only(held, wanted):
    return {s: [(there, places[:1]) for there, places in sent] for s, sent in right(4).slices(held, wanted).items()}


def empty_ranks_too(held, wanted):
    return {rank: [] for rank in range(len(held))} | right(4).slices(held, wanted)


# --- 5: everything back


def _give(room, free, rows, locks, close, *, first=True, tree=False, keep=(), unlock=True, once=True, row=True):
    before = dict(room)
    if not once:
        close(room)
    seen = (lambda one: None) if not first or not once else close
    spare_rows, spare_locks = (rows if row else []), (locks if unlock else dict(locks))
    n = right(5).give_back(room, free, spare_rows, spare_locks, seen)
    if not first and n:
        close(room)
    if tree:
        free += before["prefix"]
    for name in keep:
        room[name] = before[name]
    return n


def counts_the_tree_s(room, free, rows, locks, close):
    return len(room["prefix"]) + right(5).give_back(room, free, rows, locks, close)


def _with(function, **options):
    return lambda *args: function(*args, **options)


# (exercise, what is wrong in the answer, words of the complaint)
WRONG = [
    (1, {"how_many": prompts_alone}, "prompts that get pages"),
    (1, {"how_many": whole_answers}, "one slot more"),
    (1, {"how_many": always_reserved}, "keeps what it may still get"),
    (1, {"how_many": overtakes}, "does not overtake"),
    (1, {"how_many": never_alone}, "prompts that get pages"),
    (1, {"how_many": forgets_who_has_just_come}, "the example"),
    (2, {"take": whoever_comes}, "another room's"),
    (2, {"take": found_by_its_number}, "another room's"),
    (2, {"take": keeps_the_slot}, "slots afterwards"),
    (2, {"take": fails_the_other}, "got ('failed', 5, None), wanted ('failed', 77, None)"),
    (2, {"take": another_s_is_late}, "another room's"),
    (3, {"decide": _with(_decide, runs=max)}, "[[4, 3], [4, 4]]"),
    (3, {"decide": _with(_decide, ends=max)}, "[[4, 3], [0, 4]]"),
    (3, {"decide": _with(_decide, runs=lambda one: one[0])}, "[[4, 3], [0, 4]]"),
    (3, {"decide": _with(_decide, ends=lambda one: one[0])}, "[[4, 3], [0, 4]]"),
    (3, {"decide": runs_where_it_ends}, "wanted ([0], [])"),
    (3, {"decide": lambda states: right(3).decide(states)[::-1]}, "wanted ([0], [])"),
    (4, {"slices": rank_of_my_number}, "wanted {0: [(0, [0, 1])]}"),
    (4, {"slices": head_as_place}, "a head each: slices"),
    (4, {"slices": from_all_who_hold_it}, "places that are filled"),
    (4, {"slices": once_for_each_place}, "got {0: [(0, [0]), (0, [1])]}"),
    (4, {"slices": the_first_place_only}, "one rank, one head twice"),
    (4, {"slices": empty_ranks_too}, "sends something: got False"),
    (5, {"give_back": _with(_give, first=False)}, "what was free whenever close was called"),
    (5, {"give_back": _with(_give, tree=True)}, "the free pages"),
    (5, {"give_back": _with(_give, keep=("own",))}, "the room"),
    (5, {"give_back": _with(_give, unlock=False)}, "locks"),
    (5, {"give_back": _with(_give, once=False)}, "whenever close was called"),
    (5, {"give_back": _with(_give, row=False)}, "the free rows"),
    (5, {"give_back": counts_the_tree_s}, "pages that became free"),
]  # fmt: skip


@pytest.mark.parametrize(("number", "instead", "words"), WRONG)
def test_a_plausible_wrong_answer_is_caught(number, instead, words):
    answer = SimpleNamespace(**{name: of for name, of in vars(right(number)).items() if callable(of)} | instead)
    said = outcome(number, answer)
    assert said.startswith("not yet: ")
    assert words in said
    assert "wanted " in said
    assert "got " in said
    assert "\n" not in said


def test_every_exercise_has_wrong_answers_that_are_caught():
    assert all(sum(number == n for number, *_ in WRONG) >= 5 for n in EXERCISES.numbers)
