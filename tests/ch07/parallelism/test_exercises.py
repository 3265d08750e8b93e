"""The checks of the wing's exercises: which wrong answers they find."""

import itertools
import math
from types import SimpleNamespace

import pytest

from ch07_sglang_radix.parallelism.exercises.check import EXERCISES

module_of, outcome = EXERCISES.module_of, EXERCISES.outcome


def right(number):
    return module_of(number, solutions=True)


# --- 3: merge


def mean_of_the_parts(parts):
    return [sum(x) / len(parts) for x in zip(*(o for o, _ in parts), strict=True)], right(3).merge(parts)[1]


def weights_not_divided_by_their_sum(parts):
    o, lse = right(3).merge(parts)
    best = max(one for _, one in parts)
    return ([x * math.exp(lse - best) for x in o] if lse > -math.inf else o), lse


def weighed(parts, weights):
    columns = zip(*(o for o, _ in parts), strict=True)
    return [sum(w * x for w, x in zip(weights, xs, strict=True)) / sum(weights) for xs in columns]


def without_the_largest(parts):
    weights = [math.exp(lse) for _, lse in parts]
    return weighed(parts, weights), math.log(sum(weights))


def nan_of_an_empty_part(parts):
    best = max(lse for _, lse in parts)
    if best == -math.inf:
        return right(3).merge(parts)
    return weighed(parts, [math.exp(lse - best) for _, lse in parts]), right(3).merge(parts)[1]


def nan_where_nobody_has_keys(parts):
    o, lse = right(3).merge(parts)
    return o, (math.nan if lse == -math.inf else lse)


def the_largest_as_the_lse(parts):
    return right(3).merge(parts)[0], max(lse for _, lse in parts)


# --- 4: a rank without work


def only_who_has_some(tokens, padded):
    return right(4).rows_brought([n for n in tokens if n], padded)


def never_padded(tokens, padded):
    return list(tokens) if any(tokens) else None


def padded_always(tokens, padded):
    return right(4).rows_brought(tokens, True)


def a_step_for_nobody(tokens, padded):
    return [max(tokens)] * len(tokens) if padded else list(tokens)


def padding_is_its_own(rank, tokens, padded):
    brought = right(4).rows_brought(tokens, padded)
    return sum(brought[:rank]), sum(brought[: rank + 1])


def where_it_lies_without_padding(rank, tokens, padded):
    return right(4).rows_of(rank, tokens, False)


# --- 5: rows scattered


def bias_on_every_rank(partials, bias):
    return right(5).scatter_rows([[x + bias for x in rows] for rows in partials], 0)


def bias_on_rank_0_s_rows(partials, bias):
    first, *others = right(5).scatter_rows(partials, 0)
    return [[x + bias for x in first], *others]


def dealt_out_like_cards(partials, bias):
    whole = [x for part in right(5).scatter_rows(partials, bias) for x in part]
    return [whole[rank :: len(partials)] for rank in range(len(partials))]


