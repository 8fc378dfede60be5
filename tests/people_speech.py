"""Two characters of the embedded speech synthesis in conversation, for the tests of people's recordings."""
import functools

import numpy as np

LINES = ("Did you find the keys that I left on the kitchen table?", "No, I looked everywhere and there was nothing at all.", "Then they must be in the car.",
         "Let me go down and have a look for you.", "Thank you, that is very kind of you.", "It is no trouble, I was going out anyway.")


@functools.lru_cache(maxsize=1)
def spoken(lines=LINES) -> list[np.ndarray]:
    """Sound (n,) at 24 kHz of each line; even lines a high, odd lines a low voice."""
    import synthetic_conversations as sc
    voices = sc.Character("high", "hibari", size=1.07, pitch=1.0), sc.Character("low", "hibari", size=0.74, pitch=-2.5)
    return [trimmed(sc.speak(line, voices[k % 2], seed=k).audio) for k, line in enumerate(lines)]


def trimmed(audio: np.ndarray) -> np.ndarray:
    on = np.flatnonzero(np.abs(audio) > 0.02 * np.abs(audio).max())
    return audio[on[0]:on[-1] + 1]


def conversation(gaps=(0.4, 0.3, -0.3, 0.5, 0.2), rate=24000, noise=1e-4, lead=0.5, leak=0.0):
    """(2, n) sound with a voice per channel, and its turns (start, end, channel, text). A gap below zero is an overlap; leak: amplitude of
    each voice in the other's channel."""
    parts, clock, turns = spoken(), lead, []
    for k, part in enumerate(parts):
        clock += gaps[k - 1] if k else 0.0
        turns.append((clock, clock + len(part) / rate, k % 2, LINES[k]))
        clock = turns[-1][1]
    sound = np.random.default_rng(0).normal(0, noise, (2, int((clock + 0.5) * rate))).astype(np.float32)
    for (start, _, channel, _), part in zip(turns, parts):
        at = int(start * rate)
        sound[channel, at:at + len(part)] += part
        sound[1 - channel, at:at + len(part)] += leak * part
    return sound, turns
