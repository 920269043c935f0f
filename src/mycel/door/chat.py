"""From a conversation to a prompt: by the tokeniser's own template, or by a plain one where it has none."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from mycel.door.schema import Message, Refused

NAMES = {"user": "User", "assistant": "Assistant"}
NEXT_TURN = "\nUser:"


def chat_prompt(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> tuple[list[int], tuple[str, ...]]:
    """Return the prompt's token ids and the texts that end the model's turn.

    Raises
    ------
    Refused
        When the template does not take this conversation.
    """
    turns = [{"role": _role(message.role), "content": message.text()} for message in messages]
    if getattr(tokenizer, "chat_template", None):
        try:
            ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        except (TemplateError, ValueError, KeyError, TypeError) as error:
            raise Refused(
                400, f"the model's chat template refuses these messages: {error}"[:300], "messages"
            ) from error
        return list(ids), ()
    return tokenizer(plain_template(turns), add_special_tokens=True)["input_ids"], (NEXT_TURN,)


def plain_template(turns: Sequence[dict[str, str]]) -> str:
    """Write a conversation for a model that was never taught one: named turns, instructions first."""
    lines = [
        f"{NAMES[turn['role']]}: {turn['content']}" if turn["role"] in NAMES else turn["content"] for turn in turns
    ]
    return "\n".join([*lines, "Assistant:"])


def _role(role: str) -> str:
    return "system" if role == "developer" else role
