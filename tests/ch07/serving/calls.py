"""Calls of /generate, one for each thing it can do, and how to compare what comes back."""

from typing import Any

import pytest

CALLS: dict[str, dict[str, Any]] = {
    "greedy": {"text": "What is a radix cache?", "sampling_params": {"max_new_tokens": 12}},
    "again, from the tree": {"text": "What is a radix cache?", "sampling_params": {"max_new_tokens": 12}},
    "ids": {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 5}},
    "batch": {"text": ["What is a page?", "什么是全归约？"], "sampling_params": {"max_new_tokens": 8}},
    "batch of one": {"input_ids": [[5, 6, 7]], "sampling_params": [{"max_new_tokens": 3}]},
    "params each": {"input_ids": [[5], [6]], "sampling_params": [{"max_new_tokens": 1}, {"max_new_tokens": 4}]},
    "n": {"text": "Define:", "sampling_params": {"n": 3, "temperature": 1.2, "max_new_tokens": 6, "sampling_seed": 9}},
    "drawn by the server's seed": {"text": "Define:", "sampling_params": {"temperature": 1.0, "max_new_tokens": 6}},
    "stop": {"text": "What is a radix cache?", "sampling_params": {"max_new_tokens": 40, "stop": [" cache", "@@"]}},
    "stop kept": {
        "text": "What is a radix cache?", "sampling_params": {"max_new_tokens": 40, "stop": " cache", "no_stop_trim": True},
    },
    "stop pattern": {"text": "What is a radix cache?", "sampling_params": {"max_new_tokens": 40, "stop_regex": "c[a-z]+e"}},
    "stop token": {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 5, "stop_token_ids": [11, 12, 13]}},
    "special tokens shown": {
        "text": "<|im_start|>user\nWhat is a page?<|im_end|>\n<|im_start|>assistant\n",
        "sampling_params": {"max_new_tokens": 60, "skip_special_tokens": False, "no_stop_trim": True},
    },
    "edits": {
        "text": "What is",
        "sampling_params": {
            "max_new_tokens": 8, "min_new_tokens": 4, "repetition_penalty": 1.3, "presence_penalty": 0.4,
            "frequency_penalty": 0.2, "logit_bias": {"7": 2.5}, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "temperature": 0.7,
        },
    },
    "logprobs": {
        "text": "What is a radix cache?", "return_logprob": True, "top_logprobs_num": 2, "token_ids_logprob": [5, 6],
        "sampling_params": {"max_new_tokens": 4},
    },
    "logprobs of the prompt": {
        "input_ids": [5, 6, 7, 8, 9, 10], "return_logprob": True, "logprob_start_len": 2, "top_logprobs_num": 1,
        "sampling_params": {"max_new_tokens": 2},
    },
    "logprobs of all the prompt": {
        "input_ids": [5, 6, 7], "return_logprob": True, "logprob_start_len": 0, "sampling_params": {"max_new_tokens": 2},
    },
    "a namespace": {"text": "What is a radix cache?", "extra_key": "k", "priority": 2, "sampling_params": {"max_new_tokens": 3}},
    "ends by itself": {
        "text": "<|im_start|>user\nWhat is a radix cache?<|im_end|>\n<|im_start|>assistant\n",
        "sampling_params": {"max_new_tokens": 200},
    },
}  # fmt: skip


def engine_call(call: dict[str, Any], name: str) -> dict[str, Any]:
    """The same for Engine.generate. Named, as an engine numbers its requests and a server draws names."""
    arguments = {"prompt" if key == "text" else key: value for key, value in call.items()}
    prompts = call.get("text", call.get("input_ids"))
    several = not isinstance(prompts, str) and not isinstance(prompts[0], int)
    return arguments | {"rid": [f"{name} {i}" for i in range(len(prompts))] if several else name}


def expected(answer: Any) -> Any:
    """Tuples as JSON has them; log-probabilities to four digits: each process picks the form of its matrix products by
    their speed, and sums in another order.
    """
    if isinstance(answer, dict):
        return {key: expected(value) for key, value in answer.items()}
    if isinstance(answer, list | tuple):
        return [expected(value) for value in answer]
    return pytest.approx(answer, abs=1e-4) if isinstance(answer, float) else answer
