"""Corpora by Lhotse's recipes, on miniatures laid out exactly like the real ones: LibriSpeech, DailyTalk, AMI."""
import gzip
import json

import numpy as np
import pytest
import soundfile

import collect_data as cd
import corpora
from people_speech import LINES, spoken

pytest.importorskip("lhotse")


def speech(seconds, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(int(seconds * 16000))).astype(np.float32)


def librispeech(root):
    """LibriSpeech/PART/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NNNN.flac and SPEAKER-CHAPTER.trans.txt in capitals."""
    for part, speaker, chapter, count in (("train-clean-5", 19, 198, 30), ("train-clean-5", 26, 495, 2), ("dev-clean-2", 84, 121123, 3)):
        folder = root / "LibriSpeech" / part / str(speaker) / str(chapter)
        folder.mkdir(parents=True)
        for k in range(count):
            soundfile.write(folder / f"{speaker}-{chapter}-{k:04d}.flac", speech(0.5, k), 16000)
        (folder / f"{speaker}-{chapter}.trans.txt").write_text("".join(f"{speaker}-{chapter}-{k:04d} UTTERANCE NUMBER {'ONE TWO'.split()[k % 2]}\n" for k in range(count)))
    return root / "LibriSpeech"


def daily_talk(root):
    """dailytalk/metadata.json and data/DIALOGUE/UTTERANCE_SPEAKER_dDIALOGUE.wav."""
    meta = {}
    for dialogue, count in (("0", 3), ("7", 12)):
        meta[dialogue] = {}
        folder = root / "dailytalk/data" / dialogue
        folder.mkdir(parents=True)
        for k in range(count):
            soundfile.write(folder / f"{k}_{k % 2}_d{dialogue}.wav", spoken()[k % 6] if dialogue == "0" else speech(0.5, k), 24000 if dialogue == "0" else 16000)
            meta[dialogue][str(k)] = {"index": f"{dialogue}-{k}", "speaker": k % 2, "text": LINES[k % 6], "turn": k, "topic": "x", "emotion": "no emotion", "act": "inform", "dialog_idx": int(dialogue), "utterance_idx": k}
    (root / "dailytalk/metadata.json").write_text(json.dumps(meta))
    return root / "dailytalk"


def ami(root):
    """wav_db/MEETING/audio/MEETING.Headset-N.wav and ami_public_manual_1.6.2 with meetings, segments and words in XML; a meeting of each part."""
    notes, nite = root / "ami_public_manual_1.6.2", 'xmlns:nite="http://nite.sourceforge.net/"'
    for folder in ("corpusResources", "segments", "words"):
        (notes / folder).mkdir(parents=True)
    said = {"A": [("1.0", "2.0", "Good"), ("2.0", "2.6", "morning"), ("6.0", "6.5", "Okay")], "B": [("2.4", "3.0", "Hello"), ("3.0", "3.5", "there")]}
    spans, listed = {"A": [(1.0, 2.6), (6.0, 6.5)], "B": [(2.4, 3.5)]}, ""
    for meeting in ("ES2002a", "ES2003a", "ES2004a"):
        audio = root / "wav_db" / meeting / "audio"
        audio.mkdir(parents=True)
        for n in range(2):
            soundfile.write(audio / f"{meeting}.Headset-{n}.wav", speech(12, n), 16000)
        speakers = "".join(f'<speaker nite:id="{meeting}_{a}" nxt_agent="{a}" global_name="{name}" channel="{c}"/>' for a, name, c in (("A", "MEE006", 0), ("B", "FEE005", 1)))
        listed += f'<meeting observation="{meeting}" nite:id="{meeting}">{speakers}</meeting>'
        for agent in "AB":
            segments = "".join(f'<segment nite:id="s{k}{agent}" transcriber_start="{a}" transcriber_end="{b}"/>' for k, (a, b) in enumerate(spans[agent]))
            words = "".join(f'<w nite:id="w{k}{agent}" starttime="{a}" endtime="{b}">{w}</w>' for k, (a, b, w) in enumerate(said[agent]))
            (notes / f"segments/{meeting}.{agent}.segments.xml").write_text(f"<nite:root {nite}>{segments}</nite:root>")
            (notes / f"words/{meeting}.{agent}.words.xml").write_text(f"<nite:root {nite}>{words}</nite:root>")
    (notes / "corpusResources/meetings.xml").write_text(f"<nite:root {nite}>{listed}</nite:root>")
    return root


MINIATURES = {"librispeech": librispeech, "daily_talk": daily_talk, "ami": ami}


def collect(name, corpus, out, *flags):
    return cd.main(["--source", name, "--path", str(corpus), "--output", str(out), "--no_filters", "--listen", "never", *flags])


def cuts(out):
    found = {}
    for split in cd.SPLITS:
        with gzip.open(out / "manifests" / split / "cuts.jsonl.gz", "rt", encoding="utf-8") as file:
            found |= {cut["id"]: cut | {"split": split} for cut in map(json.loads, file)}
    return found


def test_chapters_of_librispeech_are_conversations_with_oneself(tmp_path, capsys):
    assert collect("librispeech", librispeech(tmp_path), tmp_path / "out") == 0
    found = cuts(tmp_path / "out")
    assert {k: (len(c["supervisions"]), c["split"]) for k, c in found.items()} == {"19-198-p00": (24, "train"), "19-198-p01": (6, "train"), "26-495": (2, "train"), "84-121123": (3, "validation")}
    turns = found["84-121123"]["supervisions"]
    assert [t["text"] for t in turns] == ["utterance number one", "utterance number two", "utterance number one"] and {t["speaker"] for t in turns} == {"84"}
    assert [round(t["start"], 2) for t in turns] == [0.0, 0.8, 1.6] and turns[0]["custom"]["licence"] == "CC BY 4.0"
    said = capsys.readouterr().out
    assert "2,484" in said and "CC BY 4.0" in said                          # shown before anything is read


