"""The monitor's pages and its JSON over two shards: what is shown, what is missing, who may see it, and no script."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest

from culm.client import Client
from culm.states import State
from culm.wire import (
    ErrorsAnswer,
    GetJobRequest,
    JobError,
    JobsAnswer,
    JobSpec,
    PilotInfo,
    Principal,
    ReportRequest,
    ShardsAnswer,
    SubmitRequest,
)
from tests.front import RunningFront
from tests.integration.test_monitor import monitor
from tests.partition import ADMIN, PILOT, USER
from tests.two_partitions import NAMES, TwoPartitions
from tests.waiting import eventually

DEADLINE_S = 20.0

STRANGER = Principal(role="user", subject="cy", authority="central", vo="cms")
EVIL = "<script>alert(1)</script>"
PAGES = ("/", "/jobs", "/errors", "/pile-ups", "/pilots", "/shards")


@pytest.fixture
async def url(pair: TwoPartitions, router: RunningFront) -> AsyncIterator[str]:
    """A monitor's URL."""
    async with monitor(pair, router) as where:
        yield where


@asynccontextmanager
async def browser(url: str, router: RunningFront, who: Principal = USER) -> AsyncIterator[aiohttp.ClientSession]:
    """A session that has logged in."""
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as session:
        async with session.post(f"{url}/login", data={"token": router.token(who)}) as answer:
            assert (answer.status, str(answer.url)) == (200, f"{url}/")
        yield session


async def shown(session: aiohttp.ClientSession, where: str) -> str:
    """A page that is there, with the headers that every page has."""
    async with session.get(where) as answer:
        assert answer.status == 200, await answer.text()
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'; style-src 'self'")
        assert answer.headers["Cache-Control"] == "no-store"
        return await answer.text()


async def fail_one(router: RunningFront, site: str, name: str) -> int:
    """A job that failed of its walltime."""
    async with router.client(USER) as user, router.client(PILOT) as pilot:
        jobs = [JobSpec(site=site, argv=["true", EVIL], name=name)]
        await user.submit(SubmitRequest(idempotency_key=name[:100], jobs=jobs))
        request = GetJobRequest(request_id=f"request-{site}-{len(name)}", queue=f"{site}-q", pilot=PilotInfo(id="p"))
        [grant] = (await pilot.get_job(request)).jobs
        error = JobError(plane="pilot", code=1213, text=EVIL)
        held = {"id": grant.id, "attempt": grant.attempt, "lease_token": grant.lease_token}
        await pilot.report(ReportRequest(**held, state=State.FAILED, error=error, stdout_tail=EVIL))
        return grant.id


async def test_every_page_is_there_from_the_empty_state_on(url: str, router: RunningFront) -> None:
    async with browser(url, router) as session:
        for page in PAGES:
            text = await shown(session, url + page)
            assert "<script" not in text
            assert "The same on the command line: <code>culm " in text
        assert "No jobs yet" in await shown(session, f"{url}/")
        assert "No job fits" in await shown(session, f"{url}/jobs")
        assert "No job failed" in await shown(session, f"{url}/errors")
        assert "No state grows" in await shown(session, f"{url}/pile-ups")
        assert "No pilot asked" in await shown(session, f"{url}/pilots")


async def test_what_jobs_say_is_shown_as_text(url: str, router: RunningFront) -> None:
    identifier = await fail_one(router, "BNL", EVIL)
    async with browser(url, router) as session:
        for page in (f"/jobs/{identifier}", "/jobs", "/errors", "/"):
            text = await shown(session, url + page)
            assert "<script" not in text
        job = await shown(session, f"{url}/jobs/{identifier}")
        assert job.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 4
        assert "<strong>failed</strong>" in job
        assert f'href="/jobs/{identifier}"' in await shown(session, f"{url}/errors")


async def test_errors_are_merged_by_code_and_site(url: str, router: RunningFront) -> None:
    for number in range(2):
        await fail_one(router, "BNL", f"n{number:03d}" + "x" * number)
    last = await fail_one(router, "FZK", "other")
    async with Client(url, router.token(USER), patience_s=0.0) as client:
        answer: ErrorsAnswer = await client.errors(1)
        rows = [(row.plane, row.code, row.site, row.region, row.n_jobs) for row in answer.errors]
        assert rows == [("pilot", 1213, "BNL", "US", 2), ("pilot", 1213, "FZK", "EU", 1)]
        assert (answer.errors[1].example, answer.missing_shards) == (last, [])
    async with Client(url, router.token(STRANGER), patience_s=0.0) as client:
        assert (await client.errors(24)).errors == []
        assert (await client.counts()).total == {}


