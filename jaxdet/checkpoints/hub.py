"""Models by their Hugging Face id, "organisation/name" or "organisation/name@revision"."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

WANTED = ("*.safetensors", "*.json", "*.jinja")


def fetch_from_hub(model_id: str) -> Path:
    """Folder with the model's files; only config, tokenizer and safetensors are fetched, interrupted files resume.

    Raises:
        FileNotFoundError: there is no such model or revision, or access to it must be asked for.
        OSError: the hub can't be reached and the model isn't cached.
    """
    name, _, revision = model_id.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(WANTED)))
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
