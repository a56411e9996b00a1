"""Print the packages that pip takes for installed in this environment although files are gone."""

import importlib.metadata
import sysconfig
from pathlib import Path

# The folder of the project is on the path, too, and may hold old metadata: it does not count.
folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
for found in importlib.metadata.distributions(path=sorted(folders)):
    files = [file for file in found.files or () if file.suffix != ".pyc"]
    if not all(Path(str(found.locate_file(file))).exists() for file in files):
        print(f"{found.metadata['Name']}=={found.version}")
