"""The status page in a real browser, beside real containers."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.conftest import free_address
from tests.e2e.watching import Failing, World, eventually

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1200,900",
)  # fmt: skip
#: Screenshots of the last run, to be looked at; not committed.
ARTEFACTS = Path(__file__).parents[2] / ".cache" / "page"


@asynccontextmanager
async def browser() -> AsyncIterator[Chrome]:
    """Opened and closed in a thread: it takes seconds, in which a watcher must not stand still."""
    options = ChromeOptions()
    options.binary_location = shutil.which("chromium") or pytest.fail("no chromium: run .ci/browser")
    for flag in FLAGS:
        options.add_argument(flag)
    service = Service(shutil.which("chromedriver"))
    driver = await asyncio.to_thread(Chrome, options=options, service=service)
    try:
        yield driver
    finally:
        await asyncio.to_thread(driver.quit)


@asynccontextmanager
async def opened_page(world: World) -> AsyncIterator[Chrome]:
    address = free_address()
    async with browser() as driver, world.watching(http_listen=address):
        await asyncio.to_thread(driver.get, f"http://{address}/")
        yield driver


def row_of(driver: Chrome, short_id: str) -> str:
    """The texts of a node's row, or nothing. Read in one script, as the page may redraw between two calls."""
    script = "return [...document.querySelectorAll('#rows tr')].filter(r => !r.hidden).map(r => r.innerText)"
    rows: list[str] = driver.execute_script(script)
    return next((row for row in rows if row.startswith(short_id)), "")


def text_of(driver: Chrome, element: str) -> str:
    return driver.find_element(By.ID, element).text


async def shows(driver: Chrome, short_id: str, *words: str, within: float = 5.0) -> None:
    async def all_there() -> bool:
        row = await asyncio.to_thread(row_of, driver, short_id)
        return bool(row) and all(word in row for word in words)

    await eventually(all_there, within)


async def test_a_node_that_is_killed_turns_on_the_page_without_reloading_it(world: World) -> None:
    node = await world.start("seen")
    async with opened_page(world) as driver:
        await shows(driver, node.id[:12], "running", await world.ip(node))
        await node.kill()
        await shows(driver, node.id[:12], "exited")
        changes = await asyncio.to_thread(text_of, driver, "changes")
        assert "status running → exited" in changes
        assert "by event" in changes
        assert "half within" in await asyncio.to_thread(text_of, driver, "plot-text")
        await eventually(lambda: text_of(driver, "readiness").startswith("Ready"))
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        driver.save_screenshot(str(ARTEFACTS / "killed.png"))
        assert driver.get_log("browser") == []  # type: ignore[no-untyped-call]


async def test_one_node_that_cannot_be_vouched_for_is_a_note_and_no_alarm(world: World, failing: Failing) -> None:
    bad = await world.start("bad")
    async with opened_page(world) as driver:
        await shows(driver, bad.id[:12], "running")
        failing.bad.add(bad.id)
        await bad.pause()
        await eventually(lambda: "but for this: nodes: 1 " in text_of(driver, "readiness"))
        readiness = driver.find_element(By.ID, "readiness")
        assert readiness.text.startswith("Ready: ")
        assert readiness.get_attribute("class") == "good"
        assert bad.id[:12] in readiness.text


async def test_the_page_still_tells_what_happened_before_a_restart(world: World) -> None:
    node = await world.start("remembered")
    async with world.watching():
        await node.kill()
        await eventually(lambda: world.says(node, status="exited"))
    async with opened_page(world) as driver:
        await eventually(lambda: "status running → exited" in text_of(driver, "changes"))


async def test_nodes_are_found_by_keyboard_and_the_page_works_at_a_thousand_of_them(world: World) -> None:
    node = await world.start("needle")
    async with opened_page(world) as driver:
        await shows(driver, node.id[:12], "running")
        fill = """
            for (let i = 0; i < 1000; i++)
                nodes.set('x' + i, {node_id: 'x' + i, short_id: 'x' + i, status: 'exited', health: 'none', ip: '',
                                    port: 1, idle_left: null});
            showNodes(); return document.querySelectorAll('#rows tr').length"""
        assert driver.execute_script(fill) == 1001
        driver.find_element(By.ID, "filter").send_keys(node.id[:12])
        assert text_of(driver, "shown") == "1 of 1001 nodes shown."
        await shows(driver, node.id[:12], "running")
        driver.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
        assert driver.switch_to.active_element.is_displayed()


async def test_the_page_is_read_only_and_lets_nothing_foreign_in(world: World) -> None:
    address = free_address()
    async with world.watching(http_listen=address), httpx.AsyncClient(base_url=f"http://{address}") as client:
        page = await client.get("/")
        policy = page.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "://" not in page.text
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            for path in ("/", "/api/nodes", "/readyz", "/metrics"):
                assert (await client.request(method, path)).status_code == 405
        assert (await client.get("/static/../app.py")).status_code in {403, 404}


async def test_nothing_listens_when_http_is_off(world: World) -> None:
    async with world.watching(http_listen="") as watched:
        assert watched.app.settings.http_address is None
