"The UNet in two parts is the same UNet, and odd ones are run whole."

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import SlicedAttnProcessor
from fastcore.test import test_eq as eq

from tiny_nbdev.diffusion.unet import unet_body, unet_stem, why_whole


def random_unet(seed=0, **kw):
    torch.manual_seed(seed)
    base = dict(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        layers_per_block=2,
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return UNet2DConditionModel(**base | kw).eval().requires_grad_(False)


layouts = dict(
    sd1={},
    sd2=dict(use_linear_projection=True, attention_head_dim=(2, 4), transformer_layers_per_block=2),
    late=dict(
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"], up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"]
    ),
    three=dict(
        block_out_channels=(16, 32, 32),
        down_block_types=["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2,
    ),
)


def test_two_parts_are_the_same_unet():
    for name, kw in layouts.items():
        for side in (8, 9):
            unet = random_unet(**kw).double()
            eq(why_whole(unet), None)
            z, emb, t = (
                torch.randn(3, 4, side, side).double(),
                torch.randn(3, 7, 24).double(),
                torch.tensor([3, 500, 999]),
            )
            e1, e2 = emb.clone().requires_grad_(), emb.clone().requires_grad_()
            want = unet(z, t, encoder_hidden_states=e1, return_dict=False)[0]
            want.square().sum().backward()
            with torch.no_grad():
                stem = unet_stem(unet, z, t)
            got = unet_body(unet, stem, e2)
            got.square().sum().backward()
            assert (want - got).abs().max() < 1e-12, (name, side)
            assert (e1.grad - e2.grad).abs().max() < 1e-11 * e1.grad.abs().max().clamp_min(1), (name, side)
            one = unet_stem(unet, z, t[1:2])  # one time for all
            assert (
                unet_body(unet, one.twice(), torch.cat([emb, 2 * emb]))
                - unet(torch.cat([z, z]), t[1], encoder_hidden_states=torch.cat([emb, 2 * emb]), return_dict=False)[0]
            ).abs().max() < 1e-12
            assert (unet_body(unet, stem.rows(torch.tensor([2, 0])), emb[[2, 0]]) - got[[2, 0]]).abs().max() < 1e-12


class Adapter(torch.nn.Module):
    pass  # such as peft puts in the place of a layer


def test_odd_unets_are_run_whole():
    assert "class_embed_type" in why_whole(random_unet(class_embed_type="timestep"))
    assert "SimpleCrossAttn" in why_whole(
        random_unet(
            down_block_types=["SimpleCrossAttnDownBlock2D", "DownBlock2D"],
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=["UpBlock2D", "SimpleCrossAttnUpBlock2D"],
        )
    )
    unet = random_unet()
    unet.register_forward_hook(lambda *a: None)
    assert "hook" in why_whole(unet)
    assert "Linear" in why_whole(torch.nn.Linear(2, 2))
    unet = random_unet()
    unet.enable_freeu(1.1, 1.1, 1.1, 1.1)
    assert "FreeU" in why_whole(unet)

    unet = random_unet()
    unet.mid_block.attentions[0].proj_in = Adapter()
    assert "Adapter" in why_whole(unet)

    unet = random_unet()
    unet.set_attn_processor(SlicedAttnProcessor(2))
    assert "SlicedAttnProcessor" in why_whole(unet)
