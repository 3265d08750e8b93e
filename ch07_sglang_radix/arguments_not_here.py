"""Arguments that SGLang's engine has and this one has not: the way out, for the one line that refuses them."""

from ch07_sglang_radix import hicache_args, lora, speculative_args

# what SGLang has and this engine has not: the way out
ELSEWHERE = (
    {
        "enable_priority_scheduling": "use schedule_policy='priority', which preempts nobody",
        "prefill_decode_interval": "a decode step follows every prefill step while somebody runs; leave it out",
        "host": "an engine listens to nobody; start a server with python -m ch07_sglang_radix.launch_server",
        "port": "an engine listens to nobody; start a server with python -m ch07_sglang_radix.launch_server",
        "api_key": "an engine listens to nobody; start a server with python -m ch07_sglang_radix.launch_server",
        "chat_template": "put it into the tokenizer's folder, and name that with tokenizer_path=",
        "enable_metrics": "get_server_info() tells them; of the server, GET /metrics",
        "log_requests": "use trace=, a line for each step, or log_level=",
        "moe_a2a_backend": "use ep_dispatch='all_to_all', by plain collectives of NCCL or gloo",
        "eplb_algorithm": "EPLB as DeepSeek published it is the only one here; leave it out",
        "eplb_rebalance_layers_per_chunk": "all layers move between the same two steps; leave it out",
        "eplb_min_rebalancing_utilization_threshold": "a layer stays as it is unless it would gain; leave it out",
        "expert_distribution_recorder_mode": "use expert_balancedness_report_mode; get_server_info() and trace= tell them too",
        "expert_distribution_recorder_buffer_size": "counts are totals here; leave it out",
        "deepep_mode": "exact sizes in prefill and fixed buffers in decode, always; leave it out",
        "init_expert_location": "expert p % num_experts lies in place p; leave it out",
        "attn_cp_size": "it is cp_size= here",
        "tensor_parallel_size": "it is tp_size= here, as in SGLang's Engine",
        "pipeline_parallel_size": "it is pp_size= here, as in SGLang's Engine",
        "data_parallel_size": "it is dp_size= here, as in SGLang's Engine",
        "expert_parallel_size": "it is ep_size= here, as in SGLang's Engine",
        "dcp_size": "use cp_size=, which spreads the tokens of a request in decode as well",
        "grammar_backend": "llguidance is the only one here; leave it out",
        "max_queued_requests": "the queue has no end here; leave it out",
        "trust_remote_code": "a folder's Python is never run here; leave it out",
        "stream_interval": "a stream tells of every token; leave it out",
        "watchdog_timeout": "a rank that does not answer ends the others after 60 s (300 s on GPUs); leave it out",
        "load_format": "safetensors files are read; leave it out",
        "revision": "give the Hub id alone, or a local folder",
        "download_dir": "the Hub's own cache is used (HF_HOME)",
        "json_model_override_args": "edit the folder's config.json",
        "tokenizer_mode": "the folder's own tokenizer is used; leave it out",
        "is_embedding": "this engine generates; leave it out",
        "base_gpu_id": "choose the GPUs with CUDA_VISIBLE_DEVICES",
        "enable_dp_attention": "SGLang's old spelling; use attn_dp_size= for the number of data ranks inside tp_size=",
        "enable_flashinfer_allreduce_fusion": "use enable_all_reduce_fusion",
        "moe_runner_backend": "it is moe_runner= here: auto, loop, grouped or triton",
        "cpu_offload_gb": "weights stay on the device; use more ranks or a smaller dtype",
        "sampling_backend": "one sampler here; leave it out",
    }
    | lora.ELSEWHERE
    | speculative_args.ELSEWHERE
    | hicache_args.ELSEWHERE
)
# values that ask for nothing of it, besides None: SGLang's own defaults (0.5.23, srt/arg_groups/fields/)
IDLE = dict.fromkeys(ELSEWHERE) | {
    "enable_priority_scheduling": False, "enable_metrics": False, "log_requests": False,
    "tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1, "expert_parallel_size": 1,
    "attn_cp_size": 1, "dcp_size": 1, "moe_a2a_backend": "none", "deepep_mode": "auto",
    "eplb_algorithm": "auto", "eplb_min_rebalancing_utilization_threshold": 1.0,
    "init_expert_location": "trivial", "base_gpu_id": 0, "stream_interval": 1,
    "trust_remote_code": False, "load_format": "auto",
    "json_model_override_args": "{}", "tokenizer_mode": "auto", "is_embedding": False, "enable_dp_attention": False,
    "enable_flashinfer_allreduce_fusion": False, "moe_runner_backend": "auto",
    "cpu_offload_gb": 0, "watchdog_timeout": 300,
} | lora.IDLE | speculative_args.IDLE | hicache_args.IDLE  # fmt: skip
