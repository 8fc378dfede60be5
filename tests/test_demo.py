"""demo.py with tiny random weights: every bad input, the JSON in and out, the typed conversation."""
import builtins
import json
import sys

import numpy as np
import pytest
import soundfile
import torch

import audio_io
import demo

ROW = {"speaker", "text", "audio", "duration_s", "first_audio_ms", "total_ms", "ended"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    import checkpoint
    from architecture import CSM
    from config import CodecConfig, model_preset
    from rvq_tokenizer import Codec
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    codec = Codec(CodecConfig(num_codebooks=8, num_semantic=4, codebook_size=64, width=16, latent=16, encoder_layers=1,
                              latent_layers=1, decoder_layers=3, num_mels=20, num_low_bins=16, num_bands=20))
    model = CSM(model_preset("test"))
    model.init_weights()
    checkpoint.save_codec(codec, folder / "codec")
    checkpoint.save_pretrained(model, folder / "model", codec_fingerprint=codec.fingerprint)
    return ["--checkpoint", str(folder / "model"), "--codec", str(folder / "codec"), "--device", "cpu", "--max_seconds", "0.4"]


def write(tmp_path, value, name="in.json"):
    path = tmp_path / name
    path.write_bytes(value if isinstance(value, bytes) else (value if isinstance(value, str) else json.dumps(value, indent=1)).encode())
    return path


def talk(*turns, id="c1"):
    return {"conversations": [{"id": id, "turns": list(turns)}]}


def batch(weights, path, output, *more):
    return demo.main(["--mode", "batch", "--input", str(path), "--output", str(output), *weights, *more])


def tone(tmp_path, name="voice.wav", rate=44100, channels=2, seconds=1.0):
    t = np.arange(int(rate * seconds)) / rate
    soundfile.write(tmp_path / name, np.stack([0.3 * np.sin(700 * t)] * channels, 1), rate)
    return name


# ----------------------------------------------------------------------------- bad input

HELLO = {"speaker": "user", "text": "Hello."}
BAD = {
    "empty": ("", "empty", "--"),
    "malformed": ('{"conversations": [\n {"id": "c1" "turns": []}]}', "line 2, column 14", "--"),
    "cut off": ('{"conversations": [', "line 1", "--"),
    "not utf-8": (b'{"conversations": [\n{"id": "caf\xe9"}]}', "line 2", "UTF-8"),
    "a list": ([1], "conversations", "--"),
    "no conversations": ({"conversations": []}, "line 2, conversations", "at least one"),
    "conversations of a wrong type": ({"conversations": "hello"}, "must be a list", "str"),
    "no turns": ({"conversations": [{"id": "c1"}]}, "conversations[0]", "turns"),
    "empty turns": (talk(), "conversations[0].turns", "at least one"),
    "a turn that is no object": (talk("hello"), "conversations[0].turns[0]", "object"),
    "no speaker": (talk({"text": "Hello."}), "turns[0]", "speaker"),
    "empty speaker": (talk({"speaker": " ", "text": "Hello."}), "turns[0].speaker", "empty"),
    "speaker of a wrong type": (talk({"speaker": 3, "text": "Hello."}), "turns[0].speaker", "int"),
    "text of a wrong type": (talk(HELLO, {"speaker": "b", "text": ["Hi"]}), "line 12, conversations[0].turns[1].text", "list"),
    "empty text": (talk(HELLO, {"speaker": "b", "text": "  "}), "turns[1].text", "empty"),
    "only emoji": (talk(HELLO, {"speaker": "b", "text": "\U0001F600 \U0001F44D"}), "turns[1].text", "speakable"),
    "very long text": (talk({"speaker": "b", "text": "word " * 1001}), "turns[0].text", "5005 characters"),
    "unknown mood": (talk({"speaker": "b", "text": "Hi", "mood": "grumpy"}), "turns[0].mood", "neutral"),
    "nine speakers": (talk(*({"speaker": f"s{i}", "text": "Hi"} for i in range(9))), "turns[8].speaker", "at most 8"),
    "missing audio": (talk({"speaker": "b", "text": "Hi", "audio": "nowhere.wav"}), "turns[0].audio", "nowhere.wav"),
    "same id twice": ({"conversations": [{"id": "a b", "turns": [HELLO]}, {"id": "A/b", "turns": [HELLO]}]}, "conversations[1]", "id"),
    "id without letters": (talk(HELLO, id="///"), "conversations[0].id", "letter"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, weights, tmp_path, capsys):
    content, where, words = BAD[case]
    output = tmp_path / "out"
    output.mkdir()
    (output / "results.json").write_text("precious")
    assert batch(weights, write(tmp_path, content), output) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and where in error and (words == "--" or words in error), error
    assert [p.name for p in output.iterdir()] == ["results.json"] and (output / "results.json").read_text() == "precious"


def test_bad_files(weights, tmp_path, capsys):
    write(tmp_path, "this is not sound", "fake.wav")
    tone(tmp_path, "short.wav", seconds=0.1)
    soundfile.write(tmp_path / "silent.wav", np.zeros(24000), 24000)
    for name, words in (("fake.wav", "not a readable audio file"), ("short.wav", "at least 0.5 s"), ("silent.wav", "silent")):
        assert batch(weights, write(tmp_path, talk({"speaker": "a", "text": "Hi", "audio": name})), tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert "turns[0].audio" in error and words in error and error.count("\n") == 1
        assert demo.main(["--mode", "test", "--output", str(tmp_path / "out"), *weights, "--voice", str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_flags(weights, tmp_path, capsys):
    good = write(tmp_path, talk(HELLO))
    cases = [(["--mode", "batch"], "--input"), (["--mode", "batch", "--input", str(tmp_path / "none.json")], "none.json"),
             (["--mode", "test", "--temperature", "-1"], "--temperature"), (["--mode", "test", "--top_k", "0"], "--top_k"),
             (["--mode", "test", "--num_codebooks", "99"], "--num_codebooks"), (["--mode", "test", "--responder", "command"], "--responder_command"),
             (["--mode", "test", "--device", "abacus"], "--device"), (["--mode", "batch", "--input", str(good), "--output", str(good)], "--output")]
    for flags, words in cases:
        assert demo.main([*weights, *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and words in error, error
    with pytest.raises(SystemExit) as stop:
        demo.main(["--mode", "test", "--temprature", "1"])
    assert stop.value.code == 2 and "--temperature" in capsys.readouterr().err


def test_bad_weights(weights, tmp_path, capsys):
    (tmp_path / "cut.pt").write_bytes(b"PK not really")
    for flag, value in (("--checkpoint", tmp_path / "cut.pt"), ("--checkpoint", tmp_path / "none"), ("--codec", tmp_path / "none")):
        assert demo.main(["--mode", "test", "--output", str(tmp_path / "out"), *weights, flag, str(value)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and value.name in error
    assert not (tmp_path / "out").exists()


def test_results_survive_a_full_disk(weights, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    output.mkdir()
    for name in ("results.json", "c1_turn_01.wav", "c1.wav"):
        (output / name).write_text("precious")
    real = audio_io.write_audio

    def full(path, *more):
        if path.name == "c1.wav":
            raise OSError(28, "No space left on device", "c1.wav")
        real(path, *more)
    monkeypatch.setattr("audio_io.write_audio", full)
    assert batch(weights, write(tmp_path, talk(HELLO)), output) == 2
    assert "disk is full" in capsys.readouterr().err
    assert {p.name: p.read_text() for p in output.iterdir()} == dict.fromkeys(("results.json", "c1_turn_01.wav", "c1.wav"), "precious")


# ----------------------------------------------------------------------------- batch

def test_batch_json_and_files(weights, tmp_path, capsys):
    from watermark import is_tagged
    voice = tone(tmp_path)                                                        # stereo, 44.1 kHz: converted
    turns = [HELLO, {"speaker": "zoë", "mood": "happy", "text": "Hi \U0001F600, it's 3 o'clock!", "audio": voice}, {"speaker": "user"}]
    source = {"conversations": [{"id": "first one", "turns": turns, "note": "x"}, {"turns": [HELLO]}]}
    assert batch(weights, write(tmp_path, source), tmp_path / "out", "--seed", "7") == 0
    printed = capsys.readouterr()
    assert "conversations[0].note: unknown field" in printed.err and printed.out.count("first sound") == 4 and "retrieval" in printed.out
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(result) == {"conversations", "model", "device", "seed"} and (result["device"], result["seed"]) == ("cpu", 7)
    assert [c["id"] for c in result["conversations"]] == ["first one", "c2"]
    files = {"results.json"}
    for conversation in result["conversations"]:
        assert set(conversation) == {"id", "audio", "turns"}
        total = 0.0
        for turn in conversation["turns"]:
            assert set(turn) == ROW and turn["text"] and isinstance(turn["ended"], bool)
            assert 0 < turn["first_audio_ms"] <= turn["total_ms"]
            info = soundfile.info(tmp_path / "out" / turn["audio"])
            assert is_tagged(tmp_path / "out" / turn["audio"])                    # says in its metadata that a machine made it
            assert (info.samplerate, info.channels) == (24000, 1) and info.duration == pytest.approx(turn["duration_s"], abs=1e-3)
            total += turn["duration_s"]
            files.add(turn["audio"])
        gaps = demo.TURN_GAP * (len(conversation["turns"]) - 1)
        assert soundfile.info(tmp_path / "out" / conversation["audio"]).duration == pytest.approx(total + gaps, abs=1e-3)
        files.add(conversation["audio"])
    assert {p.name for p in (tmp_path / "out").iterdir()} == files
    assert result["conversations"][0]["turns"][1]["text"] == turns[1]["text"]


def test_same_seed_same_sound(weights, tmp_path):
    path = write(tmp_path, talk(HELLO, {"speaker": "b"}))
    sounds = []
    for name, seed in (("x", "1"), ("y", "1"), ("z", "2")):
        assert batch(weights, path, tmp_path / name, "--seed", seed, "--temperature", "1.5") == 0
        sounds.append((tmp_path / name / "c1.wav").read_bytes())
    assert sounds[0] == sounds[1] != sounds[2]


def test_long_text_is_spoken_in_pieces(weights, tmp_path, monkeypatch):
    import generation
    said, speak = [], generation.Session.speak
    monkeypatch.setattr(generation.Session, "speak", lambda self, speaker, text, mood: said.append(text) or speak(self, speaker, text, mood))
    text = "This sentence is one of many, and it goes on for a while. " * 12
    assert batch(weights, write(tmp_path, talk({"speaker": "a", "text": text})), tmp_path / "out") == 0
    turn = json.loads((tmp_path / "out" / "results.json").read_text())["conversations"][0]["turns"][0]
    assert len(said) == 3 and max(map(len, said)) <= demo.PIECE and " ".join(said) == text.strip()
    assert turn["duration_s"] > 0.4 and turn["text"] == text


def test_test_mode(weights, tmp_path, capsys):
    assert demo.main(["--mode", "test", "--output", str(tmp_path), *weights, "--max_seconds", "0.16"]) == 0
    result = json.loads((tmp_path / "results.json").read_text())
    assert [c["id"] for c in result["conversations"]] == ["greeting", "question", "sad", "exciting", "conversation"]
    talk = result["conversations"][-1]["turns"]
    assert len(talk) >= 6 and len({turn["speaker"] for turn in talk}) == 2
    assert capsys.readouterr().out.count("first sound") == 4 + len(talk)


@pytest.mark.parametrize("responder", ["model", "command"])
def test_responders(responder, weights, tmp_path):
    script = write(tmp_path, "import sys\nprint('You said', sys.stdin.read().split(':')[1].split()[0])", "bot.py")
    more = ["--responder_command", f"{sys.executable} {script}"] if responder == "command" else []
    assert batch(weights, write(tmp_path, talk(HELLO, {"speaker": "b"})), tmp_path / "out", "--responder", responder, *more) == 0
    text = json.loads((tmp_path / "out" / "results.json").read_text())["conversations"][0]["turns"][1]["text"]
    assert text == "You said Hello." if responder == "command" else any(c.isalpha() for c in text)


def test_a_failing_command_is_one_line(weights, tmp_path, capsys):
    script = write(tmp_path, "raise SystemExit('no idea')", "bot.py")
    assert batch(weights, write(tmp_path, talk({"speaker": "b"})), tmp_path / "out", "--responder", "command",
                 "--responder_command", f"{sys.executable} {script}") == 2
    assert "no idea" in capsys.readouterr().err and not (tmp_path / "out" / "results.json").exists()


def test_the_sample_input_is_valid():
    conversations, warnings = demo.read_conversations(demo.ROOT / "examples" / "conversations.json")
    assert len(conversations) >= 2 and not warnings and any(turn.text is None for c in conversations for turn in c.turns)


def test_shipped_voices(tmp_path):
    soundfile.write(tmp_path / "a.flac", 0.1 * np.sin(np.arange(24000) / 20), 24000)
    write(tmp_path, {"text": "a voice", "consumed": [1, 2]}, "a.json")
    assert demo.shipped_voices(tmp_path / "none") == []
    voice, = demo.shipped_voices(tmp_path)
    assert voice["audio"].shape == (24000,) and voice["text"] == "a voice" and voice["consumed"] == [1, 2]


# ----------------------------------------------------------------------------- interactive

def chat(weights, tmp_path, monkeypatch, lines, *more):
    def typed(prompt=""):
        if not lines:
            raise EOFError
        line = lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line
    monkeypatch.setattr(builtins, "input", typed)
    monkeypatch.setattr("audio_io.can_play", lambda: False)
    return demo.main(["--output", str(tmp_path / "out"), *weights, *more])


def test_interactive(weights, tmp_path, monkeypatch, capsys):
    voice = tmp_path / tone(tmp_path)
    lines = ["Hello there", "", "\U0001F600", "/help", "/voice", "/voice nothing.wav", f"/voice {voice}", "How are you?", "/nonsense", "/save", "/reset", "/save",
             UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), "Again", "/quit", "never reached"]
    assert chat(weights, tmp_path, monkeypatch, lines) == 0 and lines == ["never reached"]
    printed = capsys.readouterr()
    assert printed.out.count("model: ") == 3 and "turn_03.wav" in printed.out and "no sound device" in printed.out
    for words in ("speakable", "/voice FILE", "nothing.wav", "/nonsense", "nothing was said yet", "UTF-8"):
        assert words in printed.err
    assert printed.err.count("\n") == 7 and printed.err.count("without its words") == 1      # a tone, taken as a voice twice
    saved = json.loads((tmp_path / "out" / "saved.json").read_text())
    assert [turn["speaker"] for turn in saved["conversation"]] == ["you", "model"] * 2 and len(saved["answers"]) == 2
    assert all((tmp_path / "out" / name).is_file() for name in ("turn_01.wav", "turn_02.wav", "turn_03.wav", "saved.wav", "saved_turn_02.wav"))


@pytest.mark.parametrize("end", [EOFError(), KeyboardInterrupt()])
def test_interactive_leaves_quietly(end, weights, tmp_path, monkeypatch, capsys):
    assert chat(weights, tmp_path, monkeypatch, [end]) == 0
    assert capsys.readouterr().err == "" and not (tmp_path / "out").exists()
