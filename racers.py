"""What is raced in benchmark.py latency, one class per kind of racer; each lives in a process of its own (benchmark_latency.py).

A racer is built from a spec (plain data, and `tools`: functions of modules that this one may not import) and answers
`speak(item)`: a text to sound; `answer(item)`: the user's sound to the reply's sound; `paired(item)`: an old conversation beside
a young one. Times are wall-clock milliseconds in that process. `about()` says what it is: parameters, and weights that a frame reads.

N samples, K codebooks, T frames.
"""
from __future__ import annotations

import importlib
import importlib.util
import itertools
import re
import time
from pathlib import Path
from types import SimpleNamespace

import config

ROOT = Path(__file__).resolve().parent
BLOCK = 1920               # samples of the user's sound that arrive at a time (80 ms)
BLOCK_SECONDS = BLOCK / 24000
STEP_SECONDS = 0.03        # a step of a rehearsal is begun only where so much time is left
FRAMES = 40                # length for which the weights that the other orders read are counted
LOUD = 3.0                 # heads of the models raced against transformers': logits of several units, so that greedy codes hang on no rounding
RACE_GEOMETRIES = {        # raced against transformers' CSM: backbone, depth decoder; 32 codebooks, this project's bytes as text
    "csm-nano": (config.TransformerConfig(8, 384, 1024, 6, 2), config.TransformerConfig(3, 256, 1024, 4, 2, max_positions=64)),
    "csm-tiny": (config.TransformerConfig(18, 1024, 4096, 16, 4), config.TransformerConfig(4, 512, 2048, 8, 2, max_positions=64)),
    "csm-test": (config.TransformerConfig(2, 64, 128, 4, 2, max_positions=256), config.TransformerConfig(2, 32, 64, 2, 1, max_positions=64))}


VARIANT_ROOMS = {"compiled": "depth_graph", "int8": "quantisation", "speculative": "speculative"}


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# ----------------------------------------------------------------------------- variants of our model

class LeftOut(ValueError):
    """This variant does not exist in this checkout, or not on this machine."""


def check(variant: str) -> list[str]:
    """The words of a variant. LeftOut where this checkout lacks one."""
    words = variant.replace("plain", "").split()
    missing = [word for word in words if word not in VARIANT_ROOMS or not has(VARIANT_ROOMS[word])]
    if missing:
        raise LeftOut(f"there is no {missing[0]} variant here")
    return words


def vary(model, variant: str) -> str:
    """Make `model` a variant, in place; a line that says what runs. LeftOut where there is none.

    variant: words of VARIANT_ROOMS; "" or "plain": as it was loaded.
    """
    words = check(variant)
    if not words:
        return ""
    import quantisation
    notes = [quantisation.quantise(model, "int8" if "int8" in words else "fp32")]
    for word, make, more in (("compiled", "compile_depth", ()), ("speculative", "speculate", ("int8",))):     # "auto" would leave it out where it does not win
        if word in words:
            notes.append(getattr(importlib.import_module(VARIANT_ROOMS[word]), make)(model, *more))
            if model.frame_codes is None:
                raise LeftOut(f"{word} does not run here: {notes[-1]}")
    return "; ".join(notes)


# ----------------------------------------------------------------------------- bytes that a frame reads

def matrix_bytes(module, size: int = 0) -> int:
    """Bytes of the matrices of a module; size: bytes per number, 0: as they are."""
    return sum(p.numel() * (size or p.element_size()) for p in module.parameters() if p.dim() > 1)


def decoder_bytes(codec) -> int:
    """Bytes of the matrices behind a frame's sound."""
    return sum(matrix_bytes(getattr(codec, name)) for name in ("frame_decoder", "slot_decoder", "hop_decoder", "split", "refine", "head"))


def frame_bytes(model, codec, size: int = 0) -> dict[str, float]:
    """MB of weights behind one frame: `once`, and `every_read`, which counts the depth decoder's blocks once per codebook.

    Embeddings are rows, not matrices, here; cross-attention and memory count in full, the codec's decoder besides.
    """
    K = model.cfg.num_codebooks
    reads = [matrix_bytes(part, size) for part in (model.backbone, model.codebook0_head, *model.read_text, *model.read_memory)]
    reads += [] if model.advance_head is None else [matrix_bytes(model.advance_head, size)]
    depth, projection = matrix_bytes(model.decoder, size), model.projection.weight.numel() * (size or 4)
    heads = model.audio_head.numel() * (size or 4)
    sound = decoder_bytes(codec)
    fixed = sum(reads) + heads + sound
    # folded: the projected embeddings are a table, so that the projection is used for the hidden state alone
    return {"once": (fixed + depth + projection) / 1e6, "every_read": (fixed + K * depth + projection) / 1e6, "codec": sound / 1e6}


