"""What passes between a party and the SuperLink: the coordinator's gate and the party's own.

Flower's SuperLink serves everything on one port, its unguarded control interface too, and a node runs whatever app the
SuperLink hands it. So the SuperLink listens on the loopback alone. Before it stands the coordinator's gate: a TLS
listener that demands a certificate of the authority, lets nothing pass but a node's own requests under the very key of
that certificate, once each, about the messages that were handed to it and no others (`handed.py`), and no more bytes
than one message holds. On the other side, a party's nodes reach the world through the party's gate, which lets no app
in but the relay that this version of Mycel installs.

The coordinator's gate also mends what Flower leaves open when a line is cut: a message whose delivery nobody confirmed
is delivered again, a part of an answer may come twice, and a node that died is taken off the list when its party comes
back, not a minute later.
"""

from __future__ import annotations

import base64
import logging
import ssl
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from mycel.engines.flower.engine import PART
from mycel.guard.freshness import Signatures, clock_is_off
from mycel.guard.handed import ANSWER, CONFIRM, EXAMINED, FLEET, PULL, Handed
from mycel.guard.keys import in_date, spki
from mycel.wire.fields import varint
from mycel.wire.http import Caller, Head, Reply
from mycel.wire.policy import Door, Policy

OPERATING = "/mycel/"
HEARTBEAT = "/v1/fleet/send-node-heartbeat"
POLL = f"{FLEET}pull-messages"
PUSH = f"{FLEET}push-object"
ACTIVATE, DEACTIVATE = f"{FLEET}activate-node", f"{FLEET}deactivate-node"
APP = f"{FLEET}get-fab"
PARCELS = {PUSH, PULL, ANSWER, CONFIRM}
ALLOWED = {HEARTBEAT, f"{FLEET}get-run"}
ALLOWED |= PARCELS | {ACTIVATE, DEACTIVATE, POLL, APP}
UNKNOWN = {f"{FLEET}register-node", f"{FLEET}unregister-node"}  # what a node without a key asks for
PURPOSE = {
    PUSH: "parcels",
    PULL: "parcels",
    POLL: "polling",
    HEARTBEAT: "polling",
}
REQUEST = 1 << 23  # bytes of one request: Flower cuts what it sends into pieces of 5 MiB
BETWEEN = PART + PART // 4  # bytes that a party may send between two messages that it is given, repeats after cuts too
REPEATS = 3  # deliveries of a message that is never confirmed
REMEMBERED = 256  # parts of an answer whose storage is remembered; a message has some thirty
logger = logging.getLogger("mycel.party")


@dataclass
class Traffic:
    """What one party sent and received, as the kernel counts it, by purpose."""

    received: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    since: int = 0
    asked: bytes = b""
    unconfirmed: Reply | None = None
    repeats: int = 0
    stored: dict[bytes, Reply] = field(default_factory=dict)
    handed: Handed = field(default_factory=Handed)
    signatures: Signatures = field(default_factory=Signatures)


