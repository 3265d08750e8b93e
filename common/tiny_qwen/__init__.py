"""A tiny Qwen2 chat model that recites the book's glossary in English and Chinese.

The checkpoint (config.json, model.safetensors, tokenizer.json, ...) lies in this
folder, beside the scripts that made it, so every demo can load it offline:

    from common.tiny_qwen import TINY_QWEN_PATH
    model = AutoModelForCausalLM.from_pretrained(TINY_QWEN_PATH)

Importing this package loads nothing heavy; the scripts import torch themselves.
"""

from pathlib import Path

TINY_QWEN_PATH = Path(__file__).parent
LATENT_PATH = TINY_QWEN_PATH / "latent"  # the same with latent attention: to_latent.py
ADAPTERS_PATH = TINY_QWEN_PATH / "adapters"  # LoRA adapters of it: train_adapters.py
# what guesses ahead of it, by the name of the algorithm: train_draft.py, train_medusa.py, train_eagle.py
DRAFTER_PATHS = {
    "STANDALONE": TINY_QWEN_PATH / "draft",
    "MEDUSA": TINY_QWEN_PATH / "medusa",
    "EAGLE": TINY_QWEN_PATH / "eagle",
    "EAGLE3": TINY_QWEN_PATH / "eagle3",
}