# ----------------------------------------------------------------------------- what racers share

def load_codec(spec: dict):
    import checkpoint
    return checkpoint.load_codec(spec["codec"])


def timed_chunks(chunks, start: float) -> dict:
    """Consume chunks of sound -> {first_ms, total_ms, cpu_ms, audio (N,)}; first_ms is None where none came, cpu_ms that of this loop alone."""
    import numpy as np
    first, made, busy = None, [], time.process_time()
    for chunk in chunks:
        first = first if first is not None else 1000 * (time.perf_counter() - start)
        made.append(np.asarray(chunk, np.float32))
    return {"first_ms": first, "total_ms": 1000 * (time.perf_counter() - start), "cpu_ms": 1000 * (time.process_time() - busy),
            "audio": np.concatenate(made) if made else np.zeros(0, np.float32)}


def blocks(audio) -> list:
    """audio (N,) -> pieces of BLOCK samples as a microphone gives them; at least one."""
    return [audio[i:i + BLOCK] for i in range(0, max(1, len(audio)), BLOCK)]


def random_model(cfg: config.ModelConfig, seed: int):
    import torch
    from architecture import CSM
    with torch.device("meta"):
        model = CSM(cfg)
    model = model.to_empty(device="cpu")
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.eval()


# ----------------------------------------------------------------------------- our model

NOTHING_WRITTEN = "Go on."        # said where the text head writes no word


