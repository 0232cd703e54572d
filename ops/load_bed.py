"""What a load run needs beside its clients: sites, tokens and jobs before it, faults and processor times during it."""

import asyncio
import contextlib
import os
import platform
import random
import secrets
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from culm.client import Client
from culm.errors import ClientFault, CulmError, Unavailable
from culm.registry_wire import TopologyAnswer
from culm.states import State
from culm.topology import CENTRAL, Topology
from culm.wire import JobsQuery, Principal, SubmitRequest
from loadtest.bench import cpu
from loadtest.book import Result
from loadtest.orders import ENVIRONMENT, Order, Target, new_key, specs, weights
from loadtest.runs import CLIENT, OTHERS, CpuUse, Machine, cpu_use
from loadtest.scenarios import Scenario
from ops.cli.options import router
from ops.cli.registry import register_sites
from ops.cluster import control
from ops.cluster.child import die_with_parent
from ops.cluster.layout import Layout
from ops.doctor.machine import sync_ms

ROOT: Final = Path(__file__).parents[1]
VO: Final = "load"
SPARE_S: Final = 3600.0
"""How much longer than the run its tokens are good."""
SAMPLE_S: Final = 0.5
START_S: Final = 60.0
END_S: Final = 90.0
LEAVE_S: Final = 5.0
CLEAR_S: Final = 10.0
FEED: Final = 1000
SECRET_WORDS: Final = ("password", "token", "secret", "key")
_RUN_S: Final = "the clients did not {} within {:.0f} s, see {}"

Note = Callable[[str], None]
Event = Callable[[Note], Coroutine[Any, Any, None]]
"""What is done to the cluster during a run; it notes what it does."""


# --- before ----------------------------------------------------------------------------------------------------------


def queue_of(site: str) -> str:
    """The computing queue of a site of a load run."""
    return f"{site}-load"


@contextlib.asynccontextmanager
async def own_jobset(home: Layout, token: str) -> AsyncIterator[int]:
    """A jobset of the run's own; whatever is left of its jobs is ended, however the run ends."""
    jobset = secrets.randbits(47) | 1
    try:
        yield jobset
    except BaseException:
        with contextlib.suppress(CulmError):
            await _end_jobs(home, token, jobset)
        raise
    await _end_jobs(home, token, jobset)


async def _end_jobs(home: Layout, token: str, jobset: int) -> None:
    async with Client(home.router_url, token, patience_s=CLEAR_S) as client:
        deadline = time.monotonic() + CLEAR_S
        while missing := (await client.cancel_jobset(jobset)).missing_shards:
            # One that was stopped a moment ago is not yet heard again.
            if time.monotonic() > deadline:
                raise Unavailable(
                    "shard_down", f"jobs of the run are left on {', '.join(missing)}: culm jobset kill {jobset}"
                )
            await asyncio.sleep(SAMPLE_S)


async def targets(folder: Path, scenario: Scenario, valid_s: float) -> list[Target]:
    """Register the scenario's sites, some in a region of every shard that runs here; with their pilots' tokens."""
    home = control.running(folder)
    known = await _topology(folder)
    up = {one.authority for one in home.homes if (told := control.status(one.folder)) is not None and told.alive}
    regions: dict[str, str] = {}
    for section in known.sections.values():
        if section.authority in up:
            # The first region of every shard: a catalogue of regions would only thin out the load.
            first: dict[str, str] = {}
            for name, region in section.regions.items():
                for shard in region.shards[:1]:
                    first.setdefault(shard, name)
            regions |= {
                f"LOAD-{region}-{n}": region
                for region in first.values()
                for n in range(1, scenario.sites_per_region + 1)
            }
    authority_of = await register_sites(folder, known, regions, queue_of, "a load run")
    now = await _topology(folder)
    shares = weights(len(regions), scenario.hot_share)
    return [
        Target(
            site=site,
            queue=queue_of(site),
            shard=now.placement[now.sites[site].slots[0]].shard,
            weight=share,
            pilot_token=home.home(authority_of[site]).ring.issue(
                Principal(role="pilot", subject="load-pilot", authority=authority_of[site], queues=[queue_of(site)]),
                valid_s,
            ),
        )
        for site, share in zip(regions, shares, strict=True)
    ]


async def _topology(folder: Path) -> Topology:
    async with router(folder, "admin") as client:
        return Topology((await client.get("topology", {}, TopologyAnswer)).sections)


def user_token(home: Layout, valid_s: float) -> str:
    """A token of the submitter. Raises ClientFault(no_keys)."""
    if not home.ring.kids():
        raise ClientFault("no_keys", f"{home.keys} holds no signing key of {CENTRAL}", http_status=404)
    return home.ring.issue(Principal(role="user", subject="load", authority=CENTRAL, vo=VO), valid_s)


