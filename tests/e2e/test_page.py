"""The status page in a real browser, beside real containers."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from eventwatch import watch
from eventwatch.store.base import checker_id
from tests.kit.fakes import Failing
from tests.kit.mongod import free_address
from tests.kit.truth import ago
from tests.kit.waiting import eventually
from tests.kit.world import World

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,900",
)
#: Screenshots of the last run, to be looked at; not committed.
ARTEFACTS = Path(__file__).parents[2] / ".cache" / "page"
#: Seconds for what takes a browser beside other tests far less on its own.
SOON = 30.0
#: Ends with an error once it is told to.
FAILING = ["sh", "-c", "until [ -e /go ]; do sleep 0.1; done; exit 3"]


def made_browser() -> Chrome:
    options = ChromeOptions()
    options.binary_location = shutil.which("chromium") or pytest.fail("no chromium: run .ci/browser")
    for flag in FLAGS:
        options.add_argument(flag)
    return Chrome(options=options, service=Service(shutil.which("chromedriver")))


@asynccontextmanager
async def browser() -> AsyncIterator[Chrome]:
    """Opened and closed in a thread: it takes seconds, in which a watcher must not stand still."""
    driver = await asyncio.to_thread(made_browser)
    try:
        yield driver
    finally:
        await asyncio.to_thread(driver.quit)


@pytest.fixture(scope="module")
def chrome() -> Iterator[Chrome]:
    """One browser for this module's tests."""
    driver = made_browser()
    yield driver
    driver.quit()


async def visit(driver: Chrome, url: str) -> None:
    await asyncio.to_thread(driver.get, "about:blank")  # else another fragment is no new visit
    await asyncio.to_thread(driver.get, url)


@asynccontextmanager
async def opened_page(world: World, driver: Chrome, view: str = "", **changes: Any) -> AsyncIterator[Chrome]:
    """The page of a running watcher; what the browser complained of fails the test at the end."""
    address = free_address()
    driver.set_window_size(1400, 900)
    async with world.watching(http_listen=address, **changes):
        driver.get_log("browser")  # type: ignore[no-untyped-call]
        await visit(driver, f"http://{address}/{view}")
        yield driver
        assert complaints(driver) == []
        await asyncio.to_thread(driver.get, "about:blank")


def complaints(driver: Chrome) -> list[str]:
    """What the browser logged, but for requests that it gave up as a network came or went, and nodes that went."""
    found = [line["message"] for line in driver.get_log("browser")]  # type: ignore[no-untyped-call]
    expected = re.compile(r"ERR_NETWORK_CHANGED|/api/nodes/[0-9a-f]{12}(/changes)? .* 404 ")
    return [message for message in found if not expected.search(message)]


def row_of(driver: Chrome, short_id: str) -> str:
    """The texts of a node's row, or nothing. Read in one script, as the page may redraw between two calls."""
    script = "return [...document.querySelectorAll('#rows tr[data-id]')].map(r => [r.dataset.id, r.innerText])"
    rows: list[tuple[str, str]] = driver.execute_script(script)
    return next((text for node_id, text in rows if node_id.startswith(short_id)), "")


def text_of(driver: Chrome, element: str) -> str:
    return driver.find_element(By.ID, element).text


def shown_rows(driver: Chrome) -> list[str]:
    """The names of the rows that are drawn, in order."""
    script = "return [...document.querySelectorAll('#rows tr[data-id] a')].map(a => a.textContent)"
    names: list[str] = driver.execute_script(script)
    return names


def chips(driver: Chrome) -> dict[str, str]:
    script = "return [...document.querySelectorAll('.chip')].map(c => [...c.children].map(e => e.textContent))"
    return {name: number for number, name in driver.execute_script(script)}


def save(driver: Chrome, name: str) -> None:
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    driver.save_screenshot(str(ARTEFACTS / f"{name}.png"))


async def shows(driver: Chrome, short_id: str, *words: str, within: float = SOON) -> None:
    row = ""

    async def all_there() -> bool:
        nonlocal row
        row = await asyncio.to_thread(row_of, driver, short_id)
        return bool(row) and all(word in row for word in words)

    try:
        await eventually(all_there, within)
    except AssertionError:
        raise AssertionError(f"the row is {row!r}, and lacks some of {words}") from None


