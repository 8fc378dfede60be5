"""Who answers: written dialogues, a tiny random language model of a folder, another server, and what goes wrong with them."""
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

import responders
from responders import make, messages

HISTORY = [("user", "Hello!"), ("assistant", "Good morning."), ("user", "I lost my keys.")]


def words(responder, history=HISTORY):
    return "".join(responder.stream(None, 1, history, "assistant"))


def test_names_on_the_command_line():
    assert make("retrieval").kind == "retrieval" and make("retrieval").on_model and make("command", "echo hi").kind == "command" and not make("command", "echo hi").on_model
    for bad in ("", "hf:", "openai:", "openai:ftp://x", "openai:file:///etc/passwd", "python:x", "model:x"):
        with pytest.raises(ValueError, match="--responder"):
            make(bad)
    with pytest.raises(ValueError, match="--responder_command"):
        make("command")


def test_a_command_reads_the_dialogue_and_answers():
    assert words(make("command", "tail -n 2")) == "user: I lost my keys.\nassistant:"
    with pytest.raises(ValueError, match="--responder_command"):
        words(make("command", "false"))


def test_written_replies_come_with_their_mood():
    class Session:
        model = type("Model", (), {"text_head": None})()
    found = list(make("retrieval").stream(Session(), 1, [("user", "How are you today?")], "assistant"))
    assert len(found) == 1 and len(found[0]) > 3 and isinstance(found[0], responders.Words)


def test_who_said_what():
    assert [m["role"] for m in messages(HISTORY, "assistant", "Be kind.")] == ["system", "user", "assistant", "user"]


# ----------------------------------------------------------------------------- a language model of a folder

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random language model over letters, with its tokenizer."""
    import torch
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    folder = tmp_path_factory.mktemp("lm")
    vocabulary = {letter: n for n, letter in enumerate(["<unk>", "<end>", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,:?!\n'"])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="<end>", clean_up_tokenization_spaces=False)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                                                  max_position_embeddings=400, eos_token_id=1, bos_token_id=None))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_language_model_streams_its_words(folder):
    responder = make(f"hf:{folder}")
    pieces = list(responder.stream(None, 1, HISTORY, "assistant"))
    assert len(pieces) > 3 and 0 < len("".join(pieces)) <= 2 * responders.REPLY_TOKENS
    ids = responder.prompt(HISTORY, "assistant")
    assert responder.tokenizer.decode(ids[0]).replace(" ", "").endswith("User:Ilostmykeys.\nAssistant:")


def test_a_language_model_is_stopped_when_nobody_listens(folder):
    responder = make(f"hf:{folder}")
    stream = responder.stream(None, 1, HISTORY, "assistant")
    next(stream)
    stream.close()
    assert not responder._lock.locked() and threading.active_count() < 20


def test_a_long_history_keeps_its_newest_part(folder):
    assert words(make(f"hf:{folder}"), [("user", "many words " * 200)])


def test_folders_that_are_none(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="no such folder"):
        make("hf:some/name-at-the-hub")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        make(f"hf:{tmp_path}")


# ----------------------------------------------------------------------------- another server

class Other(BaseHTTPRequestHandler):
    """A server that streams, or refuses, by its name of the model."""
    asked: list = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append((self.path, body, self.headers.get("authorization")))
        self.send_response({"refuses": 401, "moves": 302}.get(body["model"], 200))
        self.send_header("location", "http://127.0.0.1:9/")
        self.end_headers()
        if body["model"] == "talks":
            for line in ('{"choices": [{"delta": {"role": "assistant"}}]}', '{"choices": [{"delta": {"content": "They are "}}]}', "not json", '{"choices": []}', '{"choices": [{"delta": {"content": "here."}}]}', "[DONE]",
                         '{"choices": [{"delta": {"content": "never"}}]}'):
                self.wfile.write(f"data: {line}\n\n".encode())

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def other():
    server = HTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_another_server_is_asked_and_streamed(other, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "their-key")
    Other.asked.clear()
    assert list(make(f"openai:{other}", model_name="talks").stream(None, 1, HISTORY, "assistant")) == ["They are ", "here."]
    path, body, key = Other.asked[0]
    assert path == "/v1/chat/completions" and body["stream"] and body["messages"][-1] == {"role": "user", "content": "I lost my keys."} and key == "Bearer their-key"
    assert make(f"openai:{other}/v1", model_name="x").url == other + "/v1"


@pytest.mark.parametrize("name, why", [("refuses", "answered 401"), ("moves", "answered 302")])
def test_a_server_that_refuses_or_sends_elsewhere(other, name, why):
    with pytest.raises(ValueError, match=why):
        words(make(f"openai:{other}", model_name=name))


def test_a_server_that_is_not_there():
    with pytest.raises(ValueError, match="cannot be reached"):
        words(make("openai:http://127.0.0.1:9"))
