"""Calls come from what the pipeline really does: its own steps, or clips noised to the timesteps of its steps."""

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from hif4c.compiler import calibration_inputs as module
from hif4c.compiler.calibration_calls import StoredCalls
from hif4c.compiler.calibration_inputs import ClipFile, calls_from_clips, calls_from_trajectory, find_clips
from hif4c.compiler.locate import locate_model
from hif4c.compiler.tiny.world import render_batch
from hif4c.runtime.errors import Hif4Error
from hif4c.runtime.media import save_clip
from hif4c.runtime.pipeline import load_components
from hif4c.runtime.sampling import SamplingSettings, decode_latents
from tests.support.forked_ranks import in_ranks
from tests.support.tiny import write_short_tiny

PROMPTS = ["a red triangle moving left on a black background", "a blue ring moving up on a white background"]
SETTINGS = SamplingSettings(height=32, width=32, frames=9, steps=4, guidance=5.0, text_tokens=32)
LATENTS = (8, 5, 8, 8)  # of wan-tiny: 32 x 32 pixels in 9 frames
BOUNDARY = 875


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_short_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def pipeline(model):
    return load_components(str(model), "WanPipeline")


@pytest.fixture
def without_experts(model):
    return load_components(str(model), "WanPipeline", without_experts=True)


@pytest.fixture(scope="module")
def config(model):
    return locate_model(str(model)).configs["transformer"]


def timesteps(pipeline, steps):
    """Those of the schedule, of each expert."""
    pipeline.scheduler.set_timesteps(steps)
    values = [float(value) for value in pipeline.scheduler.timesteps]
    return {
        "transformer": [value for value in values if value >= BOUNDARY],
        "transformer_2": [value for value in values if value < BOUNDARY],
    }


@torch.no_grad()  # with gradients torch takes another attention kernel
def embed(pipeline, texts):
    found, _ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=32)
    return found.to(torch.bfloat16)


def levels(calls):
    return [call.noise_level for call in calls]


def same(a, b):
    return all(torch.equal(*pair) for pair in zip(a.inputs, b.inputs, strict=True))


# ---------------------------------------------------------------------------------------------------------- trajectory


@pytest.fixture(scope="module")
def trajectory(pipeline, tmp_path_factory):
    return calls_from_trajectory(pipeline, PROMPTS, SETTINGS, tmp_path_factory.mktemp("calls"), seed=5, batch=1)


