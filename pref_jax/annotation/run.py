"""``launch/annotate.py``: from a file of comparisons to ratings of its responses."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pref_jax.annotation.budget import Budget, Prices, Usage
from pref_jax.annotation.client import Client
from pref_jax.annotation.judge import PROBES, STRUCTURED, Judge, Outcome, StoppedError
from pref_jax.annotation.prompt import Prompt, Question
from pref_jax.annotation.properties import load_properties
from pref_jax.annotation.ratings import SIDES
from pref_jax.annotation.store import Place, Store, read_keys
from pref_jax.annotation.summary import Estimate, print_estimate, print_summary
from pref_jax.data.arena import TEXTS, Comparisons, read_comparisons
from pref_jax.errors import InputError, RunError
from pref_jax.files import check_output_file
from pref_jax.training.progress import Progress, StopSignals

# Of a large hosted model: what a limit in money assumes where no price is said.
ASSUMED_PRICES = Prices(prompt=1.0, completion=3.0)
_POLL_SECONDS = 0.1
_RAW_CHARACTERS = 20_000  # of a failed answer that are kept


@dataclass(frozen=True)
class Settings:
    """What the flags of ``launch/annotate.py`` say, by the same names; None: not given."""

    data: str
    output: str | None = None
    base_url: str | None = None
    model: str | None = None
    properties: str | None = None
    both: bool = False
    rows: int | None = None
    structured: str = "auto"
    concurrency: int = 16
    attempts: int = 4
    timeout: float = 120.0
    temperature: float = 0.0
    seed: int = 0
    price_prompt: float | None = None
    price_completion: float | None = None
    max_cost: float | None = None
    max_requests: int | None = None
    max_characters: int = 12_000

    @property
    def prices(self) -> Prices:
        """Those given; a limit in money without them takes assumed ones."""
        if self.price_prompt is None and self.price_completion is None:
            return Prices() if self.max_cost is None else ASSUMED_PRICES
        return Prices(self.price_prompt or 0.0, self.price_completion or 0.0)


@dataclass(frozen=True)
class Item:
    """One question and whom its answer rates.

    Attributes:
      question: the texts, as the judge sees them.
      targets: responses, each with its place among the question's responses; several rows with
        the same texts share a question.
    """

    question: Question
    targets: tuple[tuple[Place, int], ...]


class Plan:
    """What is asked about, and under which keys a rating of it may be found.

    Attributes:
      prompts: by whether reasons stand inside the JSON.
      wanted: per response of the whole file, in its order, the keys that a rating of it may have.
      places: the responses asked about, those of the first rows.
    """

    def __init__(self, settings: Settings) -> None:
        properties = load_properties(settings.properties)
        comparisons = read_comparisons(settings.data, labelled=False)
        self._model = settings.model or ""
        self._structured = settings.structured
        self.prompts = {
            inline: Prompt(properties, inline, settings.both, settings.max_characters)
            for inline in (True, False)
        }
        # Until the server has been asked, either form may turn out to be the right one.
        forms = {mode != "none" for mode in STRUCTURED[settings.structured]}
        self.prompt = self.prompts[True in forms]
        self._questions = {
            place: (self.prompt.cut(question), index)
            for place, question, index in _read_questions(comparisons, settings.both)
        }
        self.wanted = {
            place: frozenset(self.key(place, self.prompts[inline]) for inline in forms)
            for place in self._questions
        }
        rows = len(comparisons) if settings.rows is None else settings.rows
        self.places = list(self.wanted)[: rows * len(SIDES)]

    def key(self, place: Place, prompt: Prompt) -> str:
        """The key of a rating of a response."""
        question, index = self._questions[place]
        return prompt.key(question, index, self._model)

    def modes(self, store: Store) -> tuple[str, ...]:
        """Forms of answer to try: where some responses are rated, those of the same prompt."""
        modes = STRUCTURED[self._structured]
        for place in self.wanted:
            if (entry := store.rated(place)) is not None:
                inline = entry["key"] == self.key(place, self.prompts[True])
                return tuple(mode for mode in modes if (mode != "none") == inline)
        return modes

    def items(self, is_rated: Callable[[Place], bool]) -> list[Item]:
        """What has to be asked, in the order of the file."""
        groups: dict[Question, list[tuple[Place, int]]] = {}
        for place in self.places:
            if not is_rated(place):
                question, index = self._questions[place]
                groups.setdefault(question, []).append((place, index))
        return [Item(question, tuple(targets)) for question, targets in groups.items()]


def annotate(settings: Settings) -> None:
    """Rates what is not rated yet; the same call again goes on where this one stopped.

    Raises:
      InputError: anything about the flags, the data or the output; nothing is asked then.
      RunError: it stopped early: the limit is reached, the server is gone, or the disk is full.
    """
    _check(settings)
    if settings.prices is ASSUMED_PRICES:
        print(
            f"--max_cost without prices: {ASSUMED_PRICES.prompt:g} and "
            f"{ASSUMED_PRICES.completion:g} per million tokens of questions and answers are "
            "assumed; --price_prompt and --price_completion set them"
        )
    plan = Plan(settings)
    assert settings.output is not None
    with Store(Path(settings.output), plan.wanted) as store:
        asyncio.run(_copy_ratings(plan, store))
        items = plan.items(lambda place: store.rated(place) is not None)
        if outdated := store.outdated:
            print(
                f"{outdated} responses were rated by another prompt or model, or with other texts; "
                f"as new ratings come, the old ones move to {settings.output}.replaced"
            )
        budget = Budget(settings.prices, settings.max_cost, settings.max_requests)
        error = _ask_all(settings, plan, store, items, budget) if items else None
        store.close()
        print_summary(plan.prompt.properties, plan.places, store, budget, settings.output)
    if error is not None:
        raise error


def estimate(settings: Settings) -> None:
    """Prints one whole question, and what asking all of them would take. Asks nobody.

    Raises:
      InputError: anything about the flags or the data.
    """
    _check(settings, dry_run=True)
    plan = Plan(settings)
    keys = read_keys(Path(settings.output)) if settings.output else set()
    items = plan.items(lambda place: not keys.isdisjoint(plan.wanted[place]))
    tokens = [plan.prompt.estimate_tokens(item.question) for item in items]
    prompt, completion = (sum(column) for column in zip(*tokens, strict=True)) if tokens else (0, 0)
    print_estimate(
        Estimate(
            messages=plan.prompt.messages(items[0].question) if items else [],
            responses=len(plan.places),
            requests=len(items),
            prompt=prompt,
            completion=completion,
            cost=settings.prices.cost(prompt, completion),
        )
    )


def _check(settings: Settings, dry_run: bool = False) -> None:
    for name, least in [
        ("rows", 1),
        ("concurrency", 1),
        ("attempts", 1),
        ("max_requests", 0),
        ("max_cost", 0),
        ("max_characters", 200),
        ("temperature", 0),
        ("price_prompt", 0),
        ("price_completion", 0),
    ]:
        value = getattr(settings, name)
        if value is not None and not least <= value < float("inf"):
            raise InputError(f"--{name}", f"it is {value}", f"use {least} or more")
    if not 0 < settings.timeout < float("inf"):
        raise InputError("--timeout", f"it is {settings.timeout}", "give seconds above 0")
    if settings.output is not None:
        check_output_file(settings.output, inputs=(settings.data, settings.properties))
    if not dry_run:
        Client.check(settings.base_url or "")


async def _copy_ratings(plan: Plan, store: Store) -> None:
    """Ratings of the same texts, replaced or found under another id, are no new work."""
    entries = []
    for place in plan.places:
        if store.rated(place) is None and (entry := store.find(plan.wanted[place])) is not None:
            if (str(entry["id"]), entry["side"]) != place:  # paid for over there
                entry |= _identity(place) | _usage(Usage(entry.get("attempts", 1)))
            entries.append(entry)
    if entries:
        await store.save(entries)


def _ask_all(
    settings: Settings, plan: Plan, store: Store, items: list[Item], budget: Budget
) -> InputError | RunError | None:
    """Asks; returns the reason where it stopped early."""
    done = len(plan.places) - sum(len(item.targets) for item in items)
    with (
        Progress(
            len(plan.places), initial=done, unit="response", description="annotate"
        ) as progress,
        StopSignals() as signals,
    ):
        reason, error = asyncio.run(
            _Asking(settings, plan, store, budget, progress, done).run(items, signals)
        )
    if error is not None:
        return error
    if not reason:
        return None
    left = sum(store.rated(place) is None and store.failed(place) is None for place in plan.places)
    if reason.startswith("--"):
        what = f"it is reached, {left} of {len(plan.places)} responses are left"
        return RunError(reason, what, "raise it, or type the same command again to go on")
    return RunError(
        reason,
        f"stopped as asked, {left} of {len(plan.places)} responses are left",
        "type the same command again to go on",
    )


class _Asking:
    """Workers that ask side by side until nothing is left or the run is told to stop."""

    def __init__(
        self,
        settings: Settings,
        plan: Plan,
        store: Store,
        budget: Budget,
        progress: Progress,
        done: int,
    ) -> None:
        self._settings, self._plan, self._store, self._budget = settings, plan, store, budget
        self._progress = progress
        self._first = self._done = done
        self._failed = 0
        self._started = time.monotonic()
        self._error: InputError | RunError | None = None
        self._asking = asyncio.Semaphore(settings.concurrency)

    async def run(
        self, items: list[Item], signals: StopSignals
    ) -> tuple[str, InputError | RunError | None]:
        """Returns what stopped it: a flag or signal, and an error; both empty where nothing did."""
        settings = self._settings
        client = Client(
            settings.base_url or "", timeout=settings.timeout, concurrency=settings.concurrency
        )
        self._judge = Judge(
            client,
            settings.model or "",
            self._plan.modes(self._store),
            self._plan.prompts,
            self._budget,
            attempts=settings.attempts,
            temperature=settings.temperature,
            seed=settings.seed,
            note=self._progress.note,
        )
        watch = asyncio.create_task(self._watch(signals))
        try:
            items = self._order(items)
            outcomes = await self._probe(items)
            for item, outcome in zip(items, outcomes, strict=False):
                await self._save(item, outcome)
            rest = iter(items[len(outcomes) :])
            # Twice as many as may ask: the others bring their answers to the disk meanwhile.
            workers = range(2 * settings.concurrency)
            await asyncio.gather(*(self._work(rest) for _ in workers))
        finally:
            watch.cancel()
            await client.close()
        return self._judge.stop_reason, self._error

    def _order(self, items: list[Item]) -> list[Item]:
        """What has failed before comes last; the first ones, asked one by one, are from all over
        the file, so that a few rows that nobody can rate do not stand for all."""

        def has_failed(item: Item) -> bool:
            return any(self._store.failed(place) is not None for place, _ in item.targets)

        items = sorted(items, key=has_failed)
        fresh = sum(not has_failed(item) for item in items) or len(items)
        first = dict.fromkeys(number * fresh // PROBES for number in range(PROBES))
        rest = [item for number, item in enumerate(items) if number not in first]
        return [*(items[number] for number in first), *rest]

    async def _probe(self, items: list[Item]) -> list[Outcome]:
        with self._caught():
            outcomes, error = await self._judge.probe([item.question for item in items])
            if error is not None:
                self._error = error
                self._judge.stop("error")
            return outcomes
        return []

    async def _work(self, items: Iterator[Item]) -> None:
        while not self._judge.stopped and (item := next(items, None)) is not None:
            with self._caught():
                async with self._asking:
                    outcome = await self._judge.rate(item.question)
                await self._save(item, outcome)

    @contextlib.contextmanager
    def _caught(self) -> Iterator[None]:
        """An error of one worker ends the others' work after the answers that are on their way."""
        try:
            yield
        except StoppedError:
            pass
        except (InputError, RunError) as error:
            self._error = self._error or error
            self._judge.stop("error")

    async def _watch(self, signals: StopSignals) -> None:
        while signals.requested is None:
            await asyncio.sleep(_POLL_SECONDS)
        self._progress.note(f"{signals.requested}: waiting for the answers that are on their way")
        self._judge.stop(signals.requested)

    async def _save(self, item: Item, outcome: Outcome) -> None:
        shares = _share(outcome.usage, item)
        entries = []
        for place, index in item.targets:
            usage = shares[place]
            if (earlier := self._store.failed(place)) is not None:
                usage.add(_read_usage(earlier))
            if outcome.rated:
                rated = outcome.rated[index]
                found: dict[str, Any] = {
                    "query": rated.query,
                    "ratings": rated.ratings,
                    "reasons": rated.reasons,
                }
            else:
                found = {"reason": outcome.reason, "raw": outcome.raw[:_RAW_CHARACTERS]}
            about = {
                "key": self._plan.key(place, self._judge.prompt),
                "model": self._settings.model,
            }
            entries.append(_identity(place) | found | about | _usage(usage))
        await self._store.save(entries, failures=not outcome.rated)
        self._done += len(entries)
        self._failed += 0 if outcome.rated else len(entries)
        self._progress.update(
            self._done,
            rate=(self._done - self._first) / max(time.monotonic() - self._started, 1e-9),
            failed=self._failed,
            cost=self._budget.total.cost,
        )


