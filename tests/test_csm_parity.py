"""With the additions off our model is CSM: the same numbers as `transformers`' CsmForConditionalGeneration at float32.

Random weights of small geometries; texts and audio go through their own input path (`input_values` and the codec),
with a codec that returns the codes a test has chosen. TOLERANCE is the bar of the project.
"""
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import csm_weights
import generation
from architecture import CSM, FrameBatch
from config import SamplingConfig, TransformerConfig
from layers import rope_frequencies

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
TEXT_VOCAB, AUDIO, AUDIO_END = 40, 38, 39
MIMI = {"model_type": "mimi", "hidden_size": 16, "num_filters": 4, "num_residual_layers": 1, "upsampling_ratios": [4, 2], "codebook_size": 32, "codebook_dim": 16,
        "vector_quantization_hidden_dimension": 16, "upsample_groups": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 16, "frame_rate": 1500}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# short contexts put every kind of frequency (kept, blended, slowed) to work within a few positions
BACKBONE_ROPE, DEPTH_ROPE = (LLAMA3 | {"original_max_position_embeddings": n} for n in (48, 12))


def stack(layers, width, ffn, heads, kv_heads, positions, rope):
    return {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": ffn, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "max_position_embeddings": positions, "rope_parameters": rope}


GEOMETRIES = {
    "grouped queries": (stack(2, 64, 96, 4, 2, 256, BACKBONE_ROPE), stack(2, 32, 48, 2, 1, 33, DEPTH_ROPE), 8, 35),
    "depth wider than backbone": (stack(1, 48, 64, 3, 1, 256, BACKBONE_ROPE), stack(2, 64, 80, 4, 2, 33, DEPTH_ROPE), 4, 19),
    "32 codebooks": (stack(3, 64, 128, 8, 2, 256, BACKBONE_ROPE), stack(1, 48, 64, 4, 1, 33, DEPTH_ROPE), 32, 67),
    "2 codebooks, all heads, plain rope": (stack(2, 32, 64, 2, 2, 256, {"rope_type": "default", "rope_theta": 10000.0}),
                                           stack(1, 32, 40, 2, 2, 33, {"rope_type": "default", "rope_theta": 10000.0}), 2, 11),
}


def reference(name, seed=0):
    """Their model, with weights large enough that logits differ by several units."""
    backbone, depth, K, V = GEOMETRIES[name]
    config = transformers.CsmConfig(num_codebooks=K, vocab_size=V, text_vocab_size=TEXT_VOCAB, audio_token_id=AUDIO, audio_eos_token_id=AUDIO_END,
                                    pad_token_id=AUDIO, bos_token_id=1, codebook_pad_token_id=V - 1, **backbone,
                                    depth_decoder_config={"num_codebooks": K, "vocab_size": V, "backbone_hidden_size": backbone["hidden_size"]} | depth,
                                    codec_config=MIMI | {"num_quantizers": K})
    theirs = transformers.CsmForConditionalGeneration(config).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if key.endswith("norm.weight"):
                p.uniform_(0.5, 1.5, generator=g)
            elif "embed_audio" in key or "model.embed_tokens" in key:
                p.normal_(0, K ** -0.5, generator=g)
            elif not key.startswith(csm_weights.CODEC):
                p.normal_(0, 1.0 if "embed" in key else (3 if "head" in key else 1.5) * p.shape[1] ** -0.5, generator=g)
    return theirs


def ours_of(theirs) -> CSM:
    cfg = csm_weights.config_from_transformers(theirs.config.to_dict())
    cfg.depth_fraction = 1.0
    model = CSM(cfg)
    own = {name: value for name, value in theirs.state_dict().items() if not name.startswith(csm_weights.CODEC)}
    model.load_state_dict(csm_weights.from_transformers(own, cfg))
    return model.eval()


def conversations(theirs, rows, seed=1):
    """rows: per conversation its turns as (letters, frames), frames None for a last turn that is to be spoken.

    -> (inputs of their model, FrameBatch of ours), both padded on the left.
    """
    K, V, size = theirs.config.num_codebooks, theirs.config.vocab_size, theirs.config.codec_config.frame_size
    g, spoken = torch.Generator().manual_seed(seed), []
    ids, waves, ends, frames = [], [], [], []
    for row in rows:
        ids.append([]), waves.append([]), ends.append([]), frames.append([])
        for letters, count in row:
            text = torch.randint(2, AUDIO, (letters,), generator=g).tolist()
            ids[-1] += text
            frames[-1] += [[0] * K + [t] for t in text]
            if count is not None:
                codes = torch.randint(0, V, (count, K), generator=g)
                waves[-1].append(torch.full((count * size,), float(len(spoken))))
                ends[-1].append(sum(map(len, waves[-1])))
                spoken.append(codes)
                ids[-1] += [AUDIO] * count + [AUDIO_END]
                frames[-1] += [c + [0] for c in codes.tolist() + [[0] * K]]
    theirs.codec_model.encode = lambda wave: SimpleNamespace(audio_codes=spoken[int(wave.flatten()[0])].T.unsqueeze(0))
    S, N, E = max(map(len, ids)), max(sum(map(len, w)) for w in waves), max(map(len, ends))
    inputs = {"input_ids": torch.tensor([[0] * (S - len(i)) + i for i in ids]),
              "attention_mask": torch.tensor([[0] * (S - len(i)) + [1] * len(i) for i in ids])}
    if N:
        inputs["input_values"] = torch.stack([torch.nn.functional.pad(torch.cat(w), (0, N - sum(map(len, w)))) for w in waves]).unsqueeze(1)
        inputs["input_values_cutoffs"] = torch.tensor([e + [-1] * (E - len(e)) for e in ends])
    batch = torch.tensor([[[0] * (K + 1)] * (S - len(f)) + f for f in frames])
    mask = torch.zeros_like(batch, dtype=torch.bool)
    voice = (inputs["input_ids"] == AUDIO) | (inputs["input_ids"] == AUDIO_END)
    mask[..., :K], mask[..., K] = voice.unsqueeze(-1), ~voice
    valid = inputs["attention_mask"].bool()
    none = torch.full_like(inputs["input_ids"], -1)
    return inputs, FrameBatch(batch, mask & valid.unsqueeze(-1), torch.where(valid, 0, -1), none, none)


ALONE = [[(7, 5), (4, 9), (6, 3)]]
THREE = [[(5, 4), (9, 11), (3, 6)], [(12, 2)], [(2, 8), (6, 5)]]


# ----------------------------------------------------------------------------- logits and losses

@pytest.mark.parametrize("rows", [ALONE, THREE], ids=["one", "three"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@torch.no_grad()
def test_logits_of_both_stages(geometry, rows):
    theirs = reference(geometry)
    model = ours_of(theirs)
    inputs, batch = conversations(theirs, rows)
    want = theirs(**inputs, output_hidden_states=True)
    valid, h = batch.turn >= 0, model(batch)
    got = model.c0_logits(h)
    assert (got - want.logits)[valid].abs().max() <= TOLERANCE and want.logits[valid].std() > 1
    codes = torch.randint(0, model.cfg.audio_vocab, (int(valid.sum()), model.cfg.num_codebooks))
    their_depth = theirs.depth_decoder(torch.nn.functional.pad(codes[:, :-1], (1, 0)), backbone_last_hidden_state=want.hidden_states[-1][valid]).logits
    depth = model.depth_logits(h[valid], codes)
    assert (depth - their_depth).abs().max() <= TOLERANCE and their_depth.std() > 1


@torch.no_grad()
def test_losses():
    theirs = reference("grouped queries")
    model = ours_of(theirs)
    inputs, batch = conversations(theirs, THREE)
    ids = inputs["input_ids"]
    want = theirs(**inputs, labels=torch.where((ids == AUDIO) | (ids == AUDIO_END), ids, -100))
    loss = model.loss(batch)
    assert loss["c0"][0] / loss["c0"][1] == pytest.approx(want.backbone_loss.item(), abs=1e-5)
    assert loss["depth"][0] / loss["depth"][1] == pytest.approx(want.depth_decoder_loss.item(), abs=1e-5)


@pytest.mark.parametrize("head_dim, old_contexts", [(64, (8192, 1024)), (128, (8192, 16))])
def test_rope_frequencies_are_theirs_to_the_bit(head_dim, old_contexts):
    """Also as the official config.json writes them: another context with the factors to match."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    for old in old_contexts:
        low, high = 1.0 * old / 8192, 4.0 * old / 8192
        rope = LLAMA3 | {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": old}
        config = transformers.CsmConfig(hidden_size=8 * head_dim, num_attention_heads=8, max_position_embeddings=16384, rope_parameters=rope)
        here = TransformerConfig(1, 8 * head_dim, 8, 8, 8, rope_low_freq=low, rope_high_freq=high, rope_old_context=old)
        assert torch.equal(rope_frequencies(head_dim, here), ROPE_INIT_FUNCTIONS["llama3"](config, None)[0])
        assert torch.equal(rope_frequencies(head_dim, here), rope_frequencies(head_dim, TransformerConfig(1, 8 * head_dim, 8, 8, 8)))


# ----------------------------------------------------------------------------- greedy generation

def their_codes(theirs, inputs, frames):
    """(B, T, K), T <= frames; the end frame included."""
    return theirs.generate(**inputs, do_sample=False, depth_decoder_do_sample=False, max_new_tokens=frames)


@torch.no_grad()
def our_codes(model, batch, frames):
    """The same from one state for all rows, on and on without regard to the end."""
    state = model.new_state(batch.B, batch.S + frames)
    h, made = model(batch, state)[:, -1], []
    for _ in range(frames):
        made.append(model.depth_generate(h, model.c0_logits(h).argmax(-1), lambda logits, k: logits.argmax(-1)))
        tokens = torch.nn.functional.pad(made[-1], (0, 1)).unsqueeze(1)
        mask = (torch.arange(tokens.shape[-1]) < tokens.shape[-1] - 1).expand_as(tokens)
        none = torch.full((batch.B, 1), -1)
        h = model(FrameBatch(tokens, mask, torch.zeros_like(none), none, none), state)[:, -1]
    return torch.stack(made, 1)


@pytest.mark.parametrize("geometry", ["grouped queries", "32 codebooks"])
def test_greedy_codes_after_conversations_of_different_length(geometry):
    theirs = reference(geometry)
    inputs, batch = conversations(theirs, [row + [(5, None)] for row in THREE])
    want = their_codes(theirs, inputs, 8)
    assert torch.equal(our_codes(ours_of(theirs), batch, 8), want) and want[:, :, 0].unique().numel() > 4


def make_zero(theirs, frame):
    """Rename the codes of each codebook so that `frame` becomes all zeros; an untouched entry is None. The model stays the same."""
    V, state = theirs.config.vocab_size, theirs.state_dict()
    table, c0, rest = state[csm_weights.TIED[0]], state["lm_head.weight"], state["depth_decoder.codebooks_head.weight"]
    for k, code in enumerate(frame):
        if code is not None:
            table[[k * V, k * V + code]] = table[[k * V + code, k * V]]
            where = c0 if k == 0 else rest[k - 1].T
            where[[0, code]] = where[[code, 0]]


def spoken(model, ids, frames):
    """generation.stream_turn, the path of every command, on the given text ids."""
    letters = SimpleNamespace(speak_prefix=lambda speaker, mood: [], encode=lambda text: ids[:-1], eot=ids[-1])
    cfg = SimpleNamespace(codebook_size=model.cfg.audio_vocab, num_semantic=model.cfg.num_semantic)
    codec = SimpleNamespace(cfg=cfg, decode_stream=lambda codes, state, semantic: (torch.ones(1, 1, 8), None))
    turn, greedy = generation.Turn(0, "x"), SamplingConfig(temperature=0, depth_temperature=0, max_seconds=frames / model.cfg.frame_rate + 0.01)
    chunks = list(generation.stream_turn(model, codec, letters, model.new_state(), turn, 0, greedy))
    assert len(chunks) == turn.num_frames
    return turn


@pytest.fixture(scope="module")
def endless():
    """A text, and the codes spoken on it by a model that knows no end."""
    theirs = reference("grouped queries", seed=3)
    inputs, _ = conversations(theirs, [[(9, None)]])
    codes = their_codes(theirs, inputs, 12)[0]
    firsts = [tuple(frame[:-1]) for frame in codes.tolist()]
    assert len(codes) == 12 and firsts.index(firsts[5]) == 5                     # what the tests below rest on
    return inputs, codes


def test_the_spoken_turn_is_theirs(endless):
    inputs, codes = endless
    turn = spoken(ours_of(reference("grouped queries", seed=3)), inputs["input_ids"][0].tolist(), 12)
    assert torch.equal(turn.codes.T, codes) and turn.end_reason == "max_seconds"


@pytest.mark.parametrize("end", [0, 5])
def test_a_frame_of_zeros_ends_the_turn(endless, end):
    """They return the end frame, we do not speak it; at frame 0 nothing is spoken at all."""
    inputs, codes = endless
    theirs = reference("grouped queries", seed=3)
    make_zero(theirs, codes[end].tolist())
    want = their_codes(theirs, inputs, 12)[0]
    turn = spoken(ours_of(theirs), inputs["input_ids"][0].tolist(), 12)
    assert len(want) == end + 1 and not want[end].any()
    assert torch.equal(turn.codes.T, want[:end]) and turn.end_reason == "eos" and turn.ended


def test_the_end_needs_all_codebooks_as_in_the_original(endless):
    """transformers 5.23 looks at all but the last codebook; the original implementation, and we, look at all."""
    inputs, codes = endless
    theirs = reference("grouped queries", seed=3)
    make_zero(theirs, [*codes[5, :-1].tolist(), None] if codes[5, -1] else [*codes[5, :-1].tolist(), 1])
    turn = spoken(ours_of(theirs), inputs["input_ids"][0].tolist(), 12)
    assert len(their_codes(theirs, inputs, 12)[0]) == 6
    assert turn.num_frames == 12 and not turn.codes[:-1, 5].any() and turn.codes[-1, 5] > 0


# ----------------------------------------------------------------------------- the official weights, where they are at hand

@pytest.mark.official
@pytest.mark.skipif("CSM_1B_PATH" not in os.environ, reason="set CSM_1B_PATH to the folder of sesame/csm-1b")
@torch.no_grad()
def test_golden_greedy_case_of_the_official_weights():
    """The codes that the original implementation gave for this sentence. Source: CSM_SPEC 3.7."""
    from tokenizers import Tokenizer

    import checkpoint
    path = Path(os.environ["CSM_1B_PATH"])
    model = checkpoint.load_model(path)
    assert sum(p.numel() for p in model.parameters()) == 1_552_791_552
    text = "<|begin_of_text|>[0]The past is just a story we tell ourselves.<|end_of_text|>"
    ids = Tokenizer.from_file(str(path / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    frames = spoken(model, ids, 40).codes.T
    assert frames.shape == (33, 32) and frames[:5, 0].tolist() == [1656, 366, 1343, 456, 456]
    assert frames[0].tolist() == json.loads("[1656,629,723,1785,206,1873,1059,1190,1833,240,618,350,156,109,2010,452,435,1764,77,654,1133,908,1095,74,804,494,"
                                            "1760,1343,1312,1464,1657,324]")
