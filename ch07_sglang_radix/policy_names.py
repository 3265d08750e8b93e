"""The names of policies and what goes with what, apart from what they do: a mistake is told before torch is there.

What they do: schedule_policy.py, and of those that choose a replica parallelism/load_balancing.py.
"""

from common.values import choice

POLICY_NAMES = (
    "fcfs", "lof", "random", "routing-key", "lpm", "dfs-weight", "hrrn", "shortest-prefill-first", "priority", "dynamic",
)  # fmt: skip
LOAD_BALANCE_METHODS = (
    "round_robin", "random", "total_requests", "total_tokens", "power_of_two", "prefix_hash", "cache_aware",
)  # fmt: skip
NO_CHUNKS = -1  # chunked_prefill_size: a prompt is computed as a whole


def check_policy(name: str, without_tree: bool) -> None:
    """Raises ValueError for an unknown name, and for shortest-prefill-first without a tree. Any rank can tell."""
    choice("schedule_policy", name, POLICY_NAMES)
    if name == "shortest-prefill-first" and without_tree:
        raise ValueError(f"schedule_policy={name!r} needs the radix cache; leave out disable_radix_cache, or use fcfs")


def check_continuous_decode(steps: int, stages: int, data_ranks: int, speculates: bool) -> None:
    """Raises ValueError where the tokens of several decode steps are to be looked at together, and each step's are needed."""
    if steps == 1:
        return
    wrong = (
        (stages > 1, "a lane begins its next step with the tokens of its last one; use pp_size=1, or num_lanes=1"),
        (data_ranks > 1, "data ranks plan every step together; use attn_dp_size=1"),
        (speculates, "a verify step says how far each request has come; leave speculative_algorithm out"),
    )
    for is_so, why in wrong:
        if is_so:
            raise ValueError(f"num_continuous_decode_steps={steps}: {why}, or num_continuous_decode_steps=1")


def check_dynamic_chunking(pp_size: int, chunked_prefill_size: int | None) -> None:
    """Raises ValueError where chunks that take equally long are asked for, and nobody would wait for a longer one."""
    if pp_size == 1:
        raise ValueError("enable_dynamic_chunking=True is about stages, and pp_size=1; use pp_size=2 or leave it out")
    if chunked_prefill_size == NO_CHUNKS:
        raise ValueError(
            f"enable_dynamic_chunking=True lets every chunk take as long as the first, and chunked_prefill_size={NO_CHUNKS} makes "
            "none; give the first one's tokens"
        )
