import random
from types import ModuleType

from ch07_sglang_radix.parallelism.load_balancing import LoadBalancer
from common.teaching.expect import ask, expect

SENT = [("You are a poet. Rain", "a"), ("You dance", "b"), ("You are a cook. Soup", "c")]
TEN = [("0123456789", "b")]


def check(m: ModuleType) -> None:
    matches(m)
    choices(m)
    as_the_product(m)


def matches(m: ModuleType) -> None:
    for why, prompt, sent, want in (
        ("nothing was sent", "a", [], (0, None)),
        ("nothing in common", "Xyz", SENT, (0, None)),
        ("the example", "You are a poet. Snow", SENT[:2], (16, "a")),
        ("a prompt that ends inside what was sent", "You are", SENT[:2], (7, "a")),
        ("what was sent ends inside the prompt", "You dance well", SENT, (9, "b")),
        ("the same beginning at two, the newest of them", "You are a spy", SENT, (10, "c")),
        ("a word in the middle is no prefix", "poet. Rain", SENT, (0, None)),
        ("an empty prompt", "", SENT, (0, None)),
    ):
        expect(f"best_match({prompt!r}): {why}", tuple(ask(m.best_match, prompt, sent, several=2)), want)


def choices(m: ModuleType) -> None:
    for why, prompt, sent, loads, want in (
        ("nothing was sent: the least loaded", "0123456789", [], {"a": 2, "b": 1}, "b"),
        ("the first of two with as few", "0123456789", [], {"a": 1, "b": 1}, "a"),
        ("b was sent all of it", "0123456789", TEN, {"a": 0, "b": 64}, "b"),
        ("65 more, and more than 1.5 times: the least loaded", "0123456789", TEN, {"a": 0, "b": 65}, "a"),
        ("70 more, but not more than 1.5 times: the prefix", "0123456789", TEN, {"a": 140, "b": 210}, "b"),
        ("70 more and 1.5 times is passed", "0123456789", TEN, {"a": 139, "b": 209}, "a"),
        ("more than 1.5 times, but not 65 more: the prefix", "0123456789", TEN, {"a": 1, "b": 60}, "b"),
        ("3 of 10 characters are not more than 0.3", "012xxxxxxx", TEN, {"a": 0, "b": 5}, "a"),
        ("4 of 10 are", "0123xxxxxx", TEN, {"a": 0, "b": 5}, "b"),
        ("it is a share of the prompt, not of what was sent", "01", TEN, {"a": 0, "b": 5}, "b"),
        ("b is not alive", "0123456789", TEN, {"a": 3, "c": 2}, "c"),
        ("the load that is compared is not the owner's alone", "0123456789", TEN, {"a": 100, "b": 0, "c": 0}, "b"),
    ):
        expect(f"choose({prompt!r}, ..., {loads}): {why}", ask(m.choose, prompt, sent, loads), want)


def as_the_product(m: ModuleType) -> None:
    """300 prompts of a few beginnings, against the router's own policy, with everything remembered."""
    draw, balancer, sent = random.Random(6), LoadBalancer("cache_aware", "abc"), []
    open_ones = []
    for i in range(300):
        prompt = draw.choice(("You are a poet. ", "You are a cook. ", "", "Once ")) + draw.choice("xyz") * draw.randint(
            0, 20
        )
        loads = {worker: load.requests for worker, load in balancer.loads.items()}
        want = balancer.choose(prompt)
        expect(f"prompt {i} of 300, {prompt!r} with {loads}", ask(m.choose, prompt, list(sent), loads), want)
        sent.append((prompt, want))
        open_ones.append(balancer.sent(want, prompt))
        if draw.random() < 0.6:
            balancer.finished(open_ones.pop(draw.randrange(len(open_ones))))