def test_dialogues_of_daily_talk_are_put_together_again(tmp_path):
    assert collect("daily_talk", daily_talk(tmp_path), tmp_path / "out") == 0
    found = cuts(tmp_path / "out")
    assert {k: len(c["supervisions"]) for k, c in found.items()} == {"dailytalk-0": 3, "dailytalk-7": 12}
    turns = found["dailytalk-7"]["supervisions"]                            # in the order of the turns, not of the names (10 comes before 2 there)
    assert [t["text"][:8] for t in turns] == [LINES[k % 6].lower()[:8] for k in range(12)] and [t["custom"]["speaker_index"] for t in turns] == [0, 1] * 6
    assert turns[0]["custom"]["licence"] == "CC BY-SA 4.0"


def test_meetings_of_ami_keep_channels_words_and_overlaps(tmp_path):
    assert collect("ami", ami(tmp_path), tmp_path / "out") == 0
    found = cuts(tmp_path / "out")
    assert {k: c["split"] for k, c in found.items()} == {"ES2002a": "train", "ES2003a": "validation", "ES2004a": "test"}
    cut = found["ES2002a"]
    turns = [(t["speaker"], t["text"], round(t["start"], 2), round(t["duration"], 2)) for t in cut["supervisions"]]
    assert turns == [("MEE006", "good morning", 0.0, 1.6), ("FEE005", "hello there", 1.4, 1.1), ("MEE006", "okay", 5.0, 0.5)]
    assert cut["supervisions"][1]["custom"]["alignment"]["words"] == [[0, 5, pytest.approx(0.0), pytest.approx(0.6)], [6, 11, pytest.approx(0.6), pytest.approx(1.1)]]
    own, rate = soundfile.read(tmp_path / "out" / cut["supervisions"][1]["custom"]["turn_audio"])
    import audio_io
    channel = audio_io.resample(speech(12, 1)[int(2.4 * 16000):int(3.5 * 16000)], 16000, 24000)
    assert np.corrcoef(own, channel[:len(own)])[0, 1] > 0.99               # her own headset


def test_several_sources_share_the_hours_and_go_on(tmp_path):
    for name, make in MINIATURES.items():
        make(tmp_path / "all" / name) if name == "ami" else make(tmp_path / "make" / name).rename((tmp_path / "all").mkdir(exist_ok=True) or tmp_path / "all" / name)
    flags = ["--sources", ",".join(MINIATURES), "--path", str(tmp_path / "all"), "--output", str(tmp_path / "out"), "--no_filters", "--listen", "never"]
    assert cd.main(flags) == 0
    found = cuts(tmp_path / "out")
    assert {c["custom"]["engine"] for c in found.values()} == set(MINIATURES) and "librispeech-84-121123" in found
    before = (tmp_path / "out/index.jsonl").read_bytes()
    assert cd.main(flags) == 0 and (tmp_path / "out/index.jsonl").read_bytes() == before
    assert cd.main([*flags, "--output", str(tmp_path / "few"), "--target_hours", "0.006"]) == 0       # 7.2 s of each
    few = {name: sum(c["duration"] for c in cuts(tmp_path / "few").values() if c["custom"]["engine"] == name) for name in MINIATURES}
    assert 5 < few["ami"] and few["daily_talk"] > 7 and sum(few.values()) < sum(c["duration"] for c in found.values())


def test_a_folder_that_is_another_corpus(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name in MINIATURES:
        assert collect(name, tmp_path / "empty", tmp_path / "out") == 2
        assert f"is not the {name} corpus" in capsys.readouterr().err
    assert collect("librispeech", tmp_path / "nowhere", tmp_path / "out") == 2 and "--path" in capsys.readouterr().err


def test_no_network_offers_what_needs_none(tmp_path, monkeypatch, capsys):
    from lhotse import recipes
    asked = []

    def download(target, **how):
        asked.append(how)
        raise ConnectionError("network is unreachable")
    monkeypatch.setattr(recipes, "download_librispeech", download)
    assert cd.main(["--source", "librispeech", "--target_hours", "5", "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert "--source synthetic --target_hours 5" in said.err and "network is unreachable" in said.err and said.err.count("\n") == 1
    assert asked == [{"dataset_parts": "mini_librispeech"}] and "0.5" in said.out             # the smallest part that is enough, and its size
    assert corpora.wanted_part("librispeech", 300) == ("train-clean-360", 23) and corpora.wanted_part("vctk", 3) == (None, 11)
    assert cd.main(["--source", "fisher_english", "--output", str(tmp_path / "out")]) == 2 and "by hand" in capsys.readouterr().err


def test_a_full_disk_is_said_before_anything_is_fetched(tmp_path, monkeypatch, capsys):
    import runtime
    from lhotse import recipes
    monkeypatch.setattr(runtime, "free_disk_mb", lambda folder: 50_000.0)
    monkeypatch.setattr(recipes, "download_librispeech", lambda *a, **k: pytest.fail("fetched"))
    assert cd.main(["--source", "librispeech", "--target_hours", "900", "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "GB are needed and 50.0 GB are free" in said and "--target_hours" in said and "--output" in said
    assert corpora.needed_gigabytes("librispeech", 900, fetch=False) == pytest.approx(180)


def test_the_table_names_recipes_of_lhotse(capsys):
    assert set(corpora.CORPORA) <= set(corpora.known_recipes())
    assert cd.main(["corpora"]) == 0
    said = capsys.readouterr().out
    assert "daily_talk" in said and "by hand" in said and "more recipes" in said
