"""The ear: letters of codes, alone and in a batch; its trainer leaves the rest of the model alone and resumes exactly."""
import dataclasses
import json
import os
import signal

import pytest
import torch
from safetensors.torch import save_file

import checkpoint
import config
import generation
import train_ear
from architecture import CSM
from ear import Ear
from generation import Session
from listening import Listener
from rvq_tokenizer import Codec
from text_tokenizer import ByteTokenizer
from word_model import WordModel

SMALL = config.EarConfig(enabled=True, width=32, heads=2, kernel=5, coarse_layers=1, layers=2, max_frames=64)
FINGERPRINT = "c" * 16
WORDS = ["yes.", "no.", "good morning.", "tea, please.", "why?", "all of them.", "see you soon.", "it's late."]


def model_with_ear(seed=0, ear=SMALL):
    model = CSM(config.model_preset("test", ear=ear))
    model.init_weights(torch.Generator().manual_seed(seed))
    model.codec_fingerprint = FINGERPRINT
    return model.eval()


def sound_of_letters(text: str) -> tuple[torch.Tensor, list[int]]:
    """Codes (32, T) that say which two letters belong to a frame, and the bytes said by the end of each frame."""
    g = torch.Generator().manual_seed(3)
    table = torch.randint(0, 64, (32, 256), generator=g)
    frames = [text[i:i + 2] for i in range(0, len(text), 2)]
    codes = torch.stack([torch.cat([table[:16, ord(f[0])], table[16:, ord(f[-1])]]) for f in frames], 1)
    # the order of semantic and acoustic codebooks: both letters must be in the eight that this model reads
    codes[1::2] = torch.stack([table[1::2, ord(f[-1])] for f in frames], 1)
    codes[::2] = torch.stack([table[::2, ord(f[0])] for f in frames], 1)
    return codes, [min(2 * (i + 1), len(text)) for i in range(len(frames))]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Shards as dataset_pipeline.py writes them; the codes spell the text."""
    folder = tmp_path_factory.mktemp("ear")
    index = {"format": 1, "codec_fingerprint": FINGERPRINT, "tokenizer": "bytes", "frame_rate": 12.5, "num_codebooks": 32, "num_semantic": 10, "splits": {}}
    (folder / "tokens").mkdir()
    for split in ("train", "validation", "test"):
        records, codes, consumed = [], [], []
        for n, text in enumerate(WORDS * (4 if split == "train" else 1)):
            sound, said = sound_of_letters(text)
            codes.append(sound.to(torch.int16)), consumed.append(torch.tensor(said, dtype=torch.int16))
            records.append({"id": f"{split}{n}", "conversation": f"{split}{n // 4}", "text": text, "frames": sound.shape[1], "phones": 1, "speaker": 0, "mood": None, "character": "x"})
        tensors = {"codes": torch.cat(codes, 1), "consumed": torch.cat(consumed), "phones": torch.full((len(records),), 5, dtype=torch.uint8)}
        save_file(tensors, folder / "tokens" / f"{split}-00000.safetensors", {"format": "1", "codec_fingerprint": FINGERPRINT, "content": "x", "turns": json.dumps(records)})
        index["splits"][split] = {"shards": [f"{split}-00000.safetensors"]}
    (folder / "tokens/index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A small model without an ear, as a folder."""
    folder = tmp_path_factory.mktemp("model")
    checkpoint.save_pretrained(model_with_ear(ear=config.EarConfig()), folder, int8=False, codec_fingerprint=FINGERPRINT, step=7)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(train_ear, "EAR", SMALL)


def settings(data, shipped, output, **changes):
    return train_ear.EarTraining(**{"data": str(data), "checkpoint": str(shipped), "output": str(output), "max_steps": 6, "batch_frames": 200, "warmup_steps": 2, "eval_every": 100,
                                    "eval_turns": 8, "precision": "fp32", "device": "cpu", "wandb": "disabled", "ema": 0.9} | changes)


# ----------------------------------------------------------------------------- letters

def ear():
    return model_with_ear().ear


def test_letters_there_and_back():
    e = ear()
    assert "".join(e.letters[c - 1] for c in e.spell("  It's  LATE;  no? 7")) == "it's late no?"
    assert e.read([0, 8, 8, 0, 9, 0, 0]) == "hi" and e.read([3, 0, 3, 3]) == "cc" and e.read([0, 0]) == "" == e.read([])


