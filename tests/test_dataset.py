"""Shards, reading positions, windows and packed batches on tiny synthetic data; no codec weights, no audio models."""
import gzip
import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

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


# ---- one turn and one batch, the slow and obvious way

def slow_rows(turn, cfg, tokenizer, speaker, mood, listening):
    """One turn, position by position: (audio columns or None, text token or None, text_index, reading, audio_loss, text_loss)."""
    spoken = 0 if turn.consumed is None else None
    prefix = tokenizer.listen_prefix(speaker) if listening else tokenizer.speak_prefix(speaker, mood)
    text = [*turn.ids, tokenizer.eot]
    rows = [(None, token, i, -1, False, False) for i, token in enumerate(prefix)]
    if not listening:
        rows += [(None, token, len(prefix) + i, -1, False, True) for i, token in enumerate(text)]
    reading = [-1] * (turn.codes.size(1) + 2)                                # EOT, frames, EOS
    if spoken is None and not listening:
        reading = [len(prefix)] * 2 + [len(prefix) + int(c) for c in turn.consumed]
        rows[-1] = (*rows[-1][:3], reading[0], *rows[-1][4:])
    for frame, read in zip(turn.codes.T.tolist() + [[-cfg.code_offset] * cfg.num_codebooks], reading[1:]):
        rows.append(([code + cfg.code_offset for code in frame], None, -1, read, not listening, False))
    if listening:
        rows += [(None, token, i, -1, False, i > 0) for i, token in enumerate([tokenizer.transcript, *text])]
    return rows


def slow_batch(turns, first_turns, cfg, tokenizer):
    """turns: per row the arguments of slow_rows -> the fields of a FrameBatch, padded."""
    b, s, k = len(turns), max([1, *(sum(len(slow_rows(t, cfg, tokenizer, *how)) for t, *how in row) for row in turns)]), cfg.num_codebooks
    out = {"frames": torch.zeros(b, s, k + 1).long(), "mask": torch.zeros(b, s, k + 1).bool(), "audio_loss": torch.zeros(b, s).bool(), "text_loss": torch.zeros(b, s).bool()}
    out |= {key: torch.full((b, s), -1) for key in ("turn", "text_index", "reading")}
    for i, (row, first) in enumerate(zip(turns, first_turns)):
        at = 0
        for number, (turn, *how) in enumerate(row, first):
            for audio, token, *rest in slow_rows(turn, cfg, tokenizer, *how):
                if audio is not None:
                    out["frames"][i, at, :k], out["mask"][i, at, :k] = torch.tensor(audio), True
                else:
                    out["frames"][i, at, k], out["mask"][i, at, k] = token, True
                out["turn"][i, at] = number
                for key, value in zip(("text_index", "reading", "audio_loss", "text_loss"), rest):
                    out[key][i, at] = value
                at += 1
    return out


def equal(batch, other) -> bool:
    """The same fields in the same types to the bit (None: no batch at all)."""
    if batch is None or other is None:
        return batch is other
    a, b = ({k: v for k, v in vars(x).items() if v is not None} for x in (batch, other))
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("changes", [{}, {"text_vocab": 40000}, {"code_offset": 0, "text_head": False}])
def test_batches_are_those_of_the_slow_way(corpus, changes):
    cfg = replace(CFG, **changes)
    data = dp.ConversationDataset(corpus, cfg, batch_positions=400, seed=3, p_listen=0.4, p_history=0.6)
    data.conversations[0][0].consumed = None
    heard = older = 0
    for windows in data._make_pool(0, dp.Stage(2))[:40]:
        said = [[(t, w.speakers[t.speaker], t.mood if w.moods[i] else None, w.listening[i]) for i, t in enumerate(w.turns)] for w in windows]
        want = slow_batch(said, [len(w.history) for w in windows], cfg, data.tokenizer)
        batch, history = dp.collate(windows, cfg, data.tokenizer)
        phones = batch.phones if batch.phones is not None else torch.zeros(len(windows), 0).long()
        assert [p[p > 0].tolist() for p in phones] == [[int(p) for i, t in enumerate(w.turns) if not w.listening[i] for p in t.phones] for w in windows]
        assert equal(replace(batch, phones=None), dp.FrameBatch(**want))
        heard, older = heard + any(x for w in windows for x in w.listening), older + (history is not None)
        if history is not None:
            past = [[(t, w.speakers[t.speaker], None, False) for t in w.history] for w in windows]
            assert equal(history, dp.FrameBatch(**slow_batch(past, [0] * len(windows), cfg, data.tokenizer)))
    assert older > 3 and (heard > 3) == cfg.text_head


def test_what_is_handed_over_is_narrow(corpus):
    """int16 where every token fits, int32 for a large vocabulary; nothing else changes."""
    for cfg, kind in ((CFG, torch.int16), (replace(CFG, text_vocab=40000), torch.int32)):
        narrow, wide = (getattr(dp.ConversationDataset(corpus, cfg, batch_positions=400, seed=3), how)(dp.Stage(2))[0] for how in ("draw", "next_batch"))
        assert {narrow.frames.dtype, narrow.turn.dtype, narrow.reading.dtype, narrow.text_index.dtype} == {kind} and narrow.phones.dtype == torch.uint8
        assert wide.frames.dtype == wide.phones.dtype == torch.long and equal(dp.widen(narrow), wide) and equal(dp.widen(wide), wide)


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


