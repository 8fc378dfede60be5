"""Who answers: written dialogues, the model's text head, a command, a causal language model of a local folder, or another server.

    responder = make("openai:http://127.0.0.1:11434", model_name="qwen")
    for words in responder.stream(session, 1, [("user", "hello")], "assistant"):
        ...                                        # pieces of the reply as they come

live.sentences cuts such a stream so that the first sentence can be spoken while the next is written.
"""
from __future__ import annotations

import json
import os
import threading
from typing import Iterator

CANDIDATES = 3               # written replies that the text head chooses from: each costs a pass of the model before the first sound
KINDS = "retrieval, smollm, model, command, hf:FOLDER or openai:URL"
SYSTEM = "You are a friendly voice assistant. Answer in one to three short spoken sentences, in plain words, without lists, symbols or emoji."
REPLY_TOKENS = 120
CONNECT_SECONDS, READ_SECONDS = 5, 60


def make(spec: str, command: str = "", model_name: str = "", system: str = SYSTEM):
    """A responder by its name on the command line. ValueError names the flag to change."""
    kind, _, rest = spec.partition(":")
    if kind in ("retrieval", "model", "command") and not rest:
        return Lines(kind, command)
    if kind == "smollm" and not rest:
        return Packaged(system)
    if kind == "hf" and rest:
        return LanguageModel(rest, system)
    if kind == "openai" and rest.startswith(("http://", "https://")):
        return OtherServer(rest, model_name, system)
    raise ValueError(f"--responder {spec!r} is not known: use {KINDS}")


class Words(str):
    """Words of a reply, with the mood to say them in where the responder knows one."""
    mood: str | None = None

    @classmethod
    def of(cls, text: str, mood: str | None) -> "Words":
        words = cls(text)
        words.mood = mood
        return words


# ----------------------------------------------------------------------------- those of demo.py

class Lines:
    """demo.Responder: a whole reply at once, the text head's as it is written."""

    def __init__(self, kind: str, command: str = ""):
        from demo import Responder
        self.kind, self._responder, self._lock = kind, Responder(kind, command, CANDIDATES), threading.Lock()
        self.on_model = kind != "command"        # whether it computes on the speech model, which others want as well

    def warm(self) -> None:
        if self.kind == "retrieval":
            self._responder._written()

    def stream(self, session, speaker: int, history: list[tuple[str, str]], me: str) -> Iterator[str]:
        with self._lock:                         # what is written is read once
            self.warm()
        for text, mood in self._responder.stream(session, speaker, history, me):
            yield Words.of(text, mood)


# ----------------------------------------------------------------------------- language models

def messages(history: list[tuple[str, str]], me: str, system: str) -> list[dict]:
    """(name, text) pairs -> chat messages; what `me` said is the assistant's."""
    return [{"role": "system", "content": system}, *({"role": "assistant" if name == me else "user", "content": text} for name, text in history)]


