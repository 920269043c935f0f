"""What a decision is: ``decide(observation) -> action``, pure, with what makes an action sound and what it costs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

Observation = TypeVar("Observation")
Action = TypeVar("Action")


class Decision(ABC, Generic[Observation, Action]):
    """Chooses an action from what is seen, and nothing else: no clock, no chance, no memory of its own."""

    @abstractmethod
    def decide(self, observation: Observation) -> Action:
        """Return the action; ``RecipeError`` when none is possible, saying why."""

    @abstractmethod
    def fault(self, observation: Observation, action: Action) -> str:
        """Return what is wrong with an action as a sentence, or an empty text when it may be taken."""

    @abstractmethod
    def cost(self, observation: Observation, action: Action) -> float:
        """Return what an action costs, by the model that the decision trusts; less is better."""
