"""Requests and replies: OpenAI's fields, and behind them ours. A field that is not known is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from glmimg.errors import UnknownName

__all__ = [
    "AdapterList",
    "AdapterUse",
    "DecodeRequest",
    "EditRequest",
    "ErrorReply",
    "GenerateRequest",
    "Health",
    "ImageRequest",
    "ImagesReply",
    "LayoutReply",
    "LayoutRequest",
    "ModelList",
    "Readiness",
    "RegionRequest",
    "TokenGridField",
    "UsageReply",
]

Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _know_every_name(cls, fields: Any) -> Any:
        """Before pydantic's own, shorter answer: which names there are here, and the nearest."""
        for name in fields if isinstance(fields, dict) else ():
            if name not in cls.model_fields:
                # One of megabytes would be compared for seconds, and sent back; half of a character cannot be sent.
                name = str(name)[:64].encode("utf-8", "backslashreplace").decode()
                message = str(UnknownName.of("parameter", name, cls.model_fields))
                raise PydanticCustomError("unknown_parameter", "{message}", {"message": message, "name": name})
        return fields


class Grid(Strict):
    grid: Annotated[list[Annotated[int, Field(ge=1, le=4096)]], Field(min_length=2, max_length=2)]
    ids: str = Field(description="Little-endian ids, two bytes each (four above 65536 codes), base64.")


class TokenGridField(Strict):
    """A semantic layout, as replies with `return_tokens` and the metadata of a PNG hold it."""

    format: Literal["glmimg.token_grid/1"]
    codebook_size: Annotated[int, Field(ge=1, le=2**31)]
    checkpoint: Annotated[str, Field(pattern=r"^[0-9a-f]{0,64}$")] | None = None
    target: Grid
    preview: Grid | None = None


class AdapterUse(Strict):
    name: Annotated[str, Field(max_length=255, description="One of GET /v1/adapters.")]
    strength: Annotated[float, Field(ge=-10, le=10)] = 1.0


class TokenFields(Strict):
    """What decides the layout."""

    model: str | None = Field(None, max_length=256, description="One of GET /v1/models; the server has a single one.")
    prompt: Annotated[str, Field(min_length=1, max_length=32000)]
    n: Annotated[int, Field(ge=1, le=10, description="Pictures; the k-th has seed + k.")] | None = 1
    size: Annotated[str, Field(pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$")] | None = "auto"
    user: str | None = Field(None, max_length=512, description="Accepted for compatibility; not kept.")
    seed: Seed | None = Field(None, description="Without one a random seed is drawn; the reply tells it.")
    negative: Annotated[str, Field(max_length=32000)] | None = ""
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    token_guidance: Annotated[float, Field(ge=0, le=100)] | None = None
    token_candidates: Annotated[int, Field(ge=1, le=64)] | None = Field(
        None, description="Layouts drawn for each picture, of which the one that fits the prompt best is decoded."
    )
    adapters: Annotated[list[AdapterUse], Field(max_length=8)] | None = None
    stream: bool | None = False
    progress: bool | None = Field(False, description="With stream: events for queue position, tokens and steps too.")


class ImageRequest(TokenFields):
    """What decides the picture as well."""

    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = Field(
        "auto", description="Decoder steps: low half as many as usual, high and hd twice as many."
    )
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = 100
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = 0
    background: Literal["auto", "opaque", "transparent"] | None = Field(
        "auto", description="The model paints no transparency: `transparent` is refused."
    )
    moderation: Literal["auto", "low"] | None = Field(None, description="The rules are the server's, either way.")
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance: Annotated[float, Field(ge=0, le=100)] | None = None
    sampler: Annotated[str, Field(max_length=32)] | None = None
    return_tokens: bool | None = Field(False, description="Put each picture's layout into the reply.")


class GenerateRequest(ImageRequest):
    style: Literal["vivid", "natural"] | None = Field(None, description="Refused: say it in the prompt.")


Region = Annotated[list[int], Field(min_length=4, max_length=4, description="left, top, right, bottom in pixels")]


class EditRequest(ImageRequest):
    input_fidelity: Literal["high", "low"] | None = Field(None, description="References are always followed closely.")
    keep: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="What changes less than this share of what changes most stays as it is; 0 keeps nothing."
    )
    tokens: TokenGridField | None = Field(None, description="A layout to be kept, as for decode; JSON text.")
    region: Region | None = Field(None, description="What of it is drawn anew, as for regions; JSON text.")


class DecodeRequest(ImageRequest):
    tokens: TokenGridField


class RegionRequest(DecodeRequest):
    region: Region


class LayoutRequest(TokenFields):
    pass


# Replies.


class TokenDetails(BaseModel):
    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: TokenDetails
    steps: int = Field(description="Of the decoder, all pictures together.")
    seconds: float = Field(description="Of the machine.")
    energy_wh: float | None = None
    cost: float | None = None


class Image(BaseModel):
    b64_json: str | None = None
    url: str | None = None
    seed: int
    size: str
    tokens: dict[str, Any] | None = None


class ImagesReply(BaseModel):
    created: int
    data: list[Image]
    background: str = "opaque"
    output_format: str
    quality: str
    size: str
    usage: Usage


class LayoutReply(BaseModel):
    created: int
    data: list[Image]
    size: str
    usage: Usage


class Model(BaseModel):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "glmimg"
    glmimg: dict[str, Any] = Field(description="Sizes, defaults and devices.")


class ModelList(BaseModel):
    object: str = "list"
    data: list[Model]


class Adapter(BaseModel):
    id: str
    object: str = "adapter"


class AdapterList(BaseModel):
    object: str = "list"
    data: list[Adapter]


class UsageReply(BaseModel):
    object: str = "usage"
    client: str
    requests: int
    pictures: int
    prompt_tokens: int
    tokens: int
    steps: int
    seconds: float
    energy_wh: float
    cost: float


class Health(BaseModel):
    status: Literal["ok", "failed"]
    state: str
    version: str


class Readiness(BaseModel):
    ready: bool
    state: str
    waiting: int = Field(description="Requests in the queue.")


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: Error
