"""The verbs of serving, as the command line shows them; their bodies are imported when they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PANEL = "One model, many clients"
ModelName = Annotated[
    str, typer.Argument(help="A built-in size, a folder, a Hugging Face id, or a run folder.", metavar="MODEL")
]


def add_serving_commands(app: typer.Typer) -> None:
    """Add ``serve``, ``chat`` and ``export``."""
    app.command(rich_help_panel=PANEL, epilog="Example: mycel serve runs/quickstart-1 --port 8000")(serve)
    app.command(rich_help_panel=PANEL, epilog="Example: mycel chat tiny")(chat)
    app.command(rich_help_panel=PANEL, epilog="Example: mycel export runs/quickstart-1 --format gguf")(export)


def serve(
    model: ModelName,
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    engine: Annotated[
        str, typer.Option(help="mycel, ctranslate2, llama.cpp; vllm or edge for one at --remote.")
    ] = "mycel",
    adapter: Annotated[
        list[str] | None, typer.Option(help="One more adapter; asked for as MODEL:NAME.", metavar="NAME=FOLDER")
    ] = None,
    adapters: Annotated[
        Path | None, typer.Option(help="Folder of run folders; adapters that appear in it are loaded when asked for.")
    ] = None,
    memory: Annotated[str, typer.Option(help="For keys and values.")] = "512MiB",
    requests: Annotated[int, typer.Option(help="Most requests under way; more are told to come later.", min=1)] = 256,
    api_key: Annotated[
        list[str] | None, typer.Option(help="A key that opens the door; also MYCEL_API_KEYS, with commas.")
    ] = None,
    remote: Annotated[
        str, typer.Option(help="Server that answers for --engine vllm, or verifies what MODEL drafts for edge.")
    ] = "",
    swarm: Annotated[str, typer.Option(help="Folder of a swarm whose peers hold the model's blocks.")] = "",
    tensor_parallel: Annotated[
        str, typer.Option(help="Ranks that share every block, or their shares such as 3:1.", metavar="N")
    ] = "",
    weights: Annotated[str, typer.Option(help="auto, resident, mapped, tiered(8) or window(2) blocks.")] = "auto",
    speculate: Annotated[str, typer.Option(help="Guess tokens ahead: lookup, or draft:MODEL.")] = "",
    guesses: Annotated[int, typer.Option(help="Most tokens guessed ahead.", min=1, max=32)] = 4,
    log: Annotated[
        Path | None, typer.Option(help="Folder for a journal of times and counts; `mycel report` draws it.")
    ] = None,
) -> None:
    """Serve a model to any OpenAI client: completions and chat, streaming, adapters by name, metrics."""
    from mycel.cli.serve import Engine, Place, serve_command

    place = Place(host, port, api_key or [])
    how = Engine(engine, remote, swarm, weights, tensor_parallel, speculate, guesses)
    serve_command(model, place, how, adapter or [], adapters, memory, requests, log)


def chat(
    model: ModelName,
    adapter: Annotated[
        list[str] | None, typer.Option(help="Talk to this adapter over the base.", metavar="NAME=FOLDER")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.", min=0, max=2)] = 0.7,
    most: Annotated[int, typer.Option("--max-tokens", help="Most tokens of an answer.", min=1)] = 256,
    speculate: Annotated[str, typer.Option(help="Guess tokens ahead: lookup, or draft:MODEL.")] = "",
    remote: Annotated[
        str, typer.Option(help="Server of `mycel serve` that verifies what MODEL drafts here; key: MYCEL_REMOTE_KEY.")
    ] = "",
) -> None:
    """Talk to a model in the terminal; an empty line ends it."""
    from mycel.cli.chat import chat_command

    chat_command(model, adapter or [], temperature, most, speculate, remote)


def export(
    run: ModelName,
    format: Annotated[str, typer.Option("--format", help="gguf or ctranslate2.")] = "gguf",
    out: Annotated[Path | None, typer.Option(help="File or folder to write; beside the model by default.")] = None,
    quantization: Annotated[str, typer.Option(help="float32, int8 (ctranslate2); f32, f16, bf16, q8_0 (gguf).")] = "",
) -> None:
    """Write a model, its adapter merged, for other engines."""
    from mycel.cli.export import export_command

    export_command(run, format, out, quantization)
