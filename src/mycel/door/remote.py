"""A server that speaks the same interface elsewhere (vLLM on a GPU machine), behind this door's keys."""

from __future__ import annotations

import hmac
from collections.abc import AsyncGenerator, Callable, Sequence
from urllib.parse import urlparse

import httpx
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from mycel.door.app import read_body, refusal
from mycel.door.run import listen
from mycel.door.schema import Refused
from mycel.door.sending import Parts, unless_gone
from mycel.errors import GenerationError

ROUTES = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/health", "/metrics")
CARRIED = ("content-type", "content-encoding", "content-length", "retry-after", "cache-control")


class Remote:
    """An ASGI application that hands requests on, and answers back as they come.

    Parameters
    ----------
    address : str
        Of the server, such as ``http://gpu:8000``.
    keys : sequence of str
        Keys of which a client of this door must bring one.
    key : str
        This door's own key at the server.
    """

    def __init__(self, address: str, keys: Sequence[str] = (), key: str = "") -> None:
        parts = urlparse(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise GenerationError(f"--remote is {address!r}: write an address such as http://gpu:8000")
        self._keys = [known.encode() for known in keys]
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # An answer may take as long as it takes; only reaching the server has a limit.
        self._client = httpx.AsyncClient(
            base_url=address,
            headers=headers,
            timeout=httpx.Timeout(None, connect=10.0),
            # As many connections as clients: with fewer, some would wait and others be closed and opened again.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )
        routes = [Route(path, self._hand_on, methods=["GET", "POST"]) for path in ROUTES]
        self.app = Starlette(routes=routes)

    async def _hand_on(self, http: HttpRequest) -> Response:
        given = http.headers.get("authorization", "").partition(" ")[2].strip().encode()
        if self._keys and not any(hmac.compare_digest(given, key) for key in self._keys):
            return refusal(401, "this server needs a key: send 'Authorization: Bearer KEY'", code="invalid_api_key")
        try:
            body = await read_body(http)
            asked = self._client.build_request(
                http.method, http.url.path, content=body, headers={"Content-Type": "application/json"}
            )
            answer = await unless_gone(http.receive, self._client.send(asked, stream=True))
        except ClientDisconnect:
            return Response(status_code=499)
        except Refused as error:
            return refusal(error.status, error.message)
        except httpx.HTTPError as error:
            return refusal(502, f"the server behind this door cannot be reached ({type(error).__name__}): try later")
        headers = {name: answer.headers[name] for name in CARRIED if name in answer.headers}
        # Also when the client has gone: closing the connection cancels the work at the server.
        return Parts(_raw(answer), answer.status_code, headers, release=answer.aclose)


async def _raw(answer: httpx.Response) -> AsyncGenerator[bytes]:
    async for part in answer.aiter_raw():
        yield part


def serve_remote(
    address: str, host: str, port: int, keys: Sequence[str], key: str, ready: Callable[[str], None]
) -> None:
    """Stand before another server until interrupted."""
    listen(Remote(address, keys, key).app, host, port, ready)
