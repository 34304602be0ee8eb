"""A real Chromium without a window, and the playground's own process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers import free_port

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.allow_hosts(["127.0.0.1", "::1"]))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for argument in (
        "--headless=new",
        "--no-sandbox",  # as root, in CI's containers
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--force-color-profile=srgb",
        "--window-size=1280,1000",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    # Named, so that selenium looks for none elsewhere.
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Start the playground, as `make playground` does: `playground(*arguments)` gives its URL."""
    cache = tmp_path_factory.mktemp("cache")
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str | Path) -> str:
        port = free_port()
        command = [sys.executable, "examples/playground.py", "--no-browser", "--port", str(port)]
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)}
        environment.pop("OMP_NUM_THREADS", None)
        environment.pop("PYTEST_CURRENT_TEST", None)  # with it NiceGUI waits for tests of its own
        process = subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment)
        started.append(process)
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert process.poll() is None, "the playground ended"
            try:
                urllib.request.urlopen(url, timeout=5).close()
            except (urllib.error.URLError, TimeoutError):
                time.sleep(0.2)
            else:
                return url
        pytest.fail("the playground doesn't answer")

    yield start
    for process in started:
        process.terminate()
        process.wait(60)
