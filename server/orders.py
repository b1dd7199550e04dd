"""From a body that asks for text to requests of the engine; its work is done in a thread."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.bad_words import bad_word_ids
from engine.errors import PromptTooLong, RequestError
from engine.generation import require_choice
from engine.grammar import Grammar, Kind, Spec, compile_grammar
from engine.prompt import MAX_TOKEN_CHARS, build_request
from engine.request import Request, SamplingParams, Task
from engine.tokenizer import Tokenizer
from server.gateway import Admission
from server.parts import Order
from server.protocol import Engine
from server.schemas import RoutedBody
from server.schemas_completions import PromptedBody
from server.schemas_generation import GenerationBody, bad_field

SETTLED_TOKENS = 64  # so far from a cut, tokens are those of the whole text
Prompt = str | list[int]


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the text must follow, before it is compiled; `field` asked for it."""

    kind: Kind
    spec: Spec
    field: str

    def compile(self, engine: Engine) -> Grammar:
        """Takes up to seconds. Raises RequestError if it is wrong or too much."""
        return compile_grammar(self.kind, self.spec, engine.tokenizer, field=self.field)


def new_id(kind: str, asked: str | None = None) -> str:
    """The id of a reply: a fresh one, or what the request asked for."""
    return f"{kind}-{asked or uuid.uuid4().hex}"


def find_constraint(body: GenerationBody) -> Constraint | None:
    """What the answer must follow. Raises ApiError (400) unless it is one thing."""
    form, outputs = body.response_format, body.structured_outputs
    is_formed = form is not None and form.type != "text"
    if is_formed and outputs is not None:
        raise bad_field(
            "response_format and structured_outputs exclude each other", "structured_outputs"
        )
    if form is not None and is_formed:
        return _from_format(form.type, form.json_schema.schema_ if form.json_schema else None)
    if outputs is None:
        return None
    given: dict[Kind, Spec] = {
        "json_schema": outputs.json_,
        "regex": outputs.regex,
        "choice": outputs.choice,
        "lark": outputs.grammar,
        "json_object": "" if outputs.json_object else None,
    }
    found = [(kind, spec) for kind, spec in given.items() if spec is not None]
    if len(found) != 1:
        text = "structured_outputs takes exactly one of json, regex, choice, grammar, json_object"
        raise bad_field(text, "structured_outputs")
    return Constraint(*found[0], "structured_outputs")


def _from_format(kind: str, schema: Spec) -> Constraint:
    if kind == "json_object":
        return Constraint("json_object", None, "response_format")
    if schema is None:
        text = "response_format of type json_schema needs json_schema.schema"
        raise bad_field(text, "response_format.json_schema")
    return Constraint("json_schema", schema, "response_format")


def closing_ids(engine: Engine) -> list[int]:
    """What closes the text of the encoder; alone, it is the least that it can read."""
    config = engine.config
    if config.continuation_sentinel is None:
        return list(config.eos_token_ids[:1])
    return [engine.tokenizer.sentinel_id(config.continuation_sentinel)]


def encode_end(text: str, count: int, tokenizer: Tokenizer, *, is_start: bool) -> list[int]:
    """Ids of the end (or start) of a text, so much of it that the last `count` are settled.

    All of 2 MB takes ten seconds. Where the text is cut, some tokens are others than in the whole.
    """
    num_chars = (count + SETTLED_TOKENS) * MAX_TOKEN_CHARS
    while num_chars < len(text):
        ids = tokenizer.encode(text[:num_chars] if is_start else text[-num_chars:])
        if len(ids) >= count + SETTLED_TOKENS:
            return ids
        num_chars *= 2
    return tokenizer.encode(text)


