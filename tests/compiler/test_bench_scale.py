"""`hif4c bench scale`: what it says of a process and of a disk is so."""

import pytest

from hif4c.compiler import bench_disk
from hif4c.compiler.bench_disk import cached_bytes, drop_cached, measure_disk
from hif4c.compiler.bench_scale import ScaleOptions, _run, measure_scale
from hif4c.runtime.errors import Hif4Error
from hif4c.tools.bench_tables import scale_tables, to_markdown
from tests.support.checkpoints import write_diffusers_model


def ignore(event, value):
    pass


def test_the_page_cache_is_seen_and_emptied(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20) + b"odd")
    assert cached_bytes([path]) == path.stat().st_size
    drop_cached([path])
    assert cached_bytes([path]) == 0
    with path.open("rb") as file:
        file.read(8192)
    assert 0 < cached_bytes([path]) <= path.stat().st_size


def test_the_disk_is_measured_and_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_disk, "WRITE_LIMIT", 32 << 20)
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 4096 + b"odd")
    rates = measure_disk([path], tmp_path)
    assert (rates.read_bytes, rates.written_bytes) == (path.stat().st_size, 32 << 20)
    # Nothing that holds a file system is slower than 100 kB/s or faster than 1 TB/s.
    assert all(1e5 < rate < 1e12 for rate in (rates.read, rates.read_direct, rates.write_direct) if rate is not None)
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
    with pytest.raises(Hif4Error, match="cannot be written"):
        measure_disk([path], path)


def test_a_stage_is_measured(artifacts):
    """An artifact that is loaded and run once in a process of its own, with a cold page cache."""
    path = artifacts("ti2v", "rtn")
    files = [item for item in path.rglob("*") if item.is_file()]
    drop_cached(files)
    stage = _run(
        "forward", files, ignore, stage="forward", artifact=str(path), expert="transformer", latent="2x4x6", text=5
    )
    assert stage.result == {"finite": True}
    assert [part.name for part in stage.parts] == [
        "starting", "loading transformer", "first step of 12 tokens", "second step of 12 tokens",
    ]  # fmt: skip
    assert sum(part.seconds for part in stage.parts) == pytest.approx(stage.seconds)
    assert stage.cached == 0
    weights = (path / "transformer" / "weights.safetensors").stat().st_size
    assert weights <= sum(part.read for part in stage.parts) <= stage.read
    # torch alone is 100 MB, and this small model adds nothing to speak of.
    assert 1e8 < stage.parts[1].resident <= stage.peak < 2e9
    assert stage.together > 1e8


def test_a_stage_that_fails_is_a_sentence(tmp_path):
    with pytest.raises(Hif4Error, match=r"verify: the process failed \(.*manifest.json"):
        _run("verify", [], ignore, stage="verify", artifact=str(tmp_path))


@pytest.mark.slow
def test_a_whole_run(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_disk, "WRITE_LIMIT", 32 << 20)
    write_diffusers_model(tmp_path / "small", "t2v", experts=1)
    options = ScaleOptions(str(tmp_path / "small"), layers=1, latent="1x4x4", text=5)
    result = measure_scale(options, tmp_path / "run", ignore)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"small-1-layers", "small-1-layers-rtn.hif4"}
    assert [stage.name for stage in result.stages] == ["compile, rtn", "verify", "forward, transformer"]
    assert result.stages[1].result == {"passed": True}
    text = "".join(map(to_markdown, scale_tables(result)))
    for words in ("capturing transformer", "packing transformer", "verifying in a fresh process", "second step"):
        assert words in text
    with pytest.raises(Hif4Error, match="already exists"):
        measure_scale(options, tmp_path / "run", ignore)
