"""Shards, reading positions, windows and packed batches on tiny synthetic data; no codec weights, no audio models."""
import gzip
import json

import numpy as np
import pytest
import torch

import dataset_pipeline as dp
from config import model_preset
from runtime import Ranks
from text_tokenizer import BOS, EOT, FIRST_SPEAKER, LISTEN, TRANSCRIPT, ByteTokenizer

CFG = model_preset("test")


class ToyCodec(torch.nn.Module):
    """Codes are the loudness of each frame: enough to see which audio went where."""

    def __init__(self, fingerprint="a" * 16):
        super().__init__()
        from config import CodecConfig
        self.cfg, self.fingerprint, self.calls = CodecConfig(codebook_size=64), fingerprint, 0
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def encode(self, audio):
        self.calls += 1
        level = audio.reshape(len(audio), -1, self.cfg.frame_size).abs().amax(-1)           # (B, T)
        return (level * 63).round().long()[:, None].expand(-1, self.cfg.num_codebooks, -1)


def turn(frames=5, text="hi you", consumed=(0, 2, 3, 5, 6), speaker=0, mood="happy", seed=0):
    codes = torch.randint(0, 64, (CFG.num_codebooks, frames), generator=torch.Generator().manual_seed(seed)).to(torch.int16)
    return dp.Turn(codes, torch.tensor(consumed) if consumed else None, list(text.encode()), torch.tensor([3, 4], dtype=torch.uint8), text, speaker, mood, "c")


def write_corpus(folder, conversations=6, turns=5, seconds=(0.3, 1.5)):
    """Manifests and audio of noise turns, as collect_data.py would write them."""
    from audio_io import write_audio
    rng = np.random.default_rng(0)
    for split in dp.SPLITS:
        rows = []
        for c in range(conversations if split == "train" else 2):
            for t in range(turns):
                length = rng.uniform(*seconds)
                name = f"audio/{split}-{c}-{t}.wav"
                (folder / "audio").mkdir(parents=True, exist_ok=True)
                write_audio(folder / name, (rng.random(int(24000 * length)) * 0.5).astype(np.float32))
                text = "hello there, friend." if t % 2 else "yes."
                words = [[0, len(text) - 1, 0.05, length - 0.1]]
                rows.append({"id": f"{split}-{c}-{t}", "recording_id": f"{split}-{c}", "start": float(t), "duration": length, "channel": 0, "text": text,
                             "speaker": "x", "custom": {"mood": "calm", "character": "x", "turn_audio": name, "speaker_index": t % 2, "sha256": name,
                                                        "alignment": {"phones": "_jɛs_", "ends": [], "words": words}}})
        path = folder / "manifests" / split / "supervisions.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(r) + "\n" for r in rows)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = write_corpus(tmp_path_factory.mktemp("data"))
    dp.tokenise(folder, ToyCodec(), progress=False, turns_per_shard=8)
    return folder


def dataset(corpus, **options):
    return dp.ConversationDataset(corpus, CFG, batch_positions=400, seed=3, **options)


# ---- alignment

def test_consumed_bytes_by_hand():
    # "hi you": "hi" from 0.1 to 0.3 s, "you" from 0.5 to 0.8 s; frames of 0.1 s
    got = dp.consumed_bytes([[0, 2, 0.1, 0.3], [3, 6, 0.5, 0.8]], 6, 9, 0.1)
    assert got.tolist() == [0, 1, 2, 2, 3, 4, 5, 6, 6]


def test_last_frame_has_consumed_everything_even_when_the_alignment_ends_late():
    assert dp.consumed_bytes([[0, 4, 0.0, 9.0]], 5, 3, 0.1)[-1] == 5


def test_punctuation_is_consumed_right_after_the_last_word():
    assert dp.consumed_bytes([[0, 3, 0.0, 0.1]], 4, 6, 0.1).tolist() == [3, 4, 4, 4, 4, 4]


# ---- one turn

