"""Talk with the model: by typing, with the demo examples, or over a file of conversations.

    python demo.py                                                       type a line, hear and read the answer
    python demo.py --mode test                                           the examples, into outputs/demo
    python demo.py --mode batch --input examples/conversations.json --output outputs/batch

Knows nothing of training. Input is checked as a whole before anything is made or written.
"""
from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import config
from mirroring import mirror
from runtime import ROOT, choose_attention, fail, pick_device, plain_errors, write_json

MAX_SPEAKERS = 8
MAX_TEXT = 5000          # characters in one turn
PIECE = 240              # longer text is spoken in pieces of at most this many characters
MIN_VOICE = 0.5          # seconds a voice recording must last
TURN_GAP = 0.2           # seconds between the turns of a conversation's WAV
RETRIEVED = 8            # written replies that are looked through for one that was not said yet
GOOD_MATCH = 0.45        # a written reply may fit from this score on (generation.Retriever)
COVERED = 0.5            # and does if so much of what was said is known to it; else what was said is taken up
LOOKED_BACK = 2          # turns before the last one whose words a reply may take up
COMMAND_SECONDS = 60
TURN_FIELDS = ("speaker", "text", "mood", "audio")
HELP = """type a line and press Enter; the answer is spoken and printed
/voice FILE   answer in the voice of this recording      /reset   forget the conversation
/save [DIR]   write the conversation as WAV and JSON     /quit    leave (also Ctrl-D)"""

EXAMPLES = [
    {"id": "greeting", "turns": [{"speaker": "Mia", "mood": "happy", "text": "Good morning! It's lovely to hear your voice again."}]},
    {"id": "question", "turns": [{"speaker": "Mia", "mood": "neutral", "text": "Could you tell me when the next train leaves for the harbour?"}]},
    {"id": "sad", "turns": [{"speaker": "Mia", "mood": "sad", "text": "I'm sorry to say it, but the old dog passed away last night."}]},
    {"id": "exciting", "turns": [{"speaker": "Mia", "mood": "excited", "text": "We won! I can't believe it, we really won the whole race!"}]},
    {"id": "conversation", "turns": [
        {"speaker": "Mia", "mood": "happy", "text": "There you are! I thought you had missed the bus."},
        {"speaker": "Tom", "mood": "calm", "text": "Nearly. I had to run the last two streets in the rain."},
        {"speaker": "Mia", "mood": "worried", "text": "Oh no, you're soaked. Do you want my scarf?"},
        {"speaker": "Tom", "mood": "neutral", "text": "I'm fine, thank you. Did you bring the letter?"},
        {"speaker": "Mia", "mood": "excited", "text": "I did, and you won't believe what it says!"},
        {"speaker": "Tom", "mood": "surprised", "text": "Wait, they said yes? After all this time?"},
        {"speaker": "Mia", "mood": "happy", "text": "They said yes. We're moving to the coast in June."}]},
]


# ----------------------------------------------------------------------------- input

@dataclass
class PlannedTurn:
    speaker: str
    text: str | None = None        # None: answered by the model
    mood: str | None = None
    voice: object = None           # (N,) float32: a recording of this speaker


@dataclass
class Conversation:
    id: str
    turns: list[PlannedTurn]

    @property
    def speakers(self) -> list[str]:
        return list(dict.fromkeys(turn.speaker for turn in self.turns))


@dataclass
class Source:
    """A parsed input file that can say in which line a field stands."""
    name: str
    folder: Path
    text: str
    warnings: list = field(default_factory=list)

    def where(self, path: tuple) -> str:
        label = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")
        return f"{self.name}, line {line_of(self.text, path)}, {label or 'the whole file'}"

    def error(self, path: tuple, message: str) -> ValueError:
        return ValueError(f"{self.where(path)}: {message}")


def line_of(text: str, path: tuple) -> int:
    """Line (from 1) of the value at `path` (keys and indices) in valid JSON text."""
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,:]*")
    at = gap.match(text).end()
    for step in path:
        at = gap.match(text, at + 1).end()                       # past the bracket
        for index in itertools.count():
            name = index
            if isinstance(step, str):
                name, at = decoder.raw_decode(text, at)
                at = gap.match(text, at).end()
            if name == step:
                break
            at = gap.match(text, decoder.raw_decode(text, at)[1]).end()
    return text.count("\n", 0, at) + 1