class Clerk:
    """Builds the requests that one admitted body comes to."""

    def __init__(
        self, engine: Engine, admission: Admission[RoutedBody], reply_id: str, max_chars: int
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._reply_id = reply_id
        self._max_chars = max_chars

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        decoder_prompt: Prompt = "",
        *,
        fill: bool = False,
        is_closed: bool = True,
        task: Task | None = None,
    ) -> Request:
        """One request. Raises RequestError if it can never be served."""
        if isinstance(prompt, str) and len(prompt) > self._max_chars:
            text = f"the prompt has {len(prompt):,} characters; the limit is {self._max_chars:,}"
            raise PromptTooLong(text, "prompt")
        engine, admission = self._engine, self._admission
        if not is_closed and engine.config.is_decoder_only and isinstance(prompt, str):
            prompt = engine.tokenizer.encode(prompt)  # ids are taken as they are, without a mark
        built = build_request(
            prompt,
            engine.tokenizer,
            engine.config,
            params,
            self._reply_id,
            fill=fill,
            adapter=admission.chosen.adapter,
            decoder_prompt=decoder_prompt,
        )
        if not is_closed and (isinstance(prompt, str) or len(built.encoder_ids) > len(prompt)):
            ending = tuple(closing_ids(engine))
            if built.encoder_ids[-len(ending) :] == ending:
                built = replace(built, encoder_ids=built.encoder_ids[: -len(ending)])
        return replace(
            built,
            task=task,
            key=admission.caller,
            priority=admission.priority,
            deadline_s=admission.deadline_s,
            salt=admission.salt,
        )

    def truncated(self, prompt: Prompt, body: GenerationBody) -> Prompt:
        """A prompt, cut to the tokens that the body wants to keep."""
        count = body.truncate_prompt_tokens
        if count is None:
            return prompt
        is_left = body.truncation_side == "left"
        if isinstance(prompt, str):
            longest = self._engine.config.max_prompt_tokens
            if len(prompt) > self._max_chars or count > longest:
                return prompt  # is refused, or short enough
            prompt = encode_end(prompt, count, self._engine.tokenizer, is_start=not is_left)
        return prompt[-count:] if is_left else prompt[:count]

    def order(
        self,
        body: GenerationBody,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        decoder_prompt: Prompt = "",
    ) -> Order:
        """All requests for some prompts; texts are tokenized once for all samples of a prompt.

        Raises RequestError if one of them can never be served.
        """
        params = self._with_bad_words(body, params)
        samples, task = body.samples(params), body.beams()
        requests: list[Request] = []
        for prompt in prompts:
            first = self._first(body, prompt, samples[0], decoder_prompt, task)
            for sample in samples:
                name = f"{self._reply_id}-{len(requests)}"
                requests.append(replace(first, request_id=name, params=sample))
        return Order(
            reply_id=self._reply_id,
            requests=requests,
            per_prompt=len(samples),
            num_choices=body.n,
        )

    def _first(
        self,
        body: GenerationBody,
        prompt: Prompt,
        params: SamplingParams,
        decoder_prompt: Prompt,
        task: Task | None,
    ) -> Request:
        prompted = body if isinstance(body, PromptedBody) else None
        is_scoring = prompted is not None and prompted.is_scoring_prompts
        is_decoder_only = self._engine.config.is_decoder_only
        if is_scoring and not is_decoder_only:
            prompt, decoder_prompt = closing_ids(self._engine), prompt
            if not decoder_prompt:
                raise RequestError("the prompt is empty; give at least one token", "prompt")
        if params.prompt_logprobs is not None and not decoder_prompt and not is_decoder_only:
            text = "prompt_logprobs is for what the decoder reads; give decoder_prompt"
            raise RequestError(text, "prompt_logprobs")
        try:
            request = self.request(
                self.truncated(prompt, body),
                params,
                decoder_prompt,
                fill=prompted is not None and prompted.fill,
                is_closed=body.add_special_tokens,
                task=task,
            )
        except RequestError as error:
            if error.field == "decoder_prompt" and is_scoring:
                error.field = "prompt"
            raise
        require_choice(request, self._engine.tokenizer, self._engine.config)
        return request

    def _with_bad_words(self, body: GenerationBody, params: SamplingParams) -> SamplingParams:
        if not body.bad_words:
            return params
        return replace(params, bad_words=bad_word_ids(body.bad_words, self._engine.tokenizer))
