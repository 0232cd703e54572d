"""Numbers in sentences. Pure."""


def counted(n: int, one: str, more: str = "") -> str:
    """`1 job`, `2 jobs`; `more` where an s is not all that changes."""
    return f"{n} {one if n == 1 else more or one + 's'}"