def read_source(path) -> tuple[Source, object]:
    """The file as Source and parsed JSON. ValueError with line and column for what is not JSON in UTF-8."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no input file {path}: check --input (a sample is examples/conversations.json)")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[:error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8: save the file as UTF-8") from None
    if not text.strip():
        raise ValueError(f"{path} is empty: write at least one conversation (see examples/conversations.json)")
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}: mend the JSON there") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply: see examples/conversations.json for the format") from None
    return Source(str(path), path.resolve().parent, text), parsed


def read_conversations(path) -> tuple[list[Conversation], list[str]]:
    """Conversations of the file and warnings. ValueError naming line and field for the first fault found."""
    source, parsed = read_source(path)
    if not isinstance(parsed, dict) or "conversations" not in parsed:
        raise source.error((), 'write {"conversations": [...]}')
    items = _want(source, ("conversations",), parsed["conversations"], list, 'a list of {"id": ..., "turns": [...]}')
    if not items:
        raise source.error(("conversations",), "is empty: write at least one conversation")
    _note_unknown(source, (), parsed, ("conversations",))
    conversations = [_conversation(source, ("conversations", i), item, i) for i, item in enumerate(items)]
    names = [file_name(c.id).lower() for c in conversations]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise source.error(("conversations", i), f"id {conversations[i].id!r} gives the same file name as an earlier one: change the id")
    return conversations, source.warnings


def _want(source: Source, path: tuple, value, kind, words: str):
    if not isinstance(value, kind) or isinstance(value, bool):
        raise source.error(path, f"must be {words}, not {type(value).__name__}")
    return value


def _note_unknown(source: Source, path: tuple, item: dict, known: tuple) -> None:
    for key in item:
        if key not in known:
            source.warnings.append(f"{source.where(path + (key,))}: unknown field, ignored (known: {', '.join(known)})")


def _conversation(source: Source, path: tuple, item, number: int) -> Conversation:
    _want(source, path, item, dict, 'an object {"id": ..., "turns": [...]}')
    _note_unknown(source, path, item, ("id", "turns"))
    name = item.get("id", f"c{number + 1}")
    name = str(_want(source, path + ("id",), name, (str, int), "text"))
    if not file_name(name).strip("_"):
        raise source.error(path + ("id",), "must hold a letter or a digit: it names the WAV files")
    if "turns" not in item:
        raise source.error(path, 'field "turns" is missing: add "turns": [...]')
    turns = _want(source, path + ("turns",), item["turns"], list, "a list of turns")
    if not turns:
        raise source.error(path + ("turns",), "is empty: write at least one turn")
    conversation = Conversation(name, [_turn(source, path + ("turns", i), turn) for i, turn in enumerate(turns)])
    for i, turn in enumerate(conversation.turns):
        if turn.speaker in conversation.speakers[MAX_SPEAKERS:]:
            raise source.error(path + ("turns", i, "speaker"), f"{turn.speaker!r} is speaker number {MAX_SPEAKERS + 1}: "
                               f"one conversation has at most {MAX_SPEAKERS} speakers")
    return conversation


def _turn(source: Source, path: tuple, item) -> PlannedTurn:
    _want(source, path, item, dict, 'an object {"speaker": ..., "text": ...}')
    _note_unknown(source, path, item, TURN_FIELDS)
    if "speaker" not in item:
        raise source.error(path, 'field "speaker" is missing: name who speaks')
    given = {key: item[key] for key in TURN_FIELDS if item.get(key) is not None or key == "speaker"}
    for key, value in given.items():
        _want(source, path + (key,), value, str, "text")
    if not given["speaker"].strip():
        raise source.error(path + ("speaker",), "is empty: name who speaks")
    turn = PlannedTurn(given["speaker"].strip(), given.get("text"), given.get("mood"))
    try:
        if turn.text is not None:
            check_text(turn.text)
        check_mood(turn.mood)
        if "audio" in given:
            turn.voice = read_voice(source.folder / given["audio"])
    except ValueError as error:
        wrong = next(k for k in ("text", "mood", "audio") if k in given and _is_about(k, given[k], error))
        raise source.error(path + (wrong,), str(error)) from None
    return turn


def _is_about(key: str, value: str, error: ValueError) -> bool:
    """Whether this field alone gives the error."""
    try:
        {"text": check_text, "mood": check_mood}.get(key, lambda _: None)(value)
    except ValueError:
        return True
    return key == "audio"


def check_text(text: str) -> str:
    """The text as it will be spoken. ValueError where it is empty, too long, or nothing of it can be spoken."""
    from text_tokenizer import read_aloud
    if not text.strip():
        raise ValueError("is empty: write what is said, or leave the field out to have the model answer")
    if len(text) > MAX_TEXT:
        raise ValueError(f"has {len(text)} characters, at most {MAX_TEXT} are spoken in one turn: split it into several turns")
    return read_aloud(text)


def check_mood(mood: str | None) -> None:
    if mood is not None and mood not in config.MOODS:
        raise ValueError(f"unknown mood {mood!r}: use one of {', '.join(config.MOODS)}")


def read_voice(path):
    """A voice recording as (N,) float32 at the codec's rate. ValueError where there is no voice in it."""
    from audio_io import SAMPLE_RATE, read_audio
    audio = read_audio(path)
    if len(audio) < MIN_VOICE * SAMPLE_RATE:
        raise ValueError(f"{path} lasts {len(audio) / SAMPLE_RATE:.2f} s: give a recording of at least {MIN_VOICE} s")
    if abs(audio).max() < 1e-3:
        raise ValueError(f"{path} is silent: give a recording of a voice")
    return audio


