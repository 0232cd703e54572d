"""The client of routers and monitors that our own tools use: JSON over HTTP, repeated while that is safe."""

import asyncio
import io
import ssl
from types import TracebackType
from typing import Any, Final, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec

from culm.errors import ClientFault, CulmError, Unavailable
from culm.frames import error_from_body
from culm.wire import (
    CancelAnswer,
    CancelledJob,
    CancelRequest,
    CountsAnswer,
    ErrorBody,
    ErrorsAnswer,
    GetJobAnswer,
    GetJobRequest,
    HeartbeatAnswer,
    HeartbeatRequest,
    JobRow,
    JobsAnswer,
    JobsQuery,
    JobView,
    PileUpsAnswer,
    PilotsAnswer,
    ReportAnswer,
    ReportRequest,
    ShardsAnswer,
    SiteWhyAnswer,
    SubmitAnswer,
    SubmitRequest,
    WhyAnswer,
)

TIMEOUT_S: Final = 15.0
PAUSE_S: Final = 0.25
MAX_PAUSE_S: Final = 5.0

A = TypeVar("A")


class Client:
    """One router (or monitor), one token. Every verb of /v1 is safe to repeat, so retryable errors are repeated.

    Args:
        url: e.g. http://127.0.0.1:25080
        token: without "Bearer".
        patience_s: how long a retryable error is tried again; 0 for a single try.
        connections: at most so many at once.
        ca_file: PEM of the certificate authority of an https URL; "" for the system's.
    """

    def __init__(
        self, url: str, token: str, *, patience_s: float = 30.0, connections: int = 100, ca_file: str = ""
    ) -> None:
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"}
        self._patience_s = patience_s
        self._connections = connections
        self._tls = ssl.create_default_context(cafile=ca_file) if ca_file else True
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "Client":
        self._session = aiohttp.ClientSession(
            headers=self._headers, connector=aiohttp.TCPConnector(limit=self._connections, ssl=self._tls)
        )
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def submit(self, request: SubmitRequest) -> SubmitAnswer:
        """POST /v1/submit."""
        return await self.post("submit", request, SubmitAnswer)

    async def get_job(self, request: GetJobRequest) -> GetJobAnswer:
        """POST /v1/get_job."""
        return await self.post("get_job", request, GetJobAnswer, timeout_s=TIMEOUT_S + request.wait_s)

    async def heartbeat(self, request: HeartbeatRequest) -> HeartbeatAnswer:
        """POST /v1/heartbeat."""
        return await self.post("heartbeat", request, HeartbeatAnswer)

    async def report(self, request: ReportRequest) -> ReportAnswer:
        """POST /v1/report."""
        return await self.post("report", request, ReportAnswer)

    async def cancel(self, request: CancelRequest) -> CancelAnswer:
        """POST /v1/cancel."""
        return await self.post("cancel", request, CancelAnswer)

    async def cancel_jobset(self, jobset: int) -> CancelAnswer:
        """End all jobs of a jobset, in as many calls as it takes; of each job the first outcome."""
        ended: dict[int, CancelledJob] = {}
        missing: set[str] = set()
        after: int | None = 0
        while after is not None:
            answer = await self.cancel(CancelRequest(jobset=jobset, after=after))
            missing.update(answer.missing_shards)
            for one in answer.jobs:
                ended.setdefault(one.id, one)
            after = answer.next
        return CancelAnswer(jobs=list(ended.values()), missing_shards=sorted(missing))

    async def job(self, identifier: int) -> JobView:
        """GET /v1/job/ID."""
        return await self.get(f"job/{identifier}", {}, JobView)

    async def jobs(self, query: JobsQuery) -> JobsAnswer:
        """GET /v1/jobs."""
        return await self.get("jobs", msgspec.to_builtins(query), JobsAnswer)

    async def why(self, identifier: int) -> WhyAnswer:
        """Why a job is not running, or what it does."""
        return await self.get(f"why/{identifier}", {}, WhyAnswer)

    async def site_why(self, site: str) -> SiteWhyAnswer:
        """What the pilots of a site ask for, get, and are refused for."""
        return await self.get(f"site_why/{quote(site, safe='')}", {}, SiteWhyAnswer)

    async def all_jobs(self, query: JobsQuery) -> tuple[list[JobRow], list[str]]:
        """Every page of a list, and the shards that were missing from any."""
        rows: list[JobRow] = []
        missing: set[str] = set()
        while True:
            page = await self.jobs(query)
            rows += page.jobs
            missing.update(page.missing_shards)
            if page.next is None:
                return rows, sorted(missing)
            query = msgspec.structs.replace(query, after=page.next)

    async def errors(self, hours: int) -> ErrorsAnswer:
        """The monitor's errors by (plane, code, site)."""
        return await self.get("errors", {"hours": hours}, ErrorsAnswer)

    async def pile_ups(self, hours: int) -> PileUpsAnswer:
        """The monitor's word on which state grows where, and why."""
        return await self.get("pile-ups", {"hours": hours}, PileUpsAnswer)

    async def pilots(self, *, site: str = "", minutes: int = 60, limit: int = 200) -> PilotsAnswer:
        """The monitor's list of the pilots that asked lately."""
        query: dict[str, Any] = {"minutes": minutes, "limit": limit} | ({"site": site} if site else {})
        return await self.get("pilots", query, PilotsAnswer)

    async def shards(self) -> ShardsAnswer:
        """The monitor's view of all shards."""
        return await self.get("shards", {}, ShardsAnswer)

    async def counts(self) -> CountsAnswer:
        """GET /v1/counts, of a monitor."""
        return await self.get("counts", {}, CountsAnswer)

    async def post(self, verb: str, request: msgspec.Struct, answer: type[A], *, timeout_s: float = TIMEOUT_S) -> A:
        """One request, repeated while it may be. Raises CulmError."""
        options: dict[str, Any] = {
            "data": msgspec.json.encode(request),
            "headers": {"Content-Type": "application/json"},
        }
        return await self._repeat("POST", verb, options, (answer, timeout_s))

    async def get(self, path: str, query: dict[str, Any], answer: type[A]) -> A:
        """One read, repeated while it may be. Raises CulmError."""
        options = {"params": {name: str(value) for name, value in query.items()}}
        return await self._repeat("GET", path, options, (answer, TIMEOUT_S))

    async def _repeat(self, method: str, path: str, options: dict[str, Any], expect: tuple[type[A], float]) -> A:
        loop = asyncio.get_running_loop()
        deadline, pause_s = loop.time() + self._patience_s, PAUSE_S
        while True:
            try:
                return await self._ask(method, path, options, expect)
            except CulmError as error:
                pause_s = max(pause_s, min(error.retry_after_s or 0.0, MAX_PAUSE_S))
                if not error.retryable or loop.time() + pause_s > deadline:
                    raise
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, MAX_PAUSE_S)

    async def _ask(self, method: str, path: str, options: dict[str, Any], expect: tuple[type[A], float]) -> A:
        if self._session is None:
            raise RuntimeError("use the client as a context manager")
        kind, timeout_s = expect
        url = f"{self._url}/v1/{path}"
        if "data" in options:
            # A stream, anew for each try: aiohttp warns of large bodies that are bytes.
            options = options | {"data": io.BytesIO(options["data"])}
        try:
            async with self._session.request(
                method, url, timeout=aiohttp.ClientTimeout(total=timeout_s), **options
            ) as response:
                body = await response.read()
                if response.status == 200:
                    return msgspec.json.decode(body, type=kind)
                raise error_of(response.status, body)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unavailable("unreachable", f"no answer from {self._url}: {error or type(error).__name__}") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Unavailable("bad_answer", f"{self._url} gave an answer that is not ours: {error}") from None


def error_of(status: int, body: bytes) -> CulmError:
    """The error of an answer that is not 200, of the kind that the router raised."""
    try:
        return error_from_body(msgspec.json.decode(body, type=_Envelope).error)
    except (msgspec.DecodeError, UnicodeDecodeError):
        if status >= 500:
            return Unavailable("bad_answer", f"HTTP {status}")
        return ClientFault("bad_answer", f"HTTP {status}", http_status=status)


class _Envelope(msgspec.Struct):
    error: ErrorBody
