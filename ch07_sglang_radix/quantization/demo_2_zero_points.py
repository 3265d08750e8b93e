"""Zero points, and the famous + 1: what they are for, how GPTQ's files hold them, and what a model says if they are misread.

    python ch07_sglang_radix/quantization/demo_2_zero_points.py

Numbers that lie on one side of zero waste half of a symmetric grid; a zero point moves the grid. GPTQ's first files hold zero - 1,
in words of eight. Read without the 1, each number of a group is off by one step, and the bundled model shows what that does.
"""

import json
import tempfile
import warnings
from pathlib import Path

import torch

from ch07_sglang_radix import Engine
from common.distributed.launch import run_main
from common.quantization.gptq import codes, encode
from common.quantization.make import config_of, make
from common.quantization.rounding import round_to_nearest
from common.quantization.scheme import Scheme
from common.teaching.show import check, heading, matrix, mistake, table
from common.tiny_qwen import TINY_QWEN_PATH

ROW = torch.tensor([[-0.5, 0.0, 0.4, 1.0, 1.6, 2.0, 2.5, 2.5]])
ZEROS = Scheme("gptq", 4, "int", "group", 8, symmetric=False)
SYMMETRIC = Scheme("gptq", 4, "int", "group", 8)
QUESTION = "What is a radix cache?"
NEW = 24  # tokens


def main() -> None:
    one_side()
    in_a_word()
    what_no_file_can_say()
    a_model_misread()


def one_side() -> None:
    heading("Numbers on one side of zero: the grid is moved")
    matrix("w", ROW.numpy())
    rows = []
    for name, scheme in (("symmetric", SYMMETRIC), ("with a zero point", ZEROS)):
        made = round_to_nearest(ROW, scheme)
        zero = 0 if made.zero is None else int(made.zero[0, 0])
        low, high = (-8, 7) if made.zero is None else (0, 15)
        grid = f"{(low - zero) * float(made.scale[0, 0]):.2f} .. {(high - zero) * float(made.scale[0, 0]):.2f}"
        off = float((made.dequantise() - ROW).abs().mean())
        rows.append((name, f"{float(made.scale[0, 0]):.3f}", zero, grid, numbers(made.q), f"{off:.3f}"))
    table(("", "scale", "zero", "16 codes reach", "codes", "mean error"), rows)
    zeros = round_to_nearest(ROW, ZEROS)
    check("0.0 has a code of its own, and comes back as 0.0", float(zeros.dequantise()[0, 1]) == 0.0)
    check(
        "half of the symmetric grid lies where no number is, and its steps are wider",
        float(rows[0][-1]) > float(rows[1][-1]),
    )


def in_a_word() -> None:
    heading("In GPTQ's word: eight outputs' zero points, each one too small")
    weights = torch.stack(
        [ROW[0] + 0.3 * k for k in range(8)]
    )  # [8 outputs, 8 inputs], ever further from zero on one side
    made = round_to_nearest(weights, ZEROS)
    made = made._replace(zero=torch.tensor([[3.0], [2.0], [1.0], [16.0], [5.0], [8.0], [8.0], [1.0]]))
    parts = encode(ZEROS, made)
    word = int(parts[".qzeros"][0, 0]) & 0xFFFFFFFF
    print(
        f"  zero points {numbers(made.zero)}; stored {' '.join(str(word >> 4 * k & 15) for k in range(8))}; the word 0x{word:08X}"
    )
    read = codes(ZEROS, parts, (8, 8), slice(0, 8), slice(0, 8)).zero
    check("1 is added to each after it is cut out", torch.equal(read, made.zero))
    mistake("1 forgotten", wrong=[word >> 4 * k & 15 for k in range(8)], right=read)
    added = word + 0x11111111
    mistake(
        "1 added to all eight in the word: 15 + 1 runs over into the next one",
        wrong=[added >> 4 * k & 15 for k in range(8)],
        right=read,
    )


def what_no_file_can_say() -> None:
    heading("What the first format cannot say")
    positive = round_to_nearest(ROW.abs() + 0.1, ZEROS)
    v2 = round_to_nearest(ROW.abs() + 0.1, Scheme("gptq", 4, "int", "group", 8, symmetric=False, format="gptq_v2"))
    table(
        ("", "zero", "codes"),
        [("gptq", int(positive.zero[0, 0]), numbers(positive.q)), ("gptq_v2", int(v2.zero[0, 0]), numbers(v2.q))],
    )
    try:
        encode(ZEROS, positive._replace(zero=torch.zeros(1, 1)))
        raise SystemExit("check failed: a zero point of 0 was stored as -1")
    except ValueError as error:
        print(f"  refused: {error}")


@torch.inference_mode()
def a_model_misread() -> None:
    heading("The bundled model with GPTQ's zeros, read as they were written, and as the other version has them")
    said = config_of("gptq", group_size=32, zero_points=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        print(f"  {make(TINY_QWEN_PATH, folder, said)}")
        texts = {"gptq": answer(folder)}
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["quantization_config"]["checkpoint_format"] = "gptq_v2"
        path.write_text(json.dumps(config), encoding="utf-8")
        texts["gptq_v2"] = answer(folder)
    plain = answer(TINY_QWEN_PATH)
    print(f"  {QUESTION}")
    mistake(
        "checkpoint_format says gptq_v2, and the zeros were stored as zero - 1",
        wrong=texts["gptq_v2"],
        right=texts["gptq"],
    )
    check("4 bits, read right, give the words of full precision", texts["gptq"] == plain)


def answer(folder: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is dequantised, which is what is meant
        with Engine(model_path=str(folder), tp_size=1, device="cpu", dtype="float32") as engine:
            ids = engine.wrapper.tokenizer.encode_chat([{"role": "user", "content": QUESTION}])
            return engine.generate(input_ids=ids, sampling_params={"max_new_tokens": NEW, "temperature": 0.0})["text"]


def numbers(x: torch.Tensor) -> str:
    return " ".join(f"{value:g}" for value in x.flatten().tolist())


if __name__ == "__main__":
    run_main(main)
