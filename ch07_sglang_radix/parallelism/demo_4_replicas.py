"""Four replicas, and where each request goes under each policy.

    python ch07_sglang_radix/parallelism/demo_4_replicas.py

Four conversations of three turns share a system prompt of 24 tokens and have a persona of 40 each; the fourth is a long one.
Each policy sends the same requests to four real schedulers with trees of their own (the bundled model), which step in turn. The
letter is the replica, a small one where nothing of the prompt lay there. Then a look into the approximate tree that `cache_aware`
goes by, and what its thresholds are for.
"""

from ch07_sglang_radix.benchmarks.replicas import Outcome, make_replicas, serve
from ch07_sglang_radix.benchmarks.workloads import Call, Program, Source
from ch07_sglang_radix.parallelism.approximate_tree import ApproximateTree
from ch07_sglang_radix.parallelism.load_balancing import POLICIES, CacheAware, Load, LoadBalancer
from common.distributed.launch import run_main
from common.teaching.show import check, heading, mistake, table

REPLICAS, TURNS = 4, 3
LONG = 200  # tokens of the fourth persona


def main() -> None:
    under_each_policy()
    what_the_router_remembers()
    what_the_thresholds_are_for()


def conversations(source: Source) -> list[Program]:
    def conversation(prompt: list[int], questions: list[list[int]]) -> Program:
        for question in questions:
            prompt = prompt + question
            (answer,) = yield [Call(prompt, 8)]
            prompt = prompt + answer

    system = source.text(24)
    questions = [[source.text(12) for _ in range(TURNS)] for _ in range(4)]
    return [
        conversation(system + source.text(n), asked) for n, asked in zip((40, 40, 40, LONG), questions, strict=True)
    ]


def under_each_policy() -> None:
    heading(f"4 conversations of {TURNS} turns on {REPLICAS} replicas: A B C D, a b c d where nothing was found")
    replicas = make_replicas(REPLICAS, 1024)
    outcomes: dict[str, Outcome] = {}
    for policy in POLICIES:
        source = Source(replicas[0].wrapper.config.vocab_size)
        outcomes[policy] = serve(replicas, conversations(source), LoadBalancer(policy, range(REPLICAS)))
        for replica in replicas:
            replica.tree.flush()
    rows = []
    for policy, outcome in outcomes.items():
        went = ["", "", "", ""]
        for one in outcome.answered:
            went[one.program] += ("ABCD" if one.cached_tokens else "abcd")[one.replica]
        rows.append((policy, *went, f"{100 * outcome.hit_rate:.0f} %", " ".join(map(str, outcome.computed))))
    table(("policy", "1", "2", "3", "4 (long)", "found", "tokens computed by each"), rows)
    texts = {policy: {tuple(one.output_ids) for one in outcome.answered} for policy, outcome in outcomes.items()}
    check(
        "the answers are the same, wherever they were computed", all(one == texts["random"] for one in texts.values())
    )
    hits = {policy: outcome.hit_rate for policy, outcome in outcomes.items()}
    check("nobody finds more than cache_aware", max(hits.values()) == hits["cache_aware"])
    check("and random finds less", hits["random"] < hits["cache_aware"])


def what_the_router_remembers() -> None:
    heading("The approximate tree: what was sent, and to whom")
    tree = ApproximateTree()
    for text, worker in (("You are a poet. Rain", "a"), ("You are a cook. Soup", "b"), ("You are a poet. Snow", "a")):
        tree.insert(text, worker)
    rows = []
    for text in ("You are a poet. Fog", "You are a spy. Who", "Tell me"):
        matched, worker = tree.match(text)
        rows.append((repr(text), matched, len(text), f"{matched / len(text):.2f}", worker))
    table(("prompt", "matched", "of", "share", "was sent to"), rows)
    check("of what several were sent, the newest is named", tree.match("You are a spy")[1] == "a")
    check("a worker's size counts shared characters once", tree.size["a"] == len("You are a poet. Rain") + len("Snow"))


def what_the_thresholds_are_for() -> None:
    heading("A prefix that everybody has")
    prompts = [f"You are a helpful assistant. Question {i}" for i in range(200)]
    spread = {}
    for name, options in (("without thresholds", {"balance_abs_threshold": 10**9}), ("SGLang's, 64 and 1.5", {})):
        policy, loads = CacheAware(**options), {worker: Load() for worker in "ABCD"}
        for prompt in prompts:
            worker = policy.choose(prompt, loads)
            policy.sent(prompt, worker)
            loads[worker].requests += 1
        spread[name] = [load.requests for load in loads.values()]
    wrong, right = spread.values()
    said = "200 requests with one system prompt, none of them done yet: how many each replica has"
    mistake(said, " ".join(map(str, wrong)), " ".join(map(str, right)))
    check("the fullest has 65 more than the emptiest, and no more", max(right) - min(right) <= 65)


if __name__ == "__main__":
    run_main(main)
