"""The load of a node beside its training: MLflow's own measurements, but journal first, as
everything else.

Each watched node has a journal of its own in the run's folder, which the main process brings to
MLflow. The names are those that MLflow's page of system metrics shows:
``system/<node>/cpu_utilization_percentage`` and so on; steps count samples.
"""

import logging
import os
import threading
from pathlib import Path

from pipeline.distributed import node_name
from pipeline.tracking.journal import RunJournal

log = logging.getLogger(__name__)

# between two samples, as in MLflow; MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL overrides both
_SECONDS = 10.0
# a thread that is still importing MLflow is not waited for
_STOP_SECONDS = 2.0


class SystemMonitor:
    """Samples this node in a thread until it is stopped. GPUs are included where nvidia-ml-py or
    pyrsmi is installed.
    """

    def __init__(self, folder: Path) -> None:
        node = os.environ.get("MLFLOW_SYSTEM_METRICS_NODE_ID") or node_name(os.environ)
        self._prefix = f"system/{node}"
        self._seconds = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or _SECONDS)
        self._journal = RunJournal(Path(folder) / f"system-{node}.jsonl")
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="system-monitor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; a second call does nothing."""
        self._stopped.set()
        self._thread.join(_STOP_SECONDS)

    def _sample(self) -> None:
        monitors = _monitors()
        step = 1 + max((step for _, step in self._journal.known["metric"]), default=-1)
        for monitor in monitors:
            # the first sample of the processor's load is always 0
            monitor.collect_metrics()
            monitor.clear_metrics()
        while not self._stopped.wait(self._seconds):
            values: dict[str, float] = {}
            for monitor in monitors:
                monitor.collect_metrics()
                values |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            try:
                self._journal.append(
                    "metric",
                    {f"{self._prefix}/{name}": value for name, value in values.items()},
                    step=step,
                )
            except OSError as error:
                # a full disk is no reason to end a training here
                log.warning("no more system metrics: %s", error)
                break
            step += 1
        self._journal.close()


def _monitors() -> list:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    for of_gpus in (GPUMonitor, ROCMMonitor):
        try:
            monitors.append(of_gpus())
        except (ImportError, RuntimeError):
            # no package for such GPUs, or no driver
            continue
    return monitors