def test_speaking_turn_by_hand():
    rows = dp.turn_rows(turn(), CFG, ByteTokenizer(), speaker=2, mood=None)
    k = CFG.num_codebooks
    text = [BOS, FIRST_SPEAKER + 2, *b"hi you", EOT]
    n = len(text)
    assert rows["frames"].shape == (n + 5 + 1, k + 1)
    assert rows["frames"][:n, -1].tolist() == text and rows["frames"][:n, :-1].eq(0).all()
    assert rows["mask"][:n, -1].all() and not rows["mask"][:n, :-1].any() and rows["mask"][n:, :-1].all() and not rows["mask"][n:, -1].any()
    assert torch.equal(rows["frames"][n:-1, :-1], turn().codes[:k].long().T + CFG.code_offset)
    assert rows["frames"][-1].eq(0).all()                                       # EOS
    assert rows["text_index"].tolist() == list(range(n)) + [-1] * 6
    # EOT and frame 0: prefix of 2, nothing spoken; frame t: what was spoken by the end of frame t-1; EOS: all
    assert rows["reading"].tolist() == [-1] * (n - 1) + [2, 2, 2, 4, 5, 7, 8]
    assert rows["text_loss"].tolist() == [False] * 2 + [True] * 7 + [False] * 6
    assert rows["audio_loss"].tolist() == [False] * n + [True] * 6


def test_mood_makes_the_prefix_longer():
    rows = dp.turn_rows(turn(), CFG, ByteTokenizer(), speaker=0, mood="sad")
    assert rows["reading"].max() == 3 + 6 and rows["text_loss"].tolist()[:4] == [False, False, False, True]


def test_listening_turn_by_hand():
    rows = dp.turn_rows(turn(), CFG, ByteTokenizer(), speaker=1, listening=True)
    assert rows["frames"][:3, -1].tolist() == [BOS, FIRST_SPEAKER + 1, LISTEN]
    assert rows["frames"][9:, -1].tolist() == [TRANSCRIPT, *b"hi you", EOT]
    assert rows["text_index"].tolist() == [0, 1, 2] + [-1] * 6 + list(range(8))
    assert rows["reading"].eq(-1).all() and not rows["audio_loss"].any()
    assert rows["text_loss"].tolist() == [False] * 10 + [True] * 7


def test_unknown_alignment_has_no_reading():
    assert dp.turn_rows(turn(consumed=None), CFG, ByteTokenizer(), 0)["reading"].eq(-1).all()


def test_collate_pads_and_numbers_turns():
    windows = [dp.Window([turn(), turn(frames=2, consumed=(3, 6))], {}, [False, False], [False, True]), dp.Window([turn()], {}, [False], [False])]
    batch, history = dp.collate(windows, CFG, ByteTokenizer())
    assert batch.frames.shape == (2, 15 + 13, CFG.num_codebooks + 1) and history is None
    assert batch.turn[0].tolist() == [0] * 15 + [1] * 13 and batch.turn[1].tolist() == [0] * 15 + [-1] * 13
    assert batch.phones.tolist() == [[3, 4, 3, 4], [3, 4, 0, 0]]
    assert not batch.mask[1, 15:].any() and batch.reading[1, 15:].eq(-1).all() and not batch.audio_loss[1, 15:].any()


def test_history_comes_first_in_turn_numbers():
    windows = [dp.Window([turn()], {}, [True], [False], history=[turn(frames=2, consumed=(3, 6))] * 2), dp.Window([turn()], {}, [False], [False])]
    batch, history = dp.collate(windows, CFG, ByteTokenizer())
    assert history.turn[0].tolist() == [0] * 12 + [1] * 12 and history.turn[1].eq(-1).all()
    assert batch.turn[0, 0] == 2 and batch.turn[1, 0] == 0 and batch.phones.tolist() == [[0, 0], [3, 4]]      # heard turns have no phones


# ---- shards

