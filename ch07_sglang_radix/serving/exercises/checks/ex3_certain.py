import random
from types import ModuleType

from common.teaching.expect import ask, expect


def check(m: ModuleType) -> None:
    for text, stops, want in (
        ("a <", ["</s>"], 2),
        ("a <b", ["</s>"], 4),
        ("abab", ["abac", "bb"], 2),
        ("abab", ["bb", "abac"], 2),
        ("", ["x"], 0),
        ("no stops <", [], 10),
        ("a stop of one character is never half there", ["e"], 43),
        ("aaa", ["aaaa"], 0),
        ("the end of the stop is here: s>", ["</s>"], 31),
        ("</s", ["</s>", "s!"], 0),
        ("short", ["a stop that is longer than the text"], 5),
        ("长", ["长城"], 0),
    ):
        expect(f"characters of {text!r} that may be sent, stops {stops}", ask(m.certain, text, stops), want)
    rng = random.Random(0)
    for _ in range(300):
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        whole = "".join(rng.choices("abc", k=12))
        ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
        before = min(ends, default=13) - 1  # so many characters can come before a stop is complete
        sent = [int(ask(m.certain, whole[:n], stops)) for n in range(before + 1)]
        for n, size in enumerate(sent):
            want = n - max(
                (k for stop in stops for k in range(1, len(stop)) if whole[:n].endswith(stop[:k])), default=0
            )
            expect(f"characters of {whole[:n]!r} that may be sent, stops {stops}", size, want)