class LanguageModel:
    """A causal language model through transformers, from a local folder of safetensors: no download, no pickle, no code of the folder's own."""
    kind, on_model = "hf", False

    def __init__(self, folder: str, system: str = SYSTEM, device: str = "cpu"):
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError:
            raise ValueError("--responder hf:FOLDER needs the package transformers: pip install transformers, or use another --responder") from None
        if not os.path.isdir(folder):
            raise ValueError(f"--responder hf:{folder}: there is no such folder; give one with config.json, tokenizer and model.safetensors")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            self.model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, trust_remote_code=False, use_safetensors=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ValueError(f"--responder hf:{folder} cannot be read ({' '.join(str(error).split())[:120]}): give a causal language model with safetensors") from None
        self.model.eval().to(device)
        self.system, self._lock = system, threading.Lock()

    def warm(self) -> None:
        """Nothing is left to load."""

    def prompt(self, history, me: str):
        """Token ids (1, S) of the conversation, the newest part of it that fits."""
        chat = messages(history, me, self.system)
        if self.tokenizer.chat_template:
            return self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
        text = "\n".join([self.system, *(f"{m['role'].capitalize()}: {m['content']}" for m in chat[1:]), "Assistant:"])
        return self.tokenizer(text, return_tensors="pt")["input_ids"]

    def stream(self, session, speaker: int, history, me: str) -> Iterator[str]:
        from transformers import TextIteratorStreamer
        ids = self.prompt(history, me).to(self.model.device)
        room = (getattr(self.model.config, "max_position_embeddings", None) or 2048) - REPLY_TOKENS
        ids = ids[:, -max(1, room):]
        streamer, stop = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=READ_SECONDS), threading.Event()
        with self._lock:
            worker = threading.Thread(target=self._generate, args=(ids, streamer, stop), daemon=True)
            worker.start()
            try:
                for words in streamer:
                    before, mark, _ = words.partition("\nUser:")       # without a chat template a model may go on for the other side
                    yield before
                    if mark:
                        break
            finally:
                stop.set()
                worker.join()

    def _generate(self, ids, streamer, stop) -> None:
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        class Stopped(StoppingCriteria):
            def __call__(self, input_ids, scores, **_):
                return torch.full((len(input_ids),), stop.is_set(), device=input_ids.device)
        try:
            with torch.inference_mode():
                self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=REPLY_TOKENS, do_sample=False, streamer=streamer,
                                    stopping_criteria=StoppingCriteriaList([Stopped()]), pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0)
        finally:
            streamer.end()


class Packaged:
    """SmolLM2-135M-Instruct from a package (small_language_model.py); one reply at a time."""
    kind, on_model = "smollm", False

    def __init__(self, system: str = SYSTEM):
        self.system, self._model, self._lock = system, None, threading.Lock()

    def warm(self) -> None:
        from small_language_model import SmallLanguageModel
        self._model = self._model or SmallLanguageModel(threads=1, max_tokens=REPLY_TOKENS)

    def stream(self, session, speaker: int, history, me: str) -> Iterator[str]:
        from small_language_model import chat_messages
        with self._lock:
            self.warm()
            yield from self._model.chat(chat_messages(history, me, self.system))


class OtherServer:
    """Any server with OpenAI's /v1/chat/completions, streamed. The key, where it wants one, stands in OPENAI_API_KEY."""
    kind, on_model = "openai", False

    def __init__(self, url: str, model_name: str = "", system: str = SYSTEM):
        url = url.rstrip("/")
        self.url, self.name, self.system = (url if url.endswith("/v1") else url + "/v1"), model_name or "default", system

    def warm(self) -> None:
        """The other server is asked when there is something to say."""

    def stream(self, session, speaker: int, history, me: str) -> Iterator[str]:
        """ValueError where the server cannot be reached or says no."""
        import requests
        key = os.environ.get("OPENAI_API_KEY", "")
        body = {"model": self.name, "messages": messages(history, me, self.system), "stream": True, "max_tokens": REPLY_TOKENS}
        try:
            with requests.post(self.url + "/chat/completions", json=body, stream=True, allow_redirects=False, timeout=(CONNECT_SECONDS, READ_SECONDS),
                               headers={"Authorization": f"Bearer {key}"} if key else {}) as answer:
                if answer.status_code != 200:
                    raise ValueError(f"--responder openai:URL answered {answer.status_code}: check the URL, --responder_model and OPENAI_API_KEY")
                yield from _deltas(answer.iter_lines(chunk_size=1))
        except requests.RequestException as error:
            raise ValueError(f"--responder openai:URL cannot be reached ({type(error).__name__}): check that the server runs") from None


def _deltas(lines) -> Iterator[str]:
    """Lines of server-sent events -> the words in them."""
    for line in lines:
        data = line.decode("utf-8", "replace").strip()
        if not data.startswith("data:"):
            continue
        data = data[5:].strip()
        if data == "[DONE]":
            return
        try:
            choice = json.loads(data)["choices"][0]
        except (ValueError, KeyError, IndexError, TypeError):
            continue
        words = (choice.get("delta") or {}).get("content")
        if words:
            yield words
