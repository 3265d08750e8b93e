"""Which torch `make setup` takes: decided for machines that are only played here; the commands themselves are not run."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setup(monkeypatch, tmp_path):
    """setup_environment.py, on a machine with nothing but pip, whose .venv is empty."""
    spec = importlib.util.spec_from_file_location("setup_environment", ROOT / "setup_environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VENV", tmp_path)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    monkeypatch.setattr(module, "installed_torch", lambda: None)
    return module


def answers(module, monkeypatch, **by_word):
    """Every command is noted and answered: by the first word of `by_word` in it, (exit code, stdout, stderr); else with 0."""
    noted = []

    def run(command, **options):
        command = list(map(str, command))
        noted.append(command)
        code, out, err = next((answer for word, answer in by_word.items() if word in " ".join(command)), (0, "", ""))
        return subprocess.CompletedProcess(command, code, out, err)

    monkeypatch.setattr(module.subprocess, "run", run)
    return noted


def report(*needs: str) -> tuple[int, str, str]:
    return 0, json.dumps({"install": [{"metadata": {"requires_dist": list(needs)}}]}), ""


CUDA = report("filelock", 'nvidia-cudnn-cu13==9.20.0.48; platform_system == "Linux"')
NO_CUDA = report("filelock", "sympy")


def test_the_pinned_torch_is_that_of_the_requirements(setup):
    assert f"\n{setup.pinned_torch()} " in (ROOT / "requirements.txt").read_text(encoding="utf-8")


def test_what_is_there_stays(setup, monkeypatch):
    monkeypatch.setattr(setup, "installed_torch", lambda: "2.13.0")
    assert setup.choose("torch==2.13.0") == (setup.by_pip, "torch==2.13.0 is in .venv already")


def test_uv_is_used_where_it_is(setup, monkeypatch):
    monkeypatch.setattr(setup.shutil, "which", lambda name: "/bin/uv" if name == "uv" else None)
    assert setup.choose("torch==2.13.0")[0] is setup.by_uv


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_pip_is_enough_elsewhere_than_on_linux(setup, monkeypatch, platform):
    monkeypatch.setattr(setup.sys, "platform", platform)
    installer, why = setup.choose("torch==2.13.0")
    assert installer is setup.by_pip
    assert ("uv" in why) == (platform == "win32")


@pytest.mark.parametrize(
    ("gpu", "needs", "installer"),
    [(True, CUDA, "by_pip"), (False, CUDA, "by_own_uv"), (False, NO_CUDA, "by_pip")],
)
def test_on_linux_cuda_goes_to_those_who_have_a_gpu(setup, monkeypatch, gpu, needs, installer):
    monkeypatch.setattr(setup.sys, "platform", "linux")
    monkeypatch.setattr(setup, "has_nvidia_gpu", lambda: gpu)
    answers(setup, monkeypatch, **{"--dry-run": needs})
    assert setup.choose("torch==2.13.0")[0] is getattr(setup, installer)


def test_a_uv_that_cannot_reach_its_index_is_reported_and_pip_goes_on(setup, monkeypatch, capsys):
    monkeypatch.setattr(setup.sys, "platform", "linux")
    failed = (2, "", "error: Request failed\n  cause: no route\n  cause: more\n")
    noted = answers(setup, monkeypatch, **{"--torch-backend": failed, "--dry-run": CUDA})
    setup.by_uv("torch==2.13.0")
    assert capsys.readouterr().out == (
        "torch: uv could not install it (error: Request failed; cause: no route), so pip takes its default build. "
        "It brings CUDA, gigabytes.\n"
    )
    assert noted[-1][1:4] == ["-m", "pip", "install"]
    assert noted[-1][-2:] == ["-r", str(ROOT / "requirements.txt")]


def test_a_uv_that_can_is_all_there_is(setup, monkeypatch, capsys):
    noted = answers(setup, monkeypatch)
    setup.by_own_uv("torch==2.13.0")
    assert [command[-1] for command in noted] == ["uv", str(ROOT / "requirements.txt")]
    assert "--compile-bytecode" in noted[-1]  # as pip does
    assert capsys.readouterr().out == ""


def test_a_failed_installation_ends_in_one_line_with_its_command(setup, monkeypatch):
    answers(setup, monkeypatch, pip=(1, "", ""))
    with pytest.raises(SystemExit, match=r"^error: .*-m pip install .* failed \(exit code 1\); see above$"):
        setup.by_pip("torch==2.13.0")


def test_the_note_says_seconds_and_megabytes(setup, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(setup, "make_venv", lambda: None)
    monkeypatch.setattr(setup, "DONE", tmp_path / "installed")
    fill = lambda torch: (tmp_path / "package").write_bytes(bytes(3_000_000))  # noqa: E731
    monkeypatch.setattr(setup, "choose", lambda torch: (fill, "because"))
    setup.main()
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "torch: because"
    assert "; 3 MB more on disk, .venv has 3 MB" in out
    assert (tmp_path / "installed").exists()
