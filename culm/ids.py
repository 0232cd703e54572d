"""Job ids: `slot << 39 | seq`, 14 + 39 bits.

An id always stays below 2**53, so it survives JSON and JavaScript, and it names its slot: a report that carries
nothing but the id still finds its shard. The jobs of one slot are one contiguous range of the clustered key.
"""

from typing import Final

from culm.errors import ClientFault

SLOT_BITS: Final = 14
SEQ_BITS: Final = 39
MAX_SLOT: Final = (1 << SLOT_BITS) - 1
MAX_SEQ: Final = (1 << SEQ_BITS) - 1
MAX_JOB_ID: Final = (1 << (SLOT_BITS + SEQ_BITS)) - 1


def job_id(slot: int, seq: int) -> int:
    """The id of the job number `seq` (1..MAX_SEQ) of `slot` (0..MAX_SLOT). Raises ValueError outside these ranges."""
    if not 0 <= slot <= MAX_SLOT:
        raise ValueError(f"slot {slot} is outside 0..{MAX_SLOT}")
    if not 1 <= seq <= MAX_SEQ:
        raise ValueError(f"seq {seq} is outside 1..{MAX_SEQ}")
    return slot << SEQ_BITS | seq


def slot_of(identifier: int) -> int:
    """The slot that a job id names. Raises ClientFault(bad_job_id) for what can be no id."""
    if not 1 <= identifier <= MAX_JOB_ID or identifier & MAX_SEQ == 0:
        raise ClientFault("bad_job_id", f"{identifier} is not a job id")
    return identifier >> SEQ_BITS


def id_range(slot: int) -> tuple[int, int]:
    """The first and the last id that `slot` can ever have, both inclusive."""
    return slot << SEQ_BITS | 1, slot << SEQ_BITS | MAX_SEQ
