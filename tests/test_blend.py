"Blending keeps the interpolated norm, for each sample by itself."

import torch
from fastcore.test import expect_fail

from tiny_nbdev.diffusion.blend import blend, sample_norm
from tiny_nbdev.errors import InputError


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_ends_and_norms():
    z_T, n = normal(4, 4, 8, 8) * 1.3, normal(4, 4, 8, 8, seed=1)
    torch.testing.assert_close(blend(z_T, n, 0), z_T, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(blend(z_T, n, 1), n, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(
        blend(9 * z_T, n, 1.0), n, rtol=1e-15, atol=1e-15
    )  # at 1 the inverted latent has no influence
    for a in [0, 0.2, 0.5, 0.77, 1]:
        torch.testing.assert_close(
            sample_norm(blend(z_T, n, a)), (1 - a) * sample_norm(z_T) + a * sample_norm(n), rtol=1e-14, atol=0
        )


def test_every_sample_by_itself():
    z_T, n = normal(4, 4, 8, 8) * 1.3, normal(4, 4, 8, 8, seed=1)
    z_T[2] *= 10
    alpha = torch.tensor([0.0, 0.3, 0.6, 1.0])
    together = blend(z_T, n, alpha)
    for i in range(4):
        torch.testing.assert_close(
            together[i : i + 1], blend(z_T[i : i + 1], n[i : i + 1], alpha[i].item()), rtol=1e-7, atol=1e-7
        )
    torch.testing.assert_close(blend(n, -n, 0.5), torch.zeros_like(n), rtol=0, atol=1e-12)  # no division by zero
    assert not blend(z_T * 0, n, 0.3).isnan().any()
    for wrong in [-0.1, 1.1, float("nan"), torch.tensor([0.0, 2.0, 0.0, 0.0])]:
        with expect_fail(InputError, contains="expected numbers in [0, 1]"):
            blend(z_T, n, wrong)
    with expect_fail(InputError, contains="one per sample"):
        blend(z_T, n, torch.tensor([0.5, 0.5]))
    with expect_fail(InputError, contains="differ in shape"):
        blend(z_T, n[:1], 0.5)
