"""Ratings of one question: the form of answer that the server takes, attempts, strict reading."""

import asyncio
import contextlib
import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import tenacity

from pref_jax.annotation.answer import BadAnswerError, Rated, is_one_object, parse
from pref_jax.annotation.budget import Budget, SpentError, Usage
from pref_jax.annotation.client import KEY_VARIABLE, Client, RefusedError, Reply, TransientError
from pref_jax.annotation.prompt import Prompt, Question
from pref_jax.errors import InputError, RunError

# How a form is asked for, from the surest on. llama.cpp takes the third word, others the second.
MODES = ("json_schema", "json_object with schema", "json_object", "none")
STRUCTURED = {
    "auto": MODES,
    "json_schema": MODES[:1],
    "json_object": MODES[1:3],
    "none": MODES[3:],
}
PROBES = 5  # questions that may go wrong before the server is given up
_LONGEST_WAIT = 60.0
_TOLD_PAUSE = 10.0  # seconds
_LONGEST_PAUSE = 3600.0  # seconds that a server may ask to wait while the run stays
_TEMPERATURE_STEP = 0.3
_MOST_LOST = 50  # questions in a row without any answer, before the server is given up


class StoppedError(Exception):
    """The run ends; the question was not answered, nor given up."""


@dataclass(frozen=True)
class Outcome:
    """What became of a question.

    Attributes:
      rated: per response; empty for a failure.
      reason: of a failure, else empty.
      raw: the last answer, where there was one.
      usage: of all attempts.
    """

    rated: tuple[Rated, ...]
    reason: str
    raw: str
    usage: Usage


@dataclass
class _Tries:
    """What happened to one question so far."""

    usage: Usage = field(default_factory=Usage)
    limited: int = 0
    answers: int = 0
    longer: bool = False
    reason: str = ""
    raw: str = ""
    started: float = field(default_factory=time.monotonic)

    def give_up(self) -> Outcome:
        return Outcome((), self.reason, self.raw, self.usage)


