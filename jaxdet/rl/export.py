"""Trained weights as a Hugging Face folder, for `LLM`, transformers and whatever else loads one."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx

from jaxdet.checkpoints import Checkpoint, TensorInfo, open_checkpoint, save_checkpoint
from jaxdet.llm import LLM
from jaxdet.models.origins import Origin, origins
from jaxdet.models.registry import family_of
from jaxdet.models.weights import tensor_shape
from jaxdet.tokenizer import Tokenizer


def export(
    dst: str | Path, llm: LLM, like: str | Path, params: nnx.State | None = None, *, progress: bool = True
) -> None:
    """Writes config.json, *.safetensors and the tokenizer's files to the new folder `dst`; a failure leaves nothing.

    An `LLM` that loads the folder has the bits of one that took `params` by `update_weights`. Matrices are written in
    the dtype of `params`, norms and biases in float32, which other programs may round. A norm of Gemma's is float64
    where float32 can't hold it less 1, as its files have it.

    Args:
        dst: must not exist yet.
        llm: whose model it is.
        like: what `llm` was loaded from, for the config and the tokenizer.
        params: the tree of `llm.params`, in any float dtype, such as a trainer's `masters`; `llm.params` by default.
        progress: show a progress bar.

    Raises:
        FileExistsError: `dst` exists.
        ValueError: `like` is another model, `params` has another tree, or no config.json can state the config.
        OSError: `dst` can't be written, or the disk is too small for it.
    """
    checkpoint = _Trained(open_checkpoint(like), llm, llm.params if params is None else params)
    save_checkpoint(dst, checkpoint, format="safetensors", progress=progress)


class _Trained(Checkpoint):
    """Parameters on the device, read as a checkpoint's tensors; config and tokenizer are another checkpoint's."""

    def __init__(self, like: Checkpoint, llm: LLM, params: nnx.State):
        step, family = llm.engine.step_fn, family_of(like.config)
        if family.read_config(like.config) != step.config:
            raise ValueError(
                f"like={like.name!r} is another model than {llm.name!r}; give what that was loaded from"
            )
        values, own = (dict(nnx.to_flat_state(tree)) for tree in (params, llm.params))
        if {path: x.shape for path, x in values.items()} != {path: x.shape for path, x in own.items()}:
            raise ValueError("params must have the tree and shapes of llm.params; give a trainer's masters")
        self.name, self._like, self._step = llm.name, like, step
        self._places: dict[str, tuple[Origin, jax.Array]] = {}
        self.tensors = {}
        dtype = np.dtype(step.dtype)
        for path, parameter in nnx.to_flat_state(origins(family, step.config, step.dtype, step.backend)):
            origin, value = parameter.get_value(), values[path][...]
            if origin.kind == "vector":  # small, and the dtype is known only then
                dtypes = [x.dtype for x in origin.tensors(value, step.config, step.backend).values()]
            else:
                dtype = np.dtype(value.dtype)
                dtypes = [dtype] * len(origin.names)
            for name, kind in zip(origin.names, dtypes, strict=True):
                self._places[name] = origin, value
                self.tensors[name] = TensorInfo(tensor_shape(name, step.config), kind)
        self.config = _text_only(like.config) | {"dtype": dtype.name, "torch_dtype": dtype.name}

    def _read(self, name: str) -> np.ndarray:
        origin, value = self._places[name]
        return origin.tensors(value, self._step.config, self._step.backend)[name]

    def tokenizer(self) -> Tokenizer:
        return self._like.tokenizer()


def _text_only(config: dict) -> dict:
    """Gemma 3's config without its vision tower, which is neither run nor trained; any other as it is."""
    if config["model_type"] != "gemma3":
        return config
    ids = {key: value for key, value in config.items() if key.endswith("token_id")}
    names = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    return ids | (config.get("text_config") or config) | names