@dataclass
class CoordinatorGate(Policy):
    """Knows the parties.

    Parameters
    ----------
    parties : callable
        Returns the admitted parties' public keys by name, as they are now; a key that is no longer there is refused.
    seats : callable
        Returns the SuperLink's number of each party's node.
    operators : callable
        Returns the public keys of those who may run recipes from elsewhere.
    desk : callable, optional
        Answers operators.
    """

    parties: Callable[[], Mapping[str, bytes]]
    seats: Callable[[], Mapping[str, int]] = dict
    operators: Callable[[], Mapping[str, bytes]] = dict
    desk: Door | None = None
    clock: Callable[[], float] = time.monotonic
    wall: Callable[[], datetime] = lambda: datetime.now(UTC)
    traffic: dict[str, Traffic] = field(default_factory=dict)

    def refuse(self, caller: Caller, head: Head) -> str:
        """Refuse strangers, what is not a node's or an operator's business, what was sent before, and floods."""
        if head.path.startswith(OPERATING):
            known = self.desk is not None and self._who(caller, self.operators())[0]
            return "" if known else "the certificate's key is not, or no longer, an operator's"
        if head.method != "POST" or head.path not in ALLOWED:
            return "this is not a node's request"
        if head.length > REQUEST:
            return "the request is too long"
        name, key = self._who(caller, self.parties())
        if not name:
            return "the certificate's key is not, or no longer, admitted"
        if base64.b64encode(key).decode() != head.headers.get("flwr-public-key"):
            return "the request is signed with another key than the connection's"
        traffic = self.traffic.setdefault(name, Traffic())
        why = clock_is_off(head.headers.get("flwr-timestamp", ""), self.wall()) or traffic.signatures.objection(
            head.headers.get("flwr-signature", ""), self.clock()
        )
        if why:
            return why
        if head.path == CONFIRM:
            traffic.unconfirmed = None
        if head.path in PARCELS:
            traffic.since += head.length
            if traffic.since > BETWEEN:
                return "more bytes than a message holds"
        return ""

    def _who(self, caller: Caller, admitted: Mapping[str, bytes]) -> tuple[str, bytes]:
        if not caller.certificate:
            return "", b""
        certificate = x509.load_der_x509_certificate(caller.certificate)
        key = spki(certificate.public_key()) if in_date(certificate) else b""
        return next(((name, key) for name, known in admitted.items() if known == key), ("", b""))

    def examines(self, head: Head) -> bool:
        """Look at what names objects and messages."""
        return head.path in EXAMINED

    def object_to_request(self, caller: Caller, head: Head, body: bytes) -> str:
        """Refuse what is about another party's messages, or about none that was ever handed over."""
        return self._traffic(caller).handed.objection(head.path, body)

    def _traffic(self, caller: Caller) -> Traffic:
        return self.traffic.setdefault(self._who(caller, self.parties())[0], Traffic())

    def holds(self, head: Head) -> bool:
        """Hold back an empty poll: Flower's nodes sleep three seconds after each."""
        return head.path == POLL

    def inspects(self, head: Head) -> bool:
        """Look at how a node's registration ends."""
        return head.path == ACTIVATE

    def before(self, caller: Caller, head: Head, status: int, alone: bool) -> tuple[str, bytes] | None:
        """Have a party that comes back, and is nowhere else, leave first: Flower still counts on the node that died."""
        name, _ = self._who(caller, self.parties())
        if head.path != ACTIVATE or status == 200 or not alone or name not in self.seats():
            return None
        return DEACTIVATE, b"\x08" + varint(self.seats()[name])  # field 1: the node's number

    def door(self, head: Head) -> Door | None:
        """Leave operators to the desk."""
        return self.desk if head.path.startswith(OPERATING) else None

    def settles(self, head: Head) -> bool:
        """Watch over parts of an answer: Flower gives the whole answer up when it is sent one for the second time."""
        return head.path == PUSH

    def settle(self, caller: Caller, digest: bytes, reply: Reply) -> Reply:
        """Say of a part that was stored before that it is stored."""
        stored = self._traffic(caller).stored
        if reply.status == 200 and reply.body:
            stored[digest] = reply
            if len(stored) > REMEMBERED:
                del stored[next(iter(stored))]
        return reply if reply.body else stored.get(digest, reply)

    def kept(self, caller: Caller, head: Head, asked: bytes) -> Reply | None:
        """Deliver a message again whose node asks for the next without a word on it: the line was cut."""
        traffic = self._traffic(caller)
        again = head.path == POLL and asked == traffic.asked and traffic.repeats < REPEATS
        if traffic.unconfirmed is None or not again:
            return None
        traffic.repeats += 1
        return traffic.unconfirmed

    def answering(self, caller: Caller, head: Head, asked: bytes, reply: Reply) -> None:
        """Keep a message until its party confirms that it came; an empty or refused poll changes nothing."""
        traffic = self._traffic(caller)
        if head.path == POLL and reply.status == 200 and reply.body and reply is not traffic.unconfirmed:
            traffic.unconfirmed, traffic.asked, traffic.repeats = reply, asked, 0
            traffic.handed.note(reply.body)

    def forget(self) -> None:
        """Keep nothing of a SuperLink that has ended."""
        for traffic in self.traffic.values():
            traffic.unconfirmed = None
            traffic.stored.clear()
            traffic.handed.names.clear()

    def passed(self, caller: Caller, head: Head, answered: int) -> None:
        """Count what crossed the socket, and give a party that was handed a message room for its answer."""
        traffic = self._traffic(caller)
        purpose = PURPOSE.get(head.path, "protocol")
        if head.path == POLL and answered:
            traffic.since, purpose = 0, "protocol"
            traffic.stored.clear()
        # What the kernel has not sent yet shows at the next request, so bodies are counted by their lengths, and what
        # it counts beyond them - heads, the framing of TLS, a connection's handshake - by itself.
        first, beyond = caller.seen == (0, 0), "polling" if purpose == "polling" else "protocol"
        for counts, crossed, body in zip(
            (traffic.received, traffic.sent), caller.traffic(), (head.length, answered), strict=True
        ):
            shaking = max(crossed - body, 0) if first else 0
            counts[purpose] += body
            counts["handshakes"] += shaking
            counts[beyond] += crossed - body - shaking


