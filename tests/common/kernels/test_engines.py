"""Models with experts, latent pages and adapters on a GPU: the kernels together, in graphs and without."""

import pytest
from transformers import AutoTokenizer

from ch07_sglang_radix.engine import Engine
from common.tiny_qwen import TINY_QWEN_PATH
from tests.adapters import greedy_with, save_adapter
from tests.common.kernels.where import gpu, kernel
from tests.oracle import SMALL, greedy, save_random

pytestmark = [kernel, gpu]
PROMPTS = [list(range(3, 3 + n)) for n in (1, 5, 40, 90)]
MODELS = [name for name in SMALL if "moe" in name or "deepseek" in name or name in ("mixtral", "one_of_60")]


def answers(folder, dtype: str, disable_cuda_graph: bool) -> list[list[int]]:
    engine = Engine(str(folder), device="cuda", dtype=dtype, disable_cuda_graph=disable_cuda_graph)
    params = [{"max_new_tokens": 12, "temperature": 0.0, "ignore_eos": True}] * len(PROMPTS)
    return [each["output_ids"] for each in engine.generate(input_ids=PROMPTS, sampling_params=params)]


@pytest.mark.parametrize("disable_cuda_graph", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_equal_transformers(name, disable_cuda_graph, tmp_path):
    folder = save_random(name, tmp_path)
    assert answers(folder, "float32", disable_cuda_graph) == [greedy(folder, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("name", MODELS)
def test_graphs_give_the_tokens_of_plain_launches_in_bfloat16(name, tmp_path):
    folder = save_random(name, tmp_path)
    assert answers(folder, "bfloat16", False) == answers(folder, "bfloat16", True)


@pytest.mark.parametrize(("deterministic", "lora"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama"])
def test_prompts_in_graphs_give_the_tokens_of_transformers(name, deterministic, lora, tmp_path):
    """One by one and together, new, in chunks and from the tree; some prompts and steps are longer than what is recorded."""
    folder = save_random(name, tmp_path / "base")
    adapter = save_adapter(folder, tmp_path / "adapter", seed=1, r=4) if lora else None
    engine = Engine(
        str(folder), device="cuda", dtype="float32", cuda_graph_max_bs_prefill=64, chunked_prefill_size=48, page_size=1,
        enable_deterministic_inference=deterministic, enable_lora=lora, lora_paths={"one": str(adapter)} if lora else None,
    )  # fmt: skip
    assert engine._wrapper.prefill_graphs is not None
    names = ["one" if lora and i % 2 else None for i in range(len(PROMPTS))]
    params = {"max_new_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    want = [
        greedy_with(folder, adapter, prompt, 12) if name else greedy(folder, prompt, 12)
        for name, prompt in zip(names, PROMPTS, strict=True)
    ]
    for _ in range(2):
        got = engine.generate(
            input_ids=PROMPTS, sampling_params=[params] * len(PROMPTS), lora_path=names if lora else None
        )
        assert [one["output_ids"] for one in got] == want
        for prompt, its, answer in zip(PROMPTS, names, want, strict=True):
            assert engine.generate(input_ids=prompt, sampling_params=params, lora_path=its)["output_ids"] == answer
    engine.shutdown()


@pytest.mark.parametrize("disable_cuda_graph", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("backend", ["triton", "torch_native"])
def test_every_request_has_its_adapter(backend, disable_cuda_graph, tmp_path):
    """More adapters than slots, so that others come into a slot which a graph was captured with."""
    folder = save_random("qwen2", tmp_path / "base")
    paths = {str(i): save_adapter(folder, tmp_path / str(i), seed=i, r=2 + i) for i in range(4)}
    engine = Engine(
        str(folder), device="cuda", dtype="float32", disable_cuda_graph=disable_cuda_graph, enable_lora=True,
        lora_paths={name: str(path) for name, path in paths.items()}, max_loras_per_batch=2, lora_backend=backend,
    )  # fmt: skip
    names = [None, "0", "1", "2", "3", "0", None, "2"]
    prompts = [PROMPTS[i % 4] for i in range(len(names))]
    params = [{"max_new_tokens": 12, "temperature": 0.0, "ignore_eos": True}] * len(names)
    got = engine.generate(input_ids=prompts, sampling_params=params, lora_path=names)
    assert [one["output_ids"] for one in got] == [
        greedy_with(folder, paths[name], prompt, 12) if name else greedy(folder, prompt, 12)
        for name, prompt in zip(names, prompts, strict=True)
    ]


CHAIN = {"speculative_num_steps": 3}
TREE = {"speculative_num_steps": 3, "speculative_eagle_topk": 2, "speculative_num_draft_tokens": 6}
WIDE = {
    "speculative_num_steps": 4,
    "speculative_eagle_topk": 4,
    "speculative_num_draft_tokens": 6,
}  # 12 run, 6 are kept
DRAFTERS = [
    ("NGRAM", {}), ("STANDALONE", CHAIN), ("STANDALONE", TREE), ("MEDUSA", TREE), ("EAGLE", CHAIN), ("EAGLE", TREE),
    ("EAGLE3", TREE), ("EAGLE", WIDE), ("EAGLE3", WIDE),
]  # fmt: skip


@pytest.mark.parametrize("disable_cuda_graph", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize(("algorithm", "options"), DRAFTERS)
def test_guesses_change_no_token(algorithm, options, disable_cuda_graph):
    """Of the bundled drafters, recorded and not; three requests are four of a recording, and each ends when it likes."""
    ids = AutoTokenizer.from_pretrained(TINY_QWEN_PATH)
    prompts = [ids(f"What is {what}?")["input_ids"] for what in ("a page table", "the KV cache", "tensor parallelism")]
    with Engine(
        device="cuda", dtype="float32", page_size=4, speculative_algorithm=algorithm, speculative_stand_down=False,
        disable_cuda_graph=disable_cuda_graph, **options,
    ) as engine:  # fmt: skip
        recorded = engine._wrapper.verifier.graphs
        assert (recorded is not None) == (algorithm != "NGRAM" and not disable_cuda_graph)
        told = engine.generate(
            input_ids=prompts,
            sampling_params=[{"max_new_tokens": n, "temperature": 0.0, "ignore_eos": True} for n in (9, 24, 40)],
        )
    for prompt, n, one in zip(prompts, (9, 24, 40), told, strict=True):
        assert one["output_ids"] == greedy(TINY_QWEN_PATH, prompt, n)
        assert one["meta_info"]["spec_verify_ct"] > 0
    if algorithm != "NGRAM":  # which has seen nothing yet
        assert sum(one["meta_info"]["spec_num_correct_drafts"] for one in told) > 0
