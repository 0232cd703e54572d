"""Placement: the versioned document that says which slot lives on which shard, and what each site offers.

The topology has one section per authority (the centre, CERN), each with its own epoch and its own block of slot
numbers, changed only by its owner. A process holds every section it can reach. This module is pure: the document and
its one validator; `culm.section_changes` changes it, `culm.topology_store` reads and writes it.
"""

from collections.abc import Iterable, Iterator
from typing import Annotated, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from culm import policies
from culm.errors import ClientFault
from culm.ids import MAX_SLOT
from culm.policies import NO_POLICY, Amount, Policy
from culm.priorities import MAX_PRIORITY
from culm.wire import Name, OptionalName, SlotRef

CENTRAL: Final = "central"
SLOT_BLOCKS: Final = {CENTRAL: (0, 12287), "CERN": (12288, 16383)}
"""The slot numbers of each authority, inclusive; one block never reaches into another."""

N = TypeVar("N")
Account = Annotated[str, Meta(min_length=3, max_length=160, pattern="^[^:]+:.")]
MAX_BANNED: Final = 10_000

PriorityOffset = Annotated[int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)]
QueueStatus = Literal["online", "offline", "test", "brokeroff"]


class Queue(Policy, frozen=True, kw_only=True):
    """A computing queue: what a site offers pilots that ask for it (0: no limit, empty: unknown), and its policy."""

    status: QueueStatus = "online"
    type: Literal["analysis", "production", "unified"] = "unified"
    cores: Annotated[int, Meta(ge=1, le=4096)] = 1
    memory_mb: Amount = 0
    disk_mb: Amount = 0
    walltime_s: Amount = 0
    releases: list[str] = msgspec.field(default_factory=list)
    platforms: list[str] = msgspec.field(default_factory=list)
    priority_offsets: dict[str, PriorityOffset] = msgspec.field(default_factory=dict)
    """By working group; "" is for jobs without one. The largest that applies wins."""
    reason: str = ""
    """Why the status is what it is, in the words of whoever set it."""


