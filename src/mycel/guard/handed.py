"""What a party may touch at the SuperLink: what belongs to the messages that were handed to it, and nothing else.

Flower's SuperLink checks that a node speaks under its own number. It does not check whose objects a node reads or
removes: whoever knows the hash of a parcel's part may have it. Nor does it check whose replies a node brings, or that
it brings replies at all: a node may put a message to another one down in the SuperLink's own name. So the coordinator's
gate keeps, for each party, the names of what it was handed, and compares.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from mycel.errors import ParcelError
from mycel.wire.fields import fields, inner, only

FLEET = "/v1/fleet/"
PULL, ANSWER, CONFIRM = f"{FLEET}pull-object", f"{FLEET}push-messages", f"{FLEET}confirm-message-received"
EXAMINED = {PULL, ANSWER, CONFIRM}
OBJECT = 3  # field of a request that names an object; Flower's protocol fixes the numbers
MESSAGES, TREES = 2, 3  # fields of the request that brings replies
METADATA, REPLY_TO = 1, 5  # fields of a message, and of its metadata
NAME = re.compile(rb"[0-9a-f]{64}")  # messages and objects are named by hashes
REMEMBERED = 1 << 13  # names; a message of the longest kind has some forty


@dataclass
class Handed:
    """Names of the messages that a party was handed, and of their objects; the latest of them."""

    names: dict[bytes, None] = field(default_factory=dict)

    def note(self, reply: bytes) -> None:
        """Remember all that the SuperLink named as it handed a message over."""
        for name in NAME.findall(reply):
            self.names.pop(name, None)
            self.names[name] = None
        while len(self.names) > REMEMBERED:
            del self.names[next(iter(self.names))]

    def objection(self, path: str, request: bytes) -> str:
        """Return why a request may not pass, or nothing."""
        try:
            found = fields(request)
            if path == ANSWER:
                only(found, TREES)
                named = only(inner(inner(found, MESSAGES), METADATA), REPLY_TO)
            else:
                named = only(found, OBJECT)
        except ParcelError:
            return "the request is not laid out as a node's"
        if named in self.names:
            return ""
        return "the answer is to no message of this party's" if path == ANSWER else "the object is another's"
