"""What config.json says about a vision tower: published and new spellings, defaults of the library, refusals in one line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2VLConfig

from common.models.config import ModelConfig
from common.models.vision import image_processor
from common.models.weights import load_model
from common.parallel_state import TPGroup
from tests.common.vision.checkpoints import SEEING, save_seeing

# as they are published, but for what changes nothing here
PUBLISHED = {
    "Qwen2-VL-2B": {
        "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "vocab_size": 151_936, "hidden_size": 1536,
        "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
        "eos_token_id": 151_645, "vision_start_token_id": 151_652, "vision_end_token_id": 151_653, "vision_token_id": 151_654,
        "image_token_id": 151_655, "video_token_id": 151_656, "hidden_act": "silu", "max_position_embeddings": 32_768,
        "max_window_layers": 28, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32_768,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_sliding_window": False,
        "vision_config": {
            "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "hidden_size": 1536, "patch_size": 14,
            "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    },
    "Qwen2.5-VL-7B": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "vocab_size": 152_064,
        "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "eos_token_id": 151_645, "vision_start_token_id": 151_652, "vision_end_token_id": 151_653,
        "vision_token_id": 151_654, "image_token_id": 151_655, "video_token_id": 151_656, "hidden_act": "silu",
        "max_position_embeddings": 128_000, "max_window_layers": 28, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 32_768, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_sliding_window": False,
        "vision_config": {
            "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "in_chans": 3,
            "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    },
}  # fmt: skip


def changed(name: str, **changes):
    return json.loads(json.dumps(PUBLISHED[name])) | changes


def test_published_configs_are_read():
    two, five = (ModelConfig.from_dict(PUBLISHED[name]) for name in PUBLISHED)
    assert (two.vision.tower.width, two.vision.tower.mlp_width, two.vision.tower.out) == (1280, 5120, 1536)
    assert (two.vision.tower.gated, two.vision.tower.window, two.tie_word_embeddings) == (False, 0, True)
    assert (five.vision.tower.width, five.vision.tower.mlp_width, five.vision.tower.out) == (1280, 3420, 3584)
    assert (five.vision.tower.gated, five.vision.tower.window) == (True, 4)
    assert five.vision.tower.whole == {7, 15, 23, 31}
    for one in (two, five):
        assert (one.vision.image_token_id, one.vision.mrope_section, one.head_dim) == (151_655, (16, 24, 24), 128)
        assert (one.rope_scaling, one.rope_theta, one.qkv_bias) == (None, 1e6, True)


@pytest.mark.parametrize(
    ("name", "config_class"), [("Qwen2-VL-2B", Qwen2VLConfig), ("Qwen2.5-VL-7B", Qwen2_5_VLConfig)]
)
def test_what_transformers_writes_of_a_published_config_says_the_same(name, config_class, tmp_path):
    config = config_class(**changed(name))
    config.architectures = PUBLISHED[name]["architectures"]
    config.save_pretrained(tmp_path)
    assert "text_config" in json.loads((tmp_path / "config.json").read_text())
    mine, theirs = ModelConfig.from_dict(PUBLISHED[name]), ModelConfig.from_folder(tmp_path)
    assert mine == theirs


@pytest.mark.parametrize(
    ("name", "config_class"), [("Qwen2-VL-2B", Qwen2VLConfig), ("Qwen2.5-VL-7B", Qwen2_5_VLConfig)]
)
def test_a_tower_that_leaves_everything_out_is_the_librarys(name, config_class):
    out = 3584 if name == "Qwen2-VL-2B" else config_class().vision_config.out_hidden_size
    mine = ModelConfig.from_dict(
        changed(name, vision_config={}, hidden_size=out, num_attention_heads=out // 128)
    ).vision.tower
    theirs = config_class().vision_config
    assert (mine.depth, mine.heads, mine.patch, mine.merge) == (theirs.depth, theirs.num_heads, theirs.patch_size, 2)
    assert mine.width == (theirs.embed_dim if name == "Qwen2-VL-2B" else theirs.hidden_size)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("Qwen2-VL-2B", {"vision_config": 7}, "vision_config=7 must be an object"),
        ("Qwen2-VL-2B", {"vision_config": {"hidden_size": 1536, "hidden_act": "gelu"}}, "hidden_act='gelu' is not supported"),
        ("Qwen2-VL-2B", {"vision_config": {"hidden_size": 1536, "in_chans": 4}}, "in_chans=4 is not supported"),
        ("Qwen2-VL-2B", {"vision_config": {"hidden_size": 1537}}, "rows of 1537 features, but the decoder's hidden_size is 1536"),
        ("Qwen2-VL-2B", {"vision_config": {"hidden_size": 1536, "num_heads": 7}}, "must be a multiple of 4"),
        ("Qwen2-VL-2B", {"image_token_id": 151_936}, "is no token of the vocabulary"),
        ("Qwen2-VL-2B", {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24]}}, "must be three numbers"),
        ("Qwen2-VL-2B", {"rope_scaling": {"type": "mrope", "mrope_section": [16, 16, 24]}}, "share out the 64 frequencies"),
        ("Qwen2-VL-2B", {"model_type": "qwen2_5_vl"}, "is not that of Qwen2VLForConditionalGeneration"),
        ("Qwen2-VL-2B", {"text_config": 3}, "text_config=3 must be an object"),
        ("Qwen2.5-VL-7B", {"vision_config": {"out_hidden_size": 3584, "hidden_size": 1280, "window_size": 20}}, "window_size=20"),
        ("Qwen2.5-VL-7B", {"vision_config": {"fullatt_block_indexes": "all"}}, "must be a list of numbers of layers"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(name, changes, words):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        ModelConfig.from_dict(changed(name, **changes))
    assert words in str(error.value)


def test_mrope_is_refused_without_a_tower():
    with pytest.raises(ValueError, match="rope_type='mrope' is not supported"):
        ModelConfig.from_dict(changed("Qwen2-VL-2B", architectures=["Qwen2ForCausalLM"], model_type="qwen2"))


@pytest.mark.parametrize("name", SEEING)
def test_both_spellings_of_the_tensors_are_loaded_and_mixed_ones_refused(name, tmp_path):
    folder = save_seeing(name, tmp_path)
    model, _ = load_model(folder, TPGroup())
    old = load_file(folder / "model.safetensors")
    new = {_newer(key): tensor for key, tensor in old.items()}
    assert old.keys() != new.keys()
    save_file(new, folder / "model.safetensors")
    again, _ = load_model(folder, TPGroup())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    save_file(new | {"model.norm.weight": old["model.norm.weight"].clone()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="two names of one tensor"):
        load_model(folder, TPGroup())


def _newer(key: str) -> str:
    if key.startswith("visual."):
        return f"model.{key}"
    return key.replace("model.", "model.language_model.", 1) if key.startswith("model.") else key


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop("visual.merger.ln_q.weight"), "1 missing: visual.merger.ln_q.weight"),
        (
            lambda t: t.update({"visual.blocks.9.norm1.weight": torch.ones(48)}),
            "1 unexpected: visual.blocks.9.norm1.weight",
        ),
        (
            lambda t: t.update({"visual.patch_embed.proj.weight": torch.ones(48, 1176)}),
            "patch_embed.proj.weight is [48, 1176]",
        ),
    ],
)
def test_a_tensor_of_the_tower_that_does_not_fit_is_named(damage, words, tmp_path):
    folder = save_seeing("qwen2_vl", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        load_model(folder, TPGroup())
    assert words in str(error.value)


def test_the_preprocessor_is_read_as_transformers_does(tmp_path):
    tower = ModelConfig.from_dict(PUBLISHED["Qwen2-VL-2B"]).vision.tower

    def read(**said):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
        return image_processor(tmp_path, tower)

    assert (read().min_pixels, read().max_pixels) == (56 * 56, 28 * 28 * 1280)
    assert read(min_pixels=3136, max_pixels=12_845_056).max_pixels == 12_845_056
    size = {"shortest_edge": 100, "longest_edge": 200_000}
    assert (read(size=size).min_pixels, read(size=size).max_pixels) == (100, 200_000)
    assert read(size=size, max_pixels=300_000).max_pixels == 300_000
    for said, words in (
        ({"patch_size": 16}, "patch_size=16, but config.json's vision_config says 14"), ({"do_resize": False}, "do_resize=false"),
        ({"resample": 2}, "resample=2 is not supported"), ({"image_std": [1, 1, 0]}, "must be a list of 3 numbers"),
        ({"min_pixels": 9000, "max_pixels": 3136}, "at least 9000 pixels and at most 3136"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
            read(**said)
        assert words in str(error.value)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="preprocessor_config"):
        image_processor(tmp_path, tower)


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [
        ("qwen2_vl", "depth", "depth"), ("qwen2_vl", "embed_dim", "embed_dim"),
        ("qwen2_vl", "mlp_ratio", r"embed_dim \* mlp_ratio"),
        ("qwen2_5_vl", "hidden_size", "hidden_size"), ("qwen2_5_vl", "intermediate_size", "intermediate_size"),
    ],
)  # fmt: skip
def test_a_tower_that_could_not_be_built_in_time_is_refused_before(kind, name, told, tmp_path):
    folder = save_seeing(kind, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"][name] = 3 << 28
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"^[^\n]*vision_config's {told}=[0-9]+, but the weight files have [^\n]*$"):
        load_model(folder, TPGroup())
