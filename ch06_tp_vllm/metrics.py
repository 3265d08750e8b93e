"""What the engine has counted, under the names of vLLM's metrics (v1/metrics/loggers.py; counters get _total when scraped)."""

from dataclasses import dataclass

from ch06_tp_vllm.llm_engine import LLMEngine


@dataclass(frozen=True)
class Metric:
    """kind: gauge (as it is now) or counter (since the engine was made)."""

    name: str
    value: float
    kind: str


def engine_metrics(engine: LLMEngine) -> list[Metric]:
    scheduler, blocks, speculative = engine.scheduler, engine.blocks, engine.speculative_stats
    return [
        Metric("vllm:num_requests_running", len(scheduler.running), "gauge"),
        Metric("vllm:num_requests_waiting", len(scheduler.waiting), "gauge"),
        Metric("vllm:kv_cache_usage_perc", blocks.usage, "gauge"),
        Metric("vllm:prefix_cache_queries", blocks.stats.queries, "counter"),
        Metric("vllm:prefix_cache_hits", blocks.stats.hits, "counter"),
        Metric("vllm:num_preemptions", scheduler.num_preemptions, "counter"),
        Metric("vllm:prompt_tokens", engine.outputs.prompt_tokens, "counter"),
        Metric("vllm:generation_tokens", engine.outputs.generation_tokens, "counter"),
        Metric("vllm:spec_decode_num_drafts", speculative.num_drafts, "counter"),
        Metric("vllm:spec_decode_num_draft_tokens", speculative.num_draft_tokens, "counter"),
        Metric("vllm:spec_decode_num_accepted_tokens", speculative.num_accepted_tokens, "counter"),
    ]
