"""What an engine tells of itself: Engine.get_server_info, /server_info."""

from typing import Any

from ch07_sglang_radix.scheduler import TPScheduler
from common.attention.kv_format import kv_name


def what_it_is(scheduler: TPScheduler) -> dict[str, Any]:
    """Of any rank, and always the same but for the count of steps and the version of the weights."""
    s, wrapper = scheduler, scheduler.wrapper
    return {
        "model": {"architecture": wrapper.config.architecture, "layers": wrapper.config.num_layers},
        "tp_size": s.tp.size, "tp_rank": s.tp.rank, "pp_size": wrapper.parallel.pp.size,
        "pp_rank": wrapper.parallel.pp.rank, "cp_size": wrapper.parallel.cp.size,
        "attn_dp_size": wrapper.parallel.layout.attn_dp, "ep_size": wrapper.parallel.layout.ep,
        "enable_layernorm_sp": wrapper.communicator.enable_layernorm_sp,
        "device": str(s.tp.device), "dtype": str(wrapper.dtype).removeprefix("torch."),
        "kv_cache_dtype": kv_name(wrapper.kv_dtype), "page_size": s.page_size,
        "chunked_prefill_size": s.chunked_prefill_size, "steps": dict(s.steps), "weight_version": s.weight_version,
    }  # fmt: skip


def as_it_stands(scheduler: TPScheduler) -> dict[str, Any]:
    """Of rank 0, between two steps: pool, tree, queue and hit rate, over all its data ranks; the experts' load, if it is read."""
    s, total, prompt = scheduler, scheduler.totals(), scheduler.served["prompt"]
    experts = {"experts": s.expert_load.facts()} if s.expert_load else {}
    guesses, drafts = s.speculation, {}
    if guesses:
        rates = guesses.rule.rates if guesses.rule else {}
        drafts = {
            "spec_verify_steps": guesses.steps, "spec_num_correct_drafts": guesses.correct,
            "spec_num_proposed_drafts": guesses.sequences * (guesses.nodes - 1),
            "avg_spec_accept_length": guesses.tokens / guesses.sequences if guesses.sequences else 0.0,
            "spec_stand_down": {str(size): list(map(round, pair)) for size, pair in rates.items()},
        }  # fmt: skip
    adapters = s.lora.facts() if s.lora else {}
    tiers = s.tiers.facts() if s.tiers else {}
    return experts | drafts | adapters | tiers | {
        "schedule_policy": s.policy.name, "radix_eviction_policy": s.tree.eviction,
        "max_total_num_tokens": total["size"], "free_tokens": total["free"], "evictable_tokens": total["evictable"],
        "protected_tokens": total["protected"], "held_tokens": total["held"],
        "session_held_tokens": total["session_held"], "waiting": total["waiting"], "running": total["running"],
        "prompt_tokens": prompt, "cached_tokens": s.served["cached"],
        "hit_rate": s.served["cached"] / prompt if prompt else 0.0, "evicted_tokens": total["evicted"],
        "retractions": total["retractions"], "new_token_ratio": s.new_token_ratio, "steps": dict(s.steps),
    }  # fmt: skip