class Ours:
    """nano with its shipped weights, or another preset with random ones, as plain, compiled, int8 or speculative."""

    def __init__(self, spec: dict):
        self.spec, self.tools = spec, spec["tools"]
        self.trained = not spec.get("size")
        if self.trained:
            args = SimpleNamespace(device="cpu", checkpoint=spec["checkpoint"], codec=spec["codec"])
            self.model, self.codec, self.tokenizer, path = self.tools["load_talker"](args)
            self.talker = self.model, self.codec, self.tokenizer, path
        else:
            from text_tokenizer import load_tokenizer
            self.model, self.codec, self.tokenizer = random_model(config.model_preset(spec["size"]), spec["seed"]), load_codec(spec), load_tokenizer()
        size = int("int8" in spec.get("variant", ""))
        self.bytes, self.parameters = frame_bytes(self.model, self.codec, size), sum(p.numel() for p in self.model.parameters())
        self.note = vary(self.model, spec.get("variant", ""))
        self._retriever = self._ears = None

    def about(self) -> dict:
        return {"parameters": self.parameters, "bytes": self.bytes, "note": self.note, "weights": "trained" if self.trained else "random"}

    def session(self, item: dict):
        """The voices of both speakers heard before, where the weights are trained; else an empty conversation."""
        from generation import Session
        seconds = {} if self.trained else {"max_seconds": self.spec["frames"] / self.model.cfg.frame_rate}
        sampling = config.SamplingConfig(seed=item["seed"], **seconds)
        if self.trained:
            session = self.tools["session_with_voices"](self.talker, self.spec["data"], item["turns"], item["index"], sampling)
            session.make_moods(item["turns"][item["index"]]["custom"]["speaker_index"])          # as in a conversation that goes on
            return session
        session = Session(self.model, self.codec, self.tokenizer, sampling)
        session.prepare(0)
        return session

    def speak(self, item: dict) -> dict:
        session = self.session(item)
        speaker = item["turns"][item["index"]]["custom"]["speaker_index"]
        start = time.perf_counter()
        made = timed_chunks(session.speak(speaker, item["text"]), start)
        return made | {"text": item["text"], "frames": session.turns[-1].num_frames}

    # ---- from the user's sound

    def answer(self, item: dict) -> dict:
        """The user's sound is heard while it arrives; then the reply's text is found by spec["reply"], and spoken.

        given: it lies ready when the turn ends. head: the model itself writes down the turn, then its reply, of which each
        sentence is spoken as soon as it is written; while the user speaks it rehearses both in the time that is left. written: Whisper's transcript, and a reply
        from the written dialogues. chosen: such a reply to what the model itself has heard.
        """
        session, reply, self._rehearsal = self.session(item), self.spec["reply"], iter(())
        user, me = item["user_speaker"], item["turns"][item["index"]]["custom"]["speaker_index"]
        listening, ears = self._listen(session, user), self._open_ears() if reply == "written" else None
        clock, pieces = Clock(), blocks(item["user"])
        for block in pieces[:-1]:
            clock.arrive()
            listening.feed(block)
            if ears:
                ears.feed(block)
            if reply == "head" and hasattr(listening, "rehearse"):
                self._rehearse(clock, listening, me)
            clock.work()
        end, stages = clock.arrive(), {}

        def done(stage: str) -> None:
            stages[stage] = 1000 * (time.perf_counter() - end)
        listening.feed(pieces[-1])
        if ears:
            ears.feed(pieces[-1], True)
        said = {"given": lambda: item["user_text"], "head": lambda: None, "chosen": lambda: None, "written": lambda: ears.transcript()}[reply]()
        done("words of the user")
        listening.finish(said or (None if reply in ("head", "chosen") else item["user_text"]))
        done("heard")
        parts = self._reply(session, me, reply, item)
        first, said, count = next(parts), [], len(session.turns)
        done("reply")

        def chunks():
            for part, mood in itertools.chain([first], parts):
                said.append(part)
                yield from session.speak(me, part, mood)
        made = timed_chunks(chunks(), end)
        return made | {"text": " ".join(said), "frames": sum(t.num_frames for t in session.turns[count:]), "stages": stages | {"first sound": made["first_ms"]},
                       "heard_real_time_factor": clock.busy / max(1e-9, len(item["user"]) / 24000)}

    def _rehearse(self, clock: "Clock", listening, me: int) -> None:
        """Go on with the transcript and the reply so far, in time that is left until the next block comes."""
        while clock.left() > STEP_SECONDS:
            if next(self._rehearsal, 0) == 0:
                self._rehearsal = listening.rehearse(me)
                if next(self._rehearsal, 0) == 0:
                    return

    def _listen(self, session, speaker: int):
        if has("listening"):
            from listening import Listener
            return Listener(session, speaker)
        return AtOnce(session, speaker)

    def _open_ears(self):
        if self._ears is None:
            from classic_pipeline import Ears, PipelineConfig
            self._ears = Ears(PipelineConfig(threads=self.spec["threads"]))
        self._ears.reset()
        return self._ears

    def _reply(self, session, me: int, reply: str, item: dict):
        """The reply's parts (text, mood or None) as they are known."""
        if reply == "head":
            from generation import sentences
            spoken = ((sentence, None) for sentence, _ in sentences(session.reply_stream(me)) if re.search("[A-Za-z0-9]", sentence))
            return itertools.chain([first], spoken) if (first := next(spoken, None)) else iter([(NOTHING_WRITTEN, None)])
        if reply == "given":
            return iter([(item["text"], None)])
        if self._retriever is None:
            self._retriever = self.tools["responder"]("retrieval")
        history = [(str(t.speaker), t.text) for t in session.turns]
        return iter([self._retriever.reply(session, me, history, str(me))])

    # ---- a long conversation

    def paired(self, item: dict) -> dict:
        """One turn in an old conversation and the same turn in a young one, in an order that alternates; both are first brought to their age.

        Cost of a turn: from the text being known until the window is ready for the next turn.
        """
        if not hasattr(self, "old"):
            self.old, self.young = self.session(item), self.session(item)
            for session, age in ((self.old, item["old"]), (self.young, item["young"])):
                for n in range(age):
                    self._turn(session, item["texts"][n % len(item["texts"])], n)
        out = {}
        for which in (("old", "young") if item["seed"] % 2 else ("young", "old")):
            session = getattr(self, which)
            out[which] = self._turn(session, item["text"], len(session.turns)) | {"turn": len(session.turns)}
        return out

    def _turn(self, session, text: str, number: int) -> dict:
        start = time.perf_counter()
        made = timed_chunks(session.speak(number % 2, text), start)
        session.prepare((number + 1) % 2)
        return {"first_ms": made["first_ms"], "cost_ms": 1000 * (time.perf_counter() - start), "frames": session.turns[-1].num_frames, "positions": session._state.length}


class AtOnce:
    """Listening without a stream, for a checkout without listening.py: the turn is encoded and read when it is over."""

    def __init__(self, session, speaker: int):
        self.session, self.speaker, self.blocks = session, speaker, []

    def feed(self, block) -> None:
        self.blocks.append(block)

    def finish(self, text: str | None):
        import numpy as np
        return self.session.add_turn(self.speaker, text, audio=np.concatenate(self.blocks))


