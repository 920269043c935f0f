"""The audit finds what stays home by content, however it is dressed, and finds nothing where nothing is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mycel.errors import RunError
from mycel.guard.audit import Audit, Private
from mycel.run.execute import run_recipe
from mycel.run.frames import audit_run
from mycel.wire.codecs import parse_codec
from mycel.wire.parcel import Parcel
from small_runs import small_recipe

SECRET = "the patient in bed four has an unusual reaction to penicillin"
TOKENS = [17, 904, 33, 2041, 55, 6, 812, 1200, 9, 77, 431, 18]


def findings(parcel: Parcel, codec: str = "raw", **private: object) -> list[str]:
    audit = Audit(Private(**private))  # type: ignore[arg-type]
    audit.look(parcel.to_bytes(parse_codec(codec)), "frame 0")
    return audit.findings


@pytest.mark.parametrize(
    "parcel",
    [
        Parcel("answer", {"note": SECRET}),
        Parcel("answer", {}, {"update/a": torch.frombuffer(bytearray(SECRET.encode()), dtype=torch.uint8)}),
        Parcel("answer", {"deep": [{"er": ["x" + SECRET + "y"]}]}),
    ],
)
def test_texts_are_found_in_headers_and_bytes(parcel: Parcel) -> None:
    assert findings(parcel, texts=[SECRET])
    assert not findings(parcel, texts=[SECRET.replace("patient", "plaintiff").replace("penicillin", "nothing").upper()])


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.float32])
def test_tokens_are_found_in_any_width_and_as_numbers(dtype: torch.dtype) -> None:
    hidden = torch.cat([torch.zeros(7), torch.tensor(TOKENS), torch.ones(5)]).to(dtype)
    assert findings(Parcel("answer", {}, {"update/a": hidden}), tokens=[TOKENS])
    assert not findings(Parcel("answer", {}, {"update/a": hidden.flip(0)}), tokens=[TOKENS])


@pytest.mark.parametrize("codec", ["raw", "bf16", "int8", "raw+zstd"])
def test_personal_tensors_are_found_behind_codecs(codec: str) -> None:
    personal = torch.randn(64, generator=torch.Generator().manual_seed(1))
    other = torch.randn(64, generator=torch.Generator().manual_seed(2))
    sent = Parcel("answer", {}, {"update/a": torch.cat([other, personal])})
    assert findings(sent, codec, tensors={"control": personal})
    assert not findings(Parcel("answer", {}, {"update/a": other}), codec, tensors={"control": personal})


def test_a_run_is_clean_and_a_tampered_record_is_refused(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "data", {"guard.record_frames": True, "rounds.count": 1, "wire.codec": "int8"})
    result = run_recipe(recipe, tmp_path / "run")
    assert result["audit"]["clean"]
    assert result["audit"]["frames"] == 2 * 3 * 2  # a round and the delivery, there and back, three parties
    assert result["audit"]["bytes"] == result["bytes"]["up"] + result["bytes"]["down"]
    assert "Guards: promised" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    folder = tmp_path / "run" / "work" / "frames"
    first = json.loads((folder / "frames.jsonl").read_text().splitlines()[0])
    (folder / first["sha256"]).write_bytes(b"another")
    with pytest.raises(RunError, match="changed since it crossed"):
        audit_run(tmp_path / "run")


def test_a_leak_in_a_recorded_run_is_found(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "data", {"guard.record_frames": True, "rounds.count": 1})
    run_recipe(recipe, tmp_path / "run")
    from mycel.data.tokens import TokenStore
    from mycel.run.frames import FrameRecorder

    table = TokenStore.open(tmp_path / "run" / "work" / "tokens.safetensors").train(0)
    leak = Parcel("answer", {}, {"update/a": table.ids[:12].clone()})
    FrameRecorder(tmp_path / "run" / "work" / "frames")("up", 0, "work", leak.to_bytes())
    assert not audit_run(tmp_path / "run")["clean"]
