"""One of several hosts that are one engine: what all of them must have alike (common/distributed/nodes.py has the meeting)."""

from pathlib import Path
from typing import Any

from ch07_sglang_radix.server_args import ServerArgs
from common.distributed.nodes import Node, file_digests, parse_address
from common.models.checkpoint import checkpoint_files
from common.models.hub import resolve_model
from common.parallel_state import pick_device
from common.tiny_qwen import TINY_QWEN_PATH

# of one node, or of rank 0 alone: they may differ. Where the model lies may, too; what lies there may not
ITS_OWN = {
    "model_path", "tokenizer_path", "node_rank", "nnodes", "dist_init_addr", "dist_timeout", "random_seed", "trace", "log_level",
    "device", "check",
}  # fmt: skip


def node_of(args: ServerArgs) -> Node | None:
    """None for an engine of one host. Raises ValueError for ranks that do not divide over the nodes, or too few GPUs."""
    if args.nnodes == 1:
        return None
    host, port = parse_address("dist_init_addr", args.dist_init_addr)
    alike = {name: value for name, value in args.for_a_follower().items() if name not in ITS_OWN}
    node = Node(args.nnodes, args.node_rank, host, port, args.dist_timeout, {"argument": alike}, lambda: _model(args))
    # stages are cut over nodes, ranks of one stay together
    alike["device"] = pick_device(args.device, 0, len(node.ranks(args.ranks))).type
    return node


def _model(args: ServerArgs) -> dict[str, dict[str, Any]]:
    folder = resolve_model(args.model_path or TINY_QWEN_PATH)
    return {"model": file_digests([Path(folder) / "config.json", *checkpoint_files(folder)])}
