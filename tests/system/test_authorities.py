"""Two authorities: CERN starts alone, goes on alone, decides for itself, and nothing is merged when it returns."""

import json
from pathlib import Path

import msgspec
import pytest

from culm import topology_store
from culm.client import Client
from culm.errors import ClientFault
from culm.registry_wire import ChangedAnswer, QueueRequest, SitesRequest, VoRequest
from culm.topology import Queue, SiteRegistration
from culm.topology_store import AUDIT
from culm.wire import Principal
from ops.cluster import control
from ops.cluster.layout import Layout
from tests import servers
from tests.cluster import culm, decoded
from tests.waiting import eventually_sync

DEADLINE_S = 30.0
NEW = SiteRegistration(name="CERN-T0", region="CERN", queues={"CERN-T0-q": Queue()})


def admin(home: Layout, of: str) -> Client:
    """A client of one home's router, with the token of an admin of an authority."""
    token = home.home(of).ring.issue(Principal(role="admin", subject="root", authority=of), 600.0)
    return Client(home.router_url, token, patience_s=5.0)


def runs_a_job(folder: Path, authority: str, site: str, queue: str) -> str:
    """Submit a job at the router of an authority and let a pilot of it run it; its final state."""
    done = culm("job", "submit", "--authority", authority, "--site", site, "--", "true", folder=folder)
    assert done.returncode == 0, done.stderr
    [job] = done.stdout.split()
    ran = culm(
        *("pilot", "run", "--authority", authority, "--queue", queue, "--max-jobs", "1", "--idle-exit", "20"),
        folder=folder,
    )
    assert ran.returncode == 0, ran.stderr
    return str(decoded(culm("job", "show", "--authority", authority, job, "-o", "json", folder=folder))["job"]["state"])


async def test_cern_starts_alone_goes_on_alone_and_returns(own: Path) -> None:
    port = servers.free_ports(4)
    alone = culm("up", "--region", "CERN", "--port", str(port), folder=own, timeout_s=120.0)
    assert alone.returncode == 0, alone.stderr
    parts = decoded(culm("status", "-o", "json", folder=own))["authorities"]
    assert (parts["CERN"]["phase"], parts["central"]["phase"]) == ("up", "down")
    assert runs_a_job(own, "CERN", "CERN-PROD", "CERN-PROD-q") == "finished"
    assert culm("job", "submit", "--site", "BNL", "--", "true", folder=own).returncode == 4

    # With the centre, each side sees what the other has.
    assert culm("up", "--port", str(port), folder=own, timeout_s=120.0).returncode == 0
    central = control.running(own)
    cern = control.running(own, "CERN")
    eventually_sync(lambda: "BNL" in topology_store.load(cern.topology, "CERN").sites, DEADLINE_S, what="seen by CERN")
    assert runs_a_job(own, "central", "BNL", "BNL-q") == "finished"

    # Cut off again: it registers a site of its own, changes its keys, and goes on.
    assert culm("down", "--region", "central", folder=own).returncode == 0
    async with admin(cern, "CERN") as client:
        changed = await client.post("sites", SitesRequest(sites=[NEW], reason="the Tier-0"), ChangedAnswer)
    assert culm("token", "rotate", "--authority", "CERN", folder=own).returncode == 0
    assert runs_a_job(own, "CERN", "CERN-T0", "CERN-T0-q") == "finished"

    # The centre is back: it takes over the newer section and the keys, and nobody merged anything.
    assert culm("up", "--region", "central", "--port", str(port), folder=own, timeout_s=120.0).returncode == 0

    def known() -> bool:
        copy = topology_store.load_section(central.topology, "CERN")
        return copy == topology_store.load_section(cern.topology, "CERN")

    eventually_sync(known, DEADLINE_S, what="the centre knows the new site")
    assert topology_store.load_section(central.topology, "CERN").epoch == changed.epoch
    new_key = cern.ring.kids()[-1]
    eventually_sync((central.trusted / f"{new_key}.pub").exists, DEADLINE_S, what="the centre trusts the new key")

    # What it has run alone is shown at the centre, and lies nowhere but in its own database (the audit looks, below).
    def shown() -> bool:
        # Exit code 4 as long as a shard gives no answer.
        done = culm("counts", "-o", "json", folder=own)
        counted = json.loads(done.stdout or "{}")
        return done.returncode == 0 and counted["by_region"].get("CERN", {}).get("finished") == 2

    eventually_sync(shown, DEADLINE_S, what="the centre's monitor shows CERN's jobs")
    rows = [msgspec.json.decode(line) for line in (cern.topology / AUDIT).read_bytes().splitlines()]
    told = [(row["actor"], row["reason"]) for row in rows]
    assert told == [("CERN:operator", "a new cluster"), ("CERN:root", "the Tier-0")]

    # Neither can change what is the other's, whoever asks where.
    before = {home.authority: topology_store.load(home.topology, home.authority).epochs for home in (central, cern)}
    offline = {"status": "offline"}
    for home, of, queue in (
        (central, "central", "CERN-T0-q"),
        (central, "CERN", "CERN-T0-q"),
        (cern, "central", "CERN-T0-q"),
        (cern, "CERN", "BNL-q"),
    ):
        async with admin(home, of) as client:
            with pytest.raises(ClientFault) as caught:
                await client.post("queue", QueueRequest(queue=queue, changes=offline), ChangedAnswer)
            # Not its own to change, or not in its own section at all.
            assert caught.value.http_status in {403, 404}, (home.authority, of, queue)
    for home, of in ((central, "CERN"), (cern, "central")):
        async with admin(home, of) as client:
            with pytest.raises(ClientFault, match="forbidden"):
                await client.post("vo", VoRequest(vo="atlas", changes={"heartbeat_s": 1}), ChangedAnswer)
    assert before == {
        home.authority: topology_store.load(home.topology, home.authority).epochs for home in (central, cern)
    }

    # Each may say something else of the same VO, and both see both.
    for of, seconds in (("central", 600), ("CERN", 900.5)):
        said = culm("vo", "set", "atlas", f"heartbeat_s={seconds}", "--authority", of, folder=own)
        assert said.returncode == 0, said.stderr
    for of in ("central", "CERN"):
        listed = decoded(culm("vo", "list", "--authority", of, "-o", "json", folder=own))
        assert listed == {"CERN": {"atlas": {"heartbeat_s": 900.5}}, "central": {"atlas": {"heartbeat_s": 600.0}}}
    audited = culm("audit", folder=own)
    assert audited.returncode == 0, audited.stdout
    assert culm("down", folder=own).returncode == 0
