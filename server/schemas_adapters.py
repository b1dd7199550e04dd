"""Bodies of the adapter routes, and the cards of adapters in the list of models."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

State = Literal["discovered", "loading", "resident", "pinned", "evicted", "failed"]


class AdapterFacts(BaseModel):
    """What a model card tells of an adapter beside its name."""

    type: Literal["soft_prompt"] = "soft_prompt"
    version: str | None = Field(description="What the name alone means; null: nobody asked yet.")
    state: State
    num_vectors: int | None = Field(description="Positions that it takes; null: not read yet.")


class AdapterCard(BaseModel):
    """An adapter as /v1/models lists it, under the name that `model` takes."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["infmoe"] = "infmoe"
    root: str = Field(description="Id of the base model.")
    parent: str = Field(description="Id of the base model.")
    kind: Literal["adapter"] = "adapter"
    adapter: AdapterFacts


class AdapterEntry(BaseModel):
    """One version of an adapter, as the admin routes tell it. Times in seconds since 1970."""

    name: str
    version: str | None = Field(description="Null: a plain folder that has not been read yet.")
    state: State
    is_current: bool = Field(description="Whether the name alone means this version.")
    is_pinned: bool
    reason: str | None = Field(description="Why the state is failed.")
    bytes: int | None = Field(description="Of its vectors in memory; null: not read yet.")
    num_vectors: int | None
    sha256: str | None = Field(description="Of all its files together; null: not read yet.")
    uses: int = Field(description="Requests that asked for it since the start.")
    last_used: float | None
    loaded_at: float | None


class AdapterPage(BaseModel):
    """A page of adapters, and what their memory is."""

    object: Literal["list"] = "list"
    data: list[AdapterEntry]
    total: int = Field(description="Names in all.")
    next_after: str | None = Field(description="Give it as `after` for the next page.")
    used_bytes: int
    limit_bytes: int


class AdapterDetails(BaseModel):
    """All versions of one name."""

    object: Literal["adapter"] = "adapter"
    name: str
    current: str | None
    versions: list[AdapterEntry]


class VersionBody(BaseModel):
    """Body of the actions: which version; null or left out: the current one."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    version: str | None = Field(default=None, max_length=64)


class RollbackBody(BaseModel):
    """Body of :rollback."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    version: str = Field(max_length=64, description="What the name is to mean from now on.")


class Removed(BaseModel):
    """Reply of DELETE."""

    object: Literal["adapter.deleted"] = "adapter.deleted"
    name: str
    version: str | None
    deleted: Literal[True] = True
