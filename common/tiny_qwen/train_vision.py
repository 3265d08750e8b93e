"""Teaches the bundled model to see: trains a vision tower, and the attention of the decoder that looks at its rows.

    python -m common.tiny_qwen.train_vision

First the tower alone, two layers of Qwen2-VL's vision transformer and its merger, from nothing: two matrices, thrown away later,
must be able to read shape and colour off the mean of its rows. Three pictures of four are in any colour, or it would take the
colour for the shape. Then the decoder learns to look at the rows: q, k, v, o and the norms of its layers go on from the bundled
model, MLPs, embedding and head stay as they are, and in every third step the glossary is rehearsed, so that the model can still
recite it. What was trained is written to `vision/`, in bfloat16; `tiny_vision()` puts the checkpoint together.
"""

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is made here

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from common.distributed.launch import run_main
from common.tiny_qwen import TINY_QWEN_PATH
from common.tiny_qwen.corpus import ConversationSampler, load_glossary
from common.tiny_qwen.phrasings import SYSTEM_PROMPT
from common.tiny_qwen.shapes import COLOURS, EVERY, QUESTIONS, SHAPES, UNSEEN, Question, Shape, draw
from common.tiny_qwen.tiny_vision import NEW_TOKENS, TRAINED, VISION_PATH, prompt_of, put_together, write_tokenizer
from common.tiny_qwen.train import batch_loss, batches, learning_rate, make_optimizer, message
from common.vision.pixels import ImageProcessor

SEED = 20
LOOKING_STEPS, LOOKING_LR = 700, 2e-3  # of the tower alone
STEPS = 1500
ROWS = 24  # of a batch of pictures
REHEARSAL = 3  # every so many steps the batch is of the glossary
PEAK_LR = 1e-3
SIDES = (84, 112)
MAX_PIXELS = 224 * 224
VISION = dict(
    depth=2, embed_dim=96, hidden_size=224, num_heads=4, mlp_ratio=4, patch_size=14, spatial_merge_size=2,
    temporal_patch_size=2, in_channels=3,
)  # fmt: skip
MROPE_SECTION = [2, 3, 3]  # of the 8 frequencies of a head, what follows time, height and width


