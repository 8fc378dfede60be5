"""Official weights in and out, through `transformers` itself where there is a `transformers` side to it."""
import copy
import dataclasses
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import csm_weights
from architecture import CSM, FrameBatch
from config import CrossAttentionConfig, MemoryConfig, model_preset, to_dict
from layers import Rope

transformers = pytest.importorskip("transformers")

from test_csm_parity import reference  # noqa: E402

SHARDS = "60KB"


@pytest.fixture(scope="module")
def theirs():
    """Their model; Mimi's tensors are random as well, so that a lost one would show."""
    model = reference("grouped queries")
    with torch.no_grad():
        for buffer in model.codec_model.buffers():
            if buffer.is_floating_point():
                buffer.normal_()
    return model


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(path, max_shard_size=SHARDS)
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture(scope="module")
def imported(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("ours")
    assert checkpoint.main(["import_csm", str(folder), "--output", str(path)]) == 0
    return path


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def refused(capsys, *arguments) -> str:
    assert checkpoint.main([str(a) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


# ----------------------------------------------------------------------------- round trips

@pytest.mark.parametrize("shard_gb", ["5", "0.00006"])
def test_theirs_to_ours_to_theirs(theirs, folder, imported, tmp_path, shard_gb):
    assert checkpoint.main(["export_csm", str(imported), "--format", "transformers", "--output", str(tmp_path), "--shard_gb", shard_gb]) == 0
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_gb != "5")
    back, info = transformers.CsmForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert equal(back.state_dict(), theirs.state_dict())
    before = transformers.CsmForConditionalGeneration.from_pretrained(folder)
    assert back.config.to_dict() | {"_name_or_path": ""} == before.config.to_dict() | {"_name_or_path": ""}
    assert back.generation_config.to_dict() == before.generation_config.to_dict()


def test_theirs_to_original_to_theirs(theirs, folder, imported, tmp_path):
    """Through the original format Mimi is left behind; everything of the model comes back."""
    for source in (folder, imported):
        assert checkpoint.main(["export_csm", str(source), "--format", "original", "--output", str(tmp_path / "o")]) == 0
        assert checkpoint.main(["import_csm", str(tmp_path / "o"), "--output", str(tmp_path / "i")]) == 0
        assert equal(load_file(tmp_path / "i/model.safetensors"), load_file(imported / "model.safetensors"))
    assert checkpoint.main(["export_csm", str(tmp_path / "i"), "--format", "transformers", "--output", str(tmp_path / "t")]) == 0
    back = transformers.CsmForConditionalGeneration.from_pretrained(tmp_path / "t")
    own = {n: v for n, v in theirs.state_dict().items() if not n.startswith("codec_model.")}
    assert equal({n: back.state_dict()[n] for n in own}, own)
    for rope in ("backbone_model.rotary_emb", "depth_decoder.model.rotary_emb"):
        assert torch.equal(back.get_submodule(rope).inv_freq, theirs.get_submodule(rope).inv_freq)


def test_bfloat16_stays_bfloat16(theirs, tmp_path):
    half = copy.deepcopy(theirs).bfloat16()
    half.save_pretrained(tmp_path / "a")
    checkpoint.import_csm(tmp_path / "a", tmp_path / "b")
    checkpoint.export_csm(tmp_path / "b", tmp_path / "c", "transformers")
    assert equal(load_file(tmp_path / "c/model.safetensors"), load_file(tmp_path / "a/model.safetensors"))
    assert checkpoint.load_model(tmp_path / "b").projection.weight.dtype == torch.float32


def test_a_rewritten_folder_has_no_shards_of_before(imported, tmp_path):
    checkpoint.export_csm(imported, tmp_path, "transformers", shard_bytes=60_000)
    checkpoint.export_csm(imported, tmp_path, "transformers")
    assert sorted(p.name for p in tmp_path.glob("model*")) == ["model.safetensors"]


@torch.no_grad()
def test_every_way_to_load_gives_the_same_model(folder, imported, tmp_path):
    checkpoint.export_csm(imported, tmp_path, "original")
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "ckpt.pt")
    (tmp_path / "model.safetensors").unlink()
    models = [checkpoint.load_model(path) for path in (folder, imported, tmp_path, tmp_path / "ckpt.pt")]
    assert all(equal(m.state_dict(), models[0].state_dict()) and m.cfg == models[0].cfg and m.codec_fingerprint == "mimi" for m in models)
    assert checkpoint.load_model(folder, codec_fingerprint="mimi-0123456789a")
    for path in (folder, imported):
        with pytest.raises(ValueError, match="fingerprint"):
            checkpoint.load_model(path, codec_fingerprint="a" * 16)
    with pytest.raises(ValueError, match="fingerprint"):
        checkpoint.check_codec("x", "mimi-1", "mimi-2")


def test_small_storage(imported, folder, tmp_path):
    checkpoint.import_csm(folder, tmp_path / "a", storage="int8")
    size = (tmp_path / "a/model.safetensors").stat().st_size / (imported / "model.safetensors").stat().st_size
    assert size < 0.6 and checkpoint.load_model(tmp_path / "a").cfg == checkpoint.load_model(imported).cfg
    checkpoint.export_csm(tmp_path / "a", tmp_path / "b", "transformers")
    assert {v.dtype for v in load_file(tmp_path / "b/model.safetensors").values()} == {torch.float32}


def test_the_tokenizer_travels_with_the_weights(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "a")
    (tmp_path / "a/tokenizer.json").write_text("{}")
    checkpoint.import_csm(tmp_path / "a", tmp_path / "b")
    checkpoint.export_csm(tmp_path / "b", tmp_path / "c", "original")
    assert (tmp_path / "c/tokenizer.json").read_text() == "{}"


def test_large_weights_are_mapped_not_read(imported, tmp_path, monkeypatch):
    """The same model, which can be trained, and the file on the disk stays as it was."""
    small = checkpoint.load_model(imported)
    checkpoint.save_training(tmp_path / "a.pt", config=to_dict(small.cfg), model=small.state_dict())
    monkeypatch.setattr(checkpoint, "LARGE", 0)
    for path in (imported, tmp_path / "a.pt"):
        large, file = checkpoint.load_model(path), path / "model.safetensors" if path.is_dir() else path
        before = file.read_bytes()
        assert equal(large.state_dict(), small.state_dict()) and all(p.requires_grad and p.device.type == "cpu" for p in large.parameters())
        optimiser = torch.optim.SGD(large.parameters(), lr=1.0)
        large.depth_logits(torch.randn(2, 64), torch.zeros(2, 8, dtype=torch.long)).sum().backward()
        optimiser.step()
        assert not torch.equal(large.projection.weight, small.projection.weight) and file.read_bytes() == before


# ----------------------------------------------------------------------------- the original layout

def test_original_rows_are_interleaved_pairs():
    """Row by row: the slow way to say what the permutation does."""
    heads, size = 3, 8
    ours = torch.randn(heads * size, 5)
    original = csm_weights.pairs_from_halves(ours, heads)
    for head in range(heads):
        for i in range(size // 2):
            row = head * size
            assert torch.equal(original[row + 2 * i], ours[row + i]) and torch.equal(original[row + 2 * i + 1], ours[row + size // 2 + i])
    assert torch.equal(csm_weights.halves_from_pairs(original, heads), ours)


def test_the_two_layouts_attend_alike():
    """Queries and keys of original rows, turned pair by pair as complex numbers, have the products of ours."""
    cfg = model_preset("test").backbone
    E, q, k, x = cfg.head_dim, torch.randn(cfg.width, 7), torch.randn(cfg.width, 7), torch.randn(2, 7)
    rope, at = Rope(E, cfg), torch.tensor([3, 11])
    cos, sin = rope.table(at)
    turn = torch.polar(torch.ones(2, 1, E // 2), torch.outer(at, torch.atan2(rope.table(torch.tensor([1]))[1][0, 0, E // 2:], rope.table(torch.tensor([1]))[0][0, 0, E // 2:])).unsqueeze(1))

    def halves(w):
        return rope.rotate((x @ w.T).view(2, -1, E), cos, sin)

    def pairs(w):
        return torch.view_as_real(torch.view_as_complex((x @ csm_weights.pairs_from_halves(w, cfg.heads).T).view(2, -1, E // 2, 2)) * turn).flatten(2)
    torch.testing.assert_close((halves(q)[0] * halves(k)[1]).sum(-1), (pairs(q)[0] * pairs(k)[1]).sum(-1), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(halves(q), pairs(q), atol=1e-2)


# ----------------------------------------------------------------------------- the official geometry

def official_config(**changes) -> dict:
    """What the published config.json says; `changes` replace fields."""
    def rope(low, high, old):
        return {"rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": old},
                "rope_theta": 500000}
    return {"model_type": "csm", "num_codebooks": 32, "vocab_size": 2051, "text_vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
            **rope(0.125, 0.5, 1024), "codebook_eos_token_id": 0, "tie_codebooks_embeddings": True,
            "depth_decoder_config": {"num_codebooks": 32, "vocab_size": 2051, "backbone_hidden_size": 2048, "hidden_size": 1024, "intermediate_size": 8192,
                                     "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 33,
                                     **rope(0.001953125, 0.0078125, 16)}} | changes


def test_the_official_config_is_the_preset():
    cfg = csm_weights.config_from_transformers(official_config())
    assert cfg == model_preset("csm-1b") == csm_weights.config_from_original({})
    assert csm_weights.config_to_original(cfg) == {"backbone_flavor": "llama-1B", "decoder_flavor": "llama-100M", "text_vocab_size": 128256,
                                                   "audio_vocab_size": 2051, "audio_num_codebooks": 32}
    written = csm_weights.config_to_transformers(cfg)
    for part in (written, written["depth_decoder_config"]):
        wanted = official_config() if part is written else official_config()["depth_decoder_config"]
        rope = wanted.pop("rope_scaling") | {"rope_theta": wanted.pop("rope_theta")}
        assert part["rope_parameters"] == rope                               # the same numbers as they publish
        assert {k: part[k] for k in wanted if k != "depth_decoder_config"} == {k: v for k, v in wanted.items() if k != "depth_decoder_config"}
    assert (written["audio_token_id"], written["audio_eos_token_id"], written["codebook_pad_token_id"], written["bos_token_id"]) == (128002, 128003, 2050, 128000)
    assert csm_weights.config_from_transformers(written) == cfg


def test_names_and_shapes_of_csm_1b_on_the_meta_device():
    cfg = model_preset("csm-1b")
    wanted = csm_weights.shapes(cfg)
    with torch.device("meta"):
        ours = {n: tuple(p.shape) for n, p in CSM(cfg).named_parameters()}
        theirs = transformers.CsmForConditionalGeneration(transformers.CsmConfig.from_dict(csm_weights.config_to_transformers(cfg)))
    assert ours == wanted and len(wanted) == 187 and sum(map(math.prod, wanted.values())) == 1_552_791_552
    named = {csm_weights.transformers_name(name): shape for name, shape in wanted.items()}
    named[csm_weights.TIED[1]] = named[csm_weights.TIED[0]]
    assert named == {n: tuple(p.shape) for n, p in theirs.named_parameters(remove_duplicate=False) if not n.startswith("codec_model.")}


@pytest.mark.parametrize("changes, word", [({"hidden_act": "gelu"}, "hidden_act"), ({"attention_bias": True}, "attention_bias"), ({"num_codebooks": 16}, "num_codebooks"),
                                           ({"codebook_eos_token_id": 1}, "codebook_eos_token_id"), ({"head_dim": 128}, "head_dim"),
                                           ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"), ({"rope_scaling": {"rope_type": "llama3"}}, "factor")])
def test_configs_that_are_no_csm(changes, word):
    with pytest.raises(ValueError, match=word):
        csm_weights.config_from_transformers(official_config(**changes))


def test_an_unknown_flavour():
    with pytest.raises(ValueError, match="llama-9B"):
        csm_weights.config_from_original({"backbone_flavor": "llama-9B"})


# ----------------------------------------------------------------------------- strictness

def altered(folder, target, change) -> None:
    """A one-file copy of `folder` whose tensors went through change(dict)."""
    target.mkdir()
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text((folder / "config.json").read_text())


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("lm_head.weight"), "lacks the tensor lm_head.weight"),
    (lambda t: t.update({"lm_head.bias": torch.zeros(35)}), "lm_head.bias"),
    (lambda t: t.update({"backbone_model.norm.weight": torch.zeros(65)}), "backbone_model.norm.weight of shape (65,)"),
    (lambda t: t.update({name: torch.ones(280, 64) * i for i, name in enumerate(csm_weights.TIED)}), "differ"),
])
def test_transformers_weights_that_do_not_fit(folder, tmp_path, capsys, change, words):
    altered(folder, tmp_path / "a", change)
    assert words in refused(capsys, "import_csm", tmp_path / "a", "--output", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_the_tied_table_may_stand_twice(folder, imported, tmp_path):
    def twice(tensors):
        there = next(name for name in csm_weights.TIED if name in tensors)
        tensors |= {name: tensors[there].clone() for name in csm_weights.TIED}
    altered(folder, tmp_path / "a", twice)
    assert equal(csm_weights.read(tmp_path / "a").tensors, load_file(imported / "model.safetensors"))


def test_original_weights_that_do_not_fit(imported, tmp_path, capsys):
    checkpoint.export_csm(imported, tmp_path / "o", "original")
    altered(tmp_path / "o", tmp_path / "a", lambda t: t.pop("decoder.norm.scale"))
    assert "lacks the tensor decoder.norm.scale" in refused(capsys, "import_csm", tmp_path / "a", "--output", tmp_path / "b")


def test_a_lost_shard_and_a_damaged_file(folder, tmp_path, capsys):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[0].write_bytes(b"short")
    assert "damaged" in refused(capsys, "import_csm", tmp_path, "--output", tmp_path / "x")
    shards[0].unlink()
    assert shards[0].name in refused(capsys, "import_csm", tmp_path, "--output", tmp_path / "x")


def test_our_own_folder_is_not_imported(imported, tmp_path, capsys):
    assert "already" in refused(capsys, "import_csm", imported, "--output", tmp_path / "x")


def test_additions_have_no_place_there(tmp_path, capsys):
    model = CSM(dataclasses.replace(model_preset("test")))
    model.init_weights()
    checkpoint.save_pretrained(model, tmp_path / "m")
    assert "no place" in refused(capsys, "export_csm", tmp_path / "m", "--format", "original", "--output", tmp_path / "o")
    assert not (tmp_path / "o").exists()


# ----------------------------------------------------------------------------- additions on imported weights

def turns(cfg, letters=300, frames=9):
    """A text longer than the default text window, its audio and end frame, and a second text: (1, S, K + 1) as one FrameBatch."""
    K, V = cfg.num_codebooks, cfg.audio_vocab
    text = torch.randint(0, cfg.text_vocab, (letters + 5,))
    codes = torch.cat([torch.randint(1, V, (frames, K)), torch.zeros(1, K, dtype=torch.long)])
    order = [*range(letters), *[-1] * (frames + 1), *range(5)]
    rows = torch.zeros(1, len(order), K + 1, dtype=torch.long)
    voice = torch.tensor([i < 0 for i in order])
    rows[0, voice, :K], rows[0, ~voice, K] = codes, text
    mask = torch.cat([voice[:, None].expand(-1, K), ~voice[:, None]], 1).unsqueeze(0)
    turn = torch.tensor([[0] * (letters + frames + 1) + [1] * 5])
    return FrameBatch(rows, mask, turn, torch.tensor([order]), torch.full_like(turn, -1))


@torch.no_grad()
def test_additions_change_no_bit_of_imported_weights(folder, tmp_path):
    """Whole and in steps, with memory slots to read; once a gate opens the logits move."""
    official = csm_weights.read(folder)
    wide = dataclasses.replace(official.cfg, backbone=dataclasses.replace(official.cfg.backbone, max_positions=512))
    plain = checkpoint._build(wide, official.tensors, folder)
    full = checkpoint.with_additions(plain, cross=CrossAttentionConfig(every=1, heads=2, width=32, text_window=512), memory=MemoryConfig(every=1, heads=2, width=16))
    batch = turns(wide)
    slots = full.remember(turns(wide, 20, 5))
    batch.turn += 2
    want = plain.c0_logits(plain(batch))
    assert torch.equal(full.c0_logits(full(batch, memory=slots)), want)
    states, parts = (plain.new_state(), full.new_state()), ([], [])
    for model, state, out in zip((plain, full), states, parts):
        for start, end in ((0, 300), *((s, s + 1) for s in range(300, 310)), (310, 315)):
            out.append(model.c0_logits(model(FrameBatch(*(getattr(batch, n)[:, start:end] for n in ("frames", "mask", "turn", "text_index", "reading"))), state)))
    assert torch.equal(torch.cat(parts[1], 1), torch.cat(parts[0], 1))
    h, codes = torch.randn(3, 64), torch.randint(0, 35, (3, 8))
    assert torch.equal(full.depth_logits(h, codes), plain.depth_logits(h, codes))
    for gates in (full.read_text, full.hear_prosody, full.read_memory):
        gates[0].gate.fill_(1.0)
        assert not torch.equal(full.c0_logits(full(batch, memory=slots)), want)
        gates[0].gate.zero_()


def test_imported_with_additions(folder, imported, tmp_path):
    assert checkpoint.main(["import_csm", str(folder), "--additions", "--output", str(tmp_path)]) == 0
    model = checkpoint.load_model(tmp_path)
    assert model.cfg.cross.enabled and model.cfg.memory.enabled and model.cfg.text_head and model.cfg.cross.text_window == model.cfg.backbone.max_positions
    official = load_file(imported / "model.safetensors")
    assert equal({n: model.state_dict()[n] for n in official}, official)


# ----------------------------------------------------------------------------- by name

def test_without_a_network_the_name_is_refused_plainly(capsys, tmp_path):
    assert "the hub cannot be reached" in refused(capsys, "import_csm", "sesame/csm-1b", "--output", tmp_path / "x")


def test_by_name(folder, tmp_path, monkeypatch, capsys):
    import httpx
    import huggingface_hub
    from huggingface_hub import errors
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert checkpoint.load_model("someone/some-csm").cfg.num_codebooks == 8
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert asked == [("someone/some-csm", ["*.json", "*.jinja"]), ("someone/some-csm", sorted(set(index["weight_map"].values())))]

    def gated(name, allow_patterns):
        raise errors.GatedRepoError("no", response=httpx.Response(403, request=httpx.Request("GET", "http://localhost")))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    assert "is gated" in refused(capsys, "import_csm", "sesame/csm-1b", "--output", tmp_path / "x")
