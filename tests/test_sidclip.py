"""SIDCLIP: students that start from a small CLIP, learn from a big one on the same views, and the rows beside them."""

import importlib.util

import pytest
import torch

from tiny_nbdev.classify.backbones import load_backbone, save_backbone
from tiny_nbdev.classify.clip import load_clip
from tiny_nbdev.classify.clip_students import OPEN_CLIP_MODELS, OpenClipConfig, text_head
from tiny_nbdev.classify.students import Classifier
from tiny_nbdev.core import file_sha256, rng_for
from tiny_nbdev.errors import InputError

WITH_OPEN_CLIP = importlib.util.find_spec("open_clip") is not None
_TEXT = dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1)
_TINY = dict(timm_model_name="efficientnet_lite0", timm_pool="", timm_proj="linear", image_size=64)
_MAP = dict(timm_model_name="vit_pe_core_tiny_patch16_384", timm_pool="map", timm_proj=None, image_size=384)


@pytest.mark.skipif(not WITH_OPEN_CLIP, reason="open_clip is not installed")
@pytest.mark.parametrize("vision", [_TINY, _MAP], ids=["projection", "head of the trunk"])
def test_a_tower_of_open_clip_becomes_a_students_start(tmp_path, monkeypatch, vision):
    import open_clip

    settings = dict(embed_dim=48, vision_cfg=vision, text_cfg=_TEXT)
    monkeypatch.setitem(OPEN_CLIP_MODELS, "tiny", settings)
    torch.manual_seed(0)
    net = open_clip.CLIP(**settings).eval()
    file = tmp_path / "epoch.pt"
    torch.save(dict(epoch=1, state_dict={f"module.{k}": v for k, v in net.state_dict().items()}), file)
    clip = load_clip("open_clip", config=OpenClipConfig("tiny", str(file), file_sha256(file)))
    x = torch.rand(2, 3, vision["image_size"], vision["image_size"], generator=rng_for("images"))
    seen = clip.backbone.prepare(x)
    with torch.no_grad():
        torch.testing.assert_close(clip.backbone(x), net.encode_image(seen))
    assert clip.names(["cup", "dog"]).shape == (2, 48)
    save_backbone(clip.backbone, tmp_path / "t.safetensors", "clip_tower", **clip.backbone.build_kwargs)
    student = Classifier(load_backbone(tmp_path / "t.safetensors"), 2)
    text_head(student, clip, ["cup", "dog"])
    with torch.no_grad():
        zero_shot = clip.logit_scale * clip.directions(clip.backbone(x)) @ clip.names(["cup", "dog"]).T
        torch.testing.assert_close(student.eval()(x), zero_shot)


@pytest.mark.skipif(not WITH_OPEN_CLIP, reason="open_clip is not installed")
def test_clip_kd_has_the_size_of_the_paper():
    from tiny_nbdev.classify.students import ClipTower

    tower = ClipTower(of="efficientnet_b0", dim=512, unit=False, bias=False)
    assert sum(p.numel() for p in tower.parameters()) == 4_007_548 + 1280 * 512  # 4.66 million


@pytest.mark.skipif(WITH_OPEN_CLIP, reason="open_clip is installed")
def test_without_open_clip_one_sentence_says_what_to_install():
    with pytest.raises(InputError, match="pip install open_clip_torch"):
        load_clip("open_clip")
