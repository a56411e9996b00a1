"""Print what pip believes to be installed in this environment although files of it are gone."""

import importlib.metadata
import sysconfig

# not what the folder of the project, which is on the path, too, holds of old
folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
for found in importlib.metadata.distributions(path=sorted(folders)):
    files = [file for file in found.files or () if file.suffix != ".pyc"]
    if not all(found.locate_file(file).exists() for file in files):
        print(f"{found.metadata['Name']}=={found.version}")
