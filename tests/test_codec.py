"""The codec: streaming equals offline, causality, quantiser, source-filter synthesis, losses, exact resume."""
import dataclasses
import gzip
import json
import signal

import numpy as np
import pytest
import soundfile
import torch

import audio_io
import codec_data
import train_codec
from codec_data import CodecData
from config import CodecConfig, CodecTrainConfig
from rvq_tokenizer import Codec, ResidualQuantizer, SourceFilter, code_statistics, magnitude

TINY = CodecConfig(num_codebooks=6, num_semantic=2, codebook_size=32, semantic_dim=8, acoustic_dim=12, width=24, latent=32, encoder_layers=1,
                   latent_layers=1, decoder_width=28, decoder_layers=3, num_mels=20, num_low_bins=24, num_bands=16)


@pytest.fixture
def codec():
    torch.manual_seed(0)
    return Codec(TINY).eval()


def noise(n, batch=1, seed=0):
    return 0.1 * torch.randn(batch, 1, n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("samples", [1, 1919, 1920, 1921, 9000])
def test_frame_count_and_length(codec, samples):
    codes = codec.encode(noise(samples, batch=2))
    frames = -(-samples // TINY.frame_size)
    assert codes.shape == (2, 6, frames)
    assert codec.decode(codes).shape == (2, 1, frames * TINY.frame_size)


@pytest.mark.parametrize("chunks", [[1] * 8, [3, 1, 4], [8], [5, 3]])
def test_streams_equal_offline(codec, chunks):
    audio = noise(8 * TINY.frame_size)
    codes = codec.encode(audio)
    sound = codec.decode(codes)
    encoded, decoded, encoder, decoder, at = [], [], None, None, 0
    for n in chunks:
        part, encoder = codec.encode_stream(audio[..., at * 1920:(at + n) * 1920], encoder)
        piece, decoder = codec.decode_stream(part, decoder)
        encoded.append(part)
        decoded.append(piece)
        at += n
    assert torch.equal(torch.cat(encoded, -1), codes)
    assert (torch.cat(decoded, -1) - sound).abs().max() < 1e-4


def test_the_future_is_not_heard(codec):
    audio = noise(6 * 1920)
    other = audio.clone()
    other[..., 4 * 1920:] += noise(2 * 1920, seed=1)
    a, b = codec.encode(audio), codec.encode(other)
    assert torch.equal(a[..., :4], b[..., :4])
    changed = a.clone()
    changed[..., 4:] = (changed[..., 4:] + 1) % TINY.codebook_size
    x, y = codec.decode(a), codec.decode(changed)
    assert torch.equal(x[..., :4 * 1920], y[..., :4 * 1920])
    assert not torch.equal(x[..., 4 * 1920:], y[..., 4 * 1920:])


def test_fewer_codebooks_decode(codec):
    codes = codec.encode(noise(4000))
    assert codec.encode(noise(4000), num_codebooks=3).equal(codes[:, :3])
    assert codec.decode(codes[:, :1]).shape == codec.decode(codes).shape
    assert not torch.equal(codec.decode(codes[:, :1]), codec.decode(codes))


@pytest.mark.parametrize("bad", [torch.zeros(1, 2, 100), torch.zeros(1, 1, 0), torch.zeros(100)])
def test_bad_audio_is_named(codec, bad):
    with pytest.raises(ValueError, match="samples"):
        codec.encode(bad)


def test_bad_codes_are_named(codec):
    with pytest.raises(ValueError, match="another codec"):
        codec.decode(torch.full((1, 2, 3), 99))
    with pytest.raises(ValueError, match="num_codebooks"):
        codec.decode(torch.zeros(1, 7, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="whole frames"):
        codec.encode_stream(noise(1000))


@pytest.mark.parametrize("audio", [torch.zeros(1, 1, 5000), torch.full((1, 1, 5000), float("nan")), 50 * noise(5000)])
def test_odd_audio_never_gives_nan(codec, audio):
    assert torch.isfinite(codec.decode(codec.encode(audio))).all()


def test_pulses_have_the_asked_pitch():
    synth = SourceFilter(CodecConfig())
    quiet, loud = torch.full((1, 100, 100), -12.0), torch.full((1, 100, 100), -2.0)
    audio, _ = synth(loud, quiet, torch.full((1, 100), 200.0))
    spectrum = torch.fft.rfft(audio[0, 4800:14400] * torch.hann_window(9600)).abs()       # 2.5 Hz bins
    peaks = spectrum.topk(10).indices * 2.5
    assert (peaks % 200).minimum(200 - peaks % 200).max() <= 2.5
    hiss, _ = synth(quiet, loud, torch.full((1, 100), 200.0))
    assert hiss[0, 4800:].std() == pytest.approx(np.exp(-2), rel=0.05)


def test_quantiser_refines_and_revives():
    torch.manual_seed(0)
    quantizer = ResidualQuantizer(3, 16, 4)
    z = torch.randn(2, 200, 4)
    quantizer.kmeans(z.reshape(-1, 4))
    codes = quantizer.encode(z, 3)
    errors = [(z - quantizer.decode(codes[:, :n])).pow(2).mean() for n in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2]
    quantizer.codebooks[0, 0] = 1e3
    quantizer.usage[0, 0] = 0.0
    quantizer.update(z, quantizer.encode(z, 3), decay=0.9)
    assert quantizer.codebooks[0, 0].abs().max() < 100, "a dead code must move to the data"


def test_lengths_of_vectors_follow_the_codebooks():
    """They are kept between calls, and made anew by training, loading and moving; the nearest vector is the one of a plain search."""
    torch.manual_seed(0)
    quantiser, x = ResidualQuantizer(2, 16, 4), torch.randn(50, 4)

    def plain():
        return torch.cdist(x, quantiser.codebooks[1]).argmin(1)
    assert torch.equal(quantiser.nearest(x, 1), plain()) and quantiser.norms() is quantiser.norms()
    quantiser.codebooks[1].mul_(torch.linspace(0.1, 9, 16)[:, None])
    assert torch.equal(quantiser.nearest(x, 1), plain())
    quantiser.load_state_dict({"codebooks": torch.randn(2, 16, 4).flip(1) * 3})
    assert torch.equal(quantiser.nearest(x, 1), plain())
    quantiser.update(torch.randn(1, 50, 4), quantiser.encode(torch.randn(1, 50, 4), 2), 0.5)
    assert torch.equal(quantiser.nearest(x, 1), plain())
    assert quantiser.double().norms().dtype == torch.float64
    with torch.inference_mode():
        quantiser.codebooks = torch.randn(2, 16, 4)                                              # such tensors do not tell of changes
        quantiser.norms()
        quantiser.codebooks.mul_(2)
        assert torch.allclose(quantiser.norms(), quantiser.codebooks.square().sum(2))


def test_magnitude_is_abs_with_a_gradient_at_zero():
    spectrum = torch.tensor([3 + 4j, 0, -1e-4j, 1e6], requires_grad=True)
    torch.testing.assert_close(magnitude(spectrum), spectrum.abs(), rtol=1e-6, atol=1e-9)
    magnitude(spectrum).sum().backward()
    assert torch.isfinite(torch.view_as_real(spectrum.grad)).all() and spectrum.grad[1] == 0


def test_statistics():
    uniform = code_statistics(torch.arange(8).repeat(1, 4), 8)
    single = code_statistics(torch.zeros(1, 32, dtype=torch.long), 8)
    assert uniform == {"entropy": [pytest.approx(1.0)], "dead": [0.0]}
    assert single["entropy"] == [0.0] and single["dead"] == [7 / 8]


def test_continuous_pitch_bridges_short_gaps():
    f0 = np.zeros(60, np.float32)
    f0[[5, 10]] = 100, 200
    out = codec_data.continuous_pitch(f0)
    assert (np.abs(out) >= 99).all() and 100 < out[7] < 200
    assert out[5] > 0 and out[40] < 0


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four turns of buzzing with two phones each, as collect_data.py would leave them."""
    tmp_path = tmp_path_factory.mktemp("data")
    rng, rows = np.random.default_rng(0), []
    for i in range(4):
        t = np.arange(24000) / 24000
        audio = 0.3 * np.sign(np.sin(2 * np.pi * (120 + 20 * i) * t)) * (t > 0.2) + 0.001 * rng.standard_normal(24000)
        soundfile.write(tmp_path / f"{i}.flac", audio, 24000)
        rows.append({"id": f"turn-{i}", "duration": 1.0, "custom": {"turn_audio": f"{i}.flac", "alignment": {"phones": "_A", "ends": [0.2, 1.0]}}})
    folder = tmp_path / "manifests" / "train"
    folder.mkdir(parents=True)
    with gzip.open(folder / "supervisions.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))
    return tmp_path


def settings(data, output, **changes):
    return CodecTrainConfig(**{"data": str(data), "output": str(output), "max_steps": 12, "batch": 2, "seconds": 0.48, "warmup_steps": 1, "wandb": "disabled",
                               "discriminator_width": 4, "adversarial": 0.0, "adversarial_start": 0, "predicted_pitch": 0.0} | changes)


def saved(output):
    return torch.load(output / "last.pt", weights_only=True)


def same(a, b) -> bool:
    """Equal in every tensor and number."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.mark.parametrize("changes", [{}, {"adversarial": 0.5, "adversarial_start": 4, "predicted_pitch": 0.5}], ids=["plain", "adversarial"])
def test_training_learns_and_resumes_exactly(data, tmp_path, monkeypatch, changes):
    cfg = settings(data, tmp_path / "out", max_steps=24, save_every=12, log_every=1, **changes)
    assert train_codec.train(cfg, TINY) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "train"]
    assert rows[-1]["mel"] < rows[0]["mel"] and rows[-1]["phones"] < rows[0]["phones"]
    assert [row["step"] for row in rows if "told_apart" in row] == (list(range(5, 25)) if changes else [])
    whole, save = saved(tmp_path / "out"), train_codec.save_state

    class Killed(Exception):
        pass

    def save_then_die(path, run):
        save(path, run)
        if run.step == 12:
            raise Killed
    monkeypatch.setattr(train_codec, "save_state", save_then_die)
    again = dataclasses.replace(cfg, output=str(tmp_path / "again"))
    with pytest.raises(Killed):
        train_codec.train(again, TINY)
    monkeypatch.setattr(train_codec, "save_state", save)
    train_codec.train(dataclasses.replace(again, resume=str(tmp_path / "again" / "last.pt")), TINY)
    resumed = saved(tmp_path / "again")
    assert (resumed["adversary"] is not None) == bool(changes)
    assert all(same(whole[k], resumed[k]) for k in ("codec", "ema", "reader", "optimizer", "adversary", "step", "generator", "rng"))


def test_decoder_only_leaves_the_codes(data, tmp_path):
    train_codec.train(settings(data, tmp_path / "a"), TINY)
    for name, adversarial in (("b", 0.0), ("c", 1.0)):
        more = settings(data, tmp_path / name, init_from=str(tmp_path / "a" / "last.pt"), decoder_only=True, adversarial=adversarial)
        train_codec.train(more, TINY)
    codecs = []
    for name in "abc":
        codecs.append(Codec(TINY).eval())
        codecs[-1].load_state_dict(saved(tmp_path / name)["codec"])
    audio = noise(9600)
    codes = codecs[0].encode(audio)
    sounds = [codec.decode(codes) for codec in codecs]
    assert codecs[1].encode(audio).equal(codes) and codecs[2].encode(audio).equal(codes)
    assert not torch.equal(sounds[0], sounds[1]) and not torch.equal(sounds[1], sounds[2]), "the discriminators must move the decoder"


def test_a_training_file_is_the_codec_that_is_exported(data, tmp_path):
    """load_codec takes the file itself; a new run in the same folder sets the old file aside."""
    from checkpoint import load_codec
    cfg = settings(data, tmp_path / "a", max_steps=2)
    train_codec.train(cfg, TINY)
    train_codec.export(str(tmp_path / "a" / "last.pt"), str(tmp_path / "folder"))
    codec, exported = load_codec(tmp_path / "a" / "last.pt"), load_codec(tmp_path / "folder")
    assert codec.fingerprint == exported.fingerprint
    assert codec.encode(noise(4000)).equal(exported.encode(noise(4000)))
    old = (tmp_path / "a" / "last.pt").read_bytes()
    train_codec.train(dataclasses.replace(cfg, init_from=str(tmp_path / "a" / "last.pt"), seed=5), TINY)
    assert (tmp_path / "a" / "previous" / "last.pt").read_bytes() == old != (tmp_path / "a" / "last.pt").read_bytes()


def test_ctrl_c_finishes_the_step_and_saves(data, tmp_path, monkeypatch):
    step = train_codec.train_step

    def interrupt(run):
        if run.step == 4:
            signal.raise_signal(signal.SIGINT)
        return step(run)
    monkeypatch.setattr(train_codec, "train_step", interrupt)
    train_codec.train(settings(data, tmp_path / "a"), TINY)
    assert saved(tmp_path / "a")["step"] == 5


def test_a_share_of_crops_is_driven_by_the_predicted_pitch():
    generator = torch.Generator().manual_seed(0)
    predicted, measured = torch.full((200, 3), 1.0, requires_grad=True), torch.full((200, 3), 2.0)
    assert train_codec.driving_pitch(predicted, measured, 0.0, generator) is measured
    mixed = train_codec.driving_pitch(predicted, measured, 0.3, generator)
    assert not mixed.requires_grad and (mixed == mixed[:, :1]).all() and 30 < (mixed[:, 0] == 1).sum() < 90


def test_the_discriminators_weight_grows_from_nothing(data, tmp_path):
    run = train_codec.Run(settings(data, tmp_path / "a", adversarial=0.5, adversarial_start=100), TINY)
    weights = []
    for run.step in (0, 100, 350, 600, 5000):
        weights.append(run.adversarial_weight)
    assert weights == [0, 0, 0.25, 0.5, 0.5]
    run.cfg.decoder_only, run.step = True, 250
    assert run.adversarial_weight == 0.25, "a decoder alone is judged from the first step"


def test_the_log_holds_losses_codebooks_samples_and_pictures(data, tmp_path):
    """Every eval_every steps and at the end; nothing of it changes the training (a run without it ends the same)."""
    cfg = settings(data, tmp_path / "a", max_steps=6, log_every=2, eval_every=4, adversarial=0.5)
    train_codec.train(cfg, TINY)
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    held = [row for row in rows if row["kind"] == "validation"]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [2, 4, 6] and [row["step"] for row in held] == [4, 6]
    assert {"mel", "stft", "phones", "f0", "commit", "adversarial", "features", "discriminator", "grad_norm", "minutes"} <= set(rows[0])
    for row in held:
        assert {"validation_mel", "validation_phones", "validation_f0"} <= set(row) and row["held_out"] is False
        assert len(row["entropy"]) == len(row["dead"]) == 6 and 0 < row["entropy_mean"] < 1 and 0 < row["dead_mean"] < 1 and row["frames"] >= 48
    names = {path.name for path in (tmp_path / "a" / "samples").iterdir()}
    assert names >= {"1_input.wav", "2_input.wav"} | {f"step{n:07d}_{i}{x}" for n in (4, 6) for i in (1, 2) for x in ("_6.wav", "_3.wav", "_2.wav", ".png")}
    sound = soundfile.read(tmp_path / "a" / "samples" / "step0000004_1_6.wav")[0]
    assert len(sound) == 24000 and np.isfinite(sound).all()
    assert all((tmp_path / "a" / name).read_bytes()[:4] == b"\x89PNG" for name in ("loss.png", "samples/step0000004_1.png"))
    train_codec.train(dataclasses.replace(cfg, output=str(tmp_path / "b"), eval_every=0), TINY)
    assert same(saved(tmp_path / "a")["codec"], saved(tmp_path / "b")["codec"])


def test_the_validation_split_is_held_out(data, tmp_path):
    import shutil
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    shutil.copytree(folder / "manifests" / "train", folder / "manifests" / "validation")
    run = train_codec.Run(settings(folder, tmp_path / "a"), TINY)
    found = train_codec.evaluate(run)
    assert found["held_out"] is True and train_codec.held_out(run) is not run.data and found == train_codec.evaluate(run)


def test_a_folder_of_weights_is_the_start_and_what_does_not_fit_is_new(data, tmp_path, capsys):
    """The encoder rests until the new parts have learned; the semantic codes go on."""
    from checkpoint import save_codec
    torch.manual_seed(3)
    old = Codec(TINY)
    old.semantic.codebooks.mul_(10)
    save_codec(old, tmp_path / "old")
    wider = dataclasses.replace(TINY, acoustic_dim=16, decoder_width=20)
    run = train_codec.Run(settings(data, tmp_path / "a", init_from=str(tmp_path / "old")), wider)
    said = capsys.readouterr().out
    assert "acoustic_in" in said and "hop_decoder" in said and "semantic" not in said.split("new:")[1]
    assert run.ready == [True, False] and run.thaw > 0
    before = {n: p.detach().clone() for n, p in run.codec.named_parameters()}
    books = run.codec.semantic.codebooks.clone()
    train_codec.train_step(run)
    train_codec.start_codebooks(run)
    train_codec.train_step(run)
    moved = {n for n, p in run.codec.named_parameters() if not torch.equal(p, before[n])}
    assert any(n.startswith("hop_decoder") for n in moved) and not any(n.startswith(train_codec.ENCODER) for n in moved)
    assert run.started and torch.equal(run.codec.semantic.codebooks, books)
    run.step = run.thaw
    train_codec.train_step(run)
    assert not torch.equal(run.codec.feature_in.weight, before["feature_in.weight"]) and not torch.equal(run.codec.semantic.codebooks, books)


def test_a_folder_with_int8_stacks_is_read_with_its_scales(data, tmp_path):
    """save_codec stores large decoder stacks as int8 rows: a run that begins with them must hold the numbers they stand for."""
    from checkpoint import load_codec, save_codec
    wide = dataclasses.replace(TINY, decoder_width=96)
    save_codec(Codec(wide), tmp_path / "old")
    run = train_codec.Run(settings(data, tmp_path / "a", init_from=str(tmp_path / "old")), wide)
    assert same(run.codec.state_dict(), load_codec(tmp_path / "old").state_dict()) and run.ready == [True, True]
    (tmp_path / "old" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="corrupt"):
        train_codec.Run(settings(data, tmp_path / "a", init_from=str(tmp_path / "old")), wide)


def test_crops_hear_few_of_either_side():
    cfg = CodecTrainConfig(dropout_probability=0.5)
    counts = train_codec.draw_truncation(4000, 10, 22, cfg, torch.Generator().manual_seed(0))
    pairs = {tuple(p) for p in counts.T.tolist()}
    assert pairs == set(train_codec.TRUNCATIONS) | {(10, 22)}
    assert 0.4 < (counts.sum(0) == 32).float().mean() < 0.6
    small = train_codec.draw_truncation(500, 2, 4, cfg, torch.Generator().manual_seed(0))
    assert small[0].max() == 2 and small[1].max() == 4 and small.sum(0).min() >= 1


def test_either_side_can_be_cut_short(codec):
    """5 codes = 2 semantic + 3 acoustic, or 1 + 4: what is left out adds nothing to the latent."""
    codes = codec.encode(noise(8000))
    few = codes[:, [0, 2, 3, 4, 5]]
    one = codec.semantic_out(codec.semantic.decode(codes[:, :1])) + codec.acoustic_out(codec.acoustic.decode(codes[:, 2:]))
    assert torch.allclose(codec.dequantise(few, 1), one, atol=1e-6)
    assert torch.equal(codec.decode(codes, 2), codec.decode(codes)) and not torch.equal(codec.decode(few, 1), codec.decode(few, 2))
    with pytest.raises(ValueError, match="this codec has 2 and 4"):
        codec.decode(codes, 1)


def drawn_file(path, codec, frames=12):
    from safetensors.torch import save_file

    from checkpoint import codec_fingerprint
    codes = torch.full((4, frames), 7, dtype=torch.int16)
    save_file({"codes": codes}, path, metadata={"kind": "drawn codes", "codec_fingerprint": codec_fingerprint(codec), "num_semantic": "1",
                                                "turns": json.dumps([{"id": "turn-1", "frames": frames}])})
    return str(path)


def test_crops_are_pieces_of_the_turns(data):
    """Sound, phones and pitch of every crop lie where they lie in the collection; around a turn there is silence."""
    crops, rng = CodecData(data, "train", TINY.phones), np.random.default_rng(3)
    turns = [(sound, *labels) for sound, labels in zip(crops.turns(), zip(*(np.split(x.numpy(), crops.sound.firsts[1:]) for x in (crops.sound.phones, crops.sound.f0))))]
    audio, phones, f0, drawn = crops.batch(rng, 16, 11520)
    rng = np.random.default_rng(3)
    picks = crops._pick(rng, 16)
    starts, _ = crops._places(rng, picks, 11520)
    gain = 10 ** (rng.uniform(-12, 3, 16) / 20)
    assert audio.shape == (16, 11520) and phones.shape == f0.shape == (16, 52) and drawn.shape == (16, 0, 6) and len(set(picks)) > 1 and min(starts) < 0
    for row, (pick, start) in enumerate(zip(picks, starts)):
        sound, symbols, pitch = turns[pick]
        for point in range(52):
            inside = 0 <= start + point < len(symbols)
            assert phones[row, point] == (symbols[start + point] if inside else 0) and f0[row, point] == (pitch[start + point] if inside else -120)
        for n in range(0, 11520, 37):
            want = sound[start * 240 + n] / 32767 if 0 <= start * 240 + n < len(sound) else 0.0
            assert abs(float(audio[row, n]) - np.clip(want * gain[row], -1, 1)) < 1e-5


def test_recordings_have_their_share(data, tmp_path):
    for number in range(3):
        audio_io.write_audio(tmp_path / f"{number}.wav", noise(24000)[0, 0].numpy() * 0.1)
    crops = CodecData(data, "train", TINY.phones, recordings=str(tmp_path), recorded=0.25)
    picks = crops._pick(np.random.default_rng(0), 4000)
    assert len(crops.sound.lengths) == crops.spoken + 3 and 0.22 < (picks >= crops.spoken).mean() < 0.28
    plain = CodecData(data, "train", TINY.phones, recordings=str(tmp_path))
    assert plain.recorded == pytest.approx(3 / len(plain.sound.lengths))


def test_crops_in_nobodys_voice_count_less(data, tmp_path, monkeypatch):
    """Spectral losses: a mean over the crops in which those without acoustic codes weigh ALONE_WEIGHT."""
    cfg = settings(data, tmp_path, batch=4)
    run, rows = train_codec.Run(cfg, TINY), []
    monkeypatch.setattr(train_codec, "draw_truncation", lambda *a: torch.tensor([[2, 2, 1, 2], [4, 0, 0, 4]]))
    inner = run.spectral.forward
    monkeypatch.setattr(run.spectral, "forward", lambda *a: rows.append(inner(*a)) or rows[-1])
    losses, *_ = train_codec.codec_losses(run.codec, run.reader, run.spectral, run.batch(), cfg, run.generator, (True, True))
    weight = torch.tensor([1.0, train_codec.ALONE_WEIGHT, train_codec.ALONE_WEIGHT, 1.0])
    assert train_codec.ALONE_WEIGHT < 0.5
    for name, row in zip(("mel", "stft"), rows[0]):
        assert row.shape == (4,) and torch.allclose(losses[name], (weight * row).sum() / weight.sum()) and not torch.allclose(losses[name], row.mean())


def test_roughened_rows_are_narrower_or_noisier():
    tone = torch.sin(torch.arange(24000) * (2 * np.pi * 11000 / 24000)).expand(40, -1) * 0.5 + torch.sin(torch.arange(24000) * (2 * np.pi * 500 / 24000)) * 0.5
    assert torch.equal(codec_data.roughen(tone, np.random.default_rng(0), np.zeros(40)), tone)
    out = torch.fft.rfft(codec_data.roughen(tone, np.random.default_rng(0), np.full(40, 0.5))).abs() / 12000
    lost, noisy = out[:, 11000] < 0.3, out[:, 3000:9000].mean(1) > 1e-4                  # 1 Hz bins
    assert 10 < lost.sum() < 30 and 10 < noisy.sum() < 30 and (lost & ~noisy).any() and (noisy & ~lost).any()
    assert (out[:, 500] > 0.45).all()


def test_the_listener_learns_phones_and_tells_the_decoder(data):
    """It reads recordings better and better; the words loss is zero on the recording itself, and a decoder can lower it."""
    from discriminators import Adversary, PhoneListener, set_rate
    from rvq_tokenizer import mel_filters
    torch.manual_seed(0)
    adversary = Adversary(4, False, 0.2, 24000, listener=PhoneListener(len(TINY.phones), TINY.slot_size, mel_filters(513, 80, 24000), 32))
    set_rate(adversary.optimizer, 3e-3)
    audio, phones, *_ = CodecData(data, "train", TINY.phones).batch(np.random.default_rng(0), 4, 11520)
    target, generator = phones[:, 1:][:, ::2][:, :24], torch.Generator().manual_seed(0)
    seen = []
    for _ in range(40):
        losses, metrics = adversary.judge(audio.clone().requires_grad_(), audio, generator, target)
        assert losses["words"] < 1e-6
        seen.append(float(metrics["listener"]))
        adversary.update()
    assert seen[-1] < 0.6 * seen[0]
    fake = (audio + 0.1 * torch.randn_like(audio)).requires_grad_()
    first = adversary.judge(fake, audio, generator, target)[0]["words"]
    better = fake.detach() - 0.3 * torch.autograd.grad(first, fake)[0]
    assert first > 0.01 and adversary.judge(better.requires_grad_(), audio, generator, target)[0]["words"] < first


def test_the_decoder_learns_from_drawn_codes(data, tmp_path, monkeypatch):
    train_codec.train(settings(data, tmp_path / "a"), TINY)
    start = str(tmp_path / "a" / "last.pt")
    codec = Codec(TINY)
    codec.load_state_dict(saved(tmp_path / "a")["codec"])
    path = drawn_file(tmp_path / "drawn.safetensors", codec)
    cfg = settings(data, tmp_path / "b", init_from=start, decoder_only=True, drawn=path)
    run = train_codec.Run(cfg, TINY)
    *_, drawn = run.data.batch(np.random.default_rng(0), 64, 11520)
    given = drawn[:, 0, 0] >= 0
    assert drawn.shape == (64, 4, 6) and (drawn[given] == 7).all() and (drawn[~given] == -1).all() and 2 < given.sum() < 20
    heard = []
    monkeypatch.setattr(run.codec, "controls", lambda z, inner=run.codec.controls: heard.append(z) or inner(z))
    while not heard or given.all() or not given.any():
        heard.clear()
        batch = run.batch()
        given = batch[3][:, 0, 0] >= 0
        train_codec.codec_losses(run.codec, run.reader, run.spectral, batch, cfg, run.generator, run.ready, None, 1)
    want = run.codec.dequantise(torch.full((1, 4, 6), 7), 1)
    assert torch.allclose(heard[0][given], want.expand(int(given.sum()), -1, -1), atol=1e-5) and not torch.allclose(heard[0][~given][:1], want, atol=1e-2)
    with pytest.raises(ValueError, match="--decoder_only"):
        settings(data, tmp_path / "b", init_from=start, drawn=path)
    codec.semantic.codebooks.add_(1)
    with pytest.raises(ValueError, match="codec"):
        train_codec.Run(dataclasses.replace(cfg, drawn=drawn_file(tmp_path / "other.safetensors", codec)), TINY)


def test_missing_data_names_the_command(capsys):
    with pytest.raises(SystemExit) as stop:
        train_codec.main(["--data", "nowhere"])
    assert stop.value.code == 2 and "collect_data.py" in capsys.readouterr().err