class OpenGate(Policy):
    """Knows nobody: for trials on networks where everyone is trusted."""

    def refuse(self, caller: Caller, head: Head) -> str:
        """Refuse what is not a node's business."""
        return "" if head.path in ALLOWED | UNKNOWN and head.length <= REQUEST else "this is not a node's request"

    def holds(self, head: Head) -> bool:
        """Hold back an empty poll."""
        return head.path == POLL


@dataclass
class PartyGate(Policy):
    """Lets a party's node speak to the coordinator, and no code come back.

    Parameters
    ----------
    app : bytes
        The one bundle that may be installed.
    heard : callable, optional
        Told the path of each request.
    handed : callable, optional
        Told when the node has been handed a message.
    """

    app: bytes
    heard: Callable[[str], None] = lambda path: None
    handed: Callable[[], None] = lambda: None
    _told: str = ""

    def refuse(self, caller: Caller, head: Head) -> str:
        """Let a node's own requests out, nothing else."""
        self.heard(head.path)
        return "" if head.path in ALLOWED | UNKNOWN else "this is not a node's request"

    def inspects(self, head: Head) -> bool:
        """Look into apps."""
        return head.path == APP

    def object_to(self, head: Head, body: bytes) -> str:
        """Refuse an app that is not ours to the byte; little room is left for what Flower says beside it."""
        known = self.app in body and len(body) < len(self.app) + 1024
        return "" if known else "the coordinator sends an app that this version of Mycel does not know"

    def passed(self, caller: Caller, head: Head, answered: int) -> None:
        """Take note of a message."""
        if head.path == POLL and answered:
            self.handed()

    def told(self, why: str) -> None:
        """Put the coordinator's refusals down in the party's log, each until there is another."""
        if why != self._told:
            self._told = why
            logger.warning("the coordinator refuses: %s", why)


def server_context(certificate: Path, authority: Path | None = None) -> ssl.SSLContext:
    """Return a listener's TLS 1.3; with an authority, callers must show a certificate of it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(certificate)
    if authority is not None:
        context.load_verify_locations(authority)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(authority: Path, certificate: Path | None = None) -> ssl.SSLContext:
    """Return a caller's TLS 1.3, trusting one authority alone and showing ``certificate``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(authority)
    if certificate is not None:
        context.load_cert_chain(certificate)
    return context
