"""Blocking and asyncio client behind one interface."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from els_client import AsyncClient, Client, Query, Step


class Twin:
    """Either client behind one face, so that one test proves both: calls and loops are awaited."""

    def __init__(self, client: Client | AsyncClient) -> None:
        self.client = client

    async def call(self, method: str, *args: Any, **options: Any) -> Any:
        answer = getattr(self.client, method)(*args, **options)
        return answer if isinstance(self.client, Client) else await answer

    async def steps(self, **options: Any) -> list[Step]:
        if isinstance(self.client, Client):
            return list(self.client.sample(**options))
        return [step async for step in self.client.sample(**options)]

    async def many(self, queries: Iterable[Query], **options: Any) -> list[Any]:
        answers = self.client.denoise_many(queries, **options)
        return list(answers) if isinstance(answers, Iterator) else [one async for one in answers]

    async def operate(self, method: str, *args: Any, **options: Any) -> Any:
        answer = getattr(self.client.repository, method)(*args, **options)
        return answer if isinstance(self.client, Client) else await answer

    async def close(self) -> None:
        await self.call("close")
