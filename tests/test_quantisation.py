"""Fewer bits: the same integers as on the disk, products near the float32 ones, a whole model that still speaks, plain refusals."""
import copy
import json

import pytest
import torch

import checkpoint
import quantisation
from architecture import CSM
from config import OFF, CodecConfig, SamplingConfig, TransformerConfig, model_preset, to_dict
from generation import Session, Turn, generate_slow
from quantisation import KERNELS, Int4, Product, Wide, WeightOnly, quantise
from rvq_tokenizer import Codec
from text_tokenizer import ByteTokenizer

TINY_CODEC = CodecConfig(num_codebooks=8, num_semantic=4, codebook_size=64, width=16, latent=16, encoder_layers=1,
                         latent_layers=1, decoder_layers=3, num_mels=20, num_low_bins=16, num_bands=20)
HERE = [kind for kind in (*KERNELS.values(), Wide, Int4) if quantisation._works(kind)]
LIMIT = {"Wide": 0.01, "WeightOnly": 0.012, "Dynamic": 0.03, "Rounded": 0.01, "Int4": 0.15}      # relative error of a product of normal numbers


def make_model(**overrides):
    model = CSM(model_preset("test", **{"depth": TransformerConfig(2, 64, 128, 2, 1, max_positions=64)} | overrides))
    model.init_weights(torch.Generator().manual_seed(0), open_gates=True)
    return model.eval()


@pytest.fixture(scope="module")
def plain():
    return make_model()


@pytest.fixture()
def hidden(plain):
    return torch.randn(40, plain.cfg.backbone.width)


# ----------------------------------------------------------------------------- single matrices

def test_stored_rows_keep_their_integers():
    """checkpoint.py's int8 rows, read back as float32, are quantised to the same integers and scales."""
    q, scale = checkpoint.quantise_rows(torch.randn(50, 64) * torch.logspace(-2, 1, 50)[:, None])
    again, new = quantisation.rows_int8(q.float() * scale.float())
    assert torch.equal(again, q) and torch.allclose(new, scale[:, 0].float(), rtol=1e-6)


@pytest.mark.parametrize("kind", HERE, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("rows, out", [(1, 96), (5, 100)])
def test_products_are_near(kind, rows, out):
    size = torch.logspace(-1, 1, out)                       # rows of very different size, each with its own scale
    weight, x = torch.randn(out, 64) * size[:, None], torch.randn(rows, 64)
    want, got = x @ weight.T, kind(weight)(x)
    error = ((got - want) / size).norm() / (want / size).norm()
    assert got.shape == want.shape and got.dtype == torch.float32 and 1e-5 < error < LIMIT[kind.__name__], error


def test_int4_rounds_within_half_a_step():
    weight = torch.randn(16, 96)
    q, scale, offset = quantisation.groups_int4(weight)
    back = (q.view(16, 3, 32) - 8) * scale.T[..., None] + offset.T[..., None]
    assert q.min() >= 0 and q.max() <= 15 and ((back - weight.view(16, 3, 32)).abs() <= 0.6 * scale.T[..., None]).all()


def test_sizes_are_counted():
    weight = torch.randn(128, 64)
    assert Product(weight).nbytes == 4 * weight.numel() and Wide(weight).nbytes == 2 * weight.numel()
    if Int4 in HERE:
        assert Int4(weight).nbytes <= 0.7 * weight.numel()
    assert WeightOnly(weight).nbytes < 1.3 * weight.numel()


def test_rows_of_a_batch_do_not_touch_each_other():
    if WeightOnly not in HERE:
        pytest.skip("no such operator here")
    product, x = WeightOnly(torch.randn(96, 64)), torch.randn(5, 64)
    assert torch.equal(product(x), torch.cat([product(row[None]) for row in x]))


# ----------------------------------------------------------------------------- a whole model

@pytest.mark.parametrize("overrides", [{}, OFF], ids=["ours", "csm"])
@pytest.mark.parametrize("precision, limit", [("fp32", 1e-5), ("bf16", 0.03), ("int8", 0.03), ("int4-depth", 0.03)])
def test_a_model_in_every_precision(precision, limit, overrides):
    """Hidden states and logits stay near; what is made of them is made with the new weights."""
    model, other = make_model(**overrides), make_model(**overrides)
    note = quantise(other, precision)
    from generation import text_rows
    rows, h = text_rows([1, 2, 3, 258], model.cfg, 0), torch.randn(40, model.cfg.backbone.width)
    codes = torch.randint(1, 65, (40, 8))
    with torch.inference_mode():
        want, got = model(rows), other(rows)
        assert (got - want).norm() / want.norm() < limit, note
        a, b = model.depth_logits(h, codes), other.depth_logits(h, codes)
        spread = (b - a).norm() / a.norm()
        assert spread < (0.3 if precision == "int4-depth" else limit) and (precision == "fp32" or spread > 0)
    assert other.precision == precision and not any(isinstance(m, torch.nn.Linear) and m.weight.numel() >= quantisation.SMALL for m in other.backbone.modules()) == (precision != "fp32")


@pytest.mark.parametrize("table", [2 ** 25, 0], ids=["table", "no table"])
def test_the_depth_decoder_generates_with_the_quantised_weights(plain, hidden, table, monkeypatch):
    """Step by step and teacher forced agree within the quantised model, at nearly every code; the float32 model's codes differ somewhere."""
    monkeypatch.setattr("architecture.FoldedDepth.TABLE", table)
    model = make_model()
    quantise(model, "int8")
    greedy, c0 = lambda logits, k: logits.argmax(-1), torch.full((40,), 3)
    with torch.inference_mode():
        codes, float_codes = (m.depth_generate(hidden, c0, greedy) for m in (model, plain))
        forced = model.depth_logits(hidden, codes).argmax(-1)
    assert (forced == codes[:, 1:]).float().mean() > 0.95
    assert 0.5 < (codes == float_codes).float().mean() < 1


def test_streaming_in_int8_is_the_slow_path_in_int8():
    torch.manual_seed(0)
    model, codec, tokenizer = make_model(), Codec(TINY_CODEC).eval(), ByteTokenizer()
    quantise(model, "int8")
    greedy = SamplingConfig(temperature=0.0, depth_temperature=0.0, max_seconds=1.0)
    turn = Session(model, codec, tokenizer, greedy).say(0, "hello there.")
    codes, _ = generate_slow(model, codec, tokenizer, None, Turn(0, "hello there."), 0, greedy)
    assert turn.num_frames > 1 and torch.equal(turn.codes, codes)


def test_laying_out_keeps_every_number(plain):
    model = copy.deepcopy(plain)
    quantise(model, "fp32")
    weight = model.backbone.layers[0].mlp.w2.weight
    assert weight.t().is_contiguous() and not weight.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), model.state_dict().values()))


