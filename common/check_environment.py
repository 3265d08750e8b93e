"""Can this machine run what is here, and how fast at best? The first thing to ask when something does not work.

    python -m common.check_environment

A table: versions, cores, memory, disk, GPUs; what two processes need for an all-reduce over gloo, and two GPUs over NCCL
if there are two; and a ceiling for the speed of two models. To produce one token every weight is read once, so

    tokens/s of one request <= bytes a second that memory gives / bytes of the weights

and on R ranks each reads its R-th, but waits for 1 + 2L all-reduces a token. Both are measured here in a few seconds, offline.
Exit code 1, and a last line that says what to do, if something is missing.
"""

import importlib.metadata
import platform
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "pillow", "psutil", "tqdm")
LITTLE_MEMORY, LITTLE_DISK = 2e9, 1e9  # bytes that the tests and a small model want
SMALL, LARGE = 896, 8 << 20  # bytes of a message: an all-reduce of one token of the bundled model; one of a long prompt
GB = 1e9
NO_BYTECODE = (
    "none kept of torch: each start compiles a thousand files, for seconds; set PYTHONPYCACHEPREFIX to a folder, and leave "
    "PYTHONDONTWRITEBYTECODE unset"
)

Row = tuple[str, str]


def main() -> int:
    """Exit code."""
    problems: list[str] = []
    rows = versions(problems)
    if not problems:  # all that follows needs the packages
        rows += [*machine(problems), *speed(problems)]
    width = max(len(what) for what, _ in rows)
    for what, found in rows:
        print(f"  {what.ljust(width)}  {found}")
    print("\n" + ("\n".join(f"not right: {problem}" for problem in problems) or "everything here can run"))
    return 1 if problems else 0


def versions(problems: list[str]) -> list[Row]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("#")[0].strip().split("==") for line in lines if "==" in line)
    found, missing = [], []
    for name in NEEDED:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        same = version.partition("+")[0] == tested[name]
        found.append(f"{name} {version}" + ("" if same else f" (tested: {tested[name]})"))
    if missing:
        problems.append(
            f"there is no {', '.join(missing)}; run `python setup_environment.py` (or `make setup`), then .venv's python"
        )
    if sys.version_info < (3, 10):  # noqa: UP036, whoever starts this may have any
        problems.append(f"this is Python {platform.python_version()}; 3.10 or later is needed")
    return [
        ("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        ("Python", platform.python_version()),
        *(("" if i else "packages", ", ".join(found[i : i + 3])) for i in range(0, len(found), 3)),
    ]


def machine(problems: list[str]) -> list[Row]:
    import psutil  # noqa: PLC0415, known to be there only now
    import torch  # noqa: PLC0415

    from common.start_times import has_bytecode  # noqa: PLC0415

    memory, disk = psutil.virtual_memory(), shutil.disk_usage(ROOT)
    if memory.available < LITTLE_MEMORY:
        problems.append(
            f"{memory.available / GB:.1f} GB of memory are free, {LITTLE_MEMORY / GB:.0f} wanted; end other programs"
        )
    if disk.free < LITTLE_DISK:
        problems.append(
            f"{disk.free / GB:.1f} GB of disk are free, {LITTLE_DISK / GB:.0f} wanted for a small model; make room"
        )
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        ("cores", f"{physical_cores()}, {psutil.cpu_count()} threads; a rank uses one"),
        ("memory", f"{memory.total / GB:.1f} GB, {memory.available / GB:.1f} free"),
        ("disk", f"{disk.free / GB:.1f} GB free at {ROOT}"),
        ("bytecode", "kept" if has_bytecode(torch.__file__) else NO_BYTECODE),
        (
            "GPUs",
            ", ".join(f"{gpu.name} ({gpu.total_memory / GB:.0f} GB)" for gpu in gpus) or "none: ranks talk over gloo",
        ),
    ]


def physical_cores() -> int:
    import psutil  # noqa: PLC0415

    return psutil.cpu_count(logical=False) or psutil.cpu_count() or 1


def speed(problems: list[str]) -> list[Row]:
    import torch  # noqa: PLC0415

    from common.distributed.cost_model import Link, Sample  # noqa: PLC0415
    from common.distributed.probe import MOST_BYTES, all_reduce_seconds, bytes_per_s  # noqa: PLC0415

    rows = [("memory, one thread", f"{bytes_per_s(MOST_BYTES) / GB:.1f} GB/s read by matrix-vector products")]
    if physical_cores() > 1:
        together = bytes_per_s(MOST_BYTES, threads=physical_cores())
        rows.append((f"memory, {physical_cores()} threads", f"{together / GB:.1f} GB/s"))
    link = None
    for name, device, possible in (
        ("gloo, 2 processes", "cpu", True), ("NCCL, 2 GPUs", "cuda", torch.cuda.device_count() > 1),
    ):  # fmt: skip
        if not possible:
            rows.append((name, "not tried: there are fewer"))
            continue
        try:
            small, large = all_reduce_seconds(device, SMALL, LARGE)
        except (RuntimeError, ValueError, OSError) as error:
            rows.append((name, "does not work"))
            problems.append(f'{name}: {str(error).splitlines()[0]}; see "Without make" in README.md')
            continue
        if device == "cpu" and large > small:
            link = Link.fit([Sample("all_reduce", 2, SMALL, small), Sample("all_reduce", 2, LARGE, large)])
        rows.append(
            (name, f"all-reduce of {SMALL} bytes {small * 1e3:.3f} ms, of {LARGE >> 20} MiB {large * 1e3:.1f} ms")
        )
    for name, size, layers, width in models():
        rows.append((f"{name}, 1 rank", ceiling(size, bytes_per_s(size))))
        if link:
            waits = (1 + 2 * layers) * link.seconds("all_reduce", 4 * width, 2)
            rows.append((f"{name}, 2 ranks", ceiling(size, bytes_per_s(size, threads=min(2, physical_cores())), waits)))
        if torch.cuda.is_available():
            rows.append(
                (f"{name}, 1 GPU", ceiling(size / 2, bytes_per_s(size / 2, torch.device("cuda")), what="bfloat16"))
            )
    return rows


def ceiling(size: float, bytes_per_s: float, waits: float = 0.0, what: str = "float32") -> str:
    """The speed of one request, in words. `waits`: seconds a token that ranks wait for messages."""
    per_token = size / bytes_per_s + waits
    said = (
        f"at most {1 / per_token:,.0f} tokens/s: {size / 1e6:,.1f} MB of {what} a token at {bytes_per_s / GB:.1f} GB/s"
    )
    return said + (f", and {waits * 1e3:.1f} ms of messages" if waits else "")


def models() -> list[tuple[str, int, int, int]]:
    """(name, bytes of the weights in float32, layers, hidden size) of the bundled model and a small published one."""
    import torch  # noqa: PLC0415
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    from common.models.published_configs import published_config  # noqa: PLC0415
    from common.tiny_qwen import TINY_QWEN_PATH  # noqa: PLC0415

    found = []
    configs = {
        "bundled model": AutoConfig.from_pretrained(TINY_QWEN_PATH),
        "Qwen2.5-0.5B": published_config("Qwen2.5-0.5B"),
    }
    for name, config in configs.items():
        with torch.device("meta"):  # shapes without numbers
            model = AutoModelForCausalLM.from_config(config)
        size = 4 * sum(parameter.numel() for parameter in model.parameters())
        found.append((name, size, config.num_hidden_layers, config.hidden_size))
    return found


if __name__ == "__main__":
    sys.exit(main())
