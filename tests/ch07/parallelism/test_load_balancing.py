"""Which worker a policy names, and what it may not depend on."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch07_sglang_radix.parallelism.load_balancing import POLICIES, CacheAware, Load, LoadBalancer, NoWorker, PrefixHash
from ch07_sglang_radix.policy_names import LOAD_BALANCE_METHODS
from ch07_sglang_radix.server_args import ServerArgs


def loads(**requests):
    return {worker: Load(count) for worker, count in requests.items()}


def test_the_names_that_a_flag_takes_are_those_that_there_are():
    assert set(LOAD_BALANCE_METHODS) == set(POLICIES)


@pytest.mark.parametrize(
    "door", [lambda name: LoadBalancer(name, "ab"), lambda name: ServerArgs(load_balance_method=name)]
)
def test_an_unknown_policy_is_one_line_that_names_all(door):
    with pytest.raises(ValueError, match=r"^load_balance_method='shortest_queue' .*cache_aware"):
        door("shortest_queue")


@pytest.mark.parametrize("name", POLICIES)
@given(st.lists(st.tuples(st.text("ab", max_size=6), st.booleans()), max_size=30))
def test_the_same_questions_have_the_same_answers_and_all_counts_come_back(name, asked):
    def run():
        balancer, open_ones, chosen = LoadBalancer(name, "xyz", seed=3), [], []
        for prompt, ends in asked:
            chosen.append(balancer.choose(prompt))
            open_ones.append(balancer.sent(chosen[-1], prompt))
            balancer.grown(open_ones[-1], 5)
            if ends:
                balancer.finished(open_ones.pop(0))
        for sent in open_ones:
            balancer.finished(sent)
        assert all(load == Load() for load in balancer.loads.values())
        return chosen

    assert run() == run()


@pytest.mark.parametrize("name", POLICIES)
def test_only_those_that_are_there_are_chosen(name):
    balancer = LoadBalancer(name, "xyz")
    for i in range(30):
        assert balancer.choose("a" * i, among="y") == "y"
    gone = balancer.sent("x", "aaa")
    balancer.remove("x")
    balancer.finished(gone)
    for i in range(30):
        worker = balancer.choose("a" * i)
        assert worker in "yz"
        balancer.sent(worker, "a" * i)
    balancer.remove("y")
    balancer.remove("z")
    with pytest.raises(NoWorker):
        balancer.choose("a")
    balancer.add("x")
    assert balancer.choose("aaa") == "x"
    assert balancer.loads["x"].requests == 0, "what the one before had is not counted"


def test_round_robin_takes_turns():
    balancer = LoadBalancer("round_robin", "abc")
    assert "".join(balancer.choose("p") for _ in range(7)) == "abcabca"


def test_total_requests_takes_the_first_of_the_least():
    assert POLICIES["total_requests"]().choose("p", loads(a=3, b=1, c=1)) == "b"


def test_total_tokens_looks_at_tokens_then_at_requests():
    policy = POLICIES["total_tokens"]()
    assert policy.choose("p", {"a": Load(1, 50), "b": Load(4, 40)}) == "b"
    assert policy.choose("p", {"a": Load(2, 40), "b": Load(1, 40)}) == "b"


def test_power_of_two_never_takes_the_fullest_of_three():
    policy = POLICIES["power_of_two"](seed=0)
    chosen = Counter(policy.choose("p", loads(a=1, b=2, c=3)) for _ in range(300))
    assert chosen["c"] == 0
    assert chosen["a"] > chosen["b"] > 50, "a in two draws of three, b in the third"


def test_a_prefix_s_owner_moves_only_if_it_goes():
    policy = PrefixHash()
    prompts = [f"{i} " + "x" * 300 for i in range(200)]
    before = {prompt: policy.choose(prompt, loads(a=0, b=0, c=0)) for prompt in prompts}
    assert min(Counter(before.values()).values()) > 30, "about a third each"
    for prompt, owner in before.items():
        after = policy.choose(prompt, loads(a=0, b=0))
        assert owner in (after, "c")


def test_a_prefix_is_its_first_256_tokens():
    policy, ids = PrefixHash(), list(range(256))
    assert len({policy.choose([*ids, i], loads(a=0, b=0, c=0, d=0)) for i in range(20)}) == 1
    assert len({policy.choose([i, *ids], loads(a=0, b=0, c=0, d=0)) for i in range(20)}) > 1


def test_an_owner_with_more_than_its_share_gives_way():
    policy = PrefixHash()
    owner = policy.choose("p", loads(a=0, b=0))
    other = "b" if owner == "a" else "a"
    assert policy.choose("p", loads(**{owner: 5, other: 4})) == owner, "1.25 times (9 + 1) / 2 is 6.25"
    assert policy.choose("p", loads(**{owner: 7, other: 2})) == other


def test_cache_aware_goes_to_the_prefix_above_the_threshold_alone():
    policy = CacheAware()
    policy.sent("0123456789", "b")
    assert policy.choose("0123", loads(a=0, b=5)) == "b"
    assert policy.choose("012xxxxxxx", loads(a=0, b=5)) == "a", "3 of 10 are not more than 0.3"
    assert policy.choose("0123xxxxxx", loads(a=0, b=5)) == "b"
    assert policy.choose("", loads(a=0, b=5)) == "a"


@pytest.mark.parametrize(
    ("a", "b", "chosen"), [(0, 64, "b"), (0, 65, "a"), (128, 192, "b"), (130, 195, "b"), (130, 196, "a")]
)
def test_cache_aware_leaves_the_prefix_where_both_thresholds_are_passed(a, b, chosen):
    """b has the prefix. More than 64 apart, and more than 1.5 times."""
    policy = CacheAware()
    policy.sent("0123456789", "b")
    assert policy.choose("0123456789", loads(a=a, b=b)) == chosen


def test_cache_aware_remembers_where_it_sent_the_overflow():
    policy = CacheAware()
    policy.sent("0123456789", "b")
    policy.sent(prompt := "0123456789", policy.choose(prompt, loads(a=0, b=65)))
    assert policy.choose("0123456789", loads(a=0, b=0)) == "a"


def test_cache_aware_does_not_wait_for_the_dead():
    balancer = LoadBalancer("cache_aware", "ab")
    balancer.sent("b", "0123456789")
    assert balancer.choose("0123456789") == "b"
    assert balancer.choose("0123456789", among="a") == "a", "b is only away"
    assert balancer.choose("0123456789") == "b"
    balancer.remove("b")
    balancer.add("b")
    assert balancer.choose("0123456789") == "a", "b's cache has gone with it"