async def says(driver: Chrome, element: str, *words: str) -> None:
    """Wait until an element has these words."""
    text = ""

    def all_there() -> bool:
        nonlocal text
        text = text_of(driver, element)
        return all(word in text for word in words)

    try:
        await eventually(all_there, SOON)
    except AssertionError:
        raise AssertionError(f"{element} is {text!r}, and lacks some of {words}") from None


async def test_a_node_that_is_killed_turns_on_the_page_without_reloading_it(world: World, chrome: Chrome) -> None:
    node = await world.start("seen")
    async with opened_page(world, chrome) as driver:
        await shows(driver, node.id[:12], "running", await world.ip(node), node.name)
        driver.execute_script("window.loadedOnce = true")
        await node.kill()
        await shows(driver, node.id[:12], "exited")
        await says(driver, "changes", "running → exited", node.name)
        await says(driver, "latency-text", "p50 ", "p99 ")
        await says(driver, "writes-text", "hint ")
        await says(driver, "head", "leader", "Docker ", world.database_name, "sweep", "drift ")
        await eventually(lambda: text_of(driver, "readiness").startswith("Ready"), SOON)
        assert driver.execute_script("return window.loadedOnce") is True
        save(driver, "killed")


async def test_problems_come_first_and_what_was_asked_for_is_calm(world: World, chrome: Chrome) -> None:
    calm = await world.start("a-calm")
    sick = await world.start("b-sick", healthcheck="flag", interval_s=0.5)
    died = await world.start("c-died", command=FAILING)
    loop = await world.start("d-loop", command=["sh", "-c", "exit 1"], restart="always")
    async with opened_page(world, chrome) as driver:
        await calm.stop()
        await died.exec(["touch", "/go"])
        for node, words in (
            (calm, ("exited",)),
            (sick, ("running", "unhealthy")),
            (died, ("exited", "died", "exit code 3")),
            (loop, ("crash-looping",)),
        ):
            await shows(driver, node.id[:12], *words)
        await eventually(
            lambda: chips(driver).items() >= {("unhealthy", "1"), ("died", "1"), ("crash-looping", "1")}, SOON
        )
        await eventually(lambda: driver.title.startswith("1 crash-looping, 1 died, 1 unhealthy"), SOON)
        assert shown_rows(driver) == [loop.name, died.name, sick.name, calm.name]
        assert "died" not in row_of(driver, calm.id[:12])
        await says(driver, "changes", "restarted ", " x in ", "exit code 3", "exit code 1")
        save(driver, "problems")
        driver.find_element(By.CSS_SELECTOR, "#problems li[data-key=died] button").click()
        await eventually(lambda: shown_rows(driver) == [died.name], SOON)
        assert "q=problem%3Adied" in driver.current_url
        assert text_of(driver, "shown") == "1 of 4 nodes shown."
        driver.back()
        await eventually(lambda: len(shown_rows(driver)) == 4, SOON)


async def test_a_node_has_a_view_of_its_own_by_keyboard_and_by_address(world: World, chrome: Chrome) -> None:
    node = await world.start("own", command=FAILING)
    async with opened_page(world, chrome) as driver:
        await shows(driver, node.id[:12], "running")
        await node.exec(["touch", "/go"])
        await shows(driver, node.id[:12], "died")
        driver.find_element(By.TAG_NAME, "body").send_keys("/")
        assert driver.switch_to.active_element.get_attribute("id") == "filter"
        driver.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
        driver.switch_to.active_element.send_keys(Keys.ENTER)
        await says(
            driver,
            "node",
            node.name,
            "died",
            "exit code 3",
            "eventwatch-node:1",
            "tool-server.node=own",
            "It will not be stopped as idle: it is exited",
            "Its life",
            "running → exited",
        )
        assert f"#/node/{node.id[:12]}" in driver.current_url
        save(driver, "node")
        own = driver.current_url
        driver.find_element(By.TAG_NAME, "body").send_keys(Keys.ESCAPE)
        await shows(driver, node.id[:12], "died")
        await eventually(lambda: driver.switch_to.active_element.text == node.name, SOON)  # where it was before
        await visit(driver, f"{own.partition('#')[0]}#/node/deadbeef0000")
        await says(driver, "node", "Nothing is known of such a node")
        assert "What it is" not in text_of(driver, "node")
        await visit(driver, own)
        await says(driver, "node", "exit code 3")
        await node.remove()
        await says(driver, "node", "It has no document any more.", "document deleted")


