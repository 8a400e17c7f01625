"""Headless Chromium for pages that a test wrote; it finds no network."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

__all__ = ["click", "console_errors", "count", "open_browser", "requested_urls", "text_of", "visit", "wait"]

REQUIRED = "HIF4C_REQUIRE_BROWSER"
"""Environment variable: a missing browser fails a test instead of skipping it."""
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--force-device-scale-factor=1",
    "--window-size=1400,1000",
)


@contextmanager
def open_browser(*flags: str) -> Iterator[Any]:
    """A selenium driver of a fresh browser; skips the test where there is none."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        if os.environ.get(REQUIRED):
            pytest.fail(f"{REQUIRED} is set, but chromium or chromedriver is missing")
        pytest.skip("chromium or chromedriver is missing")
    from selenium import webdriver

    # Not pytest's directory: a browser's profile needs a short path, and goes away with it.
    with tempfile.TemporaryDirectory(prefix="hif4c-browser-", ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        for flag in (*_FLAGS, f"--user-data-dir={profile}", *flags):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
        try:
            opened.set_page_load_timeout(60)
            opened.set_script_timeout(30)
            yield opened
        finally:
            opened.quit()


def console_errors(driver: Any) -> list[str]:
    """What the page said on the console since the last call, but for debugging and information."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] not in ("DEBUG", "INFO")]


def requested_urls(driver: Any, page: Path) -> list[str]:
    """What the page asked for since the last call beside itself, what stands in it, and the browser's own pages."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    own = page.resolve().as_uri()
    return [url for url in urls if url.split("#")[0] != own and not url.startswith(("data:", "blob:", "chrome:"))]


def visit(browser: Any, page: Path) -> Any:
    """The page as if opened for the first time; what the browser said before is forgotten."""
    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(page.as_uri())
    return browser


def text_of(browser: Any, selector: str) -> str:
    """What a person reads in an element."""
    return browser.execute_script("return document.querySelector(arguments[0]).innerText", selector)


def count(browser: Any, selector: str) -> int:
    """How many elements there are."""
    return browser.execute_script("return document.querySelectorAll(arguments[0]).length", selector)


def click(browser: Any, selector: str) -> None:
    """As a person would: what is covered or hidden cannot be clicked."""
    browser.execute_script(
        "document.querySelector(arguments[0]).scrollIntoView({block: 'center', behavior: 'instant'})", selector
    )
    browser.find_element("css selector", selector).click()


def wait(browser: Any, condition: str, *arguments: Any) -> None:
    """Until a JavaScript expression holds; fails after some seconds."""
    for _ in range(100):
        if browser.execute_script(f"return {condition}", *arguments):
            return
        time.sleep(0.05)
    pytest.fail(f"never came true: {condition}")
