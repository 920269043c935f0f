"""A browser shows the pages whole, asks nothing of anyone and has nothing to complain about."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from mycel.report import write_comparison, write_report
from report_runs import HOSTILE, PARTIES, save, synthetic


@functools.cache
def chromium() -> str | None:
    return os.environ.get("MYCEL_CHROMIUM") or shutil.which("chromium")


def browser_needed() -> None:
    if chromium() is None:
        reason = "no Chromium: apt-get install chromium, or name one in MYCEL_CHROMIUM"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    plain = save(root / "plain", synthetic())
    long = "a-name-without-a-single-place-to-break-" * 6
    hostile = synthetic((HOSTILE, long, "x" * 200, *PARTIES[3:]), pull=0.7)
    hostile |= {"title": long, "system": long}
    folders = [plain, save(root / "hostile", hostile)]
    return [*(write_report(folder) for folder in folders), write_comparison(folders, root / "compared.html")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_pages_whole_and_silent(pages: list[Path], scheme: Any) -> None:
    browser_needed()
    from playwright.sync_api import sync_playwright

    switches = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    switches += ["--disable-sync", "--no-first-run"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=switches, timeout=120_000)
        try:
            for path in pages:
                for width in (390, 1280):
                    _visit(browser, path, width, scheme)
        finally:
            browser.close()


def _visit(browser: Any, path: Path, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(120_000)
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    _check_layout(page, width)
    if shots := os.environ.get("MYCEL_SCREENSHOTS"):
        name = f"{path.parent.name}-{path.stem}-{width}-{scheme}.png"
        page.screenshot(path=Path(shots) / name, full_page=True)
    assert complaints == []
    assert requests == [path.as_uri()]
    page.close()


def _check_layout(page: Any, width: int) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    figures = page.locator("figure").count()
    boxes = [page.locator("figure svg").nth(index).bounding_box() for index in range(figures)]
    assert figures >= 3
    assert all(box and box["width"] > 200 and box["height"] > 100 for box in boxes)
    contrast = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    assert contrast[0] != contrast[1]
