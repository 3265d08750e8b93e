"""Chapter 6: vLLM's brain on the tensor-parallel executor."""

from ch06_tp_vllm.engine_args import EngineArgs
from ch06_tp_vllm.llm import LLM
from ch06_tp_vllm.llm_engine import LLMEngine
from ch06_tp_vllm.lora_request import LoRARequest
from ch06_tp_vllm.outputs import CompletionOutput, RequestOutput
from ch06_tp_vllm.sampling_params import SamplingParams, StructuredOutputsParams

__all__ = [
    "LLM", "CompletionOutput", "EngineArgs", "LLMEngine", "LoRARequest", "RequestOutput", "SamplingParams",
    "StructuredOutputsParams",
]  # fmt: skip