# ----------------------------------------------------------------------------- refusals

def test_refusals(plain):
    with pytest.raises(ValueError, match="--precision"):
        quantise(make_model(), "int3")
    with pytest.raises(ValueError, match="--device cpu"):
        quantise(copy.deepcopy(plain).to("meta"), "int8")
    model = make_model()
    quantise(model, "int8")
    with pytest.raises(ValueError, match="already"):
        quantise(model, "bf16")
    with pytest.raises(ValueError, match="before quantise"):
        model.state_dict()


def test_without_an_operator_the_rounded_weights_are_multiplied_in_float32(plain, monkeypatch):
    monkeypatch.setattr(quantisation, "_works", lambda kind: False)
    model, wanted = make_model(), make_model()
    note = quantise(model, "int4-depth")
    assert "no int8 operator" in note and "no int4 operator" in note
    for name, module in wanted.named_modules():
        large = isinstance(module, torch.nn.Linear) and (module.weight.numel() >= quantisation.SMALL or name.endswith(("attn.k_proj", "attn.v_proj")))
        if large and not name.startswith("memory_writer"):
            q, scale = quantisation.rows_int8(module.weight)
            module.weight.data = q * scale[:, None]
    from generation import text_rows
    rows = text_rows([5, 6, 7], plain.cfg, 0)
    with torch.inference_mode():
        torch.testing.assert_close(model(rows), wanted(rows))


# ----------------------------------------------------------------------------- files and the demo

def test_the_file_says_what_to_compute_in(plain, tmp_path):
    saved = tmp_path / "best.pt"
    checkpoint.save_training(saved, config=to_dict(plain.cfg), model=plain.state_dict())
    assert checkpoint.main(["--checkpoint", str(saved), "--output", str(tmp_path / "small"), "--quantise", "int8"]) == 0
    assert json.loads((tmp_path / "small" / "config.json").read_text())["precision"] == "int8"
    assert (tmp_path / "small" / checkpoint.WEIGHTS).stat().st_size < 0.5 * sum(v.nbytes for v in plain.state_dict().values())
    loaded = checkpoint.load_model(tmp_path / "small")
    assert loaded.wanted_precision == "int8" and loaded.precision == "fp32"
    import demo
    words = demo.build_parser().parse_args([])
    note = demo.make_fast(loaded, words, SamplingConfig(), 64)
    assert loaded.precision == "int8" and "int8" in note and "attention" in note
    asked = checkpoint.load_model(tmp_path / "small")
    demo.make_fast(asked, demo.build_parser().parse_args(["--precision", "fp32", "--speculative", "int8"]), SamplingConfig(), 64)
    assert asked.precision == "fp32" and asked.frame_codes is not None
    with pytest.raises(ValueError, match="choose one"):
        demo.make_fast(asked, demo.build_parser().parse_args(["--compile_depth", "--speculative", "int8"]), SamplingConfig(), 64)