def test_each_expert_is_called_at_its_timesteps_for_caption_and_empty_prompt(pipeline, trajectory):
    served = timesteps(pipeline, 4)
    assert all(served.values())
    for name, calls in trajectory.items():
        # Two prompts, one after the other; each step asks for the caption and for the empty prompt.
        assert levels(calls) == [value for _ in PROMPTS for value in served[name] for _ in range(2)]
    everything = [call for name in ("transformer", "transformer_2") for call in trajectory[name]]
    empty = embed(pipeline, [""])
    for number, prompt in enumerate(PROMPTS):
        text = embed(pipeline, [prompt])
        assert not torch.equal(text, empty)
        for calls in trajectory.values():
            mine = calls[number * len(calls) // 2 : (number + 1) * len(calls) // 2]
            assert all(torch.equal(call.encoder_hidden_states, text) for call in mine[::2])
            assert all(torch.equal(call.encoder_hidden_states, empty) for call in mine[1::2])
    assert len(everything) == 2 * 2 * 4


def test_calls_hold_what_the_pipeline_computes(pipeline, trajectory):
    """The first latents are the noise of the seed; the second ones are one step of the scheduler away."""
    noise = torch.randn(1, *LATENTS, generator=torch.Generator().manual_seed(5))
    conditional, unconditional = trajectory["transformer"][:2]
    for call in (conditional, unconditional):
        assert torch.equal(call.hidden_states, noise.bfloat16())
    with torch.no_grad():
        yes, no = (
            pipeline.transformer(call.hidden_states, call.timestep, call.encoder_hidden_states, return_dict=False)[0]
            for call in (conditional, unconditional)
        )
    pipeline.scheduler.set_timesteps(4)
    pipeline.scheduler.set_begin_index(0)
    first = pipeline.scheduler.timesteps[0]
    after = pipeline.scheduler.step(no + 5.0 * (yes - no), first, noise, return_dict=False)[0]
    following = [call for calls in trajectory.values() for call in calls if call.noise_level < conditional.noise_level]
    assert any(torch.equal(call.hidden_states, after.bfloat16()) for call in following)


def test_a_batch_is_one_call(pipeline, trajectory, tmp_path):
    steps = []
    together = calls_from_trajectory(pipeline, PROMPTS, SETTINGS, tmp_path, seed=5, batch=16, on_step=steps.append)
    assert steps == [2] * 4
    assert {name: len(calls) for name, calls in together.items()} == {
        name: len(calls) // 2 for name, calls in trajectory.items()
    }
    first = together["transformer"][0]
    assert first.hidden_states.shape == (2, *LATENTS)
    # Clip i starts from the noise of seed + i, whatever the batch.
    alone = [call for call in trajectory["transformer"] if call.noise_level == first.noise_level][::2]
    assert torch.equal(first.hidden_states, torch.cat([call.hidden_states for call in alone]))


def test_without_guidance_there_is_no_empty_prompt(pipeline, tmp_path):
    settings = SamplingSettings(height=32, width=32, frames=5, steps=2, guidance=1.0, text_tokens=32)
    calls = calls_from_trajectory(pipeline, PROMPTS[:1], settings, tmp_path)
    text = embed(pipeline, PROMPTS[:1])
    assert sum(map(len, calls.values())) == 2
    assert all(torch.equal(call.encoder_hidden_states, text) for made in calls.values() for call in made)


def test_the_limit_keeps_some_of_the_calls_in_their_order(pipeline, trajectory, tmp_path):
    found = calls_from_trajectory(pipeline, PROMPTS, SETTINGS, tmp_path, seed=5, limit=3, batch=1)
    for name, calls in found.items():
        places = [next(i for i, other in enumerate(trajectory[name]) if same(call, other)) for call in calls]
        assert len(places) == min(3, len(trajectory[name]))
        assert places == sorted(set(places))
    assert len(list(tmp_path.iterdir())) == sum(map(len, found.values()))


def test_ranks_sample_their_batches_and_keep_the_same_calls(pipeline, tmp_path):
    """Two prompts over three ranks: the last one samples nothing. One thread each, so that bits can be compared."""

    def work(ranks):
        folder = tmp_path / str(ranks.count)
        folder.mkdir(exist_ok=True)
        found = calls_from_trajectory(pipeline, PROMPTS, SETTINGS, folder, seed=5, limit=3, batch=1, ranks=ranks)
        return {name: calls.places for name, calls in found.items()}

    (alone,) = in_ranks(1, work)
    assert in_ranks(3, work) == [alone] * 3
    assert files_in(tmp_path / "3") == files_in(tmp_path / "1")


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_pipeline_is_left_as_it_was(pipeline, trajectory):
    assert not pipeline.transformer._forward_pre_hooks
    assert not pipeline.transformer_2._forward_pre_hooks


def test_no_prompt(pipeline, tmp_path):
    with pytest.raises(Hif4Error, match="needs at least one prompt"):
        calls_from_trajectory(pipeline, [], SETTINGS, tmp_path)


def test_the_trajectory_of_a_size_that_does_not_fit(pipeline, tmp_path):
    settings = SamplingSettings(height=36, width=32, frames=9, steps=2, guidance=5.0)
    with pytest.raises(Hif4Error, match="height 36: must be a positive multiple of 8"):
        calls_from_trajectory(pipeline, PROMPTS, settings, tmp_path)
    assert not pipeline.transformer._forward_pre_hooks


# --------------------------------------------------------------------------------------------------------------- clips

RED_TRIANGLE_BLACK_LEFT, BLUE_RING_WHITE_UP = [0, 0, 0, 0], [2, 2, 2, 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two clips that show what their captions say, as mp4 and gif."""
    folder = tmp_path_factory.mktemp("clips")
    rendered = render_batch(np.array([RED_TRIANGLE_BLACK_LEFT, BLUE_RING_WHITE_UP]), np.random.default_rng(0))
    for name, frames, caption in zip(("a", "b"), rendered, PROMPTS, strict=True):
        save_clip(frames, folder / f"{name}.mp4", fps=8)
        (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")
    (folder / "a.gif").unlink()
    (folder / "b.mp4").unlink()
    return folder


@pytest.fixture(scope="module", autouse=True)
def encode_once():
    """The VAE takes most of the time: a clip of one size is encoded once for all tests."""
    encode, made = module._encode, {}

    def encode_or_remember(pipeline, video):
        key = video.numpy().tobytes()
        if key not in made:
            made[key] = encode(pipeline, video)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_encode", encode_or_remember)
        yield


@pytest.fixture(scope="module")
def clips(folder):
    return find_clips(folder)


@pytest.fixture(scope="module")
def noised(pipeline, clips, config, tmp_path_factory):
    return calls_from_clips(pipeline, clips, SETTINGS, config, tmp_path_factory.mktemp("calls"), seed=1, limit=8)


def test_clips_are_found_with_their_captions(folder, clips):
    assert clips == [ClipFile(folder / "a.mp4", PROMPTS[0]), ClipFile(folder / "b.gif", PROMPTS[1])]


def test_noised_clips_lie_at_the_timesteps_of_each_expert(pipeline, noised):
    for name, values in timesteps(pipeline, 4).items():
        # Eight calls over the expert's steps, from the first to the last, each step as often as the others.
        share = 8 // len(values)
        assert levels(noised[name]) == [value for value in values for _ in range(share)][:8]
        for call in noised[name]:
            assert call.hidden_states.shape == (1, *LATENTS)
            assert call.hidden_states.dtype == call.encoder_hidden_states.dtype == torch.bfloat16
            assert call.timestep.shape == (1,)


def test_each_clip_comes_with_its_caption_and_with_the_empty_prompt(pipeline, noised):
    texts = [embed(pipeline, [text]) for text in (*PROMPTS, "")]
    for calls in noised.values():
        found = [
            next(i for i, text in enumerate(texts) if torch.equal(text, call.encoder_hidden_states)) for call in calls
        ]
        assert found == [0, 2, 2, 1, 0, 2, 2, 1]  # clips a b a b ...


def test_every_third_clip_comes_with_both_prompts_too(pipeline, clips, config, tmp_path):
    three = [clips[0], clips[1], clips[0]]
    calls = calls_from_clips(pipeline, three, SETTINGS, config, tmp_path, limit=6)["transformer"]
    empty = embed(pipeline, [""])
    found = [torch.equal(call.encoder_hidden_states, empty) for call in calls]
    assert found == [False, True, False, True, False, True]


def test_without_guidance_every_call_has_its_caption(pipeline, clips, config, tmp_path):
    settings = SamplingSettings(height=32, width=32, frames=9, steps=4, guidance=1.0, text_tokens=32)
    calls = calls_from_clips(pipeline, clips, settings, config, tmp_path, limit=4)["transformer_2"]
    texts = [embed(pipeline, [text]) for text in PROMPTS]
    assert all(torch.equal(call.encoder_hidden_states, texts[i % 2]) for i, call in enumerate(calls))


def test_latents_are_noised_as_the_scheduler_would(pipeline, clips, config, tmp_path):
    """x_t = (1 - s) x_0 + s e, where x_0 decodes to the clip and e is standard normal and new in every call."""
    settings = SamplingSettings(height=32, width=32, frames=9, steps=20, guidance=1.0, text_tokens=32)
    calls = calls_from_clips(pipeline, clips[:1], settings, config, tmp_path, limit=6)
    last = calls["transformer_2"][-1]
    sigma = last.noise_level / 1000
    assert 0.05 < sigma < 0.3
    # At the last step the clip is nearly there: without the noise's share it decodes to what was written.
    frames = torch.from_numpy(decode_latents(pipeline, last.hidden_states.float() / (1 - sigma))[0])
    shown = torch.from_numpy(iio.imread(clips[0].path, plugin="pyav")[:, 4::8, 4::8]).float() / 255
    assert frames.shape == shown.shape == (9, 32, 32, 3)
    assert (frames - shown).square().mean() < 0.1 * (shown - shown.mean()).square().mean()

    # Two calls have the same x_0, so each pair gives x_0 and e; over all of them e is standard normal.
    everything = [call for made in calls.values() for call in made]
    clean = _clean_latents(pipeline, shown)
    noises = []
    for call in everything:
        sigma = call.noise_level / 1000
        if sigma > 0.3:  # below, bf16 and the video codec's error in x_0 weigh more
            noises.append(((call.hidden_states.float() - (1 - sigma) * clean) / sigma).flatten())
    assert len(noises) > 6
    for index, noise in enumerate(noises):
        # 2560 samples: five standard errors are .1 of the mean and .07 of the deviation.
        assert abs(float(noise.mean())) < 0.1
        assert abs(float(noise.std()) - 1) < 0.1
        for other in noises[:index]:
            assert abs(float(torch.corrcoef(torch.stack([noise, other]))[0, 1])) < 0.1


def _clean_latents(pipeline, frames):
    """Normalized latents of frames [F, H, W, 3] in 0..1, by the VAE's own configuration."""
    video = frames.permute(3, 0, 1, 2)[None] * 2 - 1
    with torch.no_grad():
        mean = pipeline.vae.encode(video).latent_dist.mode()
    shift, scale = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (pipeline.vae.config.latents_mean, pipeline.vae.config.latents_std)
    )
    return (mean - shift) / scale


def test_another_seed_is_other_noise(pipeline, clips, config, noised, tmp_path):
    other = calls_from_clips(pipeline, clips, SETTINGS, config, tmp_path, seed=2, limit=2)
    assert not torch.equal(other["transformer"][0].hidden_states, noised["transformer"][0].hidden_states)


def test_the_experts_need_not_be_loaded(without_experts, clips, config, noised, tmp_path):
    """Only the VAE, the text encoder and the scheduler are used; equal seeds give equal calls."""
    assert without_experts.transformer is without_experts.transformer_2 is None
    done = []
    found = calls_from_clips(without_experts, clips, SETTINGS, config, tmp_path, seed=1, limit=8, on_call=done.append)
    for name, calls in noised.items():
        assert all(same(a, b) for a, b in zip(calls, found[name], strict=True))
    assert done == [1] * 16


def test_ranks_make_the_same_calls_of_clips(without_experts, clips, config, noised, tmp_path):
    def work(ranks):
        done = []
        calls_from_clips(
            without_experts, clips, SETTINGS, config, tmp_path, seed=1, limit=8, ranks=ranks, on_call=done.append
        )
        return len(done)

    assert in_ranks(3, work) == [6, 6, 4]
    for name, calls in noised.items():
        found = StoredCalls(tmp_path, name, calls.places)
        assert all(same(a, b) for a, b in zip(calls, found, strict=True))


def test_an_expert_without_a_step_gets_no_call(pipeline, clips, config, tmp_path):
    settings = SamplingSettings(height=32, width=32, frames=9, steps=1, guidance=1.0, text_tokens=32)
    calls = calls_from_clips(pipeline, clips, settings, config, tmp_path, limit=3)
    assert len(calls["transformer"]) == 3
    assert len(calls["transformer_2"]) == 0


def test_a_timestep_for_every_token(without_experts, clips, config, tmp_path):
    """Wan2.2-TI2V-5B with text only: all tokens have the same noise; one expert serves all timesteps."""
    without_experts.register_to_config(expand_timesteps=True, boundary_ratio=None)
    calls = calls_from_clips(without_experts, clips[:1], SETTINGS, config, tmp_path, limit=4)
    assert list(calls) == ["transformer"]
    assert levels(calls["transformer"]) == [value for part in timesteps(without_experts, 4).values() for value in part]
    for call in calls["transformer"]:
        assert torch.equal(call.timestep, torch.full((1, 5 * 4 * 4), call.noise_level))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frames": 33}, "a.mp4: has 9 frames; 33 are needed"),
        ({"frames": 8}, "frames 8: must be a multiple of 2, plus one"),
        ({"height": 36}, "height 36: must be a positive multiple of 8"),
    ],
)
def test_clips_that_do_not_fit(pipeline, clips, config, changes, words, tmp_path):
    values = {"height": 32, "width": 32, "frames": 9, "steps": 4, "guidance": 5.0, "text_tokens": 32, **changes}
    with pytest.raises(Hif4Error, match=words):
        calls_from_clips(pipeline, clips, SamplingSettings(**values), config, tmp_path)


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webm"])
@pytest.mark.parametrize("content", [b"", b"not a video at all"])
def test_a_file_that_is_no_video(pipeline, config, tmp_path, suffix, content):
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(Hif4Error, match=rf"bad\{suffix}: cannot be read as a video"):
        calls_from_clips(pipeline, [ClipFile(path, "a")], SETTINGS, config, tmp_path, limit=1)


