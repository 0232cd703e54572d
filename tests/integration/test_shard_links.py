"""The links to all shards: in step with the topology, one call to many shards at once, answers that are not ours."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from culm.errors import Bug, CulmError, Unavailable
from culm.link import LinkOptions, LinkServer
from culm.shard_links import ShardLinks
from culm.topology import CENTRAL, Section, Shard, Topology
from culm.wire import ShardCounts, ShardCountsAnswer
from tests import servers
from tests.waiting import eventually

DEADLINE_S = 10.0
