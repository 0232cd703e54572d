"""The monitor in a real browser: nothing that axe calls serious, no word of the CSP, and all of it without scripts.

Run by hand: `.venv/bin/pip install playwright axe-playwright-python`, a Chromium, then `bin/culm test -m browser`.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster, decoded, pilot

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (docs/testing.md)")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed (docs/testing.md)")
CHROMIUM = os.environ.get("CULM_TEST_CHROMIUM") or shutil.which("chromium") or ""
pytestmark = [
    pytest.mark.system,
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium (docs/testing.md)"),
]
OPTIONS = ["--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
PAGES = ("/", "/jobs", "/jobs?since=1h&state=finished", "/errors", "/pile-ups", "/pilots", "/shards")


@contextmanager
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as run:
        chromium = run.chromium.launch(executable_path=CHROMIUM, chromium_sandbox=False, args=OPTIONS)
        try:
            yield chromium
        finally:
            chromium.close()


def signed_in(context: Any, monitor: str, token: str) -> Any:
    """A page of somebody who came by the form."""
    page = context.new_page()
    page.goto(f"{monitor}/jobs")
    assert page.url == f"{monitor}/login"
    page.fill("input[name=token]", token)
    page.click("button")
    page.wait_for_url(f"{monitor}/")
    return page


def some_jobs(running: Cluster, work: Path) -> int:
    """One that finished and one that failed; the id of the failed one."""
    ids = []
    for command in ("true", "exit 3"):
        done = running.culm("job", "submit", "--site", "BNL", "-o", "json", "--", "/bin/sh", "-c", command)
        ids += decoded(done)["ids"]
    with pilot(running, "BNL-q", work, "--max-jobs", "2", "--idle-exit", "20") as one:
        one.wait(60)
    return int(ids[-1])


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
def test_every_page_is_whole_and_accessible(running: Cluster, scripts: bool, tmp_path: Path) -> None:
    failed = some_jobs(running, tmp_path / "pilot")
    token = (running.layout.tokens / "central.user").read_text(encoding="utf-8").strip()
    said: list[str] = []
    with browser() as chromium:
        context = chromium.new_context(java_script_enabled=scripts, viewport={"width": 1000, "height": 800})
        page = signed_in(context, running.layout.monitor_url, token)
        page.on("console", lambda message: said.append(message.text))
        for where in (*PAGES, f"/jobs/{failed}"):
            answer = page.goto(f"{running.layout.monitor_url}{where}")
            assert answer.status == 200
            assert page.locator("main h2").first.inner_text()
            page.screenshot(path=tmp_path / "page.png", full_page=True)
            if scripts:
                found = axe.Axe().run(page).response["violations"]
                assert [one["id"] for one in found if one["impact"] in ("serious", "critical")] == []
        page.goto(f"{running.layout.monitor_url}/jobs")
        page.fill("input[name=site]", "BNL")
        page.click("form.filters button")
        page.click(f"a[href='/jobs/{failed}']")
        assert "failed" in page.locator("main").inner_text()
    assert [text for text in said if "Content Security Policy" in text or "Refused" in text] == []
