"""Public speech corpora by Lhotse's recipes: what they hold, whether they fit on the disk, and their recordings as conversations.

    for item in conversations("daily_talk", corpus_folder("daily_talk", given, target, hours)): ...

The table says what is remembered of each corpus, unchecked against its publisher's page; what is not known here is None. Any of Lhotse's recipes works by its name,
in the table or not. Lhotse downloads (goes on where it stopped), checks and reads; this module groups what it returns: utterances of
a dialogue or a chapter that lie in files of their own become one conversation again.
"""
from __future__ import annotations

import difflib
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator

import runtime

PART_NAMES = {"train": ("train",), "validation": ("valid", "dev"), "test": ("test", "eval")}   # in the part names of corpora
LARGEST_GROUP = 24            # utterances of a chapter that make one conversation
OUTPUT_GB_PER_HOUR = 0.2      # 24 kHz FLAC, each turn and the whole conversation
ARCHIVE_AND_FILES = 2.0       # while it is unpacked a corpus lies there twice


@dataclass(frozen=True)
class Corpus:
    """What is known of a corpus before it is fetched."""
    hours: float | None
    speakers: int | None
    licence: str
    gigabytes: float | None         # to download
    what: str
    parts: tuple[tuple[str, float, float], ...] = ()     # (name, hours, gigabytes) that can be fetched alone, smallest first


CORPORA = {
    "ami": Corpus(100, None, "CC BY 4.0", 46, "meetings of four, a headset each"),
    "callhome_english": Corpus(None, None, "LDC", None, "telephone calls between friends, two channels"),
    "chime6": Corpus(50, 48, "CC BY-SA 4.0", None, "dinner parties of four, far microphones"),
    "commonvoice": Corpus(None, None, "CC0 1.0", None, "sentences read by volunteers"),
    "daily_talk": Corpus(20, 2, "CC BY-SA 4.0", 6, "written dialogues spoken by two people in a studio"),
    "earnings22": Corpus(119, None, "CC BY-SA 4.0", None, "earnings calls, many accents"),
    "ears": Corpus(100, 107, "CC BY-NC 4.0", None, "anechoic, many speaking styles, some free speech"),
    "edacc": Corpus(40, None, "CC BY-SA 4.0", None, "video calls between friends, many accents"),
    "fisher_english": Corpus(1960, 11971, "LDC", None, "telephone calls between strangers, two channels"),
    "gigaspeech": Corpus(10000, None, "by agreement with its publishers", None, "audio books, podcasts, videos"),
    "hifitts": Corpus(292, 10, "CC BY 4.0", 41, "audio books"),
    "icsi": Corpus(72, 53, "CC BY 4.0", None, "meetings, a headset each"),
    "librispeech": Corpus(982, 2484, "CC BY 4.0", 60.6, "audio books", (("mini_librispeech", 7, 0.46), ("train-clean-100", 101, 6.3), ("train-clean-360", 364, 23), ("librispeech", 982, 60.6))),
    "libritts": Corpus(585, 2456, "CC BY 4.0", 83, "audio books, with punctuation"),
    "librittsr": Corpus(585, 2456, "CC BY 4.0", 83, "the same, cleaned by a network"),
    "ljspeech": Corpus(24, 1, "public domain", 2.6, "audio books"),
    "mls": Corpus(44659, 5490, "CC BY 4.0", None, "audio books (figures of the English part)"),
    "oto_speech": Corpus(141, None, "see its page", None, "conversations in full duplex, a channel each"),
    "peoples_speech": Corpus(30000, None, "CC BY 4.0 and CC BY-SA 4.0", None, "talk from the internet"),
    "sbcsae": Corpus(20, None, "CC BY-ND 3.0", None, "everyday conversations"),
    "switchboard": Corpus(260, 543, "LDC", None, "telephone calls between strangers, two channels"),
    "tedlium": Corpus(452, 2028, "CC BY-NC-ND 3.0", 50, "talks"),
    "this_american_life": Corpus(637, 6608, "for research", None, "radio interviews and stories"),
    "timit": Corpus(5.4, 630, "LDC", None, "sentences read"),
    "vctk": Corpus(44, 110, "CC BY 4.0", 11, "sentences read, many accents"),
    "voxpopuli": Corpus(543, 1313, "CC0 1.0", None, "speeches in parliament (figures of the English part)"),
}


