"""The CSM model: what each position may see, cached against uncached, additions on and off, losses."""
import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import additions
import config
from architecture import CSM, FrameBatch

BOS, SPEAKER, EOT, LISTEN, TRANSCRIPT = 257, 264, 258, 259, 260
PREFIX = 2                                                                     # BOS, SPEAKER
FIELDS = ("frames", "mask", "turn", "text_index", "reading")


def build(seed=0, open_gates=True, scale=4.0, **overrides):
    """A small model with weights large enough that every path shows in the output."""
    cfg = config.model_preset("test", **overrides)
    cfg.cross.every = cfg.memory.every = 1 + (cfg.backbone.layers > 2)
    model = CSM(cfg)
    model.init_weights(torch.Generator().manual_seed(seed), open_gates=open_gates)
    with torch.no_grad():
        for p in (model.text_embeddings.weight, model.audio_embeddings.weight, model.audio_head, model.codebook0_head.weight):
            p *= scale
    return model.eval()


def speak(cfg, number, letters, frames, seed=0, aligned=True):
    """One spoken turn as rows (turn, text id or None, codes, text_index, reading)."""
    g = torch.Generator().manual_seed(seed + 100 * number)
    text = [BOS, SPEAKER, *torch.randint(97, 123, (letters,), generator=g).tolist(), EOT]
    rows = [(number, t, None, i, -1) for i, t in enumerate(text)]
    spoken = [PREFIX + letters * i // frames for i in range(frames + 1)]       # at each frame, then at EOS
    rows[-1] = rows[-1][:4] + ((PREFIX if aligned else -1),)
    codes = torch.randint(1, cfg.audio_vocab, (frames, cfg.num_codebooks), generator=g).tolist() + [[0] * cfg.num_codebooks]
    return rows + [(number, None, c, -1, r if aligned else -1) for c, r in zip(codes, spoken)]


def listen(cfg, number, letters, frames, seed=0):
    rows = speak(cfg, number, letters, frames, seed, aligned=False)
    text = [r[1] for r in rows if r[1] is not None][PREFIX:-1]
    before = [(number, t, None, i, -1) for i, t in enumerate((BOS, SPEAKER, LISTEN))]
    after = [(number, t, None, i, -1) for i, t in enumerate([TRANSCRIPT, *text, EOT])]
    return before + [r for r in rows if r[1] is None] + after


def batch_of(cfg, rows, length=None):
    B, S, K = len(rows), length or max(map(len, rows)), cfg.num_codebooks
    frames, mask = torch.zeros(B, S, K + 1, dtype=torch.long), torch.zeros(B, S, K + 1, dtype=torch.bool)
    turn, index, reading = (torch.full((B, S), -1) for _ in range(3))
    for b, row in enumerate(rows):
        for s, (number, text, codes, i, read) in enumerate(row):
            turn[b, s], index[b, s], reading[b, s] = number, i, read
            if codes is None:
                frames[b, s, K], mask[b, s, K] = text, True
            else:
                frames[b, s, :K], mask[b, s, :K] = torch.tensor(codes), True
    return FrameBatch(frames, mask, turn, index, reading)


def part(batch, start, end):
    return FrameBatch(*(getattr(batch, name)[:, start:end] for name in FIELDS))


def conversation(cfg, seed=0):
    return speak(cfg, 0, 9, 13, seed) + listen(cfg, 1, 7, 11, seed) + speak(cfg, 2, 5, 7, seed)


# ----------------------------------------------------------------------------- who sees what


@torch.no_grad()
def test_the_future_changes_nothing():
    model = build()
    batch = batch_of(model.cfg, [conversation(model.cfg)])
    h = model(batch)
    V = model.cfg.audio_vocab
    voice = batch.mask[0, :, 0]
    for s in range(1, batch.S):
        later = copy.deepcopy(batch)
        later.frames[0, s:][voice[s:]] = (later.frames[0, s:][voice[s:]] * 7 + 3) % V * later.mask[0, s:][voice[s:]]
        plain = (later.frames[0, :, -1] >= 97) & (later.frames[0, :, -1] < 123) & (torch.arange(batch.S) >= s)
        later.frames[0, plain, -1] = 187 - later.frames[0, plain, -1] + 32
        changed = (model(later) - h).abs().amax(-1)[0]
        assert changed[:s].max() < 1e-5, f"position {s} reaches back to {changed[:s].argmax()}"
        if voice[s] or plain[s]:
            assert changed[s] > 1e-4


@torch.no_grad()
def test_text_sees_a_window_but_the_end_of_text_and_the_voice_see_all():
    cross = config.CrossAttentionConfig(heads=2, width=32, reader_layers=1, text_window=3, phone_head=False)
    model = build(cross=cross)
    rows = speak(model.cfg, 0, 12, 6)
    batch = batch_of(model.cfg, [rows])
    other = copy.deepcopy(batch)
    other.frames[0, 0, -1] = 261                                               # another first token
    changed = (model(other) - model(batch)).abs().amax(-1)[0] > 1e-6
    end = 12 + PREFIX                                                          # the EOT position
    reach = 1 + model.cfg.backbone.layers * 2                                  # windows add up over layers
    assert not changed[reach:end].any() and changed[end:].all()


@torch.no_grad()
def test_padding_changes_nothing_and_makes_no_nan():
    model = build()
    rows = [conversation(model.cfg), speak(model.cfg, 0, 4, 5)]
    both = model(batch_of(model.cfg, rows, length=80))
    assert torch.isfinite(both).all()
    for b, row in enumerate(rows):
        alone = model(batch_of(model.cfg, [row]))
        torch.testing.assert_close(both[b:b + 1, :len(row)], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_frame_embedding_is_the_sum_of_the_columns_that_count():
    model = build()
    cfg = model.cfg
    batch = batch_of(cfg, [speak(cfg, 0, 3, 4)])
    batch.mask[0, -2, 2] = False                                               # one column switched off
    x = model.embed(batch.frames, batch.mask)
    want = sum(model.audio_embeddings.weight[batch.frames[0, -2, k] + cfg.audio_vocab * k] for k in range(cfg.num_codebooks) if k != 2)
    torch.testing.assert_close(x[-2], want)
    torch.testing.assert_close(x[0], model.text_embeddings.weight[BOS])


# ----------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("overrides", [{}, config.OFF])
@torch.no_grad()
def test_chunks_equal_the_whole(overrides):
    model = build(**copy.deepcopy(overrides))
    batch = batch_of(model.cfg, [conversation(model.cfg)])
    whole = model(batch)
    for sizes in ([5, 6, 3, 1, 1, 6, 2], [12, 14, 14, 1], [1] * 8, [1, 30]):
        state, parts, start = model.new_state(), [], 0
        for size in sizes + [1] * batch.S:
            if start < batch.S:
                parts.append(model(part(batch, start, start + size), state))
                start += size
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rows_in_lockstep_equal_rows_alone():
    model = build()
    cfg = model.cfg
    texts, voices = [], []
    for b, (letters, frames) in enumerate(((9, 5), (4, 8))):
        row = speak(cfg, 0, letters, frames, seed=b)
        texts.append(row[:letters + 3])
        voices.append(row[letters + 3:])
    prompt, voice = batch_of(cfg, texts), batch_of(cfg, voices)
    state = model.new_state(batch_size=2)
    h = [model(prompt, state)] + [model(part(voice, s, s + 1), state) for s in range(voice.S)]
    h = torch.cat(h, 1)
    for b in range(2):
        alone = model(batch_of(cfg, [texts[b] + voices[b]]))[0]
        n = len(texts[b])
        torch.testing.assert_close(h[b, :n], alone[:n], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(h[b, prompt.S:prompt.S + len(voices[b])], alone[n:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_new_window_reads_the_slots_of_turns_it_does_not_hold():
    model = build()
    cfg = model.cfg
    first, second = speak(cfg, 0, 6, 7), speak(cfg, 1, 5, 6)
    state = model.new_state()
    model(batch_of(cfg, [first]), state)
    model.end_turn(state)
    assert state.visible() is None and state.slots.turn.tolist() == [[0]]      # still in the window
    model.end_turn(state)
    assert state.slots.turn.shape == (1, 1)                                    # written once
    state.restart()
    streamed = model(batch_of(cfg, [second]), state)
    slots = model.remember(batch_of(cfg, [first]))
    torch.testing.assert_close(streamed, model(batch_of(cfg, [second]), memory=slots), rtol=1e-4, atol=1e-5)
    assert (streamed - model(batch_of(cfg, [second]))).abs().max() > 1e-3


@torch.no_grad()
def test_turns_of_one_chunk_are_written_one_by_one():
    model = build()
    batch = batch_of(model.cfg, [conversation(model.cfg)])
    state = model.new_state()
    model(batch, state)
    model.end_turn(state)
    torch.testing.assert_close(state.slots.prosodic, model.remember(batch).prosodic, rtol=1e-4, atol=1e-5)
    assert state.slots.turn.tolist() == [[0, 1, 2]]


def test_a_full_window_is_a_plain_error():
    model = build()
    state = model.new_state(max_positions=8)
    with pytest.raises(ValueError, match="--memory.window_turns"):
        model(batch_of(model.cfg, [speak(model.cfg, 0, 6, 7)]), state)


# ----------------------------------------------------------------------------- bad input

BAD_BATCHES = {
    "a code too large": (lambda b: b.frames[0, -2, 3:4].fill_(65), "codebook 3 is 65 .* 0..64.*--codec"),
    "a code below zero": (lambda b: b.frames[0, -2, 0:1].fill_(-1), "codebook 0 is -1"),
    "a text id too large": (lambda b: b.frames[0, 1, -1:].fill_(320), "text id is 320 .*position 1.* 0..319.*--tokenizer"),
    "too few codebooks": (lambda b: [setattr(b, n, getattr(b, n)[..., 1:]) for n in ("frames", "mask")], "8 codebooks.*--num_codebooks"),
    "no integers": (lambda b: setattr(b, "frames", b.frames.float()), "float32"),
    "no booleans": (lambda b: setattr(b, "mask", b.mask.long()), "int64"),
    "two lengths": (lambda b: setattr(b, "turn", b.turn[:, 1:]), "same positions"),
    "another device": (lambda b: setattr(b, "turn", b.turn.to("meta")), "meta.*--device"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_a_bad_batch_is_a_plain_error(case):
    model = build()
    spoil, words = BAD_BATCHES[case]
    batch = batch_of(model.cfg, [speak(model.cfg, 0, 4, 5)])
    model(batch)
    spoil(batch)
    for call in (model, model.loss, model.remember):
        with pytest.raises(ValueError, match=words):
            call(batch)


@torch.no_grad()
def test_what_is_masked_may_hold_anything():
    model = build()
    batch = batch_of(model.cfg, [speak(model.cfg, 0, 4, 5)])
    batch.mask[0, -2, 3] = False
    want = model(batch)
    batch.frames[0, -2, 3], batch.frames[0, -2, -1], batch.frames[0, 0, 0] = -100, 9999, 9999
    assert torch.equal(model(batch), want)


def test_codes_of_another_kind_are_a_plain_error():
    model = build()
    h, codes = torch.randn(2, 64), torch.zeros(2, 8, dtype=torch.long)
    for wrong, words in ((codes[:, :7], "7 codebooks.*--num_codebooks"), (codes + 65, "65..65.*0..64.*--codec"), (codes - 1, "-1"), (codes.float(), "float32")):
        with pytest.raises(ValueError, match=words):
            model.depth_logits(h, wrong)


def test_a_state_that_does_not_fit_is_a_plain_error():
    model = build()
    batch = batch_of(model.cfg, [speak(model.cfg, 0, 4, 5)])
    for made, words in (({"batch_size": 2}, "2 conversations.*1 rows"), ({"dtype": torch.bfloat16}, "bfloat16.*float32.*--precision"), ({"device": "meta"}, "meta.*--device")):
        with pytest.raises(ValueError, match=words):
            model(batch, model.new_state(**made))
    model.decoder.bfloat16()
    with pytest.raises(ValueError, match="bfloat16 on cpu and torch.float32 on cpu.*--precision"):
        model.new_state()


def test_no_state_is_longer_than_the_window():
    model = build()
    state = model.new_state(max_positions=10 ** 6)
    with pytest.raises(ValueError, match="513 positions do not fit into 512: raise --backbone.max_positions"):
        model(batch_of(model.cfg, [[(0, 97, None, i, -1) for i in range(513)]]), state)


# ----------------------------------------------------------------------------- additions


@torch.no_grad()
def test_shut_gates_give_exactly_the_model_without_additions():
    full = build(open_gates=False)
    bare = build(**copy.deepcopy(config.OFF))
    missing, _ = bare.load_state_dict(full.state_dict(), strict=False)
    assert not missing
    batch, past = batch_of(full.cfg, [conversation(full.cfg)]), batch_of(full.cfg, [speak(full.cfg, 0, 6, 7)])
    batch.turn += 1
    h = full(batch, memory=full.remember(past))
    assert torch.equal(full.c0_logits(h), bare.c0_logits(bare(batch)))
    opened = build()
    assert not torch.equal(opened(batch), h)


@torch.no_grad()
def test_memory_speaks_only_through_an_open_gate():
    model = build()
    past, now = batch_of(model.cfg, [speak(model.cfg, 0, 6, 7)]), batch_of(model.cfg, [speak(model.cfg, 1, 5, 6)])
    slots = model.remember(past)
    assert (model(now, memory=slots) - model(now)).abs().max() > 1e-3
    for read in model.read_memory:
        read.gate.zero_()
    assert torch.equal(model(now, memory=slots), model(now))


@torch.no_grad()
def test_old_slots_fade():
    model = build()
    past, now = batch_of(model.cfg, [speak(model.cfg, 0, 6, 7)]), batch_of(model.cfg, [speak(model.cfg, 1, 5, 6)])
    slots, without = model.remember(past), model(now)
    fresh = (model(now, memory=slots) - without).norm()
    later = copy.deepcopy(now)
    later.turn += 500
    assert (model(later, memory=slots) - without).norm() < 0.1 * fresh


@torch.no_grad()
def test_the_reading_position_moves_the_attention():
    model = build()
    read = model.read_text[0]
    batch = batch_of(model.cfg, [speak(model.cfg, 0, 30, 8)])
    seen = {}

    def keep(q, k, v, bias):
        score = torch.cat([q.unflatten(-1, (read.heads, -1)).transpose(1, 2) @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias], -1)
        seen["weights"] = score.softmax(-1).mean(1)[0]                         # (T, L)
        return type(read).look(read, q, k, v, bias)
    read.look = keep
    model(batch)
    centre = seen["weights"] @ torch.arange(33.0)
    assert centre[1] < 12 < 20 < centre[-1]                                    # first frame, EOS frame
    batch.reading[:] = -1
    model(batch)
    unguided = seen["weights"] @ torch.arange(33.0)
    assert (unguided[-1] - unguided[1]).abs() < 4


def bias_by_lookup(read, reading, filled):
    """The reading bias as it is defined, token by token: (R, T) reading, (R, L) filled -> (R, H, T, L)."""
    reach = read.reach
    distance = torch.arange(filled.shape[1]) - reading.unsqueeze(-1)
    offset = torch.where(reading.unsqueeze(-1) >= 0, distance.clamp(-reach, reach) + reach, 2 * reach + 1)
    return read.bias(offset).permute(0, 3, 1, 2).masked_fill(~filled[:, None, None, :], -math.inf)


@pytest.mark.parametrize("length", [1, 7, 60])
def test_the_reading_bias_is_the_one_looked_up_token_by_token(length):
    read, cfg = build().read_text[0], config.model_preset("test")
    g = torch.Generator().manual_seed(length)
    torch.nn.init.normal_(read.bias.weight, generator=g)
    reading = torch.randint(-1, 2 * length + read.reach, (5, 9), generator=g)
    filled = torch.arange(length) < torch.tensor([1, length, 2, length // 2, length]).unsqueeze(1)
    slow = bias_by_lookup(read, reading, filled)
    fast = additions._Rows.apply(read.sights(length), additions.sight_rows(cfg, reading, length), filled)
    assert torch.equal(fast, slow)
    grad = torch.randn(slow.shape, generator=g) * filled[:, None, None, :]
    wanted, = torch.autograd.grad(slow, read.bias.weight, grad)
    got, = torch.autograd.grad(fast, read.bias.weight, grad)
    assert wanted.any() and torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)
    chosen = additions.sight_rows(cfg, reading, length)
    sums = torch.autograd.grad(additions._Rows.apply(table := read.sights(length), chosen, filled), table, grad)[0]
    assert torch.allclose(additions._Rows.by_product(grad, chosen, table.shape[1]), sums, rtol=1e-5, atol=1e-5)
    cfg.cross.guided = False
    rows = additions.sight_rows(cfg, reading, length)
    assert torch.equal(additions._Rows.apply(read.sights(length), rows, filled), bias_by_lookup(read, torch.full_like(reading, -1), filled))


@torch.no_grad()
def test_prosody_reaches_text_only_from_finished_blocks():
    model = build(backbone=config.TransformerConfig(1, 64, 128, 4, 2, max_positions=512))
    cfg = model.cfg
    short, long = listen(cfg, 0, 5, 3), listen(cfg, 0, 5, 11)                  # blocks of 5 frames; EOS counts as one
    hear = model.hear_prosody[0]
    for rows, hears in ((short, False), (long, True)):
        batch = batch_of(cfg, [rows])
        hear.gate.fill_(1.0)
        on = model(batch)
        hear.gate.zero_()
        changed = (model(batch) - on).abs().amax(-1)[0] > 1e-6
        assert changed[-6:].all() == hears and not changed[:-7].any()


# ----------------------------------------------------------------------------- memory beyond the window


VOICES, SAYINGS = 4, 4


def long_ago(cfg, voice, saying, g):
    """Three turns: the first has one of four voices (ranges of codes) and says one of four things (ranges of letters); in the
    last, frame 0 is to name that voice and frame 1 the thing said. Nothing in the last two turns tells either."""
    letters = (97 + 6 * saying + torch.randint(0, 6, (5,), generator=g)).tolist()
    spoken = (1 + 16 * voice + torch.randint(0, 16, (4, cfg.num_codebooks), generator=g)).tolist()
    other = torch.randint(1, cfg.audio_vocab, (2, cfg.num_codebooks), generator=g).tolist()
    turns = ((letters, spoken), (torch.randint(97, 123, (3,), generator=g).tolist(), other), ([97], [[10 + voice] + [1] * 7, [30 + saying] + [1] * 7]))
    return [[(n, t, None, i, -1) for i, t in enumerate([BOS, *text, EOT])] + [(n, None, codes, -1, -1) for codes in frames]
            for n, (text, frames) in enumerate(turns)]


def examples(cfg, g, each):
    """(early turns, last two turns, voice and saying (n, 2)): `each` fresh draws of every pair."""
    rows = [(long_ago(cfg, v, w, g), v, w) for v in range(VOICES) for w in range(SAYINGS) for _ in range(each)]
    past, now = batch_of(cfg, [turns[0] for turns, _, _ in rows]), batch_of(cfg, [turns[1] + turns[2] for turns, _, _ in rows])
    now.audio_loss = now.turn == 2
    return past, now, torch.tensor([(v, w) for _, v, w in rows])


@torch.no_grad()
def recalled(model, past, now, wanted, forget=False):
    """Share of (voices, sayings) named right when the early turn has left the window of a state and only its slots are kept."""
    state = model.new_state(now.B)
    model(past, state)
    model.end_turn(state)
    state.restart()
    if forget:
        state.slots = None
    logits = model.c0_logits(model(now, state))[:, -3:-1]                      # at EOT and at frame 0 of the last turn
    guess = torch.stack([logits[:, 0, 10:10 + VOICES].argmax(-1), logits[:, 1, 30:30 + SAYINGS].argmax(-1)], 1)
    return (guess == wanted).float().mean(0).tolist()


def trained_to_recall(memory):
    model = build(scale=1.0, cross=config.CrossAttentionConfig(enabled=False), memory=memory, text_head=False, backbone=config.TransformerConfig(2, 64, 128, 4, 2, max_positions=512))
    g, optimizer = torch.Generator().manual_seed(1), torch.optim.Adam(model.parameters(), lr=4e-3)
    for _ in range(60):
        past, now, _ = examples(model.cfg, g, 2)
        total, count = model.loss(now, history=past, generator=g)["c0"]
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    return model


def test_an_early_turn_is_read_through_the_slots_and_not_without_them():
    memory = config.MemoryConfig(heads=2, width=16, max_slots=8, window_turns=2)
    model, bare = trained_to_recall(memory), trained_to_recall(dataclasses.replace(memory, enabled=False))
    unseen = examples(model.cfg, torch.Generator().manual_seed(2), 6)          # 96 conversations; by chance a quarter is right
    assert min(recalled(model, *unseen)) > 0.85
    assert max(recalled(model, *unseen, forget=True)) < 0.45
    assert max(recalled(bare, *unseen)) < 0.45


def numbers(thing) -> int:
    """Elements of all tensors that a state holds, however deep."""
    if isinstance(thing, torch.Tensor):
        return thing.numel()
    inside = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, (list, tuple)) else vars(thing).values() if hasattr(thing, "__dict__") else ()
    return sum(map(numbers, inside))


def test_turn_500_costs_what_turn_5_does():
    """Positions that go through the backbone for a turn, and numbers in the state after it."""
    from generation import Session
    from text_tokenizer import load_tokenizer
    memory = config.MemoryConfig(every=1, heads=2, width=16, max_slots=2, window_turns=2)
    model = CSM(config.model_preset("test", memory=memory, backbone=config.TransformerConfig(1, 32, 64, 2, 1, max_positions=256)))
    model.init_weights(torch.Generator().manual_seed(0), open_gates=True)
    session, seen, turns = Session(model.eval(), None, load_tokenizer("bytes")), [], []
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0].S))
    for number in range(500):
        session.add_turn(number % 2, "hi.", codes=torch.full((8, 2), number % 64))
        turns.append((sum(seen), numbers(session._state), session._state.slots.turn.numel()))
        seen.clear()
    assert len(session.turns) == 500 and turns[0] < turns[3]
    assert set(turns[5:]) == {turns[5]} and turns[5][2] < 10, sorted(set(turns[5:]))


# ----------------------------------------------------------------------------- depth decoder


@pytest.mark.parametrize("table", [0, 2 ** 25])
@torch.no_grad()
def test_depth_generate_equals_the_teacher_forced_oracle(table, monkeypatch):
    monkeypatch.setattr("architecture.FoldedDepth.TABLE", table)
    model = build(scale=20.0)
    K, h, c0 = model.cfg.num_codebooks, torch.randn(5, 64), torch.tensor([0, 3, 9, 9, 64])
    got = model.depth_generate(h, c0, lambda logits, k: logits.argmax(-1))
    codes = [c0]
    for k in range(1, K):
        given = F.pad(torch.stack(codes, 1), (0, K - k))
        codes.append(model.depth_logits(h, given)[:, k - 1].argmax(-1))
    assert torch.equal(got, torch.stack(codes, 1))
    assert got[:, 1:].unique().numel() > 10


@torch.no_grad()
def test_depth_generate_notices_new_weights():
    model = build(scale=20.0)
    h, c0 = torch.randn(3, 64), torch.tensor([1, 2, 3])
    first = model.depth_generate(h, c0, lambda logits, k: logits.argmax(-1))
    model.load_state_dict(build(seed=7, scale=20.0).state_dict())
    assert not torch.equal(first, model.depth_generate(h, c0, lambda logits, k: logits.argmax(-1)))


@torch.no_grad()
def test_each_code_depends_on_the_codes_before_it_only():
    model = build()
    h, codes = torch.randn(2, 64), torch.randint(0, 65, (2, 8))
    other = codes.clone()
    other[:, 3] = (other[:, 3] + 1) % 65
    changed = (model.depth_logits(h, codes) - model.depth_logits(h, other)).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [False] * 3 + [True] * 4


# ----------------------------------------------------------------------------- losses


def fresh():
    return build(scale=1.0).train()


def test_loss_at_the_start_is_that_of_guessing():
    model = fresh()
    loss = model.loss(batch_of(model.cfg, [conversation(model.cfg), conversation(model.cfg, seed=5)]))
    guess = {"c0": model.cfg.audio_vocab, "depth": model.cfg.audio_vocab, "text": model.cfg.text_vocab, "advance": model.cfg.cross.max_advance + 1}
    for term, classes in guess.items():
        total, count = loss[term]
        assert count > 0 and total.item() / count == pytest.approx(math.log(classes), rel=0.1)


def test_counts_are_those_of_the_targets():
    model = fresh()
    loss = model.loss(batch_of(model.cfg, [conversation(model.cfg)]))
    frames = 14 + 12 + 8                                                       # EOS frames included
    assert loss["c0"][1] == frames and loss["depth"][1] == frames * 7
    assert loss["text"][1] == (9 + 1) + (7 + 1) + (5 + 1)                      # bytes and EOT
    assert loss["advance"][1] == 13 + 7                                        # frames with a frame after them


def test_losses_add_up_over_micro_batches():
    model = fresh()
    rows = [conversation(model.cfg), speak(model.cfg, 0, 4, 5), listen(model.cfg, 0, 8, 9)]
    whole = model.loss(batch_of(model.cfg, rows))
    parts = [model.loss(batch_of(model.cfg, [row])) for row in rows]
    for term in ("c0", "depth", "text", "advance"):
        assert whole[term][1] == sum(p[term][1] for p in parts)
        torch.testing.assert_close(whole[term][0], sum(p[term][0] for p in parts), rtol=1e-4, atol=1e-3)


def test_masked_targets_are_left_out():
    model = fresh()
    batch = batch_of(model.cfg, [conversation(model.cfg)])
    batch.audio_loss = batch.turn == 2
    batch.text_loss = batch.turn == 1
    loss = model.loss(batch)
    assert loss["c0"][1] == 8 and loss["text"][1] == 3 - 1 + 9


def test_the_depth_share_follows_the_generator():
    model = build(scale=1.0, depth_fraction=0.25)
    batch = batch_of(model.cfg, [conversation(model.cfg)])
    one, again, other = (model.loss(batch, generator=torch.Generator().manual_seed(s))["depth"] for s in (1, 1, 2))
    assert one[1] == int(34 * 0.25) * 7
    assert torch.equal(one[0], again[0]) and not torch.equal(one[0], other[0])


def test_every_weight_learns():
    model = fresh()
    batch, past = batch_of(model.cfg, [conversation(model.cfg)]), batch_of(model.cfg, [speak(model.cfg, 0, 6, 7)])
    batch.turn += 1
    batch.phones = torch.tensor([[3, 4, 5, 9, 9, 0]])
    lexicon = torch.tensor([[97, 98, 256], [99, 100, 101]]), torch.tensor([[1, 2, 0], [3, 0, 0]])
    loss = model.loss(batch, history=past, lexicon=lexicon)
    assert loss["phones"][1] == 5 + 3
    sum(loss[term][0] / loss[term][1] for term in model.cfg.loss_weights).backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


def test_blocks_compile_to_whole_graphs():
    """fullgraph: a break would raise. One graph serves batches of several lengths."""
    plain, compiled, graphs = fresh(), fresh(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    compiled.compile_blocks(backend=backend)
    made = []
    for seed, letters in ((1, 9), (2, 14), (3, 21)):
        batch = batch_of(plain.cfg, [speak(plain.cfg, 0, letters, 2 * letters, seed)] * 2)
        losses = [model.loss(batch, generator=torch.Generator().manual_seed(1)) for model in (plain, compiled)]
        torch.testing.assert_close(losses[1]["c0"][0], losses[0]["c0"][0])
        torch.testing.assert_close(losses[1]["depth"][0], losses[0]["depth"][0])
        made.append(len(graphs))
    losses[1]["depth"][0].backward()
    assert 2 <= made[0] and made[2] == made[1], made


def test_recomputing_keeps_less_and_changes_no_gradient():
    grads, kept = [], []
    for recompute in (False, True):
        model, sizes = build(scale=1.0, recompute=recompute, dropout=0.2).train(), []
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            loss = model.loss(batch_of(model.cfg, [conversation(model.cfg)]), generator=torch.Generator().manual_seed(1))
        sum(loss[term][0] for term in ("c0", "depth", "text", "advance")).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
        kept.append(sum(sizes))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True)) and kept[1] < 0.8 * kept[0]


def test_turns_whose_phones_are_unknown_have_no_phone_loss():
    """People's speech comes without phones; asked for none, CTC would teach the reader that their letters are silent."""
    model = fresh()
    turn = conversation(model.cfg)
    alone, both = batch_of(model.cfg, [turn]), batch_of(model.cfg, [turn, turn])
    alone.phones, both.phones = torch.tensor([[3, 4, 5, 9]]), torch.tensor([[3, 4, 5, 9], [0, 0, 0, 0]])
    (one, n), (two, m) = model.loss(alone)["phones"], model.loss(both)["phones"]
    assert n == m == 4
    torch.testing.assert_close(one, two)


def test_the_reader_learns_to_spell():
    torch.manual_seed(0)
    model = fresh()
    letters = torch.randint(97, 107, (16, 5))
    lexicon = letters, letters - 96                                            # each letter its own phone
    batch = batch_of(model.cfg, [listen(model.cfg, 0, 3, 3)])
    optimizer = torch.optim.Adam(model.reader.parameters(), lr=1e-2)
    values = []
    for _ in range(25):
        total, count = model.loss(batch, lexicon=lexicon)["phones"]
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        values.append(total.item() / count)
    assert values[-1] < 0.2 * values[0]


# ----------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("name", list(config.MODEL_PRESETS))
def test_parameter_counts_are_those_of_the_configuration(name):
    cfg = config.model_preset(name, **copy.deepcopy(config.OFF))
    with torch.device("meta"):
        model = CSM(cfg)
    assert sum(p.numel() for p in model.parameters()) == config.count_parameters(cfg)["total"]


@pytest.mark.parametrize("name, millions", [("tiny", 350), ("blog", 422), ("medium", 7000), ("large", 70000), ("csm-1b", 1553)])
def test_presets_have_the_size_of_their_name(name, millions):
    """Within 5 %, with all additions and without."""
    cfg = config.model_preset(name)
    for count in (config.count_all(cfg), config.count_parameters(cfg)["total"]):
        assert count == pytest.approx(1e6 * millions, rel=0.05)


def test_the_presets_are_those_that_are_tested():
    """small is named by its geometry, that of CSM-1B; nano and test have no number in their name."""
    assert set(config.MODEL_PRESETS) == {"nano", "test", "tiny", "blog", "small", "medium", "large", "csm-1b"}
    small, official = config.model_preset("small"), config.model_preset("csm-1b")
    assert (small.backbone, small.depth) == (official.backbone, official.depth)


def test_csm_1b_has_the_published_names_and_size():
    with torch.device("meta"):
        model = CSM(config.model_preset("csm-1b"))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert sum(math.prod(s) for s in shapes.values()) == 1_552_791_552 and len(shapes) == 187
    assert shapes["backbone.layers.15.attn.k_proj.weight"] == (512, 2048)
    assert shapes["decoder.layers.3.mlp.w2.weight"] == (1024, 8192)
    assert shapes["audio_head"] == (31, 1024, 2051) and shapes["codebook0_head.weight"] == (2051, 2048)


def test_weights_of_the_meta_device_can_be_filled():
    cfg = dataclasses.replace(config.model_preset("test"))
    with torch.device("meta"):
        model = CSM(cfg)
    model.to_empty(device="cpu").init_weights()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert torch.isfinite(model(batch_of(cfg, [speak(cfg, 0, 4, 5)]))).all()


def test_a_batch_without_voice_has_a_loss():
    model = build()
    batch = batch_of(model.cfg, [[(0, 97 + i, None, i, -1) for i in range(6)]] * 2)
    terms = model.loss(batch)
    assert terms["c0"][1] == terms["depth"][1] == 0 and terms["text"][1] == 10
    sum(terms[name][0] for name in ("c0", "depth", "text")).backward()
    assert model.text_head.weight.grad.abs().sum() > 0
