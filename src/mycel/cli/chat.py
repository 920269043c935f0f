"""``mycel chat``: a conversation in the terminal, answers as they come."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from rich.console import Console

from mycel.cli.serve import named_folders, need

if TYPE_CHECKING:
    from mycel.door.schema import Message
    from mycel.generation.served import Served


def chat_command(model: str, adapters: list[str], temperature: float, most: int) -> None:
    """Talk until an empty line or the end of input."""
    need("starlette", extra="serve")
    named = named_folders(adapters)
    messages = Console(stderr=True)
    with messages.status("loading libraries") as status:
        from mycel.generation.served import find_model, open_served

        found = find_model(model, named, lambda phase, done, total: status.update(f"{phase} {done}/{total}"))
        served = open_served(found)
    adapter = next(iter(found.adapters), "")
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