async def feed(home: Layout, token: str, some: list[Target], jobset: int, n_jobs: int) -> dict[int, tuple[float, str]]:
    """Make the jobs that wait when the run begins; when each was accepted, for which site."""
    rng = random.Random(jobset)  # noqa: S311  # spreads load, no secret
    fed: dict[int, tuple[float, str]] = {}
    async with Client(home.router_url, token, patience_s=60.0) as client:
        while len(fed) < n_jobs:
            jobs = specs(some, min(FEED, n_jobs - len(fed)), rng)
            answer = await client.submit(SubmitRequest(idempotency_key=new_key(), jobs=jobs, jobset=jobset))
            now = time.time()
            fed |= {job: (now, spec.site) for spec, job in zip(jobs, answer.ids, strict=True) if job is not None}
    return fed


def machine(folder: Path) -> Machine:
    """This one, with what its disk costs a commit."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    return Machine(
        platform=platform.platform(),
        python=platform.python_version(),
        cpu=names[0] if names else platform.machine(),
        n_cpus=len(os.sched_getaffinity(0)),
        memory_mb=memory,
        sync_ms=sync_ms(folder),
        load_before=os.getloadavg()[0],
    )


def commit() -> str:
    """The source's commit, with a `+` where files were changed; "" where it is no git checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def settings_of(home: Layout) -> dict[str, str]:
    """What every process of the cluster was told, file by file, as JSON; a secret is left out."""
    found = {}
    for one in home.homes:
        for path in sorted(one.configs.glob("*.toml")):
            told = _without_secrets(tomllib.loads(path.read_text(encoding="utf-8")))
            found[path.stem] = msgspec.json.encode(told, order="sorted").decode()
    return found


def _without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_secrets(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if not name.endswith(SECRET_WORDS)
    }


# --- during ----------------------------------------------------------------------------------------------------------


class CpuBook:
    """Processor times by name, sampled; a process that is restarted goes on under its name."""

    def __init__(self, began_at: float) -> None:
        self._began_at = began_at
        self._seen: dict[str, dict[int, float]] = {}
        self._totals: dict[str, float] = {}
        self._samples: dict[str, list[tuple[float, float]]] = {}
        self._machine_s: float | None = None
        self._others_s = 0.0

    def sample(self, pids: Mapping[str, int], now: float) -> None:
        """Look at these processes and their children, and at what all others of this machine use."""
        before_us, machine_s = sum(self._totals.values()), cpu.machine_seconds()
        for name, pid in pids.items():
            current = cpu.of_tree(pid)
            before = self._seen.get(name)
            if before is not None:
                # A child that is new has used all that it used since the last look.
                used = sum(max(0.0, seconds - before.get(one, 0.0)) for one, seconds in current.items())
                self._totals[name] = self._totals.get(name, 0.0) + used
            self._seen[name] = current
            self._samples.setdefault(name, []).append((now - self._began_at, self._totals.get(name, 0.0)))

        ours_s = sum(self._totals.values()) - before_us
        if self._machine_s is not None:
            self._others_s += max(0.0, machine_s - self._machine_s - ours_s)
        self._machine_s = machine_s
        self._samples.setdefault(OTHERS, []).append((now - self._began_at, self._others_s))

    def uses(self) -> dict[str, CpuUse]:
        """All of them."""
        return {name: cpu_use(samples) for name, samples in self._samples.items()}


def pids_of(home: Layout) -> dict[str, int]:
    """The processes of the cluster by name."""
    told = [control.status(one.folder) for one in home.homes]
    return {p.name: p.pid for one in told if one is not None and one.alive for p in one.processes if p.pid}


async def watch(home: Layout, book: CpuBook) -> None:
    """Sample the cluster, and this process as its client, until cancelled."""
    while True:
        book.sample(pids_of(home) | {CLIENT: os.getpid()}, time.time())
        await asyncio.sleep(SAMPLE_S)


