"""A model name -> a local folder."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


def resolve_model(name: str | Path) -> Path:
    """A folder in Hugging Face layout, or a Hub id such as Qwen/Qwen2.5-0.5B-Instruct.

    A Hub id is taken from the local cache if it is there and downloaded otherwise; ranks on one machine
    may all call this, the hub's own file locks let one of them download.
    Raises FileNotFoundError if it is neither a folder nor to be had.
    """
    text = str(name)
    folder = Path(name).expanduser()
    if text and folder.is_dir():
        return folder
    if text.startswith(("/", ".", "~")) or text.count("/") != 1:
        raise FileNotFoundError(
            f"{text or 'an empty name'} is no folder and no Hub id (owner/model); give one of the two"
        )
    try:
        cached = Path(snapshot_download(text, allow_patterns=FILES, local_files_only=True))
        if any(cached.glob("*.safetensors")):  # a cache may hold the config alone
            return cached
    except LocalEntryNotFoundError:
        pass
    except HFValidationError as error:
        raise FileNotFoundError(f"{text} is no folder and no valid Hub id: {error}") from None
    try:
        return Path(snapshot_download(text, allow_patterns=FILES))
    except Exception as error:  # the HTTP client has a family of errors of its own
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise FileNotFoundError(
            f"{text} is no local folder, is not in the cache, and the Hub did not give it ({reason}); "
            f"give a local folder or try again with a network"
        ) from None
