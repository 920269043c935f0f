"""``mycel export``: a model, its adapter merged, in the format of another engine."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console

from mycel.errors import GenerationError

FORMATS = ("gguf", "ctranslate2")


def export_command(model: str, form: str, out: Path | None, quantization: str) -> None:
    """Write ``model`` for another engine and say where it is."""
    if form not in FORMATS:
        raise GenerationError(f"--format is {form!r}: choose one of {', '.join(FORMATS)}")
    messages = Console(stderr=True)
    with messages.status("loading libraries") as status, tempfile.TemporaryDirectory(prefix="mycel-") as scratch:
        from mycel.generation.export import merged_folder
        from mycel.generation.served import find_model

        found = find_model(model, progress=lambda phase, done, total: status.update(f"{phase} {done}/{total}"))
        name = Path(model).name if found.adapters else found.name
        target = out or Path(f"{name}.gguf" if form == "gguf" else f"{name}-ctranslate2")
        if target.exists():
            raise GenerationError(f"{str(target)!r} exists: remove it, or choose another place with --out")
        status.update("merging the adapter")
        folder = merged_folder(found, Path(scratch))
        status.update(f"writing {target}")
        if form == "gguf":
            from mycel.generation.gguf import write_gguf

            write_gguf(folder, target, quantization or "f32")
        else:
            from mycel.generation.ctranslate import convert

            convert(folder, target, quantization or "int8")
    print(target)