def test_large_batches_are_packed_from_large_pools(corpus):
    """Less padding than from a pool of a few batches, and no batch is larger than it may be, its history included."""
    wastes = []
    for size in (None, 512):
        data = dp.ConversationDataset(corpus, CFG, batch_positions=6000, seed=3)
        assert data.pool_size == 2000 and dataset(corpus).pool_size == 512
        data.pool_size = size or data.pool_size
        while data.pool_number == 0:
            batch, history, _ = data.draw(dp.Stage(2))
            assert batch.turn.numel() + (0 if history is None else history.turn.numel()) <= 6000
        wastes.append(data.waste)
    assert wastes[0] < 0.12 < wastes[1]


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
    data.pool_size = 30                                               # exactly one epoch
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
        assert len(batch) * (max(w.positions() for w in batch) + max(w.earlier() for w in batch)) <= 400


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


# ---- worker processes

def workers(corpus, **options):
    return dataset(corpus, num_workers=2, **options)


def same_batches(got, want) -> None:
    for (a, a_history, a_state), (b, b_history, b_state) in zip(got, want, strict=True):
        assert equal(a, b) and equal(a_history, b_history) and a_state == b_state


@pytest.fixture
def closing():
    """Datasets to close at the end; then no process may be left."""
    opened = []
    yield lambda data: opened.append(data) or data
    for data in opened:
        data.close()
    assert not multiprocessing.active_children()


def test_workers_make_the_same_batches(corpus, closing):
    """Also across a change of stage within a pool, and over the end of a pool, for each of two ranks."""
    for rank in (Ranks(), Ranks(0, 2, 0), Ranks(1, 2, 1)):
        alone, helped = dataset(corpus, ranks=rank, p_history=0.5), closing(workers(corpus, ranks=rank, p_history=0.5))
        alone.pool_size = helped.pool_size = 60
        stages = [dp.Stage(0, 0.8)] * 2 + [dp.Stage(2)] * 40
        got, want = ([data.next_batch(stage) for stage in stages] for data in (helped, alone))
        same_batches(got, want)
        assert want[1][2]["pool"] == 0 and want[2][2]["pool"] == 1 and want[-1][2]["pool"] > 2 and helped.waste == alone.waste


def test_workers_go_on_in_the_middle_of_a_pool(corpus, closing):
    """From a saved state, from a state of another number of ranks, and back in a dataset whose workers have run ahead."""
    alone = dataset(corpus)
    alone.pool_size = 60
    want = [alone.next_batch(dp.Stage(2)) for _ in range(60)]
    places = [n for n, (_, _, state) in enumerate(want[:50]) if state["place"] > 2]
    helped = closing(workers(corpus))
    helped.pool_size = 60
    for n in (places[-1] - 5, places[0], places[5]):
        helped.load_state_dict(want[n][2])
        same_batches([helped.next_batch(dp.Stage(2)) for _ in range(6)], want[n + 1:n + 7])
    beyond = {"pool": 3, "place": 1000, "ranks": 1, "max_context": 2, "max_seconds": 1e9}
    for data in (alone, helped):
        data.load_state_dict(beyond)
    same_batches([helped.next_batch()], [alone.next_batch()])
    assert helped.state_dict()["pool"] == 4


def test_workers_leave_the_random_numbers_of_the_model_alone(corpus, closing):
    before = torch.get_rng_state()
    closing(workers(corpus)).next_batch()
    assert torch.equal(before, torch.get_rng_state())


def test_a_plain_error_in_a_worker_stays_plain(corpus, closing):
    for options in ({}, {"num_workers": 2}):
        data = closing(dataset(corpus, **options))
        for turns in data.conversations:
            for t in turns:
                t.mood = "peckish"
        with pytest.raises(ValueError) as error:
            data.next_batch()
        assert str(error.value).startswith("unknown mood 'peckish': use one of")


def test_closed_workers_are_gone_and_start_again(corpus):
    alone, helped = dataset(corpus), workers(corpus)
    same_batches([helped.next_batch()], [alone.next_batch()])
    assert len(multiprocessing.active_children()) == 2
    for child in multiprocessing.active_children():                          # as Ctrl-C in a terminal, or a scheduler, would
        os.kill(child.pid, signal.SIGINT)
        os.kill(child.pid, signal.SIGTERM)
    same_batches([helped.next_batch() for _ in range(60)], [alone.next_batch() for _ in range(60)])
    helped.close()
    assert not multiprocessing.active_children()
    same_batches([helped.next_batch()], [alone.next_batch()])
    helped.close()
    helped.close()
    assert not multiprocessing.active_children()


def draw_and_wait(corpus, pipe):
    data = workers(corpus)
    data.pool_size = 4000                                                    # parts that do not fit a pipe
    data.next_batch()
    pipe.send([child.pid for child in multiprocessing.active_children()])
    time.sleep(60)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc which processes run")
def test_workers_of_a_killed_process_leave(corpus):
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=draw_and_wait, args=(corpus, theirs))
    process.start()
    pids = ours.recv()
    time.sleep(1)
    try:
        assert len(pids) == 2 and all(map(running, pids))
        process.kill()
        process.join()
        end = time.monotonic() + 15
        while any(map(running, pids)) and time.monotonic() < end:
            time.sleep(0.1)
        assert not any(map(running, pids))
    finally:
        for pid in filter(running, pids):
            os.kill(pid, signal.SIGKILL)


def test_a_spawned_worker_gets_its_data_by_value(corpus):
    """Pickled as for a start method other than fork: without shared memory, and it makes the same part."""
    data = workers(corpus)
    content = bytes(ForkingPickler.dumps(data))
    assert b"rebuild" not in content                                         # no tensor in shared memory
    request = (3, dp.Stage(2))
    (_, ours), (asked, theirs) = data[request], ForkingPickler.loads(content)[request]
    assert asked == request and ours[:2] == theirs[:2] and len(ours.batches) > 0
    assert all(equal(dp.narrow_batch(a), dp.narrow_batch(b)) for one, other in zip(ours.batches, theirs.batches) for a, b in zip(one, other))


# ---- left out

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
