import fnmatch
import json
from pathlib import Path

import httpx2  # the HTTP client of huggingface_hub
import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from common.models import hub
from common.models.hub import resolve_model


def test_a_folder_is_taken_as_it_is(tmp_path):
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_folder_goes_before_a_hub_id_of_the_same_name(tmp_path, monkeypatch):
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/model") == Path("owner/model")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "weights").mkdir()
    assert resolve_model("~/weights") == tmp_path / "weights"


@pytest.mark.parametrize("name", ["/no/such", "./missing", "../missing/too", "~/no/such", "gpt2", "a/b/c"])
def test_what_can_be_neither_folder_nor_hub_id_is_refused_by_name(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # the Hub is not asked
    with pytest.raises(FileNotFoundError) as error:
        resolve_model(name)
    assert str(error.value) == f"{name} is no folder and no Hub id (owner/model); give one of the two"


@pytest.mark.parametrize("name", ["a\nb/c", "a\0b", "x" * 5000, "y" * 300 + "/z", "~nobody-of-that-name/x", 5, "a\\b"])
def test_no_name_breaks_the_line_or_raises_anything_else(name):
    with pytest.raises(FileNotFoundError) as error:
        resolve_model(name)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400


def test_python_in_a_checkpoint_is_not_even_fetched():
    assert not any(fnmatch.fnmatch("modeling_custom.py", pattern) for pattern in hub.FILES)


def test_an_empty_name_is_not_the_current_folder():
    with pytest.raises(FileNotFoundError):
        resolve_model("")


def test_an_id_that_the_hub_cannot_have_is_refused():
    with pytest.raises(FileNotFoundError, match=r"bad name/model is no folder and no valid Hub id"):
        resolve_model("bad name/model")


def test_without_network_and_cache_the_message_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        resolve_model("owner/no-such-model")
    assert "owner/no-such-model is no local folder, is not in the cache" in str(error.value)
    assert "leave the name out for the bundled model, or try again with a network" in str(error.value)


class Hub:
    """snapshot_download in play: `cached` on the first, local call; `online` (a folder or an error) on the second."""

    def __init__(self, cached, online):
        self.answers, self.asked = [cached, online], []

    def __call__(self, name, allow_patterns, local_files_only=False):
        self.asked.append((name, local_files_only))
        answer = self.answers[len(self.asked) - 1]
        if isinstance(answer, Exception):
            raise answer
        return str(answer)


@pytest.fixture
def model_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    return tmp_path


def test_what_is_in_the_cache_is_not_downloaded(model_folder, monkeypatch):
    fake = Hub(model_folder, AssertionError("downloaded"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert resolve_model("owner/model") == model_folder
    assert fake.asked == [("owner/model", True)]


def test_what_is_not_in_the_cache_is_downloaded(model_folder, monkeypatch):
    fake = Hub(LocalEntryNotFoundError("not here"), model_folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert resolve_model("owner/model") == model_folder
    assert fake.asked == [("owner/model", True), ("owner/model", False)]


def test_a_cache_without_weights_is_not_taken_for_the_model(model_folder, tmp_path_factory, monkeypatch):
    """The cache answers with any snapshot folder it has: after AutoConfig, or a broken download, without weights."""
    config_only = tmp_path_factory.mktemp("snapshot")
    (config_only / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(config_only, model_folder))
    assert resolve_model("owner/model") == model_folder


def test_a_cache_that_lacks_a_file_of_the_index_is_not_taken_either(model_folder, tmp_path_factory, monkeypatch):
    broken = tmp_path_factory.mktemp("snapshot")
    (broken / "a.safetensors").write_bytes(b"")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(broken, model_folder))
    assert resolve_model("owner/model") == model_folder
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(broken, OSError("no network")))
    with pytest.raises(
        FileNotFoundError, match=r"is not in the cache as a whole, and the Hub did not give it \(no network"
    ):
        resolve_model("owner/model")


@pytest.mark.parametrize("reason", [OSError("disk full"), OSError(), httpx2.ProxyError("407")], ids=repr)
def test_a_failed_download_is_a_file_not_found_error(reason, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(LocalEntryNotFoundError("not here"), reason))
    with pytest.raises(FileNotFoundError, match="owner/model is no local folder") as error:
        resolve_model("owner/model")
    assert str(reason) in str(error.value)