def file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text)[:80]


# ----------------------------------------------------------------------------- answers

class Responder:
    """What a speaker without a line says: from the text head, from written dialogues, from a small language model, or from a command."""

    def __init__(self, kind: str, command: str = "", candidates: int = RETRIEVED):
        self.kind, self.command, self.candidates, self._loaded, self.language = kind, command, candidates, None, None
        if kind == "command" and not command.strip():
            raise ValueError("--responder command needs --responder_command, such as --responder_command 'python my_bot.py'")

    def reply(self, session, speaker: int, history: list[tuple[str, str]], me: str) -> tuple[str, str | None]:
        """(text, mood or None); history: (speaker name, text) of the turns so far."""
        if self.kind == "model":
            return session.reply_text(speaker), None
        if self.kind == "command":
            return self._ask_command(history, me), None
        if self.kind == "smollm":
            return self._ask_language_model(history, me), None
        return self._retrieve(session, speaker, history)

    def stream(self, session, speaker: int, history: list[tuple[str, str]], me: str):
        """The same in pieces, of the text head as it writes them."""
        if self.kind == "model":
            return ((piece, None) for piece in session.reply_stream(speaker))
        return iter([self.reply(session, speaker, history, me)])

    def sentences(self, session, speaker: int, history: list[tuple[str, str]], me: str):
        """(sentence, mood or None) of the text head's reply as soon as each is written; of the others a whole reply."""
        from generation import sentences
        pieces = self.stream(session, speaker, history, me)
        return sentences(piece for piece, _ in pieces) if self.kind == "model" else pieces

    def _retrieve(self, session, speaker: int, history) -> tuple[str, str | None]:
        """The best written reply that fits and was not said yet; else what was said, taken up as a question (not twice running), and a general reply."""
        retriever, general = self._written()
        said = [text.lower() for _, text in history]
        asked, before = history[-1][1] if history else "", " ".join(text for _, text in history[:-1][-LOOKED_BACK:])
        for score, turn, covered in retriever.nearest(asked, self.candidates, before):
            if score >= GOOD_MATCH and covered >= COVERED and turn["text"].lower() not in said:
                return turn["text"], turn.get("mood")
        taken = mirror(asked, retriever.weight)
        kind = ("mirrored " if taken else "") + ("question" if asked.rstrip().endswith("?") else "statement") if history else "opening"
        others = [turn for turn in general[kind] if not any(text.endswith(turn["text"].lower()) for text in said)] or general[kind]
        chosen = others[int(session.random() * len(others))]
        again = len(history) > 2 and history[-2][1].startswith(mirror(history[-3][1], retriever.weight) or "\0")
        return f"{taken} {chosen['text']}" if taken and not again else chosen["text"], chosen.get("mood")

    def _written(self):
        """Retriever over assets/dialogues (those with an assistant) and assets/smalltalk.jsonl, and the general replies."""
        if self._loaded is None:
            from generation import Retriever
            lines = [line for path in (ROOT / "assets" / "smalltalk.jsonl", *sorted((ROOT / "assets" / "dialogues").glob("*.jsonl")))
                     if path.is_file() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            items = [json.loads(line) for line in lines]
            general = {item["when"]: item["replies"] for item in items if "when" in item}
            if not general:
                raise ValueError("assets/smalltalk.jsonl is missing: get the whole repository, or use --responder model")
            small = [{"kind": "people", "turns": [{"speaker": "user", "text": said}, {"speaker": "assistant"} | reply]}
                     for item in items if "said" in item for said in item["said"] for reply in item["replies"]]
            mirror("Hello there.")                                     # its tagger is read now, not while somebody waits
            self._loaded = Retriever(small + [item for item in items if item.get("kind") == "assistant"]), general
        return self._loaded

    def _ask_language_model(self, history, me: str) -> str:
        from small_language_model import SmallLanguageModel, chat_messages, whole_sentences
        self.language = self.language or SmallLanguageModel()
        return whole_sentences("".join(self.language.chat(chat_messages(history, me)))) or "Go on."

    def _ask_command(self, history, me: str) -> str:
        prompt = "".join(f"{name}: {text}\n" for name, text in history) + f"{me}:"
        try:
            done = subprocess.run(shlex.split(self.command), input=prompt, capture_output=True, text=True, timeout=COMMAND_SECONDS)
        except (OSError, subprocess.TimeoutExpired, ValueError) as error:
            raise ValueError(f"--responder_command {self.command!r} failed ({error}): check the command") from None
        answer = done.stdout.strip()
        if done.returncode or not answer:
            why = done.stderr.strip().splitlines()[-1:] or ["it printed nothing"]
            raise ValueError(f"--responder_command {self.command!r} gave no answer (exit code {done.returncode}: {why[0]}): check the command")
        try:
            check_text(answer)
        except ValueError as error:
            raise ValueError(f"the answer of --responder_command {self.command!r} {error}") from None
        return answer


# ----------------------------------------------------------------------------- talking

@dataclass
class Spoken:
    """One finished turn of a conversation."""
    speaker: str
    text: str
    audio: object                  # (N,) float32
    first_audio_ms: float | None
    total_ms: float
    ended: bool


def make_fast(model, args, sampling, codebook_size: int) -> str:
    """Let the model compute as --precision, --compile_depth and --speculative say (absent: as by default); one line of what runs."""
    import quantisation
    precision, compiled, draft = (getattr(args, name, default) for name, default in (("precision", ""), ("compile_depth", False), ("speculative", "off")))
    if compiled and draft != "off":
        raise ValueError("--compile_depth and --speculative are two ways of making the same frame: choose one")
    b = model.cfg.backbone
    attention = choose_attention(model.text_embeddings.weight.device, b.heads, b.kv_heads, b.head_dim)
    notes = [quantisation.quantise(model, precision or getattr(model, "wanted_precision", "fp32")), f"{attention['backend']} attention"]
    if compiled:
        import depth_graph
        print("note: compiling the depth decoder", file=sys.stderr)
        notes.append(depth_graph.compile_depth(model, sampling, codebook_size))
    if draft != "off":
        import speculative
        notes.append(speculative.speculate(model, draft, sampling))
    return "; ".join(notes)


class Lab:
    """Model, codec, tokenizer, voices and responder, loaded once; hands out sessions."""

    def __init__(self, args):
        import checkpoint
        from text_tokenizer import load_tokenizer
        self.sampling = config.from_flags(config.SamplingConfig, args)
        self.responder = Responder(args.responder, args.responder_command)
        self.given_voices = [read_voice(path) for path in args.voice]
        self.device = pick_device(args.device)
        self.path = self.find_weights(args.checkpoint, args.adapter)
        self.codec = checkpoint.load_codec(args.codec, device=self.device)
        self.model = checkpoint.load_model(self.path, device=self.device, codec_fingerprint=self.codec.fingerprint)
        if args.adapter:
            import lora
            lora.load(self.model, args.adapter)
        self.notes = make_fast(self.model, args, self.sampling, self.codec.cfg.codebook_size)
        self.tokenizer = load_tokenizer(self.model.cfg.tokenizer)
        self.num_codebooks = args.num_codebooks or None
        if self.num_codebooks and not 1 <= self.num_codebooks <= self.model.cfg.num_codebooks:
            raise ValueError(f"--num_codebooks {args.num_codebooks} must be 1..{self.model.cfg.num_codebooks}")
        self._written: dict[int, tuple] = {}                               # recordings whose words were written down
        self.voices = [written_voice(audio) for audio in self.given_voices] or ([] if args.adapter else shipped_voices(ROOT / "pretrained" / "voices"))

    @classmethod
    def around(cls, model, codec, tokenizer, sampling, voices: list[dict]) -> Lab:
        """A lab for a model that is there already, such as one in training; it knows no answers."""
        lab = cls.__new__(cls)
        lab.model, lab.codec, lab.tokenizer, lab.sampling, lab.voices = model, codec, tokenizer, sampling, voices
        lab.num_codebooks, lab.responder, lab._written = None, None, {}
        return lab

    @staticmethod
    def find_weights(given: str, adapter: str) -> Path:
        """--checkpoint, else what the adapter was trained on, else the default."""
        import checkpoint
        if adapter and not given:
            import lora
            given = lora.read(adapter)[1]["base"]
        return Path(given) if given else checkpoint.default_checkpoint()

    @property
    def model_name(self) -> str:
        try:
            return self.path.resolve().relative_to(ROOT).as_posix()
        except ValueError:
            return self.path.name

    def session(self):
        from generation import Session
        return Session(self.model, self.codec, self.tokenizer, self.sampling, num_codebooks=self.num_codebooks)

    def speak(self, session, name: str, speaker: int, text: str, mood: str | None) -> Spoken:
        """Say `text`, in pieces where it is long."""
        return self.speak_parts(session, name, speaker, [(text, None)], mood)

    def speak_parts(self, session, name: str, speaker: int, parts, mood: str | None = None, on_part=None) -> Spoken:
        """Say (text, mood) parts as they come, in pieces where they are long; `mood` goes before theirs. on_part gets the text of a part before, and its sound (N,) after it was said.

        ValueError where nothing can be said.
        """
        import numpy as np
        from generation import split_text
        turns, said = [], []
        for text, found in parts:
            said.append(text)
            if on_part:
                on_part(text, None)
            count = len(turns)
            for piece in speakable(split_text(text, PIECE)):
                turns.append(session.say(speaker, piece, mood or found))
            if on_part and len(turns) > count:
                on_part(text, np.concatenate([t.audio for t in turns[count:]]))
        if not turns:
            raise ValueError("nothing of the answer can be spoken: try again, or change --responder")
        return Spoken(name, " ".join(said), np.concatenate([t.audio for t in turns]), turns[0].first_audio_ms,
                      sum(t.total_ms for t in turns), all(t.ended for t in turns))

    def set_voice(self, session, speaker: int, planned=None) -> None:
        """The voice given for this turn, else that of --voice or of the shipped recordings, in order of appearance."""
        if planned is not None:
            if id(planned) not in self._written:
                self._written[id(planned)] = planned, written_voice(planned)
            session.set_voice(speaker, **self._written[id(planned)][1])
        elif self.voices and speaker not in session.voices:
            session.set_voice(speaker, **self.voices[speaker % len(self.voices)])

    def converse(self, conversation: Conversation):
        """Yields a Spoken per turn."""
        session, names, history = self.session(), conversation.speakers, []
        first = {turn.speaker: turn.voice for turn in reversed(conversation.turns) if turn.voice is not None}
        for name in names:
            self.set_voice(session, names.index(name), first.get(name))
        if len(names) == 1 and session.voices and len(self.voices) > 1:      # a listener, so that a voice is not heard right before its own turn (generation.Session)
            session.set_voice(1, **self.voices[1])
        for turn in conversation.turns:
            speaker, mood = names.index(turn.speaker), turn.mood
            if turn.voice is not None and turn.voice is not first[turn.speaker]:
                self.set_voice(session, speaker, turn.voice)
            parts = [(turn.text, None)] if turn.text is not None else self.responder.sentences(session, speaker, history, turn.speaker)
            session.prepare(speaker)
            spoken = self.speak_parts(session, turn.speaker, speaker, parts, mood)
            history.append((turn.speaker, spoken.text))
            yield spoken


def speakable(pieces: list[str]) -> list[str]:
    """The pieces that hold at least one word."""
    kept = []
    for piece in pieces:
        try:
            check_text(piece)
            kept.append(piece)
        except ValueError:
            continue
    return kept


def written_voice(audio) -> dict:
    """A recording (N,) as generation.Session.set_voice takes it: its beginning, with what the ASR hears in it. With its words known the voice is kept best."""
    from audio_io import SAMPLE_RATE
    from generation import PROMPT_SECONDS
    from text_tokenizer import read_aloud
    audio = audio[:int(PROMPT_SECONDS * SAMPLE_RATE)]
    try:
        from judges import transcribe
        return {"audio": audio, "text": read_aloud(transcribe(audio))}
    except (ImportError, ValueError, OSError) as error:                    # no ASR here, or nothing it can make out
        print(f"note: the voice is used without its words ({' '.join(str(error).split())[:100]})", file=sys.stderr)
        return {"audio": audio}


def shipped_voices(folder: Path) -> list[dict]:
    """Recordings NAME.flac with NAME.json ({"text": ..., "consumed": optional bytes spoken by the end of each frame})."""
    from audio_io import read_audio
    voices = []
    for path in sorted(folder.glob("*.flac")):
        about = path.with_suffix(".json")
        facts = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
        voices.append({"audio": read_audio(path), "text": facts.get("text"), "consumed": facts.get("consumed"), "moods": {}})
    return voices


# ----------------------------------------------------------------------------- batch and test

def run_batch(lab: Lab, conversations: list[Conversation], output: Path) -> dict:
    """Speak all conversations into `output`; results.json is written last. Returns its content."""
    from audio_io import SAMPLE_RATE, write_audio
    from tqdm import tqdm
    from watermark import AI_TAGS
    results, total = [], sum(len(c.turns) for c in conversations)
    with staged(output) as folder, tqdm(total=total, unit="turn", disable=total < 2, file=sys.stderr) as bar:
        for conversation in conversations:
            base, rows, sounds = file_name(conversation.id), [], []
            for number, spoken in enumerate(lab.converse(conversation), 1):
                name = f"{base}_turn_{number:02d}.wav"
                write_audio(folder / name, spoken.audio, SAMPLE_RATE, AI_TAGS)
                rows.append(result_row(spoken, name, SAMPLE_RATE))
                sounds.append(spoken.audio)
                bar.update()
                tqdm.write(f"{conversation.id:14s} {number}/{len(conversation.turns)}  {turn_line(spoken, rows[-1])}", file=sys.stdout)
            write_audio(folder / f"{base}.wav", mix(sounds, SAMPLE_RATE), SAMPLE_RATE, AI_TAGS)
            results.append({"id": conversation.id, "audio": f"{base}.wav", "turns": rows})
        summary = {"conversations": results, "model": lab.model_name, "device": str(lab.device), "seed": lab.sampling.seed}
        write_json(folder / "results.json", summary)
    return summary


@contextlib.contextmanager
def staged(output: Path):
    """A folder inside `output` whose files move up when all went well (results.json last), else vanish."""
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=output) as folder:
        yield Path(folder)
        for path in sorted(Path(folder).iterdir(), key=lambda p: (p.name == "results.json", p.name)):
            os.replace(path, output / path.name)


