"""A get_job request under way: who waits for its answer, and what it was woken for."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from culm.errors import CulmError
from culm.matching import Offer
from culm.wire import GetJobAnswer, ShardGetJob
from shard.hints import ClassKey


@dataclass(frozen=True)
class Wake:
    """Why a parked request was woken: so many jobs of a class became ready; None is a number not known."""

    key: ClassKey
    n_jobs: int | None


@dataclass(eq=False)
class Request:
    """One request, with all its clients.

    `arrived` numbers the requests in their order, `key` is what makes two calls the same one, `slots` are the call's.
    """

    call: ShardGetJob
    arrived: int
    key: tuple[str, str]
    slots: tuple[int, ...]
    deadline: float
    """Loop time until which it may wait."""
    clients: list["asyncio.Future[GetJobAnswer]"] = field(default_factory=list)
    """Who waits for the answer; a repeat of a request under way joins it."""
    n_clients: int = 0
    """Of these the ones that are still there."""
    answer: GetJobAnswer | None = None
    """What it was answered."""
    done: bool = False
    """Answered, or refused."""
    looked_at: dict[ClassKey, int] = field(default_factory=dict)
    """The classes that fitted at the last look, each with its number of announcements."""
    woken: Wake | None = None
    """What it was woken for; what it does not take of that is passed on to the next that waits."""
    n_collisions: int = 0
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)

    @property
    def offer(self) -> Offer:
        """What the pilot and its computing queue offer."""
        return self.call.offer

    @property
    def n_jobs(self) -> int:
        """How many jobs it wants."""
        return self.call.n_jobs

    def join(self, gone: Callable[["Request"], None]) -> "asyncio.Future[GetJobAnswer]":
        """One more client; `gone` is called when the last one has cancelled."""
        client: asyncio.Future[GetJobAnswer] = asyncio.get_running_loop().create_future()
        self.clients.append(client)
        self.n_clients += 1
        client.add_done_callback(partial(self._client_done, gone))
        return client

    def give(self, answer: GetJobAnswer) -> None:
        """Answer it, once."""
        if not self.done:
            self.done, self.answer = True, answer
            for client in self.clients:
                if not client.done():
                    client.set_result(answer)

    def refuse(self, error: CulmError) -> None:
        """Refuse it, unless it is answered."""
        if not self.done:
            self.done = True
            for client in self.clients:
                if not client.done():
                    client.set_exception(error)
                    # Nobody may be left to look at it, which is no fault.
                    client.exception()

    def _client_done(self, gone: Callable[["Request"], None], client: "asyncio.Future[GetJobAnswer]") -> None:
        if client.cancelled():
            self.n_clients -= 1
            if self.n_clients == 0:
                gone(self)
