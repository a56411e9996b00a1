"""Tell pip name and version of a source archive in setuptools' place, while pip downloads it.

pip asks an archive's own build script for them, and the scripts of FFCV and OpenCV end where a
compiler or CMake is missing. Nothing of the archive is run this way; that it is the right one is
checked by its hash.
"""

import sys
from email.parser import HeaderParser
from pathlib import Path


def prepare_metadata_for_build_wheel(folder: str, config_settings: object = None) -> str:
    """Write the metadata of the unpacked archive in the working folder: a hook of PEP 517.

    Returns:
        The name of the new folder in ``folder``.
    """
    found = HeaderParser().parsestr(Path("PKG-INFO").read_text(encoding="utf-8"))
    name, version = found["Name"], found["Version"]
    info = Path(folder, f"{name.replace('-', '_')}-{version}.dist-info")
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8"
    )
    return info.name


# The name by which pip calls archives that state no build system.
__legacy__ = sys.modules[__name__]
