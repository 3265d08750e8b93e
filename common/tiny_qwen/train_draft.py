"""Trains a smaller model that writes ahead for the bundled one: same tokenizer, same glossary, a quarter of the numbers.

    python -m common.tiny_qwen.train_draft        # -> draft/

A draft model (STANDALONE) has to say what the target would say. The target answers with the glossary's own words, so the draft
learns these from the same conversations, by the same loss (train.py), for a shorter time. Its embedding begins as the target's own,
in the directions that tell most of it; two layers, since one cannot look for the term that was asked for and go on with it.
It need not answer well: where it is wrong, a step yields one token, as always.
"""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is here

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from common.distributed.launch import run_main
from common.tiny_qwen import TINY_QWEN_PATH
from common.tiny_qwen.train import SEED, fit, save_model

STEPS = 1500
PEAK_LR = 5e-3
SHAPE = {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def draft_of(target: PreTrainedModel) -> Qwen2ForCausalLM:
    """Untrained."""
    c = target.config
    torch.manual_seed(SEED)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=c.vocab_size,
            max_position_embeddings=c.max_position_embeddings,
            rope_parameters=dict(c.rope_parameters),
            rms_norm_eps=c.rms_norm_eps,
            initializer_range=SHAPE["hidden_size"] ** -0.5,
            tie_word_embeddings=True,
            eos_token_id=c.eos_token_id,
            pad_token_id=c.pad_token_id,
            **SHAPE,
        )
    )
    words = target.get_input_embeddings().weight.detach()  # [V, D]
    _, _, directions = torch.linalg.svd(words, full_matrices=False)
    smaller = words @ directions[: SHAPE["hidden_size"]].T
    model.get_input_embeddings().weight.data.copy_(smaller * (words.std() / smaller.std()))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=TINY_QWEN_PATH / "draft", help="folder of the checkpoint")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="1 is faster beside other work")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    tokenizer = Tokenizer.from_file(str(TINY_QWEN_PATH / "tokenizer.json"))
    model = draft_of(AutoModelForCausalLM.from_pretrained(TINY_QWEN_PATH, dtype=torch.float32))
    fit(model, tokenizer, args.steps, PEAK_LR)
    args.out.mkdir(parents=True, exist_ok=True)
    save_model(model, args.out)
    print(f"trained {model.num_parameters():,} parameters in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    run_main(main)
