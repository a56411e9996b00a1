"""The interface by which a run reports its results, and the tracker that forgets them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pipeline.tracking.system import SystemMonitor


class Tracker(ABC):
    """Takes what a run reports: metrics, tags, files, data sets, the trained model.

    A context manager, which leaves the run FINISHED, after an exception FAILED, and after
    KeyboardInterrupt or SystemExit KILLED.
    """

    @property
    @abstractmethod
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until MLflow has it."""

    @abstractmethod
    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log values at a step.

        A second value for one (name, step) is dropped, as a resumed run computes the same again.
        NaN and infinity, which MLflow does not keep as such, become the tag ``nonfinite/<name>``.

        Raises:
            ValueError: a name that is not in the table of metric names.
        """

    @abstractmethod
    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags; the last value stays."""

    @abstractmethod
    def artifact(self, path: Path, folder: str = "") -> None:
        """Have a file copied into ``folder`` of the run's artifacts, as it is when its turn comes.

        Args:
            path: of the file.
            folder: below the run's artifacts; by default the artifacts' root.
        """

    @abstractmethod
    def image(self, path: Path, name: str, step: int) -> None:
        """Have a PNG file shown under ``name``: MLflow has a slider over the steps of a name."""

    @abstractmethod
    def dataset(self, context: str, name: str, file: Path, digest: str, **profile: int) -> None:
        """Note that the run read a file.

        Args:
            context: ``training`` or ``validation``.
            name: of the data set.
            file: that was read.
            digest: of its content, at most 36 characters.
            **profile: numbers that describe the data set, such as ``samples=1437``.
        """

    @abstractmethod
    def model(self, export: Path) -> None:
        """Have an export logged as ``model`` and registered under its architecture's name."""

    @abstractmethod
    def sync_to_disk(self) -> None:
        """Return once the journal is on the disk.

        Called before a checkpoint is written, it keeps the journal from lying behind it.
        """

    @abstractmethod
    def flush(self, timeout: float = 60.0) -> bool:
        """``sync_to_disk``, then try once to bring MLflow up to date.

        Args:
            timeout: seconds to wait for MLflow at most.

        Returns:
            Whether MLflow has everything.
        """

    @abstractmethod
    def close(self, status: str = "FINISHED") -> None:
        """End the run as FINISHED, FAILED or KILLED; a second call does nothing.

        Waits for MLflow, longer for a finished run than for the others.
        """

    @abstractmethod
    def history(self) -> dict[tuple[str, int], float]:
        """All metrics of the run since its first start: (name, step) -> value."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close("FINISHED")
        elif issubclass(kind, KeyboardInterrupt | SystemExit):
            self.close("KILLED")
        else:
            self.close("FAILED")


class NullTracker(Tracker):
    """Forgets all that it takes: the tracker of every process but the main one.

    Args:
        monitor: of this process's node, which ``close`` stops.
    """

    def __init__(self, monitor: SystemMonitor | None = None) -> None:
        self._monitor = monitor

    @property
    def run_id(self) -> None:
        """None: MLflow does not know this tracker."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Do nothing."""

    def tags(self, values: Mapping[str, str]) -> None:
        """Do nothing."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Do nothing."""

    def image(self, path: Path, name: str, step: int) -> None:
        """Do nothing."""

    def dataset(self, context: str, name: str, file: Path, digest: str, **profile: int) -> None:
        """Do nothing."""

    def model(self, export: Path) -> None:
        """Do nothing."""

    def sync_to_disk(self) -> None:
        """Do nothing."""

    def flush(self, timeout: float = 60.0) -> bool:
        """True: nothing is missing."""
        return True

    def close(self, status: str = "FINISHED") -> None:
        """Stop the monitor of this node, if there is one."""
        if self._monitor:
            self._monitor.stop()

    def history(self) -> dict[tuple[str, int], float]:
        """An empty dictionary."""
        return {}
