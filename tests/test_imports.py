"""Cost and effect of an import: no heavy library for a model, and nothing but names."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("ffcv", "deepspeed", "mlflow", "captum", "cv2", "numba", "matplotlib")
# MLflow loads pyfunc.py as a script, a worker of the doctor is one, and __main__ is the command.
SCRIPTS = ("pipeline.tracking.pyfunc", "pipeline.doctor.worker", "pipeline.__main__")

MODEL = f"""
import sys
import pipeline, timm, torch
model = timm.create_model("coda_resnet20").eval()
pipeline.contributions(model, torch.rand(1, 3, 32, 32), torch.tensor([0]))
print([name for name in {HEAVY} if name in sys.modules])
"""

EVERYTHING = """
import atexit, importlib, json, logging, os, pathlib, signal, sys, threading, warnings
# The effects of these libraries are not the pipeline's.
import cv2, matplotlib.figure, numba, requests, scipy, sklearn, timm, torch, torchvision, tqdm, yaml
import torch.utils._python_dispatch

def state():
    loggers = {name: (logger.level, len(logger.handlers), logger.disabled)
               for name, logger in sorted(logging.root.manager.loggerDict.items())
               if isinstance(logger, logging.Logger) and (logger.level or logger.handlers)}
    libraries = ("ffcv", "deepspeed", "mlflow", "captum")
    return {
        "environment": dict(os.environ),
        "threads": [torch.get_num_threads(), threading.active_count()],
        "grad": torch.is_grad_enabled(), "seed": torch.initial_seed(),
        "loggers": loggers, "root": [logging.root.level, len(logging.root.handlers)],
        "at exit": atexit._ncallbacks(),
        "signals": {number: str(signal.getsignal(number)) for number in (1, 2, 10, 12, 15)},
        "warnings": len(warnings.filters),
        "layer": numba.config.THREADING_LAYER,
        "files": sorted(map(str, pathlib.Path.cwd().rglob("*"))),
        "libraries": [name for name in libraries if name in sys.modules],
    }

before = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
after = state()
print(json.dumps([[key, before[key], after[key]] for key in before if before[key] != after[key]]))
"""


def modules():
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name not in SCRIPTS and name != "pipeline.models.dau.fused_kernels":
            yield name


def run(code, folder, *arguments):
    here = folder / "here"
    here.mkdir()
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "TMPDIR": str(here), "HOME": str(here)}
    # Matplotlib makes its folder when it is imported.
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "MPLCONFIGDIR": str(folder / "matplotlib")}
    words = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(words, cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_a_model_and_its_contributions_need_torch_and_timm_alone(tmp_path):
    assert run(MODEL, tmp_path) == "[]"


def test_no_module_acts_when_it_is_imported(tmp_path):
    assert json.loads(run(EVERYTHING, tmp_path, *modules())) == []
