"""A pod of a LeaderWorkerSet is a node of one engine: what Kubernetes tells it becomes launch_server's flags.

    python -m ch07_sglang_radix.serving.deploy.lws_entry --model-path /models/m --tp-size 2 --port 30000

    LWS_GROUP_SIZE      pods of this group                       --nnodes
    LWS_WORKER_INDEX    which one this is; 0 is the leader       --node-rank
    LWS_LEADER_ADDRESS  the leader's name in the cluster's DNS   --dist-init-addr, with MEET_PORT

All other flags go on as they are. This process becomes the server, so that the SIGTERM of a pod that shall end reaches it.
The three names: sigs.k8s.io/lws, api/leaderworkerset/v1/leaderworkerset_types.go.
"""

import os
import sys
from collections.abc import Mapping, Sequence

OURS = ("--nnodes", "--node-rank", "--dist-init-addr")


def flags(environment: Mapping[str, str], given: Sequence[str]) -> list[str]:
    """Of launch_server on this pod. Raises ValueError for an environment that no LeaderWorkerSet makes."""
    names = [flag.partition("=")[0] for flag in given]
    if twice := [name for name in names if name in OURS]:
        raise ValueError(f"{twice[0]} comes from the LeaderWorkerSet; leave it out")
    size, index = (_number(environment, name) for name in ("LWS_GROUP_SIZE", "LWS_WORKER_INDEX"))
    if not 0 <= index < max(size, 1):
        raise ValueError(f"LWS_WORKER_INDEX={index} is outside 0..{size - 1} (LWS_GROUP_SIZE={size})")
    listen = (
        [] if any(flag.partition("=")[0] == "--host" for flag in given) else ["--host", "0.0.0.0"]
    )  # probes come from outside
    if size == 1:
        return [*given, *listen]
    leader, port = environment.get("LWS_LEADER_ADDRESS", ""), _number(environment, "MEET_PORT")
    if not leader:
        raise ValueError("LWS_LEADER_ADDRESS is not set; start this in a pod of a LeaderWorkerSet")
    nodes = ["--nnodes", str(size), "--node-rank", str(index), "--dist-init-addr", f"{leader}:{port}"]
    return [*given, *listen, *nodes]


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdecimal():
        raise ValueError(
            f"{name}={text!r} must be a whole number; a LeaderWorkerSet sets LWS_*, its manifest sets MEET_PORT"
        )
    return int(text)


def main() -> None:
    try:
        argv = [sys.executable, "-m", "ch07_sglang_radix.launch_server", *flags(os.environ, sys.argv[1:])]
    except ValueError as error:
        sys.exit(f"error: {error}")
    os.execv(sys.executable, argv)


if __name__ == "__main__":
    main()
