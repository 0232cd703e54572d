"""The keys that sign tokens, those that are trusted, and the command line's own tokens."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from culm.errors import ClientFault
from culm.tokens import Verifier
from ops.cluster.layout import Layout
from ops.cluster.plan import RENEW_S
from ops.doctor.check import Check

DAY_S: Final = 86_400.0
OLD_DAYS: Final = 365


def keys(layout: Layout) -> Iterator[Check]:
    """Everything in a home that a token passes through, from its signature to its check."""
    yield _signing(layout)
    trusted = f"trusted keys of {layout.authority}"
    if not layout.trusted.exists():
        yield Check(name=trusted, level="warn", text=f"{layout.trusted} is not there", advice="culm up makes it")
        return
    try:
        known = [path.stem for path in layout.trusted.iterdir() if path.suffix == ".pub" and path.read_bytes()]
    except OSError as error:
        advice = "routers must be able to read it"
        yield Check(name=trusted, level="bad", text=f"{error.filename}: {error.strerror}", advice=advice)
        return
    yield Check(name=trusted, text=f"{len(known)}: {', '.join(sorted(known))}")
    verifier = Verifier(layout.trusted)
    for path in sorted(layout.tokens.glob("*")):
        yield _token(path, verifier)


def _signing(layout: Layout) -> Check:
    name = f"key of {layout.authority}"
    rotate = f"culm token rotate --authority {layout.authority}"
    kids = layout.ring.kids()
    if not kids:
        advice = "fine if its tokens are issued elsewhere"
        return Check(name=name, level="warn", text="none here signs", advice=advice)
    kid = kids[-1]
    private = layout.keys / f"{kid}.key"
    if private.stat().st_mode & 0o077:
        return Check(name=name, level="bad", text=f"others may read {private}", advice=f"chmod 600, then {rotate}")
    if not (layout.trusted / f"{kid}.pub").exists():
        return Check(name=name, level="bad", text=f"{kid} signs, but its .pub is not trusted", advice=rotate)
    # A kid is authority, milliseconds since the epoch, random digits (culm.tokens).
    age_days = (time.time() - int(kid.rsplit("-", 2)[1]) / 1000) / DAY_S
    told = f"{kid} signs, {max(0.0, age_days):.0f} days old"
    if age_days > OLD_DAYS:
        return Check(name=name, level="warn", text=told, advice=rotate)
    return Check(name=name, text=told)


def _token(path: Path, verifier: Verifier) -> Check:
    name, advice = f"token {path.name}", f"remove {path}; the next culm up makes a new one"
    try:
        text = path.read_text(encoding="utf-8").strip()
        expires_at = verifier.expires_at(f"Bearer {text}")
    except ClientFault as error:
        return Check(name=name, level="bad", text=error.message, advice=advice)
    except (OSError, UnicodeDecodeError) as error:
        return Check(name=name, level="bad", text=str(error), advice=advice)
    left_days = (expires_at - time.time()) / DAY_S
    told = f"good for {left_days:.0f} days"
    if left_days * DAY_S < RENEW_S:
        return Check(name=name, level="warn", text=told, advice=advice)
    return Check(name=name, text=told)
