"""Results that are computed once: one file for each metric and method.

A result is found again by all that decides its numbers: the weights and the architecture, the
evaluated images, and the settings of the metric. The training epoch is not part of this, so two
runs with the same name, or one run that is trained further, never share a result.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.data.prepared import PreparedData
from pipeline.evaluation.metric import Result
from pipeline.files import sha256_of, write_atomically

VERSION = 1
"""Version of the metrics' definitions; a new one makes stored results invalid."""


def identify(export: Path, prepared: PreparedData) -> dict[str, str]:
    """SHA-256 of the exported weights, of the model's description, and of the evaluated images."""
    return {
        "weights": sha256_of(export / "model.safetensors"),
        "model": _sha256_of_description(export),
        "data": prepared.sha256("val"),
    }


class ResultCache:
    """The results in ``folder`` that belong to ``identity``."""

    def __init__(self, folder: Path, identity: Mapping[str, str]):
        self.folder = folder
        self.identity = dict(identity)

    def get(self, metric: str, method: str, settings: Mapping[str, Any]) -> Result | None:
        """Read the stored result; None if there is no readable one."""
        entry = _read(self._path(metric, method, settings))
        return Result(entry["values"], entry["rows"]) if entry else None

    def put(self, metric: str, method: str, settings: Mapping[str, Any], result: Result) -> None:
        """Write ``result``, whole or not at all."""
        about = {
            "metric": metric,
            "method": method,
            "settings": dict(settings),
            **self.identity,
            "version": VERSION,
        }
        content = {**about, "values": result.values, "rows": result.rows}
        write_atomically(
            self._path(metric, method, settings), json.dumps(content, indent=1).encode()
        )

    def known(self) -> dict[tuple[str, str], Result]:
        """Latest stored result by metric and method, whatever its settings."""
        results = {}
        for path in sorted(self.folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
            entry = _read(path)
            if entry and {**self.identity, "version": VERSION}.items() <= entry.items():
                results[entry["metric"], entry["method"]] = Result(entry["values"], entry["rows"])
        return results

    def _path(self, metric: str, method: str, settings: Mapping[str, Any]) -> Path:
        decides = json.dumps(
            [metric, method, dict(settings), self.identity, VERSION], sort_keys=True
        )
        digest = hashlib.sha256(decides.encode()).hexdigest()[:16]
        return self.folder / f"{metric}-{method}-{digest}.json"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        entry: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return entry


def _sha256_of_description(export: Path) -> str:
    """SHA-256 of the parts of config.json that decide the function that the weights compute.

    The temperature and the number of classes are among them.
    """
    config = json.loads((export / "config.json").read_text())
    decides = {key: config.get(key) for key in ("architecture", "num_classes", "model_args")}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
