"""Hooks of the documentation site: pages from outside docs/, links that leave it, the notebook.

The documents are written for the tree of the project, where a link may go to any file. The site
holds the documents alone: a link to one of them leads to its page, and any other link becomes the
path of the file.
"""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = "docs/"
# Documents at the root of the project -> their pages.
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
NOTEBOOK = "explain_a_model"
LINK = re.compile(r"(?P<mark>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
CODE_BLOCK = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not Markdown files in docs/."""
    for name, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    notebook = json.loads((ROOT / DOCS / f"{NOTEBOOK}.ipynb").read_text())
    files.append(File.generated(config, f"{NOTEBOOK}.md", content=as_markdown(notebook)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links into links between pages, or into paths."""
    folder = "" if page.file.src_uri in OUTSIDE.values() else DOCS
    known = {file.src_uri for file in files}

    def on_site(link: re.Match[str]) -> str:
        path, sign, anchor = link["target"].partition("#")
        if not path or "://" in path:
            return link[0]
        inside = posixpath.normpath(posixpath.join(folder, path))
        shown = OUTSIDE.get(inside) or inside.removeprefix(DOCS).replace(".ipynb", ".md")
        if shown in known and (inside in OUTSIDE or inside.startswith(DOCS)):
            return f"{link['mark']}[{link['text']}]({shown}{sign}{anchor})"
        if not (ROOT / inside).exists():
            return link[0]
        return (
            f"`{inside}`" if link["text"].strip("`/") in inside else f"{link['text']} (`{inside}`)"
        )

    parts = CODE_BLOCK.split(markdown)
    parts[::2] = [LINK.sub(on_site, part) for part in parts[::2]]
    return "".join(parts)


def as_markdown(notebook: dict[str, Any]) -> str:
    """Give an executed notebook as Markdown, with its pictures inside the text."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                picture = "".join(data["image/png"]).replace("\n", "")
                width = output["metadata"].get("image/png", {}).get("width", "")
                parts.append(f'<img alt="" width="{width}" src="data:image/png;base64,{picture}">')
            else:
                text = "".join(output.get("text") or data.get("text/plain", ""))
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"