def test_shards_round_trip(corpus):
    turns = dp.read_turns(corpus, "train", ByteTokenizer())
    assert [len(c) for c in turns] == [5] * 6
    first = turns[0][1]
    assert first.text == "hello there, friend." and first.codes.size(0) == 32 and first.consumed[-1] == 20 and first.speaker == 1 and first.mood == "calm"
    assert first.phones.tolist() == [dp.PHONE_ID[s] for s in "jɛs"]
    from audio_io import read_audio
    audio = read_audio(corpus / "audio/train-0-1.wav")
    assert first.codes.size(1) == -(-len(audio) // 1920)
    assert torch.equal(first.codes, dp.encode_turns(ToyCodec(), [audio])[0])


def test_several_folders_train_together(corpus, tmp_path):
    alone = dp.read_turns(corpus, "train", ByteTokenizer())
    both = dp.read_turns(f"{corpus},{corpus}", "train", ByteTokenizer())
    assert len(both) == 2 * len(alone) and all(len(a) == len(b) for a, b in zip(both, alone + alone))
    with pytest.raises(ValueError, match="no tokens in"):
        dp.read_turns(f"{corpus},{tmp_path / 'none'}", "train", ByteTokenizer())


def test_encoding_in_batches_changes_nothing():
    audios = [np.full(n, v, np.float32) for n, v in ((1920, 0.5), (5000, 1.0), (1, 0.25), (1921, 0.1))]
    together = dp.encode_turns(ToyCodec(), audios)
    alone = [dp.encode_turns(ToyCodec(), [a])[0] for a in audios]
    assert [c.size(1) for c in together] == [1, 3, 1, 2] and all(torch.equal(a, b) for a, b in zip(together, alone))


def test_tokenising_again_makes_only_what_is_missing(corpus):
    codec = ToyCodec()
    dp.tokenise(corpus, codec, progress=False, turns_per_shard=8)
    assert codec.calls == 0
    (corpus / "tokens" / "train-00001.safetensors").write_bytes(b"cut short")
    dp.tokenise(corpus, codec, progress=False, turns_per_shard=8)
    assert codec.calls == 1 and len(dp.read_turns(corpus, "train", ByteTokenizer())) == 6


def test_another_codec_is_refused(corpus):
    with pytest.raises(ValueError, match="fingerprint"):
        dp.tokenise(corpus, ToyCodec("b" * 16), progress=False, turns_per_shard=8)
    with pytest.raises(ValueError, match="--codec"):
        dataset(corpus, codec_fingerprint="b" * 16)


def test_missing_data_names_the_command(tmp_path):
    with pytest.raises(ValueError, match="python collect_data.py"):
        dp.ConversationDataset(tmp_path, CFG)
    with pytest.raises(ValueError, match="python collect_data.py"):
        dp.tokenise(tmp_path, ToyCodec(), progress=False)


def test_damaged_manifest_is_one_plain_error(tmp_path, corpus):
    path = tmp_path / "manifests" / "train" / "supervisions.jsonl.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes((corpus / "manifests/train/supervisions.jsonl.gz").read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged"):
        dp.read_supervisions(tmp_path, "train")


# ---- windows and batches

def test_batches_are_packed_and_padding_is_small(corpus):
    data = dataset(corpus)
    for _ in range(30):
        batch, _, _ = data.next_batch(dp.Stage(2))
        assert batch.turn.numel() <= 400
    assert data.waste < 0.2


def test_order_depends_on_seed_alone(corpus):
    a, b, c = dataset(corpus), dataset(corpus), dp.ConversationDataset(corpus, CFG, batch_positions=400, seed=4)
    first = [d.next_batch()[0].frames for d in (a, b, c)]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


def test_state_goes_on_where_it_was_also_across_a_stage(corpus):
    a = dataset(corpus)
    stages = [dp.Stage(0, 1.0)] * 3 + [dp.Stage(3)] * 40
    got = [a.next_batch(s) for s in stages]
    for stop in (1, 2, 3, 4, 20):
        b = dataset(corpus)
        b.load_state_dict(got[stop - 1][2])
        for want, stage in zip(got[stop:stop + 10], stages[stop:]):
            assert torch.equal(want[0].frames, b.next_batch(stage)[0].frames)


def test_curriculum_starts_with_short_single_turns(corpus):
    data = dataset(corpus)
    early, _, _ = data.next_batch(dp.Stage(0, 0.8))
    assert early.turn.max() == 0 and early.audio_loss.sum(1).max() <= 0.8 * 12.5 + 1
    assert max(int(data.next_batch(dp.Stage(3))[0].turn.max()) for _ in range(8)) > 0