def write_configs(folder: Path, ids: dict[str, int]) -> None:
    """config.json as published ones have it, flat, with the vision tower's beside the decoder's keys."""
    text = json.loads((TINY_QWEN_PATH / "config.json").read_text(encoding="utf-8"))
    config = text | {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "vocab_size": text["vocab_size"] + len(NEW_TOKENS),
        "rope_scaling": {"type": "mrope", "mrope_section": MROPE_SECTION},
        "vision_config": VISION | {"model_type": "qwen2_vl", "hidden_act": "quick_gelu"},
    }
    del config["rope_parameters"]
    for name in NEW_TOKENS:
        config[f"{name.strip('<|>').replace('_pad', '')}_token_id"] = ids[name]
    processor = ImageProcessor()
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor", "min_pixels": processor.min_pixels, "max_pixels": MAX_PIXELS,
        "patch_size": processor.patch, "merge_size": processor.merge, "temporal_patch_size": processor.frames,
        "image_mean": processor.mean, "image_std": processor.std,
    }  # fmt: skip
    for name, content in (("config.json", config), ("preprocessor_config.json", preprocessor)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class Pictures:
    """Endless batches: each of one question's kind of length, and pictures of one size."""

    def __init__(self, tokenizer: Tokenizer, config: Qwen2VLConfig):
        self.tokenizer, self.config, self.processor = tokenizer, config, ImageProcessor()
        self.rng = random.Random(SEED)
        self.seen = [shape for shape in EVERY if shape not in UNSEEN]

    def patches(self, shapes: list[Shape], any_colour: bool = False) -> tuple[torch.Tensor, torch.Tensor, int]:
        """(pixel values, grids, rows of each) of pictures of one size."""
        width, height = self.rng.choice(SIDES), self.rng.choice(SIDES)
        pixels = [self.processor.pixels(draw(shape, width, height, self.rng, any_colour)) for shape in shapes]
        values = torch.cat([self.processor.patches(torch.from_numpy(one.rgb)) for one in pixels])
        h, w = pixels[0].grid
        return values, torch.tensor([[1, 2 * h, 2 * w]] * len(shapes)), h * w

    def inputs(self, question: Question, rows: list[tuple[Shape, ...]]) -> dict:
        """What the model is fed with, prompts only."""
        values, grids, count = self.patches([shape for shapes in rows for shape in shapes])
        text = prompt_of(question.text, question.images).replace("<|image_pad|>", "<|image_pad|>" * count)
        ids = torch.tensor([self.tokenizer.encode(text).ids] * len(rows))
        return {
            "input_ids": ids,
            "pixel_values": values,
            "image_grid_thw": grids,
            "mm_token_type_ids": (ids == self.config.image_token_id).int(),
        }

    def batch(self) -> tuple[dict, torch.Tensor]:
        """(inputs with the answers behind the prompts, targets [B, T] with -100 where nothing is learned)."""
        question = self.rng.choice(QUESTIONS)
        rows = [tuple(self.rng.choices(self.seen, k=question.images)) for _ in range(ROWS // question.images)]
        inputs = self.inputs(question, rows)
        answers = [torch.tensor(self.tokenizer.encode(question.answer(*row) + "<|im_end|>").ids) for row in rows]
        behind = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=-100)
        prompt = inputs["input_ids"]
        inputs["input_ids"] = torch.cat([prompt, behind.clamp(min=0)], dim=1)
        inputs["mm_token_type_ids"] = F.pad(inputs["mm_token_type_ids"], (0, behind.shape[1]))
        return inputs, torch.cat([torch.full_like(prompt, -100), behind], dim=1)


def picture_loss(model: Qwen2VLForConditionalGeneration, inputs: dict, targets: torch.Tensor) -> torch.Tensor:
    hidden = model.model(**inputs).last_hidden_state[:, :-1]
    learned = targets[:, 1:] >= 0
    return F.cross_entropy(model.lm_head(hidden[learned]), targets[:, 1:][learned])


def is_trained(name: str) -> bool:
    return name.startswith("model.visual.") or ".self_attn." in name or ".input_layernorm." in name


def look(model: Qwen2VLForConditionalGeneration, pictures: Pictures, steps: int) -> None:
    """Train the tower alone."""
    tower, width, colours = model.model.visual, model.config.text_config.hidden_size, list(COLOURS)
    probe = torch.nn.Linear(width, len(colours) + len(SHAPES))
    parameters = [*tower.parameters(), *probe.parameters()]
    optimizer = make_optimizer(SimpleNamespace(parameters=lambda: parameters))
    progress = tqdm(range(steps), desc="looking", mininterval=2)
    for step in progress:
        any_colour = step % 4 > 0
        shapes = pictures.rng.choices(pictures.seen, k=ROWS)
        values, grids, count = pictures.patches(shapes, any_colour)
        rows = tower(values, grids).pooler_output.view(len(shapes), count, width)
        colour, shape = probe(rows.mean(1)).split([len(colours), len(SHAPES)], dim=-1)
        loss = F.cross_entropy(shape, torch.tensor([SHAPES.index(one.shape) for one in shapes]))
        if not any_colour:
            loss = loss + F.cross_entropy(colour, torch.tensor([colours.index(one.colour) for one in shapes]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, LOOKING_LR)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


def fit(model: Qwen2VLForConditionalGeneration, tokenizer: Tokenizer, steps: int) -> None:
    for name, param in model.named_parameters():
        param.requires_grad_(is_trained(name))
    optimizer = make_optimizer(SimpleNamespace(parameters=lambda: (p for p in model.parameters() if p.requires_grad)))
    pictures = Pictures(tokenizer, model.config)
    look(model, pictures, LOOKING_STEPS * steps // STEPS)
    glossary = batches(ConversationSampler(load_glossary(), random.Random(SEED)), tokenizer)
    system = torch.tensor([tokenizer.encode(message("system", SYSTEM_PROMPT)).ids])  # [1, S]
    reader = SimpleNamespace(
        config=model.config.text_config, model=model.model.language_model, lm_head=model.lm_head
    )  # of text alone
    progress, last = tqdm(range(steps), desc="training", mininterval=2), {}
    for step in progress:
        if step % REHEARSAL == 0:
            long_prompt, ids, learned = next(glossary)
            loss = batch_loss(reader, system if long_prompt else None, ids, learned)
        else:
            loss = picture_loss(model, *pictures.batch())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, PEAK_LR)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last["text" if step % REHEARSAL == 0 else "pictures"] = f"{loss.item():.3f}"
        if step % 20 == 0:
            progress.set_postfix(last)
    model.eval()


@torch.inference_mode()
def right_answers(model: Qwen2VLForConditionalGeneration, tokenizer: Tokenizer) -> dict[str, tuple[int, int]]:
    """{question, and whether its shapes were trained: (right, asked)}, greedy, with transformers alone."""
    pictures, counts = Pictures(tokenizer, model.config), {}
    pictures.rng = random.Random(SEED + 1)
    for question in QUESTIONS:
        for said, shapes in (("trained", pictures.seen), ("unseen", sorted(UNSEEN))):
            rows = [tuple(Shape(*pictures.rng.choice(shapes)) for _ in range(question.images)) for _ in range(48)]
            right = 0
            for row in rows:
                inputs = pictures.inputs(question, [row])
                output = model.generate(**inputs, do_sample=False, max_new_tokens=40)
                text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :].tolist())
                right += text == question.answer(*row)
            counts[f"{question.text} ({said})"] = right, len(rows)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=VISION_PATH, help="folder of what was trained")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    start = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_configs(args.out, write_tokenizer(folder))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = Qwen2VLConfig.from_pretrained(args.out)
        untrained = Qwen2VLForConditionalGeneration(config).state_dict()
        tower = {name.removeprefix("model."): t for name, t in untrained.items() if "visual" in name}
        put_together(folder, tower, args.out)
        model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        fit(model, tokenizer, args.steps)
        trained = {name: param.to(torch.bfloat16) for name, param in model.named_parameters() if is_trained(name)}
        trained = {name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): param.contiguous()
                   for name, param in trained.items()}  # fmt: skip
        save_file(trained, args.out / TRAINED)
        print(f"training {time.perf_counter() - start:.0f} s, {(args.out / TRAINED).stat().st_size / 1e6:.1f} MB")
        put_together(folder, load_file(args.out / TRAINED), args.out)
        model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        for said, (right, asked) in right_answers(model, tokenizer).items():
            print(f"{said:32s} {right}/{asked}")


if __name__ == "__main__":
    run_main(main)