class Judge:
    """Asks a model, again where need be.

    Args:
      client: the server.
      model: its name there.
      modes: members of `MODES` that may be used.
      prompts: the two forms of question, by whether reasons stand inside the JSON.
      budget: what may be spent.
      attempts: requests for one question, not counting those that a rate limit turned away (of
        these there may be twice as many).
      temperature, seed: of a first attempt; further ones raise both.
      note: tells the user something on the way.

    Attributes:
      mode: a member of `MODES`; settled by `probe`.
      stop_reason: what the first call of `stop` said, else empty.
    """

    def __init__(
        self,
        client: Client,
        model: str,
        modes: Sequence[str],
        prompts: dict[bool, Prompt],
        budget: Budget,
        *,
        attempts: int,
        temperature: float,
        seed: int,
        note: Callable[[str], None] = print,
    ) -> None:
        self._note = note
        self._client, self._model, self._budget = client, model, budget
        self._prompts = prompts
        self._modes = tuple(modes)
        self._attempts, self._temperature, self._seed = attempts, temperature, seed
        self._stop = asyncio.Event()
        self._without: set[str] = set()  # parameters that this server does not know
        self._answered = False
        self._refused = 0  # questions since the last answer that the server would not hear
        self._lost = 0  # questions since the last answer that were given up without one
        self.stop_reason = ""
        self.mode = self._modes[0]

    @property
    def prompt(self) -> Prompt:
        return self._prompts[self.mode != "none"]

    def stop(self, reason: str) -> None:
        """Nothing more is sent; what is under way comes to its end."""
        self.stop_reason = self.stop_reason or reason
        self._stop.set()

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()

    async def probe(self, questions: Sequence[Question]) -> tuple[list[Outcome], RunError | None]:
        """Finds the form of answer that the server takes, by asking what is to be asked anyway.

        Args:
          questions: in the order in which they are to be rated; at most `PROBES` are asked.

        Returns:
          Outcomes of the first ones of them, the last of which is nearly always good; and what is
          wrong where none of them was answered.

        Raises:
          InputError, RunError: no server, a wrong key, model or address.
          StoppedError: the run ends.
        """
        outcomes = []
        for question in questions[:PROBES]:
            outcome, settled = await self._probe(question)
            outcomes.append(outcome)
            if settled:
                return outcomes, None
        if self._answered or not outcomes:
            return outcomes, None
        reason = outcomes[-1].reason
        return outcomes, RunError(
            "--base_url", f"the server answers nothing ({reason})", "look at its log"
        )

    async def _probe(self, question: Question) -> tuple[Outcome, bool]:
        """What became of a question, and whether the form is settled by it."""
        tries = _Tries()
        accepted = None
        for mode in self._modes:
            self.mode, before = mode, tries.answers
            single = len(self._modes) == 1
            try:
                outcome = await self._rate(question, tries, None if single else before + 1)
            except RefusedError as error:
                tries.reason = str(error)
                if error.status == 403:
                    break  # of its content, it seems: another form would not help
                continue
            answered = tries.answers > before
            if outcome.rated or (answered and single):
                return outcome, True
            if answered and is_one_object(tries.raw):
                # The form holds, this answer did not.
                spent = tries.usage.attempts >= self._attempts
                return outcome if spent else await self._rate(question, tries), True
            if answered:
                accepted = accepted or mode
            elif not tries.reason.startswith("HTTP 5"):
                break  # lost on the way: says nothing of the form
        self.mode = accepted or self._modes[0]
        return tries.give_up(), False

    async def rate(self, question: Question) -> Outcome:
        """Ratings of a question, or the reason why there are none.

        Raises:
          InputError, RunError: nothing will be answered any more.
          StoppedError: the run ends and the question has not had an answer.
        """
        tries = _Tries()
        try:
            outcome = await self._rate(question, tries)
        except RefusedError as error:
            tries.reason = str(error)
            return tries.give_up()
        self._lost = 0 if tries.answers else self._lost + 1
        if self._lost >= _MOST_LOST:
            raise RunError(
                "--base_url",
                f"the server has stopped answering ({outcome.reason})",
                "look at its log, then type the same command again to go on",
            )
        return outcome

    async def _rate(
        self, question: Question, tries: _Tries, most_answers: int | None = None
    ) -> Outcome:
        """Attempts until one is good, or no more are allowed."""

        def is_last(state: tenacity.RetryCallState) -> bool:
            return (
                tries.usage.attempts >= self._attempts
                or tries.limited >= 2 * self._attempts
                or (most_answers is not None and tries.answers >= most_answers)
            )

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((TransientError, BadAnswerError)),
            stop=is_last,
            wait=_wait,
            sleep=self._sleep,
            reraise=True,
        )
        try:
            return await retrying(self._attempt, question, tries)
        except StoppedError:
            if not tries.answers:
                raise
        except RefusedError as error:
            self._refused += 1
            # Some hosts say of a text that they will not read what others say of a key.
            most = _MOST_LOST if self._answered else PROBES
            of_content = error.status == 403 and self._refused < most
            if error.ends_run and not of_content:
                raise self._explain(error) from None
            raise
        except TransientError as error:
            if not error.listening and self._client.last_heard < tries.started:
                raise RunError(
                    "--base_url",
                    f"no server answers there ({error})",
                    "start it or check the address, then type the same command again",
                ) from None
        except BadAnswerError:
            pass
        return tries.give_up()

    async def _attempt(self, question: Question, tries: _Tries) -> Outcome:
        while not self.stopped and (left := self._client.pause_left) > 0:
            await self._sleep(left)
        if self.stopped:
            raise StoppedError
        prompt = self.prompt
        try:
            reply = await self._send(prompt, question, tries)
        except SpentError as error:
            self.stop(str(error))
            raise StoppedError from None
        except TransientError as error:
            tries.reason = str(error)
            tries.limited += error.limited
            if error.retry_after is not None:
                self._pause(error.retry_after)
            raise
        self._answered = True
        self._refused = 0
        tries.answers += 1
        tries.raw = reply.text
        try:
            if reply.finish == "length":
                tries.longer = True
                raise BadAnswerError("cut at max_tokens")
            rated = parse(reply.text, prompt)
        except BadAnswerError as error:
            tries.reason = str(error)
            raise
        return Outcome(rated, "", reply.text, tries.usage)

    def _pause(self, seconds: float) -> None:
        """Nothing is sent for as long as the server asks.

        Raises:
          RunError: that is longer than anybody would sit and wait.
        """
        if seconds > _LONGEST_PAUSE:
            raise RunError(
                "--base_url",
                f"the server asks to wait {seconds / 3600:,.1f} hours",
                "type the same command again then",
            )
        if seconds >= _TOLD_PAUSE and self._client.pause_left < seconds / 2:
            self._note(f"the server asks to wait {seconds:.0f} seconds")
        self._client.pause(seconds)

    async def _send(self, prompt: Prompt, question: Question, tries: _Tries) -> Reply:
        """One request, paid for whatever comes of it."""
        likely, _ = prompt.estimate_tokens(question)
        room = prompt.max_tokens * (2 if tries.longer else 1)
        payload = self._payload(prompt, question, tries.answers, room)
        async with self._budget.request(likely, room) as usage:
            tokens, charged = (0, 0), None
            try:
                reply = await self._client.ask(payload)
                usage.attempts = 1
                tokens, charged = (
                    reply.tokens or self._budget.guess(likely, reply.text),
                    reply.charged,
                )
                self._budget.learn(likely, reply.tokens, reply.charged)
                return reply
            except TransientError as error:
                usage.attempts = int(not error.limited)
                if error.reached:  # it may have been worked on, and charged for
                    tokens = self._budget.guess(likely)
                raise
            except RefusedError as error:
                usage.attempts = 1
                if self._adapt(error):
                    raise TransientError(str(error), retry_after=0.0, reached=False) from None
                raise
            finally:
                usage.prompt, usage.completion = tokens
                usage.cost = self._budget.prices.cost(*tokens) if charged is None else charged
                tries.usage.add(usage)

    def _payload(self, prompt: Prompt, question: Question, answers: int, room: int) -> str:
        """The request as JSON, of which the long parts that never change are encoded once."""
        # The same request again would get the same bad answer.
        warmer = self._temperature + _TEMPERATURE_STEP * answers
        fields: dict[str, Any] = {
            "model": self._model,
            "max_tokens": room,
            "temperature": min(warmer, max(self._temperature, 1.0)),
            "seed": self._seed + answers,
        }
        for name in self._without & fields.keys():
            value = fields.pop(name)
            if name == "max_tokens":
                fields["max_completion_tokens"] = value
        system, user = prompt.messages(question)
        instructions = f'{{"role": "system", "content": {_dump_text(system["content"])}}}'
        messages = f'"messages": [{instructions}, {json.dumps(user)}]'
        form = _dump_form(prompt, self.mode)
        return f"{{{json.dumps(fields)[1:-1]}, {messages}{form}}}"

    def _adapt(self, error: RefusedError) -> bool:
        """Whether the server refused a parameter by name, which is left out from now on."""
        for name in ("max_tokens", "temperature", "seed"):
            if f"'{name}'" in str(error) and name not in self._without:
                self._without.add(name)
                return True
        return False

    def _explain(self, error: RefusedError) -> InputError | RunError:
        """The one line of a refusal that all other requests would get as well."""
        kind = RunError if self._answered else InputError
        if error.status == 404:
            where, remedy = "--model", "check it and --base_url, which often ends in /v1"
            return kind(where, f"{self._model!r} is not found by the server ({error})", remedy)
        if error.status in (401, 403):
            return kind(KEY_VARIABLE, f"the server does not take it ({error})", "set it anew")
        return kind("--base_url", f"the account is used up ({error})", "top it up, then go on")

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)


@functools.lru_cache(maxsize=4)
def _dump_text(text: str) -> str:
    return json.dumps(text)


@functools.lru_cache(maxsize=4)
def _dump_form(prompt: Prompt, mode: str) -> str:
    if mode == "none":
        return ""
    form: dict[str, Any] = {"type": "json_object"}
    if mode == "json_schema":
        schema = {"name": "ratings", "strict": True, "schema": prompt.schema}
        form = {"type": "json_schema", "json_schema": schema}
    elif mode == "json_object with schema":
        # OpenAI's form knows no lengths, llama.cpp's does.
        form["schema"] = prompt.bounded_schema
    return f', "response_format": {json.dumps(form)}'


_backoff = tenacity.wait_exponential_jitter(initial=0.5, max=_LONGEST_WAIT, jitter=0.5)


def _wait(state: tenacity.RetryCallState) -> float:
    """Seconds before the next attempt; where the server named them, all workers wait together."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, TransientError) and error.retry_after is None:
        return _backoff(state)
    return 0.0
