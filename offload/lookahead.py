"""When to believe a guess of the next layer's experts: only where guesses have been right."""

from collections.abc import Iterable
from dataclasses import dataclass

MIN_GUESSES = 8  # judged before the first is believed
RATE = 1 / 16  # weight of the newest judgement in the running mean
SAMPLE_EVERY = 16  # a layer that is not trusted is still asked this often, in case it has changed


@dataclass(slots=True)
class _Record:
    precision: float = 0.0
    judged: int = 0
    asked: int = 0
    guess: frozenset[int] | None = None


class Lookahead:
    """Keeps, for each layer, the share of guessed experts that were then wanted.

    The guess is made by running the layer's own router on the hidden state one layer early. Guessed
    experts are never computed in place of routed ones: a wrong guess costs reading, not truth.
    `trust` is the share of right guesses from which fetching ahead pays.
    Source: Eliseev and Mazur (arXiv:2312.17238) s3.2; the switch is our own.
    """

    def __init__(self, trust: float) -> None:
        self._trust = trust
        self._records: dict[str, _Record] = {}

    def is_asked(self, layer: str) -> bool:
        """Whether a guess for the layer is worth its computation now."""
        record = self._records.setdefault(layer, _Record())
        record.asked += 1
        is_new = record.judged < MIN_GUESSES
        return is_new or self.is_trusted(layer) or record.asked % SAMPLE_EVERY == 0

    def note(self, layer: str, guess: Iterable[int]) -> None:
        """Take in a guess for the layer; the next `judge` of it tells how good it was."""
        self._records.setdefault(layer, _Record()).guess = frozenset(guess)

    def judge(self, layer: str, wanted: Iterable[int]) -> None:
        """Compare the last guess for a layer, if there is one, with what the router wants."""
        record = self._records.get(layer)
        if record is None or not record.guess:
            return
        right = len(record.guess.intersection(wanted)) / len(record.guess)
        rate = max(RATE, 1 / (record.judged + 1))
        record.precision += rate * (right - record.precision)
        record.judged += 1
        record.guess = None

    def is_trusted(self, layer: str) -> bool:
        """Whether guesses for the layer may cause reads."""
        record = self._records.get(layer)
        return (
            record is not None and record.judged >= MIN_GUESSES and record.precision >= self._trust
        )

    def precisions(self) -> dict[str, float]:
        """The running share of right guesses, of the layers that have been judged."""
        return {layer: r.precision for layer, r in self._records.items() if r.judged}