#: As the history has a crash loop: what comes again is counted, with its first time and its last (s).
LOOP = [
    {"status": "running", "from": 0, "until": 0, "count": 1},
    {"status": "exited", "from": 10, "until": 100, "count": 9},
    {"status": "restarting", "from": 11, "until": 101, "count": 9},
    {"status": "running", "from": 20, "until": 90, "count": 8},
]


async def test_the_folded_part_of_a_life_is_a_mix_and_no_single_status(world: World, chrome: Chrome) -> None:
    async with opened_page(world, chrome) as driver:
        script = """
            const done = arguments[arguments.length - 1];
            import('/static/life.js').then(({spans}) =>
                done(spans(...arguments).map(s => [s.statuses.join(), s.from, s.to, s.times])));"""

        async def spans(*told: Any) -> Any:
            return await asyncio.to_thread(driver.execute_async_script, script, *told)

        life = await spans(LOOP, 200, {"status": "restarting", "since": 101})
        assert [life[0], life[-1]] == [["running", 0, 10, 1], ["restarting", 101, 200, 1]]
        assert ["exited,restarting,running", 20, 90, 9] in life
        assert "running" not in [what for what, *_ in life[1:]]
        assert (await spans(LOOP, 200, {"status": "exited", "since": 150}))[-2:] == [
            ["restarting", 101, 150, 1],
            ["exited", 150, 200, 1],
        ]
        twice = [{"status": "running", "from": 0, "until": 20, "count": 2}, {**LOOP[1], "until": 10, "count": 1}]
        assert [what for what, *_ in await spans(twice, 30, None)] == ["running", "exited", "running"]
        assert await spans([], 30, {"status": "running", "since": 3}) == []


@pytest.mark.needs("cgroups")
async def test_one_node_that_cannot_be_vouched_for_is_a_note_and_no_alarm(
    world: World, failing: Failing, chrome: Chrome
) -> None:
    bad = await world.start("bad")
    async with opened_page(world, chrome) as driver:
        await shows(driver, bad.id[:12], "running")
        failing.bad.add(bad.id)
        await bad.pause()
        await eventually(lambda: "but for this: nodes: 1 " in text_of(driver, "readiness"), SOON)
        readiness = driver.find_element(By.ID, "readiness")
        assert readiness.text.startswith("Ready: ")
        assert readiness.get_attribute("class") == "good"
        assert bad.id[:12] in readiness.text
        await eventually(lambda: chips(driver).get("disagreeing") == "1", SOON)


async def test_a_document_that_says_something_else_than_the_engine_is_shown_as_that(
    world: World, chrome: Chrome
) -> None:
    """With dry_run nothing is put right, so that it stays wrong."""
    node = await world.start("wrong")
    async with opened_page(world, chrome, dry_run=True) as driver:
        await shows(driver, node.id[:12], "created", "disagreeing")
        driver.find_element(By.CSS_SELECTOR, "#rows a").click()
        await says(driver, "node", "The engine says something else than the document: status running")


async def test_the_page_still_tells_what_happened_before_a_restart(world: World, chrome: Chrome) -> None:
    node = await world.start("remembered")
    async with world.watching():
        await node.kill()
        await eventually(lambda: world.says(node, status="exited"))
    async with opened_page(world, chrome) as driver:
        await says(driver, "changes", "running → exited")


