"""Logits in bfloat16 against transformers' in float32: as near to them as transformers itself comes in bfloat16.

A router of a small model with random weights has near ties, which rounding decides: some prompts meet other experts and are far
off, in transformers as here. So the median of several prompts is compared, and twins of other numbers would be far above it.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from common.executor import Executor
from common.models.published_configs import save_random_weights
from tests.common.kernels.where import gpu
from tests.oracle import SMALL

P, PAGES = 4, 13
PROMPTS = [list(range(3 + 7 * i, 3 + 7 * i + n)) for i, n in enumerate((2, 5, 9, 17, 23, 31, 40, 48, 3, 12, 50, 28))]
MODELS = [name for name in SMALL if "moe" in name or "deepseek" in name or name in ("mixtral", "one_of_60")]


@torch.inference_mode()
def of_transformers(folder: Path, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """[2, prompts, V]: behind all but the last token of each prompt, and behind that."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval().to(device)
    logits = [model(torch.tensor([prompt], device=device)).logits[0, -2:] for prompt in PROMPTS]
    return torch.stack(logits, 1).float().cpu()


def of_this_project(folder, device: str) -> torch.Tensor:
    """The same: a prefill step without the last tokens, and a decode step with them; on a GPU one from a CUDA graph."""
    executor = Executor(folder, device, P, dtype="bfloat16", max_total_tokens=len(PROMPTS) * PAGES * P)
    rows, last = np.arange(len(PROMPTS)), torch.tensor([prompt[-1] for prompt in PROMPTS])
    executor.table.set_pages([(row, 0, range(row * PAGES, (row + 1) * PAGES)) for row in rows.tolist()])
    known = np.array([len(prompt) - 1 for prompt in PROMPTS])
    tokens = np.concatenate([prompt[:-1] for prompt in PROMPTS])
    prefill = executor.ragged(tokens, rows, 0 * rows, known, 0 * rows + 1).clone()
    executor.receive_tokens(last.to(executor.tp.device))
    decode = executor.decode(rows, known)
    return torch.stack([prefill, decode])[..., : executor.config.vocab_size].float().cpu()


@pytest.mark.filterwarnings("ignore:this CPU has no instructions")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("name", MODELS)
def test_experts_and_latent_rows_in_bfloat16_are_as_near_to_float32_as_transformers(name, device, checkpoint):
    folder = checkpoint(name)
    want = of_transformers(folder, torch.float32)
    far = lambda logits: ((logits - want).norm(dim=2) / want.norm(dim=2)).median(dim=1).values  # noqa: E731, [2]
    mine, theirs = far(of_this_project(folder, device)), far(of_transformers(folder, torch.bfloat16))
    assert (mine < 1.5 * theirs).all(), (mine, theirs)


@gpu
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param("Qwen2.5-0.5B", {}, id="Qwen2.5-0.5B"),
        pytest.param("Qwen3-0.6B", {}, id="Qwen3-0.6B"),
        pytest.param("Qwen2.5-7B", {"num_hidden_layers": 4}, id="4 layers of Qwen2.5-7B"),
    ],
)
def test_logits_of_published_shapes_in_bfloat16_are_as_near_to_float32_as_transformers(name, changes):
    """Without a router nothing jumps: the error of all prompts together is compared, and within a tenth of transformers'."""
    with TemporaryDirectory() as made:  # gigabytes, of which tmp_path would keep three runs
        folder = save_random_weights(name, Path(made) / name, "cuda", **changes)
        want = of_transformers(folder, torch.float32, "cuda")
        far = lambda logits: (logits - want).norm(dim=(1, 2)) / want.norm(dim=(1, 2))  # noqa: E731, [2]
        mine, theirs = far(of_this_project(folder, "cuda")), far(of_transformers(folder, torch.bfloat16, "cuda"))
    assert (mine <= 1.1 * theirs).all(), (mine, theirs)
