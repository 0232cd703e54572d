"""The messages that carry parts of the topology: what an admin changes over HTTP, and the topology itself.

Apart from `culm.wire`, which the topology builds on. Their rules of change are the same, their bytes are pinned too.
"""

from typing import Annotated, Any, Final

from msgspec import Meta

from culm.topology import Section, SiteRegistration
from culm.wire import Answer, Name, OptionalName, Request

MAX_SITES_PER_CALL: Final = 1000


class SitesRequest(Request, frozen=True, kw_only=True):
    """Register sites, or bring their computing queues up to date."""

    sites: Annotated[list[SiteRegistration], Meta(min_length=1, max_length=MAX_SITES_PER_CALL)]
    reason: Annotated[str, Meta(max_length=500)] = ""
    """Kept in the topology's audit log."""
    expected_epoch: int | None = None
    """The epoch that the registrations were made from, for those that name all fields of a known computing queue."""


class QueueRequest(Request, frozen=True, kw_only=True):
    """Change fields of one computing queue."""

    queue: Name
    changes: Annotated[dict[str, Any], Meta(min_length=1)]
    """Fields of a Queue with their new values."""
    reason: Annotated[str, Meta(max_length=500)] = ""
    """Kept in the topology's audit log, and with a status that it sets."""


class SlotsRequest(Request, frozen=True, kw_only=True):
    """Spread a hot site over more slots."""

    site: Name
    n_slots: Annotated[int, Meta(ge=1, le=1000)]
    reason: Annotated[str, Meta(max_length=500)] = ""
    """Kept in the topology's audit log."""


class VoRequest(Request, frozen=True, kw_only=True):
    """Change fields of a VO's policy in this authority's section."""

    vo: Name
    changes: Annotated[dict[str, Any], Meta(min_length=1)]
    """Fields of a Policy with their new values; 0 takes back what was said."""
    expected_epoch: int | None = None
    """The section's epoch that the change was made for; None to build on whatever is there."""
    reason: Annotated[str, Meta(max_length=500)] = ""
    """Kept in the topology's audit log."""


class ChangedAnswer(Answer, frozen=True, kw_only=True):
    """The section's epoch after the change; the same as before if there was nothing to change."""

    authority: str
    epoch: int


class ShardRequest(Request, frozen=True, kw_only=True):
    """Add a shard that is running: it serves the sites that are registered in its region from now on."""

    name: Name
    link: Annotated[str, Meta(min_length=1, max_length=300)]
    """Where the routers reach it: `unix:/path` or `tls:host:port`."""
    region: OptionalName = ""
    """Made if it is new, with its own slot on this shard; "" to serve regions that come later."""
    strict: bool = False
    """Of a new region: its jobs may lie on its own shards only."""
    weight: Annotated[int, Meta(ge=0, le=100)] = 1
    """Its share of new sites, next to the region's other shards."""
    expected_epoch: int | None = None
    """The section's epoch that the plan was made for; None to build on whatever is there."""
    reason: Annotated[str, Meta(max_length=500)] = ""
    """Kept in the topology's audit log."""


class BanRequest(Request, frozen=True, kw_only=True):
    """Ban an account from this authority's section, or let it in again."""

    account: Annotated[str, Meta(min_length=1, max_length=160)]
    banned: bool = True
    reason: Annotated[str, Meta(max_length=500)] = ""
    """Told to the account, and kept in the topology's audit log."""


class AuthorityAnswer(Answer, frozen=True, kw_only=True):
    """What one authority decides: its section, and its public keys, PEM by kid."""

    authority: str
    section: Section
    keys: dict[str, str]
    keys_order: int = 0
    """Grows with every change of the keys; 0 from a router that does not count them."""


class TopologyAnswer(Answer, frozen=True, kw_only=True):
    """Every section that this router knows."""

    sections: list[Section]
