"""Caller who keeps many calls of many images at a model until its input ends.

usage: flood.py TARGET

Prints a line once calls are refused or give way, and then how many of them ended how, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter

import grpc
from tests.support.messages import asked, denoiser, images

CALLS, IMAGES = 20, 16


async def keep_asking(target: str) -> None:
    """Ask until the input ends."""
    outcomes: Counter[str] = Counter()
    ended, full = asyncio.Event(), asyncio.Event()

    async def one(channel: grpc.aio.Channel) -> None:
        request = asked(images(*range(IMAGES)), priority=3)
        while not ended.is_set():
            try:
                await denoiser(channel).Denoise(request, timeout=60)
                outcomes["OK"] += 1
            except grpc.aio.AioRpcError as error:
                outcomes[error.code().name] += 1
                full.set()
                await asyncio.sleep(0.05)

    async with grpc.aio.insecure_channel(target) as channel:
        calls = [asyncio.ensure_future(one(channel)) for _ in range(CALLS)]
        await full.wait()
        print("full", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        ended.set()
        await asyncio.gather(*calls)
    print(json.dumps(outcomes), flush=True)


if __name__ == "__main__":
    asyncio.run(keep_asking(sys.argv[1]))
