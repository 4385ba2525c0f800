"Adapters: against diffusers and peft, and what a UNet keeps when adapters come and go."

import copy

import pytest
import torch

from tiny_nbdev.core import load_tensors, randn_images, save_tensors
from tiny_nbdev.diffusion.adapters import (
    AdaptedModel,
    AdapterConfig,
    AdapterImages,
    adapter_layout,
    adapter_losses,
    fuse,
    load_lora,
    save_lora,
    share_weights,
    start_adapters,
    train_adapters,
)
from tiny_nbdev.diffusion.model import LatentDiffusion
from tiny_nbdev.diffusion.tiny import make_tiny_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder):
    return LatentDiffusion.load(folder)


def some_adapters(layout, n=2, scale=0.2):
    return torch.randn(n, layout.n_parameters, generator=torch.Generator().manual_seed(0)) * scale


def asked(model, n=2):
    return randn_images(model.latent_shape, range(n)), model.encode_text(model.tokenize(["red cat", "dog"][:n]))


def predict(model, pairs, layout):
    z, emb = asked(model)
    with torch.no_grad(), AdaptedModel(model, layout).using(pairs) as m:
        return m.noise_pred(z, 300, emb)


def test_a_model_used_elsewhere_is_not_touched(model):
    layout = adapter_layout(model.unet, 2, convolutions=True)
    before, (z, emb) = {k: v.clone() for k, v in model.unet.state_dict().items()}, asked(model)
    plain = model.noise_pred(z, 300, emb).detach()
    adapted = AdaptedModel(model, layout)
    with torch.no_grad(), adapted.using(layout.split(some_adapters(layout))) as m:
        changed = m.noise_pred(z, 300, emb)
        assert torch.equal(model.noise_pred(z, 300, emb), plain), "the model itself, while adapters are in use"
    assert not torch.allclose(changed, plain, atol=1e-3)
    assert torch.equal(adapted.model.noise_pred(z, 300, emb), plain), "and the copy afterwards"
    images = AdapterImages(z, torch.zeros_like(z), emb)
    train_adapters(
        model, images, [[0], [1]], layout, AdapterConfig(steps=2, warmup=1, convolutions=True), progress=False
    )
    assert all(torch.equal(v, before[k]) for k, v in model.unet.state_dict().items())
    assert all(p.grad is None for p in model.unet.parameters())
    own = {p.data_ptr() for p in adapted.model.unet.parameters()}
    assert own == {p.data_ptr() for p in model.unet.parameters()}, "no weight is held twice"


def test_an_error_in_the_block_detaches(model):
    layout = adapter_layout(model.unet)
    adapted, (z, emb) = AdaptedModel(model, layout), asked(model)
    with pytest.raises(KeyError), adapted.using(layout.split(some_adapters(layout))):
        raise KeyError
    assert torch.equal(adapted.model.noise_pred(z, 1, emb), model.noise_pred(z, 1, emb))
    with pytest.raises(ValueError, match="2 rows came for 3 adapters"):
        with adapted.using(layout.split(some_adapters(layout, 3))) as m:
            m.noise_pred(z, 1, emb)


def test_both_ways_through_the_unet_agree(model):
    "In two parts, as `unet_stem` and `unet_body` run it, and whole, as diffusers does."
    layout = adapter_layout(model.unet, 2, convolutions=True)
    flat, (z, emb) = some_adapters(layout), asked(model)
    adapted = AdaptedModel(model, layout)
    with torch.no_grad(), adapted.using(layout.split(flat)) as m:
        parts, whole = m.noise_pred(z, 300, emb), m.unet(z, 300, encoder_hidden_states=emb).sample
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


def test_half_precision(folder):
    model = LatentDiffusion.load(folder, dtype=torch.bfloat16)
    layout, (z, emb) = adapter_layout(model.unet), asked(model)
    images = AdapterImages(z, torch.zeros_like(z), emb.float())
    config = AdapterConfig(steps=3, warmup=1)
    flat, losses = train_adapters(model, images, [[0], [1]], layout, config, progress=False)
    assert flat.dtype == torch.float32 and torch.isfinite(losses).all()
    assert not torch.equal(flat, start_adapters(layout, [0, 1]))


