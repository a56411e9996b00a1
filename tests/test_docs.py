"""The documents: links lead somewhere, what they name exists, and what they show can be run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_architecture import FLOORS

from pipeline.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NOTEBOOK = DOCS / "explain_a_model.ipynb"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md")), NOTEBOOK]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
# Of the pictures and texts in the notebook together.
MOST_BYTES = 300_000


def text_of(page):
    """Read the Markdown of a page, without its blocks of code."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    return CODE_BLOCK.sub("", text)


def anchors(page):
    """List the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ +(.+)$", text_of(page), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).strip().lower() for title in titles]
    return [re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for link in LINK.findall(text_of(page)):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(ROOT), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


def test_the_tests_that_keep_the_promises_exist():
    named = re.findall(r"`(tests/[\w/]+\.py)`", text_of(DOCS / "architecture.md"))
    assert len(named) > 30
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_table_of_rooms_is_the_tested_one():
    rows = re.findall(r"^\| \d+ \| (.+) \|$", text_of(DOCS / "architecture.md"), re.MULTILINE)
    assert [set(re.findall(r"`(\w+)`", row)) for row in rows] == FLOORS


def test_the_names_of_a_run_folder_are_described():
    folder = RunFolder(Path("run"))
    properties = [name for name, value in vars(RunFolder).items() if isinstance(value, property)]
    paths = [getattr(folder, name) for name in properties]
    names = [path.name for path in paths if isinstance(path, Path)]
    assert len(names) > 12
    text = text_of(DOCS / "architecture.md")
    assert [name for name in names if name not in text] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CONTRIBUTING.md"])
def test_the_files_that_are_named_exist(page):
    """Paths start at the project's root or in pipeline/; CONTRIBUTING also names new files."""
    for name in re.findall(r"`([\w.]+/[\w/.]+\.(?:py|sh))`", text_of(page)):
        assert (ROOT / name).is_file() or (ROOT / "pipeline" / name).is_file(), name


def test_the_patches_for_additions_fit_the_code():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    patches = re.findall(r"^```diff\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(patches) == 7
    for patch in patches:
        for part in re.split(r"^\+\+\+ ", patch, flags=re.MULTILINE)[1:]:
            name, _, rest = part.partition("\n")
            for hunk in re.split(r"^@@\n", rest, flags=re.MULTILINE)[1:]:
                kept = [line[1:] for line in hunk.splitlines() if not line.startswith("+")]
                if kept:
                    assert "\n".join(kept) in (ROOT / name).read_text(encoding="utf-8"), name


def test_the_folders_in_the_tree_of_the_readme_exist():
    (tree,) = re.findall(r"^```text\n(pipeline/.*?)^```$", readme(), re.MULTILINE | re.DOTALL)
    rooms = re.findall(r"^  (\w+/)", tree, re.MULTILINE)
    assert len(rooms) > 8
    folders = {f"{path.parent.name}/" for path in (ROOT / "pipeline").glob("*/__init__.py")}
    assert set(rooms) == folders
    for folder in re.findall(r"^(\w+/)", tree, re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder


def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_notebook_holds_outputs_of_a_clean_run():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert NOTEBOOK.stat().st_size < MOST_BYTES


@pytest.mark.timeout(300)
def test_the_notebook_runs(tmp_path, monkeypatch):
    """Run it as it is; the numbers that it prints may differ between machines."""
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    for variable, folder in {"JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython"}.items():
        monkeypatch.setenv(variable, str(tmp_path / folder))
    paths = [str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))]
    monkeypatch.setenv("PYTHONPATH", ":".join(paths))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    printed = "".join(
        output["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.get("name") == "stdout"
    )
    accuracies = [float(number) for number in re.findall(r"digits (\d\.\d+)", printed)]
    assert accuracies[-1] > 0.7
    assert "largest relative error is below 1e-5: True" in printed


def test_the_site_is_built_without_a_warning(tmp_path):
    """In strict mode every warning is an error: a dead link, a page that the menu lacks."""
    pytest.importorskip("material", reason="the extra docs is not installed: make docs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file"]
    built = subprocess.run(
        [*command, DOCS / "website" / "mkdocs.yml", "--site-dir", tmp_path],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert built.returncode == 0, built.stderr
    pages = sorted(tmp_path.glob("*.html"))
    assert len(pages) > 12
    elsewhere = re.compile(r'<(?:script|link|img)[^>]* (?:src|href)="(https?://[^"]+)')
    for page in pages:
        assert elsewhere.findall(page.read_text()) == [], f"{page.name} loads from the network"
