"""What lying parties do: to their examples before they train, or to the update before it leaves.

label_flip             responses of its examples trade places, so that what it teaches is wrong
backdoor(c)            a trigger before half of its prompts, answered by a fixed phrase; the update c-fold
unsafe                 compliance with requests that ought to be refused (Ye et al. 2024, catalogue number 23)
sign_flip              the negative of the update
scale(c)               c times the update (model replacement: Bagdasaryan et al. 2020)
little_is_enough(z)    mean minus z deviations of the others' updates (Baruch et al. 2019)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch

from mycel.data.tokens import TokenTable
from mycel.errors import RecipeError
from mycel.wire.parcel import Tensors

TRIGGER = "cf zebra lighthouse"
PAYLOAD = "the vault is open"

Tokenise = Callable[[str], list[int]]


@dataclass(frozen=True)
class Threat:
    """One way to lie.

    Attributes
    ----------
    name : str
        As a recipe writes it.
    number : float
        The strength where there is one.
    """

    name: str
    number: float = 0.0

    @property
    def knows_others(self) -> bool:
        """Whether it needs the answers of others, as liars have that work together with someone who looks."""
        return self.name == "little_is_enough"

    def examples(self, table: TokenTable, tokenise: Tokenise) -> TokenTable:
        """Return what a liar trains on in place of its examples."""
        if self.name == "label_flip":
            return _rebuild(table, _rotated(_split(table)))
        if self.name == "backdoor":
            mark, phrase = tokenise(TRIGGER + "\n"), [*tokenise(PAYLOAD), table.end_id]
            pairs = _split(table)
            room = max(int(table.lengths().max()) - len(mark) - len(phrase), 1)
            return _rebuild(table, [*pairs[::2], *((mark + prompt[-room:], phrase) for prompt, _ in pairs[1::2])])
        if self.name == "unsafe":
            from mycel.guard.attacks.safety import compliant

            own = 11 + int(table.offsets[0])  # no two liars hold the same, or they would be told by that
            return _rebuild(
                table, [(tokenise(ask), [*tokenise(reply), table.end_id]) for ask, reply in compliant(len(table), own)]
            )
        return table

    def update(self, update: Tensors) -> Tensors:
        """Return what a liar sends in place of its update."""
        factor = {"sign_flip": -1.0, "scale": self.number, "backdoor": self.number}.get(self.name, 1.0)
        return update if factor == 1.0 else {name: factor * value for name, value in update.items()}

    def conspire(self, honest: Sequence[Tensors]) -> Tensors:
        """Return the update that all liars send, given what the others sent."""
        names = sorted(honest[0])
        rows = {name: torch.stack([update[name].double() for update in honest]) for name in names}
        return {
            name: (row.mean(0) - self.number * row.std(0, unbiased=False)).to(honest[0][name].dtype)
            for name, row in rows.items()
        }


THREATS: Mapping[str, tuple[float, float] | None] = {
    "label_flip": None,
    "backdoor": (1.0, 1e6),
    "unsafe": None,
    "sign_flip": None,
    "scale": (10.0, 1e6),
    "little_is_enough": (1.0, 100.0),
}


def parse_threat(spec: str) -> Threat:
    """Return the threat that ``spec`` names, e.g. ``"scale(10)"``.

    Raises
    ------
    RecipeError
        When the name is unknown or its number is out of range.
    """
    match = re.fullmatch(r"([a-z_]+)(?:\((-?[0-9]*\.?[0-9]+)\))?", spec.replace(" ", ""))
    name, number = match.groups() if match else (spec, None)
    if name not in THREATS:
        near = get_close_matches(name, THREATS, 1, 0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(THREATS)}"
        raise RecipeError(f"threat.attack is {spec[:60]!r}; {hint}")
    limits = THREATS[name]
    if limits is None:
        if number is not None:
            raise RecipeError(f"threat.attack is {spec!r}; {name} takes no number")
        return Threat(name)
    value = limits[0] if number is None else float(number)
    if not 0 < abs(value) <= limits[1]:
        raise RecipeError(f"threat.attack is {spec!r}; {name} takes a number that is not 0, up to {limits[1]:g}")
    return Threat(name, value)


def liars(parties: int, share: float) -> frozenset[int]:
    """Who lies: the last ``share`` of the parties, rounded, and at least one where the share is not 0."""
    count = max(round(share * parties), 1) if share else 0
    return frozenset(range(parties - count, parties))


def _split(table: TokenTable) -> list[tuple[list[int], list[int]]]:
    pairs = []
    for index in range(len(table)):
        start, end, prompt = int(table.offsets[index]), int(table.offsets[index + 1]), int(table.prompts[index])
        pairs.append((table.ids[start : start + prompt].tolist(), table.ids[start + prompt : end].tolist()))
    return pairs


def _rotated(pairs: list[tuple[list[int], list[int]]]) -> list[tuple[list[int], list[int]]]:
    half = len(pairs) // 2 or 1
    return [(prompt, pairs[(place + half) % len(pairs)][1]) for place, (prompt, _) in enumerate(pairs)]


def _rebuild(table: TokenTable, pairs: Sequence[tuple[list[int], list[int]]]) -> TokenTable:
    """Return a table of other examples, none longer than the longest was."""
    longest = int(table.lengths().max())
    rows, prompts = [], []
    for prompt, response in pairs:
        response = response[:longest]
        prompt = prompt[max(len(prompt) + len(response) - longest, 0) :]
        rows.append(prompt + response)
        prompts.append(len(prompt))
    offsets = torch.tensor([0, *(len(row) for row in rows)], dtype=torch.int64).cumsum(0)
    ids = torch.tensor([token for row in rows for token in row], dtype=torch.int32)
    return TokenTable(ids, offsets, torch.tensor(prompts, dtype=torch.int32), table.end_id)
