"""What an engine works out of its arguments: is there such a layout, how long is a step, who guesses, which seed."""

import secrets

from ch07_sglang_radix.admission import DEFAULT_CHUNK
from ch07_sglang_radix.policy_names import NO_CHUNKS
from ch07_sglang_radix.server_args import ServerArgs
from ch07_sglang_radix.speculative_args import speculative_options
from common.attention.backends import pick_attention
from common.distributed.devices import pick_device
from common.distributed.layout import Layout
from common.layers.moe_runner import pick_runner
from common.models.config import ModelConfig
from common.models.drafters.contract import DraftOptions
from common.models.hub import resolve_model
from common.models.prefill_graphs import PREFILL_GRAPH_TOKENS
from common.models.stages import layer_partition, stage_layers
from common.tiny_qwen import TINY_QWEN_PATH


def refuse_ranks_for_another_model(args: ServerArgs) -> None:
    """Before they are started: what is wrong with this layout, by itself and for this config.json."""
    Layout.of(args.tp_size, args.pp_size, args.dp_size, attn_dp=args.attn_dp_size, cp=args.cp_size, ep=args.ep_size)
    config = ModelConfig.from_folder(resolve_model(args.model_path or TINY_QWEN_PATH))
    stage_layers(config.num_layers, args.pp_size, 0, layer_partition(args.pp_layer_partition))
    config.refuse_experts_layout(args.ep_size, args.ep_dispatch, args.ep_num_redundant_experts)
    device = pick_device(args.device, ranks=max(args.ranks // args.nnodes, 1))
    latent = config.latent is not None
    pick_attention(device, args.attention_backend, args.cp_size, latent, args.enable_deterministic_inference)
    if config.mixture:
        pick_runner(args.moe_runner, device)


def draft_options(args: ServerArgs) -> DraftOptions | None:
    asked = speculative_options(args)
    return asked and DraftOptions(**vars(asked))


def prefill_tokens(args: ServerArgs, device: str, page_size: int) -> int | None:
    """Prompt tokens of a step: chunked_prefill_size, and no more than max_prefill_tokens in whole pages."""
    if args.max_prefill_tokens is None:
        return args.chunked_prefill_size
    most = max(args.max_prefill_tokens // page_size, 1) * page_size
    chunk = DEFAULT_CHUNK[device] if args.chunked_prefill_size is None else args.chunked_prefill_size
    return most if chunk == NO_CHUNKS else min(most, chunk)


def prefill_graph_tokens(args: ServerArgs, device: str, page_size: int) -> int:
    """cuda_graph_max_bs_prefill or its default, and no more than a step has."""
    chunk = prefill_tokens(args, device, page_size)
    chunk = DEFAULT_CHUNK[device] if chunk is None else chunk
    most = PREFILL_GRAPH_TOKENS if args.cuda_graph_max_bs_prefill is None else args.cuda_graph_max_bs_prefill
    return most if chunk == NO_CHUNKS else min(most, chunk)


def seed(args: ServerArgs) -> int:
    """Rank 0 alone draws, so the others need not know the number."""
    return secrets.randbits(32) if args.random_seed is None else args.random_seed