class Clock:
    """When the blocks of the user's sound come, and what was done for them in time. What takes longer than a block delays the next ones, the end of the turn too."""

    def __init__(self):
        self.late = self.busy = 0.0                              # seconds behind the newest block; seconds of work
        self.start = None

    def arrive(self) -> float:
        """perf_counter() when the next block came: earlier than now by what is still to be caught up."""
        self.start = time.perf_counter()
        return self.start - self.late

    def left(self) -> float:
        """Seconds until the block after this one."""
        return BLOCK_SECONDS - self.late - (time.perf_counter() - self.start)

    def work(self) -> None:
        """All is done for this block."""
        spent = time.perf_counter() - self.start
        self.busy, self.late = self.busy + spent, max(0.0, self.late + spent - BLOCK_SECONDS)


# ----------------------------------------------------------------------------- transformers' CSM

class Csm:
    """Our model without additions, or transformers' CSM, with the same weights: greedy, a fixed number of frames."""

    def __init__(self, spec: dict):
        import torch
        self.spec, self.codec = spec, load_codec(spec)
        backbone, depth = RACE_GEOMETRIES[spec["size"]]
        cfg = config.ModelConfig("race", backbone, depth, num_codebooks=min(32, self.codec.cfg.num_codebooks), audio_vocab=self.codec.cfg.codebook_size + 1, **config.OFF)
        import csm_weights
        own = random_model(csm_weights.config_from_transformers(spec["tools"]["official"](cfg)), spec["seed"])
        with torch.no_grad():
            for head in (own.codebook0_head.weight, own.audio_head):
                head.mul_(LOUD / 0.02 / head.shape[1] ** 0.5)
        self.bytes, self.parameters, self.note = frame_bytes(own, self.codec, int("int8" in spec.get("variant", ""))), sum(p.numel() for p in own.parameters()), ""
        if spec["side"] == "theirs":
            self.model = spec["tools"]["their_model"](own).eval()
        else:
            self.model, self.note = own, vary(own, spec.get("variant", ""))

    def about(self) -> dict:
        return {"parameters": self.parameters, "bytes": self.bytes, "note": self.note, "weights": "random"}

    def speak(self, item: dict) -> dict:
        """-> times with and without the codec, and the codes as lists."""
        ids = [256, *item["text"].lower().encode("ascii", "ignore")][:120] + [258]
        sound = Decoding(self.codec)
        start, busy = time.perf_counter(), time.process_time()
        made = (self._theirs if self.spec["side"] == "theirs" else self._ours)(ids, sound)
        total, cpu = 1000 * (time.perf_counter() - start), 1000 * (time.process_time() - busy)
        frames = len(made)
        return {"first_ms": 1000 * (sound.first - start), "total_ms": total, "cpu_ms": cpu, "frames": frames,
                "ms_per_frame": (total - 1000 * sound.seconds) / frames, "cpu_ms_per_frame": (cpu - 1000 * sound.busy) / frames, "codes": made, "text": item["text"], "audio": sound.audio()}

    def _ours(self, ids: list[int], sound: "Decoding") -> list[list[int]]:
        """generation.stream_turn, the path of every command."""
        import generation
        letters = SimpleNamespace(speak_prefix=lambda speaker, mood: [], encode=lambda text: ids[:-1], eot=ids[-1])
        turn = generation.Turn(0, "x")
        greedy = config.SamplingConfig(temperature=0, depth_temperature=0, max_seconds=(self.spec["frames"] + 0.5) / self.model.cfg.frame_rate)
        state = self.model.new_state(1, len(ids) + self.spec["frames"] + 2)
        for _ in generation.stream_turn(self.model, sound, letters, state, turn, 0, greedy):
            pass
        return turn.codes.T.tolist()

    def _theirs(self, ids: list[int], sound: "Decoding") -> list[list[int]]:
        import torch

        class Streamer:
            prompt = True                                                      # is what comes first

            def put(self, value) -> None:
                if not self.prompt:
                    sound.decode_stream(value.view(1, -1, 1), sound.state)     # (1, K): a frame
                self.prompt = False

            def end(self) -> None:
                pass
        with torch.inference_mode():
            out = self.model.generate(input_ids=torch.tensor([ids]), do_sample=False, depth_decoder_do_sample=False, max_new_tokens=self.spec["frames"], streamer=Streamer())
        return out[0].tolist()


