"""Notices that nodes run and the database knows none of them: most likely it is not the manager's database.

Why: eventwatch is content with any database. Beside a manager whose documents are elsewhere it would be ready, and
useless, for ever.

Contract: asks the engine only while no running node has a document, so that it costs nothing where all is well.
Not promised: to notice a wrong database that holds documents of this engine's running nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

from loguru import logger

from eventwatch.core.clock import Clock
from eventwatch.core.errors import EventwatchError
from eventwatch.engine.docker import DockerEngine
from eventwatch.engine.protocol import Engine
from eventwatch.settings.model import Settings

#: Seconds between two looks.
LOOK: Final = 30.0


class Undocumented:
    """The note about nodes of which none has a document. `documented` are the ids of those that have one."""

    def __init__(
        self, engine: Engine, settings: Settings, documented: Callable[[], Collection[str]], clock: Clock
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._documented = documented
        self._clock = clock
        self.notes: list[str] = []

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        logged = False
        while True:
            await self._clock.sleep(min(LOOK, self._settings.sweep_interval))
            self.notes = await self.look()
            if self.notes and not logged:
                logged = True
                logger.warning("{}", self.notes[0].removeprefix("nodes: "))

    async def look(self) -> list[str]:
        """The note, or none; what the engine does not tell is no reason for one."""
        if not isinstance(self._engine, DockerEngine) or self._documented():
            return []
        try:
            running = await running_undocumented(self._engine, self._settings)
        except EventwatchError:
            return self.notes
        return [f"nodes: {doubt(len(running), self._settings)}"] if running else []


async def running_undocumented(engine: DockerEngine, settings: Settings) -> list[str]:
    """The containers that run on the node network for so long that they should have documents."""
    return await engine.list_on_network(settings.node_network, older_than=settings.orphan_grace)


def doubt(count: int, settings: Settings) -> str:
    """What to say of so many nodes of which none has a document."""
    containers = f"{count} containers run" if count > 1 else "a container runs"
    database = settings.mongo_database
    return (
        f"{containers} on {settings.node_network} and none has a document: is {database} the manager's database?"
    )
