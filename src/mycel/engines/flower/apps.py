"""What Flower runs: a ServerApp and a ClientApp that pass messages on, and neither decide nor keep anything.

A message holds a line of JSON and bytes: short ones beside it, since each of Flower's records costs requests, long ones
as an array. The ServerApp learns where its owner listens from its environment, the ClientApp from its node's
configuration, never from a message.
"""

from __future__ import annotations

import json
import os
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from httpx import HTTPStatusError

from mycel.engines.line import LINE, Control, dial, hang_up, place_of, receive, send

PATIENT = 0.05  # share of the time waited so far that may pass before asking the SuperLink again
SOONEST, LATEST = 0.05, 1.0  # seconds between two such questions
BESIDE = 1 << 20  # bytes that travel in the record of the JSON
UNKNOWN = 401  # what a SuperLink that was started again says to a run that it knows nothing of
UNREACHABLE = 5  # Flower's code for a node that sends no heartbeats

client, server = ClientApp(), ServerApp()


def pack(control: Control, frame: bytes) -> RecordDict:
    """Lay a message out as Flower's records."""
    text = json.dumps(control)
    if len(frame) <= BESIDE:
        return RecordDict({"control": ConfigRecord({"json": text, "frame": frame})})
    records: dict[str, Any] = {"control": ConfigRecord({"json": text})}
    records["frame"] = ArrayRecord({"bytes": Array("uint8", (len(frame),), "bytes", frame)})
    return RecordDict(records)


def unpack(content: RecordDict) -> tuple[Control, bytes]:
    """Inverse of ``pack``."""
    record = content.config_records["control"]
    beside = record.get("frame")
    frame = beside if isinstance(beside, bytes) else content.array_records["frame"]["bytes"].data
    return json.loads(str(record["json"])), frame


@client.query()
def answer(message: Message, context: Context) -> Message:
    """Pass a message to the party's own process and its answer back."""
    control, frame = unpack(message.content)
    control["job"] = context.run_config.get("job", "")
    with dial(str(context.node_config["mycel"])) as line:
        send(line, control, frame)
        reply = receive(line)
    return Message(pack(*reply), reply_to=message)


@server.main()
def carry(grid: Grid, context: Context) -> None:
    """Carry the coordinator's messages until it hangs up."""
    with dial(str(place_of(os.environ[LINE], str(context.run_config["job"])))) as line:
        post = Post(grid, line)
        try:
            while True:
                control, frame = receive(line)
                threading.Thread(target=post.carry, args=(control, frame), daemon=True).start()
        except (EOFError, OSError):
            post.ended.set()


class Post:
    """Carries each message in a thread of its own, so that no party's slow upload holds up another's."""

    def __init__(self, grid: Grid, line: Connection) -> None:
        self._grid, self._line = grid, line
        self._sending = threading.Lock()
        self.ended = threading.Event()

    def carry(self, control: Control, frame: bytes) -> None:
        """Carry out one command of the coordinator and say what came of it."""
        tag = control.pop("tag")
        try:
            if control["verb"] == "nodes":
                self._say({"tag": tag, "nodes": [str(node) for node in self._grid.get_node_ids()]})
                return
            reply = self._exchange(tag, int(control.pop("address")), control, frame)
            if reply is not None and reply.has_content():
                said, content = unpack(reply.content)
                self._say({"tag": tag, "said": said}, content)
            elif reply is not None:
                self._say({"tag": tag, "error": reply.error.reason})
        except HTTPStatusError as error:
            if error.response.status_code == UNKNOWN:  # no round may be made of what came before
                self.ended.set()
                hang_up(self._line)
            else:
                self._say({"tag": tag, "error": f"{type(error).__name__}: {error}"})
        except Exception as error:  # whatever Flower meets, the coordinator must hear of it
            self._say({"tag": tag, "error": f"{type(error).__name__}: {error}"})

    def _exchange(self, tag: int, address: int, control: Control, frame: bytes) -> Message | None:
        message = Message(pack(control, frame), dst_node_id=address, message_type="query")
        number = next(iter(self._grid.push_messages([message])), None)
        if number is None:
            raise RuntimeError("the SuperLink took no message")
        del message, frame
        began, gone = time.monotonic(), False
        while not self.ended.is_set():
            for reply in self._grid.pull_messages([number]):
                if reply.has_content() or reply.error.code != UNREACHABLE:
                    return reply
                if not gone:  # it may come back, and then its answer still comes
                    self._say({"tag": tag, "gone": True})
                gone = True
            self.ended.wait(min(max(PATIENT * (time.monotonic() - began), SOONEST), LATEST))
        return None

    def _say(self, control: Control, frame: bytes = b"") -> None:
        with self._sending:
            try:
                send(self._line, control, frame)
            except OSError:
                self.ended.set()