class Decoding:
    """The codec as both sides use it: counts its own time; a code beyond its codebooks counts as the last one."""

    def __init__(self, codec):
        self.codec, self.seconds, self.busy, self.first, self.chunks, self.state = codec, 0.0, 0.0, None, [], None
        self.cfg = SimpleNamespace(**vars(codec.cfg) | {"codebook_size": codec.cfg.codebook_size + 1})

    def decode_stream(self, codes, state=None, semantic=None):
        start, busy = time.perf_counter(), time.process_time()
        audio, self.state = self.codec.decode_stream(codes.clamp(max=self.codec.cfg.codebook_size - 1), state, self.codec.cfg.num_semantic)
        self.chunks.append(audio)
        self.first = self.first or time.perf_counter()
        self.seconds, self.busy = self.seconds + time.perf_counter() - start, self.busy + time.process_time() - busy
        return audio, self.state

    def audio(self):
        import torch
        return torch.cat(self.chunks, -1).reshape(-1).numpy() if self.chunks else torch.zeros(0).numpy()


# ----------------------------------------------------------------------------- the other orders, the parts, the pipeline

class OtherOrder:
    """One order of experiments/token_orders.py, random weights, as many frames as the text really took."""

    def __init__(self, spec: dict):
        import runpy
        self.it, self.spec, self.codec = SimpleNamespace(**runpy.run_path(str(ROOT / "experiments" / "token_orders.py"))), spec, load_codec(spec)
        self.order = self.it.build(spec["order"], self.it.order_config(spec["size"], self.codec), spec["seed"])

    def about(self) -> dict:
        sound, read = decoder_bytes(self.codec) / 1e6, self.it.moved_bytes(self.order, FRAMES) / 1e6
        rows = sum(m.weight.nbytes for m in self.order.modules() if type(m).__name__ == "Embedding")
        once = min(read, (matrix_bytes(self.order) - rows) / 1e6)
        return {"parameters": sum(p.numel() for p in self.order.parameters()), "note": "", "weights": "random",
                "bytes": {"once": once + sound, "every_read": read + sound, "codec": sound}}

    def speak(self, item: dict) -> dict:
        import torch
        draw = self.it.Draw(0.7, 50, torch.Generator().manual_seed(item["seed"]))
        made = self.it.speak(self.order, self.codec, item["text"], draw, item["frames"], item["frames"])
        return {"first_ms": made["first_audio_ms"], "total_ms": made["total_ms"], "cpu_ms": made["cpu_ms"], "frames": made["frames"], "audio": made["audio"], "text": item["text"]}


class Mouth:
    """A text-to-speech alone, sentence by sentence."""

    def __init__(self, spec: dict):
        import classic_pipeline
        self.parts, self.mouth = classic_pipeline, classic_pipeline.MOUTHS[spec["tts"]](spec["threads"])

    def about(self) -> dict:
        return {"parameters": None, "bytes": None, "note": "", "weights": "trained"}

    def speak(self, item: dict) -> dict:
        start = time.perf_counter()
        return timed_chunks(map(self.mouth, self.parts.clauses(iter([item["text"]]))), start) | {"text": item["text"], "frames": None}


class Classic:
    """The pipeline."""

    def __init__(self, spec: dict):
        from classic_pipeline import Pipeline, PipelineConfig
        self.pipeline = Pipeline(PipelineConfig(tts=spec["tts"], threads=spec["threads"]))

    def about(self) -> dict:
        return {"parameters": None, "bytes": None, "note": "WebRTC VAD, Whisper tiny.en int8, SmolLM2-135M-Instruct Q4", "weights": "trained"}

    def answer(self, item: dict) -> dict:
        heard, pieces = 0.0, blocks(item["user"])
        for n, block in enumerate(pieces):
            start = time.perf_counter()
            self.pipeline.feed(block, n == len(pieces) - 1)
            heard += time.perf_counter() - start if n < len(pieces) - 1 else 0.0
        made = timed_chunks(self.pipeline.answer(), start)
        return made | {"text": self.pipeline.text, "frames": None, "stages": dict(self.pipeline.stages), "user_heard": self.pipeline.heard,
                       "heard_real_time_factor": heard / max(1e-9, len(item["user"]) / 24000)}


KINDS = {"ours": Ours, "csm": Csm, "order": OtherOrder, "mouth": Mouth, "classic": Classic}