async def test_nodes_are_found_by_words_and_five_thousand_of_them_are_no_trouble(
    world: World, chrome: Chrome
) -> None:
    node = await world.start("needle")
    async with opened_page(world, chrome) as driver:
        await shows(driver, node.id[:12], "running")
        await asyncio.to_thread(driver.execute_async_script, FIVE_THOUSAND)
        await says(driver, "shown", "5001 of 5001 nodes shown.")
        assert len(shown_rows(driver)) < 60
        save(driver, "5000")
        find = driver.find_element(By.ID, "filter")
        for words, count in {
            "needle": 1,
            "unhealthy": 1000,
            "healthy": 1000,
            "status:exited": 2500,
            "status:exit": 0,
            "status:exited problem:died": 2500,
            "fake-4321": 1,
            "image:shop/web:1 -status:exited": 2500,
            "fake-43": 111,
            '"fake-43"': 1,
            'name:"fake-43"': 1,
            'name:"43"': 0,
            'status:"exited"': 2500,
            'reason:"exit code 3" fake-1': 556,
            "reason:code": 2500,
            "staus:exited": 0,
        }.items():
            find.clear()
            find.send_keys(words)
            await says(driver, "shown", f"{count} of 5001 nodes shown.")
        await says(driver, "empty", "“staus” is no field", "status, health", "reason")
        await eventually(lambda: "q=staus" in driver.current_url, SOON)
        find.clear()
        find.send_keys("fake")
        await says(driver, "shown", "5000 of 5001 nodes shown.")
        driver.find_element(By.CSS_SELECTOR, "th.c-name button").click()
        await eventually(lambda: shown_rows(driver)[:2] == ["fake-0", "fake-1"], SOON)
        driver.execute_script("document.getElementById('scroll').scrollTop = 1e9")
        await eventually(lambda: shown_rows(driver)[-1] == "fake-4999", SOON)
        driver.find_element(By.CSS_SELECTOR, "th.c-name button").click()
        driver.execute_script("document.getElementById('scroll').scrollTop = 0")
        await eventually(lambda: shown_rows(driver)[:1] == ["fake-4999"], SOON)
        find.send_keys(Keys.ARROW_DOWN)
        for _ in range(30):
            driver.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
        assert driver.switch_to.active_element.text == "fake-4969"


#: Rows that no engine has: half of them ended, some unhealthy.
FIVE_THOUSAND = """
    const done = arguments[0];
    import('/static/state.js').then(({nodes, tell}) => {
        for (let i = 0; i < 5000; i++) {
            const id = 'f' + String(i).padStart(11, '0'), ended = i % 2 === 1;
            nodes.set(id, {node_id: id, short_id: id, name: 'fake-' + i, image: 'shop/web:1', since: 1.8e9 - i,
                status: ended ? 'exited' : 'running',
                health: ['none', 'none', 'healthy', 'none', 'unhealthy'][i % 5],
                ip: ended ? '' : '10.0.' + (i >> 8) + '.' + (i & 255), port: 31942, restarts: i % 7,
                reason: ended ? 'exit code 3' : '',
                idle_at: ended ? null : 1.8e9 + i, problems: ended ? ['died'] : [], disagreement: {}});
        }
        tell('nodes');
        done();
    });"""


async def test_an_eventwatch_that_is_gone_is_seen_at_once_and_one_that_comes_back_too(
    world: World, chrome: Chrome
) -> None:
    node, address = await world.start("left"), free_address()
    async with world.watching(http_listen=address):
        await visit(chrome, f"http://{address}/")
        await shows(chrome, node.id[:12], "running")
    await says(chrome, "readiness", "eventwatch does not answer")
    await says(chrome, "as-of", "as of ")
    assert chrome.title.startswith("no answer")
    assert "silent" in (chrome.find_element(By.TAG_NAME, "body").get_attribute("class") or "")
    await shows(chrome, node.id[:12], "running")
    save(chrome, "silent")
    await node.kill()
    async with world.watching(http_listen=address):
        await shows(chrome, node.id[:12], "exited")
        await eventually(lambda: text_of(chrome, "readiness").startswith("Ready"), SOON)
        assert not chrome.find_element(By.ID, "as-of").is_displayed()
        await asyncio.to_thread(chrome.get, "about:blank")


async def test_more_tabs_than_a_browser_has_connections_are_all_answered(world: World) -> None:
    """Chromium has six for each server; a page that is not seen holds none."""
    node, address = await world.start("tabs"), free_address()
    async with world.watching(http_listen=address), browser() as chrome:
        first = chrome.current_window_handle
        await visit(chrome, f"http://{address}/")
        await says(chrome, "changes", "created → running")
        for _ in range(7):
            chrome.switch_to.new_window("tab")
            await visit(chrome, f"http://{address}/#/node/{node.id[:12]}")
            await says(chrome, "node", "What it is", "eventwatch-node:1")
        await node.kill()
        await says(chrome, "node", "running → exited")
        for handle in chrome.window_handles:
            chrome.switch_to.window(handle)
            await says(chrome, "readiness", "Ready")
        chrome.switch_to.window(first)
        await shows(chrome, node.id[:12], "exited")
        await says(chrome, "changes", "running → exited")
        assert text_of(chrome, "changes").count("created → running") == 1  # what is kept came twice


