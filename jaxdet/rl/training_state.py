"""Orbax checkpoints of a run: master weights, optimizer state and the settings that its bits depend on."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

KEPT = 2
"""Checkpoints on disk; the one before the last survives whatever happens while the last is written."""


class TrainingState:
    """Saves and restores trees of arrays to the same bits.

    Args:
        folder: made if it isn't there.
        settings: what must be the same when a run is resumed.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=False)
        handlers = {"arrays": ocp.StandardCheckpointHandler(), "settings": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers)
        self._settings = settings

    @property
    def last_step(self) -> int | None:
        """Finished steps of the last whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, tree: Any) -> None:
        """Writes a checkpoint after `step` finished steps; it counts once it is whole."""
        items = ocp.args.Composite(
            arrays=ocp.args.StandardSave(jax.tree.leaves(tree)),  # type: ignore[call-arg]
            settings=ocp.args.JsonSave(self._settings),  # type: ignore[call-arg]
        )
        self._manager.save(step, args=items)

    def restore(self, like: Any) -> Any:
        """The last checkpoint's arrays, on the devices of `like`; there must be a checkpoint.

        Raises:
            ValueError: it was made with other settings, or has other arrays than `like`.
        """
        leaves, tree = jax.tree.flatten(like)
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves]
        step: Any = self._manager.latest_step()
        found = self._manager.restore(step, args=ocp.args.Composite(settings=ocp.args.JsonRestore()))[
            "settings"
        ]  # type: ignore[call-arg]
        for name, value in self._settings.items():
            if found.get(name) != value:
                raise ValueError(
                    f"{name}={value!r}, but the run in {self._manager.directory} has {found.get(name)!r}; "
                    "use that, or another directory"
                )
        saved = [(x.shape, x.dtype) for x in self._manager.item_metadata(step)["arrays"].tree]
        if saved != [(x.shape, x.dtype) for x in shapes]:
            raise ValueError(
                f"the run in {self._manager.directory} has another model or another kind of optimizer; "
                "use those, or another directory"
            )
        items = ocp.args.Composite(arrays=ocp.args.StandardRestore(shapes))  # type: ignore[call-arg]
        return jax.tree.unflatten(tree, self._manager.restore(step, args=items)["arrays"])

    def close(self) -> None:
        """Lets go of the folder."""
        self._manager.close()
