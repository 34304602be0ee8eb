"""Each host method in its two forms, sync and async, behind one coroutine function."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

Call = Callable[..., Awaitable[Any]]


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest) -> Call:
    """Call `name` of an object, or its async twin `a<name>`."""

    async def run(target: object, name: str, *args: Any, **kwargs: Any) -> Any:
        if request.param == "sync":
            return getattr(target, name)(*args, **kwargs)
        return await getattr(target, f"a{name}")(*args, **kwargs)

    return run
