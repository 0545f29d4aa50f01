"""Bodies of requests. Every field is honoured, or refused by its name; null means "not given"; nothing is converted.

Shapes are checked here, ranges where they belong: `types.SamplingParams` for sampling, `logits.grammar` for schemas.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from hasten.engine.limits import LIMITS
from hasten.serve import images
from hasten.types import MAX_SEED

Number = Annotated[float, Field(allow_inf_nan=False)]
Id = Annotated[int, Field(ge=0, le=2**31 - 1)]
Label = Annotated[str, Field(max_length=512)]

# Fields of OpenAI's API that hasten does not have, each with what to do instead.
REFUSED = {
    "audio": "hasten answers in text",
    "function_call": "use tool_choice",
    "functions": "use tools",
    "prediction": 'use hasten={"method": "prompt-lookup"}, which drafts from the prompt',
    "web_search_options": "hasten fetches nothing",
    "prompt_embeds": "tensors are not read from requests",
    "best_of": "use n, and choose yourself",
    "reasoning_effort": "the model decides",
    "verbosity": "say it in the prompt",
    "metadata": "nothing is stored",
    "moderation": "the caller decides",
}


class Body(BaseModel):
    """A JSON object whose unknown fields are refused, and whose nulls are fields that were not given."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        given = {name: field for name, field in value.items() if field is not None}
        for name, why in REFUSED.items():
            if name in given and name not in cls.model_fields:
                raise ValueError(f"{name} is not supported: {why}")
        return given


class StreamOptions(Body):
    """How a stream ends: with `include_usage` a last chunk carries the token counts."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Extension(Body):
    """What OpenAI's API has no field for; `extra_body={"hasten": {...}}` in its clients.

    `method`: how to decode. `trace`: chunks of a stream carry the trace's events; `provisional`: guesses for open places of
    a canvas too. `regex`, `lark`, `choice`: forms of the answer besides response_format.
    """

    method: str | list[str] = Field(default_factory=list, max_length=512)
    trace: bool = False
    provisional: bool = False
    regex: str | None = Field(None, min_length=1)
    lark: str | None = Field(None, min_length=1)
    choice: list[str] | None = Field(None, min_length=1, max_length=LIMITS.enum_values)
    top_k: int = Field(0, ge=0, le=2**31 - 1)
    min_p: Number = Field(0.0, ge=0, le=1)
    repetition_penalty: Number = Field(1.0, gt=0, le=10)
    ignore_eos: bool = False


class Sampling(Body):
    """What chat and completions have in common."""

    model: str = Field(max_length=256)
    max_tokens: int | None = Field(None, ge=0, le=LIMITS.served_tokens)
    temperature: Number = Field(1.0, ge=0, le=2)
    top_p: Number = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=LIMITS.n)
    seed: int | None = Field(None, ge=-(2**63), le=MAX_SEED)
    stop: str | list[str] = Field(default_factory=list, max_length=LIMITS.stop_chars)
    presence_penalty: Number = Field(0.0, ge=-2, le=2)
    frequency_penalty: Number = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Number] = Field(default_factory=dict, max_length=LIMITS.logit_bias)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Label | None = None
    hasten: Extension = Field(default_factory=lambda: Extension.model_validate({}))

    @model_validator(mode="after")
    def _options(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream=true only")
        return self


class ImageUrl(Body):
    """An image, whose header is read here; its pixels are decoded by nobody before a model asks for them."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"

    @field_validator("url")
    @classmethod
    def _image(cls, url: str) -> str:
        images.read(url)
        return url


class Part(Body):
    """A part of a message's content: a text, or an image for models that read images."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None

    @model_validator(mode="after")
    def _complete(self) -> Part:
        for name in ("text", "image_url"):
            if (getattr(self, name) is None) == (self.type == name):
                raise ValueError(f"{name} belongs to parts of type {name}, and is needed there")
        return self


class FunctionCall(Body):
    """The function that an earlier answer called, its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call in an earlier answer."""

    id: Label
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: Label | None = None
    tool_calls: list[ToolCall] | None = Field(None, min_length=1, max_length=LIMITS.tools)
    tool_call_id: Label | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls belong to messages of the assistant")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id belongs to messages of role tool, and is needed there")
        return self


class JsonSchema(Body):
    """A named JSON schema, which the answer follows whether `strict` or not."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool = True


class ResponseFormat(Body):
    """The form of the answer: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type json_schema, and is needed there")
        return self


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=LIMITS.messages)
    max_completion_tokens: int | None = Field(None, ge=1, le=LIMITS.served_tokens)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=LIMITS.logprobs)
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] = Field(default_factory=list, max_length=LIMITS.tools)
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, bool | int | float | str] = Field(default_factory=dict, max_length=2)
    modalities: list[Literal["text"]] = Field(["text"], min_length=1, max_length=1)
    service_tier: Literal["auto", "default"] = "auto"
    store: Literal[False] = False
    prompt_cache_key: Label | None = None
    safety_identifier: Label | None = None

    def images(self) -> list[str]:
        """Where in the request its images are."""
        parts = [(i, one.content) for i, one in enumerate(self.messages) if isinstance(one.content, list)]
        return [
            f"messages[{i}].content[{k}]" for i, some in parts for k, part in enumerate(some) if part.type == "image_url"
        ]

    @model_validator(mode="after")
    def _agree(self) -> ChatBody:
        if len(self.images()) > LIMITS.images:
            raise ValueError(f"messages hold {len(self.images())} images; at most {LIMITS.images}")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same; give one")
        if self.max_tokens == 0:
            raise ValueError("max_tokens = 0 is for /v1/completions with echo")
        if self.tool_choice is not None and self.tool_choice != "none" and not self.tools:
            raise ValueError("tool_choice needs tools")
        return self


class CompletionBody(Sampling):
    """POST /v1/completions; `suffix` is for models that fill canvases."""

    prompt: str | list[str] | list[Id] | list[list[Id]]
    max_tokens: int | None = Field(16, ge=0, le=LIMITS.served_tokens)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=LIMITS.logprobs)
    suffix: str | None = Field(None, min_length=1)
    best_of: int | None = Field(None, ge=1, le=LIMITS.n)

    @model_validator(mode="after")
    def _agree(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens = 0 without echo leaves nothing to answer")
        if self.stream and self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not streamed")
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError("best_of must equal n: nothing is left out")
        if self.suffix is not None and self.echo:
            raise ValueError("echo and suffix cannot be combined")
        return self


class EmbeddingBody(Body):
    """POST /v1/embeddings."""

    model: str = Field(max_length=256)
    input: str | list[str] | list[Id] | list[list[Id]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, le=2**20)
    user: Label | None = None
    hasten: EmbeddingExtension = Field(default_factory=lambda: EmbeddingExtension.model_validate({}))


class EmbeddingExtension(Body):
    """How embeddings are made from hidden states."""

    pooling: Literal["mean", "last"] = "mean"
    normalize: bool = True


EmbeddingBody.model_rebuild()
