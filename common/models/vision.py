"""What config.json says about a vision tower, and preprocessor_config.json about pictures -> facts of common/vision/.

Published configs of Qwen2-VL and Qwen2.5-VL are flat: the decoder's keys beside vision_config. transformers 5 writes the decoder's
into an object of their own, text_config. Both are read. What stands twice is settled as transformers 5.23 does:

    tie_word_embeddings outside | in text_config      true if either is
    min_pixels, max_pixels | size                     the first two
    in_channels | in_chans                            the first; anything but 3 is refused in both
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.models.fields import integer, json_object, layer_numbers, number, numbers, one_of, read_fields
from common.models.json_file import json_shown, read_json
from common.vision.pixels import CHANNELS, ImageProcessor
from common.vision.tower import VisionShape

# of Qwen2-VL's and Qwen2.5-VL's published vocabularies
MARKS = {
    "image_token_id": integer(151_655, low=0), "video_token_id": integer(151_656, low=0),
    "vision_start_token_id": integer(151_652, low=0), "vision_end_token_id": integer(151_653, low=0),
}  # fmt: skip
EVERY_TOWER = {
    "depth": integer(32), "num_heads": integer(16), "patch_size": integer(14, high=1 << 10),
    "spatial_merge_size": integer(2, high=1 << 5), "temporal_patch_size": integer(2, high=1 << 5),
    "in_channels": one_of(CHANNELS, default=CHANNELS, older="in_chans"), "rope_parameters": json_object(),
}  # fmt: skip
TOWERS = {
    "qwen2_vl": {
        **EVERY_TOWER, "embed_dim": integer(1280), "hidden_size": integer(3584), "mlp_ratio": integer(4),
        "hidden_act": one_of("quick_gelu", default="quick_gelu"),
    },
    "qwen2_5_vl": {
        **EVERY_TOWER, "hidden_size": integer(3584), "out_hidden_size": integer(3584), "intermediate_size": integer(3420),
        "hidden_act": one_of("silu", default="silu"), "window_size": integer(112),
        "fullatt_block_indexes": layer_numbers((7, 15, 23, 31)),
    },
}  # fmt: skip
ROPE = {"rope_theta": number(10_000.0, above=1), "rope_type": one_of("axial", "default", default="axial")}
MROPE_SECTION = (16, 24, 24)  # the published ones, and transformers' default
PREPROCESSOR = "preprocessor_config.json"
LARGEST = 1 << 28  # pixels: more would not fit into any context
PICTURES = {
    "patch_size": integer(14), "merge_size": integer(2), "temporal_patch_size": integer(2),
    "min_pixels": integer(None, high=LARGEST, null=True), "max_pixels": integer(None, high=LARGEST, null=True),
    "size": json_object(), "image_mean": numbers(ImageProcessor.mean), "image_std": numbers(ImageProcessor.std),
    "resample": one_of(3, None, default=3), "do_resize": one_of(True, None, default=True),
    "do_rescale": one_of(True, None, default=True), "do_normalize": one_of(True, None, default=True),
    "do_convert_rgb": one_of(True, None, default=True), "rescale_factor": one_of(1 / 255, None, default=1 / 255),
}  # fmt: skip
SIZES = {"shortest_edge": integer(56 * 56, high=LARGEST), "longest_edge": integer(28 * 28 * 1280, high=LARGEST)}


@dataclass(frozen=True)
class Vision:
    """The tower, and the tokens that mark where pictures go."""

    tower: VisionShape
    image_token_id: int  # stands where a row of a picture will
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    mrope_section: tuple[int, int, int]  # frequencies of a head that turn with time, line, column


def text_of(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The decoder's keys, wherever they stand."""
    inner = raw.get("text_config")
    if inner is None:
        return raw
    if not isinstance(inner, dict):
        raise ValueError(f"{where}: text_config={json_shown(inner)} must be an object")
    inner = {**inner, "dtype": inner.get("dtype") or raw.get("dtype") or raw.get("torch_dtype")}
    tied = [one.get("tie_word_embeddings", False) for one in (raw, inner)]
    return {**inner, "tie_word_embeddings": next((one for one in tied if one is not False), False)}