@pytest.mark.parametrize("text", ["all of them.", "bookkeeper", "a", "hello, you?"])
def test_the_path_of_letters_reads_back_and_keeps_their_frames(text):
    e = ear()
    _, said = sound_of_letters(text)
    at = train_ear.frames_of_letters(text, said, e)
    assert at == [i // 2 for i in range(len(text))]
    steps = (len(said) + 3) * e.upsample
    path = train_ear.path_of(e.spell(text), at, steps, e.upsample)
    assert len(path) == steps and e.read(path) == text
    found = [i // e.upsample for i, letter in enumerate(path) if letter]
    assert all(0 <= a - b <= 1 for a, b in zip(found, at)), "a letter stands in its frame, or right after it where another is in its way"


def test_letters_that_cannot_be_said_in_the_time_make_no_path():
    assert train_ear.path_of([1, 1, 1, 1], [0, 0, 0, 0], 3, 3) is None


@torch.no_grad()
def test_a_turn_is_heard_alone_as_in_a_batch():
    e, g = ear(), torch.Generator().manual_seed(1)
    long, short = torch.randint(1, 65, (1, 8, 13), generator=g), torch.randint(1, 65, (1, 8, 5), generator=g)
    both = torch.zeros(2, 8, 13, dtype=torch.long)
    both[0], both[1, :, :5] = long[0], short[0]
    logits = e(both, torch.tensor([13, 5]))
    torch.testing.assert_close(logits[:1], e(long, torch.tensor([13])), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits[1:, :5 * e.upsample], e(short, torch.tensor([5])), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_turn_beyond_its_reach_is_read_in_parts_and_refused_whole():
    e = ear()
    codes = torch.randint(1, 65, (8, 70), generator=torch.Generator().manual_seed(1))
    assert e.transcribe(codes) == " ".join(filter(None, (e.transcribe(codes[:, :64]), e.transcribe(codes[:, 64:]))))
    with pytest.raises(ValueError, match="max_frames"):
        e(codes[None], torch.tensor([70]))
    assert e.transcribe(codes[:, :0]) == ""


def test_codes_that_are_not_heard_count_nothing():
    e, g = ear(), torch.Generator().manual_seed(1)
    codes = torch.randint(1, 65, (1, 8, 6), generator=g)
    keep = torch.ones(1, 8, 6, dtype=torch.bool)
    keep[0, 3] = False
    other = codes.clone()
    other[0, 3] = 1
    assert torch.equal(e.embed(codes, keep), e.embed(other, keep)) and not torch.equal(e.embed(codes), e.embed(other))
    how = train_ear.EarTraining(drop_codes=0.5, drop_frames=0.2)
    kept = train_ear.heard(torch.zeros(50, 8, 100), how, torch.Generator().manual_seed(0))
    assert 0.35 < kept.float().mean() < 0.45 and (~kept).all(1).float().mean() > 0.12
    assert train_ear.heard(codes, train_ear.EarTraining(drop_codes=0.0, drop_frames=0.0), g).all()


# ----------------------------------------------------------------------------- beside the model

@torch.no_grad()
def test_the_model_is_the_same_with_an_ear():
    with_one, without = model_with_ear(), CSM(config.model_preset("test"))
    without.load_state_dict({k: v for k, v in with_one.state_dict().items() if not k.startswith("ear.")})
    frames, mask = torch.randint(1, 60, (1, 7, 9)), torch.ones(1, 7, 9, dtype=torch.bool)
    from architecture import FrameBatch
    batch = FrameBatch(frames, mask, torch.zeros(1, 7, dtype=torch.long), torch.full((1, 7), -1), torch.full((1, 7), -1))
    assert torch.equal(with_one(batch), without.eval()(batch))
    assert not any(p.requires_grad for p in with_one.ear.parameters()), "train.py leaves it as it is"


def test_parameters_are_counted():
    cfg = config.model_preset("test", ear=SMALL)
    assert config.count_additions(cfg)["ear"] == sum(p.numel() for p in Ear(cfg).parameters())
    assert "ear" not in config.count_additions(config.model_preset("nano"))


@pytest.mark.parametrize("wrong,flag", [({"width": 30}, "--ear.width"), ({"kernel": 4}, "--ear.kernel"), ({"layers": 0}, "--ear.layers"), ({"letters": "aa"}, "--ear.letters")])
def test_settings_that_cannot_be_are_named(wrong, flag):
    with pytest.raises(ValueError, match=flag):
        dataclasses.replace(SMALL, **wrong)


# ----------------------------------------------------------------------------- training

def test_it_learns_to_read_codes_and_the_rest_stays(data, shipped, tmp_path, monkeypatch):
    train_ear.main(["--data", str(data), "--checkpoint", str(shipped), "--output", str(tmp_path / "out"), "--max_steps", "150", "--batch_frames", "100", "--warmup_steps", "5",
                    "--eval_every", "150", "--precision", "fp32", "--device", "cpu", "--wandb", "disabled", "--ema", "0.9", "--drop_codes", "0", "--drop_frames", "0"])
    before, after = checkpoint.load_model(shipped), checkpoint.load_model(tmp_path / "out", codec_fingerprint=FINGERPRINT)
    mine = after.state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in before.state_dict().items()) and before.ear is None
    about = json.loads((tmp_path / "out/config.json").read_text())
    assert about["ear"]["steps"] == 150 and about["ear"]["validation"]["word_error"] < 0.2 and about["step"] == 7
    session = Session(after, Codec(config.CodecConfig()).eval(), ByteTokenizer())
    columns = config.codec_columns(8, 4, 10)
    heard = [after.ear.transcribe(sound_of_letters(text)[0][columns] + 1) for text in WORDS]
    assert sum(a == b for a, b in zip(heard, WORDS)) >= 6, heard
    listener = Listener(session)
    listener._state = session.model.new_state(1)
    listener.codes = [sound_of_letters("good morning.")[0][columns]]
    monkeypatch.setattr(generation, "written_words", lambda: WordModel(["Good mourning."]))
    whole = session.transcribe(listener.codes[0])
    assert whole == listener.partial() and whole.startswith("good "), "for a turn that goes on as well"
    monkeypatch.setattr(generation, "search", lambda rows, letters, words: f"{'abc'[len(rows) != 21]} {letters == SMALL.letters} {words.single['mourning'] > 0}".lower())
    assert session.transcribe(listener.codes[0]) == "a true true", "letters and words together"



@pytest.mark.parametrize("read", ["", "?", "' ."])
def test_sound_without_words_is_no_words(monkeypatch, read):
    session = Session(model_with_ear(), Codec(config.CodecConfig()).eval(), ByteTokenizer())
    monkeypatch.setattr(generation, "written_words", lambda: WordModel(["Hello."]))
    monkeypatch.setattr(generation, "search", lambda *_: read)
    assert session.transcribe(torch.zeros(8, 5, dtype=torch.long)) == ""


def test_resume_is_exact(data, shipped, tmp_path):
    whole = train_ear.train(settings(data, shipped, tmp_path / "a"))
    half, original = settings(data, shipped, tmp_path / "b"), train_ear.Run.train_step

    def stop(run):
        values = original(run)
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return values
    train_ear.Run.train_step = stop
    try:
        stopped = train_ear.train(half)
    finally:
        train_ear.Run.train_step = original
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert stopped.interrupted and stopped.step == 3 and not (tmp_path / "b/model.safetensors").exists(), "it is a model when it is done"
    torch.manual_seed(5)
    resumed = train_ear.train(half, checkpoint.load_training(tmp_path / "b/last.pt", "ear"))
    assert resumed.step == 6
    for (name, a), b in zip(whole.ear.state_dict().items(), resumed.ear.state_dict().values()):
        assert torch.equal(a, b), name
    assert all(torch.equal(a, b) for a, b in zip(whole.average.values, resumed.average.values))


def test_every_turn_comes_once_an_epoch(data, shipped):
    lengths = [3, 9, 4, 4, 20, 7, 1, 5]
    for epoch in (0, 1):
        batches = train_ear.plan_epoch(lengths, 20, 0, epoch)
        assert sorted(i for batch in batches for i in batch) == list(range(8))
        assert all(len(batch) * max(lengths[i] for i in batch) <= 20 for batch in batches)
    assert train_ear.plan_epoch(lengths, 20, 0, 0) != train_ear.plan_epoch(lengths, 20, 0, 1)


def test_refusals_name_the_way_out(data, shipped, tmp_path, capsys):
    index = json.loads((data / "tokens/index.json").read_text())
    other = tmp_path / "other"
    (other / "tokens").mkdir(parents=True)
    (other / "tokens/index.json").write_text(json.dumps(index | {"codec_fingerprint": "d" * 16}))
    assert train_ear.main(["--data", str(other), "--checkpoint", str(shipped), "--wandb", "disabled", "--output", str(tmp_path / "x")]) == 2
    assert "codec" in capsys.readouterr().err
    assert train_ear.main(["--data", str(tmp_path / "none"), "--checkpoint", str(shipped)]) == 2
    assert "collect_data.py" in capsys.readouterr().err
    assert train_ear.main(["--drop_codes", "1"]) == 2
    assert "--drop_codes" in capsys.readouterr().err
