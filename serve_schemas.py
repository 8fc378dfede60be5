"""What goes in and out of the server as JSON, with the examples of its OpenAPI page. Knows no model."""
from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Text = Annotated[str, Field(min_length=1, max_length=5000, description="what is said; numbers and signs are read out, English only")]
Name = Annotated[str, Field(min_length=1, max_length=64)]
Form = Literal["wav", "pcm", "opus", "mp3", "aac", "flac"]
Seed = Annotated[int, Field(ge=0, lt=2 ** 63)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SpeechRequest(BaseModel):
    """OpenAI's request; what this server cannot do is refused, not ignored. Unknown fields are let through, as OpenAI's servers do."""
    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [{"model": "nano", "input": "Good morning! How are you?", "voice": "alba", "response_format": "wav"}]})
    model: Name | None = Field(None, description="the one that is served; tts-1 and the like are taken for it")
    input: Text
    voice: Name | None = None
    response_format: Form = "mp3"
    speed: Annotated[float, Field(ge=0.25, le=4, allow_inf_nan=False, description="1 only")] = 1.0
    instructions: Annotated[str | None, Field(max_length=200, description="a mood: neutral, happy, excited, sad, angry, calm, worried or surprised")] = None
    stream_format: Literal["audio", "sse"] = "audio"


class GenerateRequest(Strict):
    """Say `text`, or with `reply` answer it."""
    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"text": "Good morning! How are you?", "voice": "alba"}, {"text": "I lost my keys.", "reply": True, "streaming": True}]})
    text: Text
    reply: bool = Field(False, description="answer the text instead of saying it")
    speaker: Annotated[int, Field(ge=0, le=7)] = 1
    voice: Name | None = None
    voice_prompt: Annotated[str, Field(max_length=32_000_000)] | None = Field(None, description="a recording of the voice: a sound file in base64, used for this request alone")
    voice_text: Annotated[str, Field(max_length=2000)] | None = Field(None, description="what is said in it; where left out, the ASR writes it down")
    mood: Name | None = None
    streaming: bool = Field(False, description="the sound itself, as it is made, instead of JSON")
    response_format: Form = "wav"
    seed: Seed | None = None
    temperature: Temperature | None = None


class GenerateResponse(BaseModel):
    text: str = Field(description="what was said")
    voice: str = Field(description="the sound as a file in base64, in the format that was asked for")
    latency_ms: float | None = Field(description="from the request to the first sound")
    duration_s: float


class TranscribeResponse(BaseModel):
    text: str
    duration_s: float


class VoiceOut(BaseModel):
    id: str
    name: str
    description: str


class VoicesResponse(BaseModel):
    voices: list[VoiceOut]


class ModelOut(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelsResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelOut]


class ErrorDetail(BaseModel):
    message: str = Field(description="one line that names the fix")
    type: str
    code: str
    param: str | None = None


class ErrorResponse(BaseModel):
    error: ErrorDetail


class State(BaseModel):
    status: str
    model: str | None = None
    sessions: int | None = None
    waiting: int | None = None


# ----------------------------------------------------------------------------- messages of /v1/conversation

class Start(Strict):
    type: Literal["start"]
    voice: Name | None = None
    sample_rate: Literal[16000, 24000, 48000] = 24000
    responder: Name | None = None


class Typed(Strict):
    type: Literal["text"]
    text: Text


class VoicePrompt(Strict):
    type: Literal["voice_prompt"]
    audio: Annotated[str, Field(min_length=1, max_length=32_000_000)]
    text: Annotated[str, Field(max_length=2000)] | None = None


class ChooseVoice(Strict):
    type: Literal["voice"]
    voice: Name


class Played(Strict):
    type: Literal["played"]
    ms: Annotated[float, Field(ge=0, le=1e7, allow_inf_nan=False)]


class Order(Strict):
    type: Literal["cancel", "end_of_turn", "reset", "close", "ping"]


MESSAGES = {"start": Start, "text": Typed, "voice_prompt": VoicePrompt, "voice": ChooseVoice, "played": Played} | dict.fromkeys(("cancel", "end_of_turn", "reset", "close", "ping"), Order)
