"""Fill .venv with requirements.txt: what `make setup` does, on Linux, macOS and Windows.

    python setup_environment.py             # any Python from 3.10 on; nothing else is needed

Which torch? On Linux pip's default build carries CUDA libraries, several gigabytes, with or without a GPU. So:

    what is there                          who installs                 which torch
    uv                                     uv --torch-backend=auto      for the GPU and driver that uv finds, else for CPUs
    no uv, an NVIDIA GPU, or not Linux     pip                          the default build
    no uv, Linux without an NVIDIA GPU     pip, if its build has no     a build for CPUs
                                           CUDA; else uv, which pip
                                           puts into .venv (20 MB)

If uv cannot reach PyTorch's own index, pip does it after all, and says so. Afterwards: `python -m common.check_environment`.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
REQUIREMENTS = ROOT / "requirements.txt"
DONE = VENV / "installed"  # the Makefile looks whether this is newer than requirements.txt


def main() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036, whoever starts this may have any
        sys.exit(f"error: this is Python {sys.version.split()[0]}; 3.10 or later is needed")
    began, before = time.monotonic(), size_of(VENV)
    make_venv()
    torch = pinned_torch()
    installer, why = choose(torch)
    print(f"torch: {why}", flush=True)
    installer(torch)
    DONE.touch()
    megabytes = (size_of(VENV) - before) / 1e6
    print(f"torch: {installed_torch() or 'missing'} is installed")
    print(
        f"set up in {time.monotonic() - began:.0f} s; {megabytes:,.0f} MB more on disk, .venv has {size_of(VENV) / 1e6:,.0f} MB"
    )


# --- who installs, and which torch


def choose(torch: str) -> tuple[Callable[[str], None], str]:
    """(what installs, which torch it takes and why)."""
    if installed_torch() == torch.partition("==")[2]:
        return by_pip, f"{torch} is in .venv already"
    if shutil.which("uv"):
        return by_uv, "uv is there, and takes the build that fits this machine's GPU and driver (--torch-backend=auto)"
    if sys.platform != "linux":
        windows = " for CPUs; uv, if it were there, would take one for a GPU" if sys.platform == "win32" else ""
        return by_pip, f"pip's default build for {sys.platform} has no gigabytes of CUDA{windows}"
    if has_nvidia_gpu():
        return by_pip, "there is an NVIDIA GPU, and pip's default build for Linux is for CUDA"
    if not is_wasteful(torch):
        return by_pip, "there is no NVIDIA GPU, and the build that pip takes here has no CUDA"
    return by_own_uv, "there is no NVIDIA GPU, but pip's build brings CUDA, gigabytes; uv takes one for CPUs"


def by_pip(torch: str) -> None:
    run(in_venv("python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", REQUIREMENTS)


def by_uv(torch: str, uv: str | Path = "uv") -> None:
    command = [  # pip compiles what it installs; without, the first start does, and each one where it may not write
        uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", in_venv("python"), "--torch-backend=auto", "-r",
        REQUIREMENTS,
    ]  # fmt: skip
    env = {"UV_HTTP_RETRIES": "1"} | os.environ  # an index that cannot be reached should not cost minutes
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = "; ".join([line.strip() for line in done.stderr.splitlines() if line.strip()][:2])
        much = " It brings CUDA, gigabytes." if is_wasteful(torch) else ""
        print(f"torch: uv could not install it ({said}), so pip takes its default build.{much}", flush=True)
        by_pip(torch)


def by_own_uv(torch: str) -> None:
    run(in_venv("python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv")
    by_uv(torch, in_venv("uv"))


def is_wasteful(torch: str) -> bool:
    """Would pip bring CUDA to a machine that cannot use it? pip says what a package needs without fetching it."""
    if sys.platform != "linux" or has_nvidia_gpu():
        return False
    command = [
        in_venv("python"), "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet",
        "--disable-pip-version-check", "--report", "-", torch,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return False  # then the real installation will say why
    needs = json.loads(done.stdout)["install"][0]["metadata"].get("requires_dist", [])
    return any(need.startswith(("nvidia-", "cuda-")) for need in needs)


def has_nvidia_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return bool(tool) and subprocess.run([tool, "-L"], capture_output=True, check=False).returncode == 0


def pinned_torch() -> str:
    """ "torch==2.13.0", from requirements.txt."""
    for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines():
        if line.startswith("torch=="):
            return line.split("#")[0].strip()
    sys.exit(f"error: no line of {REQUIREMENTS} begins with torch==")


# --- .venv


def make_venv() -> None:
    if in_venv("python").exists():
        return
    try:
        venv.create(VENV, with_pip=True)
    except (subprocess.CalledProcessError, ImportError):  # Debian keeps ensurepip in a package of its own
        if not shutil.which("uv"):
            sys.exit(
                "error: this Python cannot make a virtual environment; on Debian or Ubuntu: apt install python3-venv"
            )
        run("uv", "venv", "--quiet", "--seed", "--clear", "--python", sys.executable, VENV)


def in_venv(program: str) -> Path:
    if sys.platform == "win32":
        return VENV / "Scripts" / f"{program}.exe"
    return VENV / "bin" / program


def installed_torch() -> str | None:
    """Its version without the part behind the plus (2.13.0+cpu is 2.13.0), None if there is none."""
    ask = "from importlib.metadata import version; print(version('torch').partition('+')[0])"
    done = subprocess.run([str(in_venv("python")), "-c", ask], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def size_of(folder: Path) -> int:
    """Bytes in its files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


def run(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), cwd=ROOT, check=False)
    if done.returncode != 0:
        sys.exit(f"error: {' '.join(map(str, command))} failed (exit code {done.returncode}); see above")


if __name__ == "__main__":
    main()
