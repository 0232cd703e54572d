"""A cluster that seems to run, for commands that are tested without one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from culm.client import Client
from ops.cluster import control
from ops.cluster.layout import Layout

Asked = list[tuple[str, Any]]
"""What was asked: (path, query or request)."""


@pytest.fixture
def answer_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Asked]:
    """Give these answers, each wherever its type is asked for, from then on; the list of what is asked."""
    layout = Layout(tmp_path)
    layout.tokens.mkdir()
    for role in ("user", "admin"):
        (layout.tokens / f"central.{role}").write_text("a.token.text", encoding="utf-8")
    monkeypatch.setenv("CULM_DIR", str(tmp_path))
    monkeypatch.setattr(control, "running", lambda *_: layout)

    def answer_with(*answers: msgspec.Struct) -> Asked:
        by_type = {type(one): one for one in answers}
        asked: Asked = []

        async def get(_client: Client, path: str, query: dict[str, Any], kind: type) -> Any:
            asked.append((path, query))
            return by_type[kind]

        async def post(_client: Client, verb: str, request: msgspec.Struct, kind: type, **_: Any) -> Any:
            asked.append((verb, request))
            return by_type[kind]

        monkeypatch.setattr(Client, "get", get)
        monkeypatch.setattr(Client, "post", post)
        return asked

    return answer_with
