"""The engine bench: its figures on made-up arrivals, and the whole of it with an untrained model."""
import pytest

import benchmark
import benchmark_engine as bench
import test_benchmark
from test_benchmark import run

data, weights = test_benchmark.data, test_benchmark.weights


def test_in_time_is_what_a_listener_notices():
    assert bench.in_time([0.5, 0.5, 0.6, 0.7], 0.08) and bench.in_time([3.0], 0.08)
    assert not bench.in_time([0.5, 0.55, 0.67], 0.08)                          # the third is due at 0.66


def test_figures_of_a_way():
    runs = [{"arrivals": [[0.1, 0.15, 0.4], [0.2, 0.25]], "frames": 5, "seconds": 0.5, "cpu": 0.2}, {"arrivals": [[0.3]], "frames": 1, "seconds": 0.5, "cpu": 0.1}]
    found = bench.summed(runs, 0.08)
    assert (found["frames"], found["streams"], found["in_time"]) == (6, 3, 2)
    assert found["frames_per_second"] == pytest.approx(6) and found["cpu_ms_per_frame"] == pytest.approx(50)
    assert found["worst_gap_ms"] == pytest.approx(250) and found["first_sound_ms"]["p50"] == pytest.approx(200)


def test_the_whole_section(tmp_path, data, weights, capsys, monkeypatch):
    monkeypatch.setattr(bench, "STAGGER", 0.01)
    monkeypatch.setattr(bench, "EARLY", 2)
    result = run(capsys, "engine", "--data", data, "--codec", weights / "codec", "--checkpoint", weights / "nano", "--turns", 2, "--sessions", "1,3", "--repeats", 1, "--long", 4,
                 "--results", tmp_path / "R.md")
    one, three = result["rows"]
    assert (one["sessions"], three["sessions"]) == (1, 3) and three["at_once"]["frames"] == three["one_after_another"]["frames"] == three["joining"]["frames"] > 3
    assert three["at_once"]["streams"] == 3 and 0 < one["cpu_ratio"] and three["at_once"]["worst_gap_ms"] > 0
    assert result["hearing"]["turns"] == 2 and result["hearing"]["streamed_ms"]["p50"] > 0 and result["long"]["turns"] == 4 and result["long"]["positions"] > 0
    text = (tmp_path / "R.md").read_text()
    assert "## Many conversations at once" in text and benchmark.read_results(tmp_path / "R.md")["engine"] == result
    assert bench.body_of(result | {"long": None}).count("conversations of") == 0