def result_row(spoken: Spoken, name: str, rate: int) -> dict:
    first = spoken.first_audio_ms
    return {"speaker": spoken.speaker, "text": spoken.text, "audio": name, "duration_s": round(len(spoken.audio) / rate, 3),
            "first_audio_ms": None if first is None else round(first, 1), "total_ms": round(spoken.total_ms, 1), "ended": spoken.ended}


def turn_line(spoken: Spoken, row: dict) -> str:
    first = "no sound" if row["first_audio_ms"] is None else f"first sound {row['first_audio_ms']:.0f} ms"
    speed = f", {row['total_ms'] / 1000 / row['duration_s']:.2f} of real time" if row["duration_s"] else ""
    return f"{spoken.speaker}: {spoken.text}  [{row['duration_s']:.1f} s, {first}{speed}{'' if spoken.ended else ', cut off'}]"


def mix(sounds: list, rate: int):
    """Turns one after another with a short gap."""
    import numpy as np
    gap = np.zeros(int(TURN_GAP * rate), dtype=np.float32)
    return np.concatenate([part for sound in sounds for part in (sound, gap)][:-1])


def check_output(folder: Path) -> None:
    """Make the folder; ValueError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {folder} ({error.strerror}): change --output") from None


# ----------------------------------------------------------------------------- interactive

class Printing:
    """Shows the parts of an answer as they come."""

    def part(self, text: str, audio) -> None:
        if audio is None:
            print(f" {text}", end="", flush=True)

    def close(self) -> None:
        print(flush=True)


class Playing(Printing):
    """Plays them too, each while the next is being made."""

    def __init__(self, sample_rate: int):
        self.sample_rate, self.until = sample_rate, 0.0

    def part(self, text: str, audio) -> None:
        super().part(text, audio)
        if audio is not None:
            from audio_io import play
            self._wait()
            play(audio, self.sample_rate, wait=False)
            self.until = time.monotonic() + len(audio) / self.sample_rate

    def _wait(self) -> None:
        time.sleep(max(0.0, self.until - time.monotonic()))

    def close(self) -> None:
        self._wait()
        super().close()


class Chat:
    """The typed conversation: the user is speaker 0, the model answers as speaker 1."""

    def __init__(self, lab: Lab, output: Path):
        from audio_io import can_play
        self.lab, self.output, self.sound = lab, output, can_play()
        self.voice, self.count = None, 0
        self.reset()

    def reset(self) -> None:
        self.session, self.history, self.spoken = self.lab.session(), [], []
        self.lab.set_voice(self.session, 1, self.voice)
        self.session.prepare()
        self.session.make_moods(1)

    def answer(self, line: str) -> None:
        from audio_io import SAMPLE_RATE, write_audio
        from watermark import AI_TAGS
        check_text(line)
        self.session.add_turn(0, line)
        self.history.append(("you", line))
        print("model:", end="", flush=True)
        with contextlib.closing(Playing(SAMPLE_RATE) if self.sound else Printing()) as out:
            spoken = self.lab.speak_parts(self.session, "model", 1, self.lab.responder.sentences(self.session, 1, self.history, "model"), on_part=out.part)
        self.history.append(("model", spoken.text))
        self.spoken.append(spoken)
        if not self.sound:
            self.count += 1
            path = self.output / f"turn_{self.count:02d}.wav"
            write_audio(path, spoken.audio, SAMPLE_RATE, AI_TAGS)
            print(f"       {path}  ({len(spoken.audio) / SAMPLE_RATE:.1f} s)", flush=True)

    def save(self, folder: Path) -> None:
        from audio_io import SAMPLE_RATE, write_audio
        from watermark import AI_TAGS
        if not self.spoken:
            raise ValueError("nothing was said yet: type a line first")
        check_output(folder)
        rows = []
        for number, spoken in enumerate(self.spoken, 1):
            write_audio(folder / f"saved_turn_{number:02d}.wav", spoken.audio, SAMPLE_RATE, AI_TAGS)
            rows.append(result_row(spoken, f"saved_turn_{number:02d}.wav", SAMPLE_RATE))
        write_audio(folder / "saved.wav", mix([s.audio for s in self.spoken], SAMPLE_RATE), SAMPLE_RATE, AI_TAGS)
        write_json(folder / "saved.json", {"conversation": [{"speaker": s, "text": t} for s, t in self.history], "answers": rows})
        print(f"saved {folder / 'saved.wav'} and {folder / 'saved.json'}")

    def command(self, line: str) -> bool:
        """One /command; False to leave."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/quit":
            return False
        if name == "/help":
            print(HELP)
        elif name == "/reset":
            self.reset()
            print("forgotten; a new conversation begins")
        elif name == "/save":
            self.save(Path(rest) if rest else self.output)
        elif name == "/voice" and rest:
            self.voice = read_voice(rest)
            self.lab.set_voice(self.session, 1, self.voice)
            self.session.prepare()
            self.session.make_moods(1)
            print(f"answering in the voice of {rest}")
        else:
            raise ValueError("/voice needs a file: /voice FILE" if name == "/voice" else f"unknown command {name}: type /help")
        return True


