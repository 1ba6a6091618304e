"""Decides which documents of vanished containers may be deleted: the one place where a 404 becomes a deletion.

The rules, in order:
- Only an engine that last had a container may say that it is gone, by the record of owners (which no manager's
  replace of a document touches) or else by the document's own stamp. Also not another engine of the same id:
  a live one is found out by `TwinWatch`, one whose watcher is away by the host's name on record.
- What nobody ever owned is a manager's leftover, or a node of an engine whose watcher is still to come. It goes
  only where the database bears no trace of another engine, and only after `LEFTOVER_GRACE`, said when it begins.
- `MassBrake`: what would delete more than `delete_limit` of the own nodes at once deletes nothing until several
  sweeps in a row, and a minute, agree. The same brake holds mass stops (see idle.py).

A `destroy` event needs none of this: it is the word of the engine that had the container until then.

Not promised: that the documents of a host that is gone for good are ever deleted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final

from loguru import logger

from eventwatch.core.clock import Clock
from eventwatch.core.facts import Owner, Recorded
from eventwatch.core.policy import Ownership, mass_limit, ownership
from eventwatch.engine.protocol import EngineInfo
from eventwatch.pipeline.twins import TwinWatch
from eventwatch.store.connection import Store

#: Sweeps and seconds that must agree before more than a limit of nodes is deleted, or stopped.
AGREEING_SWEEPS: Final = 3
AGREEING_SECONDS: Final = 60.0
#: Seconds for which what nobody ever owned must have been unknown to the engine.
LEFTOVER_GRACE: Final = 180.0

_NOTHING: Final[Mapping[str, Owner]] = {}


@dataclass(slots=True)
class MassBrake:
    """Refuses to act on many nodes at once until three sweeps in a row, and a minute, agree on them."""

    agreed: set[str] = field(default_factory=set)
    sweeps: int = 0
    since: float = 0.0

    def release(self, doomed: set[str], limit: int, *, now: float) -> set[str]:
        """The ids of `doomed` that may be acted on now (monotonic, s): all, none, or what the sweeps agreed on."""
        if len(doomed) <= limit:
            self.agreed, self.sweeps = set(), 0
            return doomed
        if not self.sweeps:
            self.agreed, self.since = set(doomed), now
        self.agreed &= doomed
        self.sweeps += 1
        if self.sweeps < AGREEING_SWEEPS or now - self.since < AGREEING_SECONDS:
            return set()
        allowed, self.agreed, self.sweeps = self.agreed, set(), 0
        return allowed

    @property
    def engaged(self) -> bool:
        """Whether it refuses right now."""
        return self.sweeps > 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What may be deleted, and how many documents are spared: by the brake, or because they are not ours."""

    allowed: frozenset[str] = frozenset()
    braked: int = 0
    spared: int = 0


