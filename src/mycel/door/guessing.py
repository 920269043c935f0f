"""Who guesses ahead: what ``--speculate`` names, a small model here, or a small model here with a far one to verify."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Hashable, Sequence

import httpx
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mycel.errors import GenerationError
from mycel.generation.batched import Batched, Ticket
from mycel.generation.executor import Executor, Whole
from mycel.generation.request import Request
from mycel.generation.served import Served
from mycel.generation.speculation import Drafter
from mycel.models.base import Progress, find_base, open_base
from mycel.serve.draft_model import DraftModel
from mycel.serve.edge_draft import EdgeDraft
from mycel.serve.prompt_lookup import PromptLookup

ROUTE = "/v1/speculation"
PATIENCE = 60.0  # seconds for which a busy far side is asked again


def drafter_of(text: str, progress: Progress | None = None) -> Callable[[int], Drafter] | None:
    """Return what makes a drafter for a vocabulary: ``lookup``, or ``draft:MODEL``; None for an empty text."""
    kind, _, model = text.partition(":")
    if not text:
        return None
    if text == "lookup":
        return lambda vocabulary: PromptLookup()
    if kind != "draft" or not model:
        raise GenerationError(f"--speculate is {text[:80]!r}: write lookup, or draft:MODEL")
    small = open_base(find_base(model, progress)).model
    return lambda vocabulary: DraftModel(Whole(small), vocabulary)


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return 16 hexadecimal digits that tokenisers share if they make the same tokens of every text."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]


class Far:
    """The far side, behind a door.

    Parameters
    ----------
    address : str
        Such as ``http://far:8000``.
    key : str
        This side's key there.

    Attributes
    ----------
    model, context, tokenizer
        What is served there: name, most positions, and the tokeniser's fingerprint.
    """

    def __init__(self, address: str, key: str = "") -> None:
        if not address.startswith(("http://", "https://")):
            raise GenerationError(f"--remote is {address!r}: write an address such as http://far:8000")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx.Client(base_url=address, headers=headers, timeout=httpx.Timeout(PATIENCE, connect=10.0))
        try:
            about = self._sent("GET", "/v1/models").json()["data"][0]
            self.model, self.context, self.tokenizer = str(about["id"]), int(about["max_model_len"]), about["tokenizer"]
        except (ValueError, LookupError, TypeError) as error:
            self.client.close()
            raise GenerationError(f"{address} verifies no guesses: it is no server of `mycel serve`") from error
        except BaseException:
            self.client.close()
            raise

    def ask(self, frame: bytes) -> bytes:
        """Carry a question there and its verdict back; a busy server is asked again when it says so."""
        return self._sent("POST", ROUTE, frame).content

    def _sent(self, method: str, path: str, content: bytes = b"") -> httpx.Response:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                answer = self.client.request(method, path, content=content)
            except httpx.HTTPError as error:
                raise GenerationError(f"{self.client.base_url} cannot be reached ({type(error).__name__})") from error
            if answer.status_code == 200:
                return answer
            wait = answer.headers.get("retry-after", "")
            if answer.status_code != 429 or not wait.isdigit() or time.monotonic() + int(wait) > until:
                raise GenerationError(f"{self.client.base_url} refuses ({answer.status_code}): {_sentence(answer)}")
            time.sleep(int(wait))


class Edge(Batched):
    """A back end that drafts here and has the far model verify; its text is the far model's own."""

    def __init__(
        self, executor: Executor, tokenizer: PreTrainedTokenizerFast, far: Far, most: int, guesses: int
    ) -> None:
        self.far, self.guesses = far, guesses
        self.drafter = DraftModel(executor, executor.vocabulary)
        # A draft keeps its place beside the far model's context: a question carries guesses behind the tokens.
        super().__init__(tokenizer, executor.vocabulary, min(executor.context, far.context), most, 1)

    def alike(self, request: Request) -> Hashable:
        """Return the request's own identity: nothing is batched here."""
        return id(request)

    def generate(self, tickets: Sequence[Ticket]) -> None:
        """Generate for one request."""
        request = tickets[0].request
        edge = EdgeDraft(self.drafter, self.far.ask, request.sampling, self.vocabulary, self.guesses, self.far.model)
        for token in edge.tokens(request.prompt, request.most):
            if tickets[0].give(token):
                return

    def close(self) -> None:
        """End the thread and the connection."""
        super().close()
        self.far.client.close()


def open_edge(
    model: str, address: str, key: str, most: int, guesses: int = 4, progress: Progress | None = None
) -> Served:
    """Serve the far model's text, drafted here.

    Parameters
    ----------
    model : str
        The small model.
    address, key : str
        Of the server that verifies.
    most : int
        Largest number of unfinished requests.
    guesses : int
        Tokens guessed in one exchange.
    progress : callable, optional
        Told while a built-in size is trained.

    Raises
    ------
    GenerationError
        When the far side cannot be reached, or makes other tokens of a text.
    """
    folder = find_base(model, progress)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    far = Far(address, key)
    if far.tokenizer != fingerprint(tokenizer):
        far.client.close()
        raise GenerationError(
            f"{model!r} and the model at {address} have different tokenisers: draft with one of its kin"
        )
    return Served(far.model, tokenizer, Edge(Whole(open_base(folder).model), tokenizer, far, most, guesses))


def _sentence(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])[:300]
    except (ValueError, LookupError, TypeError):
        return answer.text[:100]
