"""Codes as a model draws them: aligned with the true frames, readable by the codec's trainer."""
import torch

import dataset_pipeline as dp
import draw_codes
from architecture import CSM
from checkpoint import save_pretrained
from codec_data import read_drawn
from config import SamplingConfig, model_preset
from test_dataset import ToyCodec, write_corpus
from text_tokenizer import ByteTokenizer

CFG = model_preset("test")
GREEDY = SamplingConfig(temperature=0.0, depth_temperature=0.0)


def make_model():
    torch.manual_seed(0)
    model = CSM(CFG)
    model.init_weights(open_gates=True)
    return model.eval()


def windows(folder):
    dp.tokenise(folder, ToyCodec(), progress=False)
    data = dp.ConversationDataset(folder, CFG, "train")
    return data, [data._window(t, dp.Stage(), None) for t in data.targets[:3]]


def test_each_frame_is_drawn_after_the_true_ones(tmp_path, monkeypatch):
    """In a batch of windows as for each window alone, and the same when the later true frames change."""
    monkeypatch.setattr(draw_codes, "TRUE_FIRST", 0.0)
    data, chosen = windows(write_corpus(tmp_path))
    model, tokenizer = make_model(), ByteTokenizer()

    def draw(some):
        return draw_codes.drawn_batch(model, some, tokenizer, 64, GREEDY, torch.Generator().manual_seed(0))
    together = draw(chosen)
    for window, found in zip(chosen, together):
        assert torch.equal(draw([window])[0], found) and found.shape == (CFG.num_codebooks, window.turns[-1].codes.shape[1])
        assert 0 <= found.min() and found.max() < 64
    window, half = chosen[0], together[0].shape[1] // 2
    window.turns[-1].codes = window.turns[-1].codes.clone()
    window.turns[-1].codes[:, half:] = 1
    again = draw([window])[0]
    assert torch.equal(again[:, :half + 1], together[0][:, :half + 1]) and not torch.equal(again, together[0])


def test_the_first_codebook_is_mostly_the_true_one(tmp_path, monkeypatch):
    monkeypatch.setattr(draw_codes, "TRUE_FIRST", 1.0)
    _, chosen = windows(write_corpus(tmp_path))
    for window, found in zip(chosen, draw_codes.drawn_batch(make_model(), chosen, ByteTokenizer(), 64, GREEDY, torch.Generator().manual_seed(0))):
        assert torch.equal(found[0], window.turns[-1].codes[0].long())


def test_the_file_holds_the_turns_by_name(tmp_path, monkeypatch, capsys):
    folder, codec = write_corpus(tmp_path / "data"), ToyCodec()
    dp.tokenise(folder, codec, progress=False)
    save_pretrained(make_model(), tmp_path / "model", codec_fingerprint=codec.fingerprint)
    monkeypatch.setattr(draw_codes, "load_codec", lambda *_: codec)
    assert draw_codes.main(["--data", str(folder), "--checkpoint", str(tmp_path / "model"), "--hours", "0.002", "--device", "cpu"]) == 0
    found, semantic, fingerprint = read_drawn(str(folder / "tokens" / "drawn.safetensors"))
    frames = {t.id: t.codes.shape[1] for turns in dp.read_turns(folder, "train", ByteTokenizer()) for t in turns}
    assert 0 < len(found) < len(frames) and semantic == CFG.num_semantic and fingerprint == codec.fingerprint
    assert all(codes.shape == (CFG.num_codebooks, frames[name]) for name, codes in found.items())
    # tokenising again does not throw it away
    dp.tokenise(folder, codec, progress=False)
    assert (folder / "tokens" / "drawn.safetensors").exists()
