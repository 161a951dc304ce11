"""Checkpoints: Hugging Face folders and ids, GGUF files, Orbax directories."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxdet.checkpoints import demo
from jaxdet.checkpoints.base import Checkpoint, TensorInfo
from jaxdet.checkpoints.gguf import GGUFCheckpoint
from jaxdet.checkpoints.hf import HFCheckpoint
from jaxdet.checkpoints.hub import fetch_from_hub
from jaxdet.checkpoints.orbax import MANIFEST, OrbaxCheckpoint
from jaxdet.checkpoints.save import save_checkpoint

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint", "save_checkpoint"]


def open_checkpoint(
    src: str | Path, *, check_config: Callable[[dict[str, Any]], object] | None = None
) -> Checkpoint:
    """Opens a model and checks its files before anything is loaded.

    Args:
        src: "smollm2-135m", a folder (Hugging Face or Orbax), a .gguf file, or a Hugging Face id.
        check_config: called with config.json before a model's weights are fetched from the hub; it raises to refuse.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: it is damaged, incomplete or not supported; one line, with the remedy.
    """
    if src == demo.NAME:
        return GGUFCheckpoint(demo.fetch_demo_model(), demo.NAME)
    path = Path(src).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(
                f"model {path} is a {path.suffix or 'plain'} file; give a .gguf file or a model's folder"
            )
        return GGUFCheckpoint(path)
    if path.is_dir():
        if (path / MANIFEST).exists():
            return OrbaxCheckpoint(path)
        if (path / "config.json").exists():
            return HFCheckpoint(path)
        raise ValueError(f"model folder {path} has no config.json; give a Hugging Face or Orbax folder")
    local = path.suffix == ".gguf" or (path.parent != Path() and path.parent.is_dir())
    if not local and str(src).count("/") == 1 and not str(src).startswith((".", "/", "~")):
        return HFCheckpoint(fetch_from_hub(str(src), check_config), str(src))
    reason = " (no such file)" if local else ""
    raise FileNotFoundError(
        f"no model {str(src)!r}{reason}; give {demo.NAME}, a folder, a .gguf file or a Hugging Face id"
    )
