"""Results that are computed once: one file for each metric and method, found again by what decides
its numbers.

That is the weights and the architecture, the evaluated images, and the settings of the metric. A
training epoch is no part of it: two runs with the same name, or one run trained on, never share a
result.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.data.prepared import PreparedData
from pipeline.evaluation.metric import Result
from pipeline.files import sha256_of, write_atomically

# of the metrics' definitions: a change of one makes stored results unfit
VERSION = 1


def identify(export: Path, prepared: PreparedData) -> dict[str, str]:
    """SHA-256 of the exported weights, of the export's description of its model, and of the images
    evaluated.
    """
    return {
        "weights": sha256_of(export / "model.safetensors"),
        "model": _model(export),
        "data": prepared.sha256("val"),
    }


class ResultCache:
    """The results in ``folder`` that belong to ``identity``."""

    def __init__(self, folder: Path, identity: Mapping[str, str]):
        self.folder, self.identity = folder, dict(identity)

    def get(self, metric: str, method: str, settings: Mapping[str, Any]) -> Result | None:
        """The stored result, None if there is no readable one."""
        entry = _read(self._path(metric, method, settings))
        return Result(entry["values"], entry["rows"]) if entry else None

    def put(self, metric: str, method: str, settings: Mapping[str, Any], result: Result) -> None:
        """Store ``result``; it is there whole or not at all."""
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
        """By metric and method the result stored last, whatever its settings."""
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
        return (
            self.folder
            / f"{metric}-{method}-{hashlib.sha256(decides.encode()).hexdigest()[:16]}.json"
        )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _model(export: Path) -> str:
    """Of the parts of config.json that say which function the weights are: temperature and classes
    among them.
    """
    config = json.loads((export / "config.json").read_text())
    decides = {key: config.get(key) for key in ("architecture", "num_classes", "model_args")}
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
