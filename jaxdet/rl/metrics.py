"""A run's metrics, one line of JSON a step, and the same for TensorBoard."""

import json
from collections.abc import Mapping
from pathlib import Path

from jaxdet.files import write_whole


class MetricsLog:
    """Appends to `metrics.jsonl` and to TensorBoard's events in a folder.

    Args:
        folder: made if it isn't there.
        step: the next step to come; what an interrupted run wrote of it and later is dropped.
    """

    def __init__(self, folder: Path, step: int):
        from tensorboardX import SummaryWriter  # a run without a folder needs none

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] < step]
        write_whole(path, "".join(kept))
        self._file = path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def write(self, metrics: Mapping[str, float]) -> None:
        """Takes one step's values, "step" among them."""
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            if name != "step":
                self._board.add_scalar(name, value, int(metrics["step"]))

    def close(self) -> None:
        """Ends both files; nothing can be written afterwards."""
        self._file.close()
        self._board.close()


def _whole_lines(path: Path) -> list[str]:
    """Without one that was cut off."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return lines[:-1] if lines and not lines[-1].endswith("\n") else lines