async def test_a_shard_that_is_gone_is_named_on_every_page(url: str, router: RunningFront, pair: TwoPartitions) -> None:
    await fail_one(router, "BNL", "here")
    await fail_one(router, "FZK", "there")
    async with browser(url, router, ADMIN) as session:
        await shown(session, f"{url}/")
        await pair.stop("eu1")
        for page in ("/", "/jobs", "/errors", "/pile-ups", "/pilots"):
            assert "No answer from eu1" in await shown(session, url + page)
        # Shown as last heard, and never as nothing.
        assert "failed</a>: 2" in await shown(session, f"{url}/")
        assert re.search(r"no, for \d+ s", await shown(session, f"{url}/shards"))
    async with Client(url, router.token(ADMIN), patience_s=0.0) as client:
        told: ShardsAnswer = await client.shards()
        assert {row.name: row.answers for row in told.shards} == {"us1": True, "eu1": False}
        jobs = await client.get("jobs", {"limit": "10"}, JobsAnswer)
        assert ([row.name for row in jobs.jobs], jobs.missing_shards) == (["here"], ["eu1"])
    await pair.start("eu1")


async def test_pages_ask_for_a_token_and_bad_input_is_a_page_too(url: str, router: RunningFront) -> None:
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as session:
        for page in PAGES:
            async with session.get(url + page) as answer:
                assert str(answer.url) == f"{url}/login"
        async with session.post(f"{url}/login", data={"token": "rubbish"}) as answer:
            assert (answer.status, "Set-Cookie" in answer.headers) == (401, False)
    async with browser(url, router) as session:
        for page, status in (
            ("/jobs/12", 404), ("/jobs/x", 400), ("/jobs?state=sleeping", 400), ("/jobs?colour=red", 400),
            ("/jobs?site=Mars", 404), ("/errors?hours=0", 400), ("/errors?hours=x", 400),
            ("/pile-ups?hours=721", 400), ("/pile-ups?hours=-1", 400), ("/pilots?minutes=0", 400),
            ("/pilots?limit=1001", 400), ("/pilots?colour=red", 400), ("/pilots?site=Mars", 404),
        ):  # fmt: skip
            async with session.get(url + page) as answer:
                assert (answer.status, "That did not work" in await answer.text()) == (status, True), page
        async with session.post(f"{url}/logout") as answer:
            assert str(answer.url) == f"{url}/login"
        async with session.get(f"{url}/") as answer:
            assert str(answer.url) == f"{url}/login"


@pytest.mark.parametrize("order", ["", "&order=id"], ids=["newest", "id"])
async def test_a_list_goes_on_on_the_next_page(url: str, router: RunningFront, order: str) -> None:
    jobs = [JobSpec(site=("BNL", "FZK")[n % 2], argv=["true"], name=f"n{n}") for n in range(120)]
    async with router.client(USER) as user:
        ids = [one for one in (await user.submit(SubmitRequest(idempotency_key="k", jobs=jobs))).ids if one is not None]
        jobset = (await user.job(ids[0])).job.jobset
    async with browser(url, router) as session:
        for of_jobset in ("", f"&jobset={jobset}"):
            seen: list[int] = []
            where = f"{url}/jobs?state=activated&since=1h{order}{of_jobset}"
            while True:
                text = await shown(session, where)
                seen += [int(found) for found in re.findall(r'href="/jobs/(\d+)"', text)]
                further = re.search(r'href="(/jobs\?[^"]*(?:after|before)=[\d.]+[^"]*)"', text)
                if further is None:
                    break
                where = url + further[1].replace("&amp;", "&")
            assert sorted(seen) == sorted(ids)
            assert (seen == sorted(ids)) == bool(order or of_jobset)


async def test_a_span_of_time_that_has_no_jobs_is_empty_and_what_is_no_time_is_said(
    url: str, router: RunningFront
) -> None:
    async with router.client(USER) as user:
        await user.submit(SubmitRequest(idempotency_key="k", jobs=[JobSpec(site="BNL", argv=["true"])]))
    async with browser(url, router) as session:
        assert "No job fits" not in await shown(session, f"{url}/jobs?since=1h")
        assert "No job fits" in await shown(session, f"{url}/jobs?until=1h")
        async with session.get(f"{url}/jobs?since=soon") as answer:
            assert answer.status == 400
            assert "is no time" in await answer.text()


# --- pile-ups and pilots ---------------------------------------------------------------------------------------------


