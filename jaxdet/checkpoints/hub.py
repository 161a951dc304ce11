"""Models by their Hugging Face id, "organisation/name" or "organisation/name@revision"."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from jaxdet.checkpoints.hf import INDEX, maps_names_to_files
from jaxdet.tokenizer import read_json

TEXTS = ("*.json", "*.jinja")
WEIGHTS = "model*.safetensors"


def fetch_from_hub(model_id: str, check_config: Callable[[dict[str, Any]], object] | None = None) -> Path:
    """Folder with the model's files, interrupted files resume.

    Config and tokenizer come first, then the safetensors that the index lists, or model*.safetensors; nothing from
    the repository's folders, which hold the same weights for other programs.

    Args:
        model_id: "organisation/name" or "organisation/name@revision".
        check_config: called with config.json before the weights are fetched; it raises to refuse.

    Raises:
        FileNotFoundError: there is no such model or revision, or access to it must be asked for.
        ValueError: it has no config.json.
        OSError: the hub can't be reached and the model isn't cached.
    """
    name, _, revision = model_id.partition("@")
    folder = _fetch(name, revision or None, TEXTS)
    config = read_json(folder / "config.json")
    if not config:
        raise ValueError(f"{model_id} has no config.json; give a model in the format of transformers")
    if check_config is not None:
        check_config(config)
    index = read_json(folder / INDEX).get("weight_map")
    weights = sorted(set(index.values())) if index and maps_names_to_files(index) else [WEIGHTS]
    return _fetch(name, folder.name, weights)  # the same commit


def _fetch(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The snapshot's folder, which huggingface_hub names after the commit."""
    model_id = name if revision is None else f"{name}@{revision}"
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"])
        )
    except GatedRepoError:
        raise FileNotFoundError(f"{name} is gated; accept its licence on its page and set HF_TOKEN") from None
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        raise FileNotFoundError(
            f"no model {model_id!r} on the hub; check the id, or set HF_TOKEN if it is private"
        ) from None
    except LocalEntryNotFoundError:
        raise OSError(
            f"{name} is not in the cache and the hub can't be reached; check the network or HF_ENDPOINT"
        ) from None
    except Exception as error:  # the HTTP library's own errors are no OSErrors
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OSError(f"fetching {name} failed ({reason}); run again to resume") from None
