"""Logits in bfloat16 against transformers' in float32: as near to them as transformers itself comes in bfloat16.

A router of a small model with random weights has near ties, which rounding decides: some prompts meet other experts and are far
off, in transformers as here. So the median of several prompts is compared, and twins of other numbers would be far above it.
"""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from common.executor import Executor
from tests.oracle import SMALL, reference_model

P, PAGES = 4, 13
PROMPTS = [list(range(3 + 7 * i, 3 + 7 * i + n)) for i, n in enumerate((2, 5, 9, 17, 23, 31, 40, 48, 3, 12, 50, 28))]
MODELS = [name for name in SMALL if "moe" in name or "deepseek" in name or name in ("mixtral", "one_of_60")]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@torch.inference_mode()
def of_transformers(folder, dtype: torch.dtype) -> torch.Tensor:
    """[2, prompts, V]: behind all but the last token of each prompt, and behind that."""
    model = reference_model(folder)
    if dtype != torch.float32:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()
    return torch.stack([model(torch.tensor([prompt])).logits[0, -2:].float() for prompt in PROMPTS], 1)


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
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_experts_and_latent_rows_in_bfloat16_are_as_near_to_float32_as_transformers(name, device, checkpoint):
    folder = checkpoint(name)
    want = of_transformers(folder, torch.float32)
    far = lambda logits: ((logits - want).norm(dim=2) / want.norm(dim=2)).median(dim=1).values  # noqa: E731, [2]
    mine, theirs = far(of_this_project(folder, device)), far(of_transformers(folder, torch.bfloat16))
    assert (mine < 1.5 * theirs).all(), (mine, theirs)
