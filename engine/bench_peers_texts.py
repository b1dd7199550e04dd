"""The prompts of `infmoe bench-peers`: stretches of real text, others for each seed."""

from pathlib import Path
from pydoc_data import topics
from random import Random

from engine.bench_engine_contenders import Text
from engine.bench_peers_models import Source
from engine.tokenizer_json import make_json_tokenizer

MOST_CHARS = 400_000  # are enough, and are tokenized in a second


class Prompts:
    """A long text, as ids. Without a file, Python's own manual, which comes with it: English."""

    def __init__(self, source: Source, path: Path | None) -> None:
        prose = "\n\n".join(topics.topics.values()) if path is None else path.read_text("utf-8")
        tokenizer = make_json_tokenizer("the model", source.texts["tokenizer.json"])
        self._ids = tokenizer.encode(prose[:MOST_CHARS])

    def texts(self, count: int, seed: int, prompt_tokens: int, num_tokens: int) -> list[Text]:
        """So many stretches, the same for the same seed and number.

        Raises ValueError if the text is too short.
        """
        last = len(self._ids) - prompt_tokens
        if last < 0:
            raise ValueError(
                f"the text has {len(self._ids)} tokens and a prompt is {prompt_tokens}; give "
                "a longer one with --text"
            )
        random = Random(f"{seed} {count}")
        starts = [random.randint(0, last) for _ in range(count)]
        return [Text(tuple(self._ids[i : i + prompt_tokens]), num_tokens) for i in starts]
