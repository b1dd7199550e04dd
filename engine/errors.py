"""Errors that a caller of the engine can meet.

EngineError
|-- ConfigError        a model configuration that cannot be built
|-- CheckpointError    a checkpoint that is damaged, incomplete or of another model
|-- TokenizerError     a vocabulary that is damaged or does not fit the model
|-- RequestError       a request that can never be served as it is
|   `-- PromptTooLong
|-- Overloaded         a request refused now that may be served later
`-- EngineStopped      the engine is shutting down or has failed
"""


class EngineError(Exception):
    """Base of all errors that the engine raises for its callers."""


class ConfigError(EngineError):
    """A model configuration that cannot be built."""


class CheckpointError(EngineError):
    """A checkpoint that is damaged, incomplete or of another model."""


class TokenizerError(EngineError):
    """A vocabulary that is damaged or does not fit the model."""


class RequestError(EngineError):
    """A request that can never be served as it is; `field` names the culprit if there is one."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class PromptTooLong(RequestError):
    """The encoder or decoder input does not fit the limits of the model or of its caches."""


class Overloaded(EngineError):
    """The queue is full; try again after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineStopped(EngineError):
    """The engine is shutting down or has failed; no request is accepted."""
