"""The load of the nodes of a run: MLflow's own measurements, but journal first.

Each watched node has a journal of its own in the run's folder, which the main process brings to
MLflow. The names are those that MLflow's page of system metrics shows, such as
``system/<node>/cpu_utilization_percentage``; steps count samples.
"""

import logging
import os
import threading
from collections.abc import Callable
from typing import Protocol

from pipeline.run_folder import RunFolder
from pipeline.slurm import node_name
from pipeline.tracking.journal import RunJournal

log = logging.getLogger(__name__)

# Between two samples, as in MLflow; MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL overrides both.
_SAMPLE_SECONDS = 10.0
# For which ``stop`` waits: the thread may still be importing MLflow.
_STOP_SECONDS = 2.0


class _Monitor(Protocol):
    """The methods of MLflow's monitors, which have no types, as they are used here."""

    def collect_metrics(self) -> None: ...

    def aggregate_metrics(self) -> dict[str, float]: ...

    def clear_metrics(self) -> None: ...


class SystemMonitor:
    """Samples this node in a thread until it is stopped.

    GPUs are included where nvidia-ml-py or pyrsmi is installed.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: RunFolder) -> None:
        node = os.environ.get("MLFLOW_SYSTEM_METRICS_NODE_ID") or node_name(os.environ)
        interval = os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL")
        self._prefix = f"system/{node}"
        self._seconds = float(interval or _SAMPLE_SECONDS)
        self._journal = RunJournal(folder.node_journal(node))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="system-monitor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; a second call does nothing."""
        self._stopped.set()
        self._thread.join(_STOP_SECONDS)

    def _sample(self) -> None:
        """Write a sample now and then; the thread's work."""
        monitors = _monitors()
        step = 1 + max((step for _, step in self._journal.known["metric"]), default=-1)
        for monitor in monitors:
            # The first sample of the processor's load is always 0.
            monitor.collect_metrics()
            monitor.clear_metrics()
        while not self._stopped.wait(self._seconds):
            values: dict[str, float] = {}
            for monitor in monitors:
                monitor.collect_metrics()
                values |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            named = {f"{self._prefix}/{name}": value for name, value in values.items()}
            try:
                self._journal.append("metric", named, step=step)
            except OSError as error:
                # A full disk is no reason to end a training run here.
                log.warning("no more system metrics: %s", error)
                break
            step += 1
        self._journal.close()


def _monitors() -> list[_Monitor]:
    """MLflow's monitors that work on this node."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    always: list[Callable[[], _Monitor]] = [CPUMonitor, DiskMonitor, NetworkMonitor]
    of_gpus: list[Callable[[], _Monitor]] = [GPUMonitor, ROCMMonitor]
    monitors = [make() for make in always]
    for make in of_gpus:
        try:
            monitors.append(make())
        except (ImportError, RuntimeError):
            # There is no package for such GPUs, or no driver.
            continue
    return monitors