class Clients:
    """Locust in a process of its own, with the cluster's processes watched beside it."""

    def __init__(self, home: Layout, folder: Path, order: Order, options: Iterable[str]) -> None:
        self.cpu = CpuBook(0.0)
        self.events: list[tuple[float, str]] = []
        self._home, self._folder, self._order, self._options = home, folder, order, list(options)
        self._log = folder / "locust.log"

    async def run(self, happen: Event | None) -> Result:
        """From begin to end. Raises CulmError(load_failed)."""
        order = self._folder / "order.json"
        order.touch(mode=0o600)
        order.write_bytes(msgspec.json.encode(self._order))
        try:
            with self._log.open("wb") as log:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", "locust", "-f", str(ROOT / "loadtest" / "locustfile.py")),
                    *self._options,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self._folder,
                    env=os.environ | {ENVIRONMENT: str(order), "PYTHONPATH": str(ROOT)},
                    preexec_fn=die_with_parent,
                    start_new_session=True,
                )
            try:
                result = await self._watch(process, happen)
                # It ends by itself when it has written its result.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LEAVE_S):
                        await process.wait()
                return result
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        finally:
            for path in (order, Path(self._order.more)):
                path.unlink(missing_ok=True)

    async def _watch(self, process: asyncio.subprocess.Process, happen: Event | None) -> Result:
        began = Path(self._order.began)
        await self._until(began.exists, process, START_S, "begin")
        began_at = float(await asyncio.to_thread(began.read_text, "utf-8"))
        self.cpu = CpuBook(began_at)
        happening = None if happen is None else asyncio.create_task(happen(self._note(began_at)))
        into = Path(self._order.into)

        def over() -> bool:
            now = time.time()
            self.cpu.sample(pids_of(self._home) | {CLIENT: process.pid}, now)
            return into.exists()

        try:
            await self._until(over, process, self._order.seconds + END_S, "end")
            if happening is not None:
                await happening
        finally:
            if happening is not None:
                happening.cancel()
                await asyncio.gather(happening, return_exceptions=True)
        return msgspec.json.decode(await asyncio.to_thread(into.read_bytes), type=Result)

    def _note(self, began_at: float) -> Note:
        return lambda text: self.events.append((time.time() - began_at, text))

    async def _until(
        self, condition: Callable[[], bool], process: asyncio.subprocess.Process, limit_s: float, what: str
    ) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            if process.returncode is not None and not condition():
                tail = self._log.read_text(encoding="utf-8", errors="replace")[-500:]
                raise CulmError("load_failed", f"the clients ended with {process.returncode}: {tail}")
            if time.monotonic() > deadline:
                raise CulmError("load_failed", _RUN_S.format(what, limit_s, self._log))
            await asyncio.sleep(SAMPLE_S)


def event(home: Layout, scenario: Scenario, shard: str, more: Path) -> Event | None:
    """What is to happen to the cluster in the middle of a run, if anything.

    `shard` is the one that is killed, `more` where the clients look for further sites.
    """
    seconds = scenario.seconds

    async def kill(note: Note) -> None:
        await asyncio.sleep(seconds / 3)
        os.kill(_pid(home, shard), signal.SIGKILL)
        note(f"{shard} was killed")

    async def pause(note: Note) -> None:
        await asyncio.sleep(seconds / 3)
        shards = (await _topology(home.folder)).shards
        pids = {name: pid for name, pid in pids_of(home).items() if name in shards}
        try:
            for pid in pids.values():
                os.kill(pid, signal.SIGSTOP)
            note(f"{', '.join(sorted(pids))} were stopped")
            await asyncio.sleep(seconds / 6)
        finally:
            for pid in pids.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            note("they go on")

    async def add(note: Note) -> None:
        await asyncio.sleep(seconds / 3)
        known = (await _topology(home.folder)).shards
        number = next(n for n in range(1, 1000) if f"load{n}" not in known)
        name, region = f"load{number}", f"LOAD{number}"
        words = ("shard", "add", name, "--region", region, "--dir", str(home.folder), "--reason", "a load run")
        note(f"{name} is being added for the region {region}")
        adding = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "ops", *words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            preexec_fn=die_with_parent,
        )
        _, told = await adding.communicate()
        if adding.returncode:
            raise CulmError("load_failed", f"{name} could not be added: {told.decode(errors='replace').strip()}")
        note(f"{name} has joined")
        await _tell(more, await targets(home.folder, scenario, seconds + SPARE_S))
        note(f"{name} takes its share")

    if scenario.event == "kill_shard":
        # Now, and not when it is too late to say so.
        _pid(home, shard)
    events: dict[str, Event | None] = {"": None, "kill_shard": kill, "pause_shards": pause, "add_shard": add}
    return events[scenario.event]


async def _tell(more: Path, sites: list[Target]) -> None:
    """Let the clients go on with these sites. They have tokens: the file is private, and goes with the order's."""
    beside = more.with_suffix(".new")
    beside.touch(mode=0o600)
    await asyncio.to_thread(beside.write_bytes, msgspec.json.encode(sites))
    await asyncio.to_thread(beside.replace, more)


def _pid(home: Layout, shard: str) -> int:
    try:
        return pids_of(home)[shard]
    except KeyError:
        raise Unavailable("not_running", f"the shard {shard} does not run in {home.folder}") from None


# --- after -----------------------------------------------------------------------------------------------------------


async def count_lost(home: Layout, token: str, jobset: int, result: Result) -> int:
    """Jobs that were acknowledged and are not known, and ends that were acknowledged and are not stored."""
    async with Client(home.router_url, token, patience_s=60.0) as client:
        rows, missing = await client.all_jobs(JobsQuery(jobset=jobset, limit=1000))
    if missing:
        raise Unavailable("shard_down", f"no answer from {', '.join(missing)}: what became of the jobs is not known")
    states = {row.id: row.state for row in rows}
    return sum(job not in states for job in result.accepted) + sum(
        states.get(job) is not State.FINISHED for job in result.ended if job in states
    )
