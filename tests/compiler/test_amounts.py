import subprocess
import sys

import pytest

from hif4c.compiler.amounts import format_bytes, format_seconds
from hif4c.compiler.memory_use import peak_rss


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (28.594e9, "28.6 GB"), (8_442_000_000, "8.4 GB"),
        (999_960_000, "1.0 GB"), (141.56e6, "142 MB"), (2.5e12, "2.5 TB"),
    ],
)  # fmt: skip
def test_bytes(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (252, "4 min 12 s"),
        (3599.6, "1 h 00 min"), (46_800, "13 h 00 min"), (48 * 3600 - 31, "47 h 59 min"), (48 * 3600, "2 days 0 h"),
    ],
)  # fmt: skip
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_peak_memory_counts_children_and_not_who_started_it():
    """This process holds torch, far more than 100 MB; a bare interpreter takes some 20 MB and must not inherit ours."""
    code = (
        "import subprocess, sys; from hif4c.compiler.memory_use import peak_rss; own = peak_rss();"
        "subprocess.run([sys.executable, '-c', 'bytearray(200 * 2**20)'], check=True); print(own, peak_rss())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own, with_child = map(int, result.stdout.split())
    assert 5e6 < own < 100e6
    assert 200 * 2**20 < with_child < 300e6
    assert peak_rss() > 100e6