def test_every_turn_is_a_target_once_per_epoch(corpus):
    data = dataset(corpus, p_listen=0.0, p_history=0.0)
    data.POOL = 30                                               # exactly one epoch
    windows = [w for batch in data._make_pool(0, dp.Stage(0)) for w in batch]
    assert len({id(w.turns[-1]) for w in windows}) == 30


def test_ranks_get_different_batches_of_the_same_pool(corpus):
    ranks = [dataset(corpus, ranks=Ranks(r, 2, r)) for r in range(2)]
    alone = dataset(corpus)
    both = [r.next_batch()[0].frames for _ in range(2) for r in ranks]
    assert all(torch.equal(alone.next_batch()[0].frames, f) for f in both[:2]) and not torch.equal(both[0], both[1])
    assert ranks[0].state_dict() == ranks[1].state_dict()


def test_shares_of_listening_mood_and_history(corpus):
    data = dataset(corpus, p_listen=0.5, p_mood=0.5, p_history=0.5)
    windows = [w for batch in data._make_pool(0, dp.Stage(2)) for w in batch]
    listening = np.mean([x for w in windows for x in w.listening])
    moods = np.mean([x for w in windows for x in w.moods])
    assert abs(listening - 0.5) < 0.08 and abs(moods - 0.5) < 0.08 and any(w.history for w in windows)
    none = dataset(corpus, p_listen=0.0, p_history=0.0)._make_pool(0, dp.Stage(2))
    assert not any(x for batch in none for w in batch for x in w.listening) and not any(w.history for batch in none for w in batch)


def test_histories_share_batches_and_are_paid_for(corpus):
    data = dataset(corpus, p_history=0.5)
    for batch in data._make_pool(0, dp.Stage(1)):
        assert len({bool(w.history) for w in batch}) == 1
        assert len(batch) * max(w.cost() for w in batch) <= 400
        assert all(w.cost() > w.positions() for w in batch if w.history)


def test_too_long_turns_are_skipped_and_counted(corpus):
    data = dp.ConversationDataset(corpus, CFG, batch_positions=30)
    assert data.skipped > 0 and all(data.conversations[c][t].positions() <= 30 for c, t in data.targets)
    with pytest.raises(ValueError, match="batch_positions"):
        dp.ConversationDataset(corpus, CFG, batch_positions=5)


def test_validation_batches_are_always_the_same(corpus):
    first, second = (dp.ConversationDataset(corpus, CFG, "validation", 400, seed=1).fixed_batches(2, 1) for _ in range(2))
    assert len(first) == 2 and all(torch.equal(a.frames, b.frames) for a, b in zip(first, second))
    assert all(b.reading.max() > 0 for b in first)


def test_codes_must_fit_the_model(corpus):
    with pytest.raises(ValueError, match="audio_vocab"):
        dp.ConversationDataset(corpus, model_preset("test", audio_vocab=20))


def test_prefetch_keeps_the_order_and_hands_errors_on():
    numbers = iter(range(5))
    ahead = dp.Prefetch(lambda: next(numbers), 2)
    assert [ahead.get() for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(StopIteration):
        ahead.get()
    ahead.close()


def test_context_turns_are_left_out_now_and_then(tmp_path):
    """The turn before a turn may be the same speaker's; the target stays, and validation leaves nothing out."""
    dp.tokenise(write_corpus(tmp_path), ToyCodec(), progress=False)
    data = dp.ConversationDataset(tmp_path, CFG, "train", p_skip=0.5)
    target = next(t for t in data.targets if t[1] == 4)
    windows = [data._window(target, dp.Stage(4), torch.Generator().manual_seed(seed)) for seed in range(60)]
    own = data.conversations[target[0]]
    assert all(w.turns[-1] is own[4] and len(w.listening) == len(w.moods) == len(w.turns) for w in windows)
    assert all([t.id for t in w.turns] == sorted(t.id for t in w.turns) for w in windows)
    assert any(a.speaker == b.speaker for w in windows for a, b in zip(w.turns, w.turns[1:]))
    assert len(data._window(target, dp.Stage(4), None).turns) == 5
    data.p_skip = 0.0
    always = [data._window(target, dp.Stage(4), torch.Generator().manual_seed(seed)) for seed in range(60)]
    assert not any(a.speaker == b.speaker for w in always for a, b in zip(w.turns, w.turns[1:]))
