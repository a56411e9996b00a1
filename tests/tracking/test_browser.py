"""The pages of MLflow in a real browser.

Both runs are found, selected and compared; charts and pictures are there. Screenshots stay.
"""

import os
import shutil
import time
from urllib.parse import quote

import pytest
from conftest import NAME, PASSWORD

from pipeline.reports.compare import mlflow_pages
from pipeline.reports.compared import find_runs

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SWITCHES = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
)
# For a page on a busy machine.
SECONDS = 120
BY_TOP1 = "orderByKey=metrics.%60val%2Ftop1%60&orderByAsc=false"
# Selector of the table's rows.
ROWS = ".ag-pinned-left-cols-container "
CHARTS = (
    "interp/area",
    "interp/completeness_error",
    "interp/depth",
    "interp/localisation_by_layer",
)
# Scripts for the browser: the middle of an element, and the element at a place.
MIDDLE = (
    "const box = arguments[0].getBoundingClientRect();"
    "return [(box.left + box.right) / 2, (box.top + box.bottom) / 2]"
)
ELEMENT_AT = "return document.elementFromPoint(arguments[0], arguments[1])"

pytestmark = pytest.mark.browser


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="needs selenium: pip install -e .[test]"
    )
    if not CHROMIUM or not DRIVER:
        pytest.skip("needs Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in (
        *SWITCHES,
        "window-size=1500,1300",
        f"user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(f"--{switch}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(SECONDS)
    yield driver
    driver.save_screenshot(str(tmp_path / "last.png"))
    driver.quit()


def wait(found, what: str):
    """The first true value of ``found()``, which is called again and again."""
    from selenium.common.exceptions import StaleElementReferenceException

    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        try:
            if value := found():
                return value
        except StaleElementReferenceException:
            # The page was drawn anew meanwhile.
            pass
        time.sleep(0.2)
    raise AssertionError(f"{what} did not appear within {SECONDS} s")


class Pages:
    """The pages of MLflow in a browser, and screenshots of them."""

    def __init__(self, browser, screenshots):
        self.browser = browser
        self.screenshots = screenshots
        screenshots.mkdir()

    @property
    def text(self):
        return self.browser.find_element("tag name", "body").text

    def all_of(self, selector):
        """The elements of a CSS selector."""
        return self.browser.find_elements("css selector", selector)

    def click(self, element):
        """Click by a script: the page may have something else above the element."""
        self.browser.execute_script("arguments[0].click()", element)

    def shoot(self, name):
        self.browser.save_screenshot(str(self.screenshots / f"{name}.png"))

    def maps(self, selector):
        """The contribution maps among the images of a selector, once they are loaded."""
        return [
            image
            for image in self.all_of(selector)
            if "contributions" in image.get_attribute("src")
            and image.get_property("naturalWidth") > 50
        ]

    def maps_in_charts(self):
        """The contribution maps of the charts, of which those in view are loaded."""
        heading = "//*[starts-with(text(), 'Model metrics')]"
        for section in self.browser.find_elements("xpath", heading):
            self.browser.execute_script("arguments[0].scrollIntoView()", section)
        return self.maps("img")

    def is_visible(self, image):
        """Whether nothing hides the middle of an image."""
        x, y = self.browser.execute_script(MIDDLE, image)
        return self.browser.execute_script(ELEMENT_AT, x, y) == image


def select_and_compare(pages, address, ids):
    """Select the runs ``ids`` in the table at ``address``, and go to their comparison."""
    pages.browser.get(address)
    wait(
        lambda: ids <= {row.get_attribute("row-id") for row in pages.all_of(f"{ROWS}[row-id]")},
        "both runs in the table",
    )
    for run in ids:
        pages.click(pages.all_of(f"{ROWS}[row-id='{run}'] .ag-checkbox-input")[0])

    def compare_buttons():
        buttons = pages.all_of("button")
        return [button for button in buttons if button.text == "Compare" and button.is_enabled()]

    buttons = wait(compare_buttons, "Compare")
    pages.shoot("selected")
    buttons[0].click()
    wait(
        lambda: "compare-runs" in pages.browser.current_url and "interp/localisation" in pages.text,
        "the comparison of both runs",
    )
    pages.shoot("compared")


def look_at_charts(pages):
    """Wait until each chart has a line for each run."""
    lines = [f"{name} ({chart})" for chart in CHARTS for name in ("hybrid", "plain")]
    wait(lambda: all(line in pages.text for line in lines), "charts with a line for each run")
    wait(lambda: len(pages.all_of(".js-plotly-plot .trace.scatter")) >= 8, "lines in the charts")
    pages.shoot("charts")


def look_at_pictures(pages, count):
    """Wait until there are ``count`` contribution maps; look at them on the whole screen."""
    wait(lambda: len(pages.maps_in_charts()) >= count, "a contribution map of each run")
    # In the tile a run's parameters come before its picture.
    tile = "//*[@data-testid='experiment-view-compare-runs-card'][.//*[text()='contributions']]"
    fullscreen = f"{tile}//button[contains(@data-component-id, 'fullscreen')]"
    pages.click(pages.browser.find_element("xpath", fullscreen))
    shown = wait(
        lambda: found if len(found := pages.maps("[role=dialog] img")) >= count else None,
        "the same on the whole screen",
    )
    for index, image in enumerate(shown):
        pages.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", image)
        time.sleep(1)
        pages.shoot(f"picture {index}")
        assert pages.is_visible(image)


def test_both_runs_are_found_selected_and_compared_with_charts_and_pictures(
    browser, team, two_runs, tmp_path
):
    runs = find_runs([str(folder) for folder in two_runs], two_runs[0].parent)
    ((address, command),) = mlflow_pages(runs)
    ids = {(folder / "run_id").read_text() for folder in two_runs}
    assert address.startswith(team.uri)
    assert command is None
    pages = Pages(browser, tmp_path / "screenshots")
    # The browser keeps the password for the pages that follow.
    browser.get(team.uri.replace("://", f"://{NAME}:{quote(PASSWORD)}@") + "/")
    browser.get(f"{team.uri}/#/experiments")
    wait(lambda: "digits" in pages.text, "the experiment in the list")
    experiment = (two_runs[0] / "experiment_id").read_text()
    select_and_compare(pages, f"{team.uri}/#/experiments/{experiment}/runs?{BY_TOP1}", ids)

    browser.get("about:blank")
    # The address that `coda compare` prints.
    browser.get(address)
    look_at_charts(pages)
    look_at_pictures(pages, len(ids))
    assert all(os.path.getsize(path) > 20_000 for path in pages.screenshots.iterdir())