async def pile_up(router: RunningFront, pair: TwoPartitions) -> None:
    """Twelve jobs of atlas at FZK, and ten of cms at BNL, an hour after a sample of quiet shards."""
    for name in NAMES:

        async def is_sampled(name: str = name) -> bool:
            return bool(await pair.rows(name, "SELECT hour FROM sampled"))

        await eventually(is_sampled, DEADLINE_S, what="the hour is sampled")
        await pair.rows(name, "UPDATE sampled SET hour = hour - 2")
    for who, site, n_jobs in ((USER, "FZK", 12), (STRANGER, "BNL", 10)):
        async with router.client(who) as user:
            jobs = [JobSpec(site=site, argv=["true"])] * n_jobs
            await user.submit(SubmitRequest(idempotency_key="k", jobs=jobs))


async def test_pile_ups_are_merged_by_site_and_a_user_is_shown_his_vo(
    url: str, router: RunningFront, pair: TwoPartitions
) -> None:
    await pile_up(router, pair)
    for who, expected in ((ADMIN, [("FZK", 12), ("BNL", 10)]), (USER, [("FZK", 12)]), (STRANGER, [("BNL", 10)])):
        async with Client(url, router.token(who), patience_s=0.0) as client:
            answer = await client.pile_ups(6)
            assert [(one.site, one.n_jobs) for one in answer.pile_ups] == expected
            assert {one.cause for one in answer.pile_ups} == {"no_pilot_asked"}
            assert (answer.n_samples, answer.missing_shards) == ({"us1": 1, "eu1": 1}, [])
    async with browser(url, router, ADMIN) as session:
        text = await shown(session, f"{url}/pile-ups")
        assert "<strong>no_pilot_asked</strong>" in text
        assert 'href="/jobs?state=activated&amp;site=FZK"' in text
        assert "<code>culm pile-ups --hours 6</code>" in text
        assert await shown(session, f"{url}/jobs?state=activated&site=FZK")
        await pair.stop("eu1")
        text = await shown(session, f"{url}/pile-ups?hours=3")
        assert ("No answer from eu1" in text, "FZK" in text, "BNL" in text) == (True, False, True)
    await pair.start("eu1")


async def test_a_shard_without_a_sample_says_that_it_cannot_say(url: str, router: RunningFront) -> None:
    async with browser(url, router) as session:
        text = await shown(session, f"{url}/pile-ups")
    assert "us1 has no sample of an hour before this one yet" in text


async def test_reads_have_a_second_name_with_the_same_answer_and_the_same_refusals(
    url: str, router: RunningFront
) -> None:
    headers = {"Authorization": f"Bearer {router.token(ADMIN)}"}
    async with aiohttp.ClientSession() as session:
        for path in ("pile-ups", "pilots", "errors"):
            answers = []
            for name in (f"{url}/v1/{path}", f"{url}/api/v1/{path}"):
                async with session.get(name) as answer:
                    assert answer.status == 401
                async with session.get(name, headers=headers) as answer:
                    assert answer.status == 200
                    answers.append(await answer.json())
            assert answers[0] == answers[1]


async def test_pilots_are_told_by_site_with_what_they_got(url: str, router: RunningFront, pair: TwoPartitions) -> None:
    await fail_one(router, "FZK", "one")
    async with router.client(PILOT) as pilot:
        for site, name in (("BNL", EVIL), ("FZK", "p")):
            info = PilotInfo(id=name, host="node1")
            await pilot.get_job(GetJobRequest(request_id=f"request-{site}", queue=f"{site}-q", pilot=info))
    async with Client(url, router.token(USER), patience_s=0.0) as client:
        answer = await client.pilots()
        told = {(one.site, one.id): (one.host, one.n_asked, one.n_answered, one.n_jobs) for one in answer.pilots}
        assert told == {("BNL", EVIL): ("node1", 1, 0, 0), ("FZK", "p"): ("node1", 2, 1, 1)}
        assert [(one.queue, one.n_asked, one.n_given) for one in answer.queues] == [("BNL-q", 1, 0), ("FZK-q", 2, 1)]
        assert [one.id for one in (await client.pilots(site="FZK")).pilots] == ["p"]
        assert (await client.pilots(limit=1)).n_left_out >= 1
    async with browser(url, router) as session:
        text = await shown(session, f"{url}/pilots?site=&minutes=30")
        assert "<script" not in text
        assert "&lt;script&gt;" in text
        assert "<code>culm pilot list --minutes 30 --limit 200</code>" in text
        # A shard that the site's pilots never ask is not missed.
        await pair.stop("us1")
        assert "No answer" not in await shown(session, f"{url}/pilots?site=FZK")
        assert "No answer from us1" in await shown(session, f"{url}/pilots")
    await pair.start("us1")
