"""Who else looks: a party that reads its own briefs, and somebody on the line. Each is given what it sees, as a scene.

curious party     knows its briefs and its own update: two briefs in a row tell what the others sent, added up
eavesdropper      in the clear reads every frame, as the coordinator does; under TLS it sees lengths and times

A scene as one of them sees it is one that the attacks of `mycel.rounds.assaults` can be pointed at.
"""

from __future__ import annotations

import ssl
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from mycel.engines.identity import Authority
from mycel.errors import ParcelError
from mycel.guard.clip import clip
from mycel.rounds.assaults import Scene, domain, membership, shadowed, words
from mycel.rounds.system import State
from mycel.wire.algebra import group, scale, subtract
from mycel.wire.codecs import parse_codec
from mycel.wire.parcel import Parcel, Tensors

CURIOUS = 1  # the party that looks
RECORD, RECORD_BYTES = 1 << 14, 22  # TLS 1.3: bytes of content in a full record, and what is added to each


def curious_party(scene: Scene, node: int = CURIOUS) -> Scene:
    """Return the scene as a party sees it: the models it was sent, and what they leave of the others' updates.

    The best it can say of any other party's update is the mean of them all: the change between two briefs without its
    own share. It takes parties to be of one size.
    """
    states = _told(scene, node)
    count, rate = len(scene.parties), float(scene.recipe.knobs.get("server_rate", 1.0))
    sent, seen = _answered(scene), []
    for version in range(len(states) - 1):
        mean = scale(subtract(states[version + 1].shared, states[version].shared), 1 / rate)
        rest = scale(subtract(scale(mean, count), _own(scene, sent[version], node, version)), 1 / (count - 1))
        seen.append({other: rest for other in range(count) if other != node})
    return replace(scene, states=states, seen=seen)


def eavesdropper(scene: Scene) -> Scene:
    """Return the scene as somebody sees it who reads every frame on the line."""
    return replace(scene, states=_told(scene), seen=_answered(scene))


def under_tls(scene: Scene) -> tuple[float, float]:
    """What is left to an eavesdropper by TLS: the share of frames it can read, and of domains that lengths tell.

    The attacker makes an answer of its own from examples of each domain, and takes each party for the domain whose
    answer is nearest in length; what all answers have more than its own it takes off. Domains that tie share the hit.
    """
    answers = [crossing for crossing in scene.crossed if (crossing.direction, crossing.kind) == ("up", "work")]
    lines = on_the_line(crossing.frame for crossing in answers)
    found: dict[int, int] = {}
    for crossing, line in zip(answers, lines, strict=True):
        found.setdefault(crossing.node, content_length(len(line)))
    codec = parse_codec(scene.recipe.wire.codec)
    shadows = [len(made.to_bytes(codec)) for made in shadowed(scene)]
    common = fmean(found.values()) - fmean(shadows)
    right = 0.0
    for node, length in found.items():
        apart = [abs(length - common - shadow) for shadow in shadows]
        nearest = [place for place, distance in enumerate(apart) if distance == min(apart)]
        right += (node in nearest) / len(nearest)
    return fmean(map(_readable, lines)), right / len(found)


def content_length(length: int) -> int:
    """Bytes of content in ``length`` bytes on a TLS 1.3 connection: an eavesdropper can tell them exactly."""
    records = -(-length // (RECORD + RECORD_BYTES))
    return length - records * RECORD_BYTES


def on_the_line(frames: Iterable[bytes]) -> list[bytes]:
    """Return the bytes that cross for each frame, of one TLS connection between two ends in this process."""
    with tempfile.TemporaryDirectory(prefix="mycel-") as folder:
        member = Authority.new("line").issue("coordinator")
        chain = Path(folder) / "chain.pem"
        chain.write_bytes(member.certificate + member.key)
        far = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        far.load_cert_chain(chain)
    near = ssl.create_default_context(cadata=member.authority.decode())
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (near.wrap_bio(back, there, server_hostname="localhost"), far.wrap_bio(there, back, server_side=True))
    for end in (*ends, *ends):  # two flights each way make the handshake
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
    lines = []
    for frame in frames:
        ends[0].write(frame)
        line = there.read()
        lines.append(line)
        there.write(line)
        arrived = bytearray()
        while len(arrived) < len(frame):
            arrived += ends[1].read(len(frame))
        assert arrived == frame
    return lines


def observe(scene: Scene) -> list[dict[str, Any]]:
    """Point the attacks at a scene as each observer sees it: a row each."""
    rows: list[dict[str, Any]] = []
    views = {"coordinator": scene, "a party": curious_party(scene), "eavesdropper, in the clear": eavesdropper(scene)}
    for name, view in views.items():
        told = {"word recall": words(view), "membership": membership(view), "domain": domain(view)}
        rows.append({"observer": name, **told})
    _, told_by_length = under_tls(scene)
    nothing = {"word recall": "-", "membership": "-", "domain": told_by_length}
    return [*rows, {"observer": "eavesdropper, TLS", **nothing}]


def _told(scene: Scene, node: int | None = None) -> list[State]:
    """The states that briefs tell, of one node or of all, in the order of their versions."""
    found: dict[int, Tensors] = {}
    for crossing in scene.crossed:
        if crossing.direction == "down" and crossing.kind in {"work", "deliver"} and node in {None, crossing.node}:
            brief = Parcel.from_bytes(crossing.frame)
            found.setdefault(int(brief.header["version"]), group(brief.tensors, "shared"))
    return [scene.states[0].but(shared=found[version]) for version in sorted(found)]


def _answered(scene: Scene) -> list[dict[int, Tensors]]:
    """For each round, the updates that can be read in the answers."""
    seen: list[dict[int, Tensors]] = [{} for _ in range(scene.recipe.rounds.count)]
    count = dict.fromkeys(range(len(scene.parties)), 0)
    for crossing in scene.crossed:
        if (crossing.direction, crossing.kind) == ("up", "work"):
            seen[count[crossing.node]][crossing.node] = group(Parcel.from_bytes(crossing.frame).tensors, "update")
            count[crossing.node] += 1
    return seen


def _own(scene: Scene, sent: Mapping[int, Tensors], node: int, version: int) -> Tensors:
    """What a party knows to have put into the sum: it did the work itself."""
    guard, world = scene.recipe.guard, scene.finished.world
    update = sent[node]
    if not update:  # hidden from everybody else
        briefs = (one for one in scene.crossed if (one.direction, one.kind, one.node) == ("down", "work", node))
        brief = Parcel.from_bytes(list(briefs)[version].frame)
        update = group(scene.finished.system.work(brief, world.site.party(node, version)).tensors, "update")
    return clip(update, guard.clip_norm) if guard.private == "user" else update


def _readable(line: bytes) -> bool:
    try:
        Parcel.from_bytes(line)
    except ParcelError:
        return False
    return True
