"""A child process that compiles one grammar, to see whether it can be done in bounds.

Run as a file, with nothing but llguidance: arguments are seconds and bytes, the grammar comes on
stdin, a complaint goes to stdout. What takes too long, too much memory or overflows the stack ends
here and not in the server.
"""

import resource
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

# Limits for llguidance while it compiles and at each step; a step stays within some 10 ms.
PARSER_LIMITS = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 400_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 10_000,
    "max_lexer_states": 10_000,
    "max_grammar_size": 100_000,
}


class _Bytes:
    """The least of vocabularies: single bytes and an end."""

    tokens = (*(bytes((byte,)) for byte in range(256)), b"<end>")
    eos_token_id = 256
    bos_token_id = None
    special_token_ids = (256,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def compile_matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher within the limits; it tells itself whether it is an error."""
    limits = LLParserLimits(**PARSER_LIMITS, verbose_errors=False)  # type: ignore[arg-type]  # all are counts
    return LLMatcher(tokenizer, grammar, log_level=0, limits=limits)


def main() -> None:
    """Compile what is on stdin."""
    cpu_s, memory_bytes = int(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tokenizer = LLTokenizer(TokenizerWrapper(_Bytes()), slices=[])
    matcher = compile_matcher(tokenizer, sys.stdin.buffer.read().decode("utf-8"))
    if not matcher.is_error():
        matcher.compute_bitmask()
    sys.stdout.buffer.write(matcher.get_error().encode("utf-8"))


if __name__ == "__main__":
    main()
