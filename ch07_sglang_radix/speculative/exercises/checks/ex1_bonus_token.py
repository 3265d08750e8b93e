from types import ModuleType

from common.teaching.expect import ask, expect

CHAINS = (  # guesses, drawn: what comes out
    ([5, 6, 7], [5, 6, 9, 4], [5, 6, 9]),
    ([5, 6, 7], [5, 6, 7, 4], [5, 6, 7, 4]),
    ([5, 6, 7], [8, 6, 7, 4], [8]),
    ([5, 6, 7], [8, 5, 6, 7], [8]),  # they are right one place too late
    ([5, 6, 7], [5, 8, 7, 4], [5, 8]),  # 7 would be right again, behind another token than was guessed
    ([5, 5], [5, 6, 5], [5, 6]),
    ([4], [4, 4], [4, 4]),
    ([], [3], [3]),  # nobody guessed: a plain decode step
)
ANSWERS = (  # answer, kept, most, ends: grown
    ([1], [5, 6, 9], 3, {9}, [1, 5, 6]),
    ([1], [5, 6, 9], 8, {6}, [1, 5, 6]),
    ([1], [5, 6, 9], 8, set(), [1, 5, 6, 9]),
    ([1], [5, 6, 9], 4, {9}, [1, 5, 6, 9]),
    ([1], [6, 5, 6], 8, {6}, [1, 6]),  # the first end, not the last
    ([6], [5, 9], 8, {6}, [6, 5, 9]),  # an end that the answer has already was none when it came (min_new_tokens)
    ([], [6], 8, {6}, [6]),
    ([1, 2], [7], 3, {9}, [1, 2, 7]),
)


def check(m: ModuleType) -> None:
    for guesses, drawn, want in CHAINS:
        got = ask(m.keep, list(guesses), list(drawn), why="a list of tokens", several=True)
        expect(f"keep({guesses}, {drawn})", got, want)
    for answer, kept, most, ends, want in ANSWERS:
        given = list(answer)
        got = ask(m.into, given, list(kept), most, set(ends), why="a list of tokens", several=True)
        expect(f"into({answer}, {kept}, {most}, {ends or '{}'})", got, want)
        expect(f"into({answer}, ...): the answer that was given, afterwards", given, answer)