def run_interactive(lab: Lab, output: Path) -> int:
    chat = Chat(lab, output)
    print(f"model {lab.model_name} on {lab.device} in {lab.notes}, answers: {lab.responder.kind}, "
          f"{'sound: on' if chat.sound else f'no sound device: WAV files go to {output}'}\n{HELP}")
    while True:
        try:
            line = input("you: ").strip()
            if line.startswith("/"):
                if not chat.command(line):
                    return 0
            elif line:
                chat.answer(line)
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        except UnicodeDecodeError:
            fail("that line is not UTF-8: set the terminal to UTF-8")
        except (ValueError, OSError) as error:
            fail(str(error))


# ----------------------------------------------------------------------------- command line

def build_parser() -> config.Parser:
    parser = config.Parser(description="Talk with the model.")
    parser.add_argument("--mode", default="interactive", choices=("interactive", "test", "batch"), help="default interactive")
    parser.add_argument("--input", help="JSON file of conversations (batch)")
    parser.add_argument("--output", default="", help="folder for WAV files and results.json (default outputs/demo)")
    parser.add_argument("--checkpoint", default="", help="weights (default: checkpoints/best_model.pt, else the shipped ones)")
    parser.add_argument("--adapter", default="", help="a voice: folder written by train.py --lora; speaks in it unless --voice is given")
    parser.add_argument("--codec", default="pretrained/codec", help="default pretrained/codec")
    parser.add_argument("--device", default="auto", help="auto|cpu|cuda|mps")
    parser.add_argument("--num_codebooks", type=int, default=0, help="decode only the first N codebooks (default all of the model's)")
    parser.add_argument("--voice", action="append", default=[], metavar="FILE", help="recording of a voice; repeat for the next speaker")
    parser.add_argument("--responder", default="retrieval", choices=("retrieval", "smollm", "model", "command"),
                        help="who answers turns without text: written dialogues (default), a small language model, the text head, or a command")
    parser.add_argument("--responder_command", default="", help="reads the dialogue on stdin, prints the answer (--responder command)")
    parser.add_argument("--precision", default="", choices=("", *config.PRECISIONS), help="what products are computed in (default: what the weights' config.json says, else fp32)")
    parser.add_argument("--compile_depth", action="store_true", help="compile the depth decoder's frame (seconds to a minute at the start; needs a C++ compiler)")
    parser.add_argument("--speculative", default="off", choices=("off", "auto", "int8", "int4-depth", "phrases"),
                        help="draft the codes of a frame, same distribution; auto: where it is measured to be faster (default off)")
    config.add_flags(parser, config.SamplingConfig)
    return parser


@plain_errors
def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    output = Path(args.output or "outputs/demo")
    if args.mode == "batch":
        if not args.input:
            raise ValueError("--mode batch needs --input FILE (a sample is examples/conversations.json)")
        conversations, warnings = read_conversations(args.input)
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
    else:
        conversations = [Conversation(c["id"], [PlannedTurn(**turn) for turn in c["turns"]]) for c in EXAMPLES]
    lab = Lab(args)
    if args.mode == "interactive":
        return run_interactive(lab, output)
    check_output(output)
    print(f"model {lab.model_name} on {lab.device} in {lab.notes}, seed {lab.sampling.seed}, answers: {lab.responder.kind}")
    run_batch(lab, conversations, output)
    print(f"{output / 'results.json'} and {len(conversations)} conversations as WAV files beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