def _read_questions(comparisons: Comparisons, both: bool) -> Iterator[tuple[Place, Question, int]]:
    columns = (comparisons.table.column(name) for name in TEXTS)
    for identity, query, *responses in zip(comparisons.ids, *columns, strict=True):
        texts = tuple(response.as_py() for response in responses)
        for index, (side, text) in enumerate(zip(SIDES, texts, strict=True)):
            question = Question(query.as_py(), texts if both else (text,))
            yield (identity, side), question, index if both else 0


def _share(usage: Usage, item: Item) -> dict[Place, Usage]:
    """The cost of an answer, spread over the first response of each text that it rates."""
    payers = list({index: place for place, index in reversed(item.targets)}.values())
    shares = {place: Usage(usage.attempts) for place, _ in item.targets}
    for number, place in enumerate(payers):
        parts = len(payers)
        shares[place].prompt = usage.prompt // parts + (number < usage.prompt % parts)
        shares[place].completion = usage.completion // parts + (number < usage.completion % parts)
        shares[place].cost = usage.cost / parts
    return shares


def _identity(place: Place) -> dict[str, str]:
    return {"id": place[0], "side": place[1]}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "attempts": usage.attempts,
        "tokens": {"prompt": usage.prompt, "completion": usage.completion},
        "cost": round(usage.cost, 10),
    }


def _read_usage(entry: dict[str, Any]) -> Usage:
    """What an earlier call spent on a response without result."""
    tokens = entry.get("tokens", {})
    return Usage(
        entry.get("attempts", 0),
        tokens.get("prompt", 0),
        tokens.get("completion", 0),
        entry.get("cost", 0.0),
    )
