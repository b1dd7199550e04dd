"""POST /tokenize, POST /detokenize, GET /tokenizer_info, under the names that clients know."""

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from server.fields import check_fields, ignored_header
from server.gateway import Gateway
from server.health import require_ready
from server.jobs import json_response
from server.logprobs import TokenNames
from server.models import require_model
from server.orders import closing_ids
from server.protocol import Engine
from server.responses import ERRORS
from server.schemas_generation import bad_field
from server.schemas_native import (
    Detokenized,
    DetokenizeRequest,
    TokenizeRequest,
    TokenizerInfo,
    Tokens,
)
from server.templates import ChatTemplate

EOS, PAD = "</s>", "<pad>"  # where nobody tells other names: those of T5


def tell_tokens(engine: Engine, body: TokenizeRequest) -> Tokens:
    """The ids of a text; takes seconds for a long one."""
    ids = engine.tokenizer.encode(body.prompt)
    begin = list(engine.config.begin_token_ids)
    if body.add_special_tokens and not engine.config.is_decoder_only:
        ids += closing_ids(engine)
    elif body.add_special_tokens and ids[: len(begin)] != begin:
        ids = begin + ids
    names = TokenNames(engine.tokenizer)
    return Tokens(
        tokens=ids,
        count=len(ids),
        max_model_len=engine.config.max_prompt_tokens,
        token_strs=[names.name(i) for i in ids] if body.return_token_strs else None,
    )


def add_tokenization_routes(app: FastAPI, gateway: Gateway, template: ChatTemplate | None) -> None:
    """Serve the tokenizer of the model."""
    engine, settings = gateway.engine, gateway.settings

    @app.post("/tokenize", response_model=Tokens, responses=ERRORS)
    async def tokenize(http: HttpRequest, body: TokenizeRequest) -> Response:
        """Ids of a text; marks that are typed in it are text, but for those of a tokenizer.json."""
        require_ready(engine)
        require_model(engine, body.model)
        ignored = check_fields(http, body, is_strict=settings.strict_fields)
        if len(body.prompt) > settings.max_prompt_chars:
            text = f"prompt has {len(body.prompt):,} characters"
            raise bad_field(f"{text}; the limit is {settings.max_prompt_chars:,}", "prompt")
        reply = await gateway.build(http, lambda: tell_tokens(engine, body))
        return json_response(reply, ignored_header(ignored))

    @app.post("/detokenize", response_model=Detokenized, responses=ERRORS)
    async def detokenize(http: HttpRequest, body: DetokenizeRequest) -> Response:
        """Text of ids; marks have none."""
        require_ready(engine)
        require_model(engine, body.model)
        ignored = check_fields(http, body, is_strict=settings.strict_fields)
        size = engine.config.vocab_size
        if unknown := [i for i in body.tokens if i >= size]:
            text = f"token id {unknown[0]} is outside the vocabulary of {size}"
            raise bad_field(text, "tokens")
        text = await gateway.build(http, lambda: engine.tokenizer.decode(body.tokens))
        return json_response(Detokenized(prompt=text), ignored_header(ignored))

    @app.get("/tokenizer_info", responses=ERRORS)
    async def read_tokenizer() -> TokenizerInfo:
        """Names and ids of the marks, sizes, and the chat template."""
        require_ready(engine)
        config, tokenizer = engine.config, engine.tokenizer
        return TokenizerInfo(
            tokenizer_class=type(tokenizer).__name__,
            vocab_size=tokenizer.vocab_size,
            num_sentinels=tokenizer.num_sentinels,
            model_max_length=config.max_prompt_tokens,
            eos_token=(template.eos_token if template else "") or EOS,
            eos_token_id=config.eos_token_ids[0],
            bos_token=(template.bos_token if template else "") or None,
            pad_token=PAD,
            pad_token_id=config.pad_token_id,
            chat_template=template.source if template else None,
        )