def not_filled_up(partials, bias):
    tokens = len(partials[0])
    whole = [x for part in right(5).scatter_rows(partials, bias) for x in part][:tokens]
    held = -(-tokens // len(partials))
    return [whole[rank * held : (rank + 1) * held] for rank in range(len(partials))]


def its_own_rows_of_its_own_sums(partials, bias):
    return [right(5).scatter_rows([rows] * len(partials), bias)[rank] for rank, rows in enumerate(partials)]


def with_the_padding(parts, tokens):
    return [x for part in parts for x in part]


# --- 7: seats


def one_after_the_other(tp, stages, node_size):
    right(7).seats(tp, 1, node_size)
    return [divmod(rank, node_size) for rank in range(tp * stages)]


def a_host_for_each_stage(tp, stages, node_size):
    if tp > node_size:
        return right(7).seats(tp, stages, node_size)
    return [(stage, rank) for stage in range(stages) for rank in range(tp)]


def pipeline_inside_the_host(tp, stages, node_size):
    seats = right(7).seats(tp, stages, node_size)
    return [seats[rank % stages * tp + rank // stages] for rank in range(tp * stages)]


def anything_goes(tp, stages, node_size):
    if tp > node_size and tp % node_size:
        return [divmod(rank, node_size) for rank in range(tp * stages)]
    return right(7).seats(tp, stages, node_size)


def gpu_first(tp, stages, node_size):
    return [(b, a) for a, b in right(7).seats(tp, stages, node_size)]


# --- 8: zigzag


def in_runs(n, ranks):
    return [[*range(n * i // ranks, n * (i + 1) // ranks)] for i in range(ranks)]


def token_by_token(n, ranks):
    return [[*range(i, n, ranks)] for i in range(ranks)]


def back_and_forth(n, ranks):
    return [[t for t in range(n) if min(t % (2 * ranks), 2 * ranks - 1 - t % (2 * ranks)) == i] for i in range(ranks)]


def back_piece_first(n, ranks):
    return [tokens[::-1] for tokens in right(8).zigzag(n, ranks)]


def runs_of_whole_length(n, ranks):
    size = n // (2 * ranks)
    runs = [[*range(j * size, (j + 1) * size)] for j in range(2 * ranks)]
    runs[-1] += range(2 * ranks * size, n)
    return [runs[i] + runs[-1 - i] for i in range(ranks)]


def all_pairs(n, ranks, mine, theirs):
    held = right(8).zigzag(n, ranks)
    return len(held[mine]) * len(held[theirs])


def not_its_own(n, ranks, mine, theirs):
    held = right(8).zigzag(n, ranks)
    return sum(key < query for query in held[mine] for key in held[theirs])


def halves_always(n, ranks, mine, theirs):
    held = right(8).zigzag(n, ranks)
    return len(held[mine]) * len(held[theirs]) // 2


# --- 6: cache-aware choice


def never_overloaded(prompt, sent, loads):
    matched, worker = right(6).best_match(prompt, sent)
    return worker if matched > 0.3 * len(prompt) and worker in loads else min(loads, key=loads.get)


def either_threshold(prompt, sent, loads):
    most, least = max(loads.values()), min(loads.values())
    if most - least > 64 or most > 1.5 * least:
        return min(loads, key=loads.get)
    return right(6).choose(prompt, sent, loads)


def overloaded(loads):
    return max(loads.values()) - min(loads.values()) > 64 and max(loads.values()) > 1.5 * min(loads.values())


def at_least(prompt, sent, loads):
    matched, worker = right(6).best_match(prompt, sent)
    if matched and matched >= 0.3 * len(prompt) and not overloaded(loads):
        return worker
    return right(6).choose(prompt, sent, loads)


def to_the_dead(prompt, sent, loads):
    matched, worker = right(6).best_match(prompt, sent)
    return worker if matched > 0.3 * len(prompt) and not overloaded(loads) else min(loads, key=loads.get)


def the_oldest_match(prompt, sent):
    return right(6).best_match(prompt, sent[::-1])


def anywhere_in_it(prompt, sent):
    matched, worker = right(6).best_match(prompt, sent)
    inside = [(len(prompt), name) for text, name in sent if prompt and prompt in text]
    return inside[-1] if inside else (matched, worker)


def an_owner_of_nothing(prompt, sent):
    matched, worker = right(6).best_match(prompt, sent)
    return matched, worker or (sent[-1][1] if sent else None)


def the_last_of_the_least(prompt, sent, loads):
    return right(6).choose(prompt, sent, dict(reversed(loads.items())))


# --- 1: layers for every stage


def first_ones_get_more(layers, stages, parts=None):
    each, more = divmod(layers, stages)
    return right(1).split(layers, stages, parts or [each + 1] * more + [each] * (stages - more))


def rounded_up(layers, stages, parts=None):
    if parts:
        return right(1).split(layers, stages, parts)
    each = -(-layers // stages)
    return [(min(i * each, layers), min((i + 1) * each, layers)) for i in range(stages)]


def rest_to_the_last(layers, stages, parts=None):
    each = layers // stages
    return right(1).split(layers, stages, parts or [each] * (stages - 1) + [layers - each * (stages - 1)])


def last_included(layers, stages, parts=None):
    return [(first, end - 1) for first, end in right(1).split(layers, stages, parts)]


def deaf_to_the_list(layers, stages, parts=None):
    return right(1).split(layers, stages)


def trusting(layers, stages, parts=None):
    if parts:
        ends = list(itertools.accumulate(parts, initial=0))
        return list(itertools.pairwise(ends))
    return right(1).split(layers, stages)


# --- 2: send order


def all_send_first(stages):
    return [["send", "receive"] for _ in range(stages)]


def all_receive_first(stages):
    return [["receive", "send"] for _ in range(stages)]


def one_after_another(stages):
    return [["send", "receive"] if stage == 0 else ["receive", "send"] for stage in range(stages)]


def only_the_last_receives_first(stages):
    return [["receive", "send"] if stage == stages - 1 else ["send", "receive"] for stage in range(stages)]


def the_last_only_receives(stages):
    return [*right(2).order(stages)[:-1], ["receive"]]


def all_or_nobody(orders):
    return list(range(len(orders))) if right(2).stuck(orders) else []


def who_sends_first(orders):
    return [stage for stage, one in enumerate(orders) if one[:1] == ["send"]] if right(2).stuck(orders) else []


def one_look(orders):
    left = [list(one) for one in orders]
    for stage, mine in enumerate(left):
        theirs = left[(stage + 1) % len(left)]
        if mine[:1] == ["send"] and theirs[:1] == ["receive"]:
            mine.pop(0)
            theirs.pop(0)
    return [stage for stage, one in enumerate(left) if one]


WRONG = [
    (3, {"merge": mean_of_the_parts}, "keys of weight 1 and 2"),
    (3, {"merge": weights_not_divided_by_their_sum}, "keys of weight 1 and 2"),
    (3, {"merge": without_the_largest}, "a part without keys behind another"),
    (3, {"merge": nan_of_an_empty_part}, "a part without keys behind another"),
    (3, {"merge": nan_where_nobody_has_keys}, "no part has keys"),
    (3, {"merge": the_largest_as_the_lse}, "keys of weight 1 and 2"),
    (8, {"zigzag": in_runs}, "12 tokens on 2 rank(s)"),
    (8, {"zigzag": token_by_token}, "12 tokens on 2 rank(s)"),
    (8, {"zigzag": back_and_forth}, "12 tokens on 2 rank(s)"),
    (8, {"zigzag": back_piece_first}, "12 tokens on 2 rank(s)"),
    (8, {"zigzag": runs_of_whole_length}, "10 tokens on 2 rank(s)"),
    (8, {"pairs": all_pairs}, "pairs of rank 0's queries and rank 1's keys"),
    (8, {"pairs": not_its_own}, "pairs among rank 1's own"),
    (8, {"pairs": halves_always}, "pairs among rank 1's own"),
    (6, {"choose": never_overloaded}, "65 more"),
    (6, {"choose": either_threshold}, "b was sent all of it"),
    (6, {"choose": at_least}, "3 of 10 characters"),
    (6, {"choose": to_the_dead}, "b is not alive"),
    (6, {"best_match": the_oldest_match}, "the newest of them"),
    (6, {"best_match": anywhere_in_it}, "a word in the middle"),
    (6, {"best_match": an_owner_of_nothing}, "nothing in common"),
    (6, {"choose": the_last_of_the_least}, "the first of two"),
    (1, {"split": first_ones_get_more}, "7 layers, 3 stages"),
    (1, {"split": rounded_up}, "7 layers, 3 stages"),
    (1, {"split": rest_to_the_last}, "8 layers, 3 stages"),
    (1, {"split": last_included}, "7 layers, 3 stages"),
    (1, {"split": deaf_to_the_list}, "7 layers, 3 stages, [3, 2, 2]"),
    (1, {"split": trusting}, "ValueError is raised"),
    (2, {"order": all_send_first}, "rounds until all is done"),
    (2, {"order": all_receive_first}, "rounds until all is done"),
    (2, {"order": one_after_another}, "rounds until all is done"),
    (2, {"order": only_the_last_receives_first}, "rounds until all is done"),
    (2, {"order": the_last_only_receives}, "each sends once and receives once"),
    (2, {"stuck": all_or_nobody}, "stuck("),
    (2, {"stuck": who_sends_first}, "stuck("),
    (2, {"stuck": one_look}, "stuck("),
    (4, {"rows_brought": only_who_has_some}, "prefill of [5, 0, 2]"),
    (4, {"rows_brought": never_padded}, "decode of [5, 0, 2]"),
    (4, {"rows_brought": padded_always}, "prefill of [5, 0, 2]"),
    (4, {"rows_brought": a_step_for_nobody}, "nobody has work"),
    (4, {"rows_of": padding_is_its_own}, "rank 1's own rows"),
    (4, {"rows_of": where_it_lies_without_padding}, "rank 2's own rows"),
    (5, {"scatter_rows": bias_on_every_rank}, "bias 1000: rank 0's rows"),
    (5, {"scatter_rows": bias_on_rank_0_s_rows}, "bias 1000: rank 1's rows"),
    (5, {"scatter_rows": dealt_out_like_cards}, "rank 0's rows"),
    (5, {"scatter_rows": not_filled_up}, "3 rows on 2 ranks, bias 0: how many rows rank 1 has"),
    (5, {"scatter_rows": its_own_rows_of_its_own_sums}, "rank 0's rows"),
    (5, {"gather_rows": with_the_padding}, "3 rows on 2 ranks, bias 0: gathered"),
    (7, {"seats": one_after_the_other}, "tp 3, 2 stages, hosts of 4"),
    (7, {"seats": a_host_for_each_stage}, "tp 2, 3 stages, hosts of 4"),
    (7, {"seats": pipeline_inside_the_host}, "tp 2, 3 stages, hosts of 4"),
    (7, {"seats": anything_goes}, "ValueError is raised"),
    (7, {"seats": gpu_first}, "tp 2, 3 stages, hosts of 4"),
]


@pytest.mark.parametrize(("number", "instead", "words"), WRONG)
def test_a_plausible_wrong_answer_is_caught(number, instead, words):
    answer = SimpleNamespace(
        **{name: value for name, value in vars(right(number)).items() if callable(value)} | instead
    )
    said = outcome(number, answer)
    assert said.startswith("not yet: ")
    assert words in said
    assert "wanted " in said
    assert "got " in said
    assert "\n" not in said


def test_every_exercise_has_wrong_answers_that_are_caught():
    assert all(sum(number == n for number, *_ in WRONG) >= 5 for n in EXERCISES.numbers)
