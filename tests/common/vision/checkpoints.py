"""Small checkpoints that see, with random weights, and transformers' answers about pictures."""

import random
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from common.vision.pixels import ImageProcessor, Pixels

# heads of 16, of whose 8 frequencies 2, 3 and 3 turn with time, line and column; 7 query and 1 KV head
TEXT = dict(
    vocab_size=1009, hidden_size=112, intermediate_size=151, num_hidden_layers=3, num_attention_heads=7, num_key_value_heads=1,
    max_position_embeddings=1024, bos_token_id=None, eos_token_id=None, initializer_range=0.2, rms_norm_eps=1e-6,
    rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]},
)  # fmt: skip
MARKS = dict(vision_start_token_id=1001, vision_end_token_id=1002, image_token_id=1003, video_token_id=1004)
IMAGE, START, END = MARKS["image_token_id"], MARKS["vision_start_token_id"], MARKS["vision_end_token_id"]
SEEING = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration, dict(
        depth=2, embed_dim=48, hidden_size=112, num_heads=3, mlp_ratio=3, initializer_range=0.2,
    )),
    # windows of 3 x 3 blocks; the middle layer sees all
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, dict(
        depth=3, hidden_size=48, out_hidden_size=112, num_heads=3, intermediate_size=70, window_size=84,
        fullatt_block_indexes=[1], initializer_range=0.2,
    )),
}  # fmt: skip
PREPROCESSOR = """{"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 200704, "patch_size": 14,
"merge_size": 2, "temporal_patch_size": 2, "image_mean": [0.48145466, 0.4578275, 0.40821073],
"image_std": [0.26862954, 0.26130258, 0.27577711]}"""
PROCESSOR = ImageProcessor(max_pixels=200_704)


def save_seeing(name: str, folder: Path, tied: bool = False) -> Path:
    config_class, model_class, vision = SEEING[name]
    torch.manual_seed(0)
    config = config_class(text_config=TEXT, vision_config=vision, **MARKS, tie_word_embeddings=tied)
    model = model_class(config).float()
    for key, param in model.named_parameters():
        if key.endswith("bias") or "norm" in key or "ln_q" in key:
            param.data += 0.1 * torch.randn_like(param)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(PREPROCESSOR)
    return folder


@cache
def reference(folder: Path) -> torch.nn.Module:
    model_class = next(
        cls for _, cls, _ in SEEING.values() if f'"{cls.__name__}"' in (folder / "config.json").read_text()
    )
    return model_class.from_pretrained(folder, dtype=torch.float32).eval()


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Noise in large spots: no two are alike, and it is not grey after resizing."""
    spots = np.random.default_rng(seed).integers(0, 256, size=(5, 5, 3), dtype=np.uint8)
    return Image.fromarray(spots).resize((width, height), Image.Resampling.BICUBIC)


def patches_of(pixels: list[Pixels]) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' pixel_values and image_grid_thw."""
    values = torch.cat([PROCESSOR.patches(torch.from_numpy(one.rgb)) for one in pixels])
    return values, torch.tensor([[1, 2 * one.grid[0], 2 * one.grid[1]] for one in pixels])


def greedy_about(folder: Path, prompt: list[int], images: list[Image.Image], n: int) -> list[int]:
    """transformers' greedy continuation; prompt: one placeholder a picture."""
    pixels = [PROCESSOR.pixels(image) for image in images]
    ids = expanded(prompt, [one.key.rows for one in pixels])
    return _greedy(folder, tuple(ids), tuple((one.key, one) for one in pixels), n)


_ANSWERS: dict = {}


def _greedy(folder, ids, keyed, n):
    name = folder, ids, tuple(key for key, _ in keyed), n
    if name not in _ANSWERS:
        more = {}
        if keyed:
            values, grids = patches_of([one for _, one in keyed])
            more = {
                "pixel_values": values,
                "image_grid_thw": grids,
                "mm_token_type_ids": (torch.tensor([ids]) == IMAGE).int(),
            }
        prompt = torch.tensor([ids])
        out = reference(folder).generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=n,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
            **more,
        )
        _ANSWERS[name] = out[0, len(ids) :].tolist()
    return _ANSWERS[name]


def expanded(prompt: list[int], rows: list[int]) -> list[int]:
    counts = iter(rows)
    return [token for one in prompt for token in ([one] * next(counts) if one == IMAGE else [one])]


def some_tokens(n: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(n)]
