"""``mycel chat``: a conversation in the terminal, answers as they come."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from rich.console import Console

from mycel.cli.serve import named_folders, need
from mycel.errors import GenerationError

if TYPE_CHECKING:
    from mycel.door.schema import Message
    from mycel.generation.served import Served


def chat_command(
    model: str, adapters: list[str], temperature: float, most: int, speculate: str = "", remote: str = ""
) -> None:
    """Talk until an empty line or the end of input."""
    need("starlette", "httpx", extra="serve")
    if remote and (adapters or speculate):
        raise GenerationError("--remote drafts here with MODEL alone: leave --adapter and --speculate out")
    named = named_folders(adapters)
    messages = Console(stderr=True)
    with messages.status("loading libraries") as status:
        from mycel.door.guessing import drafter_of, open_edge
        from mycel.generation.served import find_model, open_served

        def progress(phase: str, done: int, total: int) -> None:
            status.update(f"{phase} {done}/{total}")

        if remote:
            served = open_edge(model, remote, os.environ.get("MYCEL_REMOTE_KEY", ""), 1, progress=progress)
        else:
            served = open_served(find_model(model, named, progress), drafter=drafter_of(speculate, progress))
    adapter = next(iter(served.adapters), "")
    messages.print(f"[bold]{served.name}{':' + adapter if adapter else ''}[/bold]  (an empty line ends)")
    try:
        asyncio.run(_talk(served, f"{served.name}:{adapter}" if adapter else served.name, temperature, most, messages))
    except (EOFError, KeyboardInterrupt):
        messages.print()
    finally:
        served.backend.close()


async def _talk(served: Served, model: str, temperature: float, most: int, messages: Console) -> None:
    from mycel.door.schema import Message

    said: list[Message] = []
    while True:
        line = await asyncio.to_thread(messages.input, "[bold]you[/bold] ")
        if not line.strip():
            return
        said.append(Message(role="user", content=line))
        answer = await _answer(served, model, said, temperature, most)
        said.append(Message(role="assistant", content=answer))


async def _answer(served: Served, model: str, said: list[Message], temperature: float, most: int) -> str:
    from mycel.door.chat import chat_prompt
    from mycel.generation.request import Request, Sampling

    adapter = await served.adapter_of(model)
    while True:
        ids, stop = chat_prompt(served.tokenizer, said)
        room = served.backend.context - len(ids)
        if room >= min(most, 32) or len(said) == 1:
            break
        del said[:2]  # what no longer fits the context is forgotten, the oldest turns first
    request = Request(tuple(ids), max(1, min(most, room)), Sampling(temperature), stop, served.ends, adapter)
    parts = []
    async for token in served.backend.stream(request):
        print(token.text, end="", flush=True)
        parts.append(token.text)
    print()
    return "".join(parts)
