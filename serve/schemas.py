"""Request and response bodies, and the limits that a server is started with.

What a type can say is checked here; what depends on the server (limits, dimensions, tasks) in `engine`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_ID = 512  # characters of a document's id


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(Body):
    """What one server accepts. Everything beyond is refused at once with a message that names the limit."""

    max_body_bytes: int = Field(8 * 2**20, ge=1)  # of a request; more answers 413
    max_batch: int = Field(256, ge=1)  # texts, queries or vectors of a request; more answers 413
    max_characters: int = Field(100_000, ge=1)  # of one text; more answers 413 (the model itself truncates by tokens)
    max_k: int = Field(1000, ge=1)  # hits per query; more answers 422
    max_waiting: int = Field(2048, ge=1)  # texts or vectors waiting for the model or the index; more answers 429
    batch_tokens: int = Field(16384, ge=16)  # padded tokens per forward, over all requests
    timeout_s: float = Field(30.0, gt=0)  # a request that takes longer answers 504
    writable: bool = True  # documents may be written and deleted, by whoever may search; False answers 403
    merge_after: int = Field(10_000, ge=1)  # unmerged changes that start a merge: a search compares with each of them
    merge_age_s: float = Field(3600.0, gt=0)  # age in seconds of an unmerged change that starts a merge
    max_unmerged: int = Field(100_000, ge=1)  # unmerged changes; more answer 503 until a merge is done


Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Integer = Annotated[int, Field(strict=True)]
Encoding = Literal["float", "base64"]


class EmbedRequest(Body):
    """Texts to embed as queries or as passages."""

    texts: list[str] = Field(min_length=1)
    kind: Literal["query", "passage"] = "passage"
    task: str = ""  # whose prompt to use, as the model was trained; "" takes the model's default
    dimensions: Integer | None = Field(None, ge=1)  # keep the first ones, brought to unit length again
    normalise: bool = True  # false: the first `dimensions` as they are; whole vectors have unit length in any case
    truncate: Literal["end", "error"] = "end"  # of a text beyond the model's length: cut it, or answer 422
    encoding: Encoding = "float"  # base64: little-endian float32

    model_config = ConfigDict(json_schema_extra={"examples": [{"texts": ["parse an ISO 8601 date"], "kind": "query"}]})


class EmbedResponse(BaseModel):
    embeddings: list[list[float]] | list[str]
    model: str
    dimensions: int
    tokens: int  # read by the model, prompts included, after truncation


class SearchRequest(Body):
    """Queries or vectors to search for; exactly one of the two."""

    queries: list[str] | None = Field(None, min_length=1)
    vectors: list[list[Number]] | None = Field(None, min_length=1)
    k: Integer = Field(10, ge=1)  # hits per query
    filter: dict[str, Any] | None = None  # e.g. {"task": "nq"}, {"year": {"gte": 2000}}, {"or": [{…}, {…}]}
    task: str = ""  # whose query prompt to use

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"queries": ["parse an ISO 8601 date"], "k": 3},
                {"queries": ["capital of France"], "k": 5, "filter": {"task": {"in": ["nq", "fever"]}}},
            ]
        }
    )

    @model_validator(mode="after")
    def _one_input(self) -> SearchRequest:
        if (self.queries is None) == (self.vectors is None):
            raise ValueError("give either queries or vectors")
        if self.vectors is not None and self.task:
            raise ValueError("task has no effect on vectors; leave it out")
        return self


class HitBody(BaseModel):
    id: str
    score: float  # cosine
    text: str
    title: str
    metadata: dict[str, Any]


class SearchResponse(BaseModel):
    results: list[list[HitBody]]
    model: str
    index_version: str


class DocumentBody(Body):
    """One document. Its metadata keys of one type are what `filter` may use; new keys from the next merge on."""

    id: str = Field(min_length=1, max_length=MAX_ID)
    text: str
    title: str = ""  # embedded in front of the text
    metadata: dict[str, Any] = {}  # "task" names the prompt of a symmetric task, as in `tdro index`


class DocumentsRequest(Body):
    """Documents to add, or to put in place of those with the same id. All are taken or none."""

    documents: list[DocumentBody] = Field(min_length=1)

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "documents": [
                        {
                            "id": "guide/7",
                            "title": "Dates",
                            "text": "How to parse an ISO 8601 date.",
                            "metadata": {"year": 2024},
                        }
                    ]
                }
            ]
        }
    )


class DocumentsResponse(BaseModel):
    upserted: int
    seq: int  # number of the last change; every later search sees all changes up to it
    index_version: str  # that the change stands beside until it is merged


class DeleteResponse(BaseModel):
    deleted: bool  # false where there was no such document
    seq: int
    index_version: str


class OpenAIRequest(Body):
    """The body of OpenAI's embeddings API. Token ids as input are not taken: they are another model's."""

    input: str | list[str]
    model: str = ""  # the served model's name; with ":query" after it, texts are embedded as queries
    encoding_format: Encoding = "float"
    dimensions: Integer | None = Field(None, ge=1)
    user: str | None = None  # taken and ignored, as clients send it

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"input": ["Paris is the capital of France."], "model": ""}]}
    )


class OpenAIEmbedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class OpenAIUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class OpenAIResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[OpenAIEmbedding]
    model: str
    usage: OpenAIUsage


class ErrorBody(BaseModel):
    code: str
    message: str


class ErrorResponse(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorBody
