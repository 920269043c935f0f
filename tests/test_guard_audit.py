"""The audit finds what stays home by content, however it is dressed, and finds nothing where nothing is."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mycel.cli import app
from mycel.errors import RunError
from mycel.guard.audit import TOLD, Audit, Private, outline
from mycel.recipe.schema import Recipe
from mycel.rounds.laboratory import Laboratory
from mycel.rounds.simulation import Simulation
from mycel.run import frames
from mycel.run.execute import run_recipe
from mycel.run.frames import FrameRecorder, audit_run
from mycel.wire import shelf
from mycel.wire.codecs import parse_codec
from mycel.wire.parcel import Parcel
from mycel.wire.shelf import Frame, Kept, Shelf
from rounds_by_hand import SMALL
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

    table = TokenStore.open(tmp_path / "run" / "work" / "tokens.safetensors").train(0)
    leak = Parcel("answer", {}, {"update/a": table.ids[:12].clone()})
    FrameRecorder(tmp_path / "run" / "work" / "frames", keep=True)("up", 0, "work", leak.to_bytes())
    assert not audit_run(tmp_path / "run")["clean"]


def test_a_run_that_kept_no_frames_says_what_crossed_and_how_to_have_it_looked_through(tmp_path: Path) -> None:
    changes = {"rounds.count": 1, "wire.codec": "fixed(8,0.1)", "guard.sums": "masked", "rounds.quorum": 0.7}
    result = run_recipe(small_recipe(tmp_path / "data", changes), tmp_path / "run")
    found = audit_run(tmp_path / "run")
    assert result["audit"]["tensors"] == found["tensors"]
    assert found["bytes"] == result["bytes"]["up"] + result["bytes"]["down"]
    assert found["kinds"] == {"deliver": 6, "guard.keys": 6, "guard.reveal": 6, "guard.shares": 6, "work": 6}
    size = sum(math.prod(shape) for name, shape in found["tensors"].items() if name.startswith("shared/"))
    assert found["tensors"]["sealed/sum"] == [size + 1]
    assert "clean" not in found
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "at names, shapes and sizes" in page
    assert [path.name for path in (tmp_path / "run" / "work" / "frames").iterdir()] == ["frames.jsonl"]
    told = CliRunner().invoke(app, ["audit", str(tmp_path / "run")])
    assert told.exit_code == 0
    assert "guard.record_frames=true" in told.stdout
    (tmp_path / "run" / "work" / "frames" / "frames.jsonl").unlink()
    with pytest.raises(RunError, match="lists no frames"):
        audit_run(tmp_path / "run")


def test_the_list_is_bounded_and_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MOST", 4)
    frame = Parcel("answer", {}, {"update/a": torch.ones(3)}).to_bytes(parse_codec("int8"))
    for _ in range(2):
        recorder = FrameRecorder(tmp_path, keep=False)
        for _ in range(3):
            recorder("up", 0, "work", frame)
        with (tmp_path / "frames.jsonl").open("a") as listing:
            listing.write('{"direction": "u')  # killed
    (tmp_path / "frames.jsonl").write_text((tmp_path / "frames.jsonl").read_text().rpartition("\n")[0] + "\n")
    lines = frames.list_of(tmp_path)
    assert len(lines) == 4
    assert [line.get("tensors") for line in lines] == [{"update/a": [3]}, None, None, None]


def _claiming(listing: object, metadata: str = '{"kind": "answer"}') -> bytes:
    """A frame whose header says so, and nothing after it."""
    content = listing if isinstance(listing, bytes) else json.dumps({"__metadata__": {"mycel": metadata}, **listing})  # type: ignore[dict-item]
    header = content if isinstance(content, bytes) else content.encode()
    return len(header).to_bytes(8, "little") + header


DEEP = 200_000
ODD = [
    _claiming(b"[" * DEEP),
    _claiming({}, "[" * DEEP),
    _claiming({}, '{"shapes": [1]}'),
    _claiming({"\x1b[2Jupdate/a": {"shape": [1]}}),
    _claiming({"a" * 1000: {"shape": [1]}}),
    _claiming({"update/a": {"shape": "the patient in bed four"}}),
    _claiming({"update/a": {"shape": [{"deep": "the patient"}]}}),
    _claiming({"update/a": {"shape": [True, -1]}}),
    _claiming({"update/a": {"shape": [10**18]}}),
    _claiming({"update/a": {"shape": [1] * 17}}),
    _claiming({}, json.dumps({"shapes": {"update/a": {"b": 1}}})),
    _claiming({f"update/{place}": {"shape": [1]} for place in range(TOLD + 1)}),
    (1 << 63).to_bytes(8, "little") + b"{}",
    b"",
]


@pytest.mark.parametrize("frame", ODD, ids=range(len(ODD)))
def test_what_a_hostile_frame_says_of_itself_is_told_as_unreadable(frame: bytes) -> None:
    assert outline(frame) == {"(unreadable)": [len(frame)]}


def test_nesting_at_the_edge_of_what_can_be_read_ends_no_audit() -> None:
    audit = Audit(Private(texts=[SECRET]))
    for depth in range(800, 1000):
        note = "[" * depth + "]" * depth
        audit.look(_claiming({}, f'{{"kind": "answer", "header": {{"note": {note}}}}}'), "frame 0")
    assert 0 < audit.unreadable < audit.frames
    assert audit.kinds == {"answer": audit.frames - audit.unreadable}


def test_a_header_beyond_measure_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    part = Kept.__getitem__

    def watched(kept: Kept, which: slice) -> bytes:
        read.append(which.stop)
        return part(kept, which)

    monkeypatch.setattr(Kept, "__getitem__", watched)
    kept = Shelf(budget=0, folder=tmp_path).keep((1 << 23).to_bytes(8, "little") + bytes(1 << 23))
    assert outline(kept) == {"(unreadable)": [len(kept)]}
    assert read == [8]


def test_frames_in_files_are_listed_and_kept_without_being_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf, "PIECE", 1000)
    frame = Parcel("answer", {}, {"update/a": torch.randn(5000)}).to_bytes()
    kept = Shelf(budget=0, folder=tmp_path).keep(frame)

    def whole(kept: Kept) -> bytes:
        raise MemoryError

    monkeypatch.setattr(Kept, "__bytes__", whole)
    FrameRecorder(tmp_path / "frames", keep=True)("up", 0, "work", kept)
    ((where, found),) = frames.frames_of(tmp_path / "frames")
    assert found == frame
    assert "work, up, node 0" in where
    assert frames.list_of(tmp_path / "frames")[0]["tensors"] == {"update/a": [5000]}


def test_frames_that_are_all_unlike_do_not_fill_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "TOLD", 500)
    for _ in range(2):  # a run that goes on counts what stands there
        recorder = FrameRecorder(tmp_path, keep=False)
        for size in range(50):
            recorder("up", 0, "work", Parcel("answer", {}, {f"update/{size}": torch.ones(size)}).to_bytes())
    lines = frames.list_of(tmp_path)
    told = [line["tensors"] for line in lines if "tensors" in line]
    assert len(lines) == 100
    assert sum(len(json.dumps(outlined)) for outlined in told if outlined != frames.UNTOLD) <= 500
    assert told.count(frames.UNTOLD) == 1
    assert lines[-1]["outline"] == len(told) - 1


def test_a_watcher_that_stumbles_over_an_answer_does_not_end_the_run(lab: Laboratory) -> None:
    recipe = Recipe().replace({"model.base": "micro", **SMALL, "rounds.count": 1, "rounds.local_steps": 1})
    plain = lab.run(recipe)
    events: list[tuple[str, dict[str, object]]] = []

    def stumble(direction: str, node: int, kind: str, frame: Frame) -> None:
        if direction == "up":
            raise RecursionError("too deep")

    again = Simulation(
        plain.arm,
        plain.world,
        lab.place.labour,
        record=lambda event, **fields: events.append((event, fields)),
        wiretap=stumble,
    ).run()
    assert again.state.sha256() == plain.state.sha256()
    told = [fields["detail"] for event, fields in events if event == "unwatched"]
    assert told == ["RecursionError: too deep"] * 2 * len(plain.world.nodes)
