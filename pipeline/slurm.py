"""A run as a Slurm job: tags and names from Slurm's variables, and reports to the job script.

The job scripts (``slurm/common.sh``) cannot rely on srun's exit code. Each process therefore writes
its events to a file of its own in the folder CODA_REPORTS, and by these files the script decides
whether the job is started again.
"""

import os
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

Event = Literal["resumed", "saved", "stopped", "finished", "mistake", "disk"]
"""The words that ``slurm/common.sh`` and its tests read.

resumed, saved: the run goes on from, or has saved, the optimiser update that is the event's value.
stopped: the run was asked to stop, and does.
finished: the run is complete; the job is done.
mistake: the user's, which another attempt would not mend; the job ends.
disk: a disk is full or failing; the job is started again.
"""

# Tag of a run -> Slurm's variable.
_TAG_VARIABLES = {
    "slurm/job": "SLURM_JOB_ID",
    "slurm/nodes": "SLURM_JOB_NODELIST",
    "slurm/restarts": "SLURM_RESTART_COUNT",
}


def report_event(event: Event, value: int = 0) -> None:
    """Report an event to the job script; do nothing outside of a job.

    Args:
        event: a word that the job script reads.
        value: number of optimiser updates, for the events that have one.
    """
    folder = os.environ.get("CODA_REPORTS")
    if not folder:
        return
    path = Path(folder, f"events-{os.environ.get('SLURM_PROCID', '0')}")
    # A full disk must neither end a training run here nor hide the error that is being reported.
    with suppress(OSError), path.open("a") as file:
        file.write(f"{event} {value}\n")


def job_tags(environment: Mapping[str, str]) -> dict[str, str]:
    """Tags that say in which Slurm job a run is; none outside of a job."""
    if "SLURM_JOB_ID" not in environment:
        return {}
    return {tag: environment.get(name, "0") for tag, name in _TAG_VARIABLES.items()}


def node_name(environment: Mapping[str, str]) -> str:
    """Slurm's name of this machine, else the machine's own."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def first_node(nodes: str) -> str:
    """First name in Slurm's list of nodes.

    >>> first_node("gpu[003-007,12],login")
    'gpu003'
    """
    # Before the bracket, the first number in it, and what follows it up to the next comma.
    match = re.match(r"([^,\[]*)(?:\[([^\],-]*)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in match.groups()) if match else nodes
