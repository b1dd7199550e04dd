"""vLLM in an environment of its own: run by its Python, not by ours; nothing of ours is imported.

`python bench_peers_vllm.py DIRECTORY MAX_ROWS MAX_TOKENS`: loads a Hugging Face directory in bf16
and writes a line, then for each line of JSON, texts as pairs of ids and number of tokens, another
one: their tokens, with first token and end in seconds. Ends with its input.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import LLM


def load(directory: str, max_rows: int, max_tokens: int) -> "LLM":
    """The model as vLLM runs it on a CPU; nothing of a text is kept for the next."""
    from vllm import LLM

    return LLM(
        model=directory,
        dtype="bfloat16",
        enforce_eager=True,
        max_num_seqs=max_rows,
        max_model_len=max_tokens,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )


def generate(llm: "LLM", texts: Sequence[tuple[list[int], int]]) -> list[dict[str, object]]:
    """Answer texts that are all there, greedily."""
    from vllm import SamplingParams

    engine, began = llm.llm_engine, time.perf_counter()
    for index, (ids, num_tokens) in enumerate(texts):
        params = SamplingParams(
            temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        engine.add_request(str(index), {"prompt_token_ids": ids}, params)
    answers: dict[int, dict[str, object]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            now = time.perf_counter() - began
            answer = answers.setdefault(int(output.request_id), {"first_s": now})
            answer |= {"tokens": list(output.outputs[0].token_ids), "end_s": now}
    return [answers[index] for index in range(len(texts))]


def main() -> None:
    """Load, then answer line by line; what vLLM prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    directory, max_rows, max_tokens = sys.argv[1:]
    llm = load(directory, int(max_rows), int(max_tokens))
    answers.write("loaded\n")
    for line in sys.stdin:
        answers.write(json.dumps(generate(llm, json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
