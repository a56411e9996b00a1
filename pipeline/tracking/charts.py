"""Where MLflow shows runs beside each other."""

import json
from collections.abc import Iterable
from urllib.parse import quote

from pipeline.run_folder import RunFolder

LOCAL_SERVER = "http://127.0.0.1:5000"
"""Where `coda serve` listens."""

# In this order MLflow shows the runs of a sweep themselves, not the parent that they fold under,
# and the best first.
_CHARTS = "compareRunsMode=CHART&orderByKey=metrics.%60val%2Ftop1%60&orderByAsc=false&searchFilter="


def chart_pages(runs: Iterable[tuple[RunFolder, str]]) -> list[tuple[str, str | None]]:
    """Find the pages of MLflow that chart the ``runs`` which it has, one for each store.

    Args:
        runs: (folder, tracking URI) of each.

    Returns:
        (address, command that starts the store's server, None where it has one).
    """
    stores: dict[str, list[RunFolder]] = {}
    for folder, uri in runs:
        if folder.run_id.is_file() and folder.experiment_id.is_file():
            stores.setdefault(uri, []).append(folder)
    pages = []
    for uri, folders in sorted(stores.items()):
        served = uri.startswith(("http://", "https://"))
        server = uri.rstrip("/") if served else LOCAL_SERVER
        command = None if served else f"coda serve --backend-store-uri {uri}"
        pages.append((f"{server}/#/{_page(folders)}", command))
    return pages


def _page(folders: list[RunFolder]) -> str:
    ids = ", ".join(f"'{folder.run_id.read_text()}'" for folder in folders)
    experiments = sorted({folder.experiment_id.read_text() for folder in folders})
    wanted = f"{_CHARTS}{quote(f'attributes.run_id IN ({ids})')}"
    if len(experiments) == 1:
        return f"experiments/{experiments[0]}/runs?{wanted}"
    listed = quote(json.dumps(experiments, separators=(",", ":")))
    return f"compare-experiments/s?experiments={listed}&{wanted}"