async def test_a_token_that_is_refused_is_said_to_be(world: World, chrome: Chrome, tmp_path: Path) -> None:
    node, address, file = await world.start("token"), free_address(), tmp_path / "token"
    for token in ("the-first-token-of-all", "another-one-of-them-now"):
        file.write_text(token)
        async with world.watching(http_listen=address, http_token_file=str(file)):
            if token.startswith("the-first"):
                await visit(chrome, f"http://any:{token}@{address}/")
                await shows(chrome, node.id[:12], "running")
            else:
                await says(chrome, "readiness", "refuses this page's token")
                assert chrome.title == "token refused · eventwatch"
                await asyncio.to_thread(chrome.get, "about:blank")


async def test_a_standby_says_calmly_who_leads(world: World, chrome: Chrome) -> None:
    engine_id = str((await world.docker.system.info())["ID"])
    holder = {"manager_id": "ab" * 16, "host": "elsewhere", "pid": 7, "epoch": 1, "engine_id": engine_id}
    times: dict[str, Any] = {"renewed_at": ago(0), "expires_at": ago(-3600)}
    page = {"url": "http://elsewhere:9471/", "manager_id": holder["manager_id"]}
    await world.checkers.insert_one(
        {"_id": checker_id(engine_id), "interval": 30, **holder, **times, "page": page}
    )
    address = free_address()
    async with watch(world.settings(http_listen=address)):
        await visit(chrome, f"http://{address}/")
        await says(chrome, "readiness", "Standing by")
        await says(chrome, "standby", "abababababab", "host elsewhere (pid 7)")
        assert chrome.find_element(By.ID, "readiness").get_attribute("class") == "calm"
        assert chrome.title.startswith("standby")
        assert not chrome.find_element(By.ID, "charts").is_displayed()
        assert chrome.find_element(By.LINK_TEXT, "Its page").get_attribute("href") == page["url"]
        await world.checkers.update_one({}, {"$set": {"page.url": "javascript:alert(1)"}})
        await says(chrome, "standby", "can be reached on that host only")
        save(chrome, "standby")
        await asyncio.to_thread(chrome.get, "about:blank")


async def test_without_nodes_the_page_says_what_to_do_and_a_phone_gets_cards(world: World, chrome: Chrome) -> None:
    async with opened_page(world, chrome, register_label="page.test") as driver:
        await says(driver, "empty", "Start a container with the label page.test")
        save(driver, "empty")
        name = "card-of-one-in-a-fleet-of-many-0001"
        node = await world.nodes.start(name, labels={"page.test": ""}, healthcheck="ok", interval_s=0.5)
        await shows(driver, node.id[:12], "running", "healthy")
        await says(driver, "changes", "registered")
        listed = driver.current_url.partition("#")[0]
        await visit(driver, f"{listed}#/node/{node.id[:12]}")
        await says(driver, "node", "nobody has written its last_req_time since it was registered")
        await world.collection.update_one({"_id": node.id}, {"$set": {"last_req_time": ago(0)}})
        await says(driver, "node", "It will be stopped as idle at ", "in 29 min")
        await visit(driver, listed)
        await shows(driver, node.id[:12], "healthy")
        for width in (1400, 1100, 850):
            driver.set_window_size(width, 860)
            await eventually(partial(driver.execute_script, f"return innerWidth <= {width}"), SOON)
            await eventually(partial(driver.execute_script, WHOLE_CELLS), SOON)
        driver.set_window_size(420, 860)
        await eventually(lambda: driver.execute_script("return innerWidth") < 700, SOON)
        card = driver.find_element(By.CSS_SELECTOR, f"#rows tr[data-id='{node.id[:12]}']")
        for cell in ("name", "status", "health", "address", "restarts"):
            assert card.find_element(By.CLASS_NAME, f"c-{cell}").is_displayed(), cell
        assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        save(driver, "phone")
        await node.remove()
        await says(driver, "changes", "document deleted", node.name)
        await asyncio.to_thread(driver.execute_async_script, MANY_GO)
        await says(driver, "changes", "300 nodes document deleted")
        driver.find_element(By.CSS_SELECTOR, "#changes summary").click()
        await says(driver, "changes", "gone-299", "its container was removed")
        assert len(driver.find_elements(By.CSS_SELECTOR, "#changes > li")) < 10


