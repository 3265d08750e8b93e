"""A model name -> a local folder."""

from pathlib import Path

from common.models.checkpoint import checkpoint_files
from common.models.json_file import name_shown

FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]  # data alone: a checkpoint's Python is never fetched


def resolve_model(name: str | Path) -> Path:
    """A folder in Hugging Face layout, or a Hub id such as Qwen/Qwen2.5-0.5B-Instruct.

    A Hub id is taken from the local cache if all of it is there and downloaded otherwise; ranks on one machine
    may all call this, the hub's own file locks let one of them download.
    Raises FileNotFoundError if it is neither a folder nor to be had.
    """
    text = str(name)
    if text and _is_folder(text):
        return Path(text).expanduser()
    if not text.isprintable() or text.startswith(("/", ".", "~")) or text.count("/") != 1:
        raise FileNotFoundError(
            f"{name_shown(text) if text else 'an empty name'} is no folder and no Hub id (owner/model); give one of the two"
        )
    return _from_hub(text)


def _from_hub(text: str) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415, half a second that a folder need not wait
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        cached = Path(snapshot_download(text, allow_patterns=FILES, local_files_only=True))
        checkpoint_files(cached)
        return cached
    except HFValidationError as error:
        raise FileNotFoundError(f"{name_shown(text)} is no folder and no valid Hub id: {_reason(error)}") from None
    except LocalEntryNotFoundError:
        lack = "is not in the cache"
    except (FileNotFoundError, ValueError):  # the config alone, or a download that broke off
        lack = "is not in the cache as a whole"
    try:
        return Path(snapshot_download(text, allow_patterns=FILES))
    except Exception as error:  # the HTTP client has a family of errors of its own
        raise FileNotFoundError(
            f"{name_shown(text)} is no local folder, {lack}, and the Hub did not give it ({_reason(error)}); "
            f"give a local folder, leave the name out for the bundled model, or try again with a network"
        ) from None


def _is_folder(text: str) -> bool:
    try:
        return Path(text).expanduser().is_dir()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL in it, the home of nobody
        return False


def _reason(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:200]
