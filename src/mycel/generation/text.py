"""From tokens to text as they come: complete characters only, and nothing that may yet become a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast


class Reader:
    """Turns one request's tokens into text.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerFast
        The model's.
    stop : sequence of str
        Texts that end the request and are not shown.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._decoded = 0  # characters that the stream has given
        self._held = ""
        self.stopped = False

    def read(self, token: int) -> str:
        """Take one token and return the text that may now be shown; sets ``stopped`` at a stop text."""
        self._tokens.append(token)
        piece = self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
        self._decoded += len(piece)
        return self._release(piece, last=False)

    def finish(self) -> str:
        """Return what was held back; bytes that make no character are shown as the replacement character."""
        whole = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        return self._release(whole[self._decoded :], last=True)

    def _release(self, piece: str, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Return how many last characters of ``text`` are the beginning of ``stop``."""
    for count in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:count]):
            return count
    return 0
