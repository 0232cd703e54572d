"""Long work for one reader, cut into pieces: the event loop dispatches jobs in between."""

import asyncio
from typing import Final

PIECE: Final = 1000
"""Units of about a microsecond: a piece is about a millisecond."""


class Pauses:
    """Counts what was done, and lets others have their turn when it was a piece."""

    def __init__(self) -> None:
        self._done = 0

    async def after(self, n_units: int) -> None:
        """So much was done since the last call; what was read before this may have changed after it."""
        self._done += n_units
        if self._done >= PIECE:
            self._done = 0
            await asyncio.sleep(0)
