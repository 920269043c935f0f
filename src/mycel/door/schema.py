"""What clients may ask, checked: the bodies of the OpenAI interface, as far as they are served."""

from __future__ import annotations

import json
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from mycel.generation.request import Sampling

MOST_BODY = 4 << 20
MOST_CHOICES = 16
MOST_PROMPTS = 64
Stop = StrictStr | list[StrictStr] | None


class Refused(Exception):
    """A request is refused: status, sentence, and the field it is about."""

    def __init__(self, status: int, message: str, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.code = status, message, field, code


class _Options(BaseModel):
    include_usage: StrictBool = False


class _Body(BaseModel):
    """What both kinds of request share. Fields of the interface that change nothing here are ignored."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: StrictStr
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: StrictInt = Field(0, ge=0)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    seed: StrictInt | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Stop = None
    stream: StrictBool = False
    stream_options: _Options | None = None
    n: StrictInt = Field(1, ge=1, le=MOST_CHOICES)
    ignore_eos: StrictBool = False

    def stops(self) -> tuple[str, ...]:
        """Return the stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def drawing(self, choice: int, logprobs: int) -> Sampling:
        """Return how tokens of one of the ``n`` choices are drawn."""
        seed = None if self.seed is None else (self.seed + choice) % 2**63
        return Sampling(
            self.temperature,
            self.top_p,
            self.top_k,
            self.frequency_penalty,
            self.presence_penalty,
            seed,
            logprobs,
        )


class CompletionBody(_Body):
    """Of ``POST /v1/completions``."""

    prompt: StrictStr | list[StrictInt] | list[StrictStr] | list[list[StrictInt]]
    max_tokens: StrictInt | None = Field(16, ge=1)
    logprobs: StrictInt | None = Field(None, ge=0, le=20)
    echo: StrictBool = False

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts, texts or token ids."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if given and isinstance(given[0], int):
            return [[token for token in given if isinstance(token, int)]]
        if not 1 <= len(given) <= MOST_PROMPTS:
            raise Refused(400, f"prompt holds {len(given)} prompts: send 1 to {MOST_PROMPTS}", "prompt")
        return [item for item in given if not isinstance(item, int)]


class Message(BaseModel):
    """One turn of a conversation; content in parts must be text."""

    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | list[dict[str, Any]]

    def text(self) -> str:
        """Return the content as one text."""
        if isinstance(self.content, str):
            return self.content
        for part in self.content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise Refused(400, "messages hold a part that is not text: this model reads text only", "messages")
        return "".join(str(part["text"]) for part in self.content)


class ChatBody(_Body):
    """Of ``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_tokens: StrictInt | None = Field(None, ge=1)
    max_completion_tokens: StrictInt | None = Field(None, ge=1)
    logprobs: StrictBool | None = False
    top_logprobs: StrictInt | None = Field(None, ge=0, le=20)


UNSERVED = ("tools", "functions", "logit_bias", "best_of", "suffix", "audio")
AnyBody = TypeVar("AnyBody", bound=_Body)


def parse(kind: type[AnyBody], raw: bytes) -> AnyBody:
    """Read a body.

    Raises
    ------
    Refused
        With status 400 and a sentence, for whatever is wrong with it.
    """
    try:
        content = json.loads(raw.decode("utf-8"))
        if rb"\ud" in raw.lower():
            json.dumps(content, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise Refused(400, f"the body is not UTF-8 at byte {error.start}: send JSON in UTF-8") from error
    except UnicodeEncodeError as error:
        raise Refused(
            400, "the body holds half of a surrogate pair, which is no character: send both halves"
        ) from error
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON ({str(error)[:100]}): send one JSON object") from error
    if not isinstance(content, dict):
        raise Refused(400, f"the body is a JSON {type(content).__name__}: send one JSON object")
    for name in UNSERVED:
        if content.get(name):
            raise Refused(400, f"{name} is not served here: leave it out", name)
    response = content.get("response_format")
    if isinstance(response, dict) and response.get("type", "text") != "text":
        raise Refused(400, "response_format other than text is not served here: leave it out", "response_format")
    try:
        return kind.model_validate({key: value for key, value in content.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"][:2])
        raise Refused(400, f"{field[:80]}: {first['msg'][:200]}", field[:80]) from error
