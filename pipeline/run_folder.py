"""The folder of a run: the one list of the names in it.

An export is a folder of its own, inside a run's or elsewhere; it is described by the same names as
far as it has them.
"""

from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError

EXPORT_CONFIG = "config.json"
SHEET_NAME = "contributions.png"


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps what it knows. All of it can be moved elsewhere."""

    path: Path

    def __fspath__(self) -> str:
        """Let ``Path(folder)`` and ``open`` take it."""
        return str(self.path)

    def __str__(self) -> str:
        """Show the path, for messages."""
        return str(self.path)

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.resolve().name

    @property
    def recipe(self) -> Path:
        """The resolved recipe; an export has a copy."""
        return self.path / "recipe.yaml"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def lease(self) -> Path:
        """Name of the start that may write."""
        return self.path / "lease"

    @property
    def first_error(self) -> Path:
        """The first error of any process of the newest start that had one."""
        return self.path / "first_error.txt"

    @property
    def stacks(self) -> Path:
        """Folder of what the watchdog wrote: where each process was when nothing moved."""
        return self.path / "stacks"

    @property
    def journal(self) -> Path:
        """All that the run has reported; what MLflow has of it is counted beside it."""
        return self.path / "journal.jsonl"

    @property
    def node_journals(self) -> list[Path]:
        """The loads of the nodes, where they are measured."""
        return sorted(self.path.glob("system-*.jsonl"))

    def node_journal(self, node: str) -> Path:
        """The load of one node."""
        return self.path / f"system-{node}.jsonl"

    @property
    def run_id(self) -> Path:
        """MLflow's id of the run."""
        return self.path / "run_id"

    @property
    def experiment_id(self) -> Path:
        """MLflow's id of the experiment."""
        return self.path / "experiment_id"

    @property
    def export(self) -> Path:
        """Folder of the exported model."""
        return self.path / "export"

    @property
    def evaluation(self) -> Path:
        """Values and tables of all metrics, of the exported model."""
        return self.path / "evaluation.json"

    @property
    def results(self) -> Path:
        """Folder of the results that are computed once."""
        return self.path / "results"

    @property
    def tables(self) -> Path:
        """Folder of the tables as CSV."""
        return self.path / "tables"

    @property
    def pictures(self) -> Path:
        """Folder of the pictures."""
        return self.path / "pictures"

    @property
    def sheet(self) -> Path:
        """Contribution maps of a few validation images."""
        return self.pictures / SHEET_NAME

    def epoch_sheet(self, epoch: int) -> Path:
        """The same after ``epoch`` epochs."""
        return self.pictures / f"epoch-{epoch:04}" / SHEET_NAME

    @property
    def explanations(self) -> Path:
        """Folder of the explanations of a user's images."""
        return self.path / "explanations"

    def tracking_uri(self, uri: str | None) -> str:
        """Complete a recipe's tracking URI: by default an SQLite file beside this run."""
        return uri or f"sqlite:///{self.path.parent.resolve() / 'mlflow.db'}"

    def all_pictures(self) -> list[Path]:
        """The pictures of the finished run."""
        return sorted(self.pictures.glob("*.png"))

    def find_export(self) -> Path:
        """Find the export in this folder, which may itself be one.

        Raises:
            UserError: there is no export.
        """
        for candidate in (self.path, self.export):
            if (candidate / EXPORT_CONFIG).is_file():
                return candidate
        raise UserError(
            f"{self}: holds no export ({EXPORT_CONFIG}); `coda export RUN` makes one of a run with "
            "a checkpoint"
        )
