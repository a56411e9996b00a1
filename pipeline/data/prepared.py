"""A prepared folder, opened: its manifest, checked once, and the files to read."""

from dataclasses import dataclass, field
from pathlib import Path

from pipeline.data.manifest import Manifest, SplitFile, open_manifest
from pipeline.data.staging import readable_file
from pipeline.files import sha256_of
from pipeline.recipe.schema import DataRecipe


@dataclass(frozen=True)
class PreparedData:
    """The data of a run, opened once and handed to whatever reads it."""

    data: DataRecipe
    """The recipe's data section."""
    manifest: Manifest
    """The manifest of the prepared folder."""
    _readable: dict[str, Path] = field(default_factory=dict, repr=False)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the labels."""
        return self.manifest.classes

    def split(self, name: str) -> SplitFile:
        """Return the entry of the split ``name``, train or val, in the manifest."""
        return self.manifest.splits[name]

    def original(self, name: str) -> Path:
        """Return the .beton file of a split where it was prepared."""
        return self.data.folder / self.split(name).file

    def readable(self, name: str) -> Path:
        """Return the .beton file of a split to read, which may be a copy on the node's disk.

        Raises:
            UserError: the copy cannot be made.
        """
        if name not in self._readable:
            self._readable[name] = readable_file(self.data, self.manifest, name)
        return self._readable[name]

    def sha256(self, name: str) -> str:
        """Read the whole file of a split and return its SHA-256."""
        return sha256_of(self.original(name))


def open_prepared(data: DataRecipe) -> PreparedData:
    """Open the prepared folder of a recipe's data and check its files.

    Raises:
        UserError: files are missing, damaged, or prepared with other settings.
    """
    manifest = open_manifest(data.folder)
    manifest.require(data)
    return PreparedData(data, manifest)
