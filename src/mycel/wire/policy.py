"""What a relay may be told to do with the requests and answers that it carries."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from mycel.wire.http import Caller, Head, Reply, Side

Door = Callable[[str, bytes, Side], Awaitable[None]]  # given the path, the body, and the connection, which is its own


class Policy:
    """Lets everything pass; others say what they change."""

    def refuse(self, caller: Caller, head: Head) -> str:
        """Return why a request may not pass, or nothing."""
        return ""

    def examines(self, head: Head) -> bool:
        """Return whether ``object_to_request`` wants to see the request's body, before anything of it passes."""
        return False

    def object_to_request(self, caller: Caller, head: Head, body: bytes) -> str:
        """Return why a request may not pass, or nothing."""
        return ""

    def holds(self, head: Head) -> bool:
        """Return whether an empty answer to this request is held back until there is something to bring."""
        return False

    def inspects(self, head: Head) -> bool:
        """Return whether ``object_to`` wants to see the answer."""
        return False

    def object_to(self, head: Head, body: bytes) -> str:
        """Return why an answer may not pass, or nothing."""
        return ""

    def before(self, caller: Caller, head: Head, status: int, alone: bool) -> tuple[str, bytes] | None:
        """Return path and body of what has to be asked first, after which a request is made again; None: it stands.

        ``alone`` says that the caller has no other connection here.
        """
        return None

    def door(self, head: Head) -> Door | None:
        """Return who answers a request here, in the target's place."""
        return None

    def settles(self, head: Head) -> bool:
        """Return whether ``settle`` decides on the answer to a request that changes something."""
        return False

    def settle(self, caller: Caller, digest: bytes, reply: Reply) -> Reply:
        """Return the answer to a request, known by the hash of its path and body; it may be made again after a cut."""
        return reply

    def kept(self, caller: Caller, head: Head, asked: bytes) -> Reply | None:
        """Return an answer that was given to the same request before and may not have arrived, or None."""
        return None

    def answering(self, caller: Caller, head: Head, asked: bytes, reply: Reply) -> None:
        """Take note of a whole answer before it is given."""

    def told(self, why: str) -> None:
        """Take note of why the target refused a request."""

    def passed(self, caller: Caller, head: Head, answered: int) -> None:
        """Take note of a request that was answered with so many bytes."""