def vision_of(
    raw: dict[str, Any], model_type: str, rope: dict[str, Any], head_dim: int, hidden: int, vocab: int, where: str
) -> Vision:
    """rope: the decoder's rope_scaling or rope_parameters, whichever counts; head_dim, hidden: the decoder's d and D."""
    inside = f"{where}: vision_config"
    tower = raw.get("vision_config", {})
    if not isinstance(tower, dict):
        raise ValueError(f"{inside}={json_shown(tower)} must be an object")
    read = read_fields(tower, TOWERS[model_type], inside, "a vision_config")
    marks = read_fields(raw, MARKS, where, "a config")
    for name, token in marks.items():
        if token >= vocab:
            raise ValueError(f"{where}: {name}={json_shown(token)} is no token of the vocabulary of {vocab}")
    theta = read_fields(read["rope_parameters"] or {}, ROPE, f"{inside}: rope_parameters", "a tower's")["rope_theta"]
    shape = _plain_tower(read, theta) if model_type == "qwen2_vl" else _windowed_tower(read, theta, inside)
    if shape.width % shape.heads or shape.head_dim % 4:
        raise ValueError(
            f"{inside}: {shape.width} features over num_heads={json_shown(shape.heads)}: a head's must be a multiple of 4, half of "
            f"which turn with the line and half with the column"
        )
    if shape.out != hidden:
        raise ValueError(f"{inside}: rows of {shape.out} features, but the decoder's hidden_size is {hidden}")
    return Vision(shape, **marks, mrope_section=_sections(rope, head_dim, where))


def _plain_tower(read: dict[str, Any], theta: float) -> VisionShape:
    return VisionShape(
        read["depth"], read["embed_dim"], read["num_heads"], read["embed_dim"] * read["mlp_ratio"], read["hidden_size"],
        read["patch_size"], read["spatial_merge_size"], read["temporal_patch_size"], gated=False, theta=float(theta),
    )  # fmt: skip


def _windowed_tower(read: dict[str, Any], theta: float, where: str) -> VisionShape:
    window = read["window_size"] // read["spatial_merge_size"] // read["patch_size"]
    if window < 1:
        raise ValueError(f"{where}: window_size={json_shown(read['window_size'])} is smaller than one row's patches")
    return VisionShape(
        read["depth"], read["hidden_size"], read["num_heads"], read["intermediate_size"], read["out_hidden_size"],
        read["patch_size"], read["spatial_merge_size"], read["temporal_patch_size"], gated=True, theta=float(theta),
        window=window, whole=frozenset(read["fullatt_block_indexes"] or ()),
    )  # fmt: skip


def _sections(rope: dict[str, Any], head_dim: int, where: str) -> tuple[int, int, int]:
    given = rope.get("mrope_section", list(MROPE_SECTION))
    if not (isinstance(given, list) and len(given) == 3 and all(type(n) is int and n >= 0 for n in given)):
        raise ValueError(f"{where}: mrope_section={json_shown(given)} must be three numbers")
    if sum(given) != head_dim // 2:
        raise ValueError(
            f"{where}: mrope_section={json_shown(given)} must share out the {head_dim // 2} frequencies of a head of {head_dim}"
        )
    return tuple(given)


def image_processor(folder: str | Path, tower: VisionShape) -> ImageProcessor:
    """What preprocessor_config.json says. Raises FileNotFoundError without one, ValueError if it is for another tower."""
    path = Path(folder) / PREPROCESSOR
    read = read_fields(read_json(path), PICTURES, str(path), "a preprocessor config")
    size = read_fields(read["size"] or {}, SIZES, f"{path}: size", "size")
    low, high = read["min_pixels"] or size["shortest_edge"], read["max_pixels"] or size["longest_edge"]
    for name, mine, theirs in (
        ("patch_size", read["patch_size"], tower.patch), ("merge_size", read["merge_size"], tower.merge),
        ("temporal_patch_size", read["temporal_patch_size"], tower.frames),
    ):  # fmt: skip
        if mine != theirs:
            raise ValueError(
                f"{path}: {name}={mine}, but config.json's vision_config says {theirs}; use one checkpoint's files"
            )
    if low > high:
        raise ValueError(f"{path}: at least {low} pixels and at most {high}: no picture has as many")
    return ImageProcessor(
        tower.patch, tower.merge, tower.frames, low, high, tuple(read["image_mean"]), tuple(read["image_std"])
    )
