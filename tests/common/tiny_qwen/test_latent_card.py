"""What the model card says of the latent model is what its files say."""

import csv
import math

import pytest
from safetensors import safe_open

from common.models.config import ModelConfig
from common.tiny_qwen import LATENT_PATH, TINY_QWEN_PATH

TEXT = (TINY_QWEN_PATH / "README.md").read_text(encoding="utf-8")
CARD = TEXT.split("## Latent attention that speaks")[1].split("## What guesses ahead of it")[0]
FOLDERS = (TINY_QWEN_PATH, LATENT_PATH)


def line_of(name: str) -> list[str]:
    (line,) = [line for line in CARD.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


def parameters(folder) -> int:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118, it is no mapping


def test_sizes_are_those_of_the_files():
    assert line_of("parameters in all") == [f"{parameters(folder):,}" for folder in FOLDERS]
    sizes = [(folder / "model.safetensors").stat().st_size for folder in FOLDERS]
    assert line_of("file") == [f"{size / 1e6:.1f} MB" for size in sizes]
    assert max(sizes) < 6_000_000


def test_what_is_cached_is_what_the_config_says():
    dense, config = map(ModelConfig.from_folder, FOLDERS)
    heads, d, latent = dense.num_kv_heads, dense.head_dim, config.latent
    assert line_of("cached of a token and layer") == [
        f"2 x {heads} x {d} = {2 * heads * d} numbers",
        f"{latent.kv_rank} + {latent.rope_dim} = {latent.row} numbers",
    ]
    assert line_of("the same on each of two ranks") == [f"{heads * d} numbers", f"{latent.row} numbers"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("answers right", ""),
        ("of trained wordings", "trained"),
        ("of unseen wordings", "unseen"),
        ("of follow-ups, trained", "follow-up, trained"),
        ("of follow-ups, unseen", "follow-up, unseen"),
    ],
)
def test_answers_are_those_of_the_evaluations(name, split):
    said = []
    for folder in FOLDERS:
        with (folder / "evaluation.csv").open(encoding="utf-8") as file:
            rows = [r for r in csv.DictReader(file) if r["dtype"] == "float32" and split in ("", r["split"])]
        right, asked = (sum(int(row[key]) for row in rows) for key in ("exact", "asked"))
        said.append(f"{right:,} of {asked:,}, {right / asked:.1%}".replace("%", " %"))
    assert line_of(name) == said