def test_a_truncated_video(pipeline, config, folder, tmp_path):
    path = tmp_path / "cut.mp4"
    path.write_bytes((folder / "a.mp4").read_bytes()[:2000])
    with pytest.raises(Hif4Error, match=r"cut\.mp4: (cannot be read as a video|has \d frames)"):
        calls_from_clips(pipeline, [ClipFile(path, "a")], SETTINGS, config, tmp_path, limit=1)


def test_folders_without_clips(folder, tmp_path):
    with pytest.raises(Hif4Error, match=r"nothing: no such folder; it should hold clips"):
        find_clips(tmp_path / "nothing")
    with pytest.raises(Hif4Error, match=r"a\.txt: no such folder"):
        find_clips(folder / "a.txt")
    with pytest.raises(Hif4Error, match=r"holds no clip; put videos there \(\.mp4, "):
        find_clips(tmp_path)
    (tmp_path / "x.MP4").touch()
    with pytest.raises(Hif4Error, match=r"x\.MP4: has no caption; write it to x\.txt beside it"):
        find_clips(tmp_path)
    (tmp_path / "x.txt").write_bytes(b"caf\xe9")
    with pytest.raises(Hif4Error, match=r"x\.MP4: has no caption; .* as UTF-8 text"):
        find_clips(tmp_path)
    (tmp_path / "x.txt").write_text("café", encoding="utf-8")
    assert [clip.caption for clip in find_clips(tmp_path)] == ["café"]
