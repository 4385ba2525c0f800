"Batches that fit: found out, remembered, joined; what cannot be helped is said."

import os
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from tiny_nbdev.core import load_json, user_cache
from tiny_nbdev.diffusion import memory
from tiny_nbdev.diffusion.memory import (
    device_name,
    free_memory,
    in_batches,
    is_out_of_memory,
    map_batches,
    remember_batch,
    remembered_batch,
)
from tiny_nbdev.errors import InputError

x = torch.arange(20) ** 2


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    "A cache of its own for each test, and nothing remembered."
    monkeypatch.setenv("TINY_NBDEV_CACHE", str(tmp_path))
    monkeypatch.setattr(memory, "_known", {})


def test_which_errors_mean_no_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert all(
        is_out_of_memory(RuntimeError(text))
        for text in (
            "MPS backend out of memory (MPS allocated: 9.06 GB)",
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 9 bytes.",
        )
    )
    assert (
        not is_out_of_memory(RuntimeError("shape '[3]' is invalid"))
        and not is_out_of_memory(MemoryError())
        and not is_out_of_memory(KeyboardInterrupt())
    )
    free_memory()


def test_where_it_is_remembered(tmp_path):
    _known = memory._known
    assert user_cache() == tmp_path
    with (
        mock.patch.dict(os.environ, {"TINY_NBDEV_CACHE": "", "XDG_CACHE_HOME": "/c"}),
        mock.patch.object(sys, "platform", "linux"),
    ):
        assert user_cache() == Path("/c/tiny_nbdev") or os.name == "nt"
    with mock.patch.dict(os.environ, {"TINY_NBDEV_CACHE": ""}), mock.patch.object(sys, "platform", "darwin"):
        assert user_cache().parts[-3:] == ("Library", "Caches", "tiny_nbdev")
    assert remembered_batch("unet", "cpu") is None
    remember_batch("unet", "cpu", 12)
    remember_batch("decode", "cpu", 3)
    assert load_json(user_cache() / "batch_sizes.json") == {device_name("cpu"): dict(unet=12, decode=3)}
    _known.clear()
    assert remembered_batch("unet", "cpu") == 12 and remembered_batch("other", "cpu") is None
    for damage in ('{"half": ', "[1, 2]", '{"cpu": 7}', '{"%s": {"unet": "many", "decode": -3}}' % device_name("cpu")):
        (user_cache() / "batch_sizes.json").write_text(damage)
        _known.clear()
        assert remembered_batch("unet", "cpu") is None and remembered_batch("decode", "cpu") is None
    remember_batch("unet", "cpu", 5)
    _known.clear()
    assert remembered_batch("unet", "cpu") == 5, "a damaged file is written anew"
    with mock.patch.dict(
        os.environ, TINY_NBDEV_CACHE=f"{tmp_path}/batch_sizes.json/no"
    ):  # below a file there can be no folder
        remember_batch("unet", "cpu", 4)
        assert remembered_batch("unet", "cpu") == 4
    device_name("cpu")


def limited(limit, done, error=torch.OutOfMemoryError):
    "Squares numbers, at most `limit` at once."

    def fn(part):
        if part.stop - part.start > limit:
            raise error("CUDA out of memory.")
        done.append((part.start, part.stop))
        return torch.arange(part.start, part.stop) ** 2

    return fn


def test_halved_until_it_fits():
    _known = memory._known
    x, done = torch.arange(20) ** 2, []
    assert torch.equal(map_batches(limited(5, done), 20, "squares"), x)
    assert done == [(0, 5), (5, 10), (10, 15), (15, 20)] and remembered_batch("squares") == 5
    tried = []

    def counted(part):
        tried.append(part.stop - part.start)
        return limited(5, [])(part)

    assert torch.equal(map_batches(counted, 20, "squares"), x) and tried == [5] * 4, (
        "remembered: nothing fails any more"
    )
    _known.clear()
    tried.clear()
    assert torch.equal(map_batches(counted, 12, "squares"), x[:12]) and tried == [5, 5, 2], "in another process, too"
    assert (
        torch.equal(map_batches(limited(5, [], RuntimeError), 7, "words", start=7), x[:7])
        and remembered_batch("words") == 3
    )
    assert torch.equal(map_batches(limited(9, []), 20, "fits", start=8), x) and remembered_batch("fits") is None, (
        "only what was found out is remembered"
    )


def test_memory_runs_out_in_the_middle():
    done = []

    def shrinking(part):  # room for eight at first, later for two
        return limited(8 if part.start < 8 else 2, done)(part)

    assert (
        torch.equal(map_batches(shrinking, 20, "shrinking", start=8), x)
        and done == [(0, 8), *((i, i + 2) for i in range(8, 20, 2))]
        and remembered_batch("shrinking") == 2
    )

    pair = map_batches(lambda s: (x[s], -x[s]), 20, "pairs", start=3)
    assert torch.equal(pair[0], x) and torch.equal(pair[1], -x)
    assert list(in_batches(lambda s: s, 0, "none")) == []
    lazy = in_batches(limited(5, done := []), 20, "squares")
    next(lazy)
    assert done == [(0, 5)], "the next piece is only worked on when it is asked for"


def test_gradients_over_pieces():
    w = torch.randn(3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    a = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))

    def grad(part):
        if part.stop - part.start > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return torch.autograd.grad((a[part] @ w).square().sum(), w)[0]

    whole = torch.autograd.grad((a @ w).square().sum(), w)[0]
    torch.testing.assert_close(sum(in_batches(grad, 8, "gradients")), whole)


def message(call, kind=InputError):
    try:
        call()
    except kind as e:
        return str(e)
    raise AssertionError("nothing was raised")


def broken(part):
    raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_what_cannot_be_helped():
    assert (
        "one class" in message(lambda: map_batches(limited(0, []), 4, "nothing fits", what="class"))
        and remembered_batch("nothing fits") is None
    )
    assert "batch size of 0" in message(lambda: map_batches(lambda s: x[s], 4, "zero", start=0))

    assert "mat1" in message(lambda: map_batches(broken, 4, "broken"), RuntimeError)


def test_side_by_side():
    before, policy = torch.get_num_threads(), os.environ.get("OMP_WAIT_POLICY")
    torch.set_num_threads(3)
    os.environ["OMP_WAIT_POLICY"] = "passive"
    seen = []

    def square(part):
        seen.append((part.start, part.stop, torch.get_num_threads()))
        return x[part] ** 2, x[part]

    assert torch.equal(map_batches(square, 20, "shares", side_by_side="asleep")[0], x**2) and sorted(seen) == [
        (0, 6, 1),
        (6, 13, 1),
        (13, 20, 1),
    ]
    assert torch.equal(map_batches(square, 1, "shares", side_by_side=True)[1], x[:1]) and torch.equal(
        map_batches(square, 2, "shares", side_by_side=True)[1], x[:2]
    )
    assert (
        "mat1" in message(lambda: map_batches(broken, 4, "broken", side_by_side=True), RuntimeError)
        and torch.get_num_threads() == 3
    )
    os.environ["OMP_WAIT_POLICY"] = "active"
    seen.clear()
    map_batches(square, 20, "shares", side_by_side="asleep")
    assert seen == [(0, 20, 3)]  # threads that spin share each operation
    seen.clear()
    map_batches(square, 20, "shares", start=4, side_by_side=True)
    assert len(seen) == 6 and {s[2] for s in seen} == {1}  # large shares are worth it in any case
    torch.set_num_threads(before)
    os.environ.pop("OMP_WAIT_POLICY")
    os.environ.update({"OMP_WAIT_POLICY": policy} if policy else {})
