"""The bundled model with eyes: a checkpoint in the layout of Qwen2-VL, put together in the temporary folder.

    from common.tiny_qwen.tiny_vision import prompt_of, tiny_vision
    engine = Engine(tiny_vision())
    engine.generate(prompt_of("What is it?"), image_data="picture.png")

Most of it is the bundled model, tensor for tensor: embedding, MLPs, head. `vision/` holds what was trained beside it
(train_vision.py): a vision tower of two layers, and the attention of the decoder's layers, which learned to look at its rows.
Four special tokens are new; their embeddings are never trained: that of <|endoftext|> does for all. Two of them, the places for
pictures and videos, are never fed in, and the marks around a picture need none of their own.
"""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from common.tiny_qwen import TINY_QWEN_PATH

VISION_PATH = TINY_QWEN_PATH / "vision"
TRAINED = "trained.safetensors"
NEW_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
EMBEDDING, NEVER_WRITTEN = "model.embed_tokens.weight", "<|endoftext|>"
# Qwen2-VL's: a picture among the parts of a message becomes one placeholder between its two marks
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def prompt_of(question: str, images: int = 1) -> str:
    """What the chat template makes of a user's pictures and question."""
    pictures = "<|vision_start|><|image_pad|><|vision_end|>" * images
    return f"<|im_start|>user\n{pictures}{question}<|im_end|>\n<|im_start|>assistant\n"


def tiny_vision() -> Path:
    """Made once; the folder's name says of what. Several processes may call this at once (see upcycle.tiny_mixture)."""
    parts = [TINY_QWEN_PATH / "model.safetensors", *sorted(VISION_PATH.iterdir()), Path(__file__)]
    made_of = hashlib.sha256(b"".join(path.read_bytes() for path in parts)).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"tiny_vision_{made_of}"
    if not folder.exists():
        unfinished = Path(tempfile.mkdtemp(prefix="tiny_vision_"))
        put_together(unfinished, load_file(VISION_PATH / TRAINED))
        try:
            unfinished.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(unfinished)
    return folder


def put_together(folder: Path, trained: dict[str, torch.Tensor], configs: Path = VISION_PATH) -> None:
    """trained: the tensors that are not the bundled model's, under Qwen2-VL's names. configs: where config.json lies."""
    tensors = load_file(TINY_QWEN_PATH / "model.safetensors")
    ids = write_tokenizer(folder)
    embedding = tensors[EMBEDDING]
    tensors[EMBEDDING] = torch.cat([embedding, embedding[ids[NEVER_WRITTEN]].expand(len(NEW_TOKENS), -1)])
    save_file(tensors | trained, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(configs / name, folder)
    shutil.copy(TINY_QWEN_PATH / "generation_config.json", folder)


def write_tokenizer(folder: Path) -> dict[str, int]:
    """The bundled tokenizer with NEW_TOKENS behind its own; returns the ids of all special tokens."""
    tokenizer = json.loads((TINY_QWEN_PATH / "tokenizer.json").read_text(encoding="utf-8"))
    added = tokenizer["added_tokens"]
    first = max(token["id"] for token in added) + 1
    added += [added[-1] | {"id": first + i, "content": content} for i, content in enumerate(NEW_TOKENS)]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    config = json.loads((TINY_QWEN_PATH / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["additional_special_tokens"] += NEW_TOKENS
    config["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    return {token["content"]: token["id"] for token in added}
