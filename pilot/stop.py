"""Being told to go: at once where the pilot only waits, else at its next look, never between two lines that belong
together.
"""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR1)
"""What batch systems send before they kill."""


class StoppedError(BaseException):
    """A signal told the pilot to go. Not an Exception, so that no library swallows it."""


class Stop:
    """Whether the pilot was told to go. As a context manager: here the signal itself may interrupt."""

    def __init__(self) -> None:
        self.told = False
        self._waiting = False

    def listen(self) -> None:
        """Take the signals, but for those that whoever started us wants ignored (nohup)."""
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def check(self) -> None:
        """Raises StoppedError if told."""
        if self.told:
            raise StoppedError

    def __enter__(self) -> None:
        self._waiting = True
        if self.told:
            self._waiting = False
            raise StoppedError

    def __exit__(self, *_: object) -> None:
        self._waiting = False

    def _handle(self, _number: int, _frame: "FrameType | None") -> None:
        self.told = True
        if self._waiting:
            # Once: what is done about it must not be interrupted by the next signal.
            self._waiting = False
            raise StoppedError
