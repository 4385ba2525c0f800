"Properties that hold for any input, searched by hypothesis."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_nbdev.classify.batches import kd_loss, split_batch, stream_positions, support_positions
from tiny_nbdev.core import seed_for
from tiny_nbdev.data.episodes import episode_sets, sample_episode
from tiny_nbdev.data.images import ImageSet, to_uint8
from tiny_nbdev.diffusion.blend import blend
from tiny_nbdev.diffusion.ddim import ddim_invert, ddim_sample, ddim_step, ddim_timesteps
from tiny_nbdev.diffusion.schedule import noise_schedule, sd_scheduler
from tiny_nbdev.errors import InputError

ABAR = noise_schedule(sd_scheduler().config)
quick = settings(max_examples=40, deadline=None)


def latents(seed, n=3, scale=1.0):
    return scale * torch.randn(n, 4, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@quick
@given(st.integers(0, 2**30), st.floats(0, 1), st.floats(0.01, 100))
def test_blend_norm_is_interpolated(seed, alpha, scale):
    z, n = latents(seed, scale=scale), latents(seed + 1)
    norm = lambda x: x.flatten(1).norm(dim=1)
    torch.testing.assert_close(norm(blend(z, n, alpha)), (1 - alpha) * norm(z) + alpha * norm(n))


@quick
@given(st.integers(0, 2**30))
def test_blend_ends(seed):
    z, n = latents(seed), latents(seed + 1)
    torch.testing.assert_close(blend(z, n, 0.0), z)
    torch.testing.assert_close(blend(z, n, 1.0), n)


@quick
@given(st.integers(0, 2**30), st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_blend_is_per_sample(seed, alphas):
    z, n = latents(seed), latents(seed + 1)
    whole = blend(z, n, torch.tensor(alphas, dtype=torch.float64))
    for i in range(3):
        torch.testing.assert_close(whole[i : i + 1], blend(z[i : i + 1], n[i : i + 1], alphas[i]))


@quick
@given(st.floats(allow_nan=True, allow_infinity=True).filter(lambda a: not 0 <= a <= 1))
def test_blend_refuses_other_alpha(alpha):
    with pytest.raises(InputError, match="alpha"):
        blend(latents(0), latents(1), alpha)


@quick
@given(st.integers(1, 1000), st.sampled_from(["trailing", "leading0"]))
def test_timesteps_descend_inside_the_schedule(n, spacing):
    ts = ddim_timesteps(n, spacing)
    assert len(ts) == n and all(a > b for a, b in zip(ts, ts[1:])) and 0 <= ts[-1] and ts[0] <= 999
    if spacing == "trailing":
        assert ts[0] == 999


@quick
@given(st.integers(0, 2**30), st.integers(0, 999), st.integers(0, 999))
def test_move_there_and_back(seed, a, b):
    z, eps = latents(seed), latents(seed + 1)
    torch.testing.assert_close(ddim_step(ddim_step(z, a, b, eps, ABAR), b, a, eps, ABAR), z, rtol=1e-9, atol=1e-9)


@quick
@given(st.integers(0, 2**30), st.integers(1, 60))
def test_ddim_round_trip_with_noise_that_depends_on_time_only(seed, n_steps):
    table = torch.randn(1000, 1, 4, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise = lambda z, t, i: table[t].expand_as(z)
    ts = ddim_timesteps(n_steps)
    z0 = latents(seed)
    path = ddim_invert(noise, z0, ts, ABAR)
    assert path.shape == (n_steps + 1, *z0.shape) and torch.equal(path[0], z0)
    torch.testing.assert_close(ddim_sample(noise, path[-1], ts, ABAR), z0, rtol=1e-9, atol=1e-9)


@quick
@given(st.integers(1, 400), st.integers(1, 3))
def test_batch_parts_are_equal_and_whole(batch, n_sources):
    parts = split_batch(batch, n_sources)
    assert sum(parts) == batch and len(parts) == n_sources and max(parts) - min(parts) <= 1


def test_batch_parts_of_the_paper():
    assert [split_batch(150, n) for n in (1, 2, 3)] == [[150], [75, 75], [50, 50, 50]]


@quick
@given(st.integers(1, 60), st.integers(1, 120), st.integers(0, 50))
def test_support_slots_are_balanced(n, batch_share, step):
    counts = torch.bincount(support_positions(n, batch_share, step, 0, "support"), minlength=n)
    assert counts.sum() == batch_share
    # with more images than slots a step may cross from one shuffled pass into the next and meet an image again
    assert counts.max() - counts.min() <= (1 if batch_share >= n else 2)


@quick
@given(st.integers(1, 50), st.integers(1, 70), st.integers(0, 5))
def test_stream_covers_everything_before_repeating(n, batch_share, seed):
    steps = -(-n // batch_share) + 1
    seen = torch.cat([stream_positions(n, batch_share, s, seed, "synthetic") for s in range(steps)])
    assert sorted(seen[:n].tolist()) == list(range(n))


@quick
@given(st.integers(0, 2**30), st.floats(0.5, 8), st.floats(-50, 50))
def test_kd_is_a_divergence(seed, temperature, shift):
    g = torch.Generator().manual_seed(seed)
    s, t = torch.randn(2, 6, 5, generator=g, dtype=torch.float64)
    assert kd_loss(s, t, temperature) >= 0
    assert abs(kd_loss(t + shift, t, temperature)) < 1e-9


@quick
@given(st.integers(2, 6), st.integers(1, 4), st.one_of(st.none(), st.integers(1, 3)), st.integers(0, 1000))
def test_episodes_are_disjoint_and_repeatable(n_way, n_shot, n_query, index):
    images = ImageSet(torch.zeros(80, 3, 2, 2, dtype=torch.uint8), torch.arange(80) % 8, tuple("abcdefgh"))
    e = sample_episode(images, "s", index, n_way, n_shot, n_query)
    assert e == sample_episode(images, "s", index, n_way, n_shot, n_query)
    used = [i for g in (*e.support, *e.query) for i in g]
    assert len(set(e.classes)) == n_way and len(used) == len(set(used))
    support, query = episode_sets(images, e)
    assert support.counts() == [n_shot] * n_way and query.counts() == [n_query or 10 - n_shot] * n_way


@quick
@given(
    st.lists(st.one_of(st.integers(), st.text(), st.floats(allow_nan=False)), min_size=1, max_size=4),
    st.text(min_size=1),
)
def test_seeds_tell_names_apart(parts, more):
    assert seed_for(*parts) == seed_for(*parts) != seed_for(*parts, more)
    assert 0 <= seed_for(*parts) < 2**63


@quick
@given(st.integers(0, 2**30))
def test_eight_bits_keep_an_image(seed):
    x = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    s = ImageSet(to_uint8(x), torch.zeros(2, dtype=torch.long), ("a",))
    assert (s.floats() - x).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(to_uint8(s.floats()), s.images)
