"""Hooks of the documentation site: pages from outside docs/, links that leave it, the notebook.

The files of the project are written for its tree, where a link may go to any file. The site holds
the documents alone: a link to one of them becomes the page, and any other becomes the file's path.
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
DOCS = "docs"
# Documents at the root of the project that are pages of the site.
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md")
NOTEBOOK = "explain_a_model"
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>[^)\s]+)\)")
CODE_BLOCK = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not Markdown files in docs/."""
    for name in OUTSIDE:
        files.append(File.generated(config, name, content=(ROOT / name).read_text()))
    notebook = json.loads((ROOT / DOCS / f"{NOTEBOOK}.ipynb").read_text())
    files.append(File.generated(config, f"{NOTEBOOK}.md", content=as_markdown(notebook)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links into links between pages, or into paths."""
    name = page.file.src_uri
    folder = "" if name in OUTSIDE else DOCS
    pages = {file.src_uri for file in files}

    def on_site(link: re.Match[str]) -> str:
        path, _, anchor = link["target"].partition("#")
        if not path or "://" in path:
            return link[0]
        inside = posixpath.normpath(posixpath.join(folder, path))
        shown = inside.removeprefix(f"{DOCS}/").replace(f"{NOTEBOOK}.ipynb", f"{NOTEBOOK}.md")
        if inside == "README.md":
            shown = "index.md"
        elif not inside.startswith(f"{DOCS}/") and inside not in OUTSIDE:
            plain = link["text"].strip("`")
            return f"`{inside}`" if plain in inside else f"{link['text']} (`{inside}`)"
        if shown not in pages:
            return link[0]
        return f"[{link['text']}]({shown}{'#' + anchor if anchor else ''})"

    parts = CODE_BLOCK.split(markdown)
    parts[::2] = [LINK.sub(on_site, part) for part in parts[::2]]
    return "".join(parts)


def as_markdown(notebook: dict[str, Any]) -> str:
    """An executed notebook as Markdown, its pictures inside the text."""
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
                parts.append(f'<img alt="" src="data:image/png;base64,{picture}">')
            else:
                text = "".join(output.get("text") or data.get("text/plain", ""))
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"
