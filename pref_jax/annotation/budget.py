"""What a run may spend, and what it has spent: counted per attempt, reserved before it is sent."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from pref_jax.annotation.prompt import CHARACTERS_PER_TOKEN

_UNSEEN = 1.5  # times an estimate from lengths, until the server has counted once


@dataclass(frozen=True)
class Prices:
    """In any one currency, per million tokens."""

    prompt: float = 0.0
    completion: float = 0.0

    def cost(self, prompt: float, completion: float) -> float:
        return (prompt * self.prompt + completion * self.completion) / 1e6


@dataclass
class Usage:
    """What the attempts for one or several questions have taken.

    Attributes:
      attempts: requests that were sent and not turned away by a rate limit.
      prompt, completion: tokens as the server counts them, estimated where it does not say.
      cost: as the server says, else by prices.
    """

    attempts: int = 0
    prompt: int = 0
    completion: int = 0
    cost: float = 0.0

    def add(self, other: "Usage") -> None:
        self.attempts += other.attempts
        self.prompt += other.prompt
        self.completion += other.completion
        self.cost += other.cost


class SpentError(Exception):
    """Nothing more may be sent; names the flag that says so."""


class Budget:
    """Limits over all workers.

    Before a request is sent its likely cost is set aside, so that requests in flight together
    cannot pass the limit by more than they were underestimated.

    Args:
      prices: of tokens.
      max_cost: least upper bound of the cost, None for none.
      max_requests: requests that may be sent, None for none.
    """

    def __init__(
        self, prices: Prices, max_cost: float | None = None, max_requests: int | None = None
    ) -> None:
        self.prices = prices
        self.total = Usage()
        self.requests = 0
        self._max_cost, self._max_requests = max_cost, max_requests
        self._reserved = 0.0
        self._open = 0
        self._changed = asyncio.Condition()
        self._ratio = 0.0  # most tokens counted by the server per token estimated
        self._completion = 0  # longest answer so far
        self._charged = 0.0  # dearest answer so far, where the server says so

    @contextlib.asynccontextmanager
    async def request(self, prompt: int, max_tokens: int) -> AsyncIterator[Usage]:
        """Sets aside the likely cost of a request; what it took is filled in by the caller.

        Args:
          prompt: tokens of the question, estimated from its length.
          max_tokens: most tokens of the answer.

        Raises:
          SpentError: the limit is reached.
        """
        likely = self.prices.cost(
            prompt * (self._ratio or _UNSEEN),
            min(self._completion, max_tokens) if self._completion else max_tokens,
        )
        likely = max(likely, self._charged)
        async with self._changed:
            while not self._fits(likely):
                if not self._open:
                    raise SpentError("--max_cost")
                await self._changed.wait()
            if self._max_requests is not None and self.requests >= self._max_requests:
                raise SpentError("--max_requests")
            self.requests += 1
            self._reserved += likely
            self._open += 1
        usage = Usage()
        try:
            yield usage
        finally:
            self._reserved -= likely
            self._open -= 1
            self.total.add(usage)
            async with self._changed:
                self._changed.notify_all()

    def learn(self, estimated: int, tokens: tuple[int, int] | None, charged: float | None) -> None:
        """Takes what the server counts and charges as the measure of further estimates."""
        if tokens is not None:
            prompt, completion = tokens
            self._ratio = max(self._ratio, prompt / max(estimated, 1))
            self._completion = max(self._completion, completion)
        self._charged = max(self._charged, charged or 0.0)

    def guess(self, prompt: int, answer: str | None = None) -> tuple[int, int]:
        """Tokens of a request that the server did not count, its answer perhaps lost."""
        completion = self._completion if answer is None else len(answer) // CHARACTERS_PER_TOKEN
        return round(prompt * (self._ratio or 1.0)), completion

    def _fits(self, likely: float) -> bool:
        if self._max_cost is None:
            return True
        return self.total.cost + self._reserved + likely <= self._max_cost
