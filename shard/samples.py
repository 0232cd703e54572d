"""What the tallies said hour by hour: taken at the first look of each hour, kept for a bounded time.

Final states are counted with the archive, so that what moves there does not look as if it had gone.
"""

from collections import Counter
from typing import Final

from culm.states import State
from culm.wire import ShardPileUps
from shard.database import Database, Transaction
from shard.driver import DuplicateKeyError
from shard.growth import Level, Window
from shard.metrics import SAMPLES_TAKEN

HOUR_S: Final = 3600
ROWS_PER_STATEMENT: Final = 500
_MICROSECONDS: Final = 1_000_000


class Samples:
    """The hourly samples of one shard."""

    def __init__(self, database: Database, kept_hours: int) -> None:
        self._database = database
        self._kept_hours = kept_hours
        self._taken = 0
        """The last hour that is known to be sampled."""

    async def turn(self) -> None:
        """One turn of a background loop: sample the hour if nobody did, drop a few old rows. Raises Unavailable.

        Safe to retry: yes.
        """
        hour = int(await self.now()) // HOUR_S
        if hour != self._taken:
            await self._take(hour)
            self._taken = hour
        oldest = hour - self._kept_hours + 1
        await self._database.run("write", lambda tx: tx.execute("drop_old_samples", oldest))
        await self._database.run("write", lambda tx: tx.execute("drop_old_sampled", oldest))

    async def now(self) -> float:
        """The database's time, seconds since the epoch. Raises Unavailable."""
        rows = await self._database.run("user", lambda tx: tx.fetch("database_time"))
        return float(rows[0][0]) / _MICROSECONDS

    async def compare(self, call: ShardPileUps) -> tuple[Window, dict[int, dict[State, Level]]]:
        """What there is now against the samples of the last hours, by slot and state; a user's of his VO.

        Raises Unavailable. Safe to retry: yes.
        """
        now, is_user, vo = await self.now(), int(call.principal.role == "user"), call.principal.vo
        this = int(now) // HOUR_S
        sampled = await self._database.run("user", lambda tx: tx.fetch("read_sampled", this - call.hours))
        before = [(hour, at / _MICROSECONDS) for hour, at in sampled if hour < this]
        if not before:
            return Window(0, now, now, now), {}
        (first, first_at), (last, last_at) = before[0], before[-1]
        levels: dict[int, dict[State, Level]] = {}
        for (slot, state, of_vo), n_jobs in (await self._counted()).items():
            if not is_user or of_vo == vo:
                of_slot = levels.setdefault(slot, {})
                of_slot[state] = Level(of_slot.get(state, Level()).n_now + n_jobs)
        arguments = (first, last, first, last, is_user, vo)
        rows = await self._database.run("user", lambda tx: tx.fetch("sampled_levels", *arguments))
        for slot, name, n_sum, n_first, n_last in rows:
            of_slot, state = levels.setdefault(slot, {}), State(name)
            of_slot[state] = Level(of_slot.get(state, Level()).n_now, int(n_sum), int(n_first), int(n_last))
        return Window(len(before), first_at, last_at, now), levels

    async def _counted(self) -> Counter[tuple[int, State, str]]:
        """Jobs now by slot, state and VO."""
        rows = await self._database.run("user", lambda tx: tx.fetch("counts"))
        rows = [*rows, *await self._database.run("user", lambda tx: tx.fetch("archived_counts"))]
        counted: Counter[tuple[int, State, str]] = Counter()
        for slot, state, vo, n_jobs in rows:
            counted[slot, State(state), vo] += int(n_jobs)
        return counted

    async def _take(self, hour: int) -> None:
        rows = [(hour, *key, n_jobs) for key, n_jobs in sorted((await self._counted()).items()) if n_jobs > 0]

        async def work(tx: Transaction) -> None:
            await tx.execute("insert_sampled", hour)
            for start in range(0, len(rows), ROWS_PER_STATEMENT):
                await tx.execute_rows("insert_samples", rows[start : start + ROWS_PER_STATEMENT])

        try:
            await self._database.run("write", work)
        except DuplicateKeyError:
            # The shard was restarted in this hour.
            return
        SAMPLES_TAKEN.inc()
