"""The names of the schedule policies, apart from what they do (schedule_policy.py): a wrong one is told before torch is there."""

from common.values import choice

POLICY_NAMES = (
    "fcfs", "lof", "random", "routing-key", "lpm", "dfs-weight", "hrrn", "shortest-prefill-first", "priority", "dynamic",
)  # fmt: skip


def check_policy(name: str, without_tree: bool) -> None:
    """Raises ValueError for an unknown name, and for shortest-prefill-first without a tree. Any rank can tell."""
    choice("schedule_policy", name, POLICY_NAMES)
    if name == "shortest-prefill-first" and without_tree:
        raise ValueError(f"schedule_policy={name!r} needs the radix cache; leave out disable_radix_cache, or use fcfs")
