"""The bundled model with eyes: what is stored, how it is put together, and that transformers reads the same in it."""

import random

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

from common.tiny_qwen import TINY_QWEN_PATH
from common.tiny_qwen.shapes import EVERY, QUESTIONS, UNSEEN, WHAT, WHAT_ARE_THEY, Question, Shape, draw
from common.tiny_qwen.tiny_vision import NEW_TOKENS, TRAINED, VISION_PATH, prompt_of, tiny_vision
from common.vision.pixels import ImageProcessor


def test_it_adds_less_than_three_megabytes():
    assert sum(path.stat().st_size for path in VISION_PATH.iterdir()) < 3e6


def test_what_is_not_of_the_tower_and_not_attention_is_the_bundled_models():
    bundled, made = load_file(TINY_QWEN_PATH / "model.safetensors"), load_file(tiny_vision() / "model.safetensors")
    trained = load_file(VISION_PATH / TRAINED)
    assert all(name.startswith("visual.") or ".self_attn." in name or ".input_layernorm." in name for name in trained)
    for name in bundled.keys() - trained.keys():
        assert torch.equal(bundled[name], made[name][: len(bundled[name])]), name
    assert len(made["model.embed_tokens.weight"]) == len(bundled["model.embed_tokens.weight"]) + len(NEW_TOKENS)


def test_the_chat_template_makes_the_prompt_of_training():
    tokenizer = AutoTokenizer.from_pretrained(tiny_vision())
    content = [{"type": "image"}, {"type": "image_url"}, {"type": "text", "text": WHAT_ARE_THEY}]
    chat = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == prompt_of(WHAT_ARE_THEY, 2)
    assert len(tokenizer(text)["input_ids"]) == len(tokenizer(prompt_of(WHAT_ARE_THEY, 0))["input_ids"]) + 6


def test_unseen_pairs_leave_every_colour_and_shape_to_be_seen_with_others():
    seen = [one for one in EVERY if one not in UNSEEN]
    assert len(seen) == len(EVERY) - len(UNSEEN) == 36
    assert {one.colour for one in seen} == {one.colour for one in EVERY}
    assert {one.shape for one in seen} == {one.shape for one in EVERY}


def test_answers_are_what_they_say():
    red, orange = Shape("red", "circle"), Shape("orange", "ring")
    said = {question.text: question.answer(*[red, orange][: question.images]) for question in QUESTIONS}
    assert said == {
        "What is it?": "A red circle.", "Which colour is it?": "Red.", "Which shape is it?": "A circle.",
        "这是什么？": "红色的圆形。", "What are they?": "A red circle and an orange ring.",
    }  # fmt: skip


@torch.inference_mode()
def test_transformers_reads_the_checkpoint_and_names_pictures_it_has_not_seen():
    folder, rng, processor = tiny_vision(), random.Random(9), ImageProcessor()
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, right = AutoTokenizer.from_pretrained(folder), 0
    asked = [Shape("green", "circle"), Shape("red", "square"), Shape("orange", "cross"), Shape("blue", "ring")]
    for shape in asked:
        pixels = processor.pixels(draw(shape, 112, 84, rng))
        text = prompt_of(WHAT).replace("<|image_pad|>", "<|image_pad|>" * pixels.key.rows)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        out = model.generate(
            ids, pixel_values=processor.patches(torch.from_numpy(pixels.rgb)),
            image_grid_thw=torch.tensor([[1, 2 * pixels.grid[0], 2 * pixels.grid[1]]]),
            mm_token_type_ids=(ids == model.config.image_token_id).int(), do_sample=False, max_new_tokens=20,
        )  # fmt: skip
        right += tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == Question(WHAT).answer(shape)
    assert right >= 3, f"{right} of {len(asked)}"