#: Whether what is short is whole at this width, and a long name's end is in sight.
WHOLE_CELLS = """
    const row = document.querySelector('#rows tr[data-id]'), scroll = document.getElementById('scroll');
    const end = row.querySelector('.end').getBoundingClientRect(), cell = row.cells[0].getBoundingClientRect();
    return [...row.cells].slice(2).every(c => c.scrollWidth <= c.clientWidth) && end.right <= cell.right
        && end.width > 0 && scroll.scrollWidth <= scroll.clientWidth;"""
#: The changes of 300 nodes that were removed together.
MANY_GO = """
    const done = arguments[0];
    import('/static/state.js').then(({tell}) => {
        for (let i = 0; i < 300; i++) {
            const id = 'e' + String(i).padStart(11, '0');
            const change = {node_id: id, short_id: id, name: 'gone-' + i, image: '', old: {}, new: {},
                deleted: true, cause: 'event', at_ns: 1.9e18 + i * 1e6, latency: null,
                reason: 'its container was removed'};
            tell('change', {live: false, change});
        }
        done();
    });"""


async def test_a_node_that_is_being_stopped_says_since_when_and_by_when(world: World, chrome: Chrome) -> None:
    stubborn = ["sh", "-c", "trap '' TERM; while :; do sleep 1; done"]
    node = await world.nodes.start("stubborn", command=stubborn, labels={"eventwatch.stop-timeout": "1h"})
    await world.insert(node, last_req_time=ago(3600))
    async with opened_page(world, chrome, idle_timeout=1, sweep_interval=0.5) as driver:
        await shows(driver, node.id[:12], "stopping", "is killed at ", "stopped by eventwatch: idle for ")
        driver.find_element(By.CSS_SELECTOR, "#rows a").click()
        await says(driver, "node", "It is being stopped since ", ", and is killed at ", " unless it ends before.")
        await node.kill()
        await says(driver, "node", "exited")


async def test_what_comes_from_outside_is_text_and_never_markup(world: World, chrome: Chrome) -> None:
    odd = "<img src=x onerror=alert(1)>"
    node = await world.nodes.start("odd", labels={odd: odd})
    await world.insert(node)
    async with opened_page(world, chrome) as driver:
        await shows(driver, node.id[:12], "running")
        await world.collection.update_one({"_id": node.id}, {"$set": {"short_id": odd}})
        driver.find_element(By.CSS_SELECTOR, "#rows a").click()
        await says(driver, "node", f"{odd}={odd}")
        assert driver.find_elements(By.CSS_SELECTOR, "img") == []


async def test_the_page_is_read_only_and_lets_nothing_foreign_in(world: World) -> None:
    address = free_address()
    async with world.watching(http_listen=address), httpx.AsyncClient(base_url=f"http://{address}") as client:
        page = await client.get("/")
        policy = page.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "://" not in page.text
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            for path in ("/", "/api/nodes", "/api/rows", "/api/overview", "/api/series", "/readyz", "/metrics"):
                assert (await client.request(method, path)).status_code == 405
        assert (await client.get("/static/../app.py")).status_code in {403, 404}


async def test_rows_come_again_only_when_they_changed(world: World) -> None:
    first, second = await world.start("first"), await world.start("second")
    address = free_address()
    async with world.watching(http_listen=address), httpx.AsyncClient(base_url=f"http://{address}") as client:

        async def rows(since: str) -> dict[str, Any]:
            return dict((await client.get("/api/rows", params={"since": since})).json())

        async def settled() -> str:
            whole = await rows("")
            states = {row["short_id"]: row["status"] for row in whole["rows"]}
            done = states == {first.id[:12]: "running", second.id[:12]: "running"}
            return str(whole["version"]) if done else ""

        await eventually(settled, SOON)
        await world.becomes_true()
        whole = await rows("")
        assert whole["reset"] is True
        later = await rows(whole["version"])
        assert (later["rows"], later["gone"], later["reset"]) == ([], [], False)
        await first.remove()

        async def news() -> dict[str, Any] | None:
            later = await rows(whole["version"])
            return later if later["gone"] else None

        told = await eventually(news, SOON)
        assert told["gone"] == [first.id[:12]]
        assert second.id not in json.dumps(told)


async def test_nothing_listens_when_http_is_off(world: World) -> None:
    async with world.watching(http_listen="") as watched:
        assert watched.app.settings.http_address is None
