"""The fleet on the status page of any of its eventwatches, in a real browser."""

from __future__ import annotations

from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from eventwatch.pipeline.fleet import SILENCE
from tests.e2e.test_engines import DEAD, add_engine, ids
from tests.e2e.test_page import browser, opened_page, save, says, shows, text_of
from tests.kit.waiting import eventually
from tests.kit.world import World

SOON = 30.0


def engines(driver: Chrome) -> list[str]:
    script = "return [...document.querySelectorAll('#engines > li')].map(each => each.innerText)"
    found: list[str] = driver.execute_script(script)
    return found


async def test_other_engines_are_shown_first_with_those_that_need_somebody_and_their_nodes_on_demand(
    world: World,
) -> None:
    node = await world.start("ours")
    async with browser() as driver:
        async with opened_page(world, driver) as page:
            await shows(page, node.id[:12], "running")
            assert not page.find_element(By.ID, "fleet").is_displayed(), "one engine alone is no fleet"
        await add_engine(world, DEAD, expires_in=-SILENCE - 60, nodes=ids(4))
        await add_engine(world, "away", expires_in=-SILENCE + 300, nodes=ids(2, "e"))
        async with opened_page(world, driver) as page:
            await says(page, "fleet-summary", "1 dead", "1 away", "1 ready")
            first, *_ = shown = engines(page)
            assert len(shown) == 3
            for word in ("host-b", "dead", "4 running", f"eventwatch engines forget {DEAD}"):
                assert word in first
            page.find_element(By.CSS_SELECTOR, "#engines li:first-child button").click()
            await eventually(lambda: ids(4)[1][:12] in engines(page)[0], SOON)
            assert ids(2, "e")[1][:12] not in text_of(page, "engines")
            save(page, "fleet")
            page.find_element(By.CSS_SELECTOR, "#engines li:first-child button").click()
            await eventually(lambda: ids(4)[1][:12] not in engines(page)[0], SOON)
            await shows(page, node.id[:12], "running")