class Deletions:
    """Judges vanished containers for one engine.

    `grace` (s) is how long nobody's documents must have been missing: 0 for a manager that sweeps by itself, None
    for a single pass by hand, which deletes none of them.
    """

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        twins: TwinWatch,
        delete_limit: int | None = None,
        brake: MassBrake | None = None,
        grace: float | None = 0.0,
    ) -> None:
        self._store = store
        self._clock = clock
        self.twins = twins
        self._delete_limit = delete_limit
        self.brake = brake
        self._grace = grace
        #: When each document that nobody owns was first found without a container (monotonic, s).
        self._missing_since: dict[str, float] = {}
        #: Documents that were spared and told of.
        self._told: set[str] = set()

    async def judge(
        self,
        missing: Mapping[str, Recorded],
        *,
        engine: EngineInfo,
        found: Collection[str],
        owned: Mapping[str, Owner] = _NOTHING,
        manager_id: str = "",
        asked: bool = False,
        force: bool = False,
    ) -> Verdict:
        """Which documents of `missing` containers may go; `found` are those that the engine has.

        `owned` is what we know of our engine's containers and may not have put on record yet.
        `asked`: a manager asks for this one node by itself, which no brake and no grace holds up. `force` lifts
        the brake for what `engine` owns, by whichever name of its host, and nothing else. Raises StoreError.
        """
        self._told &= missing.keys()
        await self.twins.meet(await self._store.peers(engine.id, besides=manager_id), engine_id=engine.id)
        if not missing:
            self._ripe(set())
            self._brake(set(), own=len(found), force=force)
            return Verdict()
        owners = {i: owner for i in missing if (owner := owned.get(i))}
        owners |= await self._store.read_owners(missing)
        whose = {i: ownership(node, owners.get(i), engine_id=engine.id) for i, node in missing.items()}
        own = {i for i, owner in whose.items() if owner is Ownership.OWN}
        nobodys = {i for i, owner in whose.items() if owner is Ownership.NOBODYS}
        if not await self.twins.may_delete(engine.id):
            return Verdict(spared=len(missing))
        if not force:
            own -= await self._of_another_host(own, owners, engine=engine, found=found)
        if nobodys and (other := await self._store.trace_of_others(engine.id)):
            self._tell_spared(nobodys, other)
            nobodys = set()
        if asked:
            return Verdict(frozenset(own | nobodys), spared=len(missing) - len(own | nobodys))
        ripe = self._ripe(nobodys)
        braked = own if self._grace else own | ripe  # where no grace has agreed on them, the brake must
        released = self._brake(braked, own=len(found) + len(own), force=force)
        allowed = frozenset(released | (ripe - braked))
        held = len(braked - released)
        return Verdict(allowed, held, len(missing) - len(allowed) - held)

    def _brake(self, doomed: set[str], *, own: int, force: bool) -> set[str]:
        if self.brake is None or force:
            return doomed
        limit = mass_limit(self._delete_limit, own)
        allowed = self.brake.release(doomed, limit, now=self._clock.monotonic())
        if self.brake.engaged:
            logger.warning(
                "Brake: {} of {} nodes are gone from the engine, more than delete_limit ({}): nothing is deleted "
                "until {} sweeps in a row and {:.0f} s agree, or `eventwatch sweep --force`",
                len(doomed),
                own,
                limit,
                AGREEING_SWEEPS,
                AGREEING_SECONDS,
            )
        return allowed

    async def _of_another_host(
        self, own: set[str], owners: Mapping[str, Owner], *, engine: EngineInfo, found: Collection[str]
    ) -> set[str]:
        """Those of our engine's id that a host of another name had, unless the host was only renamed.

        A rename is proven by a container that is still here and was on record under the old name.
        """
        strange = {
            i: owner.host for i in own if (owner := owners.get(i)) and owner.host and owner.host != engine.name
        }
        if not strange:
            return set()
        hosts = set(strange.values())
        here = await self._store.read_owners(found)
        renamed = {owner.host for owner in here.values() if owner.engine_id == engine.id} & hosts
        for host in renamed:
            await self._store.rename_host(engine.id, str(host), engine.name)
        spared = {node_id for node_id, host in strange.items() if host not in renamed}
        if spared - self._told:
            logger.warning(
                "{} nodes are on record for host {} with this engine's id, not for {}, and their containers are "
                "not here: they are left alone. If both hosts exist, give one engine an id of its own; if the "
                "host was renamed, `eventwatch sweep --force`",
                len(spared),
                ", ".join(sorted({str(strange[i]) for i in spared})[:3]),
                engine.name,
            )
        self._told |= spared
        return spared

    def _tell_spared(self, nobodys: set[str], other: str) -> None:
        if nobodys - self._told:
            logger.info(
                "{} documents belong to no engine on record, and this engine has no such containers: they are "
                "left alone, as the database also serves engine {}",
                len(nobodys),
                other,
            )
        self._told |= nobodys

    def _ripe(self, nobodys: set[str]) -> set[str]:
        for node_id in self._missing_since.keys() - nobodys:
            del self._missing_since[node_id]
        if self._grace is None:
            return set()
        now = self._clock.monotonic()
        new = nobodys - self._missing_since.keys()
        if new and self._grace:
            logger.warning(
                "{} documents belong to no engine on record, and this engine has no such containers: they are "
                "deleted in {:.0f} s unless another engine shows up",
                len(new),
                self._grace,
            )
        self._missing_since.update(dict.fromkeys(new, now))
        return {i for i in nobodys if now - self._missing_since[i] >= self._grace}