# ----------------------------------------------------------------------------- what there is

def _lhotse():
    try:
        from lhotse import recipes
    except ImportError as error:
        raise ValueError(f"the package lhotse cannot be imported ({error}): run python setup_environment.py") from None
    return recipes


def known_recipes() -> list[str]:
    return sorted(f[8:] for f in dir(_lhotse()) if f.startswith("prepare_"))


def recipe(name: str) -> tuple[Callable | None, Callable]:
    """(download or None, prepare) of a Lhotse recipe. ValueError with near names for an unknown one."""
    recipes, known = _lhotse(), known_recipes()
    if name not in known:
        near = difflib.get_close_matches(name, [*known, "synthetic", "folder", "record"], 3)
        raise ValueError(f"unknown source {name!r}: use synthetic, folder, record or a Lhotse recipe{' such as ' + ', '.join(near) if near else ''} "
                         f"({len(known)} are known: python collect_data.py corpora)")
    return getattr(recipes, f"download_{name}", None), getattr(recipes, f"prepare_{name}")


def licence(name: str) -> str:
    return CORPORA[name].licence if name in CORPORA else f"of the corpus {name}"


def wanted_part(name: str, hours: float) -> tuple[str | None, float | None]:
    """The smallest part that holds `hours`, for corpora that come in parts, and its gigabytes; else (None, the whole corpus's)."""
    corpus = CORPORA.get(name)
    if corpus is None or not corpus.parts:
        return None, corpus.gigabytes if corpus else None
    part, _, size = next((p for p in corpus.parts if p[1] >= hours), corpus.parts[-1])
    return part, size


def table(names: list[str] | None = None, hours: float | None = None) -> str:
    """Lines of hours, speakers, licence and size; of all recipes in the table where no names are given."""
    def show(value, form="{:,.0f}"):
        return "?" if value is None else form.format(value)
    lines = [f"{'source':20s} {'hours':>8s} {'speakers':>8s} {'GB':>6s}  {'licence':34s} what"]
    for name in names or sorted(CORPORA):
        corpus = CORPORA.get(name, Corpus(None, None, "see its page", None, "a recipe of Lhotse"))
        size = wanted_part(name, hours)[1] if hours else corpus.gigabytes
        fetched = "" if recipe(name)[0] else "; to be got by hand"
        lines.append(f"{name:20s} {show(corpus.hours):>8s} {show(corpus.speakers):>8s} {show(size, '{:.1f}'):>6s}  {corpus.licence:34s} {corpus.what}{fetched}")
    lines.append("hours, speakers, GB and licences are from memory: the corpus's own page decides")
    if names is None:
        others = [n for n in known_recipes() if n not in CORPORA]
        lines.append(f"and {len(others)} more recipes of Lhotse: {', '.join(others)}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------- onto the disk

def needed_gigabytes(name: str, hours: float, fetch: bool = True) -> float:
    """Disk that `hours` of a corpus take: the download, its files beside it while it is unpacked, and what is written from them."""
    size = wanted_part(name, hours)[1]
    if size is None:
        size = 0.15 * (CORPORA[name].hours if name in CORPORA and CORPORA[name].hours else hours)
    return (ARCHIVE_AND_FILES * size if fetch else 0.0) + OUTPUT_GB_PER_HOUR * hours


def check_disk(names: dict[str, float], given: str, target: Path) -> None:
    """ValueError where the disk of `target` cannot hold what is to come. names: source -> hours of it."""
    need = sum(needed_gigabytes(name, hours, fetch=not given) for name, hours in names.items())
    free = runtime.free_disk_mb(target) / 1000
    if need > free:
        raise ValueError(f"{', '.join(names)}: about {need:.1f} GB are needed and {free:.1f} GB are free where {target} is: lower --target_hours, "
                         "name another disk with --output, or use --source synthetic (0.2 GB an hour)")


def corpus_folder(name: str, given: str, target: Path, hours: float) -> Path:
    """The corpus on the disk: `given`, or GIVEN/NAME, or downloaded by the recipe into `target`. ValueError that offers a way on."""
    download, _ = recipe(name)
    if given:
        folder = Path(given) / name if (Path(given) / name).is_dir() else Path(given)
        if not folder.is_dir():
            raise ValueError(f"no folder {given}: give the folder of the corpus with --path")
        return folder
    if download is None:
        raise ValueError(f"{name} cannot be downloaded by Lhotse (it needs a licence): get it by hand and give its folder with --path")
    target.mkdir(parents=True, exist_ok=True)
    part = wanted_part(name, hours)[0]
    try:
        found = download(target, dataset_parts=part) if part else download(target)
    except Exception as error:                                             # each recipe has its own way to fail without a network
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"cannot download {name} ({type(error).__name__}: {reason}): check the network and run again (what has arrived is kept), get it by hand and give its "
                         f"folder with --path, or collect without a network: python collect_data.py --source synthetic --target_hours {hours:g}") from None
    return Path(found) if found else target