def test_a_step_lowers_the_loss(model):
    layout, (z, emb) = adapter_layout(model.unet), asked(model)
    images = AdapterImages(z, torch.zeros_like(z), emb)
    flat, _ = train_adapters(
        model, images, [[0], [1]], layout, AdapterConfig(steps=60, warmup=5, lr=1e-2), progress=False
    )
    t, noise = torch.full((2, 8), 400), randn_images(model.latent_shape, range(16)).unflatten(0, (2, 8))
    how = (z[:, None].expand(-1, 8, -1, -1, -1), t, noise, emb[:, None].expand(-1, 8, -1, -1))
    adapted = AdaptedModel(model, layout)
    with torch.no_grad():
        own, start = adapter_losses(adapted, flat, *how), adapter_losses(adapted, flat * 0, *how)
        swapped = adapter_losses(adapted, flat.flip(0), *how)
    assert (own < start).all() and (own < swapped).all(), "each adapter knows its own image best"


@pytest.mark.parametrize("ends", [(".lora_A.weight", ".lora_B.weight"), (".lora.down.weight", ".lora.up.weight")])
@pytest.mark.parametrize("convolutions", [False, True])
def test_files_of_both_spellings_with_factor_and_gaps(model, tmp_path, ends, convolutions):
    layout = adapter_layout(model.unet, 2, convolutions)
    flat = some_adapters(layout, 1)
    save_lora(tmp_path / "a.safetensors", layout, flat[0])
    tensors, _ = load_tensors(tmp_path / "a.safetensors")
    spelled = {k.replace(".lora_A.weight", ends[0]).replace(".lora_B.weight", ends[1]): v for k, v in tensors.items()}
    first, other = list(layout.shapes)[:2]
    spelled = {k: v for k, v in spelled.items() if f".{other}." not in k}  # a layer without an adapter
    spelled[f"unet.{first}.alpha"] = torch.tensor(1.0)  # of rank 2: a factor of one half
    save_tensors(spelled, tmp_path / "b.safetensors")
    again, row = load_lora(tmp_path / "b.safetensors", model.unet)
    A, B = layout.split(flat)[first]
    found = again.split(row)
    assert torch.equal(found[first][0], A) and torch.equal(found[first][1], B / 2)
    assert not found[other][1].any() and again == layout


@pytest.mark.parametrize("convolutions", [False, True])
def test_diffusers_draws_the_same_with_our_file(folder, model, tmp_path, convolutions):
    pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline

    layout = adapter_layout(model.unet, 2, convolutions)
    flat = some_adapters(layout, 1)
    save_lora(tmp_path / "ours.safetensors", layout, flat[0])
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.load_lora_weights(tmp_path, weight_name="ours.safetensors")
    z, emb = asked(model)
    plain = model.noise_pred(z, 300, emb).detach()
    with torch.no_grad():
        theirs = pipe.unet(z, 300, encoder_hidden_states=emb).sample
    ours = predict(
        model, {k: (A.expand(2, -1, -1), B.expand(2, -1, -1)) for k, (A, B) in layout.split(flat).items()}, layout
    )
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(theirs, plain, atol=1e-2)


def test_their_file_is_read_and_cat_is_our_mixture(folder, model, tmp_path):
    peft = pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layout = adapter_layout(model.unet, 2)
    config = peft.LoraConfig(
        r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False
    )
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(copy.deepcopy(model.unet), config, adapter_name="one")
    wrapped.add_adapter("two", config)
    rows = []
    for name in ("one", "two"):
        state = convert_state_dict_to_diffusers(get_peft_model_state_dict(wrapped, adapter_name=name))
        state = {k.removeprefix("base_model.model."): v for k, v in state.items()}
        StableDiffusionPipeline.save_lora_weights(tmp_path, state, weight_name=f"{name}.safetensors")
        read, row = load_lora(tmp_path / f"{name}.safetensors", model.unet)
        assert read == layout
        rows.append(row)
    wrapped.add_weighted_adapter(["one", "two"], [0.3, 0.7], "both", combination_type="cat")
    wrapped.set_adapter("both")
    z, emb = asked(model)
    with torch.no_grad():
        theirs = wrapped(z, 300, encoder_hidden_states=emb).sample
    which, weights = torch.tensor([[0, 1]] * 2), torch.tensor([[0.3, 0.7]] * 2)
    ours = predict(model, fuse(layout.split(torch.cat(rows)), which, weights), layout)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_shared_weights_follow_the_model(model):
    shared = share_weights(model.unet)
    assert all(a is b for a, b in zip(shared.parameters(), model.unet.parameters()))
    assert not {id(m) for m in shared.modules()} & {id(m) for m in model.unet.modules()}
