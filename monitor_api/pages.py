"""The monitor's pages: server-rendered, usable without JavaScript, under a strict content security policy.

A browser shows its token by a cookie, which `/login` sets. Everything that is shown is escaped by the templates.
"""

import shlex
import time
from collections.abc import Awaitable, Callable, Mapping
from importlib import resources
from typing import Any, Final

from aiohttp import web
from jinja2 import Environment, PackageLoader, StrictUndefined

from culm import __version__, service
from culm.errors import ClientFault, CulmError
from culm.moments import moment
from culm.states import State
from culm.tokens import MAX_TOKEN_CHARS, Verifier
from culm.wire import JobsQuery, Principal
from monitor_api.queries import ERROR_HOURS, PILE_UP_HOURS, PilotsQuery, filled, hours_of, query_of
from monitor_api.views import Views

COOKIE: Final = "culm_token"
POLICY: Final = "default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
HEADERS: Final[Mapping[str, str]] = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
STATES: Final = [state.value for state in State]
PAGE_ROWS: Final = 50
LIST_OPTIONS: Final = frozenset(
    {"region", "site", "state", "jobset", "owner", "since", "until", "order", "after", "before", "limit"}
)
"""Of `culm job list`."""

Show = Callable[[web.Request, Principal], Awaitable[tuple[str, dict[str, Any]]]]
"""(the request, who asks) -> the template's name and its values."""


class Pages:
    """Handlers of the pages over the views."""

    def __init__(self, views: Views, verifier: Verifier, *, secure: bool) -> None:
        self._views = views
        self._verifier = verifier
        self._secure = secure
        self._environment = Environment(
            loader=PackageLoader("monitor_api"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        self._environment.filters["utc"] = _utc
        self._environment.globals["states"] = STATES
        self._environment.globals["version"] = __version__
        self._style = resources.files("monitor_api").joinpath("templates/style.css").read_text(encoding="utf-8")

    def routes(self) -> list[web.RouteDef]:
        """All pages."""
        return [
            web.get("/", self._page("overview", self._overview)),
            web.get("/jobs", self._page("jobs", self._jobs)),
            web.get("/jobs/{id}", self._page("job", self._job)),
            web.get("/errors", self._page("errors", self._errors)),
            web.get("/pile-ups", self._page("pile_ups", self._pile_ups)),
            web.get("/pilots", self._page("pilots", self._pilots)),
            web.get("/shards", self._page("shards", self._shards)),
            web.get("/login", self._login),
            web.post("/login", self._log_in),
            web.post("/logout", self._log_out),
            web.get("/style.css", self._css),
        ]

    # --- what is shown

    async def _overview(self, _request: web.Request, who: Principal) -> tuple[str, dict[str, Any]]:
        return "overview.html", {"counts": await self._views.counts(who), "command": "culm counts"}

    async def _jobs(self, request: web.Request, who: Principal) -> tuple[str, dict[str, Any]]:
        given = filled(request.query)
        order = given.get("order") or ("id" if "jobset" in given or "after" in given else "newest")
        now = time.time()
        span = {name: str(moment(given[name], now)) for name in ("since", "until") if name in given}
        query = query_of({"limit": str(PAGE_ROWS)} | given | span | {"order": order}, JobsQuery)
        page = await self._views.jobs(who, query)
        following = {"after": str(page.next)} if page.next is not None else {"before": page.before}
        further = {name: value for name, value in given.items() if name not in following} | following
        words = [f"--{name} {shlex.quote(value)}" for name, value in given.items() if name in LIST_OPTIONS]
        values = {"page": page, "query": given, "further": further, "command": " ".join(["culm job list", *words])}
        return "jobs.html", values

    async def _job(self, request: web.Request, who: Principal) -> tuple[str, dict[str, Any]]:
        text = request.match_info["id"]
        if not text.isdecimal() or len(text) > 19:
            raise ClientFault("bad_job_id", f"{text[:40]!r} is not a job id")
        view = await self._views.job(who, int(text))
        why = await self._views.why(who, int(text))
        return "job.html", {"view": view, "why": why, "command": f"culm job show {text}; culm job why {text}"}

    async def _errors(self, request: web.Request, who: Principal) -> tuple[str, dict[str, Any]]:
        hours = hours_of(request.query, ERROR_HOURS)
        answer = await self._views.errors(who, hours)
        return "errors.html", {"answer": answer, "command": f"culm errors --hours {hours}"}

    async def _pile_ups(self, request: web.Request, who: Principal) -> tuple[str, dict[str, Any]]:
        hours = hours_of(request.query, PILE_UP_HOURS)
        answer = await self._views.pile_ups(who, hours)
        return "pile_ups.html", {"answer": answer, "command": f"culm pile-ups --hours {hours}"}

    async def _pilots(self, request: web.Request, who: Principal) -> tuple[str, dict[str, Any]]:
        query = query_of(filled(request.query), PilotsQuery)
        answer = await self._views.pilots(who, query)
        words = ["culm pilot list", *([f"--site {shlex.quote(query.site)}"] if query.site else [])]
        command = " ".join([*words, f"--minutes {query.minutes}", f"--limit {query.limit}"])
        return "pilots.html", {"answer": answer, "query": query, "command": command}

    async def _shards(self, _request: web.Request, who: Principal) -> tuple[str, dict[str, Any]]:
        return "shards.html", {"answer": await self._views.shards(who), "command": "culm shard list"}

    # --- the way in

    async def _login(self, _request: web.Request) -> web.Response:
        return self._render("login.html", {"refused": "", "who": None, "command": "culm token issue user NAME --vo VO"})

    async def _log_in(self, request: web.Request) -> web.Response:
        form = await request.post()
        token = str(form.get("token", "")).strip()[: MAX_TOKEN_CHARS + 1]
        try:
            self._verifier.verify(f"Bearer {token}")
        except CulmError as error:
            values = {"refused": error.message, "who": None, "command": "culm token issue user NAME --vo VO"}
            return self._render("login.html", values, status=401)
        response = web.Response(status=303, headers={"Location": "/", **HEADERS})
        response.set_cookie(COOKIE, token, httponly=True, samesite="Strict", secure=self._secure, path="/")
        return response

    async def _log_out(self, _request: web.Request) -> web.Response:
        response = web.Response(status=303, headers={"Location": "/login", **HEADERS})
        response.del_cookie(COOKIE, path="/")
        return response

    async def _css(self, _request: web.Request) -> web.Response:
        return web.Response(text=self._style, content_type="text/css", headers={"X-Content-Type-Options": "nosniff"})

    # --- rendering

    def _page(self, verb: str, show: Show) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            request[service.VERB] = f"page_{verb}"
            try:
                who = self._verifier.verify(f"Bearer {request.cookies.get(COOKIE, '')}")
            except CulmError:
                return web.Response(status=303, headers={"Location": "/login", **HEADERS})
            try:
                template, values = await show(request, who)
            except CulmError as error:
                values = {"error": error, "who": who, "command": ""}
                return self._render("error.html", values, status=error.http_status)
            return self._render(template, values | {"who": who})

        return handle

    def _render(self, template: str, values: dict[str, Any], status: int = 200) -> web.Response:
        text = self._environment.get_template(template).render(values | {"now": time.time()})
        return web.Response(text=text, content_type="text/html", status=status, headers=HEADERS)


def _utc(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))