# ----------------------------------------------------------------------------- conversations

@dataclass
class Conversation:
    """Recordings that belong together, in order; each with its supervisions. One long recording, or utterances in files of their own."""
    id: str
    split: str
    items: list[tuple] = field(default_factory=list)     # (lhotse Recording, [SupervisionSegment])


def _dialogue(recording, supervisions) -> tuple[str, tuple]:
    found = re.search(r"_d(\d+)$", recording.id)
    turn = (supervisions[0].custom or {}).get("turn", 0)
    return f"dailytalk-{found[1]}" if found else recording.id, (int(turn), recording.id)


def _chapter(mark: str):
    def key(recording, supervisions) -> tuple[str, tuple]:
        return mark.join(recording.id.split(mark)[:2]), (recording.id,)
    return key


GROUPING = {"daily_talk": _dialogue, "librispeech": _chapter("-"), "libritts": _chapter("_"), "librittsr": _chapter("_")}


def parts_of(found, name: str = "") -> Iterator[tuple]:
    """Yields (part name, recordings, supervisions) from whatever nesting a recipe returns."""
    if isinstance(found, tuple) and len(found) == 2:
        yield name, *found
    elif isinstance(found, dict) and "recordings" in found:
        if "supervisions" in found:
            yield name, found["recordings"], found["supervisions"]
    elif isinstance(found, dict):
        for key, value in found.items():
            yield from parts_of(value, f"{name}/{key}")


def held_out(names) -> dict[str, str]:
    """A split per conversation or speaker by its hash; from three names on, one at least validates and one tests."""
    order = sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    share = max(1, len(order) // 25) if len(order) >= 3 else 0
    return {name: "validation" if k < share else "test" if k < 2 * share else "train" for k, name in enumerate(order)}


def conversations(name: str, corpus: Path) -> Iterator[Conversation]:
    """The conversations of a corpus in order, those without a transcript left out. ValueError where the folder is another one."""
    _, prepare = recipe(name)
    try:
        parts = list(parts_of(prepare(corpus)))
    except Exception as error:
        raise ValueError(f"{corpus} is not the {name} corpus as Lhotse expects it ({' '.join(str(error).split())[:200]}): check --path") from None
    for part, recordings, supervisions in parts:
        named = next((split for split, keys in PART_NAMES.items() if any(k in part for k in keys)), None)
        yield from _grouped(name, named, recordings, supervisions)


def _grouped(name: str, named: str | None, recordings, supervisions) -> Iterator[Conversation]:
    """One part's conversations, by id; utterances of a group in their order, at most LARGEST_GROUP together."""
    said: dict[str, list] = {}
    for s in supervisions:
        said.setdefault(s.recording_id, []).append(s)
    grouping = GROUPING.get(name, lambda recording, _: (recording.id, (0,)))
    groups: dict[str, list] = {}
    for recording in recordings:
        if recording.id in said:
            key, order = grouping(recording, said[recording.id])
            groups.setdefault(key, []).append((order, recording, said[recording.id]))
    owner = {key: key if name in ("daily_talk",) else str(items[0][2][0].speaker) for key, items in groups.items()}
    splits = held_out(owner.values())
    for key in sorted(groups):
        items = [(recording, spoken) for _, recording, spoken in sorted(groups[key], key=lambda item: item[0])]
        for first in range(0, len(items), LARGEST_GROUP):
            safe = re.sub(r"[^A-Za-z0-9_.-]+", "-", key) + (f"-p{first // LARGEST_GROUP:02d}" if len(items) > LARGEST_GROUP else "")
            yield Conversation(safe, named or splits[owner[key]], items[first:first + LARGEST_GROUP])

