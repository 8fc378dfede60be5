"""Answers on topic, and people's voices: the score on planted meanings, what the responder may know, and the whole of it with an untrained model."""
import json

import numpy as np
import pytest

import benchmark
import benchmark_replies as replies
import synthetic_conversations as synthetic
import test_benchmark

data, weights, judges = test_benchmark.data, test_benchmark.weights, test_benchmark.judges


def meanings(texts):
    """A direction per text, the same for the same text."""
    rows = np.stack([np.random.default_rng(abs(hash(t)) % 2 ** 32).normal(size=24) for t in texts])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_on_topic_is_nearer_to_the_own_answer():
    written = meanings([f"answer {i}" for i in range(12)])
    good, bad = replies.on_topic(written, written), replies.on_topic(np.roll(written, 1, 0), written)
    assert good["on_topic"]["mean"] == 1.0 and good["cosine"]["mean"] == pytest.approx(1.0) and bad["on_topic"]["mean"] < 0.7
    same = replies.on_topic(np.repeat(written[:1], 12, 0), written)              # one answer to everything is no answer
    assert same["on_topic"]["mean"] == pytest.approx(0.5, abs=0.1)


def test_prompts_are_turns_that_an_assistant_answers():
    found = replies.prompts_of("test", 60, 0)
    assert len(found) == 60 and all(p["history"][-1][0] != "assistant" for p in found)
    dialogues = [[t["text"] for t in d["turns"]] for d in synthetic.dialogues()["test"]]
    places = [next(n for n, texts in enumerate(dialogues) if p["answer"] in texts and p["history"][-1][1] in texts) for p in found]
    assert max(places.count(n) for n in places) <= 2 and replies.prompts_of("test", 60, 0) == found != replies.prompts_of("test", 60, 1)


def test_the_responder_does_not_know_the_answers():
    known = {turn["text"] for _, turn, _ in replies.responder_without("test", "retrieval")._loaded[0].pairs}
    answers = {t["text"] for d in synthetic.dialogues()["test"] if d.get("kind") == "assistant" for t in d["turns"] if t["speaker"] == "assistant"}
    others = {t["text"] for d in synthetic.dialogues()["train"] if d.get("kind") == "assistant" for t in d["turns"] if t["speaker"] == "assistant"}
    assert len(known & others) > 1000 and not known & (answers - others)


def test_the_whole_of_it(data, weights, judges, tmp_path, monkeypatch, capsys):
    import audio_io
    import judges as judge
    monkeypatch.setattr(judge, "sentence_embeddings", meanings)
    for number in range(2):
        audio_io.write_audio(tmp_path / "people" / f"{number}.wav", 0.1 * np.sin(np.arange(48000) * 0.05 * (1 + number)).astype(np.float32))
        (tmp_path / "people" / f"{number}.txt").write_text("please say the name of the person")
    result = test_benchmark.run(capsys, "replies", "--data", data, "--codec", weights / "codec", "--checkpoint", weights / "nano", "--prompts", 3, "--turns", 2, "--threads", 1,
                                "--recordings", tmp_path / "people", "--save", tmp_path / "said", "--results", tmp_path / "R.md")
    assert set(result["answers"]["responders"]) == {"retrieval", "model", "written"} and result["answers"]["n"] == 3 and result["people"]["made"]["n"] == 2
    lines = [json.loads(line) for line in (tmp_path / "said" / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and set(lines[0]) == {"asked", "written", "retrieval", "model"}
    text = (tmp_path / "R.md").read_text()
    assert "on topic" in text and "recordings of a person" in text and benchmark.read_results(tmp_path / "R.md")["replies"] == result


def test_bad_input_is_one_line(data, weights, tmp_path, capsys):
    assert benchmark.main(["replies", "--data", str(data), "--codec", str(weights / "codec"), "--checkpoint", str(weights / "nano"), "--prompts", "1", "--results", str(tmp_path / "R.md")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --prompts 1") and error.count("\n") == 1
