"""The process that tries packages: it imports torch once and then divides itself for each check.

``remote`` runs it as a file, as importing ``pipeline`` may be what fails.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial


def main() -> None:
    """Do the task that is read from stdin."""
    task = json.load(sys.stdin)
    sys.path[:] = task["path"]
    pipe: int = task["pipe"]
    os.set_inheritable(pipe, False)
    # More threads would only be in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    base = {"torch": torch, "torchvision": torchvision, "timm": timm}
    for name, probe in base.items():
        if name not in task["names"] or not tell(pipe, name, probe):
            return

    from pathlib import Path

    from pipeline.doctor import mlflow_probes, probes
    from pipeline.doctor.parts import LANES

    folder = Path(task["folder"])
    known: dict[str, Callable[[], str]] = {
        "process group": probes.process_group_of_two,
        "gpu": probes.gpu,
        "nccl": probes.nccl,
        "deepspeed": probes.deepspeed,
        "kernels": probes.kernels,
        "ffcv": probes.ffcv,
        "mlflow": partial(mlflow_probes.mlflow, folder),
    }
    lanes = [[(name, known[name]) for name in lane if name in task["names"]] for lane in LANES]
    if "mlflow" in task["names"]:
        addresses = task["tracking"].items()
        lanes[-1] += [(name, partial(mlflow_probes.tracking, name, uri)) for name, uri in addresses]
    children = [divide(partial(in_turn, pipe, lane, task["seconds"] / 2)) for lane in lanes]
    for child in children:
        os.waitpid(child, 0)


def in_turn(pipe: int, lane: Sequence[tuple[str, Callable[[], str]]], seconds: float) -> None:
    """Do each check in a process of its own, one after another.

    All but the last may take ``seconds``: one that hangs leaves time for the others.
    """
    from pipeline.doctor.parts import State
    from pipeline.doctor.remote import died

    for name, probe in lane:

        def check(name: str = name, probe: Callable[[], str] = probe) -> None:
            signal.setitimer(signal.ITIMER_REAL, 0 if name == lane[-1][0] else seconds)
            tell(pipe, name, probe)

        _, status = os.waitpid(divide(check), 0)
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGALRM:
            send(pipe, name, State.UNKNOWN.value, f"no answer within {seconds:g} s")
        elif code:
            send(pipe, name, State.FAILED.value, died(code))


def divide(run: Callable[[], None]) -> int:
    """Fork; the child does ``run`` and ends. Returns the child's id."""
    if child := os.fork():
        return child
    try:
        run()
        os._exit(0)
    finally:
        os._exit(1)


def tell(pipe: int, name: str, probe: Callable[[], str]) -> bool:
    """Send what ``probe`` finds; return whether all was well."""
    try:
        answer = ("ok", probe())
    except Exception as error:
        kind = "" if type(error).__name__ == "UserError" else f"{type(error).__name__}: "
        answer = ("FAILED", kind + " ".join(str(error).split()))
    send(pipe, name, *answer)
    return answer[0] == "ok"


def send(pipe: int, name: str, state: str, detail: str) -> None:
    """Write one line, short enough for the kernel to keep those of several processes apart."""
    os.write(pipe, json.dumps([name, state, detail[:400]]).encode() + b"\n")


def torch() -> str:
    """Its version, and a product."""
    import torch

    if torch.ones(2, 2).mm(torch.ones(2, 2)).sum().item() != 8:
        raise RuntimeError("a product of two small matrices came out wrong")
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else ""
    return f"{torch.__version__}, built for {cuda or torch.version.hip or 'the processor'}"


def torchvision() -> str:
    """Its version, and an operator of its compiled part, which fits one version of torch only."""
    import torch
    import torchvision

    boxes, scores = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1]]), torch.tensor([0.5, 1.0])
    if torchvision.ops.nms(boxes, scores, 0.5).tolist() != [1]:
        raise RuntimeError("of two equal boxes it does not keep the better one")
    return f"{torchvision.__version__}, matches torch"


def timm() -> str:
    """Its version, with the models of this package."""
    import timm

    import pipeline

    pipeline.register_models()
    return f"{timm.__version__}, with {len(timm.list_models('coda_*'))} CoDA models"


if __name__ == "__main__":
    main()