class Site(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """A computing centre: its region, its slots (a hot site has several), its computing queues by name."""

    region: Name
    slots: list[int]
    queues: dict[Name, Queue] = {}


class Region(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """A group of sites placed together. `slot` holds the jobs that any of its sites may take."""

    slot: int
    shards: Annotated[list[Name], Meta(min_length=1)]
    """Where its sites are placed when they are registered."""
    strict: bool = False
    """Its slots may live on these shards only (invariant I10)."""


class Shard(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Where a shard is reached, and its weight in the default placement."""

    link: str
    """`unix:/path`, `tls:host:port`, or on loopback only `tcp:host:port`."""
    weight: Annotated[int, Meta(ge=0, le=100)] = 1


class Placement(msgspec.Struct, frozen=True, array_like=True):
    """The shard that serves a slot, since the epoch at which it was opened there."""

    shard: str
    epoch: int


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one authority decides. `epoch` grows by one with every change."""

    authority: Name
    epoch: Annotated[int, Meta(ge=1)]
    shards: dict[Name, Shard] = {}
    regions: dict[Name, Region] = {}
    sites: dict[Name, Site] = {}
    placement: dict[int, Placement] = {}
    default_region: OptionalName = ""
    banned: dict[Account, Annotated[str, Meta(max_length=500)]] = {}
    """Accounts that may submit nothing here and, where they are this authority's own, nowhere; with the reason."""
    vos: dict[Name, Policy] = {}
    """What holds for the jobs of a VO in the slots of this authority, whoever submitted them."""
    last_slot: int = -1
    """No slot number up to this one is handed out again; -1 where the placement alone says which ones were."""


class SiteRegistration(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """A request to register a site, or to bring its computing queues up to date."""

    name: Name
    region: Name
    queues: dict[Name, Queue]


class Topology:
    """Every known section, with the indexes that resolve a request. Immutable; raises as `validate` does.

    Args:
        sections: one per authority.
        home: whose names win where two authorities give the same name to a shard, its link, a region, site or
            computing queue: what another decides while it cannot be reached must never break this one. The names that
            are passed over are told in `clashes`. None refuses such sections with ClientFault(bad_topology).
    """

    def __init__(self, sections: Iterable[Section], home: str | None = None) -> None:
        self.sections: dict[str, Section] = {}
        self.placement: dict[int, Placement] = {}
        self.shards: dict[str, Shard] = {}
        self.regions: dict[str, Region] = {}
        self.sites: dict[str, Site] = {}
        self.site_of_queue: dict[str, str] = {}
        self.site_of_slot: dict[int, str] = {}
        self.region_of_slot: dict[int, str] = {}
        self.clashes: list[str] = []
        """What is passed over, a sentence each."""
        self._home = home
        self._by_link: dict[str, str] = {}
        for section in sorted(sections, key=lambda one: (one.authority != home, one.authority)):
            self._add(section)

    def _add(self, section: Section) -> None:
        validate(section)
        self.sections[section.authority] = section
        # By their links, too: a shard under two names would be asked, counted and listed twice.
        links = {one.link: name for name, one in section.shards.items() if name not in self.shards}
        twice = links.keys() - self._merge(self._by_link, links, section, "link").keys()
        reached = {name: one for name, one in section.shards.items() if one.link not in twice}
        shards = self._merge(self.shards, reached, section, "shard")
        regions = self._merge(self.regions, section.regions, section, "region")
        ours = {name: site for name, site in section.sites.items() if site.region in regions}
        sites = self._merge(self.sites, ours, section, "site")
        self.placement.update({slot: place for slot, place in section.placement.items() if place.shard in shards})
        for name, region in section.regions.items():
            self.region_of_slot[region.slot] = name if name in regions else f"{section.authority}:{name}"
        for name, site in section.sites.items():
            region_name = site.region if site.region in regions else f"{section.authority}:{site.region}"
            for slot in site.slots:
                self.site_of_slot[slot] = name if name in sites else f"{section.authority}:{name}"
                self.region_of_slot[slot] = region_name
        queues = {queue: name for name, site in sites.items() for queue in site.queues}
        self._merge(self.site_of_queue, queues, section, "computing queue")

    def _merge(self, known: dict[str, N], more: dict[str, N], section: Section, what: str) -> dict[str, N]:
        """Add to `known` what no other authority has named before; what was added."""
        for name in sorted(known.keys() & more.keys()):
            clash = f"{what} {name} is named by {section.authority} and by another authority"
            if self._home is None:
                raise ClientFault("bad_topology", clash)
            self.clashes.append(clash)
        added = {name: one for name, one in more.items() if name not in known}
        known.update(added)
        return added

    @property
    def epochs(self) -> dict[str, int]:
        """The epoch of each section."""
        return {name: section.epoch for name, section in self.sections.items()}

    def default_region(self, authority: str) -> str:
        """The region of a job that names no place, by the authority of its submitter; "" if there is none."""
        return self.sections[authority].default_region if authority in self.sections else ""

    def ban_of(self, account: str, authority: str) -> str | None:
        """Why an account may not act in the slots of an authority; None if it may.

        Each authority bans for its own slots, and its own accounts everywhere.
        """
        for name in (authority, account.partition(":")[0]):
            section = self.sections.get(name)
            if section is not None and account in section.banned:
                return section.banned[account] or "no reason was given"
        return None

    def policy(self, slot: int, vo: str, queue: str = "") -> Policy:
        """What the authority of a slot has decided for a VO's jobs there, the computing queue's own word first.

        No other authority's word counts: a region that lives alone must not change with what it hears of others.

        Args:
            slot: where the jobs lie.
            vo: whose they are; a VO without a policy has none.
            queue: the computing queue that they are pinned to or run at; "" for none.

        Raises ClientFault(unknown_slot) outside of all blocks.
        """
        section = self.sections.get(authority_of_slot(slot))
        if section is None:
            return NO_POLICY
        of_vo = section.vos.get(vo, NO_POLICY)
        site = section.sites.get(self.site_of_queue.get(queue, "")) if queue else None
        own = site.queues.get(queue) if site is not None else None
        return policies.over(own, of_vo) if own is not None else of_vo

    def policies(self, slot: int) -> Iterator[Policy]:
        """Every policy that may count for a job of a slot: of VOs, of its site's queues. Raises as `policy`."""
        section = self.sections.get(authority_of_slot(slot))
        if section is not None:
            yield from section.vos.values()
            site = section.sites.get(self.site_of_slot.get(slot, ""))
            yield from site.queues.values() if site is not None else ()

    def queue(self, name: str) -> tuple[str, Site, Queue]:
        """The site's name, the site and the description of a computing queue. Raises ClientFault(unknown_queue)."""
        site_name = self.site_of_queue.get(name)
        if site_name is None:
            raise ClientFault("unknown_queue", f"no computing queue {name!r} is registered", http_status=404)
        site = self.sites[site_name]
        return site_name, site, site.queues[name]

    def site(self, name: str) -> Site:
        """The site of that name. Raises ClientFault(unknown_site)."""
        site = self.sites.get(name)
        if site is None:
            raise ClientFault("unknown_site", f"no site {name!r} is registered", http_status=404)
        return site

    def region(self, name: str) -> Region:
        """The region of that name. Raises ClientFault(unknown_region)."""
        region = self.regions.get(name)
        if region is None:
            raise ClientFault("unknown_region", f"no region {name!r} is registered", http_status=404)
        return region

    def slot(self, number: int) -> SlotRef:
        """The slot with its epoch. Raises ClientFault(unknown_slot) where no section places it."""
        return SlotRef(number, self.place(number).epoch)

    def place(self, number: int) -> Placement:
        """Where a slot lives. Raises ClientFault(unknown_slot)."""
        placement = self.placement.get(number)
        if placement is None:
            raise ClientFault("unknown_slot", f"no job of slot {number} was ever accepted here", http_status=404)
        return placement

    def slots_on(self, shard: str) -> Iterator[SlotRef]:
        """The slots that live on a shard."""
        return (SlotRef(slot, place.epoch) for slot, place in self.placement.items() if place.shard == shard)

    def authority_of_region(self, name: str) -> str:
        """Who decides about a region. Raises ClientFault(unknown_region)."""
        for authority, section in self.sections.items():
            if name in section.regions:
                return authority
        raise ClientFault("unknown_region", f"no region {name!r} is registered", http_status=404)


def validate(section: Section) -> None:
    """The one validator: router, shard, ops and CI use it. Raises ClientFault(bad_topology) with what is wrong."""
    first, last = slot_block(section.authority)
    users: dict[int, str] = {}
    at = {one.link: name for name, one in section.shards.items()}
    for name, one in section.shards.items():
        _require(at[one.link] == name, f"the shards {name} and {at[one.link]} have the same link {one.link}")
    for name, region in section.regions.items():
        _own_slots(users, [region.slot], f"region {name}")
        for shard in region.shards:
            _require(shard in section.shards, f"region {name} names the unknown shard {shard}")
    for name, site in section.sites.items():
        _require(site.region in section.regions, f"site {name} names the unknown region {site.region}")
        _require(bool(site.slots), f"site {name} has no slot")
        _own_slots(users, site.slots, f"site {name}")
    for slot, place in section.placement.items():
        _require(first <= slot <= last, f"slot {slot} is outside the block {first}..{last} of {section.authority}")
        _require(place.shard in section.shards, f"slot {slot} is placed on the unknown shard {place.shard}")
        _require(1 <= place.epoch <= section.epoch, f"slot {slot} has epoch {place.epoch}, past the section's")
    for slot, user in users.items():
        _require(slot in section.placement, f"slot {slot} of {user} is placed nowhere")
    for name, region in section.regions.items():
        _stay_home(section, name, [region.slot])
    for site in section.sites.values():
        _stay_home(section, site.region, site.slots)
    owners: dict[str, str] = {}
    for name, site in section.sites.items():
        for queue, described in site.queues.items():
            other = owners.setdefault(queue, name)
            _require(other == name, f"computing queue {queue} is named by the sites {other} and {name}")
            # What a job gets that does not say must be something that the computing queue has.
            for what in ("cores", "memory_mb", "disk_mb", "walltime_s"):
                most, default = getattr(described, what), getattr(described, f"default_{what}")
                _require(not most or default <= most, f"{queue} has {what} {most}, but default_{what} is {default}")
    _require(section.last_slot <= last, f"the last slot {section.last_slot} is past the block of {section.authority}")
    _require(len(section.vos) <= policies.MAX_VOS, f"{policies.MAX_VOS} VOs at most have a policy")
    _require(
        not section.default_region or section.default_region in section.regions,
        f"the default region {section.default_region} is unknown",
    )


def slot_block(authority: str) -> tuple[int, int]:
    """The first and last slot number of an authority. Raises ClientFault(unknown_authority)."""
    try:
        return SLOT_BLOCKS[authority]
    except KeyError:
        raise ClientFault("unknown_authority", f"{authority!r} has no block of slot numbers") from None


def authority_of_slot(slot: int) -> str:
    """In whose block a slot number lies. Raises ClientFault(unknown_slot) outside of all."""
    for authority, (first, last) in SLOT_BLOCKS.items():
        if first <= slot <= last:
            return authority
    raise ClientFault("unknown_slot", f"{slot} is in no authority's block of slot numbers", http_status=404)


def _stay_home(section: Section, region: str, slots: Iterable[int]) -> None:
    """The slots of a strict region are on its own shards (invariant I10)."""
    home = section.regions[region]
    for slot in slots if home.strict else ():
        shard = section.placement[slot].shard
        _require(shard in home.shards, f"slot {slot} is on {shard}, but its region {region} is strict")


def _own_slots(users: dict[int, str], slots: Iterable[int], user: str) -> None:
    for slot in slots:
        _require(0 <= slot <= MAX_SLOT, f"slot {slot} of {user} is outside 0..{MAX_SLOT}")
        _require(slot not in users, f"slot {slot} belongs to {users.get(slot)} and to {user}")
        users[slot] = user


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ClientFault("bad_topology", message)
