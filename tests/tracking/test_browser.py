"""The pages of MLflow in a real browser: both runs are found, selected and compared; charts and
pictures are there. Screenshots stay.
"""

import os
import shutil
import time
from urllib.parse import quote

import pytest
from conftest import NAME, PASSWORD

from pipeline.reports.compare import find_runs, mlflow_views

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SWITCHES = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync"
# for a page on a busy machine
SECONDS = 120

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
        *SWITCHES.split(),
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
    """The first true value of ``found()``, which is asked again and again."""
    from selenium.common.exceptions import StaleElementReferenceException

    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        try:
            if value := found():
                return value
        except StaleElementReferenceException:
            # the page was drawn anew meanwhile
            pass
        time.sleep(0.2)
    raise AssertionError(f"{what} did not appear within {SECONDS} s")


def test_both_runs_are_found_selected_and_compared_with_charts_and_pictures(
    browser, team, two_runs, tmp_path
):
    runs = find_runs([str(folder) for folder in two_runs], two_runs[0].parent)
    ((address, command),) = mlflow_views(runs)
    ids = {(folder / "run_id").read_text() for folder in two_runs}
    assert address.startswith(team.uri)
    assert command is None
    screenshots = tmp_path / "screenshots"
    screenshots.mkdir()

    def shoot(name):
        browser.save_screenshot(str(screenshots / f"{name}.png"))

    def all_of(selector):
        return browser.find_elements("css selector", selector)

    def text():
        return browser.find_element("tag name", "body").text

    # the browser keeps the password for the pages that follow
    browser.get(team.uri.replace("://", f"://{NAME}:{quote(PASSWORD)}@") + "/")
    browser.get(f"{team.uri}/#/experiments")
    wait(lambda: "digits" in text(), "the experiment in the list")
    experiment = (two_runs[0] / "experiment_id").read_text()
    browser.get(
        f"{team.uri}/#/experiments/{experiment}/runs?orderByKey=metrics.%60val%2Ftop1%60&orderByAsc=false"
    )
    rows = ".ag-pinned-left-cols-container [row-id]"
    wait(
        lambda: ids <= {row.get_attribute("row-id") for row in all_of(rows)},
        "both runs in the table",
    )
    for run in ids:
        browser.execute_script(
            "arguments[0].click()", all_of(f"{rows[:-1]}='{run}'] .ag-checkbox-input")[0]
        )
    buttons = wait(
        lambda: [
            button
            for button in all_of("button")
            if button.text == "Compare" and button.is_enabled()
        ],
        "Compare",
    )
    shoot("selected")
    buttons[0].click()
    wait(
        lambda: "compare-runs" in browser.current_url and "interp/localisation" in text(),
        "the comparison of both runs",
    )
    shoot("compared")

    browser.get("about:blank")
    # what `coda compare` prints
    browser.get(address)
    charts = (
        "interp/area",
        "interp/completeness_error",
        "interp/depth",
        "interp/localisation_by_layer",
    )
    wait(
        lambda: all(
            f"{name} ({chart})" in text() for chart in charts for name in ("hybrid", "plain")
        ),
        "charts with a line for each run",
    )
    wait(lambda: len(all_of(".js-plotly-plot .trace.scatter")) >= 8, "lines in the charts")
    shoot("charts")

    def pictures():
        for section in browser.find_elements("xpath", "//*[starts-with(text(), 'Model metrics')]"):
            browser.execute_script("arguments[0].scrollIntoView()", section)
        return maps("img")

    def maps(selector):
        return [
            image
            for image in all_of(selector)
            if "contributions" in image.get_attribute("src")
            and image.get_property("naturalWidth") > 50
        ]

    wait(lambda: len(pictures()) >= len(ids), "a contribution map of each run")
    # In the tile a run's parameters stand before its picture.
    tile = "//*[@data-testid='experiment-view-compare-runs-card'][.//*[text()='contributions']]"
    enlarge = browser.find_element(
        "xpath", f"{tile}//button[contains(@data-component-id, 'fullscreen')]"
    )
    browser.execute_script("arguments[0].click()", enlarge)
    shown = wait(
        lambda: found if len(found := maps("[role=dialog] img")) >= len(ids) else None,
        "the same on the whole screen",
    )
    for index, image in enumerate(shown):
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", image)
        time.sleep(1)
        shoot(f"picture {index}")
        middle = "const box = arguments[0].getBoundingClientRect(); return [(box.left + box.right) / 2, (box.top + box.bottom) / 2]"
        x, y = browser.execute_script(middle, image)
        # nothing hides it
        assert (
            browser.execute_script(
                "return document.elementFromPoint(arguments[0], arguments[1])", x, y
            )
            == image
        )
    assert all(os.path.getsize(path) > 20_000 for path in screenshots.iterdir())
