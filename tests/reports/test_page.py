"""The page shows all that it is given, whatever the characters, and needs nothing else."""

import base64
from html.parser import HTMLParser

from PIL import Image

from pipeline.reports.page import Section, write_page

NASTY = "<script>alert('x')</script>&\"é.png"


class Reader(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_a_page_of_nasty_names(tmp_path):
    Image.new("RGB", (3, 3), (250, 0, 0)).save(tmp_path / "a.png")
    section = Section(NASTY, [(NASTY, 0.25)], [(NASTY, tmp_path / "a.png")])
    write_page(tmp_path / "page.html", NASTY, [NASTY], [section], [NASTY])
    text = (tmp_path / "page.html").read_text()
    page = Reader(text)
    assert text.count("<script") == 0
    assert "http://" not in text
    assert "https://" not in text
    # It stands in title, heading, note, list of the left out, section, class and caption.
    assert page.text.count(NASTY) == 7
    (image,) = [attributes for tag, attributes in page.tags if tag == "img"]
    assert image["alt"] == NASTY
    assert (
        base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
        == (tmp_path / "a.png").read_bytes()
    )
    assert "default-src 'none'" in dict(page.tags)["meta"].get("content", "")
    assert "0.250" in page.text
