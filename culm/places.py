"""How the place of a job is called where it is shown."""

from typing import Final

from culm.topology import Topology

UNPLACED: Final = "(not in the topology)"
REGION_ONLY: Final = "(any site of {region})"


def place(topology: Topology, slot: int) -> tuple[str, str]:
    """The region and the site of a slot, as they are shown."""
    region = topology.region_of_slot.get(slot, UNPLACED)
    return region, topology.site_of_slot.get(slot, REGION_ONLY.format(region=region))
